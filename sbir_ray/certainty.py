"""Pseudo pairs in the order of their certainty: does it tell good from bad (paper, Fig. 4a)?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Decile:
    """A tenth of the pseudo pairs in the order of their certainty."""

    certainty: float
    """Mean."""
    low: float
    high: float
    """Least and largest certainty."""
    count: int
    found: float
    """Share whose sketch finds its own photo first."""
    found10: float
    """Share whose sketch finds its own photo among the first ten."""
    median_rank: float


def certainty_deciles(
    certainty: NDArray[Any] | Sequence[float], ranks: NDArray[Any] | Sequence[int]
) -> list[Decile]:
    """Tenths of the pseudo pairs, most certain first (fewer parts if there are fewer pairs).

    Args:
        certainty: (N,).
        ranks: (N,) rank of each pair's photo when its own pseudo sketch is the query.
    """
    score, rank = np.asarray(certainty, dtype=np.float64), np.asarray(ranks)
    order = np.argsort(-score, kind="stable")
    return [
        Decile(
            certainty=float(score[part].mean()),
            low=float(score[part].min()),
            high=float(score[part].max()),
            count=len(part),
            found=float((rank[part] == 1).mean()),
            found10=float((rank[part] <= 10).mean()),
            median_rank=float(np.median(rank[part])),
        )
        for part in np.array_split(order, min(10, len(order)) or 1)
        if len(part)
    ]


def pick_evenly(certainty: NDArray[Any] | Sequence[float], count: int = 24) -> list[int]:
    """Rows evenly spaced over the order by certainty, from the most to the least certain."""
    order = np.argsort(-np.asarray(certainty), kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in places]
