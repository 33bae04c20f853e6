"""The command that searches for settings."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Literal

import click

from sbir_ray import strict
from sbir_ray.cli_options import FOLDER, PAIRS, show, with_json, with_ray


@click.command()
@click.argument("space_file", metavar="SPACE.toml", type=FOLDER)
@PAIRS
@click.option("--photos", type=FOLDER, help="PHOTOS folder, drawn once for all trials.")
@click.option("--pseudo", type=FOLDER, help="PSEUDO folder, if the photos are drawn already.")
@click.option("--teacher", type=FOLDER, help="Supervised run of F; without one it is made first.")
@click.option("--generator", type=FOLDER, help="Run of G and D; without one it is made first.")
@click.option("--out", type=FOLDER, required=True, help="SWEEP folder to write or go on with.")
@click.option(
    "--trials",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Configurations, the default's among them; more are added to what is there.",
)
@click.option(
    "--scheduler",
    type=click.Choice(["asha", "pbt", "none"]),
    default="asha",
    show_default=True,
    help="asha stops trials that are behind; pbt changes knobs while they train.",
)
@click.option(
    "--searcher",
    type=click.Choice(["tpe", "random"]),
    default="tpe",
    show_default=True,
    help="Who chooses the configurations: Optuna's TPE, or chance.",
)
@click.option(
    "--metric",
    type=click.Choice(["acc@1", "acc@5", "acc@10"]),
    default="acc@1",
    show_default=True,
    help="Of the validation split.",
)
@click.option(
    "--seeds",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Other seeds with which the best and the default are trained again at the end.",
)
@click.option(
    "--retries",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Times that a trial which failed is tried again.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1),
    help="Trials at a time; by default as many as there is room for.",
)
@click.option(
    "--config", "config_file", type=FOLDER, metavar="FILE.toml", help="Settings of all trials."
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="One of them, as optim.steps=120; may be repeated. `sbir-ray settings retrieval` (for a "
    "space with trains = 'semi') or `joint` lists them.",
)
@click.option("--seed", type=int, help="Of the trials and of the search.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ray Train workers of each trial.",
)
@click.option(
    "--cpus-per-worker",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="CPUs and threads of each.",
)
@click.option("--gpu", is_flag=True, help="One GPU for each worker.")
@with_ray
@with_json
def tune(
    space_file: Path,
    pairs_dir: Path,
    out: Path,
    trials: int,
    scheduler: Literal["asha", "pbt", "none"],
    searcher: Literal["tpe", "random"],
    metric: str,
    seeds: int,
    retries: int,
    parallel: int | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    seed: int | None,
    workers: int,
    gpu: bool,
    cpus_per_worker: float,
    address: str | None,
    as_json: bool,
    **folders: Path | None,
) -> None:
    """Search for better settings: trials over the ranges of SPACE.toml (see tune/), chosen by
    validation accuracy, then the best and the default again with other seeds.

    The teacher, the generator and the pseudo pairs are made once for all trials. Writes
    OUT/best.toml for `train`, OUT/report.html and OUT/tune.json. The same command goes on where it
    was ended, and repeats no finished trial; the test split is never read.

    Example: sbir-ray tune tune/filters.toml --pairs chairs --photos photos --out sweeps/filters
    """
    from sbir_ray.runlog import Progress
    from sbir_ray.tuning.page import summary
    from sbir_ray.tuning.request import Effort, Request
    from sbir_ray.tuning.run import run_sweep
    from sbir_ray.tuning.space import read_space

    space = read_space(space_file)
    chosen = [*sets, *([] if seed is None else [f"seed={seed}"])]
    config: Any = strict.load(space.training, config_file, chosen)
    request = Request(
        space=space,
        file=space_file,
        pairs=pairs_dir,
        config=config,
        metric=metric,
        searcher=searcher,
        scheduler=scheduler,
        **folders,
    )
    effort = Effort(
        trials=trials,
        retries=retries,
        seeds=seeds,
        parallel=parallel,
        workers=workers,
        cpus=cpus_per_worker,
        gpu=gpu,
        address=address,
    )
    units = {"tune": "steps", "shared": "units of work", "confirm": "units of work"}
    # Ray prints its own warnings where results belong.
    with contextlib.redirect_stdout(sys.stderr):
        result = run_sweep(
            request, effort, out, progress=lambda title: Progress(title, unit=units[title])
        )
    show(result, as_json, summary(result))
