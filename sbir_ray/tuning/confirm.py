"""Is the best really better? It and the default again, with seeds that the search has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sbir_ray.runlog import Progress
from sbir_ray.study.execute import execute
from sbir_ray.study.intervals import METHOD, Found, accuracy, difference, shares
from sbir_ray.study.work import Measure, Train, Work
from sbir_ray.tuning.records import Trial
from sbir_ray.tuning.request import Effort
from sbir_ray.tuning.trial import Phase, TrialSpec

CAUTION = (
    "The best of many trials on one seed and these validation photos is best by luck too, so its "
    "own number is optimistic. The rerun has other seeds of the training; the pseudo pairs, the "
    "teacher and the validation photos are those that the search saw. What it is worth on photos "
    "that chose nothing, the test split says, which the sweep has not read."
)


def confirm(
    spec: TrialSpec,
    winner: Trial,
    phases: Sequence[Phase],
    effort: Effort,
    out: Path,
    parallel: int,
    progress: Callable[[str], Progress],
) -> dict[str, Any]:
    """Train the best and the default with ``effort.seeds`` other seeds, and compare them.

    Args:
        phases: of the best.

    Returns:
        ``status``: ``done``, ``default`` (the default is the best), ``skipped`` (no seeds) or
        ``failed`` with ``reasons``; for ``done`` the ``seeds``, and ``best`` and ``default``
        {metric: {mean, ci95, by_seed}}, ``difference`` {metric: {mean, ci95}}, paired by seed and
        query; ``caution`` and ``method`` for people.
    """
    said = {"caution": CAUTION, "method": METHOD}
    if winner.untouched:
        return {"status": "default", **said}
    if not effort.seeds:
        return {"status": "skipped", **said}
    first = spec.config.seed
    seeds = range(first + 1, first + 1 + effort.seeds)
    trained_as = {"best": phases, "default": [Phase(spec.steps, {})]}
    # By the trial's number: with more trials another one may be the best.
    places = {"best": f"trial-{winner.number:03d}", "default": "default"}
    work: list[Work] = []
    measures: dict[str, dict[int, Measure]] = {name: {} for name in trained_as}
    for seed in seeds:
        for name, place in places.items():
            run = out / "confirm" / place / f"seed-{seed}"
            jobs = spec.jobs(run, trained_as[name], seed)
            trained = Train(f"{place}/seed-{seed}", tuple(jobs))
            measure = Measure(
                f"{trained.name}/found",
                jobs[-1].out,
                spec.inputs["pairs"],
                "val",
                "",
                str(run.with_suffix(".json")),
                needs=(trained.name,),
            )
            measures[name][seed] = measure
            work += [trained, measure]
    failed = execute(
        work,
        parallel=max(1, parallel * spec.workers),
        cpus=spec.cpus,
        gpu=spec.gpu,
        failures=out / "failures",
        progress=lambda _: progress("confirm"),
    )
    if failed:
        return {"status": "failed", "reasons": failed, **said}
    found = {
        name: {seed: measure.found() for seed, measure in by_seed.items()}
        for name, by_seed in measures.items()
    }
    gained = difference(list(found["best"].values()), list(found["default"].values()))
    return {
        "status": "done",
        "seeds": list(seeds),
        **{name: _summary(by_seed) for name, by_seed in found.items()},
        "difference": {name: one.to_json() for name, one in gained.items()},
        **said,
    }


def _summary(found: Mapping[int, Found]) -> dict[str, Any]:
    single = {str(seed): shares(one) for seed, one in found.items()}
    return {
        name: {**one.to_json(), "by_seed": {seed: values[name] for seed, values in single.items()}}
        for name, one in accuracy(list(found.values())).items()
    }
