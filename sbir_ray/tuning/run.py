"""One sweep from its request to its report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbir_ray.config import FilterConfig, GeneratorTraining, SketchConfig
from sbir_ray.errors import SbirError
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import remove_tree
from sbir_ray.runlog import Progress, versions, write_json_atomic
from sbir_ray.stream import fit
from sbir_ray.strict import SCHEMA_VERSION, to_toml
from sbir_ray.study.claim import claimed
from sbir_ray.study.execute import execute
from sbir_ray.study.work import Draw, Train, Work
from sbir_ray.train.job import Job
from sbir_ray.train.tasks import generator_jobs
from sbir_ray.tuning.confirm import confirm
from sbir_ray.tuning.records import DEFAULT, Trial, Trials, best
from sbir_ray.tuning.request import SETTINGS, Effort, Request, check, command
from sbir_ray.tuning.space import defaults, with_knobs
from sbir_ray.tuning.trial import Phase, TrialSpec, steps_of

RESULT, BEST, SCHEDULE = "tune.json", "best.toml", "schedule"
LOOKS = 4
"""Parts of a training after each of which trials are compared."""
_DYING = 5.0
"""Seconds for what an interrupted trial has started to end after it."""


def run_sweep(
    request: Request, effort: Effort, out: Path, *, progress: Callable[[str], Progress]
) -> dict[str, Any]:
    """Do what is left of a sweep; write ``tune.json``, ``best.toml`` and ``report.html``.

    Args:
        out: SWEEP folder.
        progress: makes a progress line from a title.

    Returns:
        What ``tune.json`` has.

    Raises:
        UserError: data or settings that the user has to change; ``out`` holds another sweep.
        SbirError: what all trials need could not be made, or no trial came to its end.
    """
    from sbir_ray.doctor import ready
    from sbir_ray.tuning.page import write_page

    out = out.resolve()
    check(request)
    with claimed(out, "sweep", request.identity(), {SETTINGS: to_toml(request.config)}):
        with ready(_asked(effort), [out], effort.address):
            parallel = _parallel(effort)
            inputs = _shared(request, effort, out / "shared", parallel, progress)
            spec = _spec(request, effort, out, inputs)
            trials = Trials(out / "trials", request.metric)
            _search(request, effort, out, spec, trials, parallel, progress)
            winner = best(list(trials), request.metric)
            if winner is None:
                reasons = [trial.failures[-1] for trial in trials if trial.failures]
                raise SbirError(
                    f"{out}: none of {len(trials)} trials came to its end"
                    + (f"; the last failed with: {reasons[-1]}" if reasons else "")
                )
            phases = _phases(request, spec, trials, winner)
            written = _write_best(request, out, winner, phases)
            confirmed = confirm(spec, winner, phases, effort, out, parallel, progress)
        values = _result(request, effort, out, trials, winner, confirmed)
        values["best"] |= {
            "config": str(written),
            "phases": [{"end": phase.end, "knobs": phase.knobs} for phase in phases],
        }
        write_json_atomic(out / RESULT, values)
        write_page(out, values)
    return values


# --------------------------------------------------------------------------- before it starts


def _asked(effort: Effort) -> fit.Request:
    """What trials need at the same time; of one where their number is left open."""
    from sbir_ray.tuning.search import TRIAL_CPUS

    workers = fit.Group("--workers", effort.workers, effort.cpus, float(effort.gpu))
    return fit.Request(
        (workers,), TRIAL_CPUS, effort.parallel or 1, spare_for="Ray Tune", beside="--parallel"
    )


def _parallel(effort: Effort) -> int:
    """Trials at a time, so that all workers of each find room: else trials would hold what the
    others wait for."""
    from sbir_ray.stream.cluster import ensure_fits
    from sbir_ray.tuning.search import TRIAL_CPUS

    if effort.parallel is not None:
        return effort.parallel
    each = effort.workers * effort.cpus + TRIAL_CPUS
    gpus = float(effort.workers * effort.gpu)
    fits = ensure_fits(each, gpus) if effort.workers == 1 else _fits(each, gpus)
    if effort.address or os.environ.get("RAY_ADDRESS"):
        return fits
    cores = len(os.sched_getaffinity(0)) / (effort.workers * effort.cpus)
    return max(1, min(fits, int(cores)))


def _fits(cpus: float, gpus: float) -> int:
    """Trials of several workers, which may lie on several nodes."""
    import ray

    total = ray.cluster_resources()
    room = int((total.get("CPU", 0.0) + 1e-6) // cpus)
    return max(1, min(room, int(total.get("GPU", 0.0) // gpus)) if gpus else room)


# --------------------------------------------------------------------------- what trials share


def _shared(
    request: Request,
    effort: Effort,
    out: Path,
    parallel: int,
    progress: Callable[[str], Progress],
) -> dict[str, str]:
    """The inputs of a trial's job; the teacher, the generator and the pseudo pairs are made here,
    each once."""
    pairs = str(request.pairs.resolve())
    config = request.config
    joint = isinstance(config, JointTraining)
    inputs = {"pairs": pairs}
    work: list[Work] = []

    def made(name: str, given: Path | None, jobs: list[Job]) -> str:
        if given is not None:
            return str(given.resolve())
        work.append(Train(name, tuple(jobs)))
        return jobs[0].out

    alone = config.retrieval if isinstance(config, JointTraining) else config
    alone = replace(alone, seed=config.seed, negatives=0, filters=FilterConfig())
    teacher = str(out / "teacher")
    inputs["teacher"] = made(
        "teacher", request.teacher, [Job("retrieval", teacher, alone, {"pairs": pairs})]
    )
    drawing = GeneratorTraining()
    if isinstance(config, JointTraining):
        drawing = config.generator
    seen = {"pairs": pairs}
    if request.photos is not None:
        seen["photos"] = str(request.photos.resolve())
    jobs = generator_jobs(str(out / "generator"), replace(drawing, seed=config.seed), seen)
    if joint:
        assert request.photos is not None
        inputs["photos"] = str(request.photos.resolve())
        inputs["generator"] = made("generator", request.generator, jobs)
    elif request.pseudo is not None:
        inputs["pseudo"] = str(request.pseudo.resolve())
    else:
        assert request.photos is not None
        generator = made("generator", request.generator, jobs)
        drawn = Draw(
            "pseudo",
            str(request.photos.resolve()),
            str(out / "pseudo"),
            generator,
            SketchConfig(seed=config.seed),
            inputs["teacher"],
            tuple(piece.name for piece in work),
        )
        work.append(drawn)
        inputs["pseudo"] = drawn.out
    failed = execute(
        work,
        parallel=parallel,
        cpus=effort.cpus,
        gpu=effort.gpu,
        failures=out / "failures",
        progress=lambda _: progress("shared"),
    )
    if failed:
        name, reason = next(iter(failed.items()))
        raise SbirError(f"{out}: {name} failed: {reason}; the same command tries it again")
    return inputs


def _spec(request: Request, effort: Effort, out: Path, inputs: Mapping[str, str]) -> TrialSpec:
    config = request.config
    if isinstance(config, JointTraining):
        # Repeatable, and each trial is its workers and no more.
        config = replace(config, stream=replace(config.stream, sync=True))
    return TrialSpec(
        out=str(out / "trials"),
        config=config,
        inputs=inputs,
        metric=request.metric,
        evaluate_every=max(1, -(-steps_of(config) // LOOKS)),
        workers=effort.workers,
        cpus=effort.cpus,
        gpu=effort.gpu,
    )


def _search(
    request: Request,
    effort: Effort,
    out: Path,
    spec: TrialSpec,
    trials: Trials,
    parallel: int,
    progress: Callable[[str], Progress],
) -> None:
    from sbir_ray.train.groups import give_back_of_the_dead
    from sbir_ray.tuning.population import evolve
    from sbir_ray.tuning.search import sweep

    storage = out / "ray"
    remove_tree(storage)
    common: dict[str, Any] = {
        "count": effort.trials,
        "seed": request.config.seed,
        "retries": effort.retries,
        "parallel": parallel,
        "defaults": defaults(request.config, request.space.knobs),
        "storage": storage,
        "progress": progress,
    }
    try:
        if request.scheduler == "pbt":
            evolve(spec, request.space, trials, **common)
            return
        sweep(
            spec,
            request.space,
            trials,
            searcher=request.searcher,
            early_stop=request.scheduler == "asha",
            **common,
        )
    finally:
        give_back_of_the_dead(_DYING)
        remove_tree(storage)


# --------------------------------------------------------------------------- what comes of it


def _phases(request: Request, spec: TrialSpec, trials: Trials, winner: Trial) -> list[Phase]:
    """How the winner's knobs were turned while it trained."""
    if request.scheduler != "pbt":
        return [Phase(spec.steps, winner.knobs)]
    from sbir_ray.tuning.population import schedule_of

    return schedule_of(trials.place(winner.number))


def _write_best(request: Request, out: Path, winner: Trial, phases: Sequence[Phase]) -> Path:
    """The configuration for ``train``, or a folder of one for each phase, in order."""
    head = f"# Trial {winner.number} of a sweep over {request.space.name}, for\n"
    what = request.space.trains
    if len(phases) == 1:
        config = with_knobs(request.config, phases[0].knobs)
        line = f"#   sbir-ray train {what} --config {BEST} ...\n\n"
        (out / BEST).write_text(head + line + to_toml(config))
        return out / BEST
    (out / BEST).unlink(missing_ok=True)
    folder = out / SCHEDULE
    remove_tree(folder)
    folder.mkdir()
    for number, phase in enumerate(phases, start=1):
        config = with_knobs(request.config, {**phase.knobs, "optim.steps": phase.end})
        begin = f" --begin RUN-OF-{number - 1}" if number > 1 else ""
        line = f"#   sbir-ray train {what} --config {number}.toml{begin} ...\n\n"
        (folder / f"{number}.toml").write_text(head + line + to_toml(config))
    return folder


def _result(
    request: Request,
    effort: Effort,
    out: Path,
    trials: Trials,
    winner: Trial,
    confirmed: dict[str, Any],
) -> dict[str, Any]:
    from sbir_ray.tuning.judgement import intervals, knob_effects

    steps = steps_of(request.config)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "request": request.identity(),
        "space": request.space.name,
        "steps": steps,
        "seed": request.config.seed,
        "defaults": defaults(request.config, request.space.knobs),
        "trials": [{**trial.to_json(), **intervals(trials, trial)} for trial in trials],
        "wanted": effort.trials,
        "default": DEFAULT,
        "best": {"number": winner.number, "knobs": winner.last_knobs},
        "effects": knob_effects(
            request.space.knobs,
            list(trials),
            defaults(request.config, request.space.knobs),
            request.metric,
        ),
        "confirmed": confirmed,
        "metric": request.metric,
        "command": command(request, effort, out),
        "report": str(out / "report.html"),
        "versions": versions(),
    }
