"""What Ray Data costs: sketching through its pipeline against the bare generator in a loop.

    python -m tests.bench.bench_sketching [--photos 512] [--samples 1] [--actors 1] [--rounds 3]

A generator of the default size with its discriminator draws photos of polygons. The pipeline reads,
aligns, draws, judges and writes them. Beside it, in the same run, as many plain processes as it has
actors take the next block of photos as soon as they have drawn one, in two ways: ``bare``, which
calls the generator on photos that already lie aligned in memory and writes nothing, so that no
pipeline could beat it; and ``work``, which does all that the pipeline does. Compared are drawings a
second between the first and the last tenth, so that the start of processes counts for none. The
bare loop has its processes' cores to itself; the pipeline needs one more for all the rest. Goal: at
least 0.90 of the bare loop.

``--ms 30`` draws by tracing contours at that price a drawing instead of by a generator.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sbir_ray.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    GeneratorTraining,
    IngestConfig,
    OptimConfig,
    SketchConfig,
)
from sbir_ray.runlog import Progress
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.sketch_actor import SketchActor, write_rows
from sbir_ray.stream.sketch_blocks import PhotoBlock, plan_blocks, read_photos
from sbir_ray.stream.sketchers import Drawn, Sketcher, SketcherSpec, Tracer, row_seed
from sbir_ray.stream.sketching import sketch
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import generator_jobs
from tests.tiny import tiny_pairs


class Costly(Tracer):
    """Contours at the price of a generator, as if they were drawn by chance."""

    def __init__(self, seconds: float) -> None:
        super().__init__("contours")
        self.seconds = seconds
        self.weights = np.random.default_rng(0).random((64, 64), dtype=np.float32)

    def draw(self, photos_BHW3: NDArray[np.uint8], seeds: Sequence[int]) -> list[Drawn]:
        end = time.thread_time() + self.seconds * len(seeds)
        drawn = super().draw(photos_BHW3, seeds)
        while time.thread_time() < end:
            self.weights @ self.weights
        return drawn


@dataclasses.dataclass(frozen=True)
class CostlySpec(SketcherSpec):
    seconds: float = 0.0

    def make(self) -> Sketcher:
        return Costly(self.seconds)


class Marks(Progress):
    """Remembers when how many rows were done."""

    def __init__(self, title: str) -> None:
        super().__init__(title, file=io.StringIO())
        self.marks: list[tuple[float, int]] = []

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        self.marks.append((time.monotonic(), done))
        super().update(done, total, note)

    def steady(self) -> float:
        """Rows a second between the first and the last tenth."""
        last = self.marks[-1][1]
        inner = [(t, n) for t, n in self.marks if 0.1 * last <= n <= 0.9 * last]
        (start, before), (end, after) = inner[0], inner[-1]
        return (after - before) / (end - start)


@ray.remote(num_cpus=1)
class Plain:
    """The actor without a pipeline."""

    def __init__(self, spec: SketcherSpec, config: SketchConfig, folder: str) -> None:
        self.actor = SketchActor(spec, config, folder)
        self.config, self.folder = config, folder

    def bare(self, photos: pa.Table) -> int:
        """Draws a block of aligned photos, and nothing else."""
        sketcher, config = self.actor.sketcher, self.config
        side = sketcher.image_size
        for start in range(0, photos.num_rows, config.batch_size):
            batch = photos.slice(start, config.batch_size).to_pylist()
            pixels = np.stack([np.frombuffer(row[f"aligned_{side}"], np.uint8) for row in batch])
            seeds = [
                row_seed(config.seed, row["photo_id"], k)
                for row in batch
                for k in range(config.samples)
            ]
            sketcher.draw(pixels.reshape(-1, side, side, 3), seeds)
        return int(photos.num_rows) * config.samples

    def work(self, block: PhotoBlock) -> int:
        """Reads, aligns, draws and writes."""
        photos = read(block, self.actor.sketcher.image_size)
        size = self.config.batch_size
        drawn = [self.actor(photos.slice(i, size)) for i in range(0, photos.num_rows, size)]
        write_rows(pa.concat_tables(drawn), self.folder, self.config.choice)
        return block.rows * self.config.samples


def read(block: PhotoBlock, image_size: int) -> pa.Table:
    """The aligned photos of a block."""
    return read_photos(block.to_table(), [image_size])


def plain_rate(
    store: Path, folder: Path, spec: SketcherSpec, config: SketchConfig, n: int, bare: bool
) -> float:
    """Rows a second of ``n`` plain actors."""
    folder.mkdir()
    actors = [Plain.remote(spec, config, str(folder)) for _ in range(n)]  # type: ignore[attr-defined]
    left: list[Any] = list(plan_blocks(store, config.batch_size)[::-1])
    if bare:
        left = [ray.put(read(block, spec.make().image_size)) for block in left]

    def give(actor: Any) -> Any:
        return actor.bare.remote(left.pop()) if bare else actor.work.remote(left.pop())

    marks, done = Marks("plain"), 0
    busy: dict[Any, Any] = {give(actor): actor for actor in actors}
    while busy:
        ready, _ = ray.wait(list(busy), num_returns=1)
        actor = busy.pop(ready[0])
        done += ray.get(ready[0])
        marks.update(done)
        if left:
            busy[give(actor)] = actor
    for actor in actors:
        ray.kill(actor)
    return marks.steady()


def data_rate(store: Path, out: Path, spec: SketcherSpec, config: SketchConfig, n: int) -> float:
    """Rows a second of the pipeline with ``n`` actors."""
    made: list[Marks] = []

    def progress(title: str) -> Progress:
        made.append(Marks(title))
        return made[-1]

    sketch(store, out, spec, config, actors=(n, n), progress=progress)
    return made[0].steady()


def make_store(root: Path, count: int) -> Path:
    """A photo store of ``count`` pictures of different polygons."""
    folder = root / "photos"
    folder.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        picture = Image.new("RGB", (256, 256), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(4):
            points = [tuple(p) for p in rng.integers(20, 236, (5, 2)).tolist()]
            draw.polygon(points, fill=tuple(rng.integers(0, 220, 3).tolist()), outline="black")
        picture.save(folder / f"{number:05d}.jpg", quality=92)
    ingest([folder], root / "store", IngestConfig(near=0), progress=Marks)
    return root / "store"


def make_generator(root: Path) -> Path:
    """A run of the default size, trained for a moment: it draws as fast as one that knows more,
    but for the lengths of its drawings, which are the same in all that is compared here."""
    config = GeneratorTraining(
        model=GeneratorConfig(weights="none"),
        discriminator=DiscriminatorConfig(steps=2, batch_size=4),
        optim=OptimConfig(steps=2, batch_size=4),
    )
    inputs = {"pairs": str(tiny_pairs(root / "pairs"))}
    train(generator_jobs(str(root / "generator"), config, inputs), workers=0)
    return root / "generator"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--samples", type=int, default=1, help="drawings a photo")
    parser.add_argument("--ms", type=float, default=0.0, help="CPU time a drawing costs")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = SketchConfig(batch_size=options.batch, samples=options.samples, temperature=0.25)
    ratios: dict[str, list[float]] = {"bare": [], "work": []}
    with tempfile.TemporaryDirectory() as temporary, connect():
        root = Path(temporary)
        store = make_store(root, options.photos)
        spec: SketcherSpec = CostlySpec("contours", seconds=options.ms / 1000)
        if not options.ms:
            spec = SketcherSpec(str(make_generator(root)), config.temperature)
        for turn in range(options.rounds):
            rates = {
                name: plain_rate(
                    store, root / f"{name}-{turn}", spec, config, options.actors, name == "bare"
                )
                for name in ratios
            }
            data = data_rate(store, root / f"data-{turn}", spec, config, options.actors)
            for name, rate in rates.items():
                ratios[name].append(data / rate)
            print(
                f"pipeline {data:5.1f} drawings/s; bare loop {rates['bare']:5.1f} (ratio "
                f"{ratios['bare'][-1]:.2f}); the same work in a loop {rates['work']:5.1f} (ratio "
                f"{ratios['work'][-1]:.2f})",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(ratios['bare']):.2f} to the bare loop (goal: at least "
        f"0.90), {statistics.median(ratios['work']):.2f} to the same work"
    )


if __name__ == "__main__":
    main()
