"""Which rows a step trains on, as a pure function of (seed, step).

There is no iterator whose state could be lost: a resumed run, another number of workers, or a
retried step sees the same rows with the same augmentation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sbir_ray.errors import UserError


def rng_of(*keys: object) -> np.random.Generator:
    """A random generator that depends on ``keys`` alone, on every machine and in every process."""
    text = "\x1f".join(str(key) for key in keys)
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


class Stream:
    """An endless sequence of indices 0..size-1: one permutation after another, never a gap.

    Each index comes once an epoch; an epoch may end in the middle of a batch.
    """

    def __init__(self, size: int, *keys: object) -> None:
        """``size``: number of items (at least 1); ``keys``: what the order depends on."""
        if size < 1:
            raise ValueError("a stream needs at least one item")
        self.size = size
        self.keys = keys
        self._cached: tuple[int, np.ndarray] | None = None

    def at(self, position: int) -> tuple[int, int]:
        """``(epoch, index)`` of the item at ``position``, counted from 0 since the run began."""
        epoch, offset = divmod(position, self.size)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, rng_of(*self.keys, "epoch", epoch).permutation(self.size)
        return epoch, int(self._cached[1][offset])

    def batch(self, step: int, count: int) -> list[tuple[int, int]]:
        """The ``count`` items of batch number ``step``."""
        return [self.at(step * count + i) for i in range(count)]


def check_position(found: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with other data than those that a position is a position in.

    Args:
        found: ``{name: [size, identity]}`` as a checkpoint holds it; ``now``: of the data.

    Raises:
        UserError: they differ; rows would be lost or repeated.
    """
    for name, value in now.items():
        if found.get(name) != value:
            raise UserError(
                f"{where}: was trained on other data ({name} was {found.get(name)}, is {value}): "
                "put the data back, or choose another --out"
            )


def identity(ids: Iterable[str]) -> list[Any]:
    """``[size, digest]`` of a sequence, for :func:`check_position`."""
    names = list(ids)
    text = "\x1f".join(names)
    return [len(names), hashlib.sha256(text.encode()).hexdigest()[:12]]


def group(keys: Iterable[int], size: int) -> list[list[int]]:
    """Positions by key: ``group(photo_of, photos)[p]`` lists the sketches of photo ``p``."""
    groups: list[list[int]] = [[] for _ in range(size)]
    for position, key in enumerate(keys):
        groups[int(key)].append(position)
    return groups
