"""The PAIRS folder: labelled pairs on disk, and a split of it in memory.

``pairs.json`` (header), ``photos.parquet`` (a photo row and its split) and ``sketches.parquet``
(canonical strokes, the photo they belong to, that photo's split). A split is a property of the
photo; its sketches follow it. The folder is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

import sbir_ray
from sbir_ray.data import photos as photo_files
from sbir_ray.data.atomic import new_folder
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoRow
from sbir_ray.data.strokes import Strokes, unflatten
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import open_table, place
from sbir_ray.strict import SCHEMA_VERSION, read_kind

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

PAIR_PHOTO_SCHEMA = PHOTO_SCHEMA.append(pa.field("split", pa.string()))
SKETCH_SCHEMA = pa.schema(
    [
        ("sketch_id", pa.string()),
        ("photo_id", pa.string()),
        ("split", pa.string()),
        ("strokes", pa.list_(pa.list_(pa.float32()))),
        ("drawing", pa.binary()),
        ("origin", pa.string()),
    ]
)
_HEADER = "pairs.json"
_PHOTOS = "photos.parquet"
_SKETCHES = "sketches.parquet"
PHOTO_ROWS = 64
"""Photos that are in memory at a time."""
_SKETCH_ROWS = 1024


class PairPhotoRow(PhotoRow):
    """A row of ``photos.parquet``."""

    split: Split


class SketchRow(TypedDict):
    """A row of ``sketches.parquet``."""

    sketch_id: str
    photo_id: str
    split: Split
    strokes: list[list[float]]
    """Canonical; each stroke as x0, y0, x1, y1, ... (``strokes.flatten``)."""
    drawing: bytes | None
    """Grey PNG of the drawing when the source was a raster."""
    origin: str
    """Where the sketch came from: a file, or a key within one."""


# --------------------------------------------------------------------------- writing


class PairsWriter:
    """Writes the rows of a PAIRS folder in batches and counts them by split."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts = {split: {"photos": 0, "sketches": 0} for split in SPLITS}
        self._photos = Table(folder / _PHOTOS, PAIR_PHOTO_SCHEMA, PHOTO_ROWS)
        self._sketches = Table(folder / _SKETCHES, SKETCH_SCHEMA, _SKETCH_ROWS)

    def add_photo(self, row: PairPhotoRow) -> None:
        self.counts[row["split"]]["photos"] += 1
        self._photos.add(row)

    def add_sketch(self, row: SketchRow) -> None:
        self.counts[row["split"]]["sketches"] += 1
        self._sketches.add(row)

    def close(self) -> None:
        self._photos.close()
        self._sketches.close()


class Table:
    """A Parquet file that is written in batches of a fixed number of rows."""

    def __init__(self, file: Path, schema: pa.Schema, rows: int) -> None:
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._schema = schema
        self._rows = rows
        self._waiting: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= self._rows:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
        self._waiting = []


@contextmanager
def new_pairs(out: str | Path, *, source: str, layout: str) -> Iterator[PairsWriter]:
    """A writer of the PAIRS folder ``out``, which appears when the block ends without an error.

    Raises:
        UserError: ``out`` exists and is not empty.
    """
    with new_folder(out) as folder:
        writer = PairsWriter(folder)
        try:
            yield writer
        finally:
            writer.close()
        counts = writer.counts
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "pairs",
            "source": source,
            "layout": layout,
            "created_with": f"sbir_ray {sbir_ray.__version__}",
            "counts": {
                what: sum(counts[split][what] for split in SPLITS)
                for what in ("photos", "sketches")
            },
            "splits": {split: counts[split] for split in SPLITS},
        }
        (folder / _HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- reading


def read_header(folder: str | Path) -> dict[str, Any]:
    """The header of a PAIRS folder.

    Raises:
        UserError: not a PAIRS folder, or one of a newer version.
        DamagedError: a table is missing.
    """
    folder = place(folder)
    file = folder / _HEADER
    advice = "not a PAIRS folder; make one with `sbir-ray pairs import`"
    header = read_kind(file, "pairs", advice, "make the folder again")
    for table in (_PHOTOS, _SKETCHES):
        if not (folder / table).is_file():
            raise DamagedError(f"{folder / table}: is missing; make the folder again")
    return header


def content_digest(folder: str | Path) -> str:
    """Tells one PAIRS folder from another by its photos, its sketches and their splits.

    The header does not: two folds of one data set can have the same counts. Nor do ids: those of
    sketches are names.

    Raises:
        UserError, DamagedError: as :func:`iter_photos`.
    """
    content = hashlib.sha256()
    drawn = [name for name in SKETCH_SCHEMA.names if name != "origin"]
    for table, columns in ((_PHOTOS, ["photo_id", "split"]), (_SKETCHES, drawn)):
        for rows in _batches(folder, table, columns, _SKETCH_ROWS):
            content.update(repr(rows).encode())
    return content.hexdigest()[:12]


def iter_photos(
    folder: str | Path, splits: Collection[Split] | None = None
) -> Iterator[PairPhotoRow]:
    """The photos of a PAIRS folder (of some splits), in order of name, a few in memory at a time.

    Raises:
        UserError, DamagedError: as :func:`read_header`, or the table is damaged.
    """
    return _rows(folder, _PHOTOS, PAIR_PHOTO_SCHEMA, PHOTO_ROWS, splits)


def iter_sketches(
    folder: str | Path, splits: Collection[Split] | None = None
) -> Iterator[SketchRow]:
    """The sketches of a PAIRS folder (of some splits), a few in memory at a time.

    Raises:
        UserError, DamagedError: as :func:`iter_photos`.
    """
    return _rows(folder, _SKETCHES, SKETCH_SCHEMA, _SKETCH_ROWS, splits)


def _rows(
    folder: str | Path, table: str, schema: pa.Schema, rows: int, splits: Collection[str] | None
) -> Iterator[Any]:
    for batch in _batches(folder, table, schema.names, rows):
        yield from (row for row in batch if splits is None or row["split"] in splits)


def _batches(
    folder: str | Path, table: str, columns: list[str], rows: int
) -> Iterator[list[dict[str, Any]]]:
    read_header(folder)
    file = place(folder) / table
    try:
        with open_table(file) as parquet:
            for batch in parquet.iter_batches(batch_size=rows, columns=columns):
                yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{file}: cannot be read ({error}); make the folder again") from error


@dataclass(frozen=True)
class PairSet:
    """One split of a PAIRS folder in memory: N photos, M sketches of them.

    Photos are in order of name and sketches in order of id, whatever order they were imported in.
    A photo may have no sketch (it is then a gallery photo alone) or several.
    """

    split: Split
    photo_ids: list[str]
    names: list[str]
    photos: npt.NDArray[np.uint8]
    """(N, 3, S, S) RGB, aligned."""
    sketch_ids: list[str]
    sketches: list[Strokes]
    """M sketches, canonical."""
    drawings: list[npt.NDArray[np.uint8] | None]
    """M rasters (S, S), 255 = ink, aligned as drawn; None where the source had strokes."""
    photo_of: npt.NDArray[np.int64]
    """(M,) index of each sketch's photo. Two sketches are of the same photo when these are equal,
    whatever their ids; a negative has to differ in it."""

    @classmethod
    def load(cls, folder: str | Path, split: Split, image_size: int) -> PairSet:
        """Read one split; photos and drawings are aligned at ``image_size`` pixels.

        Raises:
            UserError: not a PAIRS folder, or the split is empty.
            DamagedError: a table is damaged, or a sketch belongs to no photo of its split.
        """
        photos = sorted(iter_photos(folder, {split}), key=lambda row: row["name"])
        if not photos:
            filled = [name for name, n in read_header(folder)["splits"].items() if n["photos"]]
            raise UserError(f"{folder}: no photos in {split}; it has {', '.join(filled) or 'none'}")
        index = {row["photo_id"]: number for number, row in enumerate(photos)}
        rows = sorted(iter_sketches(folder, {split}), key=lambda row: row["sketch_id"])
        lost = [row["sketch_id"] for row in rows if row["photo_id"] not in index]
        if lost:
            raise DamagedError(f"{folder}: no photo in {split} for the sketch {lost[0]}")
        pixels = np.empty((len(photos), 3, image_size, image_size), np.uint8)
        for number, row in enumerate(photos):
            rgb = photo_files.align(photo_files.decode_stored(row["image"]), image_size)
            pixels[number] = rgb.transpose(2, 0, 1)
        return cls(
            split=split,
            photo_ids=[row["photo_id"] for row in photos],
            names=[row["name"] for row in photos],
            photos=pixels,
            sketch_ids=[row["sketch_id"] for row in rows],
            sketches=[unflatten(row["strokes"]) for row in rows],
            drawings=[_drawing(row["drawing"], image_size) for row in rows],
            photo_of=np.array([index[row["photo_id"]] for row in rows], np.int64),
        )

    @cached_property
    def sketches_of(self) -> list[npt.NDArray[np.int64]]:
        """For each of the N photos, the indices of its sketches (none for a gallery photo)."""
        order = np.argsort(self.photo_of, kind="stable")
        ends = np.searchsorted(self.photo_of[order], np.arange(1, len(self.photo_ids)))
        return np.split(order, ends)

    @cached_property
    def drawn_photos(self) -> npt.NDArray[np.int64]:
        """Indices of the photos that have a sketch: those that can be trained on."""
        return np.unique(self.photo_of)


def _drawing(png: bytes | None, size: int) -> npt.NDArray[np.uint8] | None:
    return None if png is None else photo_files.align_drawing(photo_files.decode_stored(png), size)


# --------------------------------------------------------------------------- fewer labels


def split_labels(
    folder: str | Path, share: float, seed: int, out: str | Path
) -> dict[str, dict[str, int]]:
    """Hide the sketches of a part of the training photos, as when they had never been drawn.

    Writes ``out/labelled``, a PAIRS folder with ``share`` of the training photos (those with a
    sketch) and all of val and test, and ``out/hidden``, a PAIRS folder with the other training
    photos: the unlabelled pool, with its sketches kept for measuring how good pseudo sketches could
    be. The choice depends on the seed and the photo's name alone and is nested: the photos of a
    smaller share are among those of a larger one.

    Returns:
        photos and sketches of ``labelled`` and ``hidden`` (training photos only).

    Raises:
        UserError: ``share`` outside (0, 1), one of the parts would be empty, ``out`` not empty.
    """
    if not 0 < share < 1:
        raise UserError(f"share: {share} has to lie between 0 and 1")
    header = read_header(folder)
    drawn = {row["photo_id"] for row in iter_sketches(folder, {"train"})}
    names = {
        row["photo_id"]: row["name"]
        for row in iter_photos(folder, {"train"})
        if row["photo_id"] in drawn
    }
    order = sorted(names, key=lambda photo: (hash_of(seed, names[photo]), names[photo]))
    count = round(share * len(order))
    if not 0 < count < len(order):
        raise UserError(
            f"{folder}: {share} of {len(order)} training photos is {count}; choose another share"
        )
    labelled = set(order[:count])
    counts: dict[str, dict[str, int]] = {}
    with new_folder(out) as work:
        for part in ("labelled", "hidden"):
            source = f"{header['source']} ({part}: share {share}, seed {seed})"
            with new_pairs(work / part, source=source, layout=header["layout"]) as writer:
                for photo in iter_photos(folder):
                    if _belongs(photo, part, labelled):
                        writer.add_photo(photo)
                for sketch in iter_sketches(folder):
                    if _belongs(sketch, part, labelled):
                        writer.add_sketch(sketch)
            counts[part] = writer.counts["train"]
    return counts


def _belongs(row: PairPhotoRow | SketchRow, part: str, labelled: set[str]) -> bool:
    if row["split"] != "train":
        return part == "labelled"
    return (row["photo_id"] in labelled) == (part == "labelled")


def hash_of(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
