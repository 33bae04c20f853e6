"""The commands that train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sbir_ray import config as settings
from sbir_ray.cli_options import (
    FOLDER,
    OUT,
    PAIRS,
    show,
    with_actors,
    with_json,
    with_settings,
    with_workers,
)
from sbir_ray.config import BEST_OF, SketchConfig
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining


@click.group()
def train() -> None:
    """Train the retrieval network, the generator, or all networks together.

    A run folder that was interrupted goes on when the command is repeated.
    """


def _train(
    jobs: list[Any],
    address: str | None,
    workers: int,
    gpu: bool,
    cpus_per_worker: float | None,
    worker_resource: str,
    as_json: bool,
    actors: Any = None,
) -> None:
    from sbir_ray.runlog import Progress
    from sbir_ray.train.launch import train as run_training

    results = run_training(
        jobs,
        workers=workers,
        gpu=gpu,
        cpus_per_worker=cpus_per_worker,
        address=address,
        worker_resource=worker_resource,
        actors=actors,
        progress=lambda title: Progress(title, unit="steps"),
    )
    # Joint training comes after what it starts from, D after G.
    which = -1 if jobs[-1].kind == "joint" else 0
    out, result = jobs[which].out, results[which]
    told = ("acc@1", "acc@5", "acc@10", "mean_rank", "offset", "pen", "kl")
    numbers = [f"{k} {result[k]:.3f}" for k in told if k in result]
    text = f"{out}: trained. Validation: {', '.join(numbers) or 'no validation split'}"
    show({"run": str(out), "validation": result}, as_json, text)


def _inputs(**paths: Path | None) -> dict[str, str]:
    """Absolute, since workers run in other folders."""
    for name, path in paths.items():
        if path is not None and not path.exists():
            raise UserError(f"{path}: does not exist (--{name})")
    return {name: str(path.resolve()) for name, path in paths.items() if path is not None}


@train.command("retrieval")
@PAIRS
@OUT
@with_workers
@with_json
@with_settings(settings.RetrievalTraining)
def train_retrieval(
    config: settings.RetrievalTraining, pairs_dir: Path, out: Path, as_json: bool, **ray: Any
) -> None:
    """Supervised training of the retrieval network F on labelled pairs.

    Example: sbir-ray train retrieval --pairs chairs --out runs/f --workers 2
    """
    from sbir_ray.train.job import Job

    job = Job("retrieval", str(out.resolve()), config, _inputs(pairs=pairs_dir))
    _train([job], as_json=as_json, **ray)


@train.command("generator")
@PAIRS
@click.option(
    "--photos", type=FOLDER, help="PHOTOS folder: photos without sketches, traced for the pen."
)
@OUT
@with_workers
@with_json
@with_settings(settings.GeneratorTraining)
def train_generator(
    config: settings.GeneratorTraining,
    pairs_dir: Path,
    photos: Path | None,
    out: Path,
    as_json: bool,
    **ray: Any,
) -> None:
    """Training of the generator G on labelled pairs and traced contours, then of the discriminator
    D on G's drawings (in OUT/discriminator).

    Example: sbir-ray train generator --pairs chairs --photos photos --out runs/g
    """
    from sbir_ray.train.job import Job
    from sbir_ray.train.tasks import generator_jobs

    if photos is not None and config.model.kind == "paper":
        raise UserError("--photos: only the generator kind=pen traces photos; leave it out")
    jobs: list[Job] = generator_jobs(
        str(out.resolve()), config, _inputs(pairs=pairs_dir, photos=photos)
    )
    _train(jobs, as_json=as_json, **ray)


@train.command("semi")
@PAIRS
@click.option(
    "--pseudo",
    type=FOLDER,
    multiple=True,
    help="PSEUDO folder: drawn photos, as weighted pairs. Several: of a photo that more than one "
    "has drawn, one drawing at random each time.",
)
@click.option(
    "--photos",
    type=FOLDER,
    help="PHOTOS folder, in place of --pseudo and --negatives: traced here, into OUT/traced, and "
    "negatives as well (set negatives=16).",
)
@click.option(
    "--generator",
    type=FOLDER,
    help="Run of a generator that draws --photos too, into OUT/drawn: the best of "
    f"{BEST_OF} by --teacher, or by certainty.",
)
@click.option("--teacher", type=FOLDER, help="Run of the supervised network, for distillation.")
@click.option(
    "--negatives",
    type=FOLDER,
    help="PHOTOS folder: as negatives alone (set negatives=16 for 16 a step).",
)
@click.option(
    "--begin",
    type=FOLDER,
    metavar="RUN",
    help="Go on from the newest step of this run with other settings, in a run of its own; "
    "optim.steps counts the steps of that run too.",
)
@OUT
@with_workers
@with_json
@with_settings(settings.RetrievalTraining)
def train_semi(
    config: settings.RetrievalTraining,
    pairs_dir: Path,
    pseudo: tuple[Path, ...],
    photos: Path | None,
    generator: Path | None,
    teacher: Path | None,
    negatives: Path | None,
    begin: Path | None,
    out: Path,
    as_json: bool,
    **ray: Any,
) -> None:
    """Semi-supervised training of the retrieval network on labelled and pseudo pairs (Eq. 7).

    With --photos alone this is one command: the photos are traced to strokes, these are pseudo
    sketches, and by `--set negatives=16` the photos are negatives too.

    Example: sbir-ray train semi --pairs chairs --photos photos --set negatives=16 --out runs/semi
    """
    from sbir_ray.train.job import Job, pseudo_inputs

    if photos is not None and (pseudo or negatives is not None):
        raise UserError("--photos: stands for --pseudo and --negatives; give these or that")
    if generator is not None and photos is None:
        raise UserError("--generator: has no --photos to draw; give them, or --pseudo")
    if photos is not None:
        _inputs(photos=photos, generator=generator, teacher=teacher)
        drawings = SketchConfig(seed=config.seed, samples=config.samples or BEST_OF)
        pseudo = _draw(out, photos, generator, teacher, drawings, ray)
        negatives = photos if config.negatives else None
    if not pseudo and negatives is None:
        raise UserError(
            "train semi: give --photos, --pseudo or --negatives; else use train retrieval"
        )
    if negatives is not None and config.negatives == 0:
        raise UserError("--negatives has no effect with negatives=0; add --set negatives=16")
    if negatives is None and config.negatives:
        raise UserError(f"negatives={config.negatives} needs photos; add --negatives PHOTOS")
    inputs = _inputs(
        pairs=pairs_dir,
        **pseudo_inputs(pseudo),
        teacher=teacher,
        negatives=negatives,
        begin=begin,
    )
    _train([Job("retrieval", str(out.resolve()), config, inputs)], as_json=as_json, **ray)


def _draw(
    out: Path,
    photos: Path,
    generator: Path | None,
    teacher: Path | None,
    drawings: SketchConfig,
    ray: Mapping[str, Any],
) -> tuple[Path, ...]:
    """The photos traced and, by a generator, drawn; what is there stays. Returns PSEUDO folders."""
    from sbir_ray.doctor import ready
    from sbir_ray.runlog import Progress
    from sbir_ray.stream.fit import Group, request_of
    from sbir_ray.stream.sketching import sketch

    made = [out.resolve() / "traced"]
    traced = dataclasses.replace(drawings, samples=1)
    drawing = Group("--actors", 1, 1.0, float(ray["gpu"]) if generator else 0.0)
    with ready(request_of(None, drawing), [out.resolve()], ray["address"]):
        sketch(photos.resolve(), made[0], "contours", traced, progress=Progress)
        if generator is not None:
            made.insert(0, out.resolve() / "drawn")
            sketch(
                photos.resolve(),
                made[0],
                str(generator),
                drawings,
                teacher=None if teacher is None else teacher.resolve(),
                gpus_per_actor=float(ray["gpu"]),
                progress=Progress,
            )
    return tuple(made)


@train.command("joint")
@PAIRS
@click.option("--photos", type=FOLDER, required=True, help="PHOTOS folder, drawn while training.")
@click.option("--teacher", type=FOLDER, help="Supervised run of F; without one it is made first.")
@click.option("--generator", type=FOLDER, help="Run of G and D; without one it is made first.")
@click.option("--sync", is_flag=True, help="The learners draw: slower, repeatable bit for bit.")
@with_actors
@OUT
@with_workers
@with_json
@with_settings(JointTraining)
def train_joint(
    config: JointTraining,
    pairs_dir: Path,
    photos: Path,
    teacher: Path | None,
    generator: Path | None,
    sync: bool,
    out: Path,
    actors: tuple[int, int] | None,
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    actor_resource: str,
    as_json: bool,
    **ray: Any,
) -> None:
    """Train F, D and G together (Algorithm 1), each for the others' benefit: generator actors draw
    unlabelled photos with the newest weights while the workers train.

    Example: sbir-ray train joint --pairs chairs --photos photos --out runs/joint --actors 1:4
    """
    from sbir_ray.train.launch import Actors
    from sbir_ray.train.tasks import joint_jobs

    if sync:
        stream = dataclasses.replace(config.stream, sync=True)
        config = dataclasses.replace(config, stream=stream)
    if config.stream.sync and (actors or cpus_per_actor or gpus_per_actor or actor_resource):
        raise UserError("--actors and their CPUs and GPUs do nothing with --sync; leave one out")
    inputs = _inputs(pairs=pairs_dir, photos=photos, teacher=teacher, generator=generator)
    jobs = joint_jobs(str(out.resolve()), config, inputs)
    least, most = actors or (1, 1)
    drawing = Actors(least, most, cpus_per_actor or 1.0, gpus_per_actor or 0.0, actor_resource)
    _train(jobs, as_json=as_json, actors=drawing, **ray)
