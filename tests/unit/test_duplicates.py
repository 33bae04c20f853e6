"""Duplicates: what is found by parts on disk is what comparing all pairs finds."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.stream import spill
from sbir_ray.stream.duplicates import NEAR, RECORD, SAME, find_duplicates, near_pairs

PHOTO = st.tuples(st.integers(0, 12), st.integers(0, 3))


def hash_of(photo: int) -> int:
    """Of three families, whose members differ in a few bits."""
    family = np.random.default_rng(photo % 3).integers(-(2**63), 2**63 - 1)
    flips = np.random.default_rng(100 + photo).integers(0, 64, photo % 4)
    value = int(family) & (2**64 - 1)
    for bit in flips.tolist():
        value ^= 1 << bit
    return value - 2**64 if value >= 2**63 else value


def id_of(photo: int) -> bytes:
    return hashlib.sha256(bytes([photo])).digest()


def by_comparing(
    known: list[int], found: list[tuple[int, int]], near: int
) -> list[tuple[int, str]]:
    """(fate, photo_id of what is kept instead) of each photo that is found."""
    kept = sorted(known, key=id_of)
    fates: dict[int, tuple[int, str]] = {}
    first: dict[int, int] = {}
    order = sorted(range(len(found)), key=lambda i: (id_of(found[i][0]), uri_of(found[i][1]), i))
    for row in order:
        photo = found[row][0]
        if photo in known:
            fates[row] = (SAME, id_of(photo).hex())
        elif photo in first:
            of = fates[first[photo]][1] or id_of(photo).hex()
            fates[row] = (SAME, of)
        else:
            first[photo] = row
            equal = [k for k in kept[: len(known)] if hash_of(k) == hash_of(photo)]
            close = [k for k in kept if (hash_of(k) ^ hash_of(photo)).bit_count() <= near]
            fates[row] = (NEAR, id_of((equal or close)[0]).hex()) if close else (0, "")
            kept += [] if close else [photo]
    return [fates[row] for row in range(len(found))]


def uri_of(number: int) -> bytes:
    return hashlib.blake2b(bytes([number]), digest_size=16).digest()


@pytest.mark.parametrize("part", [4, 1 << 20])
@settings(deadline=None, max_examples=50)
@given(
    known=st.lists(st.integers(0, 12), max_size=3, unique=True),
    found=st.lists(PHOTO, min_size=1, max_size=25),
    near=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_duplicates_are_those_of_comparing_all_pairs_in_any_order(
    part: int, known: list[int], found: list[tuple[int, int]], near: int, seed: int
) -> None:
    records = np.zeros(len(known) + len(found), RECORD)
    records["id"] = [id_of(p) for p in known] + [id_of(p) for p, _ in found]
    records["uri"] = [b""] * len(known) + [uri_of(u) for _, u in found]
    records["phash"] = [hash_of(p) for p in known] + [hash_of(p) for p, _ in found]
    records["row"] = [-1 - i for i in range(len(known))] + list(range(len(found)))
    shuffled = records[np.random.default_rng(seed).permutation(len(records))]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(spill, "PART_RECORDS", part)
        fates = find_duplicates(
            np.array_split(shuffled, 3), len(found), near, Path(folder), len(known)
        )
        again = np.flatnonzero(fates.fate)
        of = dict(zip(again.tolist(), fates.of(again), strict=True))
        got = [(int(fate), of.get(row, "")) for row, fate in enumerate(fates.fate)]
    assert got == by_comparing(known, found, near)


@pytest.mark.parametrize("near", [0, 1, 2, 5, 8])
def test_near_pairs_are_found_among_many_without_comparing_all(tmp_path: Path, near: int) -> None:
    rng = np.random.default_rng(near)
    hashes = rng.integers(0, 2**63, 4000, dtype=np.uint64)
    for row in range(0, 400, 2):  # planted: from 1 to 10 bits away
        flips = rng.choice(64, 1 + row // 2 % 10, replace=False)
        hashes[row + 1] = hashes[row] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype("u8"))
    records = np.zeros(len(hashes), [("phash", "<u8"), ("rank", "<i8")])
    records["phash"], records["rank"] = hashes, np.arange(len(hashes))
    found = near_pairs(np.array_split(records, 7), len(hashes), near, tmp_path)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distance <= near, 1)) if near else np.zeros((0, 2), int)
    assert found.tolist() == expected.tolist()
