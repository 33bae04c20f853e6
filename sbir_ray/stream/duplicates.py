"""Photos that are there twice, and photos that may not be there at all: compared by content."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.data import leaks, pairs, photos
from sbir_ray.data.photos import PhotoRow
from sbir_ray.errors import UserError

LEAK_BITS = 2
"""Largest distance of perceptual hashes at which a photo is that of an excluded one, in any colour;
other copies are found as :mod:`sbir_ray.data.leaks` finds them."""


@dataclass(frozen=True)
class Forbidden:
    """Photos that may not train."""

    prints: list[leaks.Print]
    hashes: NDArray[np.int64]

    @classmethod
    def of(cls, folders: Sequence[Path], must: Sequence[Path] = ()) -> Forbidden:
        """The validation and test photos of PAIRS folders.

        Args:
            must: those of the folders that have to have some.

        Raises:
            UserError, DamagedError: a folder that is no PAIRS folder, or a damaged one.
        """
        prints: list[leaks.Print] = []
        for folder in folders:
            found = [leaks.print_of(row) for row in pairs.iter_photos(folder, {"val", "test"})]
            if not found and folder in must:
                raise UserError(
                    f"{folder}: has no validation or test photos to exclude; leave it out"
                )
            prints += found
        return cls(prints, np.array([p.phash for p in prints], np.int64))

    def leak_of(self, row: PhotoRow) -> tuple[str, str] | None:
        """(reason, text) when the photo is one of these, whatever its name; else None."""
        if not self.prints:
            return None
        distance = photos.hash_distance(row["phash"], self.hashes)
        mine: leaks.Print | None = None
        for index in np.argsort(distance, kind="stable").tolist():
            other = self.prints[index]
            where = repr(other.name)
            if row["photo_id"] == other.photo_id:
                return "same-file", f"the same file as {where}"
            if distance[index] <= LEAK_BITS:
                return "near", f"nearly the same as {where}"
            if distance[index] > leaks.NEAR_BITS:
                break
            mine = mine or leaks.print_of(row)
            if leaks.difference(mine, other) <= leaks.NEAR_SHARE:
                return "near", f"nearly the same as {where}"
        return None


def decide(accounts: pa.Table, near: int) -> pa.Table:
    """The accounts with the status ``duplicate`` where a photo is stored under another name."""
    columns = accounts.to_pydict()
    rows = [i for i, status in enumerate(columns["status"]) if status == "stored"]
    rows.sort(key=lambda i: (columns["photo_id"][i], columns["uri"][i]))
    twins = duplicates(
        [columns["photo_id"][i] for i in rows], [columns["phash"][i] for i in rows], near
    )
    for i, twin in zip(rows, twins, strict=True):
        if twin is not None:
            kept = rows[twin]
            same = columns["photo_id"][i] == columns["photo_id"][kept]
            columns["status"][i] = "duplicate"
            columns["reason"][i] = "same-file" if same else "near"
            columns["detail"][i] = f"of {columns['uri'][kept]}"
    return pa.table(columns, schema=accounts.schema)


def duplicates(photo_ids: Sequence[str], hashes: Sequence[int], near: int) -> list[int | None]:
    """For each photo the index of the one it is a duplicate of, or None if it is kept.

    A photo is kept unless one before it that is kept has its id, or a hash that differs in at most
    ``near`` bits. Hashes that differ in ``near`` of 64 bits agree in one of ``near`` + 1 parts, so
    each part is looked up and not every pair compared.
    """
    edges = np.linspace(0, 64, near + 2).round().astype(int).tolist()
    parts = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]
    places: list[dict[int, list[int]]] = [defaultdict(list) for _ in parts]
    ids: dict[str, int] = {}
    unsigned = [value & 0xFFFF_FFFF_FFFF_FFFF for value in hashes]
    out: list[int | None] = []
    for index, (name, value) in enumerate(zip(photo_ids, unsigned, strict=True)):
        keys = [(value >> low) & mask for low, mask in parts]
        close = (
            other
            for place, key in zip(places, keys, strict=True)
            for other in place.get(key, ())
            if (value ^ unsigned[other]).bit_count() <= near
        )
        twin = ids[name] if name in ids else min(close, default=None)
        out.append(twin)
        if twin is None:
            ids[name] = index
            for place, key in zip(places, keys, strict=True):
                place[key].append(index)
    return out
