"""The whole way on real drawings that a package ships, as one command with one report.

Pairs and an unlabelled pool from OpenMoji (photos whose sketches are hidden), the supervised
network and the generator from the labelled part, pseudo sketches of the pool by generator actors,
the semi-supervised network, and what it has to be compared with: contour tracing as pseudo
sketches, the pool as negatives alone, and the hidden sketches themselves (the ceiling).
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sbir_ray import report
from sbir_ray.assess import evaluate_run
from sbir_ray.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    GeneratorTraining,
    IngestConfig,
    OptimConfig,
    RetrievalConfig,
    RetrievalLossConfig,
    RetrievalTraining,
    SaveConfig,
    SketchConfig,
)
from sbir_ray.data.layouts import PACKAGE, ImportOptions, import_pairs
from sbir_ray.data.pairs import PairSet, split_labels
from sbir_ray.data.sources import SourceOptions
from sbir_ray.data.splits import SplitOptions
from sbir_ray.evaluate import Difference, Evaluation, paired_difference
from sbir_ray.run_report import pseudo_sections
from sbir_ray.runlog import Ledger, Progress, duration, versions, write_json_atomic
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.pseudo_store import HEADER, PseudoSet
from sbir_ray.stream.sketching import sketch
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import generator_jobs

NOTE = (
    "These pairs are art whose lines and colours come from one drawing, aligned to the pixel: they "
    "are much easier than free-hand sketches of photographs. The demo shows that everything works "
    "and what each part brings here; it says nothing about other data."
)
WORKERS = 2


@dataclass(frozen=True)
class Plan:
    """Sizes of a demo."""

    every: int
    """Every N-th emoji is read."""
    test_fraction: float
    labels: float
    """Share of the training photos that keep their sketches."""
    retrieval: RetrievalTraining
    generator: GeneratorTraining
    negatives: int
    seconds: dict[str, float]
    """Seconds of each stage on two cores, for the time left."""


def _retrieval(steps: int, batch: int, size: int) -> RetrievalTraining:
    return RetrievalTraining(
        model=RetrievalConfig(image_size=size, grid=4),
        loss=RetrievalLossConfig(),
        optim=OptimConfig(steps=steps, batch_size=batch),
        save=SaveConfig(log_every=5, checkpoint_every=1000),
    )


def _generator(steps: int, batch: int, size: int, critic_steps: int) -> GeneratorTraining:
    return GeneratorTraining(
        # The emojis' lines are part of their colour art: there is no other hand to learn, and the
        # paper's generator needs less time.
        model=GeneratorConfig(kind="paper", image_size=size, latent=32, max_points=80, epsilon=6.0),
        discriminator=DiscriminatorConfig(steps=critic_steps, batch_size=32),
        optim=OptimConfig(steps=steps, batch_size=batch, lr=4e-3, weight_decay=0.0, clip_norm=1.0),
        save=SaveConfig(log_every=5, checkpoint_every=1000),
    )


FULL = Plan(
    every=1,
    test_fraction=0.15,
    labels=0.15,
    retrieval=_retrieval(steps=120, batch=32, size=64),
    generator=_generator(steps=500, batch=32, size=128, critic_steps=200),
    negatives=16,
    seconds={
        "pairs": 18,
        "photos": 15,
        "supervised": 105,
        "sketches": 22,
        "semi-supervised": 135,
        "report": 18,
    },
)
QUICK = Plan(
    every=10,
    test_fraction=0.25,
    labels=0.3,
    retrieval=_retrieval(steps=8, batch=8, size=64),
    generator=_generator(steps=12, batch=8, size=64, critic_steps=4),
    negatives=4,
    seconds={
        "pairs": 3,
        "photos": 12,
        "supervised": 16,
        "sketches": 9,
        "semi-supervised": 15,
        "report": 3,
    },
)
NAMES = {
    "supervised": "supervised",
    "semi": "semi-supervised (generator)",
    "contours": "contour tracing as pseudo sketches",
    "negatives": "photos as negatives alone",
    "ceiling": "with the hidden sketches",
}


def run_demo(
    out: Path, *, quick: bool = False, seed: int = 0, address: str | None = None
) -> dict[str, Any]:
    """Run what is left of the demo in ``out`` and write ``out/report.html``.

    Returns:
        What ``--json`` prints: accuracies, differences, files; ``text`` for people.

    Raises:
        UserError: a package that the demo needs is missing, or ``out`` holds another demo.
    """
    plan = QUICK if quick else FULL
    plan = replace(
        plan,
        retrieval=replace(plan.retrieval, seed=seed),
        generator=replace(plan.generator, seed=seed),
    )
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = _Stages(out / "demo.json", plan, {"seed": seed, "quick": quick})
    with connect(address):
        with stages.run("pairs", "OpenMoji to pairs; most sketches hidden") as todo:
            if todo:
                _make_pairs(out, plan, seed)
        with stages.run("photos", "photos without sketches to a photo store") as todo:
            if todo and not (out / "photos").exists():
                ingest(
                    [out / "pairs" / "hidden"],
                    out / "photos",
                    IngestConfig(),
                    exclude=[out / "pairs" / "labelled"],
                    progress=lambda title: Progress(title, unit="photos"),
                )
        with stages.run("supervised", "retrieval network, generator, discriminator") as todo:
            if todo:
                _train(_supervised(out, plan))
        with stages.run("sketches", "generator actors and contour tracing draw the photos"):
            for name, by in (("generator", str(out / "runs" / "generator")), ("contours",) * 2):
                if not (out / f"pseudo-{name}" / HEADER).exists():
                    sketch(
                        out / "photos",
                        out / f"pseudo-{name}",
                        by,
                        SketchConfig(seed=seed),
                        progress=partial(_drawings, name),
                    )
        with stages.run(
            "semi-supervised", "retrieval network on both kinds of pairs, controls"
        ) as todo:
            if todo:
                _train(_semi(out, plan))
        with stages.run("report", "evaluation and report"):
            result = _report(out, plan, stages)
    return result


class _Stages:
    """Says where the demo is and how long the rest takes; remembers how long each stage took."""

    def __init__(self, file: Path, plan: Plan, identity: dict[str, Any]) -> None:
        self.file, self.plan = file, plan
        self.identity = {**identity, "plan": digest({"plan": repr(plan)})}
        self.seconds: dict[str, float] = {}
        if file.exists():
            found = json.loads(file.read_text())
            if found["identity"] == self.identity:
                self.seconds = found["seconds"]
        self.began = time.monotonic()
        self.planned = 0.0

    @contextmanager
    def run(self, name: str, what: str) -> Iterator[bool]:
        """A stage; gives whether it has to be done."""
        todo = name not in self.seconds
        names = list(self.plan.seconds)
        rest = sum(
            self.plan.seconds[n] for n in names[names.index(name) :] if n not in self.seconds
        )
        spent = time.monotonic() - self.began
        if self.planned:
            rest *= spent / self.planned
        print(
            f"[{names.index(name) + 1}/{len(names)}] {what}"
            + (f", about {duration(rest)} left in all" if todo else ", done before"),
            file=sys.stderr,
            flush=True,
        )
        start = time.monotonic()
        yield todo
        if todo:
            self.planned += self.plan.seconds[name]
            self.seconds[name] = time.monotonic() - start
            write_json_atomic(
                self.file,
                {
                    "schema_version": SCHEMA_VERSION,
                    "kind": "demo",
                    "identity": self.identity,
                    "seconds": self.seconds,
                    "versions": versions(),
                },
            )


def _drawings(by: str, title: str) -> Progress:
    return Progress(f"{title} by {by}", unit="drawings")


def _make_pairs(out: Path, plan: Plan, seed: int) -> None:
    if not (out / "all").exists():
        import_pairs(
            PACKAGE,
            "openmoji",
            out / "all",
            ImportOptions(
                source=SourceOptions(every=plan.every),
                splits=SplitOptions(test_fraction=plan.test_fraction, seed=seed),
            ),
        )
    if not (out / "pairs").exists():
        split_labels(out / "all", plan.labels, seed, out / "pairs")


def _supervised(out: Path, plan: Plan) -> list[Job]:
    labelled = {"pairs": str(out / "pairs" / "labelled")}
    runs = out / "runs"
    return [
        Job("retrieval", str(runs / "supervised"), plan.retrieval, labelled),
        *generator_jobs(str(runs / "generator"), plan.generator, labelled),
    ]


def _semi(out: Path, plan: Plan) -> list[Job]:
    labelled, runs = {"pairs": str(out / "pairs" / "labelled")}, out / "runs"
    teacher = {"teacher": str(runs / "supervised")}
    with_negatives = replace(plan.retrieval, negatives=plan.negatives)

    def pseudo(name: str) -> dict[str, str]:
        return {**labelled, **teacher, "pseudo": str(out / f"pseudo-{name}")}

    return [
        Job("retrieval", str(runs / "semi"), plan.retrieval, pseudo("generator")),
        Job("retrieval", str(runs / "contours"), plan.retrieval, pseudo("contours")),
        Job(
            "retrieval",
            str(runs / "negatives"),
            with_negatives,
            {**labelled, "negatives": str(out / "photos")},
        ),
        Job(
            "retrieval",
            str(runs / "ceiling"),
            plan.retrieval,
            {"pairs": str(out / "all")},
        ),
    ]


def _train(jobs: Sequence[Job]) -> None:
    train(jobs, workers=WORKERS, progress=lambda title: Progress(title, unit="steps"))


def _report(out: Path, plan: Plan, stages: _Stages) -> dict[str, Any]:
    pairs = out / "pairs" / "labelled"
    size = plan.retrieval.model.image_size
    test = PairSet.load(pairs, "test", size)
    found = {name: evaluate_run(out / "runs" / name, pairs, "test") for name in NAMES}
    differences: dict[str, Difference] = {
        name: paired_difference(e.ranks, found["supervised"].ranks, test.photo_of)
        for name, e in found.items()
        if name != "supervised"
    }
    pseudo = pseudo_sections(
        {out / "pseudo-generator": None}, size, str(out / "runs" / "supervised")
    )
    store = out / "photos" / "store.json"
    photos = Ledger.from_json("photos", json.loads(store.read_text())["ledger"], str(store))
    pseudo["ledgers"] = [("Photos", photos), *pseudo["ledgers"]]
    data = report.ReportData(
        title="Draw a thing, find its photo: the demo",
        subtitle="OpenMoji: line strokes as sketches, colour art without the lines as photos",
        note=NOTE,
        baseline=NAMES["supervised"],
        results=_results(out, found, differences, size),
        curves=[c for name in NAMES for c in _curves(out / "runs" / name, NAMES[name])],
        queries=report.query_grid(found["semi"], test),
        timings=[report.Timing(stage=k, seconds=v) for k, v in stages.seconds.items()],
        facts={**{f"version of {k}": v for k, v in versions().items()}, **_facts(stages)},
        config={"retrieval": to_dict(plan.retrieval), "generator": to_dict(plan.generator)},
        commands=_commands(stages),
        **pseudo,
    )
    page = report.write_report(out, data)
    return _result(found, differences, page, stages)


def _results(
    out: Path, found: dict[str, Evaluation], differences: dict[str, Difference], size: int
) -> list[report.Result]:
    labelled = len(PairSet.load(out / "pairs" / "labelled", "train", size).drawn_photos)
    whole = len(PairSet.load(out / "all", "train", size).drawn_photos)
    drawn = {
        "semi": len(PseudoSet.load(out / "pseudo-generator", size).sketches),
        "contours": len(PseudoSet.load(out / "pseudo-contours", size).sketches),
    }
    return [
        report.Result(
            name=NAMES[name],
            metrics=e.metrics,
            labelled=whole if name == "ceiling" else labelled,
            pseudo=drawn.get(name),
            difference=differences.get(name),
            role="ceiling" if name == "ceiling" else "model",
        )
        for name, e in found.items()
    ]


def _curves(run: Path, name: str) -> list[report.Curve]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return report.curves_of(lines, name)


def _facts(stages: _Stages) -> dict[str, str]:
    return {"seed": str(stages.identity["seed"]), "digest": str(stages.identity["plan"])}


def _commands(stages: _Stages) -> list[str]:
    quick = " --quick" if stages.identity["quick"] else ""
    return [f"sbir-ray demo{quick} --seed {stages.identity['seed']} --out DIR"]


def _drawing_commands(out: Path) -> list[str]:
    """What makes the page on which the demo's photos are found by drawings."""
    index = out / "index"
    make = ["sbir-ray", "index", out / "runs" / "semi", "--photos", out / "photos", "--out", index]
    return [shlex.join(map(str, make)), shlex.join(["sbir-ray", "serve", str(index)])]


def _result(
    found: dict[str, Evaluation],
    differences: dict[str, Difference],
    page: Path,
    stages: _Stages,
) -> dict[str, Any]:
    lines = [NOTE, ""]
    for name, e in found.items():
        m = e.metrics
        line = f"{NAMES[name]:36} acc@1 {m.acc1:6.1%}  acc@5 {m.acc5:6.1%}  acc@10 {m.acc10:6.1%}"
        if name in differences:
            gain = differences[name]["difference"]["acc@1"]
            low, high = differences[name]["ci95"]["acc@1"]
            line += f"  {gain:+.1%} ({low:+.1%} to {high:+.1%})"
        lines.append(line)
    m = found["supervised"].metrics
    lines += [
        f"{'chance':36} acc@1 {m.chance['acc@1']:6.1%}",
        "",
        f"{m.queries} sketches, {m.gallery} photos; differences of acc@1 to supervised with 95% "
        "intervals over photos, one training run each.",
        f"Report: {page}",
        "Draw yourself: " + " && ".join(_drawing_commands(page.parent)),
    ]
    return {
        "accuracy": {name: e.metrics.to_json() for name, e in found.items()},
        "difference": dict(differences),
        "seconds": stages.seconds,
        "report": str(page),
        "text": "\n".join(lines),
    }
