"""Population-based training: knobs that are turned while networks train.

After each phase the worst quarter of the trials take up the networks of the best quarter, with
their knobs turned a little. A phase is a run of its own that begins where another ended, so that a
schedule can be trained again: by ``train semi --begin``, one phase after another.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import arrow_file_system, place
from sbir_ray.runlog import Progress, write_json_atomic
from sbir_ray.strict import digest
from sbir_ray.tuning.records import DEFAULT, Trials, trial_folder
from sbir_ray.tuning.space import Knob, Space, Value, with_knobs
from sbir_ray.tuning.trial import (
    CHANGES,
    SCORE,
    Phase,
    TrialSpec,
    job_of,
    last_evaluation,
    measure,
    telling,
)

PHASES = "phases.json"
"""File of a trial's folder: the phases of its network, with those of other trials before it took
one of them up."""
LEAST = 4
"""Trials of a population: fewer have no quarter to give up."""


def evolve(
    spec: TrialSpec,
    space: Space,
    trials: Trials,
    *,
    count: int,
    seed: int,
    retries: int,
    parallel: int,
    defaults: Mapping[str, Value],
    storage: Path,
    progress: Callable[[str], Progress],
) -> None:
    """Do what is left of a population of ``count``. Needs a Ray that is up. See
    :func:`sbir_ray.tuning.search.sweep`.

    Raises:
        UserError: the population is too small.
    """
    from ray import tune
    from ray.tune.schedulers import PopulationBasedTraining

    from sbir_ray.tuning.search import TRIAL_CPUS, Random, Recorder, is_left, quiet

    if count < LEAST:
        raise UserError(f"--trials {count}: a population needs at least {LEAST}")
    draw = Random(space.knobs, seed)
    for number in range(count):
        if number not in trials:
            trials.add(number, {} if number == DEFAULT else draw.next(number))
    left = [number for number in range(count) if is_left(trials[number], retries)]
    if not left:
        return
    population = []
    for number in left:
        trial = trials[number]
        trial.status = "open"
        knobs = trial.last_knobs
        population.append({"number": number, "knobs": dict(knobs)})

    def trainable(config: dict[str, Any]) -> None:
        run_phases(spec, config)

    system, kept = arrow_file_system(storage)
    with progress("tune") as bar, quiet():
        tune.Tuner(
            tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
            param_space={"trial": tune.grid_search(population)},
            tune_config=tune.TuneConfig(
                scheduler=PopulationBasedTraining(
                    time_attr="step",
                    metric=SCORE,
                    mode="max",
                    perturbation_interval=spec.evaluate_every,
                    custom_explore_fn=explorer(space.knobs, defaults, seed),
                    # Together, so that accuracies at the same step are compared, however few
                    # trials have room at a time.
                    synch=True,
                    # What cannot be trained is told without a score.
                    require_attrs=False,
                    log_config=False,
                ),
                max_concurrent_trials=parallel,
                # The trial's own name, which it keeps when it takes up another's knobs.
                trial_dirname_creator=lambda trial: f"{trial.config['trial']['number']:03d}",
            ),
            run_config=tune.RunConfig(
                name="population",
                storage_path=kept,
                storage_filesystem=system,
                failure_config=tune.FailureConfig(max_failures=retries),
                callbacks=[Recorder(spec.steps, trials, count, bar)],
                verbose=0,
            ),
        ).fit()


def explorer(
    knobs: tuple[Knob, ...], defaults: Mapping[str, Value], seed: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns the knobs of a configuration that a trial takes over."""
    rng = np.random.default_rng(seed)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        mine = config["trial"]
        now = {**defaults, **mine["knobs"]}
        turned = {knob.name: knob.moved(now[knob.name], rng) for knob in knobs}
        return {**config, "trial": {**mine, "knobs": turned}}

    return explore


def run_phases(spec: TrialSpec, config: Mapping[str, Any]) -> None:
    """The trainable: train phase after phase, telling Ray Tune the accuracy at the end of each."""
    from ray import tune

    from sbir_ray.train.launch import train

    number = int(Path(tune.get_context().get_trial_dir()).name)
    folder = trial_folder(place(spec.out), number)
    knobs = config["trial"]["knobs"]
    with telling(folder):
        taken = tune.get_checkpoint()
        if taken is not None:
            with taken.as_directory() as local:
                phases = _read(Path(local) / PHASES)
        else:
            phases = _read(folder / PHASES) if (folder / PHASES).exists() else []
            if phases:
                # Of an earlier process: the others have to know how it did.
                _tell(spec, folder, phases, [])
        start = phases[-1]["end"] if phases else 0
        while start < spec.steps:
            end = min(start + spec.evaluate_every, spec.steps)
            inputs = dict(spec.inputs)
            changes = []
            if phases:
                inputs["begin"] = phases[-1]["run"]
                came_from = phases[-1]["number"]
                if came_from != number or phases[-1]["knobs"] != knobs:
                    changes = [{"step": start, "knobs": knobs, "came_from": came_from}]
            turned = with_knobs(spec.config, {**knobs, "optim.steps": end})
            # Others may go on from this run, so it is never written over.
            name = digest({"knobs": knobs, "begin": inputs.get("begin", "")})
            run = str(folder / f"to-step-{end}-{name}")
            job = job_of(
                replace(turned, save=replace(turned.save, checkpoint_every=end)), run, inputs
            )
            (result,) = train([job], workers=spec.workers, gpu=spec.gpu, cpus_per_worker=spec.cpus)
            if not result:
                raise UserError(f"{job.inputs['pairs']}: no sketches in val to choose by")
            evaluation = last_evaluation(place(run))
            phases.append(
                {"end": end, "knobs": knobs, "number": number, "run": run, "result": evaluation}
            )
            if end == spec.steps:
                measure(job, folder, spec.gpu)
            write_json_atomic(folder / PHASES, {"phases": phases})
            _tell(spec, folder, phases, changes)
            start = end


def _tell(
    spec: TrialSpec, folder: Path, phases: list[dict[str, Any]], changes: list[dict[str, Any]]
) -> None:
    """Report the last phase, with what another trial needs to go on from there."""
    from ray import tune

    evaluation = phases[-1]["result"]
    with tempfile.TemporaryDirectory() as local:
        write_json_atomic(Path(local) / PHASES, {"phases": phases})
        tune.report(
            {
                **evaluation,
                SCORE: evaluation[spec.metric],
                CHANGES: changes,
                "done": evaluation["step"] >= spec.steps,
            },
            checkpoint=tune.Checkpoint.from_directory(local),
        )


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        phases: list[dict[str, Any]] = json.loads(file.read_text())["phases"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedError(
            f"{file}: cannot be read ({error}); remove its folder to try the trial again"
        ) from error
    return phases


def schedule_of(folder: Path) -> list[Phase]:
    """The phases of a trial's network, those with the same knobs as one.

    Raises:
        DamagedError: the file cannot be read.
    """
    found: list[Phase] = []
    for phase in _read(folder / PHASES):
        if found and found[-1].knobs == phase["knobs"]:
            found.pop()
        found.append(Phase(phase["end"], phase["knobs"]))
    return found
