"""What Ray Data costs: sketching through its pipeline against the same actors in a plain loop.

    python tests/bench/bench_sketching.py [--photos 1024] [--ms 30] [--actors 2] [--rounds 3]

The sketcher traces contours and then works on until a photo has cost so much CPU time. A plain loop
hands each actor its next block of photos as soon as it has finished one, in two ways: the actor
reads, aligns, draws and writes, the same work as the pipeline's; or it draws photos that already
lie aligned in memory and writes nothing, which no pipeline could beat on one machine's cores.
Compared are rows a second between the first and the last tenth, so that the start of processes
counts for none. Goal: at least 0.90.
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

from sbir_ray.config import IngestConfig, SketchConfig
from sbir_ray.runlog import Progress
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.sketchers import Drawn, Sketcher, SketcherSpec, Tracer
from sbir_ray.stream.sketching import (
    PhotoBlock,
    SketchActor,
    plan_blocks,
    read_photos,
    sketch,
    write_rows,
)


class Costly(Tracer):
    """Contours at the price of a generator."""

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

    def draw(self, photos: pa.Table) -> pa.Table:
        """Rows of one block of aligned photos."""
        size = self.config.batch_size
        drawn = [self.actor(photos.slice(i, size)) for i in range(0, photos.num_rows, size)]
        return pa.concat_tables(drawn)

    def count(self, photos: pa.Table) -> int:
        """Draws alone."""
        return int(self.draw(photos).num_rows)

    def work(self, block: PhotoBlock) -> int:
        """Reads, aligns, draws and writes."""
        rows = self.draw(read(block, self.actor.sketcher.image_size))
        write_rows(rows, self.folder)
        return block.rows


def read(block: PhotoBlock, image_size: int) -> pa.Table:
    """The aligned photos of a block."""
    entry = {
        "block": [block.number],
        "file": [str(block.file)],
        "start": [block.start],
        "stop": [block.stop],
    }
    return read_photos(pa.table(entry), [image_size])


def plain_rate(
    store: Path, folder: Path, spec: SketcherSpec, config: SketchConfig, n: int, draw_only: bool
) -> float:
    """Rows a second of ``n`` plain actors."""
    folder.mkdir()
    actors = [Plain.remote(spec, config, str(folder)) for _ in range(n)]  # type: ignore[attr-defined]
    left: list[Any] = list(plan_blocks(store, config.batch_size)[::-1])
    if draw_only:
        left = [ray.put(read(block, spec.make().image_size)) for block in left]

    def give(actor: Any) -> Any:
        return actor.count.remote(left.pop()) if draw_only else actor.work.remote(left.pop())

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=int, default=1024)
    parser.add_argument("--ms", type=float, default=30.0, help="CPU time a photo costs")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    spec = CostlySpec("contours", seconds=options.ms / 1000)
    config = SketchConfig(batch_size=options.batch)
    same: list[float] = []
    bound: list[float] = []
    with tempfile.TemporaryDirectory() as temporary, connect():
        root = Path(temporary)
        store = make_store(root, options.photos)
        for turn in range(options.rounds):
            work, draw = (
                plain_rate(store, root / f"{name}-{turn}", spec, config, options.actors, draw_only)
                for name, draw_only in (("work", False), ("draw", True))
            )
            data = data_rate(store, root / f"data-{turn}", spec, config, options.actors)
            same.append(data / work)
            bound.append(data / draw)
            print(
                f"Ray Data {data:5.1f} rows/s; plain actors {work:5.1f} with the same work (ratio "
                f"{same[-1]:.2f}), {draw:5.1f} that draw alone (ratio {bound[-1]:.2f})",
                flush=True,
            )
    print(
        f"median ratio {statistics.median(same):.2f} to the same work, "
        f"{statistics.median(bound):.2f} to drawing alone (goal: at least 0.90)"
    )


if __name__ == "__main__":
    main()
