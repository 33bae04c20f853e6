"""The photos of a store in memory, aligned, for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.pairs import hash_of
from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import UserError


@dataclass(frozen=True)
class PhotoSet:
    """Photos without sketches."""

    photo_ids: list[str]
    photos: NDArray[np.uint8]
    """(N, 3, S, S), aligned."""

    @classmethod
    def load(
        cls, folder: Path, image_size: int, at_most: int | None = None, seed: int = 0
    ) -> PhotoSet:
        """The photos of a photo store, in the order of their ids.

        Args:
            at_most: how many; the others are left out by chance, which ``seed`` decides for each
                photo by itself.

        Raises:
            UserError: not a photo store, or an empty one.
        """
        images = {row["photo_id"]: row["image"] for row in read_store(folder)}
        if not images:
            raise UserError(f"{folder}: holds no photo; see its ledger")
        ids = sorted(images, key=lambda name: hash_of(seed, name))[:at_most]
        ids.sort()
        pixels = [align(decode_stored(images[name]), image_size) for name in ids]
        return cls(ids, np.stack(pixels).transpose(0, 3, 1, 2))
