"""Disks and stores that fail: full, torn, lying, slow, behind with their listings."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

Fault = Literal["full", "torn", "lying"]


class _Stream:
    """A file being written on a bad disk."""

    def __init__(self, stream: Any, fault: Fault) -> None:
        self.stream, self.fault = stream, fault

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def write(self, data: bytes) -> int:
        if self.fault == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.stream.write(data[: len(data) // 2])
        if self.fault == "torn":
            raise OSError(errno.EIO, "Input/output error")
        return len(data)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        return int(self.stream.fileno())


@contextmanager
def bad_disk(fault: Fault, at: int) -> Iterator[list[str]]:
    """The ``at``-th file, from 0, that is opened for writing bytes in the block fails: with no room
    left, half written and an error, or half written as if all were well.

    Yields:
        The names of the files opened so far.
    """
    names: list[str] = []
    real = Path.open

    def opened(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        stream = real(path, mode, *rest, **more)
        if mode != "wb":
            return stream
        names.append(path.name)
        return _Stream(stream, fault) if len(names) == at + 1 else stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield names


class FaultyStore(MemoryFileSystem):  # type: ignore[misc]
    """An object store in this process, ``memory://bucket``, that obeys :attr:`plan`."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    plan: ClassVar[dict[str, Any]] = {}
    """``room``: files that can still be written; ``seconds``: that each call takes; ``stale``: a
    listing from before, which folders are listed by."""

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        time.sleep(self.plan.get("seconds", 0.0))
        if mode == "wb" and "room" in self.plan:
            if not self.plan["room"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.plan["room"] -= 1
        return super()._open(path, mode, **more)

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        found = super().ls(path, detail=True, **more)
        if "stale" in self.plan:
            found = [entry for entry in found if entry["name"] in self.plan["stale"]]
        return found if detail else sorted(entry["name"] for entry in found)


@pytest.fixture
def faulty() -> Iterator[type[FaultyStore]]:
    """A new, healthy :class:`FaultyStore` as what ``memory://`` means."""
    fsspec.register_implementation("memory", FaultyStore, clobber=True)
    FaultyStore.store.clear()
    FaultyStore.plan.clear()
    yield FaultyStore
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)
