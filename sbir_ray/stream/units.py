"""Photos that are read together: a file, or some of those in a Parquet file or a tar shard."""

from __future__ import annotations

import dataclasses
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, cast

import pyarrow as pa

from sbir_ray.data import photos
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoError, PhotoLimits, PhotoRow
from sbir_ray.errors import UserError
from sbir_ray.places import open_table
from sbir_ray.stream.fetch import Fetcher, open_place

SLICE = 64
"""Photos of a unit, at most."""

MakeRow = Callable[[bytes, str, str, PhotoLimits], PhotoRow]
"""``photos.make_row``, or what stands in for it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One photo to read: how its file's bytes, or a row that is made already, are got."""

    uri: str
    name: str
    fetch: Callable[[], bytes | PhotoRow]
    """Raises PhotoError."""
    far: bool = False
    """Whether that is mostly waiting."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One file, or a run of the photos in one."""

    file: str
    form: Literal["file", "rows", "bytes", "tar", "broken"]
    """A photo; rows of ``PHOTO_SCHEMA``; rows with image files in ``column``; members of a tar
    file; a file of photos that cannot be read, for the reason in ``column``."""
    column: str = ""
    group: int = 0
    """Row group, or the place in the tar file where photo ``first`` begins."""
    start: int = 0
    stop: int = 1
    """Photos of the group, or of the tar file, by number."""
    first: int = 0

    @property
    def rows(self) -> int:
        """Number of photos."""
        return self.stop - self.start

    def to_json(self) -> Any:
        """Plain values, few for what there are most of."""
        values = list(dataclasses.astuple(self))
        return self.file if self.form == "file" else values

    @classmethod
    def from_json(cls, values: Any) -> Unit:
        """The reverse of :meth:`to_json`."""
        return cls(values, "file") if isinstance(values, str) else cls(*values)

    @property
    def key(self) -> str:
        """What tells this unit from every other one."""
        return self.file if self.form == "file" else f"{self.file}#{self.group}.{self.start}"

    def only(self, number: int) -> Unit:
        """The unit of one of its photos."""
        start = self.start + number
        return dataclasses.replace(self, start=start, stop=start + 1)

    def items(self, fetcher: Fetcher) -> Iterator[Item]:
        """Each photo, as many as ``rows`` in any case."""
        file = photos.printable(self.file)
        if self.form == "file":
            name = photos.printable(PurePosixPath(self.file.partition("?")[0]).stem)
            yield Item(file, name, lambda: fetcher.read(self.file), "://" in self.file)
            return
        try:
            if self.form == "broken":
                raise PhotoError("damaged", self.column)
            rows = list(self._tar(fetcher) if self.form == "tar" else self._table(fetcher))
        except (pa.ArrowException, OSError, tarfile.TarError, UserError) as error:
            line = " ".join(str(error).split())[:200]
            reason = error if isinstance(error, PhotoError) else PhotoError("unreadable", line)
            for number in range(self.start, self.stop):
                yield Item(f"{file}#{self.group}.{number}", "", _raising(reason))
            return
        assert len(rows) == self.rows, (self, len(rows))
        yield from rows

    def _table(self, fetcher: Fetcher) -> Iterator[Item]:
        """The slice's rows; of the row group no more is decoded than lies before its end."""
        file = photos.printable(self.file)
        columns = PHOTO_SCHEMA.names if self.form == "rows" else [self.column]
        seen = 0
        with open_table(open_place(self.file)) as parquet:
            for batch in parquet.iter_batches(
                batch_size=SLICE, row_groups=[self.group], columns=columns
            ):
                first, last = max(self.start - seen, 0), min(self.stop - seen, batch.num_rows)
                if first < last:
                    values = batch.slice(first, last - first).to_pylist()
                    for number, row in enumerate(values, seen + first):
                        uri = f"{file}#{self.group}.{number}"
                        if self.form == "rows":
                            found = _of_row(row, fetcher.limits)
                            yield Item(row["uri"] or uri, row["name"] or "", found)
                        else:
                            yield Item(uri, "", _checked(_image_bytes(row, self.column), fetcher))
                seen += batch.num_rows
                if seen >= self.stop:
                    break

    def _tar(self, fetcher: Fetcher) -> Iterator[Item]:
        file = photos.printable(self.file)
        with open_place(self.file).open("rb") as stream:
            stream.seek(self.group)
            number = self.first
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in photo_members(archive):
                    if number >= self.start:
                        name = photos.printable(member.name)
                        data = _member(archive, member, fetcher.limits)
                        yield Item(f"{file}#{name}", PurePosixPath(name).stem, data)
                    number += 1
                    if number == self.stop:
                        return


def photo_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The photos of a tar file by their names' endings, without remembering the rest."""
    while (member := archive.next()) is not None:
        # tarfile keeps all that it has seen, for the sake of links.
        archive.members = []  # type: ignore[attr-defined]
        if member.isreg() and PurePosixPath(member.name).suffix.lower() in photos.SUFFIXES:
            yield member


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, limits: PhotoLimits
) -> Callable[[], bytes]:
    if member.size > limits.max_bytes:
        text = f"more than the limit of {limits.max_bytes} bytes"
        return _raising(PhotoError("too-many-bytes", text))
    try:
        stream = archive.extractfile(member)
        data = stream.read() if stream is not None else b""
    except (tarfile.TarError, OSError) as error:
        return _raising(PhotoError("damaged", " ".join(str(error).split())[:200]))
    return (lambda: data) if data else _raising(PhotoError("empty", "the file has no bytes"))


def _checked(data: bytes, fetcher: Fetcher) -> Callable[[], bytes]:
    def fetch() -> bytes:
        photos.check_bytes(data, fetcher.limits)
        return data

    return fetch


def _of_row(values: dict[str, Any], limits: PhotoLimits) -> Callable[[], PhotoRow]:
    """A row that this program wrote: its id stays, and its picture too if that is small enough."""

    def fetch() -> PhotoRow:
        row = cast(PhotoRow, {name: values[name] for name in PHOTO_SCHEMA.names})
        if max(row["width"], row["height"]) <= limits.longest:
            photos.decode(row["image"])
            return row
        made = photos.make_row(row["image"], row["name"], row["uri"], limits)
        made["photo_id"] = row["photo_id"]
        return made

    return fetch


def _raising(error: PhotoError) -> Callable[[], Any]:
    def fetch() -> Any:
        raise error

    return fetch


def _image_bytes(values: dict[str, Any], column: str) -> bytes:
    name, _, inner = column.partition(".")
    value = values[name]
    if inner and value is not None:
        value = value[inner]
    return value or b""
