"""Throughput of cached training at 1 and 2 workers, and of sketching at 1 and 2 actors.

    python -m tests.bench.bench_scaling [--steps 60] [--photos 512] [--rounds 3] [--out FILE.json]

Training: the semi-supervised network on made-up labelled pairs and a store of pseudo pairs, each
worker one core and one thread, the same batch shared by all. Sketching: a generator with random
weights, each actor one core. Rates are of the steady part, the two sizes in turns; the ratio of the
rates of a round is what does not depend on the machine. FILE.json is what
``tests.bench.scaling_model`` reads: cost of a step, of a pair of rows in the loss, and of a call of
an actor; bytes of a gradient; photos a second of an actor. For a look whether all works:
``--size tiny --steps 6 --photos 64 --rounds 1``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from sbir_ray.config import (
    GeneratorTraining,
    OptimConfig,
    RetrievalTraining,
    SaveConfig,
    SketchConfig,
)
from sbir_ray.losses import mean_triplet
from sbir_ray.runlog import Progress
from sbir_ray.runs import load_generator, load_retrieval
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.sketching import sketch
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import generator_jobs
from tests.bench.bench_sketching import Marks
from tests.tiny import generator_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store


def configs(size: str, steps: int) -> tuple[RetrievalTraining, GeneratorTraining]:
    """Settings of training, and of a generator that is trained for one step."""
    save = SaveConfig(log_every=1, checkpoint_every=10**6)
    if size == "tiny":
        return retrieval_config(steps=steps, save=save), generator_config(steps=1)
    plain, drawing = RetrievalTraining(), GeneratorTraining()
    retrieval = replace(
        plain,
        model=replace(plain.model, weights="none"),
        optim=OptimConfig(steps=steps),
        save=save,
    )
    generator = replace(
        drawing,
        model=replace(drawing.model, weights="none"),
        discriminator=replace(drawing.discriminator, steps=1),
        optim=OptimConfig(steps=1),
        save=save,
    )
    return retrieval, generator


def training_rate(run: Path, config: RetrievalTraining, inputs: dict[str, str], n: int) -> float:
    """Steps a second of ``n`` workers after the first fifth of the steps."""
    job = Job("retrieval", str(run), config, inputs)
    train([job], workers=n, cpus_per_worker=1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    marks = [(line["seconds"], line["step"]) for line in lines if line["kind"] == "step"]
    marks = marks[len(marks) // 5 :]
    (start, before), (end, after) = marks[0], marks[-1]
    return float((after - before) / max(end - start, 1e-9))


def sketching_rate(photos: Path, out: Path, generator: Path, n: int) -> float:
    """Photos a second of ``n`` actors between the first and the last tenth."""
    made: list[Marks] = []

    def progress(title: str) -> Progress:
        made.append(Marks(title))
        return made[-1]

    config = SketchConfig(samples=1)
    sketch(photos, out, str(generator), config, actors=(n, n), progress=progress)
    return made[0].steady()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["default", "tiny"], default="default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    retrieval, generator = configs(options.size, options.steps)
    rates: dict[str, list[float]] = {"train1": [], "train2": [], "sketch1": [], "sketch2": []}
    with tempfile.TemporaryDirectory() as temporary, connect():
        root = Path(temporary)
        pairs = tiny_pairs(root / "pairs", train=32)
        photos = tiny_store(root / "photos", options.photos, shard=256, group=64)
        drawer = root / "generator"
        train(generator_jobs(str(drawer), generator, {"pairs": str(pairs)}), workers=0)
        sketch(photos, root / "pseudo", "contours", SketchConfig(temperature=0.0), actors=(2, 2))
        inputs = {"pairs": str(pairs), "pseudo": str(root / "pseudo")}
        for turn in range(options.rounds):
            for n in (1, 2):
                run = root / f"run-{turn}-{n}"
                rates[f"train{n}"].append(training_rate(run, retrieval, inputs, n))
                drawn = root / f"drawn-{turn}-{n}"
                rates[f"sketch{n}"].append(sketching_rate(photos, drawn, drawer, n))
            now = {name: values[-1] for name, values in rates.items()}
            print(
                f"training {now['train1']:.2f} steps/s with 1 worker, {now['train2']:.2f} with 2 "
                f"(ratio {now['train2'] / now['train1']:.2f}); sketching {now['sketch1']:.1f} "
                f"photos/s with 1 actor, {now['sketch2']:.1f} with 2 (ratio "
                f"{now['sketch2'] / now['sketch1']:.2f})",
                flush=True,
            )
        figures = summary(rates, root / "run-0-1", drawer, retrieval, call_rate())
    print(json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


def pair_seconds(dim: int, rows: int = 512) -> float:
    """Of one core, for a pair of rows in the loss of the whole batch, forward and back."""
    sketch = torch.randn(rows, dim, requires_grad=True)
    photo = torch.randn(rows, dim, requires_grad=True)
    spans = []
    for _ in range(5):
        began = time.perf_counter()
        mean_triplet(sketch, photo, torch.arange(rows), 0.3).mean().backward()
        spans.append(time.perf_counter() - began)
    return statistics.median(spans) / rows**2


class Counter:
    """An actor that does next to nothing."""

    def count(self, number: int) -> int:
        return number + 1


def call_rate(count: int = 2000) -> float:
    """Calls a second that one actor answers."""
    actor: Any = ray.remote(Counter).options(num_cpus=0).remote()
    ray.get(actor.count.remote(0))
    began = time.perf_counter()
    ray.get([actor.count.remote(number) for number in range(count)])
    return count / (time.perf_counter() - began)


def summary(
    rates: dict[str, list[float]], run: Path, drawer: Path, config: RetrievalTraining, calls: float
) -> dict[str, Any]:
    """Medians, and the sizes of what travels."""
    middle = {name: statistics.median(values) for name, values in rates.items()}
    labelled = config.optim.batch_size
    pseudo = round(config.pseudo_share * labelled)
    network = load_retrieval(run).model
    size = network.config.image_size
    with torch.no_grad():
        dim = network.embed_photos(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    weights = sum(p.numel() for p in load_generator(drawer).model.parameters())
    return {
        "step_seconds": 1 / middle["train1"],
        "rows_per_step": labelled + pseudo,
        "pseudo_rows_per_step": pseudo,
        "training_ratio_2_to_1": middle["train2"] / middle["train1"],
        "gradient_bytes": 4 * trained,
        "generator_bytes": 4 * weights,
        "embedding_bytes": 4 * dim,
        "pair_seconds": pair_seconds(dim),
        "calls_per_second": calls,
        "photos_per_second_per_actor": middle["sketch1"],
        "sketching_ratio_2_to_1": middle["sketch2"] / middle["sketch1"],
    }


if __name__ == "__main__":
    main()
