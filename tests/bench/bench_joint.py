"""What joint training costs beside its arithmetic: waiting, Ray, and sending weights.

    python -m tests.bench.bench_joint wait     [--steps 60] [--skip-turns 2] [--actors 1]
    python -m tests.bench.bench_joint workers  [--steps 30] [--skip-turns 2] [--rounds 3]
    python -m tests.bench.bench_joint publish  [--sizes default paper] [--steps 10]

``wait``: one worker trains with what actors draw meanwhile. The share of the worker's time that it
waited for the rows of a step. That is more than it waited for drawings, since a thread beside it
makes rows of them. Goal, where the actors have capacity: at most 5%.

``workers``: the same training by two Ray Train workers and by two processes of torchrun, in turns,
one thread each, both drawing for themselves. Steps a second of Ray over those of torchrun. Goal: at
least 0.95. On two cores, ``--workers 1`` leaves one to Ray's own processes.

``publish``: training that publishes after every step. The time that it costs the worker, beside
that of a step, and the time until an actor draws with the weights.

All train on made-up data with random weights, or on --pairs and --photos, from --teacher and
--generator. The first turns (--skip-turns) count for none. For a look whether all works:
``--size tiny --steps 20``, ``--sizes tiny``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.runs import load_discriminator, load_generator
from sbir_ray.stream.live_rows import published
from sbir_ray.strict import from_dict, load, to_dict
from sbir_ray.train.job import Job
from sbir_ray.train.launch import Actors, train
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.tasks import joint_jobs
from tests.bench.marks import Mark, marked, read_marks, share
from tests.tiny import tiny_pairs
from tests.tiny_store import tiny_store

REPOSITORY = Path(__file__).parents[2]

TINY = (
    "retrieval.model.image_size=64",
    "retrieval.model.grid=2",
    "retrieval.optim.batch_size=4",
    "generator.model.image_size=64",
    "generator.model.latent=8",
    "generator.model.hidden=32",
    "generator.model.attention=16",
    "generator.model.mixtures=3",
    "generator.model.max_points=24",
    "generator.discriminator.channels=8",
    "generator.discriminator.layers=2",
    "generator.optim.batch_size=4",
    "policy.kind=reinforce",
    "policy.batch_size=2",
)
# G and D of recipes/paper-generator.toml, with few rows a step: F and a step's rows are so small
# that sending weights has a larger share of a step than it would have in earnest.
PAPER = (
    "retrieval.optim.batch_size=2",
    "generator.model.backbone=vgg16",
    "generator.model.image_size=256",
    "generator.model.train_backbone=true",
    "generator.model.latent=128",
    "generator.model.hidden=512",
    "generator.model.attention=256",
    "generator.model.mixtures=20",
    "generator.model.epsilon=3.0",
    "generator.optim.batch_size=2",
    "generator.discriminator.channels=64",
    "generator.discriminator.image_size=256",
    "generator.discriminator.batch_size=2",
    "generator.discriminator.plain=true",
    "policy.kind=reinforce",
    "policy.batch_size=2",
)
SIZES: Mapping[str, Sequence[str]] = {
    "tiny": TINY,
    "default": ("policy.kind=reinforce",),
    "paper": PAPER,
    "paper-frozen": (*PAPER, "generator.model.train_backbone=false"),
}
AT_ONCE = {"tiny": 4, "default": 16, "paper": 2, "paper-frozen": 2}
"""Photos that an actor draws at once; learners that draw have no such setting."""

# --------------------------------------------------------------------------- what is trained


def prepared(options: argparse.Namespace, size: str, root: Path, *sets: str) -> tuple[Job, int]:
    """A joint job whose data and starting runs are there, and the steps that do not count.

    The settings of the command line win over ``sets``, these over the size's.
    """
    root.mkdir()
    given = {
        name: str(getattr(options, name).resolve())
        for name in ("pairs", "photos", "teacher", "generator")
        if getattr(options, name)
    }
    if ("pairs" in given) != ("photos" in given):
        raise UserError("give --pairs and --photos, or neither")
    if "pairs" not in given:
        given["pairs"] = str(tiny_pairs(root / "pairs", train=options.made))
        given["photos"] = str(tiny_store(root / "photos", 2 * options.made))
    random = [
        f"{network}.model.weights=none"
        for network, run in (("retrieval", "teacher"), ("generator", "generator"))
        if run not in given
    ]
    config = load(
        JointTraining,
        None,
        [
            *SIZES[size],
            *random,
            "retrieval.optim.steps=1",
            f"generator.optim.steps={options.start_steps}",
            "generator.discriminator.steps=1",
            f"schedule.steps={options.steps}",
            "save.log_every=1",
            "save.checkpoint_every=1000000",
            *sets,
            *options.set,
        ],
    )
    *before, job = joint_jobs(str(root / "start"), config, given)
    skip = steps_of(job, options.skip_turns)
    train(before, workers=0)
    return job, skip


def steps_of(job: Job, turns: int) -> int:
    """Steps of the first turns."""
    assert isinstance(job.config, JointTraining)
    schedule = job.config.schedule
    if not schedule.generator_steps:
        raise UserError("schedule.generator_steps=0: there are no turns to measure")
    cycles, half = divmod(turns, 2)
    cycle = schedule.retrieval_steps + schedule.generator_steps
    steps = cycles * cycle + half * schedule.retrieval_steps
    if turns < 1 or steps + cycle > schedule.steps:
        raise UserError(
            f"--skip-turns {turns} leaves out {steps} steps; a turn of each has to follow"
        )
    return steps


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a run after the first turns."""

    lines: Sequence[dict[str, float]]
    seconds: Sequence[float]
    """Of each."""

    @classmethod
    def of_run(cls, run: Path, skip: int) -> Steps:
        """Those after the first ``skip``."""
        read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in read if line["kind"] == "step" and line["step"] >= skip]
        if len(lines) < 2 or lines[0]["step"] != skip or lines[-1]["seconds"] == 0:
            raise UserError("too few steps were logged; leave save.log_every at 1")
        ends = [line["seconds"] for line in lines]
        return cls(lines[1:], [b - a for a, b in itertools.pairwise(ends)])

    @property
    def rate(self) -> float:
        """Steps a second."""
        return len(self.lines) / sum(self.seconds)

    def waited(self, turn: int | None = None) -> float:
        """Share of the time, of all steps or of a turn's (0: F and D, 1: G), spent waiting."""
        chosen = [
            (line["wait_share"] * seconds, seconds)
            for line, seconds in zip(self.lines, self.seconds, strict=True)
            if turn is None or line["turn"] == turn
        ]
        waited, whole = map(sum, zip(*chosen, strict=True))
        return waited / max(whole, 1e-9)


def trained(job: Job, out: Path, actors: int, turns: int) -> tuple[list[Mark], list[Mark]]:
    """Train ``job`` to ``out`` with one worker and ``actors``, one CPU each.

    Returns:
        All marks, and of them the publications after the first ``turns``.
    """
    folder = out.with_name(f"{out.name}-marks")
    with marked(folder):
        job = dataclasses.replace(job, out=str(out))
        train([job], workers=1, cpus_per_worker=1.0, actors=Actors(actors, actors))
    marks = read_marks(folder)
    late = [m for m in marks if m.what == "publish" and m.values["version"] >= turns]
    return marks, late


# --------------------------------------------------------------------------- the three questions


def wait(options: argparse.Namespace, root: Path) -> None:
    """How long a learner waits for drawings."""
    job, skip = prepared(
        options, options.size, root / "wait", f"stream.batch_size={AT_ONCE[options.size]}"
    )
    run = root / "run"
    marks, publications = trained(job, run, options.actors, options.skip_turns)
    steps = Steps.of_run(run, skip)
    span = publications[0].ended, publications[-1].began
    busy = share(marks, "draw", *span) / options.actors
    draws = [m for m in marks if m.what == "draw" and m.began > span[0]]
    photos = sum(m.values["photos"] for m in draws)
    points = sum(m.values["points"] for m in draws) / max(photos, 1)
    fates = json.loads((run / "ledger.json").read_text())
    by_step = statistics.mean(line["wait_share"] for line in steps.lines)
    print(
        f"{len(steps.lines)} steps, {steps.rate:.2f} a second; the learner waited for rows "
        f"{steps.waited():.1%} of the time (mean over steps {by_step:.1%}; turns of F and D "
        f"{steps.waited(0):.1%}, of G {steps.waited(1):.1%})\n"
        f"the thread that makes its rows waited for drawings {share(marks, 'wait', *span):.1%} of "
        f"the time\n"
        f"{options.actors} actor(s) drew {busy:.1%} of the time, {photos / (span[1] - span[0]):.1f}"
        f" photos a second, {points:.0f} points a drawing; of {fates['drawn']} photos "
        f"{fates['used']} were used, {fates['stale']} stale, {sum(fates['filtered'].values())} "
        f"filtered\n"
        f"waiting {steps.waited():.1%} (goal, where actors have capacity: at most 5%)"
    )


def workers(options: argparse.Namespace, root: Path) -> None:
    """Ray Train beside torchrun."""
    job, skip = prepared(options, options.size, root / "workers", "stream.sync=true")
    ratios: list[float] = []
    for number in range(options.rounds):
        rates: dict[str, float] = {}
        # Who comes first changes, in case the machine slows down or speeds up.
        for name in ("Ray", "torchrun")[:: 1 if number % 2 == 0 else -1]:
            one = dataclasses.replace(job, out=str(root / f"{name}-{number}"))
            if name == "Ray":
                train([one], workers=options.workers, cpus_per_worker=1.0)
            else:
                with_torchrun(one, options.workers)
            rates[name] = Steps.of_run(Path(one.out), skip).rate
        ratios.append(rates["Ray"] / rates["torchrun"])
        print(
            f"Ray Train {rates['Ray']:.3f} steps/s, torchrun {rates['torchrun']:.3f}: ratio "
            f"{ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f} (goal: at least 0.95)")


def with_torchrun(job: Job, processes: int) -> None:
    """Train ``job`` by processes of torchrun, which run :func:`torchrun_worker`."""
    out = Path(job.out)
    out.mkdir()
    record = {**dataclasses.asdict(job), "config": to_dict(job.config)}
    (out / "job.json").write_text(json.dumps(record))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = f"torch.distributed.run --nproc-per-node {processes} --master-addr 127.0.0.1"
    command = [sys.executable, "-m", *launcher.split(), "--master-port", str(port)]
    command += ["-m", "tests.bench.bench_joint", "torchrun-worker", str(out)]
    # One thread each is torchrun's default too, which it tells, unless it is asked for.
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def torchrun_worker(folder: Path) -> None:
    """One of the processes."""
    record = json.loads((folder / "job.json").read_text())
    job = Job(**{**record, "config": from_dict(JointTraining, record["config"])})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    fit(job, ranks, torch.device("cpu"), lambda line: print(line) if ranks.rank == 0 else None)
    dist.destroy_process_group()


def publish(options: argparse.Namespace, root: Path) -> None:
    """What newer weights cost, and when they are in use."""
    for size in options.sizes:
        job, skip = prepared(
            options,
            size,
            root / size,
            # A publication after each step; drawings are a few steps old, which is all right here.
            "schedule.retrieval_steps=1",
            "schedule.generator_steps=1",
            "stream.max_staleness=1000",
            f"stream.batch_size={AT_ONCE[size]}",
        )
        run = root / f"run-{size}"
        marks, publications = trained(job, run, options.actors, options.skip_turns)
        steps = Steps.of_run(run, skip)
        spent = [m.ended - m.began for m in publications]
        span = publications[0].began, publications[-1].ended
        loads = [m for m in marks if m.what == "load" and m.began > span[0]]
        by_version = {m.values["version"]: m for m in publications}
        until = [m.ended - by_version[m.values["version"]].began for m in loads]
        batches = [m.ended - m.began for m in marks if m.what == "draw" and m.began > span[0]]
        sent, whole = megabytes(job)
        part = sum(spent) / (span[1] - span[0])
        print(
            f"{size}: {sent:.1f} of {whole:.1f} MB travel; publishing costs the learner "
            f"{1e3 * statistics.median(spent):.1f} ms (most {1e3 * max(spent):.1f}), a step takes "
            f"{1e3 / steps.rate:.0f} ms: {part:.2%} of the time with a publication a step\n"
            f"  an actor has the weights {middle(until)} later, of which laying them out takes "
            f"{middle([m.ended - m.began for m in loads])}, and drawing the batch before, "
            f"{middle(batches)} in whole; {len(loads)} loads of {len(publications)} publications",
            flush=True,
        )


def megabytes(job: Job) -> tuple[float, float]:
    """Of the weights that are published, and of all of G and D."""
    assert isinstance(job.config, JointTraining)
    run = Path(job.inputs["generator"])
    generator, judge = load_generator(run).model, load_discriminator(run)
    assert judge is not None
    generator.backbone.requires_grad_(job.config.generator.model.train_backbone)

    def size(tensors: Mapping[str, Tensor]) -> float:
        return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6

    whole = size(generator.state_dict()) + size(judge.model.state_dict())
    return size(published(generator, judge.model)), whole


def middle(seconds: Sequence[float]) -> str:
    """The median in milliseconds, in words."""
    return f"{1e3 * statistics.median(seconds):.0f} ms" if seconds else "never"


# --------------------------------------------------------------------------- command line


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=rest, formatter_class=raw)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{wait,workers,publish}"
    )
    for run, steps, start in ((wait, 60, 60), (workers, 30, 60), (publish, 10, 1)):
        command = commands.add_parser(
            run.__name__,
            help=run.__doc__,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run)
        add = command.add_argument
        if run is publish:
            add("--sizes", nargs="+", choices=SIZES, default=["default", "paper"], help="of G, D")
        else:
            add("--size", choices=SIZES, default="default", help="of F, G, D and a step's rows")
        add("--steps", type=int, default=steps, help="of F and D and of G together")
        add("--skip-turns", type=int, default=2, help="turns of F or G at the start not to count")
        if run is workers:
            add("--rounds", type=int, default=3, help="runs of each")
            add("--workers", type=int, default=2, help="processes of each")
        else:
            add("--actors", type=int, default=1, help="that draw, one CPU each")
        add(
            "--made", type=int, default=24, help="made-up photos with labels; twice as many without"
        )
        add(
            "--start-steps", type=int, default=start, help="of G alone, where no run of it is given"
        )
        for name in ("pairs", "photos", "teacher", "generator"):
            add(f"--{name}", type=Path, help="a folder as of sbir-ray train joint")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting")
    hidden = commands.add_parser("torchrun-worker")
    hidden.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "torchrun-worker":
        torchrun_worker(options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            options.run(options, Path(temporary))
        except UserError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
