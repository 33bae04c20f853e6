"""What is known of each trial of a sweep, one JSON file a trial: all that a sweep goes on from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sbir_ray.errors import DamagedError, SbirError
from sbir_ray.runlog import write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION
from sbir_ray.study.intervals import Found
from sbir_ray.tuning.space import Knobs, Value

Status = Literal["open", "done", "stopped", "failed", "refused"]
DEFAULT = 0
"""Number of the trial that turns no knob."""
METRICS = ("acc@1", "acc@5", "acc@10", "mAP")
"""What may be searched for, in [0, 1], larger is better."""
SPEED = "steps_per_second"


@dataclass(slots=True)
class Trial:
    """One configuration, and how its training went."""

    number: int
    knobs: dict[str, Value]
    """What differs from the sweep's configuration."""
    status: Status = "open"
    """``open``: not at its end yet; ``done``: trained to its last step; ``stopped``: early, since
    others were better at the same step; ``failed``, or ``refused`` where no other try could mend
    it: see ``failures``."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """On the validation split: ``step``, the metrics, and ``steps_per_second`` until then."""
    failures: list[str] = field(default_factory=list)
    """Why it failed, each time."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Where knobs changed while it trained: ``step`` from which on, ``knobs``, and ``came_from``,
    the number of the trial whose network it went on with."""

    def at(self, step: int, metric: str) -> float | None:
        """The metric at a step, if it was measured there and is a number."""
        for one in self.evaluations:
            if one["step"] == step:
                return one[metric] if math.isfinite(one[metric]) else None
        return None

    @property
    def last_knobs(self) -> Knobs:
        """Those that its network had at its end; in a population they change."""
        return self.changes[-1]["knobs"] if self.changes else self.knobs

    @property
    def untouched(self) -> bool:
        """Whether it is the default, to its end; in a population it may take up others' knobs."""
        return self.number == DEFAULT and not self.changes

    @property
    def last_step(self) -> int:
        """The newest step that was measured; 0 before the first."""
        return int(self.evaluations[-1]["step"]) if self.evaluations else 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "number": self.number,
            "knobs": dict(self.knobs),
            "status": self.status,
            "evaluations": self.evaluations,
            "failures": self.failures,
            "changes": self.changes,
        }


class Trials:
    """The trials of a sweep, in memory and as files.

    Args:
        folder: one folder for each trial, ``000`` and so on.
        metric: the one of :data:`METRICS` that is searched for.

    Raises:
        DamagedError: a trial's file cannot be read.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self.folder, self.metric = folder, metric
        self.found: dict[int, Trial] = {}
        for file in sorted(folder.glob("[0-9]*/trial.json")):
            try:
                values = json.loads(file.read_text())
                trial = Trial(**{name: values[name] for name in Trial.__slots__})
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(
                    f"{file}: cannot be read ({error}); remove its folder to try the trial again"
                ) from error
            self.found[trial.number] = trial

    def __iter__(self) -> Iterator[Trial]:
        return iter(sorted(self.found.values(), key=lambda trial: trial.number))

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, number: int) -> Trial:
        return self.found[number]

    def __contains__(self, number: object) -> bool:
        return number in self.found

    def add(self, number: int, knobs: Knobs) -> Trial:
        """A new trial."""
        assert number not in self.found, number
        self.found[number] = Trial(number, dict(knobs))
        self.keep(number)
        return self.found[number]

    def keep(self, number: int) -> None:
        """Write the trial's file."""
        folder = self.place(number)
        folder.mkdir(parents=True, exist_ok=True)
        head = {"schema_version": SCHEMA_VERSION, "kind": "trial"}
        write_json_atomic(folder / "trial.json", {**head, **self.found[number].to_json()})

    def place(self, number: int) -> Path:
        """The trial's folder."""
        return trial_folder(self.folder, number)

    def done(self) -> list[Trial]:
        """Those that were trained to their last step."""
        return [trial for trial in self if trial.status == "done"]

    def measured(self, number: int) -> Found:
        """How each validation query did at a trial's last step.

        Raises:
            DamagedError: the trial's file is missing or damaged.
        """
        file = self.place(number) / FOUND
        try:
            return Found.from_json(json.loads(file.read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise DamagedError(
                f"{file}: cannot be read ({error}); remove its folder to try the trial again"
            ) from error


FOUND = "found.json"
FAILURE = "failure.txt"
"""Files of a trial's folder: each query's rank, and what went wrong the last time."""
FOR_NOW = "for now: "
"""How a failure begins that no change is needed to mend: however often, the next command tries."""


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's files are."""
    return folder / f"{number:03d}"


def best(trials: Sequence[Trial], metric: str) -> Trial | None:
    """The one of the finished trials with the largest metric at its end; of equal ones that with
    the larger mean average precision, then the earlier one. What is not a number never wins.
    """
    finite = [
        trial
        for trial in trials
        if trial.status == "done"
        and trial.evaluations
        and all(math.isfinite(trial.evaluations[-1][name]) for name in (metric, "mAP"))
    ]
    if not finite:
        return None
    return max(
        finite,
        key=lambda trial: (
            trial.evaluations[-1][metric],
            trial.evaluations[-1]["mAP"],
            -trial.number,
        ),
    )


def checked(evaluation: Mapping[str, Any], where: str) -> dict[str, float]:
    """``step``, the metrics and the speed of a line of ``metrics.jsonl``.

    Raises:
        SbirError: a metric is missing or not a finite number, so that it can never be the best.
    """
    found: dict[str, float] = {"step": int(evaluation["step"])}
    for name in METRICS:
        value = evaluation.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise SbirError(f"{where}: {name} at step {evaluation['step']} is {value}, no number")
        found[name] = float(value)
    return {**found, SPEED: float(evaluation[SPEED])}
