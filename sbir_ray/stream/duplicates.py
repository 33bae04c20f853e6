"""Photos that are there twice: by their bytes, and by their look.

What is kept is a function of the photos alone, not of the order in which they are found: of equal
files the one whose uri hashes lowest, and of photos that look the same the one with the smallest
photo_id. Photos of the store that is added to come before all others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbir_ray.stream.spill import Spill, on_disk, spread

SAME, NEAR = 1, 2
"""Fates: the same file, nearly the same picture. 0: not a duplicate."""

RECORD = np.dtype([("id", "S32"), ("uri", "S16"), ("phash", "<i8"), ("row", "<i8")])
"""A photo: sha256, hash of the uri, perceptual hash, number of its row; below 0 it is stored
already."""
_UNIQUE = np.dtype([("phash", "<u8"), ("rank", "<i8")])
_BANDED = np.dtype([("key", "<u8"), ("phash", "<u8"), ("rank", "<i8")])
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Fates:
    """What became of the rows that could be stored."""

    fate: NDArray[np.uint8]
    """By row: 0, :data:`SAME` or :data:`NEAR`."""
    twin: NDArray[np.int64]
    """By row: rank of the photo that is stored instead, of a duplicate."""
    ids: NDArray[np.bytes_]
    """By rank: sha256 of a photo, 32 bytes with zeros at their end cut off."""

    def of(self, rows: NDArray[np.int64]) -> list[str]:
        """The photo_ids of what is stored instead of these duplicates."""
        return [self.ids[rank].ljust(32, b"\0").hex() for rank in self.twin[rows]]


def find_duplicates(
    records: Iterable[NDArray[Any]], rows: int, near: int, folder: Path, stored: int = 0
) -> Fates:
    """The duplicates among photos that come in chunks, in memory that does not grow with them.

    A photo is a duplicate when its file, or one whose hash differs in at most ``near`` bits, is
    kept before it.

    Args:
        records: of type :data:`RECORD`; of rows that cannot be stored there is none.
        rows: number of rows, those without a record counted.
        folder: for what does not fit into memory, about 250 bytes a photo; may be left behind.
        stored: how many of the records are those of photos that are stored already, all different.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_id = Spill(folder / "ids", RECORD, rows + stored)
    for chunk in records:
        heads = np.ascontiguousarray(chunk["id"]).view(np.uint8).reshape(-1, 32)[:, :8]
        by_id.add(np.ascontiguousarray(heads).view(">u8").ravel().astype(np.uint64), chunk)
    fate = on_disk(folder / "fate", np.uint8, rows)
    twin = on_disk(folder / "twin", np.int64, rows)
    ids = on_disk(folder / "id", "S32", rows + stored)
    hashes = on_disk(folder / "hash", np.int64, rows + stored)
    numbers = on_disk(folder / "row", np.int64, rows + stored)
    ranks = _by_file(by_id, stored, fate, twin, ids, hashes, numbers)
    by_id.remove()
    nearest = _by_look(hashes[:ranks], stored, near, folder)
    for start in range(0, ranks, _CHUNK):
        part = np.arange(start, min(start + _CHUNK, ranks))
        gone = part[(nearest[part] >= 0) & (numbers[part] >= 0)]
        fate[numbers[gone]] = NEAR
        twin[numbers[gone]] = nearest[gone]
    for start in range(0, rows, _CHUNK):
        part = np.arange(start, min(start + _CHUNK, rows))
        same = part[fate[part] == SAME]
        onward = nearest[twin[same]]
        twin[same] = np.where(onward >= 0, onward, twin[same])
    return Fates(fate, twin, ids)


def _by_file(
    by_id: Spill,
    stored: int,
    fate: NDArray[np.uint8],
    twin: NDArray[np.int64],
    ids: NDArray[np.bytes_],
    hashes: NDArray[np.int64],
    numbers: NDArray[np.int64],
) -> int:
    """Mark the rows of equal files but one, and rank those: the stored ones first, then by id."""
    old, new = 0, stored
    for part in range(by_id.parts):
        found = by_id.read(part)
        late = found["row"] >= 0
        found = found[np.lexsort((found["row"], found["uri"], late, found["id"]))]
        first = np.ones(len(found), bool)
        first[1:] = found["id"][1:] != found["id"][:-1]
        fresh = first & (found["row"] >= 0)
        known = first & ~fresh
        rank = np.zeros(len(found), np.int64)
        rank[known] = old + np.arange(known.sum())
        rank[fresh] = new + np.arange(fresh.sum())
        old += int(known.sum())
        new += int(fresh.sum())
        ids[rank[first]] = found["id"][first]
        hashes[rank[first]] = found["phash"][first]
        numbers[rank[first]] = found["row"][first]
        head = np.maximum.accumulate(np.where(first, np.arange(len(found)), 0))
        again = found["row"][~first]
        fate[again] = SAME
        twin[again] = rank[head[~first]]
    assert old == stored, (old, stored)
    return new


# --------------------------------------------------------------------------- by look


def _by_look(hashes: NDArray[np.int64], stored: int, near: int, folder: Path) -> NDArray[np.int64]:
    """By rank: the rank of the photo that it looks like and that is kept, or -1.

    Those below ``stored`` are kept in any case.
    """
    count = len(hashes)
    nearest = on_disk(folder / "nearest", np.int64, count)
    first = on_disk(folder / "first", np.int64, count)
    by_hash = Spill(folder / "hashes", _UNIQUE, count)
    for start in range(0, count, _CHUNK):
        part = np.zeros(min(_CHUNK, count - start), _UNIQUE)
        part["phash"] = hashes[start : start + _CHUNK].view(np.uint64)
        part["rank"] = np.arange(start, start + len(part))
        by_hash.add(spread(part["phash"]), part)
    different = 0
    for number in range(by_hash.parts):
        part = by_hash.read(number)
        part = part[np.lexsort((part["rank"], part["phash"]))]
        fresh = np.ones(len(part), bool)
        fresh[1:] = part["phash"][1:] != part["phash"][:-1]
        head = np.maximum.accumulate(np.where(fresh, np.arange(len(part)), 0))
        first[part["rank"]] = part["rank"][head]
        different += int(fresh.sum())
    nearest[:] = -1
    pairs = near_pairs(_unique(by_hash), different, near, folder / "bands")
    by_hash.remove()
    for low, high in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        # In order of the later one, so that it is known whether the earlier one is kept.
        if high >= stored and nearest[high] < 0 and nearest[low] < 0:
            nearest[high] = low
    for start in range(0, count, _CHUNK):
        ranks = np.arange(max(start, stored), min(start + _CHUNK, count))
        head = first[ranks]
        kept = nearest[head]
        equal = head != ranks
        nearest[ranks[equal]] = np.where(kept >= 0, kept, head)[equal]
    return nearest


def _unique(by_hash: Spill) -> Iterator[NDArray[Any]]:
    """Each hash once, with the first rank that has it."""
    for number in range(by_hash.parts):
        part = by_hash.read(number)
        part = part[np.lexsort((part["rank"], part["phash"]))]
        fresh = np.ones(len(part), bool)
        fresh[1:] = part["phash"][1:] != part["phash"][:-1]
        yield part[fresh]


def near_pairs(
    hashes: Iterable[NDArray[Any]], count: int, near: int, folder: Path
) -> NDArray[np.int64]:
    """(P, 2) ranks, low before high, of different hashes that differ in at most ``near`` bits.

    Hashes that differ in ``near`` bits agree in all but ``near`` of any parts that they are cut
    into. For each choice of the parts that agree only those hashes are compared that do.

    Args:
        hashes: (phash, rank), each hash once; ``count`` of them.
    """
    masks = _masks(count, near)
    tables = [Spill(folder / str(i), _BANDED, count) for i in range(len(masks))] if near else []
    for chunk in hashes if near else ():
        for mask, table in zip(masks, tables, strict=True):
            record = np.zeros(len(chunk), _BANDED)
            record["phash"], record["rank"] = chunk["phash"], chunk["rank"]
            record["key"] = spread(chunk["phash"] & np.uint64(mask))
            table.add(record["key"], record)
    found = [np.zeros((0, 2), np.int64)]
    for table in tables:
        for number in range(table.parts):
            part = table.read(number)
            found += _pairs_of(part[np.argsort(part["key"], kind="stable")], near)
        table.remove()
    return np.unique(np.concatenate(found), axis=0)


def _pairs_of(part: NDArray[Any], near: int) -> Iterator[NDArray[np.int64]]:
    """The near ones among neighbours of one key in ``part``, which is sorted by key."""
    keys = np.ascontiguousarray(part["key"])
    hashes = np.ascontiguousarray(part["phash"])
    ranks = np.ascontiguousarray(part["rank"])
    left = np.arange(len(part))
    step = 0
    while len(left):
        step += 1
        left = left[left + step < len(part)]
        left = left[keys[left] == keys[left + step]]
        close = left[np.bitwise_count(hashes[left] ^ hashes[left + step]) <= near]
        if len(close):
            yield np.sort(np.stack([ranks[close], ranks[close + step]], axis=1), axis=1)


def _masks(count: int, near: int) -> list[int]:
    """For each table the bits that have to agree: as many tables as make the least work."""

    def work(parts: int) -> float:
        bits = 64 * (parts - near) / parts
        return math.comb(parts, near) * count * (50 + count / 2**bits)

    parts = min(range(near + 1, near + 5), key=work)
    edges = np.linspace(0, 64, parts + 1).round().astype(int).tolist()
    pieces = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(pieces, parts - near)]
