"""The commands of studies: many trainings that differ in one thing, one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from sbir_ray.cli_options import FOLDER, show, with_json, with_ray, with_settings
from sbir_ray.errors import SbirError, UserError
from sbir_ray.joint_config import JointTraining

F = TypeVar("F", bound=Callable[..., Any])


class Numbers(click.ParamType[tuple[float, ...]]):
    """Numbers divided by commas."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], least: float, most: float = float("inf")):
        self.kind, self.least, self.most = kind, least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """A sorted tuple of different numbers."""
        if isinstance(value, tuple):
            return value
        try:
            found = {self.kind(part) for part in str(value).split(",")}
        except ValueError:
            self.fail(f"{value}: write numbers divided by commas, as 1,2", param, ctx)
        odd = [number for number in found if not self.least <= number <= self.most]
        if odd:
            self.fail(f"{odd[0]}: is not from {self.least:g} to {self.most:g}", param, ctx)
        return tuple(sorted(found))


@click.group()
def study() -> None:
    """Many trainings that differ in one thing, over several seeds, in one table with intervals.

    Each training is a task of Ray, as many at a time as there is room for. The same command again
    does what is missing; more seeds or rows are added to what is there.
    """


def _with_common(command: F) -> F:
    """The options of all studies, in this order in the help."""
    for option in reversed(
        [
            click.option(
                "--pairs",
                type=FOLDER,
                multiple=True,
                required=True,
                help="PAIRS folder; several, as those of `pairs import --fold K/N`, are taken by "
                "the seeds in turn.",
            ),
            click.option(
                "--photos",
                type=FOLDER,
                help="PHOTOS folder: photos without sketches, beside those whose are hidden.",
            ),
            click.option("--out", type=FOLDER, required=True, help="STUDY folder."),
            click.option(
                "--seeds",
                type=click.IntRange(1),
                default=3,
                show_default=True,
                help="Trainings of each row, with seeds from --seed on.",
            ),
            click.option(
                "--split",
                type=click.Choice(["val", "test"]),
                default="val",
                show_default=True,
                help="What is measured on.",
            ),
            click.option(
                "--gallery", type=FOLDER, help="PHOTOS folder whose photos are searched as well."
            ),
            click.option(
                "--parallel",
                type=click.IntRange(1),
                help="Trainings at a time; by default as many as there is room for.",
            ),
            click.option(
                "--cpus-per-run",
                type=click.FloatRange(0, min_open=True),
                default=1.0,
                show_default=True,
                help="CPUs and threads of each.",
            ),
            click.option("--gpu", is_flag=True, help="One GPU for each."),
        ]
    ):
        command = option(command)
    return command


_LABELS = click.option(
    "--labels",
    type=Numbers(float, 1e-6, 1),
    default="0.4",
    show_default=True,
    help="Share of the training photos that keep their sketches.",
)


class Names(click.ParamType[tuple[str, ...]]):
    """Names divided by commas."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """A tuple of them."""
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in str(value).split(","))


_ROWS = click.option(
    "--rows",
    type=Names(),
    default=(),
    metavar="NAME,NAME",
    help="Some rows alone, as supervised,full.",
)
_AGAINST = click.option(
    "--against",
    metavar="NAME",
    default="supervised",
    show_default=True,
    help="The row that the others are compared with.",
)
_JUDGE = click.option(
    "--judge",
    type=FOLDER,
    metavar="RUN",
    help="Run of a retrieval network that judges drawings; by default one is trained on all "
    "labels of PAIRS, with another seed.",
)


@study.command()
@_with_common
@_LABELS
@_ROWS
@_AGAINST
@_JUDGE
@with_ray
@with_json
@with_settings(JointTraining)
def ablation(**options: Any) -> None:
    """What each part of the method brings (the paper's Table 3), and what simpler ways do.

    Rows: supervised, full (joint training), no-weighting, no-teacher, paper-generator (where the
    generator is another), no-attention (of the paper's generator), no-joint, vanilla (none of the
    four), no-policy, policy-reinforce, policy-soft, policy-both (other rewards for G than
    policy.kind), negatives (photos as negatives alone), contours and edges (as pseudo sketches).
    All have as many updates of F.

    Example: sbir-ray study ablation --pairs chairs --out studies/ablation --labels 0.4 --seeds 3
    """
    _study("ablation", **options)


@study.command()
@_with_common
@click.option(
    "--labels",
    type=Numbers(float, 1e-6, 1),
    default="0.2,0.4,0.6,0.8,1",
    show_default=True,
    help="Shares of the training photos that keep their sketches.",
)
@_ROWS
@_AGAINST
@with_ray
@with_json
@with_settings(JointTraining)
def labels(**options: Any) -> None:
    """Accuracy by the share of labels (Fig. 4b of the paper), with all controls.

    Rows of each share: supervised, negatives (photos as negatives alone), edges and contours (as
    pseudo sketches), contours-negatives (both), paper-drawings and drawings (the best of 4
    drawings of each photo, chosen by the teacher), mixed (these, contours and negatives), full
    (joint training), people and people-mixed (the hidden sketches of photos in the place of
    drawings: ceilings); by name also those of `study ablation`. All have as many updates of F. At
    a share of 1 no sketch is hidden, and the photos without sketches are those of --photos. The
    same command with another --against compares anew at once. With folds every photo is measured
    on, by one seed or more.

    Example: sbir-ray study labels --pairs chairs --photos photos --labels 0.1,0.2 --rows
    supervised,negatives,contours,mixed --against negatives --out studies/labels

    sbir-ray study labels --pairs chairs-0 --pairs chairs-1 --pairs chairs-2 --seeds 3 --photos
    photos --out studies/folds
    """
    _study("labels", several=True, **options)


@study.command()
@_with_common
@_LABELS
@click.option(
    "--counts",
    type=Numbers(int, 0),
    help="Numbers of photos; by default 0, and doubling up to all.",
)
@with_ray
@with_json
@with_settings(JointTraining)
def photos(counts: tuple[int, ...] | None, **options: Any) -> None:
    """Accuracy by the number of photos without sketches: joint training, photos as negatives alone,
    contour tracing.

    Example: sbir-ray study photos --pairs chairs --out studies/photos --counts 0,60,120
    """
    _study("photos", counts=counts or (), **options)


@study.command()
@_with_common
@_LABELS
@_JUDGE
@with_ray
@with_json
@with_settings(JointTraining)
def generation(**options: Any) -> None:
    """How well drawings of held-out photos find their photo (the paper's Table 1).

    Those of the generator before and after joint training, of contour tracing, of edge maps, and
    people's sketches as the ceiling; searched with a network that had no part in them.

    Example: sbir-ray study generation --pairs chairs --out studies/generation --labels 0.4
    """
    _study("generation", **options)


def _study(
    name: Literal["ablation", "labels", "photos", "generation"],
    *,
    config: JointTraining,
    out: Path,
    labels: tuple[float, ...],
    split: Literal["val", "test"],
    parallel: int | None,
    cpus_per_run: float,
    gpu: bool,
    address: str | None,
    as_json: bool,
    several: bool = False,
    **request: Any,
) -> None:
    from sbir_ray.runlog import Progress
    from sbir_ray.study.run import Request, run_study

    if len(labels) > 1 and not several:
        shares = ",".join(f"{share:g}" for share in labels)
        raise UserError(f"--labels {shares}: give one; `sbir-ray study labels` varies it")
    units = {"study": "units of work"}
    result = run_study(
        Request(study=name, config=config, labels=labels, split=split, **request),
        out,
        parallel=parallel,
        cpus=cpus_per_run,
        gpu=gpu,
        address=address,
        progress=lambda title: Progress(title, unit=units.get(title, "photos")),
    )
    text = result.pop("text")
    show(result, as_json, text)
    if result["failed"]:
        raise SbirError(
            f"{out}: {len(result['failed'])} pieces failed, see study.md and failures/; the same "
            "command tries them again"
        )
