"""The photos of a store without end, in an order that follows from the seed: who draws the next.

A ticket is the number of a draw from the store, counted from 0. Epoch after epoch every photo comes
once, in another order each time: the row groups of the store are shuffled, and then the photos
of some groups at a time, so that photos which come after one another lie near to one another.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import UserError
from sbir_ray.places import open_table

GROUPS = 8
"""Row groups whose photos are shuffled together, and kept in memory: the store may be of any size,
and one of so many groups or fewer is shuffled evenly."""


@dataclass(frozen=True, slots=True)
class TicketPhoto:
    """A photo that was drawn from the store."""

    ticket: int
    photo_id: str
    photos: dict[int, NDArray[np.uint8]]
    """(3, S, S) aligned, by side S; {} if it is damaged."""
    fault: str = ""
    """What is wrong with it, if anything."""


@dataclass(frozen=True, slots=True)
class _Group:
    file: Path
    number: int
    rows: int


class TicketPhotos:
    """What photo a ticket stands for, and its pixels.

    Args:
        folder: PHOTOS folder.
        seed: of the order.
        sides: at which photos are aligned, pixels.

    Raises:
        UserError: not a photo store, or an empty one.
    """

    def __init__(self, folder: Path, seed: int, sides: Sequence[int]) -> None:
        if next(read_store(folder), None) is None:
            raise UserError(f"{folder}: holds no photo; see its ledger")
        self.seed = seed
        self.sides = sides
        self._groups: list[_Group] = []
        for file in sorted((folder / "shards").glob("part-*.parquet")):
            with open_table(file) as parquet:
                metadata = parquet.metadata
            counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            self._groups += [_Group(file, i, rows) for i, rows in enumerate(counts) if rows]
        self.size = sum(group.rows for group in self._groups)
        """Photos in the store."""
        self._epoch: tuple[int, list[list[_Group]], list[int]] | None = None
        self._part: tuple[tuple[int, int], list[tuple[_Group, int]]] | None = None
        self._cache: OrderedDict[_Group, list[tuple[str, bytes]]] = OrderedDict()

    def read(self, tickets: Sequence[int]) -> list[TicketPhoto]:
        """The photos of ``tickets``; one that is damaged costs its own ticket alone."""
        found = []
        for ticket in tickets:
            group, row = self._place(ticket)
            name, image = self._rows(group)[row]
            try:
                rgb = decode_stored(image)
                photos = {
                    side: np.ascontiguousarray(align(rgb, side).transpose(2, 0, 1))
                    for side in self.sides
                }
                found.append(TicketPhoto(ticket, name, photos))
            except Exception as error:  # a decoder may raise anything on damaged bytes
                text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                found.append(TicketPhoto(ticket, name, {}, text))
        return found

    def _place(self, ticket: int) -> tuple[_Group, int]:
        """The row group of a ticket's photo, and its row there."""
        epoch, offset = divmod(ticket, self.size)
        if self._epoch is None or self._epoch[0] != epoch:
            order = _rng(self.seed, epoch).permutation(len(self._groups)).tolist()
            groups = [self._groups[i] for i in order]
            parts = [groups[i : i + GROUPS] for i in range(0, len(groups), GROUPS)]
            sizes = [sum(group.rows for group in part) for part in parts]
            self._epoch = epoch, parts, [0, *itertools.accumulate(sizes)]
        _, parts, starts = self._epoch
        number = bisect.bisect_right(starts, offset) - 1
        if self._part is None or self._part[0] != (epoch, number):
            rows = [(group, row) for group in parts[number] for row in range(group.rows)]
            order = _rng(self.seed, epoch, number).permutation(len(rows)).tolist()
            self._part = (epoch, number), [rows[i] for i in order]
        return self._part[1][offset - starts[number]]

    def _rows(self, group: _Group) -> list[tuple[str, bytes]]:
        """Ids and JPEGs of a row group; the last :data:`GROUPS` ones are kept."""
        if group not in self._cache:
            with open_table(group.file) as parquet:
                table = parquet.read_row_group(group.number, columns=["photo_id", "image"])
            columns = (table["photo_id"].to_pylist(), table["image"].to_pylist())
            self._cache[group] = list(zip(*columns, strict=True))
            if len(self._cache) > GROUPS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def seed_of(*keys: object) -> int:
    """A seed, 63 bits, that depends on ``keys`` alone."""
    text = "/".join(str(key) for key in keys)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _rng(*keys: object) -> np.random.Generator:
    return np.random.default_rng(seed_of("photos", *keys))
