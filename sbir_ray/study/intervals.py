"""Accuracy over several training runs, and how far it can be trusted: seeds and photos.

Shapes: S training runs (seeds), Q queries, P photos that they are of, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbir_ray.evaluate import RESAMPLES

Floats = NDArray[np.float64]

PLACES = (1, 5, 10)
"""The k of acc@k."""
NAMES = tuple(f"acc@{k}" for k in PLACES)
METHOD = (
    "Intervals: 95%, percentile bootstrap over training runs (seeds) and test photos at once; the "
    "runs' deviations are widened by sqrt(S / (S - 1)), S runs, since so few resample too "
    "narrowly. With one run they cover the choice of photos alone."
)
"""How the intervals come about, for people."""
FOLDS = (
    "Runs that were measured on other photos (folds) count alike, and what the photos differ "
    "counts twice, as photos and as runs: the intervals are on the wide side."
)
"""The same, where there are folds."""
_BLOCK = 1 << 22
"""Numbers held at once."""


@dataclass(frozen=True, slots=True)
class Found:
    """How each query of one trained network did."""

    photos: Sequence[str]
    """(Q,) the photo that each query is of, which is resampled with all its queries."""
    ranks: Sequence[int]
    """(Q,) of that photo, from 1."""
    gallery: int
    """Photos searched."""

    def to_json(self) -> dict[str, Any]:
        """Plain values under the names of the fields."""
        return {"photos": list(self.photos), "ranks": list(self.ranks), "gallery": self.gallery}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Found:
        """The inverse of :meth:`to_json`."""
        return cls(values["photos"], values["ranks"], int(values["gallery"]))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """``mean`` and ``ci95`` [low, high]."""
        return {"mean": self.mean, "ci95": [self.low, self.high]}


def accuracy(runs: Sequence[Found]) -> dict[str, Estimate]:
    """acc@1, acc@5 and acc@10, the mean over the runs, each within [0, 1].

    Raises:
        ValueError: no runs, or one without queries.
    """
    return {
        name: _estimate([(run.photos, _hits(run, k)) for run in runs], least=0.0)
        for name, k in zip(NAMES, PLACES, strict=True)
    }


def difference(runs: Sequence[Found], others: Sequence[Found]) -> dict[str, Estimate]:
    """acc@k of ``runs`` minus that of ``others``, run by run on the same queries.

    What makes a photo easy, or a split of the labels lucky, for both, cancels out.

    Args:
        others: the run of the same seed for each of ``runs``.

    Raises:
        ValueError: as :func:`accuracy`, not as many runs, or a run and its other have not the same
            queries.
    """
    if len(runs) != len(others):
        raise ValueError(f"{len(runs)} runs and {len(others)} to compare them with")
    both = list(zip(runs, others, strict=True))
    if any(list(a.photos) != list(b.photos) for a, b in both):
        raise ValueError("the runs are not of the same queries")
    return {
        name: _estimate([(a.photos, _hits(a, k) - _hits(b, k)) for a, b in both], least=-1.0)
        for name, k in zip(NAMES, PLACES, strict=True)
    }


def shares(run: Found) -> dict[str, float]:
    """acc@k of one run."""
    return {name: float(_hits(run, k).mean()) for name, k in zip(NAMES, PLACES, strict=True)}


def chance(gallery: int) -> dict[str, float]:
    """acc@k of a random order of the gallery."""
    return {name: min(1.0, k / gallery) for name, k in zip(NAMES, PLACES, strict=True)}


def _hits(run: Found, k: int) -> Floats:
    return (np.asarray(run.ranks) <= k).astype(np.float64)


def _estimate(value: Sequence[tuple[Sequence[str], Floats]], least: float) -> Estimate:
    """Of each run the photo and the value of each query, (Q,)."""
    if not value or not all(len(photos) for photos, _ in value):
        raise ValueError("no runs, or no queries")
    mean = float(np.mean([value_Q.mean() for _, value_Q in value]))
    drawn = np.concatenate(list(_resampled(value)))
    low, high = np.percentile(np.clip(drawn, least, 1.0), [2.5, 97.5])
    return Estimate(mean, float(low), float(high))


def _resampled(value: Sequence[tuple[Sequence[str], Floats]], seed: int = 0) -> Iterator[Floats]:
    """Blocks (R,) of the mean over resampled runs and photos."""
    runs = len(value)
    # Runs of the same queries see the same resampled photos.
    folds: dict[tuple[str, ...], list[int]] = {}
    for place, (photos, _) in enumerate(value):
        folds.setdefault(tuple(photos), []).append(place)
    parts = []
    for photos, places in folds.items():
        _, photo_of_Q = np.unique(np.asarray(photos), return_inverse=True)
        count_P = np.bincount(photo_of_Q).astype(np.float64)
        sum_SP = np.stack([np.bincount(photo_of_Q, weights=value[s][1]) for s in places])
        parts.append((places, count_P, sum_SP))
    widen = math.sqrt(runs / (runs - 1)) if runs > 1 else 0.0
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(len(count_P) for _, count_P, _ in parts))
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        mean_RS = np.empty((size, runs))
        for places, count_P, sum_SP in parts:
            P = len(count_P)
            photo_RP = rng.multinomial(P, np.full(P, 1 / P), size)
            mean_RS[:, places] = (photo_RP @ sum_SP.T) / (photo_RP @ count_P)[:, None]
        run_RS = rng.multinomial(runs, np.full(runs, 1 / runs), size)
        middle_R = mean_RS.mean(axis=1)
        chosen_R = (run_RS * mean_RS).sum(axis=1) / runs
        yield middle_R + widen * (chosen_R - middle_R)
