"""Files and folders on this machine, on storage that nodes share, and in object stores.

A place is written as a path or as a URI (``s3://bucket/folder``, ``gs://bucket/folder``). Both have
the methods of :class:`pathlib.Path`, so that what reads and joins them need not know which it has;
what object stores cannot do (rename, append, replace) has a function here that works on both.

Object stores have no folders that appear at once: what is in one is whole when its header, written
last, is there. Credentials are found as each store's own tools find them (for S3 the environment,
``~/.aws`` or the machine's role) and are never part of a URI.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from upath import UPath

from sbir_ray.errors import SbirError, UnavailableError, UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PACKAGES = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The optional dependencies that a scheme needs."""
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials")
_SILENT = "the store does not answer; see the network, and AWS_ENDPOINT_URL if it is set"
_UNREACHABLE = ("EndpointConnection", "ConnectTimeout", "ClientConnector", "ConnectionClosed")


def place(text: str | Path) -> Path:
    """The place that ``text`` names: a path, or for a URI its like in universal_pathlib.

    Typed as a path, which it is in all that is used of it. A place given is given back.

    Raises:
        UserError: a URI without a bucket, of a scheme that is not known, or whose package is not
            installed.
    """
    if not isinstance(text, str):
        return text
    if not _SCHEME.match(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        return Path(rest)
    rest = "/".join(part for part in rest.split("/") if part)
    if not rest:
        raise UserError(f"{text}: names no bucket; write it as {scheme}://BUCKET/FOLDER")
    # What another process wrote has to be seen at once.
    options: dict[str, Any] = {"use_listings_cache": False}
    if _PACKAGES.get(scheme) == "s3":
        options["config_kwargs"] = {"connect_timeout": 5, "retries": {"max_attempts": 3}}
    try:
        found = UPath(f"{scheme}://{rest}", **options)
        found.fs  # noqa: B018  # imports the scheme's package
    except ImportError as error:
        extra = _PACKAGES.get(scheme)
        fix = f"pip install 'sbir_ray[{extra}]'" if extra else "install the package it needs"
        raise UserError(f"{text}: {scheme}:// cannot be used here ({error}); {fix}") from error
    except ValueError as error:
        raise UserError(f"{text}: {scheme}:// is not known; use s3://, gs:// or a path") from error
    return cast(Path, found)


def is_local(path: Path) -> bool:
    """Whether ``path`` is in the file system: can be renamed, locked, appended to, mapped."""
    return isinstance(path, Path)


def file_system(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a place that is not local, and its name there."""
    remote = cast(Any, path)
    return remote.fs, str(remote.path)


def arrow_file_system(path: Path) -> tuple[Any, str]:
    """``path`` for what takes a file system of pyarrow (None is that of this machine)."""
    if is_local(path):
        return None, str(path)
    system, name = file_system(path)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), name


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Faults of an object store, met in the block, as one line that names ``path`` and the fix.

    Raises:
        UserError: no credentials, no permission, no such bucket, or, an :class:`UnavailableError`,
            the store does not answer.
    """
    try:
        yield
    except SbirError:
        raise
    except Exception as error:
        line = None if is_local(path) else _explained(error)
        if line is None:
            raise
        kind = UnavailableError if line == _SILENT else UserError
        raise kind(f"{path}: {line}") from error


def _explained(error: BaseException) -> str | None:
    """What to do about an object store's fault; never its text, which may hold an address."""
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if any(name in names for name in _CREDENTIALS):
        return (
            "no credentials were found; set AWS_PROFILE, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS, or give the machine a role"
        )
    if isinstance(error, PermissionError):
        return "access is denied; the credentials in use need to list, read and write there"
    if any(name in names for name in _UNREACHABLE) or isinstance(
        error, (ConnectionError, TimeoutError)
    ):
        return _SILENT
    if isinstance(error, FileNotFoundError) and "bucket" in str(error).lower():
        return "there is no such bucket; make it or correct its name"
    return None


def reach(path: Path) -> None:
    """Ask an object store for ``path``, so that what is wrong with it is told before work begins.

    Raises:
        UserError: as :func:`told`.
    """
    if is_local(path):
        return
    system, name = file_system(path)
    with told(path):
        try:
            system.ls(name, detail=False)
        except FileNotFoundError as error:  # not yet made, unless it is the bucket
            if _explained(error):
                raise


# --------------------------------------------------------------------------- whole files


def write_bytes(path: Path, data: bytes) -> None:
    """``data`` under ``path``: the whole file or what was there before. Its folder is made.

    Raises:
        UserError: as :func:`told`; OSError: a local disk's fault.
    """
    if not is_local(path):
        with told(path):
            path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def append_text(path: Path, text: str) -> None:
    """``text`` behind what ``path`` holds, for logs of one writer; object stores get all of it."""
    if is_local(path):
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
        return
    with told(path):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + text.encode())


def sync(path: Path) -> None:
    """Make a local file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --------------------------------------------------------------------------- tables


@contextmanager
def open_table(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read in parts.

    Raises:
        UserError: as :func:`told`; OSError, ArrowException: as pyarrow.
    """
    if is_local(path):
        with pq.ParquetFile(path) as table:
            yield table
        return
    with told(path), path.open("rb") as stream, pq.ParquetFile(stream) as table:
        yield table


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file, or some of its columns; raises as :func:`open_table`."""
    with open_table(path) as table:
        return table.read(columns=None if columns is None else list(columns))


def count_rows(path: Path) -> int:
    """Rows of a Parquet file; raises as :func:`open_table`."""
    with open_table(path) as table:
        return int(table.metadata.num_rows)


def write_table(table: pa.Table, path: Path, **options: Any) -> None:
    """``table`` as Parquet under ``path``: the whole file or what was there before.

    Args:
        options: as of ``pyarrow.parquet.write_table``.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    write_bytes(path, sink.getvalue().to_pybytes())


# --------------------------------------------------------------------------- folders


def remove_tree(path: Path) -> None:
    """Remove ``path`` and all in it; nothing when it is not there."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with told(path):
        system, name = file_system(path)
        if system.exists(name):
            system.rm(name, recursive=True)


def copy_tree(source: Path, target: Path) -> None:
    """The files of a local folder to an object store; JSON files, the headers, come last."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    with told(target):
        for file in sorted(files, key=lambda file: file.suffix == ".json"):
            system, name = file_system(target.joinpath(*file.relative_to(source).parts))
            system.put_file(str(file), name)
