"""The pieces of a study: a training, drawings of a pool, a search, drawings judged.

Each has a name, says by what lies on the disk whether it is done, and can do itself. Of others it
knows the names.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbir_ray.config import GeneratorTraining, SketchConfig
from sbir_ray.data.pairs import Split
from sbir_ray.errors import DamagedError
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import place
from sbir_ray.runlog import Progress, versions, write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION
from sbir_ray.study.intervals import Found
from sbir_ray.study.people import PEOPLE, people_drew
from sbir_ray.train.job import Job

TRACERS = ("contours", "edges")
"""Sketchers that are not trained."""
SEARCH_COST = 10
"""Of a search or of drawings. All costs are in steps of F on labelled pairs alone, as measured on
two cores: for the time left, roughly."""
_JOINT_COST, _PSEUDO_COST = 5, 3
"""Of a step of joint training; of F's on pseudo pairs as well, with a teacher."""


@dataclass(frozen=True, slots=True)
class Train:
    """Runs that are trained one after another; the first is the one that others need."""

    name: str
    jobs: tuple[Job, ...]
    needs: tuple[str, ...] = ()

    @property
    def run(self) -> str:
        """The first run's folder."""
        return self.jobs[0].out

    @property
    def done(self) -> bool:
        """Whether all have come to their end."""
        return all(_record(place(job.out)).get("status") == "done" for job in self.jobs)

    @property
    def cost(self) -> int:
        """Of all its steps."""
        return sum(_weight(job) * _steps(job) for job in self.jobs)

    @property
    def spent(self) -> int:
        """Cost of the steps that have been logged."""
        return sum(_weight(job) * _last_step(place(job.out)) for job in self.jobs)

    def perform(self, gpu: bool) -> None:
        """Train what is left, in this process."""
        from sbir_ray.train.launch import train

        train(self.jobs, workers=0, gpu=gpu)


@dataclass(frozen=True, slots=True)
class Draw:
    """Pseudo pairs of a pool, drawn by actors: the driver's work."""

    name: str
    photos: str
    """PHOTOS folder."""
    out: str
    """PSEUDO folder."""
    sketcher: str
    """One of :data:`TRACERS`, ``people``, or a generator's RUN."""
    config: SketchConfig
    teacher: str
    """RUN of F that ranks the drawings, or ""."""
    needs: tuple[str, ...] = ()
    pairs: str = ""
    """PAIRS folder with people's sketches of the photos."""
    cost = SEARCH_COST
    spent = 0

    @property
    def done(self) -> bool:
        """Whether the folder has a header: it is written when the folder is whole."""
        return (place(self.out) / "pseudo.json").exists()

    def perform(self, gpu: bool) -> None:
        """Draw what is left. Needs a Ray that is up."""
        from sbir_ray.stream.sketching import sketch

        photos, out = place(self.photos), place(self.out)
        if self.sketcher == PEOPLE:
            people_drew(photos, place(self.pairs), out, self.config)
            return
        sketch(
            photos,
            out,
            self.sketcher,
            self.config,
            teacher=place(self.teacher) if self.teacher else None,
            gpus_per_actor=float(gpu and self.sketcher not in TRACERS),
            # The study has a line of its own.
            progress=lambda title: Progress(title, file=io.StringIO()),
        )


@dataclass(frozen=True, slots=True)
class Measure:
    """A measurement on a split, written as a file."""

    name: str
    run: str
    """RUN of the F that searches: the one that is measured, or the judge of drawings."""
    pairs: str
    """PAIRS folder."""
    split: Split
    gallery: str
    """PHOTOS folder whose photos are searched as well, or ""."""
    out: str
    """JSON file."""
    sketcher: str = ""
    """Whose drawings of the photos are judged: one of :data:`TRACERS`, ``people``, or the RUN of a
    generator or joint training; "": the split's sketches are searched with, to measure F."""
    temperature: float = 0.0
    seed: int = 0
    """Of the drawings."""
    needs: tuple[str, ...] = ()
    cost = SEARCH_COST
    spent = 0

    @property
    def done(self) -> bool:
        """Whether the file is there."""
        return place(self.out).exists()

    def found(self) -> Found:
        """What the file says.

        Raises:
            DamagedError: it cannot be read.
        """
        try:
            return Found.from_json(json.loads(place(self.out).read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise DamagedError(f"{self.out}: cannot be read ({error}); remove it") from error

    def perform(self, gpu: bool) -> None:
        """Search, and write the rank of every query's photo."""
        from sbir_ray.assess import evaluate_run
        from sbir_ray.stream.sketchers import SketcherSpec
        from sbir_ray.study.judging import judged

        run, pairs = place(self.run), place(self.pairs)
        gallery = place(self.gallery) if self.gallery else None
        if self.sketcher:
            device = "cuda" if gpu else "cpu"
            spec = SketcherSpec(self.sketcher, self.temperature, device)
            found = judged(spec, self.seed, run, pairs, self.split, gallery)
        else:
            evaluation = evaluate_run(run, pairs, self.split, gallery=gallery, gpu=gpu)
            photos = [query["photo"] for query in evaluation.per_query]
            found = Found(photos, evaluation.ranks.tolist(), evaluation.metrics.gallery)
        out = place(self.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        head = {"schema_version": SCHEMA_VERSION, "kind": "ranks", "versions": versions()}
        write_json_atomic(out, {**head, **found.to_json()})


Work = Train | Draw | Measure


def _record(run: Path) -> dict[str, Any]:
    """``run.json``, or {} where the run has not begun."""
    from sbir_ray.runs import read_run

    return read_run(run) if (run / "run.json").exists() else {}


def _weight(job: Job) -> int:
    if job.kind == "joint":
        return _JOINT_COST
    return _PSEUDO_COST if "pseudo" in job.inputs else 1


def _steps(job: Job) -> int:
    config = job.config
    if isinstance(config, JointTraining):
        return config.schedule.steps
    if isinstance(config, GeneratorTraining) and job.kind == "discriminator":
        return config.discriminator.steps
    return config.optim.steps


def _last_step(run: Path) -> int:
    """The newest step in the run's log; 0 if there is none yet."""
    try:
        with (run / "metrics.jsonl").open("rb") as stream:
            stream.seek(0, io.SEEK_END)
            stream.seek(max(0, stream.tell() - 4096))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (
            ValueError,
            KeyError,
        ):  # the first of these is cut off, the last may be half written
            continue
    return 0
