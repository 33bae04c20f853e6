"""Which rows killed the process that worked on them; Ray itself would try them without end."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 2
"""Deaths after which a row is given up."""
KILLED = "killed-its-process"
"""Reason of a row that was given up."""

_DONE = "-"


class Attempts:
    """A journal of the work on one block, which outlives the process.

    What was begun and not finished when a process ended is what it died of.

    Args:
        file: of this block alone, on storage that all nodes share.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        lines = os.read(self._handle, os.fstat(self._handle).st_size).decode().splitlines()
        self._deaths = Counter(
            line
            for line, after in itertools.pairwise([*lines, ""])
            if line != _DONE and after != _DONE
        )

    def deaths(self, key: str) -> int:
        """How many processes have ended while they worked on ``key``."""
        return self._deaths[key]

    @contextmanager
    def working_on(self, key: str) -> Iterator[None]:
        """Note that ``key`` is begun, and that this process is alive after it."""
        os.write(self._handle, f"{key}\n".encode())
        try:
            yield
        finally:
            os.write(self._handle, f"{_DONE}\n".encode())

    def close(self) -> None:
        """Free the file."""
        os.close(self._handle)
