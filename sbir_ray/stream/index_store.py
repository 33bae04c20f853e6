"""The INDEX folder: embeddings of photos with the photos themselves, and exact search in them.

``index.json`` names the parts and the weights that made them. A part is an Arrow file that is
mapped into memory, not read: its embeddings are one block of numbers, and any photo is reached at
once. Parts are never changed, and named after their content; a folder is another one as soon as its
header is replaced, and who had opened it before goes on with what that was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.errors import DamagedError
from sbir_ray.places import write_bytes
from sbir_ray.strict import read_kind

HEADER = "index.json"
_IN_MEMORY = 1 << 30
"""Bytes of embeddings up to which they are put side by side in memory, which is faster."""


def part_schema(dim: int) -> pa.Schema:
    """Columns of a part: a photo, its stored picture, and its embedding (D,) of length one."""
    return pa.schema(
        [
            ("photo_id", pa.string()),
            ("name", pa.string()),
            ("uri", pa.string()),
            ("image", pa.binary()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )


def write_part(table: pa.Table, file: Path) -> None:
    """A part, whole or not at all."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        # One batch, so that its embeddings lie side by side.
        writer.write_batch(table.combine_chunks().to_batches()[0])
    write_bytes(file, sink.getvalue().to_pybytes())


def read_part(file: Path, dim: int) -> pa.Table:
    """A part, mapped into memory.

    Raises:
        DamagedError: it cannot be read, or has other columns.
    """
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{file}: cannot be read ({error}); index the photos again") from error
    if table.schema != part_schema(dim):
        raise DamagedError(f"{file}: has other columns than a part; index the photos again")
    return table


def read_header(folder: Path) -> dict[str, Any]:
    """``index.json``.

    Raises:
        UserError: not an INDEX folder, or one of a newer version.
        DamagedError: not JSON, or not whole.
    """
    file = folder / HEADER
    advice = "not an index; make one with `sbir-ray index`"
    header = read_kind(file, "index", advice, "index the photos again")
    if missing := {"weights", "run", "dim", "parts"} - header.keys():
        raise DamagedError(f"{file}: says no {min(missing)}; index the photos again")
    return header


class Hit(NamedTuple):
    """A photo that was found."""

    photo_id: str
    name: str
    uri: str
    similarity: float
    """Cosine of sketch and photo."""


@dataclass(frozen=True)
class Index:
    """An index as it was when it was opened."""

    folder: Path
    header: dict[str, Any]
    parts: list[pa.Table]

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Map an INDEX folder into memory.

        Raises:
            UserError, DamagedError: as :func:`read_header` and :func:`read_part`; a part has
                another number of rows than the header says.
        """
        header = read_header(folder)
        parts = []
        for entry in header["parts"]:
            table = read_part(folder / entry["file"], header["dim"])
            if len(table) != entry["rows"]:
                raise DamagedError(
                    f"{folder / entry['file']}: has {len(table)} rows in place of {entry['rows']}; "
                    "index the photos again"
                )
            parts.append(table)
        return cls(folder, header, parts)

    def __len__(self) -> int:
        """Number of photos."""
        return int(self._starts[-1])

    def search(self, query_D: NDArray[np.float32], top: int) -> list[Hit]:
        """The photos that are nearest to a sketch's embedding, the nearest first.

        All are compared. Of equally near ones the first in the index comes first.
        """
        score_P = self._scores(query_D)
        top = min(top, len(score_P))
        if not top:
            return []
        least = np.partition(score_P, len(score_P) - top)[len(score_P) - top]
        near = np.flatnonzero(score_P >= least)
        order = near[np.argsort(-score_P[near], kind="stable")][:top]
        return [Hit(*self._row(number), float(score_P[number])) for number in order]

    def rank(self, query_D: NDArray[np.float32], photo_id: str) -> int | None:
        """The rank of a photo for a sketch's embedding, from 1; photos as near count before it.
        None if the index does not have it."""
        number = self._numbers.get(photo_id)
        if number is None:
            return None
        score_P = self._scores(query_D)
        return int((score_P >= score_P[number]).sum())

    def image(self, photo_id: str) -> bytes | None:
        """The stored picture of a photo; None if the index does not have it."""
        number = self._numbers.get(photo_id)
        if number is None:
            return None
        table, row = self._place(number)
        return bytes(table["image"][row].as_py())

    @property
    def photo_ids(self) -> list[str]:
        """Of all photos, in the order of the parts."""
        return list(self._numbers)

    def _scores(self, query_D: NDArray[np.float32]) -> NDArray[np.float32]:
        """(P,) the cosine of every photo."""
        scores = [block_PD @ query_D for block_PD in self._blocks]
        return np.concatenate([np.empty(0, np.float32), *scores])

    def _row(self, number: int) -> tuple[str, str, str]:
        table, row = self._place(number)
        photo_id, name, uri = (table[column][row].as_py() for column in ("photo_id", "name", "uri"))
        return photo_id, name, uri

    def _place(self, number: int) -> tuple[pa.Table, int]:
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.parts[part], number - int(self._starts[part])

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def _numbers(self) -> dict[str, int]:
        names = (name for part in self.parts for name in part["photo_id"].to_pylist())
        return {name: number for number, name in enumerate(names)}

    @cached_property
    def _blocks(self) -> list[NDArray[np.float32]]:
        """(P, D) of each part; of all together where they are small."""
        found = [embeddings(part) for part in self.parts]
        small = sum(block.nbytes for block in found) <= _IN_MEMORY
        return [np.concatenate(found)] if small and found else found


def embeddings(part: pa.Table) -> NDArray[np.float32]:
    """(P, D) those of a part, not copied."""
    column = part["embedding"].chunk(0)
    flat: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), -1)
