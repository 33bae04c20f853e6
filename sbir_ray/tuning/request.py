"""What is to be searched, and how much is done for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sbir_ray.config import ChoiceConfig, RetrievalTraining
from sbir_ray.data.pairs import read_header
from sbir_ray.data.photos import read_store
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.strict import to_dict
from sbir_ray.study.run import marked, marked_pairs, weighed
from sbir_ray.tuning.space import Space, with_knobs

Training = RetrievalTraining | JointTraining
Searcher = Literal["tpe", "random"]
Scheduler = Literal["asha", "pbt", "none"]
SETTINGS = "base.toml"
"""File of the configuration that the knobs are turned from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be searched."""

    space: Space
    file: Path
    """Where the space was read from."""
    pairs: Path
    """PAIRS folder; its validation split is what is measured on."""
    photos: Path | None = None
    """PHOTOS folder: drawn once for the pseudo pairs, or while joint training goes on."""
    pseudo: Path | None = None
    """PSEUDO folder, if there is one already."""
    teacher: Path | None = None
    generator: Path | None = None
    """RUN folders, if there are such already."""
    config: Training
    """What the knobs are turned from; its seed is the sweep's."""
    metric: str = "acc@1"
    searcher: Searcher = "tpe"
    scheduler: Scheduler = "asha"

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a trial, as plain values; not how many trials or seeds."""
        return {
            "space": self.space.to_json(),
            "pairs": marked_pairs(self.pairs),
            "photos": None if self.photos is None else marked(self.photos, "store.json"),
            "pseudo": None if self.pseudo is None else marked(self.pseudo, "pseudo.json"),
            "teacher": None if self.teacher is None else weighed(self.teacher),
            "generator": None if self.generator is None else weighed(self.generator),
            "metric": self.metric,
            "searcher": self.searcher,
            "scheduler": self.scheduler,
            "config": to_dict(self.config),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is done, and on what."""

    trials: int = 16
    """The default's among them."""
    retries: int = 1
    """Times that a trial which failed is tried again."""
    seeds: int = 3
    """Others than the sweep's, for the best and the default."""
    parallel: int | None = None
    """Trials at a time; None: as many as there is room for."""
    workers: int = 1
    """Ray Train workers of each trial."""
    cpus: float = 1.0
    """Of each worker."""
    gpu: bool = False
    address: str | None = None


def check(request: Request) -> None:
    """Refuse what would fail late.

    Raises:
        UserError: what to change.
    """
    header = read_header(request.pairs)["splits"]
    if not header["val"]["sketches"]:
        raise UserError(
            f"{request.pairs}: no sketches in val to choose by; import it with --val-every 5 or "
            "--val-fraction (the test split is never searched)"
        )
    joint = request.space.trains == "joint"
    if request.photos is None and (joint or request.pseudo is None):
        raise UserError(
            f"{request.space.name}: give --photos PHOTOS"
            + ("" if joint else ", or --pseudo PSEUDO if they are drawn already")
        )
    if joint and request.pseudo is not None:
        raise UserError("--pseudo: joint training draws for itself; leave it out")
    if not joint and request.pseudo is not None and request.photos is not None:
        raise UserError("--photos and --pseudo: the photos are drawn already; leave one out")
    if not joint and request.pseudo is not None and request.generator is not None:
        raise UserError("--generator: the pseudo pairs are drawn already; leave it out")
    if request.photos is not None and next(read_store(request.photos), None) is None:
        raise UserError(f"{request.photos}: holds no photo; see its ledger")
    if request.scheduler == "pbt":
        request.space.ensure_scheduled()
        optim = request.config.optim if isinstance(request.config, RetrievalTraining) else None
        if optim is None or optim.schedule != "constant":
            raise UserError(
                "--scheduler pbt: the schedule of the rate is what it finds; add "
                "--set optim.schedule=constant"
            )
    for knob in request.space.knobs:
        ends = knob.choices or (knob.low, knob.high)
        for end in ends:
            value = round(end) if knob.whole and isinstance(end, float) else end
            config = with_knobs(request.config, {knob.name: value})
            if knob.name.startswith("filters.") and request.pseudo is not None:
                _check_threshold(request, config, request.pseudo)


def _check_threshold(request: Request, config: Training, pseudo: Path) -> None:
    """Refuse a threshold on what nobody has judged in these drawings: all trials would be alike."""
    from sbir_ray.stream.pseudo_store import read_header, refuse_choice

    try:
        refuse_choice(ChoiceConfig(filters=config.filters), read_header(pseudo), pseudo)
    except UserError as error:
        raise UserError(
            f"{request.space.name}: {error}; or take the knob out of the space"
        ) from error


def command(request: Request, effort: Effort, out: Path) -> str:
    """The command line that asks for it."""
    words = ["sbir-ray", "tune", str(request.file), "--pairs", str(request.pairs)]
    for name in ("photos", "pseudo", "teacher", "generator"):
        value = getattr(request, name)
        words += [] if value is None else [f"--{name}", str(value)]
    words += ["--trials", str(effort.trials), "--scheduler", request.scheduler]
    words += ["--searcher", request.searcher, "--metric", request.metric]
    words += ["--seeds", str(effort.seeds), "--retries", str(effort.retries)]
    return shlex.join([*words, "--config", str(out / SETTINGS), "--out", str(out)])
