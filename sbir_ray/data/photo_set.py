"""The photos of a store in memory, aligned, for training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.pairs import hash_of
from sbir_ray.data.photos import align, chosen_rows, decode_stored, read_store
from sbir_ray.errors import DamagedError, UserError


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
            DamagedError: a picture cannot be read.
        """
        if at_most is None:
            rows: Iterable[Mapping[str, Any]] = read_store(folder)
        else:
            named = chosen_rows(
                folder, at_most, lambda name: hash_of(seed, name), ("photo_id", "image")
            )
            rows = named.to_pylist()
        found = {row["photo_id"]: _aligned(row, image_size, folder) for row in rows}
        if not found:
            raise UserError(f"{folder}: holds no photo; see its ledger")
        ids = sorted(found)
        return cls(ids, np.stack([found[name] for name in ids]))


def _aligned(row: Mapping[str, Any], image_size: int, folder: Path) -> NDArray[np.uint8]:
    try:
        rgb = decode_stored(row["image"])
    except (OSError, SyntaxError, ValueError) as error:
        raise DamagedError(
            f"{folder}: photo {row['photo_id']} cannot be read ({error}); ingest again"
        ) from error
    return align(rgb, image_size).transpose(2, 0, 1)
