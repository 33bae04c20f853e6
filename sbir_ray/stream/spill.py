"""Short records of every photo, kept on disk in parts, so that memory holds one part at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PART_RECORDS = 1 << 20
"""Records that a part has on average, at most."""


class Spill:
    """Records sorted into parts by number while they come, in any order, and read by part.

    Args:
        folder: of this spill alone; emptied.
        dtype: of a record, a structure.
        records: how many are expected.
    """

    def __init__(self, folder: Path, dtype: Any, records: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.dtype = folder, np.dtype(dtype)
        self.bits = min(16, max(0, int(records // PART_RECORDS).bit_length()))

    @property
    def parts(self) -> int:
        """Number of parts, a power of two."""
        return 1 << self.bits

    def add(self, keys: NDArray[np.uint64], records: NDArray[Any]) -> None:
        """Keep ``records``, each in the part that the highest bits of its key name."""
        if not self.bits or not len(records):
            self._append(0, records)
            return
        parts = (keys >> np.uint64(64 - self.bits)).astype(np.int64)
        order = np.argsort(parts, kind="stable")
        records = records[order]
        numbers, starts = np.unique(parts[order], return_index=True)
        for number, group in zip(
            numbers.tolist(), np.split(records, starts[1:].tolist()), strict=True
        ):
            self._append(number, group)

    def read(self, part: int) -> NDArray[Any]:
        """The records of one part, in the order in which they came."""
        file = self.folder / f"{part:05d}"
        return np.fromfile(file, self.dtype) if file.exists() else np.zeros(0, self.dtype)

    def remove(self) -> None:
        """Free the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, part: int, records: NDArray[Any]) -> None:
        with (self.folder / f"{part:05d}").open("ab") as stream:
            stream.write(records.tobytes())


def on_disk(file: Path, dtype: Any, length: int) -> NDArray[Any]:
    """An array of zeros that is a file, so that the system may put it out of memory."""
    if not length:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, "w+", shape=(length,))


def spread(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers whose highest bits are even, whatever those of ``values`` are."""
    return np.asarray(values * np.uint64(0x9E37_79B9_7F4A_7C15))
