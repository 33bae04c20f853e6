"""Options that several commands share, and how a command shows its result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sbir_ray import config as settings
from sbir_ray import strict
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import place, reach

F = TypeVar("F", bound=Callable[..., Any])


class Folder(click.ParamType[Path]):
    """A path, or the URI of a place in an object store, which is asked for at once."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See :func:`sbir_ray.places.place`."""
        found = place(value)
        if ctx is None or not ctx.meta.get(ELSEWHERE):
            reach(found)
        return found


FOLDER = Folder()
ELSEWHERE = "sbir_ray.elsewhere"
"""Set in the context of a command that is only read here, and runs on another machine."""
PAIRS = click.option("--pairs", "pairs_dir", type=FOLDER, required=True, help="PAIRS folder.")
OUT = click.option("--out", type=FOLDER, required=True, help="Run folder to write or resume.")


def with_settings(cls: type[Any], seed: bool = True) -> Callable[[F], F]:
    """``--config``, ``--set`` and ``--seed``, handed to the command as one ``config``."""

    def decorate(command: F) -> F:
        def with_config(config_file: Path | None, sets: tuple[str, ...], **rest: Any) -> Any:
            chosen = list(sets)
            if seed and rest.get("seed") is not None:
                chosen.append(f"seed={rest['seed']}")
            rest.pop("seed", None)
            return command(config=strict.load(cls, config_file, chosen), **rest)

        wrapped: Any = with_config
        wrapped.__doc__ = command.__doc__
        wrapped.__name__ = command.__name__
        wrapped.__click_params__ = getattr(command, "__click_params__", [])
        if seed:
            wrapped = click.option("--seed", type=int, help="Seed of all random choices.")(wrapped)
        wrapped = click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="KEY=VALUE",
            help=f"One setting, for example {_example(cls)}; may be repeated. "
            f"`sbir-ray settings {NAMES[cls]}` lists them.",
        )(wrapped)
        wrapped = click.option(
            "--config", "config_file", type=FOLDER, metavar="FILE.toml", help="Settings as TOML."
        )(wrapped)
        return wrapped  # type: ignore[no-any-return]

    return decorate


NAMES: dict[type[Any], str] = {
    settings.RetrievalTraining: "retrieval",
    settings.GeneratorTraining: "generator",
    settings.IngestConfig: "ingest",
    settings.SketchConfig: "sketch",
    settings.ChoiceConfig: "choice",
    JointTraining: "joint",
}


def _example(cls: type[Any]) -> str:
    examples = {
        settings.RetrievalTraining: "optim.lr=2e-4",
        settings.GeneratorTraining: "model.backbone=mobilenetv2",
        settings.IngestConfig: "longest=256",
        settings.SketchConfig: "filters.min_certainty=0.3",
        JointTraining: "policy.kind=reinforce",
    }
    return examples[cls]


def with_json(command: F) -> F:
    """``--json``, handed to the command as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(
        command
    )


def with_ray(command: F) -> F:
    """``--address``."""
    return click.option(
        "--address",
        metavar="HOST:PORT",
        help="Ray cluster to use (or RAY_ADDRESS); without one a local Ray is started.",
    )(command)


class Range(click.ParamType[tuple[int, int]]):
    """``2`` or ``1:4``."""

    name = "MIN:MAX"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Least and most."""
        if isinstance(value, tuple):
            return value
        least, colon, most = str(value).partition(":")
        if not least.isdigit() or not (most if colon else least).isdigit():
            self.fail(f"{value}: write it as 2 or as 1:4", param, ctx)
        return int(least), int(most if colon else least)


def with_actors(command: F) -> F:
    """``--actors``, ``--cpus-per-actor``, ``--gpus-per-actor``, None where not given, and
    ``--actor-resource``."""
    for option in (
        click.option(
            "--actor-resource",
            default="",
            metavar="NAME",
            help="Draw only on nodes with this custom resource.",
        ),
        click.option("--gpus-per-actor", type=float, help="May be a fraction."),
        click.option("--cpus-per-actor", type=float, help="1 by default."),
        click.option(
            "--actors",
            type=Range(),
            metavar="MIN:MAX",
            help="Processes that draw, at least and at most.",
        ),
    ):
        command = option(command)
    return command


def with_workers(command: F) -> F:
    """``--workers``, ``--cpus-per-worker``, ``--gpu``, ``--worker-resource``, ``--address``."""
    for option in (
        click.option(
            "--worker-resource",
            default="",
            metavar="NAME",
            help="Train only on nodes with this custom resource.",
        ),
        click.option("--gpu", is_flag=True, help="One GPU for each worker."),
        click.option(
            "--cpus-per-worker",
            type=click.FloatRange(0, min_open=True),
            help="CPUs and threads of each; by default all of this machine's, shared evenly.",
        ),
        click.option(
            "--workers",
            type=click.IntRange(0),
            default=1,
            show_default=True,
            help="Ray Train workers that share each batch; 0: this process, without Ray.",
        ),
    ):
        command = option(command)
    return with_ray(command)


def show(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result, as JSON or in words."""
    click.echo(json.dumps(result, indent=1) if as_json else text)
