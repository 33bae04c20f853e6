"""The layout of one's own data: photos and sketches as files in folders.

Photos lie below a folder called ``photo``, ``photos``, ``image`` or ``images``, sketches below one
called ``sketch``, ``sketches``, ``drawing`` or ``drawings``, or below the folders that the user
names. A folder called ``train``, ``val`` or ``test`` anywhere above a file puts it in that split;
``trainA``/``trainB`` and ``testA``/``testB`` are the sketches and photos of a split, as raster data
sets have them. Other folders between belong to the name: ``photos/chair/7.jpg`` is ``chair/7``.

A sketch is of the photo with its name, or with its name without ``_<k>`` or ``-<k>``, or, where the
photos lie in folders of which the sketches know nothing, with its stem. A CSV file (``pairs.csv``
in the folder, or the one given) with the columns photo, sketch and, if wanted, split decides
instead.

Sketches are vector files (:mod:`sbir_ray.data.formats`), alone or many in one file under keys that
then count as their stems, or pictures of drawings, which are traced and kept.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from sbir_ray.data import formats
from sbir_ray.data import photos as photo_files
from sbir_ray.data.pair_table import FileIndex, pair_by_csv
from sbir_ray.data.pairs import Split
from sbir_ray.data.photos import PhotoLimits
from sbir_ray.data.quickdraw import read_drawings
from sbir_ray.data.sources import (
    Found,
    Reject,
    SourceOptions,
    SourceSketch,
    meant_by,
    photo_file,
    split_named,
)
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError

Role = Literal["photo", "sketch"]
PAIRS_CSV = "pairs.csv"

_ROLES: dict[str, tuple[Role, Split | None]] = {
    **dict.fromkeys(("photo", "photos", "image", "images"), ("photo", None)),
    **dict.fromkeys(("sketch", "sketches", "drawing", "drawings"), ("sketch", None)),
    "traina": ("sketch", "train"),
    "trainb": ("photo", "train"),
    "testa": ("sketch", "test"),
    "testb": ("photo", "test"),
}
_VECTOR_SUFFIXES = frozenset(f".{kind}" for kind in formats.KINDS)
_ANYWHERE = frozenset({".ndjson"})
"""Endings of files that are sketches wherever they lie."""
_EXPECTED = (
    "photos belong in a folder photo(s) or image(s), sketches in sketch(es) or drawing(s), "
    "or name the folders with --photos and --sketches"
)


@dataclass(frozen=True, slots=True)
class _File:
    """A file with what its folders say about it."""

    path: Path
    role: Role | None
    split: Split | None
    folder: str
    """Folders that belong to the name, joined by /."""
    place: str
    """Path within the source."""

    @property
    def stem(self) -> str:
        return photo_files.printable(self.path.stem)

    def named(self, key: str) -> str:
        return f"{self.folder}/{key}" if self.folder else key


def read_folder(src: Path, options: SourceOptions) -> Found:
    """Photos and sketches of a folder tree (see the module's text).

    Raises:
        UserError: no such folder, no photo or no sketch in it, or a CSV file that cannot be read.
    """
    return _read(src, options, _VECTOR_SUFFIXES | photo_files.SUFFIXES)


def read_quickdraw(src: Path, options: SourceOptions) -> Found:
    """Photos as in the folder layout, and all sketches in QuickDraw's ndjson files.

    The photo of a drawing is the one that its field ``photo`` names, or the CSV, or the one called
    like its ``key_id`` (without ``_<k>``), or the one called like its ``word`` (or alone in the
    folder of that name).

    Raises:
        UserError: as :func:`read_folder`.
    """
    return _read(src, options, frozenset({".ndjson"}))


def _read(src: Path, options: SourceOptions, suffixes: frozenset[str]) -> Found:
    found = Found()
    photos, sketches = FileIndex(), FileIndex()
    words: dict[str, str] = {}
    others = 0
    for file in _files(src, options):
        suffix = file.path.suffix.lower()
        calls = {
            file.place,
            photo_files.printable(file.path.name),
            file.stem,
            file.named(file.stem),
        }
        if file.role == "photo" and suffix in photo_files.SUFFIXES:
            photos.add(len(found.photos), calls)
            found.photos.append(photo_file(file.path, file.named(file.stem), file.split))
        elif file.role != "photo" and suffix in suffixes and (file.role or suffix in _ANYWHERE):
            for sketch in _sketches(file, found, words):
                alone = sketch.origin == file.place
                sketches.add(
                    len(found.sketches),
                    calls if alone else {sketch.origin, sketch.key, file.named(sketch.key)},
                )
                found.sketches.append(sketch)
        elif file.path.name != PAIRS_CSV:
            others += 1
    for what, items in (("photo", found.photos), ("sketch", found.sketches)):
        if not items:
            raise UserError(f"{src}: no {what} in it; {_EXPECTED}")
    if others:
        found.notes.append(f"{others} other files were not looked at")
    table = options.pairs or src / PAIRS_CSV
    if options.pairs is not None or table.is_file():
        pair_by_csv(table, photos, sketches, found)
    else:
        _forget_folders(found, words)
    return found


# --------------------------------------------------------------------------- files


def _files(src: Path, options: SourceOptions) -> Iterator[_File]:
    if not src.is_dir():
        raise UserError(f"{src}: no such folder")
    given: dict[Role, Path] = {}
    if options.photos is not None:
        given["photo"] = options.photos
    if options.sketches is not None:
        given["sketch"] = options.sketches
    for role, root in given.items():
        if not root.exists():
            raise UserError(f"{root}: no such folder")
        for path in _walk(root) if root.is_dir() else [root]:
            yield _described(path, root, src, role)
    if len(given) < 2:
        for path in _walk(src):
            file = _described(path, src, src, None)
            # A role whose folder was given has no files elsewhere.
            if file.role not in given and not any(map(path.is_relative_to, given.values())):
                yield file


def _walk(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        # A folder called x.jpg is an unreadable photo, not a place to look for photos.
        odd = [name for name in below if Path(name).suffix.lower() in photo_files.SUFFIXES]
        below[:] = sorted(name for name in below if name not in odd and not name.startswith("."))
        for name in sorted([*names, *odd]):
            if not name.startswith("."):
                yield Path(folder, name)


def _described(path: Path, root: Path, src: Path, role: Role | None) -> _File:
    split: Split | None = None
    kept = []
    for part in path.relative_to(root).parts[:-1]:
        known = _ROLES.get(part.lower())
        if known is not None and role in (None, known[0]):
            role, split = known[0], known[1] or split
        elif split_named(part) is not None:
            split = split_named(part)
        else:
            kept.append(part)
    base = src if path.is_relative_to(src) else root
    place = photo_files.printable(path.relative_to(base).as_posix())
    return _File(path, role, split, photo_files.printable("/".join(kept)), place)


# --------------------------------------------------------------------------- sketches


def _sketches(file: _File, found: Found, words: dict[str, str]) -> Iterator[SourceSketch]:
    """The sketches of one file; what cannot be read is added to the rejects, what a drawing shows
    to ``words``."""
    suffix = file.path.suffix.lower()
    if suffix == ".ndjson":
        for drawing in read_drawings(file.path, file.place, found):
            if drawing.word is not None:
                words[drawing.origin] = drawing.word
            yield SourceSketch(
                key=drawing.key,
                photo=file.named(drawing.key) if drawing.photo is None else drawing.photo,
                origin=drawing.origin,
                split=file.split,
                load=partial(_loaded, drawing.strokes),
                named=drawing.photo is not None,
            )
    elif suffix in (".npy", ".npz"):
        yield from _arrays(file, found)
    else:
        load = _load_drawing if suffix in photo_files.SUFFIXES else _load_vector
        yield SourceSketch(
            key=file.stem,
            photo=file.named(file.stem),
            origin=file.place,
            split=file.split,
            load=partial(load, file.path, file.place),
            named=False,
        )


def _arrays(file: _File, found: Found) -> Iterator[SourceSketch]:
    try:
        for key, strokes in formats.read_sketches(file.path, name=file.place):
            key = photo_files.printable(key)
            yield SourceSketch(
                key=key,
                photo=file.named(key),
                origin=file.place if key == file.stem else f"{file.place}:{key}",
                split=file.split,
                load=partial(_loaded, strokes),
                named=False,
            )
    except UserError as error:
        text = str(error).removeprefix(f"{file.place}: ")
        found.rejects.append(Reject("sketch", "damaged", file.place, text))


def _loaded(strokes: Strokes, _: PhotoLimits) -> tuple[Strokes, None]:
    return strokes, None


def _load_vector(path: Path, place: str, _: PhotoLimits) -> tuple[Strokes, None]:
    return formats.read_sketch(path, formats.kind_of(path.name), place), None


def _load_drawing(path: Path, place: str, limits: PhotoLimits) -> tuple[Strokes, bytes]:
    # Imported late: scikit-image takes a second, and most data needs no tracing.
    from sbir_ray.data.trace import trace_drawing

    grey = photo_files.decode_grey(photo_files.read_bytes(path, limits), limits)
    strokes = trace_drawing(grey)
    if not strokes:
        raise UserError(f"{place}: no lines in the drawing")
    return strokes, photo_files.encode_png(grey)


# --------------------------------------------------------------------------- pairing


def _forget_folders(found: Found, words: Mapping[str, str]) -> None:
    """Point sketches at photos that lie in folders of which the sketch's name knows nothing, or
    that are called by a drawing's word."""
    names = {photo.name for photo in found.photos}
    short: dict[str, set[str]] = defaultdict(set)
    for name in names:
        short[PurePosixPath(name).name].add(name)
        short[PurePosixPath(name).parent.name].add(name)
    for number, sketch in enumerate(found.sketches):
        if sketch.named or not names.isdisjoint(meant_by(sketch.photo)):
            continue
        calls = meant_by(PurePosixPath(sketch.photo).name)
        if sketch.origin in words:
            calls.append(words[sketch.origin])
        photo = next((call for call in calls if len(short.get(call, ())) == 1), None)
        if photo is not None:
            (name,) = short[photo]
            found.sketches[number] = replace(sketch, photo=name, named=True)
