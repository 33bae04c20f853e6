"""One trial: a training by Ray Train that a Ray Tune process launches and follows."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sbir_ray.config import RetrievalTraining
from sbir_ray.errors import SbirError, UnavailableError, UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import place
from sbir_ray.study.work import Measure
from sbir_ray.train.job import Job
from sbir_ray.train.tasks import joint_jobs
from sbir_ray.tuning.records import FAILURE, FOR_NOW, FOUND, checked, trial_folder
from sbir_ray.tuning.space import Knobs, with_knobs

SCORE = "score"
"""What Ray Tune compares."""
CHANGES = "changes"
"""Key of the knobs that have been turned before a result, where they are turned at all."""
REFUSED = "refused"
"""Key of the reason why a configuration cannot be trained, whoever tries."""
_POLL = 0.5
"""Seconds between looks at the log of the training."""


@dataclass(frozen=True)
class Phase:
    """A part of a training during which no knob is turned."""

    end: int
    """The step it goes to."""
    knobs: Knobs


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """What all trials of a sweep have in common; plain values, so that it travels."""

    out: str
    """Folder of the trials."""
    config: RetrievalTraining | JointTraining
    inputs: Mapping[str, str]
    """Of the job: what all trials share."""
    metric: str
    evaluate_every: int
    """Steps between two looks of the scheduler."""
    workers: int = 1
    cpus: float = 1.0
    """Of each worker."""
    gpu: bool = False

    @property
    def steps(self) -> int:
        """Of each training."""
        return steps_of(self.config)

    def jobs(self, out: Path, phases: Sequence[Phase], seed: int | None = None) -> list[Job]:
        """A training that turns its knobs phase by phase: the last job's run is its end.

        Raises:
            UserError: settings that contradict each other.
        """
        config = self.config if seed is None else replace(self.config, seed=seed)
        if len(phases) == 1:
            return [job_of(with_knobs(config, phases[0].knobs), str(out), self.inputs)]
        jobs: list[Job] = []
        inputs = dict(self.inputs)
        for phase in phases:
            turned = with_knobs(config, {**phase.knobs, "optim.steps": phase.end})
            jobs.append(job_of(turned, str(out / f"to-step-{phase.end}"), dict(inputs)))
            inputs["begin"] = jobs[-1].out
        return jobs


def steps_of(config: RetrievalTraining | JointTraining) -> int:
    """How long a training is."""
    return config.schedule.steps if isinstance(config, JointTraining) else config.optim.steps


def job_of(config: RetrievalTraining | JointTraining, out: str, inputs: Mapping[str, str]) -> Job:
    """``train semi`` or ``train joint`` as a job; raises as :func:`joint_jobs`."""
    if isinstance(config, JointTraining):
        *before, job = joint_jobs(out, config, inputs)
        assert not before, "a sweep trains the teacher and the generator once, for all trials"
        return job
    return Job("retrieval", out, config, inputs)


def run_trial(spec: TrialSpec, config: Mapping[str, Any]) -> None:
    """The trainable: train, tell Ray Tune each validation accuracy, measure the end.

    Args:
        config: ``trial`` with its ``number`` and ``knobs``.

    Raises:
        SbirError: the training failed. The reason is in the trial's folder too.
    """
    from ray import tune

    number, knobs = config["trial"]["number"], config["trial"]["knobs"]
    folder = trial_folder(place(spec.out), number)
    with telling(folder):
        (job,) = spec.jobs(folder / "run", [Phase(spec.steps, knobs)])
        save = replace(
            job.config.save,
            evaluate_every=spec.evaluate_every,
            checkpoint_every=spec.evaluate_every,
        )
        job = replace(job, config=replace(job.config, save=save))
        for evaluation in _trained(spec, job):
            tune.report({**evaluation, SCORE: evaluation[spec.metric]})


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """What goes wrong in the block is told in the trial's folder, which is made; what another try
    would not mend is told to Ray Tune as a result."""
    from ray import tune

    folder.mkdir(parents=True, exist_ok=True)
    failure = folder / FAILURE
    failure.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, UnavailableError):
            tune.report({"step": 0, REFUSED: str(error)})
            return
        reason = str(error) if isinstance(error, SbirError) else f"{type(error).__name__}: {error}"
        reason = FOR_NOW * isinstance(error, UnavailableError) + reason
        trace = "" if isinstance(error, SbirError) else traceback.format_exc()
        failure.write_text(" ".join(reason.split())[:300] + "\n" + trace)
        raise


def _trained(spec: TrialSpec, job: Job) -> Iterator[dict[str, float]]:
    """The evaluations while the job is trained; the last when its queries have been measured too,
    since Ray Tune may end this process right after it."""
    from sbir_ray.train.launch import train

    run = place(job.out)
    told = 0
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            train, [job], workers=spec.workers, gpu=spec.gpu, cpus_per_worker=spec.cpus
        )
        while True:
            wait([training], timeout=_POLL)
            ended = training.done()
            for line in evaluations(run / "metrics.jsonl"):
                if told < line["step"] < spec.steps:
                    told = line["step"]
                    yield checked(line, str(run))
            if ended:
                break
        (result,) = training.result()
    if not result:
        raise UserError(f"{job.inputs['pairs']}: no sketches in val to choose by")
    last = last_evaluation(run)
    measure(job, run.parent, spec.gpu)
    yield last


def measure(job: Job, folder: Path, gpu: bool) -> None:
    """Write how each validation query does at the end of a training into the trial's folder."""
    out = str(folder / FOUND)
    Measure("found", job.out, job.inputs["pairs"], "val", "", out).perform(gpu)


def last_evaluation(run: Path) -> dict[str, float]:
    """That of a training at its end; raises as :func:`checked`."""
    return checked(evaluations(run / "metrics.jsonl")[-1], str(run))


def evaluations(log: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl`` that tell of an evaluation; one that is being written
    is left out."""
    try:
        text = log.read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line.get("kind") == "evaluation"]
