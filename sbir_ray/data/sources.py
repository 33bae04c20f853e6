"""What a layout finds in somebody's data: photos, sketches, and where their ids disagree.

A layout reads names and keys first and pixels and strokes later, one at a time, so that everything
that is wrong with the ids is known before any work is done, and one damaged file costs one row.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sbir_ray.data import photos as photo_files
from sbir_ray.data.pairs import SPLITS, Split
from sbir_ray.data.photos import PhotoLimits, PhotoRow
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError

Kind = Literal[
    "photo-without-sketch",
    "sketch-without-photo",
    "sketch-of-two-photos",
    "twins",
    "csv-against-folder",
    "split-conflict",
    "leak",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
CONSEQUENCES: dict[Kind, str] = {
    "photo-without-sketch": "the photo is kept for the gallery",
    "sketch-without-photo": "the sketch is left out",
    "sketch-of-two-photos": "the sketch is left out",
    "twins": "names that differ in case or Unicode form alone are taken as they are, and a sketch "
    "goes to the one photo that its name then fits",
    "csv-against-folder": "rows without files and files without rows are left out",
    "leak": "the photo stays in both splits",
}
"""What is done with each kind of disagreement that may be allowed, and so which may be."""

SketchReason = Literal["damaged", "no-extent", "photo-rejected"]
"""Why a sketch is rejected; no other reason occurs."""

_LISTED = 200
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_NUMBERED = re.compile(r"(?P<photo>.+)[_-](?P<number>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class SourcePhoto:
    """A photo as a layout found it."""

    name: str
    """Name within the data set, by which sketches refer to it."""
    uri: str
    split: Split | None
    """Split that the source puts it in."""
    load: Callable[[PhotoLimits], PhotoRow]
    """Raises PhotoError."""
    group: str = ""
    """Photos of one group are so alike that they have to go to one split; "" for none."""


@dataclass(frozen=True, slots=True)
class SourceSketch:
    """A sketch as a layout found it."""

    key: str
    """Name of the sketch: a file's stem or a key within a file."""
    photo: str
    """Name of its photo, or, when ``named`` is false, a name from which the photo's follows."""
    origin: str
    split: Split | None
    load: Callable[[PhotoLimits], tuple[Strokes, bytes | None]]
    """Strokes, and a grey PNG when the source is a raster. Raises UserError."""
    named: bool = True
    """False: the photo is the one called ``photo``, or ``photo`` without its ``_<k>``/``-<k>``."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One thing that does not fit in the ids of photos and sketches."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Reject:
    """One file or key that cannot be used."""

    what: Literal["photo", "sketch"]
    reason: photo_files.Reason | SketchReason
    origin: str
    text: str


@dataclass(slots=True)
class Found:
    """Everything that a layout found."""

    photos: list[SourcePhoto] = field(default_factory=list)
    sketches: list[SourceSketch] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    photos_left_out: int = 0
    """Photos that a CSV does not name; they are not in ``photos``."""
    sketches_left_out: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where a layout looks, when not where it looks by itself."""

    photos: Path | None = None
    sketches: Path | None = None
    pairs: Path | None = None
    """CSV with the columns photo, sketch and, if wanted, split."""
    every: int = 1
    """openmoji: read every N-th emoji alone."""


class DisagreementError(UserError):
    """The ids of photos and sketches disagree; ``disagreements`` has every case."""

    def __init__(self, where: str, disagreements: Sequence[Disagreement]) -> None:
        self.disagreements = list(disagreements)
        lines = [f"{where}: photos and sketches disagree; nothing was written"]
        allow: list[str] = []
        for kind in KINDS:
            texts = sorted(d.text for d in disagreements if d.kind == kind)
            if not texts:
                continue
            lines.append(f"  {kind}: {len(texts)}")
            lines += [f"    {text}" for text in texts[:_LISTED]]
            if len(texts) > _LISTED:
                lines.append(f"    ... and {len(texts) - _LISTED} more")
            if kind in CONSEQUENCES:
                allow.append(f"  --allow {kind}: {CONSEQUENCES[kind]}")
        advice = ["correct the data, or go on with", *allow] if allow else ["correct the data"]
        super().__init__("\n".join([*lines, *advice]))

    def __reduce__(self) -> tuple[type[UserError], tuple[str]]:
        return UserError, (str(self),)


def check_allow(allow: Iterable[str]) -> frozenset[Kind]:
    """The kinds of disagreement that the user allows.

    Raises:
        UserError: a kind that is unknown or cannot be allowed.
    """
    asked = set(allow)
    for name in sorted(asked - CONSEQUENCES.keys()):
        raise UserError(f"--allow {name}: cannot be allowed; known are {', '.join(CONSEQUENCES)}")
    return frozenset(kind for kind in CONSEQUENCES if kind in asked)


# --------------------------------------------------------------------------- names


def split_named(name: str) -> Split | None:
    """The split that a folder or a CSV cell of this name means."""
    return _SPLIT_NAMES.get(name.strip().lower())


def folded(name: str) -> str:
    """The name as it is compared when case and Unicode form are ignored."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def without_number(name: str) -> str | None:
    """``name`` without its ``_<k>`` or ``-<k>``, or None when it has none."""
    numbered = _NUMBERED.fullmatch(name)
    return numbered["photo"] if numbered else None


def meant_by(name: str) -> list[str]:
    """Names of photos that a sketch of this name may be of, the likeliest first."""
    stem = without_number(name)
    return [name] if stem is None else [name, stem]


def number_of(key: str, photo: str) -> int | None:
    """The k of a sketch called ``<photo>_<k>`` or ``<photo>-<k>``, or None."""
    numbered = _NUMBERED.fullmatch(key)
    if numbered is None or numbered["photo"] != photo.rpartition("/")[2]:
        return None
    return int(numbered["number"])


def photo_file(path: Path, name: str, split: Split | None) -> SourcePhoto:
    """A photo that is a file on the local disk."""
    name, uri = photo_files.printable(name), photo_files.printable(str(path))

    def load(limits: PhotoLimits) -> PhotoRow:
        return photo_files.make_row(
            photo_files.read_bytes(path, limits), name=name, uri=uri, limits=limits
        )

    return SourcePhoto(name, uri, split, load)


# --------------------------------------------------------------------------- matching


@dataclass(frozen=True, slots=True)
class Matched:
    """Photos with their sketches, after the ids have been compared."""

    photos: list[SourcePhoto]
    sketches: list[list[SourceSketch]]
    """For each photo."""
    splits: list[Split | None]
    """For each photo, as the source has it."""
    disagreements: list[Disagreement]


def match(found: Found) -> Matched:
    """Give every sketch its photo, and list everything that does not fit."""
    names: dict[str, list[int]] = defaultdict(list)
    twins: dict[str, set[str]] = defaultdict(set)
    for number, photo in enumerate(found.photos):
        names[photo.name].append(number)
        twins[folded(photo.name)].add(photo.name)
    out = list(found.disagreements)
    for group in twins.values():
        if len(group) > 1:
            out.append(Disagreement("twins", "photos " + ", ".join(sorted(map(repr, group)))))
    of_photo: list[list[SourceSketch]] = [[] for _ in found.photos]
    for sketch in found.sketches:
        candidates = _candidates(sketch, names, twins, out)
        if sketch.split is not None and len(candidates) > 1:
            same = [n for n in candidates if found.photos[n].split == sketch.split]
            candidates = same or candidates
        if not candidates:
            out.append(Disagreement("sketch-without-photo", f"{sketch.origin}"))
        elif len(candidates) > 1:
            uris = ", ".join(sorted(found.photos[number].uri for number in candidates))
            out.append(Disagreement("sketch-of-two-photos", f"{sketch.origin}: {uris}"))
        else:
            of_photo[candidates[0]].append(sketch)
    out += _split_conflicts(found.photos, names, of_photo)
    for photo, sketches in zip(found.photos, of_photo, strict=True):
        if not sketches:
            out.append(Disagreement("photo-without-sketch", photo.uri))
    splits = [
        photo.split or next((s.split for s in sketches if s.split is not None), None)
        for photo, sketches in zip(found.photos, of_photo, strict=True)
    ]
    return Matched(found.photos, of_photo, splits, out)


def _candidates(
    sketch: SourceSketch,
    names: dict[str, list[int]],
    twins: dict[str, set[str]],
    out: list[Disagreement],
) -> list[int]:
    """Photos that the sketch may be of: by its name, by the name without number, by a twin."""
    wanted = [sketch.photo] if sketch.named else meant_by(sketch.photo)
    for name in wanted:
        if name in names:
            return names[name]
    for name in wanted:
        near = twins.get(folded(name), set())
        if near:
            text = f"{sketch.origin} means {name!r}, the photo is {', '.join(sorted(near))!r}"
            out.append(Disagreement("twins", text))
            return [number for twin in near for number in names[twin]]
    return []


def _split_conflicts(
    photos: Sequence[SourcePhoto],
    names: dict[str, list[int]],
    of_photo: Sequence[Sequence[SourceSketch]],
) -> list[Disagreement]:
    conflicts = []
    for name, numbers in names.items():
        splits: set[Split] = {s for n in numbers if (s := photos[n].split) is not None}
        splits |= {s.split for n in numbers for s in of_photo[n] if s.split is not None}
        if len(splits) > 1:
            places = " and ".join(split for split in SPLITS if split in splits)
            conflicts.append(Disagreement("split-conflict", f"{name!r} is in {places}"))
    return conflicts
