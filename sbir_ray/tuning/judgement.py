"""What a sweep says about its knobs, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbir_ray.study.intervals import accuracy, difference
from sbir_ray.tuning.records import Trial, Trials
from sbir_ray.tuning.space import Knob, Value

Floats = NDArray[np.float64]

EFFECTS = (
    "Rank correlation (Spearman) of each knob with the accuracy at the last step that every trial "
    "reached, so that those which were stopped early count too; 95% percentile bootstrap intervals "
    "over trials. It sees what rises or falls, not an optimum in the middle: look at the dots. "
    "With so few trials, and chosen by a search rather than evenly, an interval that spans zero "
    "says that the sweep does not know."
)
"""How the importance of a knob comes about, for people."""
LEAST = 5
"""Trials below which no correlation is told."""
_RESAMPLES = 2000


def intervals(trials: Trials, trial: Trial) -> dict[str, Any]:
    """``accuracy`` {acc@k: {mean, ci95}} of a finished trial over the choice of photos, and
    ``difference`` to the default's on the same queries; nothing for the others."""
    if trial.status != "done":
        return {}
    found = trials.measured(trial.number)
    values: dict[str, Any] = {
        "accuracy": {name: one.to_json() for name, one in accuracy([found]).items()}
    }
    default = next((one for one in trials.done() if one.untouched), None)
    if default is not None and default is not trial:
        gained = difference([found], [trials.measured(default.number)])
        values["difference"] = {name: one.to_json() for name, one in gained.items()}
    return values


def common_step(trials: Sequence[Trial]) -> int:
    """The last step at which all trials that were measured at all have been measured; 0: none."""
    steps = [{int(one["step"]) for one in trial.evaluations} for trial in trials]
    steps = [found for found in steps if found]
    return max(set.intersection(*steps), default=0) if steps else 0


def knob_effects(
    knobs: Sequence[Knob],
    trials: Sequence[Trial],
    defaults: Mapping[str, Value],
    metric: str,
) -> dict[str, Any]:
    """How the accuracy goes with each knob.

    Returns:
        ``step``, ``trials`` (how many count), ``method``, and ``knobs``, the strongest first:
        {name, correlation, ci95}, None where there are fewer than :data:`LEAST` trials or the knob
        or the accuracy does not vary.
    """
    # Before networks and knobs change hands, as they do in a population.
    changes = [change["step"] for trial in trials for change in trial.changes]
    step = min([common_step(trials), *changes])
    scored = [(trial, value) for trial in trials if (value := trial.at(step, metric)) is not None]
    # What lies outside its range in the default is no point of the space.
    told = []
    for knob in knobs:
        turned = [({**defaults, **trial.knobs}[knob.name], score) for trial, score in scored]
        points = [(knob.place(value), score) for value, score in turned if knob.holds(value)]
        entry: dict[str, Any] = {"name": knob.name, "trials": len(points)}
        told.append({**entry, **_correlation(points)})
    told.sort(key=lambda one: -abs(one["correlation"] or 0.0))
    return {"step": step, "trials": len(scored), "method": EFFECTS, "knobs": told}


def _correlation(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    nothing: dict[str, Any] = {"correlation": None, "ci95": None}
    if len(points) < LEAST:
        return nothing
    x, y = (np.array(values) for values in zip(*points, strict=True))
    found = spearman(x[None], y[None])[0]
    if not np.isfinite(found):
        return nothing
    rng = np.random.default_rng(0)
    rows = rng.integers(len(x), size=(_RESAMPLES, len(x)))
    drawn = spearman(x[rows], y[rows])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"correlation": float(found), "ci95": [float(low), float(high)]}


def spearman(x_RN: Floats, y_RN: Floats) -> Floats:
    """(R,) the correlation of the ranks, equal values sharing theirs; NaN where one is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=1) for values in (x_RN, y_RN)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(axis=1) / size)
