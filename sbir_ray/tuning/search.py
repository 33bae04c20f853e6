"""Which trials come next, and which are stopped early: Ray Tune with Optuna and ASHA.

What a sweep goes on from are the trials' own files and nothing else: the searcher and the scheduler
are told all of it again at each start.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

from sbir_ray.errors import UserError
from sbir_ray.places import arrow_file_system
from sbir_ray.runlog import Progress
from sbir_ray.train.groups import give_back_of_the_dead
from sbir_ray.tuning import request
from sbir_ray.tuning.records import DEFAULT, FAILURE, FOR_NOW, METRICS, SPEED, Trial, Trials
from sbir_ray.tuning.space import Knob, Space, Value
from sbir_ray.tuning.trial import CHANGES, REFUSED, SCORE, TrialSpec, run_trial

TRIAL_CPUS = 0.1
"""Of the process that launches a trial's training, beside the training's own. None at all is
refused by Ray, and a whole one could keep the workers of all trials waiting for ever."""
_STARTUP = 5
"""Trials at random before TPE has enough to go by."""
_GIVE_BACK = 5.0
"""Seconds between two looks for what dead trials hold, which the next may be waiting for."""
_TOLD = ("stopped", "failed", "refused")
"""Fates that the progress line counts."""
_REDUCTION = 2
"""One of so many trials goes on at each rung."""
_FIRST_RUNG = 2
"""Evaluations before the first: in one cycle the rate has its peak at 30% of the steps, and until
it falls the accuracy says little."""


def sweep(
    spec: TrialSpec,
    space: Space,
    trials: Trials,
    *,
    count: int,
    seed: int,
    searcher: request.Searcher,
    early_stop: bool,
    retries: int,
    parallel: int,
    defaults: Mapping[str, Value],
    storage: Path,
    progress: Callable[[str], Progress],
) -> None:
    """Do what is left of ``count`` trials. Needs a Ray that is up.

    Args:
        early_stop: stop a trial that is worse than half of the others at the same step (ASHA).
        retries: times that a trial which failed is tried again.
        parallel: trials at a time.
        defaults: the knobs' values in trial 0, which turns none.
        storage: folder for Ray's own files; of no use afterwards.
    """
    left = [n for n in range(count) if n not in trials or is_left(trials[n], retries)]
    if not left:
        return
    system, kept = arrow_file_system(storage)
    with progress("tune") as bar, quiet():
        search = Search(space, trials, left, defaults, seed, searcher)
        scheduler = Halving(spec, trials) if early_stop else None
        tuner = tune.Tuner(
            # No partial: Ray Tune asks for the trainable's name.
            tune.with_resources(_named(spec), {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=len(left),
                max_concurrent_trials=parallel,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=kept,
                storage_filesystem=system,
                failure_config=tune.FailureConfig(max_failures=retries),
                callbacks=[Recorder(spec.steps, trials, count, bar)],
                verbose=0,
            ),
        )
        tuner.fit()


def is_left(trial: Trial, retries: int) -> bool:
    """Whether there is something to do for it."""
    lasting = [why for why in trial.failures if not why.startswith(FOR_NOW)]
    failed = trial.status == "failed" and len(lasting) <= retries
    return trial.status == "open" or failed


def _named(spec: TrialSpec) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        run_trial(spec, config)

    return trial


# --------------------------------------------------------------------------- which come next


class Search(Searcher):  # type: ignore[misc]
    """Gives the default first, then the trials that were not at their end, then new ones.

    Args:
        left: numbers of the trials to give.
        defaults: the knobs' values where none is turned.
    """

    def __init__(
        self,
        space: Space,
        trials: Trials,
        left: list[int],
        defaults: Mapping[str, Value],
        seed: int,
        searcher: request.Searcher,
    ) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.trials, self.left = trials, left
        self.numbers: dict[str, int] = {}
        """By Ray Tune's name of a trial."""
        self.draw: Draws = Random(space.knobs, seed)
        if searcher == "tpe":
            self.draw = Tpe(space.knobs, seed, trials, defaults)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next configuration."""
        if not self.left:
            return str(Searcher.FINISHED)
        number = self.left.pop(0)
        if number in self.trials:
            trial = self.trials[number]
            trial.status = "open"
        else:
            knobs = {} if number == DEFAULT else self.draw.next(number)
            trial = self.trials.add(number, knobs)
        self.numbers[trial_id] = number
        return {"trial": {"number": number, "knobs": dict(trial.knobs)}}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Ray Tune keeps its own record of it; ours has it already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' files are what is kept."""


class Draws(ABC):
    """Who chooses the knobs of a new trial."""

    @abstractmethod
    def next(self, number: int) -> dict[str, Value]:
        """The knobs of the trial with this number."""


class Random(Draws):
    """At random, as a function of the seed and the number."""

    def __init__(self, knobs: tuple[Knob, ...], seed: int) -> None:
        self.knobs, self.seed = knobs, seed

    def next(self, number: int) -> dict[str, Value]:
        """See :class:`Draws`."""
        rng = np.random.default_rng([self.seed, number])
        return {knob.name: knob.draw(rng) for knob in self.knobs}


class Tpe(Draws):
    """Optuna's tree-structured Parzen estimator, asked anew each time with all that is known.

    Args:
        defaults: the values of trial 0; counted where they lie inside the ranges.

    Raises:
        UserError: Optuna is not installed.
    """

    def __init__(
        self,
        knobs: tuple[Knob, ...],
        seed: int,
        trials: Trials,
        defaults: Mapping[str, Value],
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "--searcher tpe: needs Optuna; pip install 'sbir_ray[tune]', or choose "
                "--searcher random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.knobs, self.seed = knobs, seed
        self.trials, self.defaults = trials, dict(defaults)
        self.ranges = {knob.name: _distribution(knob) for knob in knobs}

    def next(self, number: int) -> dict[str, Value]:
        """See :class:`Draws`."""
        import optuna

        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=int(np.random.default_rng([self.seed, number]).integers(2**31)),
                n_startup_trials=_STARTUP,
            ),
        )
        for trial in self.trials:
            known = self._known(trial)
            if known is not None:
                study.add_trial(known)
        return dict(study.ask(self.ranges).params)

    def _known(self, trial: Trial) -> Any:
        """A trial as Optuna has it, or None. One that was stopped counts by where it was stopped;
        one that is still going on as well, so that the next is not put beside it."""
        from optuna.trial import TrialState, create_trial

        knobs = {**self.defaults, **trial.knobs}
        inside = all(knob.holds(knobs[knob.name]) for knob in self.knobs)
        measured = {int(one["step"]): one[self.trials.metric] for one in trial.evaluations}
        values = {step: value for step, value in measured.items() if math.isfinite(value)}
        if not inside or not values or trial.status in ("failed", "refused"):
            return None
        done = trial.status == "done"
        return create_trial(
            params=knobs,
            distributions=self.ranges,
            state=TrialState.COMPLETE if done else TrialState.PRUNED,
            value=values[max(values)],
            intermediate_values=values,
        )


def _distribution(knob: Knob) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if knob.choices:
        return CategoricalDistribution(knob.choices)
    log = knob.scale == "log"
    if knob.whole:
        return IntDistribution(int(knob.low), int(knob.high), log=log)
    return FloatDistribution(knob.low, knob.high, log=log)


# --------------------------------------------------------------------------- which are stopped


class Halving(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that has seen the trials of earlier processes, and never stops the default: what all
    others are compared with has to be known to its end."""

    def __init__(self, spec: TrialSpec, trials: Trials) -> None:
        super().__init__(
            time_attr="step",
            metric=SCORE,
            mode="max",
            max_t=spec.steps,
            grace_period=min(_FIRST_RUNG * spec.evaluate_every, spec.steps),
            reduction_factor=_REDUCTION,
            # The last result comes when nothing is left to stop.
            stop_last_trials=False,
        )
        for trial in trials:
            if trial.status in ("done", "stopped"):
                before = SimpleNamespace(trial_id=f"before-{trial.number}")
                super().on_trial_add(None, before)
                for one in trial.evaluations:
                    super().on_trial_result(None, before, {**one, SCORE: one[trials.metric]})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether it goes on."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if trial.config["trial"]["number"] == DEFAULT or result["step"] >= self._max_t:
            return str(TrialScheduler.CONTINUE)
        return decision


# --------------------------------------------------------------------------- what is kept


class Recorder(tune.Callback):  # type: ignore[misc]
    """Writes what Ray Tune hears of the trials into their files, and shows how far they are."""

    def __init__(self, steps: int, trials: Trials, count: int, bar: Progress) -> None:
        self.steps, self.trials, self.count, self.bar = steps, trials, count, bar
        self.numbers: dict[str, int] = {}
        self.looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Ray Tune keeps a copy to go on from, which is never asked for, and a terminal
        cannot always be copied."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Learn its number."""
        self._of(trial)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        """Keep an evaluation."""
        found = self._of(trial)
        if REFUSED not in result and result["step"] > found.last_step:
            found.changes += result.get(CHANGES, [])
            found.evaluations.append({name: result[name] for name in ("step", *METRICS, SPEED)})
            self.trials.keep(found.number)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It came to its end, was stopped, or cannot be trained."""
        found = self._of(trial)
        refused = (trial.last_result or {}).get(REFUSED)
        if refused:
            found.failures.append(refused)
            found.status = "refused"
            self._say(found, refused)
        else:
            found.status = "done" if found.last_step >= self.steps else "stopped"
        self.trials.keep(found.number)

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It failed and is tried again."""
        self._failed(trial, "open")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It failed for good."""
        self._failed(trial, "failed")

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Say how far all are."""
        if time.monotonic() > self.looked + _GIVE_BACK:
            give_back_of_the_dead()
            self.looked = time.monotonic()
        ended = [trial for trial in self.trials if trial.status != "open"]
        steps = sum(self.steps if t.status != "open" else t.last_step for t in self.trials)
        by = {status: sum(t.status == status for t in ended) for status in _TOLD}
        note = f"{len(ended)} of {self.count} trials"
        note += "".join(f", {number} {status}" for status, number in by.items() if number)
        values = [
            value for t in self.trials.done() if (value := t.at(self.steps, self.trials.metric))
        ]
        note += f", best {self.trials.metric} {max(values):.1%}" if values else ""
        self.bar.update(steps, self.count * self.steps, note)

    def _failed(self, trial: Any, status: Literal["open", "failed"]) -> None:
        found = self._of(trial)
        file = self.trials.place(found.number) / FAILURE
        told = file.read_text().splitlines() if file.exists() else []
        reason = told[0] if told else "its process ended"
        found.failures.append(reason)
        found.status = status
        self._say(found, reason)
        self.trials.keep(found.number)

    def _say(self, found: Trial, reason: str) -> None:
        self.bar.say(f"trial {found.number}: {reason}")

    def _of(self, trial: Any) -> Trial:
        # A trial of a population may get another's configuration, and keeps its own number.
        mine = self.numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])
        return self.trials[mine]


@contextmanager
def quiet() -> Iterator[None]:
    """Ray Tune without its own tables and loggers; an interrupt ends the sweep at once, and an end
    without a score is no error of the sweep."""
    settings = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A process that is used again would hold the threads of the trial before.
            warnings.filterwarnings("ignore", "Consider boosting PBT performance", UserWarning)
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
