"""Where photos come from: files, folders, globs, lists, Parquet files, tar shards, PAIRS and PHOTOS
folders, on this machine or in object stores, and web addresses."""

from __future__ import annotations

import csv
import glob
import heapq
import io
import itertools
import json
import os
import posixpath
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from sbir_ray.data import pairs, photos
from sbir_ray.data.photos import PHOTO_SCHEMA
from sbir_ray.errors import UserError
from sbir_ray.places import file_system, is_local, open_table, told
from sbir_ray.stream.fetch import is_web, local_path, open_place
from sbir_ray.stream.units import SLICE, Unit, photo_members

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
"""Columns of a Parquet file that may hold the bytes of image files."""
URI_COLUMNS = ("uri", "url", "path", "file", "filename", "photo")
"""Columns of a Parquet or CSV list that may hold addresses."""
_SHARDS = (".parquet", ".tar")
_LISTS = (".txt", ".csv")
_NAMES_IN_MEMORY = 100_000


def list_units(sources: Sequence[str | Path]) -> Iterator[Unit]:
    """Everything that ``sources`` name, one by one, in a fixed order; what two of them name, twice.

    A file that a source names itself has to be readable; one that is found in a folder or in a
    list and is not becomes a unit of the form ``broken``.

    Raises:
        UserError: a source that is not there, has no photos, or is no readable file of its kind.
    """
    for source in sources:
        empty = True
        for unit in _of_source(str(source)):
            empty = False
            yield unit
        if empty:
            kinds = ", ".join(sorted({*photos.SUFFIXES, *_SHARDS}))
            raise UserError(f"{source}: has no photos ({kinds})")


def _of_source(source: str) -> Iterator[Unit]:
    if is_web(source):
        yield Unit(source, "file")
        return
    path = open_place(source)
    if is_local(path):
        if not os.path.lexists(path):
            matches = on_disk_sorted(glob.iglob(source, recursive=True))
            yield from _of_matches(source, matches)
        elif os.path.isdir(path):
            yield from _in_folder(os.path.abspath(path))
        else:
            yield from _of_file(os.path.abspath(path), named=True)
        return
    system, name = file_system(path)
    with told(path):
        if any(char in source for char in "*?["):
            found = sorted(system.unstrip_protocol(match) for match in system.glob(name))
            yield from _of_matches(source, found)
            return
        try:
            # Not isdir, which lists the whole folder.
            is_folder = system.info(name)["type"] == "directory"
        except FileNotFoundError as error:
            raise UserError(f"{source}: no such file or folder") from error
        if is_folder:
            yield from _in_far_folder(system, name)
        else:
            yield from _of_file(source, named=True)


def _of_matches(source: str, matches: Iterable[str]) -> Iterator[Unit]:
    empty = True
    for match in matches:
        empty = False
        yield from _of_source(match)
    if empty:
        raise UserError(f"{source}: no such file or folder, and no file matches it")


# --------------------------------------------------------------------------- folders


def _in_folder(folder: str) -> Iterator[Unit]:
    if os.path.isfile(os.path.join(folder, "pairs.json")):
        pairs.read_header(Path(folder))
        yield from _of_file(os.path.join(folder, "photos.parquet"), named=True)
        return
    if os.path.isfile(os.path.join(folder, "store.json")):
        for shard in photos.shards(folder):
            yield from _of_file(str(shard), named=True)
        return
    for name in on_disk_sorted(_names(folder)):
        path = os.path.join(folder, name)
        if name.endswith("/"):
            yield from _in_folder(path[:-1])
        else:
            yield from _of_file(path, named=False)


def _names(folder: str) -> Iterator[str]:
    """Of what is in a folder and may have photos; those of folders end in a slash."""
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                # Links to folders are not followed: they may lead in a circle.
                if entry.is_dir(follow_symlinks=False):
                    yield f"{entry.name}/"
                elif _may_have_photos(entry.name):
                    yield entry.name
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror})") from error


def _in_far_folder(system: Any, folder: str) -> Iterator[Unit]:
    headers = set()

    def names() -> Iterator[str]:
        for name, is_folder in _far_entries(system, folder):
            if name in ("pairs.json", "store.json"):
                headers.add(name)
            elif is_folder:
                yield f"{name}/"
            elif _may_have_photos(name):
                yield name

    ordered = on_disk_sorted(names())
    first = next(ordered, None)  # all names are read
    if "pairs.json" in headers:
        yield from _of_file(system.unstrip_protocol(f"{folder}/photos.parquet"), named=False)
        return
    if "store.json" in headers:
        yield from _in_far_folder(system, f"{folder}/shards")
        return
    for name in ordered if first is None else itertools.chain([first], ordered):
        path = f"{folder}/{name}"
        if name.endswith("/"):
            yield from _in_far_folder(system, path[:-1])
        else:
            yield from _of_file(system.unstrip_protocol(path), named=False)


def _far_entries(system: Any, folder: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it is a folder) of what is in a folder of an object store; from S3 a thousand
    at a time, else at once."""
    folder = folder.rstrip("/")
    if "s3" not in system.protocol:
        for entry in system.ls(folder, detail=True):
            name = entry["name"].rstrip("/")
            if name != folder:
                yield posixpath.basename(name), entry["type"] == "directory"
        return
    bucket, _, key = folder.partition("/")
    start = f"{key}/" if key else ""
    asked = {"Bucket": bucket, "Prefix": start, "Delimiter": "/"}
    while True:
        page = system.call_s3("list_objects_v2", **asked)
        for entry in page.get("CommonPrefixes", ()):
            yield entry["Prefix"].removeprefix(start).rstrip("/"), True
        for entry in page.get("Contents", ()):
            # A folder may have an object of its own name, with a slash behind it.
            if name := entry["Key"].removeprefix(start):
                yield name, False
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _may_have_photos(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in {*photos.SUFFIXES, *_SHARDS}


def on_disk_sorted(names: Iterable[str]) -> Iterator[str]:
    """``names`` in order; more than memory should hold are sorted in temporary files."""
    with ExitStack() as stack:
        runs: list[Iterable[str]] = []
        rest = iter(names)
        while chunk := sorted(itertools.islice(rest, _NAMES_IN_MEMORY)):
            if len(chunk) < _NAMES_IN_MEMORY and not runs:
                yield from chunk
                return
            # File names need not be valid text, nor without line ends; JSON escapes both.
            run = stack.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))
            run.writelines(json.dumps(name) + "\n" for name in chunk)
            run.seek(0)
            runs.append(map(json.loads, run))
        yield from heapq.merge(*runs)


# --------------------------------------------------------------------------- files


def _of_file(file: str, named: bool) -> Iterator[Unit]:
    suffix = PurePosixPath(file).suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _of_parquet(file)
        elif suffix == ".tar":
            yield from _of_tar(file)
        elif suffix in _LISTS and named:
            yield from _of_list(file, _lines(file) if suffix == ".txt" else _csv(file))
        else:
            yield Unit(file, "file")
    except UserError as error:
        if named:
            raise
        yield Unit(file, "broken", str(error).removeprefix(f"{file}: "))


def _of_list(file: str, addresses: Iterable[str]) -> Iterator[Unit]:
    """What a list names: photos, and shards of them; paths are relative to the list."""
    folder = file.rpartition("/")[0]
    for address in addresses:
        if "://" not in address and not os.path.isabs(address):
            address = f"{folder}/{address}"
        if is_web(address) or not address.lower().endswith(_SHARDS):
            yield Unit(local_path(address) or address, "file")
        else:
            yield from _of_file(local_path(address) or address, named=False)


def _lines(file: str) -> Iterator[str]:
    """The lines of a list; empty ones and comments are left out."""
    with _text(file) as lines:
        for line in lines:
            if (address := line.strip()) and not address.startswith("# "):
                yield address


def _csv(file: str) -> Iterator[str]:
    with _text(file) as lines:
        rows = csv.DictReader(lines)
        column = next((name for name in URI_COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            raise UserError(
                f"{file}: none of its columns is {', '.join(URI_COLUMNS)} (it has "
                f"{', '.join(rows.fieldnames or ['none'])}); rename the one with the addresses"
            )
        for row in rows:
            if address := (row[column] or "").strip():
                yield address


def _text(file: str) -> io.TextIOWrapper:
    try:
        stream = open_place(file).open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _of_tar(file: str) -> Iterator[Unit]:
    """Runs of the members that are photos, each with the place where it begins."""
    count = first = place = 0
    try:
        with open_place(file).open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in photo_members(tar):
                if count % SLICE == 0:
                    if count:
                        yield Unit(file, "tar", "", place, first, count, first)
                    first, place = count, member.offset
                count += 1
    except (tarfile.TarError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        if not count:
            raise UserError(f"{file}: not a readable tar file ({line})") from error
        yield Unit(file, "tar", "", place, first, count, first)
        yield Unit(file, "broken", f"after {count} photos: {line}", group=-1)
        return
    if count:
        yield Unit(file, "tar", "", place, first, count, first)


def _of_parquet(file: str) -> Iterator[Unit]:
    try:
        with open_table(open_place(file)) as parquet:
            schema = parquet.schema_arrow
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not a readable Parquet file ({line})") from error
    rows = set(PHOTO_SCHEMA.names) <= set(schema.names)
    column = "" if rows else _image_column(file, schema)
    addresses = next((n for n in URI_COLUMNS if n in schema.names), None)
    if not rows and not column:
        if addresses is None:
            raise UserError(
                f"{file}: none of its columns is {', '.join(IMAGE_COLUMNS)} with image files, or "
                f"{', '.join(URI_COLUMNS)} with their addresses (it has "
                f"{', '.join(schema.names)}); rename one, or leave the file out"
            )
        yield from _of_list(file, _parquet_column(file, addresses))
        return
    for group, count in enumerate(groups):
        for start in range(0, count, SLICE):
            stop = min(start + SLICE, count)
            yield Unit(file, "rows" if rows else "bytes", column, group, start, stop)


def _parquet_column(file: str, column: str) -> Iterator[str]:
    with open_table(open_place(file)) as parquet:
        for batch in parquet.iter_batches(columns=[column]):
            yield from (address for address in batch.column(0).to_pylist() if address)


def _image_column(file: str, schema: pa.Schema) -> str:
    """The column of image files; ``image.bytes`` where that is a field of a structure; none."""
    columns = [name for name in IMAGE_COLUMNS if name in schema.names]
    if not columns:
        return ""
    column = columns[0]
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column, kind = f"{column}.bytes", kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{file}: its column {column} holds {kind}, not the bytes of image files")
    return column
