"""The photos of a store in memory, aligned, for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import UserError


@dataclass(frozen=True)
class PhotoSet:
    """Photos without sketches."""

    photo_ids: list[str]
    photos: NDArray[np.uint8]
    """(N, 3, S, S), aligned."""

    @classmethod
    def load(cls, folder: Path, image_size: int) -> PhotoSet:
        """All photos of a photo store, in the order of their ids.

        Raises:
            UserError: not a photo store, or an empty one.
        """
        rows = {
            row["photo_id"]: align(decode_stored(row["image"]), image_size).transpose(2, 0, 1)
            for row in read_store(folder)
        }
        if not rows:
            raise UserError(f"{folder}: holds no photo; see its ledger")
        ids = sorted(rows)
        return cls(ids, np.stack([rows[name] for name in ids]))
