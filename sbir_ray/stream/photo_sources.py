"""Where photos come from: files, folders, globs, Parquet files, PAIRS and PHOTOS folders."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa

from sbir_ray.data import pairs, photos
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoError, PhotoLimits, PhotoRow
from sbir_ray.errors import UserError
from sbir_ray.places import file_system, is_local, open_table, place, told

Load = Callable[[], PhotoRow]
"""Makes the row of a photo; raises PhotoError."""

_SLICE = 64
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "img", "bytes")


@dataclass(frozen=True, slots=True)
class Unit:
    """Photos that are read together: one file, or a slice of a Parquet row group."""

    file: str
    form: Literal["file", "rows", "bytes"]
    """A photo; rows of ``PHOTO_SCHEMA``; rows with image files in ``column``."""
    column: str = ""
    group: int = 0
    start: int = 0
    stop: int = 1

    @property
    def rows(self) -> int:
        """Number of photos."""
        return self.stop - self.start

    def loaders(self, limits: PhotoLimits) -> Iterator[tuple[str, str, Load]]:
        """(uri, name, what makes the row) of each photo, as many as ``rows`` in any case."""
        file = photos.printable(self.file)
        if self.form == "file":
            name = photos.printable(Path(self.file).stem)
            yield file, name, lambda: _of_file(self.file, name, file, limits)
            return
        try:
            rows = self._read()
        except (pa.ArrowException, OSError) as error:
            reason = PhotoError("unreadable", " ".join(str(error).split())[:200])
            for number in range(self.start, self.stop):
                yield f"{file}#{self.group}.{number}", "", _raising(reason)
            return
        for number, values in enumerate(rows, self.start):
            uri = f"{file}#{self.group}.{number}"
            if self.form == "rows":
                yield values["uri"] or uri, values["name"] or "", _of_row(values, limits)
            else:
                yield uri, "", _of_bytes(_image_bytes(values, self.column), uri, limits)

    def _read(self) -> list[dict[str, Any]]:
        """The slice's rows; of the row group no more is decoded than lies before its end."""
        columns = PHOTO_SCHEMA.names if self.form == "rows" else [self.column]
        rows: list[dict[str, Any]] = []
        seen = 0
        with open_table(place(self.file)) as parquet:
            for batch in parquet.iter_batches(
                batch_size=_SLICE, row_groups=[self.group], columns=columns
            ):
                first, last = max(self.start - seen, 0), min(self.stop - seen, batch.num_rows)
                if first < last:
                    rows += batch.slice(first, last - first).to_pylist()
                seen += batch.num_rows
                if seen >= self.stop:
                    break
        return rows


def list_units(sources: Sequence[str | Path]) -> list[Unit]:
    """Everything that ``sources`` name, in a fixed order and each file once.

    Raises:
        UserError: a source that is not there, has no photos, or is no readable Parquet file.
    """
    files: dict[str, None] = {}
    for source in sources:
        found = list(_files(str(source)))
        if not found:
            raise UserError(f"{source}: has no photos ({', '.join(sorted(photos.SUFFIXES))})")
        files.update(dict.fromkeys(found))
    units: list[Unit] = []
    for file in files:
        units += _slices(file) if file.endswith(".parquet") else [Unit(file, "file")]
    if not sum(unit.rows for unit in units):
        raise UserError(f"{', '.join(map(str, sources))}: no photos")
    return units


def _files(source: str) -> Iterator[str]:
    if not is_local(place(source)):
        yield from _files_there(source)
        return
    if not os.path.lexists(source):
        matches = sorted(glob.glob(source, recursive=True))
        if not matches:
            raise UserError(f"{source}: no such file or folder, and no file matches it")
        for match in matches:
            yield from _files(match)
        return
    source = os.path.abspath(source)
    if not os.path.isdir(source):
        yield source
    elif os.path.isfile(os.path.join(source, "pairs.json")):
        pairs.read_header(source)
        yield os.path.join(source, "photos.parquet")
    elif os.path.isfile(os.path.join(source, "store.json")):
        yield from sorted(glob.glob(os.path.join(glob.escape(source), "shards", "*.parquet")))
    else:
        yield from _in_folder(source)


def _files_there(source: str) -> Iterator[str]:
    """As :func:`_files`, in an object store, which lists whole folders at once."""
    found = place(source)
    with told(found):
        if any(sign in source for sign in "*?["):
            system, name = file_system(found)
            matches = sorted(system.unstrip_protocol(match) for match in system.glob(name))
            for match in matches:
                yield from _files_there(match)
        elif (found / "pairs.json").is_file():
            pairs.read_header(found)
            yield str(found / "photos.parquet")
        elif (found / "store.json").is_file():
            yield from sorted(str(file) for file in (found / "shards").glob("*.parquet"))
        elif found.is_file():
            yield source
        else:
            names = sorted(str(file) for file in found.rglob("*"))
            wanted = (*photos.SUFFIXES, ".parquet")
            yield from (name for name in names if name.lower().endswith(wanted))


def _in_folder(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        # Links to folders are not followed: they may lead in a circle.
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif os.path.splitext(entry.name)[1].lower() in {*photos.SUFFIXES, ".parquet"}:
            yield entry.path


def _slices(file: str) -> Iterator[Unit]:
    try:
        with open_table(place(file)) as parquet:
            schema = parquet.schema_arrow
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a readable Parquet file ({line})") from error
    rows = set(PHOTO_SCHEMA.names) <= set(schema.names)
    column = "" if rows else _image_column(file, schema)
    for group, count in enumerate(groups):
        for start in range(0, count, _SLICE):
            stop = min(start + _SLICE, count)
            yield Unit(file, "rows" if rows else "bytes", column, group, start, stop)


def _image_column(file: str, schema: pa.Schema) -> str:
    """The column of image files; ``image.bytes`` where that is a field of a structure."""
    columns = [name for name in _IMAGE_COLUMNS if name in schema.names]
    if not columns:
        raise UserError(
            f"{file}: none of its columns is {', '.join(_IMAGE_COLUMNS)} (it has "
            f"{', '.join(schema.names)}); rename the one with the image files, or leave it out"
        )
    column = columns[0]
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{file}: its column {column} holds {kind}, not the bytes of image files")
    return column


def _of_file(file: str, name: str, uri: str, limits: PhotoLimits) -> PhotoRow:
    return photos.make_row(photos.read_bytes(file, limits), name, uri, limits)


def _of_bytes(data: bytes, uri: str, limits: PhotoLimits) -> Load:
    return lambda: photos.make_row(data, "", uri, limits)


def _of_row(values: dict[str, Any], limits: PhotoLimits) -> Load:
    """A row that this program wrote: its id stays, and its picture too if that is small enough."""

    def load() -> PhotoRow:
        row = cast(PhotoRow, {name: values[name] for name in PHOTO_SCHEMA.names})
        if max(row["width"], row["height"]) <= limits.longest:
            photos.decode(row["image"])
            return row
        made = photos.make_row(row["image"], row["name"], row["uri"], limits)
        made["photo_id"] = row["photo_id"]
        return made

    return load


def _raising(error: PhotoError) -> Load:
    def load() -> PhotoRow:
        raise error

    return load


def _image_bytes(values: dict[str, Any], column: str) -> bytes:
    name, _, inner = column.partition(".")
    value = values[name]
    if inner and value is not None:
        value = value[inner]
    return value or b""
