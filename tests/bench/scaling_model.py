"""What 8, 64 and 512 GPUs would do, from measured figures and a few stated assumptions.

    python -m tests.bench.scaling_model FIGURES.json [--gpu-times 50] [--link-gbit 25] ...

FIGURES.json comes from ``tests.bench.bench_scaling``. The model, for W GPUs that train with b rows
each (so the batch is bW), a gradient of G bytes, a link of L bytes a second between nodes, and a
latency of t seconds for each of the 2 log2 W hops of a collective:

    rows      b * row_seconds / gpu_times                      the network on its own rows
    gradient  2 (W - 1) / W * G / L + 2 log2(W) t              ring all-reduce of the gradient
    gather    b (W - 1) * E / L + log2(W) t                    all embeddings to all ranks
    loss      (b W)^2 * pair_seconds / gpu_times               each rank has the whole batch's loss
    step      rows + gradient + gather + loss                  nothing overlaps, as in the program

Actors needed: pseudo rows a step, times tries, over (photos a second of an actor x gpu_times x the
step). Exchange: one process, which each batch of drawings calls four times, and which answers as
many calls a second as were measured. Assumptions are the options, and are printed with the table.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Assumed:
    """What is not measured on this machine."""

    gpu_times: float = 50.0
    """How many times as fast a GPU is as one core, for these networks."""
    link_gbit: float = 25.0
    """Between nodes, Gbit/s."""
    hop_microseconds: float = 50.0
    rows_per_gpu: int = 32
    tries: float = 1.2
    """Drawings for each pseudo pair that passes the filters."""
    drawings_per_call: int = 16
    """``stream.batch_size``."""
    calls_per_batch: int = 4
    """Of the exchange: granted, begun, delivered, taken."""


@dataclass(frozen=True)
class Row:
    """One size of cluster."""

    gpus: int
    seconds: dict[str, float]
    actors: int
    exchange_share: float

    @property
    def step(self) -> float:
        return sum(self.seconds.values())

    @property
    def efficiency(self) -> float:
        """Share of a step that is the network itself."""
        return self.seconds["rows"] / self.step

    @property
    def bottleneck(self) -> str:
        """What takes most beside the network, or the exchange where it is asked too much."""
        if self.exchange_share > 1:
            return "exchange"
        return max((part for part in self.seconds if part != "rows"), key=self.seconds.__getitem__)


def model(figures: dict[str, float], assumed: Assumed, gpus: int) -> Row:
    """The table's row for ``gpus`` GPUs that train."""
    link = assumed.link_gbit * 1e9 / 8
    hop = assumed.hop_microseconds * 1e-6
    own, world = assumed.rows_per_gpu, gpus
    row_seconds = figures["step_seconds"] / figures["rows_per_step"]
    seconds = {
        "rows": own * row_seconds / assumed.gpu_times,
        "gradient": 2 * (world - 1) / world * figures["gradient_bytes"] / link
        + 2 * math.log2(world) * hop,
        "gather": own * (world - 1) * figures["embedding_bytes"] / link + math.log2(world) * hop,
        "loss": (own * world) ** 2 * figures["pair_seconds"] / assumed.gpu_times,
    }
    step = sum(seconds.values())
    share = figures["pseudo_rows_per_step"] / figures["rows_per_step"]
    drawings = own * world * share * assumed.tries / step
    rate = figures["photos_per_second_per_actor"] * assumed.gpu_times
    calls = drawings / assumed.drawings_per_call * assumed.calls_per_batch
    busy = calls / figures["calls_per_second"]
    return Row(gpus, seconds, math.ceil(drawings / rate), busy)


def table(figures: dict[str, float], assumed: Assumed, sizes: tuple[int, ...]) -> str:
    """Markdown."""
    lines = [
        "| GPUs that train | batch | step, ms | rows | gradient | gather | loss | rows/s | "
        "of ideal | GPUs that draw | exchange busy | next bottleneck |",
        "| --- | " + "--- | " * 11,
    ]
    for gpus in sizes:
        row = model(figures, assumed, gpus)
        parts = " | ".join(f"{1e3 * value:.1f}" for value in row.seconds.values())
        batch = gpus * assumed.rows_per_gpu
        lines.append(
            f"| {gpus} | {batch:,} | {1e3 * row.step:.1f} | {parts} | {batch / row.step:,.0f} | "
            f"{row.efficiency:.0%} | {row.actors} | {row.exchange_share:.0%} | {row.bottleneck} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    for name, default in vars(Assumed()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default)
    options = vars(parser.parse_args())
    figures = json.loads(options.pop("figures").read_text())
    sizes = tuple(options.pop("gpus"))
    assumed = Assumed(**options)
    print(f"measured: {json.dumps(figures)}\nassumed: {json.dumps(vars(assumed))}\n")
    print(table(figures, assumed, sizes))


if __name__ == "__main__":
    main()
