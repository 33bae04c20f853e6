"""From somebody's data to a PAIRS folder: read a layout, compare the ids, choose splits, write.

Nothing is written before the ids of all photos and sketches have been compared; one damaged file
is one counted reject. The counts add up: found = kept + merged + rejected by reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbir_ray.data import strokes as sketch_form
from sbir_ray.data.atomic import refuse_existing
from sbir_ray.data.folder import read_folder, read_quickdraw
from sbir_ray.data.leaks import Print, find_leaks, near_pairs, print_of
from sbir_ray.data.pairs import (
    PHOTO_ROWS,
    PairPhotoRow,
    PairsWriter,
    SketchRow,
    Split,
    Table,
    new_pairs,
)
from sbir_ray.data.photos import (
    DEFAULT_LIMITS,
    PHOTO_SCHEMA,
    PhotoError,
    PhotoLimits,
    PhotoRow,
    Rgb,
    photo_id,
    read_rows,
    row_of_pixels,
)
from sbir_ray.data.qmul import read_qmul
from sbir_ray.data.sources import (
    Disagreement,
    DisagreementError,
    Found,
    Kind,
    Matched,
    Reject,
    SourceOptions,
    SourcePhoto,
    SourceSketch,
    check_allow,
    match,
    number_of,
)
from sbir_ray.data.splits import SplitOptions, given_splits, hold_back
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError

PACKAGE = "package"
"""Source of the openmoji layout: the installed package."""


def read_openmoji(src: Path, options: SourceOptions) -> Found:
    """The emoji of OpenMoji: line art as the sketch, colour art as the photo.

    ``src`` is a folder with its SVG files, or :data:`PACKAGE`.

    Raises:
        UserError: the package is not installed, or the folder has no such files.
    """
    if options != SourceOptions(every=options.every):
        raise UserError("the openmoji layout takes no photo, sketch or pair paths; leave them out")
    # Imported late: the renderer comes with the demo's package alone.
    from sbir_ray.data.openmoji import openmoji

    found = Found()
    skipped: Counter[str] = Counter()
    for emoji in openmoji(None if str(src) == PACKAGE else src, skipped, options.every):
        uri = f"openmoji:{emoji.name}"
        row = partial(_emoji_row, emoji.photo, emoji.name, uri)
        found.photos.append(SourcePhoto(emoji.name, uri, None, row, emoji.group))
        drawn = partial(_emoji_sketch, emoji.strokes)
        found.sketches.append(SourceSketch(emoji.name, emoji.name, uri, None, drawn))
    if skipped:
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(skipped.items()))
        found.notes.append(f"emoji that are no pair: {reasons}")
    return found


def _emoji_row(rgb: Rgb, name: str, uri: str, _: PhotoLimits) -> PhotoRow:
    # There is no file: the pixels are the content.
    return row_of_pixels(rgb, photo_id(rgb.tobytes()), name, uri)


def _emoji_sketch(strokes: Strokes, _: PhotoLimits) -> tuple[Strokes, None]:
    return strokes, None


LAYOUTS: dict[str, Callable[[Path, SourceOptions], Found]] = {
    "qmul": read_qmul,
    "folder": read_folder,
    "quickdraw": read_quickdraw,
    "openmoji": read_openmoji,
}
"""How data may lie on disk: the reader of each layout."""

_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What ``import_pairs`` allows, where it looks, and how it splits."""

    allow: frozenset[str] = frozenset()
    """Kinds of disagreement to go on with (``sources.CONSEQUENCES`` says how)."""
    source: SourceOptions = field(default_factory=SourceOptions)
    splits: SplitOptions = field(default_factory=SplitOptions)
    limits: PhotoLimits = DEFAULT_LIMITS


@dataclass(slots=True)
class ImportReport:
    """What became of every photo and sketch that was found."""

    splits: dict[Split, dict[str, int]] = field(default_factory=dict)
    """Photos and sketches written, by split."""
    photos_found: int = 0
    photos_left_out: int = 0
    """Photos that a CSV does not name, when that was allowed."""
    photos_merged: int = 0
    """Photos that are, byte for byte, another photo of the same split; their sketches are its."""
    sketches_found: int = 0
    sketches_left_out: int = 0
    """Sketches without a photo, of two, or of a photo left out, when that was allowed."""
    rejects: list[Reject] = field(default_factory=list)
    allowed: list[Disagreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, what: str) -> int:
        """Photos or sketches written."""
        return sum(counts[what] for counts in self.splits.values())

    def rejected(self, what: str) -> dict[str, int]:
        """Number of rejected photos or sketches by reason."""
        return dict(Counter(f"{r.reason}" for r in self.rejects if r.what == what))

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        lines = []
        for split, counts in self.splits.items():
            if counts["photos"]:
                lines.append(f"{split}: {counts['photos']} photos, {counts['sketches']} sketches")
        if self.photos_merged:
            lines.append(f"merged: {self.photos_merged} photos that are copies of another one")
        examples: dict[tuple[str, str], list[Reject]] = defaultdict(list)
        for reject in self.rejects:
            examples[reject.what, reject.reason].append(reject)
        for (what, reason), found in sorted(examples.items()):
            lines.append(f"rejected {what}s, {reason}: {len(found)}")
            lines += [f"  {reject.origin}: {reject.text}" for reject in found[:_EXAMPLES]]
        kinds = Counter(disagreement.kind for disagreement in self.allowed)
        lines += [f"allowed, {kind}: {number}" for kind, number in sorted(kinds.items())]
        return lines + self.notes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "splits": self.splits,
            "photos_found": self.photos_found,
            "photos_left_out": self.photos_left_out,
            "photos_merged": self.photos_merged,
            "photos_rejected": self.rejected("photo"),
            "sketches_found": self.sketches_found,
            "sketches_left_out": self.sketches_left_out,
            "sketches_rejected": self.rejected("sketch"),
            "rejects": [[r.what, r.reason, r.origin, r.text] for r in self.rejects],
            "allowed": [[d.kind, d.text] for d in self.allowed],
            "notes": self.notes,
        }


def import_pairs(
    src: str | Path, layout: str, out: str | Path, options: ImportOptions | None = None
) -> ImportReport:
    """Read the data in ``src`` and write it as the PAIRS folder ``out``.

    Raises:
        DisagreementError: ids disagree, or a photo is in two splits, in ways not allowed; it lists
            all cases.
        UserError: anything else that is wrong with the source, an unknown layout or option, no pair
            left, or ``out`` not empty.
    """
    options = options or ImportOptions()
    allow = check_allow(options.allow)
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}: unknown; known are {', '.join(LAYOUTS)}")
    src = Path(src)
    refuse_existing(out)
    found = LAYOUTS[layout](src, options.source)
    matched = match(found)
    splits, more = given_splits(matched.photos, matched.splits, options.splits)
    disagreements = matched.disagreements + more
    refuse(str(src), disagreements, allow)
    report = ImportReport(
        photos_found=len(found.photos) + found.photos_left_out,
        photos_left_out=found.photos_left_out,
        sketches_found=len(found.sketches) + len(found.rejects) + found.sketches_left_out,
        sketches_left_out=len(found.sketches)
        - sum(map(len, matched.sketches))
        + found.sketches_left_out,
        rejects=list(found.rejects),
        allowed=disagreements,
        notes=list(found.notes),
    )
    with new_pairs(out, source=str(src), layout=layout) as writer:
        leaks = _write(matched, splits, options, writer, report)
        refuse(str(src), leaks, allow)
        report.allowed += leaks
        if not report.count("sketches"):
            raise UserError("\n".join([f"{src}: no pair is left to write", *report.lines()]))
    return report


def refuse(where: str, disagreements: Sequence[Disagreement], allow: frozenset[Kind]) -> None:
    """Raise DisagreementError with everything that is not allowed, if there is anything."""
    refused = [d for d in disagreements if d.kind not in allow]
    if refused:
        raise DisagreementError(where, refused)


def _write(
    matched: Matched,
    splits: Sequence[Split | None],
    options: ImportOptions,
    writer: PairsWriter,
    report: ImportReport,
) -> list[Disagreement]:
    """Write what can be used, count what cannot, and return the leaks between splits."""
    # Photos wait in a file of their own: which are held back depends on which show the same.
    spool = writer.folder / "spool.parquet"
    numbers, prints = _spool(matched, splits, options.limits, spool, report)
    near = near_pairs(prints)
    photos = [matched.photos[number] for number in numbers]
    # _spool leaves out the photos without a split.
    given = [split for number in numbers if (split := splits[number]) is not None]
    chosen = hold_back(given, _units(photos, near), options.splits)
    written: set[tuple[str, Split]] = set()
    for number, row, split in zip(numbers, read_rows(spool), chosen, strict=True):
        if (row["photo_id"], split) in written:
            report.photos_merged += 1
        else:
            written.add((row["photo_id"], split))
            writer.add_photo(PairPhotoRow(**row, split=split))
        for sketch_id, sketch in _numbered(row["name"], matched.sketches[number]):
            _write_sketch(sketch, sketch_id, row["photo_id"], split, options.limits, writer, report)
    spool.unlink()
    report.splits = writer.counts
    _check_sums(report)
    return [Disagreement("leak", str(leak)) for leak in find_leaks(prints, chosen, near)]


def _spool(
    matched: Matched,
    splits: Sequence[Split | None],
    limits: PhotoLimits,
    file: Path,
    report: ImportReport,
) -> tuple[list[int], list[Print]]:
    """Decode the photos in order of name into ``file``; their numbers and prints."""
    numbers, prints = [], []
    table = Table(file, PHOTO_SCHEMA, PHOTO_ROWS)
    for number in sorted(range(len(splits)), key=lambda n: (matched.photos[n].name, n)):
        photo, sketches = matched.photos[number], matched.sketches[number]
        if splits[number] is None:
            report.photos_left_out += 1
            report.sketches_left_out += len(sketches)
            continue
        try:
            row = photo.load(limits)
        except PhotoError as error:
            report.rejects.append(Reject("photo", error.reason, photo.uri, error.text))
            for sketch in sketches:
                text = f"its photo {photo.name!r} was rejected"
                report.rejects.append(Reject("sketch", "photo-rejected", sketch.origin, text))
            continue
        table.add(row)
        numbers.append(number)
        prints.append(print_of(row))
    table.close()
    return numbers, prints


def _units(photos: Sequence[SourcePhoto], near: Sequence[tuple[int, int]]) -> list[str]:
    """What each photo goes to a split with: the photos of its group and those that show the same,
    called by the first name among them."""
    parent = list(range(len(photos)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first_of_group: dict[str, int] = {}
    links = list(near)
    for number, photo in enumerate(photos):
        if photo.group:
            links.append((first_of_group.setdefault(photo.group, number), number))
    for one, other in links:
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return [photos[root(number)].name for number in range(len(photos))]


def _write_sketch(
    sketch: SourceSketch,
    sketch_id: str,
    photo_id: str,
    split: Split,
    limits: PhotoLimits,
    writer: PairsWriter,
    report: ImportReport,
) -> None:
    try:
        strokes, drawing = sketch.load(limits)
        strokes = sketch_form.check(strokes, sketch.origin)
    except UserError as error:
        text = str(error).removeprefix(f"{sketch.origin}: ")
        report.rejects.append(Reject("sketch", "damaged", sketch.origin, text))
        return
    points = np.concatenate(strokes)
    if not np.ptp(points, axis=0).any():
        text = "all its points are one point"
        report.rejects.append(Reject("sketch", "no-extent", sketch.origin, text))
        return
    row = SketchRow(
        sketch_id=sketch_id,
        photo_id=photo_id,
        split=split,
        strokes=sketch_form.flatten(sketch_form.canonical(strokes)),
        drawing=drawing,
        origin=sketch.origin,
    )
    writer.add_sketch(row)


def _numbered(name: str, sketches: Sequence[SourceSketch]) -> list[tuple[str, SourceSketch]]:
    """The sketches of a photo with their ids, ``<photo>_<k>``: the source's own k where they have
    different ones, otherwise 1, 2, ... in order of key."""
    numbers = [number_of(sketch.key, name) for sketch in sketches]
    if None in numbers or len(set(numbers)) < len(numbers):
        ordered = sorted(sketches, key=lambda s: (number_of(s.key, name) or 0, s.key, s.origin))
        return [(f"{name}_{k}", sketch) for k, sketch in enumerate(ordered, start=1)]
    return [(f"{name}_{k}", sketch) for k, sketch in zip(numbers, sketches, strict=True)]


def _check_sums(report: ImportReport) -> None:
    for what, found, others in (
        ("photo", report.photos_found, report.photos_left_out + report.photos_merged),
        ("sketch", report.sketches_found, report.sketches_left_out),
    ):
        plural = "sketches" if what == "sketch" else "photos"
        fates = report.count(plural) + sum(report.rejected(what).values()) + others
        assert fates == found, f"{found} {plural} found, {fates} accounted for"
