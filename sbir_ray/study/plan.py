"""What has to be trained for the rows of a study: each training once, whoever needs it.

A row is a variant of the joint training that everything else is kept from: data, networks, losses,
augmentation, optimiser, batch, and the number of F's updates.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from sbir_ray.config import FilterConfig, OptimConfig, RetrievalTraining, SketchConfig
from sbir_ray.data.pairs import Split
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining, ScheduleConfig
from sbir_ray.strict import digest, to_dict
from sbir_ray.study.data import Cell
from sbir_ray.study.people import PEOPLE
from sbir_ray.study.work import Draw, Measure, Train, Work
from sbir_ray.train.job import Config, Job, pseudo_inputs
from sbir_ray.train.tasks import generator_jobs

Drawer = Literal["contours", "edges", "generator", "people"]
"""Who draws the photos without sketches, once for all of F's training; ``people``: their hidden
sketches, as the ceiling."""
JUDGE_SEED = 1000
"""Of the judge, above the study's first: no network under test is made from it."""
_ANY = FilterConfig(min_points=0, min_strokes=0, max_points=sys.maxsize, max_strokes=sys.maxsize)
"""Labelled pairs are not filtered either."""


W = TypeVar("W", bound=Work)


def _same(config: JointTraining) -> JointTraining:
    return config


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train F."""

    name: str
    title: str
    joint: bool = False
    """Joint training; else F alone, on labelled pairs and what else is said here."""
    drawn: tuple[Drawer, ...] = ()
    """Pseudo pairs by these; of a photo with several, one at random each time."""
    samples: int = 1
    """Drawings of each photo by the generator, of which the teacher chooses one."""
    negatives: bool = False
    """Photos as negatives: as many as pseudo pairs, beside these half as many."""
    change: Callable[[JointTraining], JointTraining] = _same
    """What is different from the study's configuration."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a study's table: the same training for each seed."""

    name: str
    title: str
    series: str
    """Name of the line it lies on, where the study has a horizontal axis."""
    x: float | None = None
    """Where it lies on that axis."""
    baseline: str = ""
    """Name of the row that it is compared with; "" for none."""
    found: dict[int, str] = field(default_factory=dict)
    """By seed the measurement of F."""
    drawn: dict[int, str] = field(default_factory=dict)
    """By seed the measurement of the drawings of held-out photos."""
    facts: dict[str, Any] = field(default_factory=dict)
    """``updates`` of F, ``labels`` and ``photos``: what went in."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Where a variant's networks are."""

    f: Train
    drawer: Train | None
    """With its generator, if it has one."""
    updates: int
    """Of F."""


class Plan:
    """The work of a study by name, in an order in which all needs come first.

    Args:
        out: folder of the study.
        base: what is varied; its seed is the first.
        split, gallery: what is measured on: the split of a cell's PAIRS folder, and a PHOTOS
            folder that is searched as well, or "".
        judge: RUN of an F that judges drawings; "": one is trained on all labels.

    Raises:
        UserError: settings that a study cannot keep.
    """

    def __init__(
        self,
        out: Path,
        base: JointTraining,
        split: Split,
        gallery: str = "",
        judge: str = "",
    ) -> None:
        if base.retrieval.negatives:
            raise UserError(
                "retrieval.negatives: in a study, photos as negatives alone are a row of their "
                "own; leave it at 0"
            )
        # Repeatable, and each training is one process.
        self.base = replace(base, stream=replace(base.stream, sync=True))
        self.out, self.split, self.gallery = out, split, gallery
        self.judge = judge
        self.work: dict[str, Work] = {}
        self._trained: dict[str, Train] = {}

    # ----------------------------------------------------------------------- trainings

    def variant(self, variant: Variant, cell: Cell) -> Trained:
        """All that ``variant`` needs for the data of ``cell``.

        Raises:
            UserError: the variant contradicts another setting, or the cell has no photos for it.
        """
        learns_more = variant.joint or variant.drawn or variant.negatives
        if learns_more and not cell.pool:
            raise UserError(
                f"{variant.name}: no photo is without a sketch at labels={cell.labels:g}; "
                "give --photos, or fewer labels"
            )
        config = self.changed(variant, cell.seed)
        if variant.joint:
            return self._joint(variant.name, config, cell)
        return self._alone(variant, config, cell)

    def changed(self, variant: Variant, seed: int) -> JointTraining:
        """The study's configuration as the variant has it.

        Raises:
            UserError: the variant contradicts another setting.
        """
        try:
            return variant.change(replace(self.base, seed=seed))
        except ValueError as error:
            raise UserError(f"{variant.name}: {error}") from error

    def _joint(self, name: str, config: JointTraining, cell: Cell) -> Trained:
        teacher, generator = self.teacher(cell), self.generator(cell, config)
        inputs = {
            "pairs": cell.pairs,
            "photos": cell.pool,
            "teacher": teacher.run,
            "generator": generator.run,
        }
        needs = (teacher.name, generator.name)
        run = self._train(f"{cell.name}/{name}", "joint", config, inputs, needs)
        return Trained(run, run, updates(config))

    def _alone(self, variant: Variant, config: JointTraining, cell: Cell) -> Trained:
        """F by itself, on cached pseudo pairs if there are any."""
        training = retrieval_alone(config)
        inputs: dict[str, str] = {"pairs": cell.pairs}
        needs: list[str] = []
        drawer = None
        if variant.negatives:
            rows = round(training.pseudo_share * training.optim.batch_size)
            training = replace(training, negatives=rows // 2 if variant.drawn else rows)
            inputs["negatives"] = cell.pool
        if "generator" in variant.drawn:
            drawer = self.generator(cell, config)
        drawn = [
            self._draw(by, drawer if by == "generator" else None, config, cell, variant.samples)
            for by in variant.drawn
        ]
        inputs |= pseudo_inputs([pseudo.out for pseudo in drawn])
        needs += [pseudo.name for pseudo in drawn]
        if variant.drawn and training.loss.distill != "none":
            teacher = self.teacher(cell)
            inputs["teacher"] = teacher.run
            needs.append(teacher.name)
        place = cell.name if variant.drawn or variant.negatives else cell.labelled
        run = self._train(f"{place}/{variant.name}", "retrieval", training, inputs, tuple(needs))
        return Trained(run, drawer, training.optim.steps)

    def teacher(self, cell: Cell) -> Train:
        """F trained on the labelled pairs alone as joint training has it, for all variants."""
        config = replace(self.base.retrieval, seed=cell.seed)
        return self._train(f"{cell.labelled}/teacher", "retrieval", config, {"pairs": cell.pairs})

    def generator(self, cell: Cell, config: JointTraining) -> Train:
        """G and D trained on the labelled pairs alone."""
        alone = replace(config.generator, seed=cell.seed)
        model, usual = alone.model, self.base.generator.model
        name = "generator"
        if model != usual:
            name += f"-{model.kind}" if model.kind != usual.kind else ""
            name += "" if model.attend else "-unattending"
        inputs, place = {"pairs": cell.pairs}, cell.labelled
        if alone.model.kind == "pen" and cell.pool:
            # It traces the unlabelled photos, so another pool is another generator.
            inputs["photos"], place = cell.pool, cell.name
        return self._train(f"{place}/{name}", "generator", alone, inputs)

    def _draw(
        self, by: Drawer, drawer: Train | None, config: JointTraining, cell: Cell, samples: int
    ) -> Draw:
        """The pool drawn once, filtered as joint training filters."""
        if by == PEOPLE:
            return self._people(cell)
        filters, temperature = config.filters, config.stream.temperature
        needs: list[str] = []
        sketcher, name = str(by), f"{cell.name}/drawn-by-{by}"
        if drawer is None:
            filters, temperature, samples = _of_tracers(filters), 0.0, 1
        else:
            sketcher, name = drawer.run, f"{cell.name}/drawn-by-{PurePosixPath(drawer.run).name}"
            name += f"-best-of-{samples}" if samples > 1 else ""
            needs.append(drawer.name)
        teacher = ""
        if filters.max_rank or samples > 1:
            ranker = self.teacher(cell)
            teacher = ranker.run
            needs.append(ranker.name)
        return self._add(
            Draw(
                name=name,
                photos=cell.pool,
                out=str(self.out / "pseudo" / name),
                sketcher=sketcher,
                config=SketchConfig(
                    seed=cell.seed, samples=samples, temperature=temperature, filters=filters
                ),
                teacher=teacher,
                needs=tuple(needs),
            )
        )

    def _people(self, cell: Cell) -> Draw:
        """The hidden sketches of the pool's photos, all of them."""
        name = f"{cell.name}/drawn-by-{PEOPLE}"
        return self._add(
            Draw(
                name=name,
                photos=cell.pool,
                out=str(self.out / "pseudo" / name),
                sketcher=PEOPLE,
                config=SketchConfig(seed=cell.seed, keep="all", temperature=0.0, filters=_ANY),
                teacher="",
                pairs=cell.whole,
            )
        )

    def _train(
        self,
        name: str,
        kind: str,
        config: Config,
        inputs: Mapping[str, str],
        needs: tuple[str, ...] = (),
    ) -> Train:
        """The training, or the one that is the same by another name."""
        key = digest({"kind": kind, "config": to_dict(config), "inputs": dict(inputs)})
        if key not in self._trained:
            run = str(self.out / "runs" / name)
            jobs = [Job(kind, run, config, inputs)]
            if not isinstance(config, (RetrievalTraining, JointTraining)):
                jobs = generator_jobs(run, config, inputs)
            self._trained[key] = self._add(Train(name, tuple(jobs), needs))
        return self._trained[key]

    # ----------------------------------------------------------------------- measurements

    def measure(self, trained: Train, cell: Cell) -> str:
        """Name of the measurement of a trained F on the split of the cell's whole PAIRS folder."""
        name = f"{trained.name}/found"
        return self._add(
            Measure(name, trained.run, **self._where(name, cell), needs=(trained.name,))
        ).name

    def judged(self, name: str, sketcher: Train | str, seed: int, cell: Cell) -> str:
        """Name of the measurement of drawings of the split's photos by the judge.

        Args:
            name: of those who draw, for what has no run.
            sketcher: the generator's or joint training, or the name of what is not trained.
            cell: whose whole PAIRS folder is measured on.
        """
        needs, judge = [], self.judge
        if not judge:
            config = replace(self.base.retrieval, seed=self.base.seed + JUDGE_SEED)
            name_of_judge = f"judge-of-fold-{cell.fold}" if cell.fold else "judge"
            trained = self._train(name_of_judge, "retrieval", config, {"pairs": cell.whole})
            judge = trained.run
            needs.append(trained.name)
        source, temperature = str(sketcher), 0.0
        if isinstance(sketcher, Train):
            source, temperature = sketcher.run, self.base.stream.temperature
            needs.append(sketcher.name)
            name = sketcher.name
        name = f"{name}/drawn"
        return self._add(
            Measure(
                name,
                judge,
                **self._where(name, cell),
                sketcher=source,
                temperature=temperature,
                seed=seed,
                needs=tuple(needs),
            )
        ).name

    def _where(self, name: str, cell: Cell) -> dict[str, Any]:
        return {
            "pairs": cell.whole,
            "split": self.split,
            "gallery": self.gallery,
            "out": str(self.out / "results" / f"{name}.json"),
        }

    def _add(self, work: W) -> W:
        assert self.work.get(work.name, work) == work, work.name
        self.work[work.name] = work
        return work


def updates(config: JointTraining) -> int:
    """How often joint training updates F; with ``warm_start`` the teacher's updates are its own."""
    schedule: ScheduleConfig = config.schedule
    cycle = schedule.retrieval_steps + schedule.generator_steps
    cycles, rest = divmod(schedule.steps, cycle)
    joint = cycles * schedule.retrieval_steps + min(rest, schedule.retrieval_steps)
    return joint + (config.retrieval.optim.steps if config.warm_start else 0)


def retrieval_alone(config: JointTraining) -> RetrievalTraining:
    """Training of F by itself that is like its part of joint training, update for update."""
    optim = OptimConfig(
        steps=updates(config),
        batch_size=config.retrieval.optim.batch_size,
        **dataclasses.asdict(config.retrieval_optim),
    )
    return replace(config.retrieval, seed=config.seed, optim=optim, save=config.save)


def _of_tracers(filters: FilterConfig) -> FilterConfig:
    """Without what only a generator's drawings have."""
    plain = FilterConfig()
    return replace(
        filters,
        min_certainty=plain.min_certainty,
        min_log_prob=plain.min_log_prob,
        require_end=plain.require_end,
    )
