"""Photos that are in two splits under whatever names: compared by content."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from sbir_ray.data import photos as photo_files
from sbir_ray.data.pairs import SPLITS, Split
from sbir_ray.data.photos import PhotoRow

NEAR_BITS = 10
"""Largest distance of perceptual hashes at which two photos are looked at."""
NEAR_SHARE = 0.1
"""Largest difference of their miniatures, as a share of what is not white in them, at which they
are the same photo. Of copies of ChairV2's photos, resized to 40-170 % and saved as JPEG at quality
40-85, 99 % are below. Among 681 photos of chairs, two of one chair with and without arms are below
too (0.09), and the nearest two different chairs differ by 0.13."""

_SIDE = 16


@dataclass(frozen=True, slots=True)
class Leak:
    """One photo in two splits."""

    exact: bool
    """The same file; otherwise a copy that was saved again, resized or slightly changed."""
    first: str
    first_split: Split
    second: str
    second_split: Split

    def __str__(self) -> str:
        first = f"{self.first!r} ({self.first_split})"
        second = f"{self.second!r} ({self.second_split})"
        return f"{first} is {'the same file as' if self.exact else 'nearly the same as'} {second}"


@dataclass(frozen=True, slots=True)
class Print:
    """What is kept of a photo to compare it."""

    photo_id: str
    name: str
    phash: int
    miniatures: npt.NDArray[np.uint8]
    """(2, 16, 16, 3): of the whole picture, and of the aligned one, which a crop leaves alone."""


def print_of(row: PhotoRow) -> Print:
    """The print of a stored photo."""
    rgb = photo_files.decode_stored(row["image"])
    whole = Image.fromarray(rgb).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    aligned = Image.fromarray(photo_files.align(rgb, 8 * _SIDE)).reduce(8)
    return Print(
        row["photo_id"],
        row["name"],
        row["phash"],
        np.stack([np.asarray(whole), np.asarray(aligned)]),
    )


def near_pairs(prints: Sequence[Print]) -> list[tuple[int, int]]:
    """Numbers (i, j), i < j, of all photos that show the same.

    Photos show the same when their files are equal, or when their hashes are near and so are their
    miniatures: the hash alone takes two colours of one chair for one photo.
    """
    hashes = np.array([photo.phash for photo in prints], np.int64)
    pairs = []
    for i, one in enumerate(prints):
        distance = photo_files.hash_distance(one.phash, hashes[i + 1 :])
        for j in (np.flatnonzero(distance <= NEAR_BITS) + i + 1).tolist():
            if one.photo_id == prints[j].photo_id or difference(one, prints[j]) <= NEAR_SHARE:
                pairs.append((i, j))
    return pairs


def find_leaks(
    prints: Sequence[Print], splits: Sequence[Split], pairs: Iterable[tuple[int, int]]
) -> list[Leak]:
    """Those of the pairs that show the same (:func:`near_pairs`) whose photos are in two splits."""
    leaks = []
    for pair in pairs:
        i, j = sorted(pair, key=lambda number: SPLITS.index(splits[number]))
        if splits[i] != splits[j]:
            one, other = prints[i], prints[j]
            exact = one.photo_id == other.photo_id
            leaks.append(Leak(exact, one.name, splits[i], other.name, splits[j]))
    return sorted(leaks, key=lambda leak: (leak.first, leak.second))


def difference(one: Print, other: Print) -> float:
    """Difference of two photos, 0 (equal) to 1 (nothing in common): the smaller one of that of the
    whole pictures and that of the aligned ones."""
    dark_one = 255 - one.miniatures.astype(np.int64).reshape(2, -1)
    dark_other = 255 - other.miniatures.astype(np.int64).reshape(2, -1)
    content = np.maximum(dark_one, dark_other).sum(axis=1)
    return float((np.abs(dark_one - dark_other).sum(axis=1) / np.maximum(content, 1)).min())
