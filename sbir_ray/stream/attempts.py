"""Which rows killed the process that worked on them; Ray itself would try them without end."""

from __future__ import annotations

import itertools
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbir_ray.places import is_local, told, write_bytes

LIMIT = 2
"""Deaths after which a row is given up."""
KILLED = "killed-its-process"
"""Reason of a row that was given up."""

_DONE = "-"
_SESSION = "#"


class Attempts:
    """A journal of the work on one block, which outlives the process.

    What was begun and not finished when a process ended is what it died of, unless it ended because
    the whole run did: the last row of a session that another one followed is not held against it.
    In an object store, where a note is a request, a process notes its rows only where an earlier
    one began the block.

    Args:
        file: of this block alone, on storage that all nodes share.
        session: name of the run, one word; another one each time that the run is begun again.
    """

    def __init__(self, file: Path, session: str = "") -> None:
        self._own: Path | None = None
        begin = f"{_SESSION}{session}"
        if is_local(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            texts = [os.read(self._handle, os.fstat(self._handle).st_size).decode()]
        else:
            with told(file):
                texts = [entry.read_text() for entry in file.iterdir()] if file.is_dir() else []
            # An object has one writer.
            self._own, self._text = file / uuid.uuid4().hex, ""
        self._each = self._own is None or bool(texts)
        journals = [text.splitlines() for text in texts]
        new = self._own is not None
        for lines in journals:
            if begin != next((x for x in reversed(lines) if x.startswith(_SESSION)), None):
                lines.append(begin)
                new = True
        if new:
            self._note(begin)
        self._deaths = Counter(
            line
            for lines in journals
            for line, after in itertools.pairwise([*lines, ""])
            if line != _DONE
            and after != _DONE
            and not line.startswith(_SESSION)
            and not after.startswith(_SESSION)
        )

    def deaths(self, key: str) -> int:
        """How many processes have ended while they worked on ``key``."""
        return self._deaths[key]

    @contextmanager
    def working_on(self, key: str) -> Iterator[None]:
        """Note that ``key`` is begun, and that this process is alive after it."""
        if not self._each:
            yield
            return
        self._note(key)
        try:
            yield
        finally:
            self._note(_DONE)

    def close(self) -> None:
        """Free the file."""
        if self._own is None:
            os.close(self._handle)

    def _note(self, line: str) -> None:
        if self._own is None:
            os.write(self._handle, f"{line}\n".encode())
            return
        self._text += f"{line}\n"
        write_bytes(self._own, self._text.encode())
