"""The command that runs another one on a cluster."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from sbir_ray import strict
from sbir_ray.cli_options import ELSEWHERE, FOLDER, Folder
from sbir_ray.errors import UserError
from sbir_ray.places import is_local
from sbir_ray.submit import SubmitConfig, job_name
from sbir_ray.submit import stop as stop_job
from sbir_ray.submit import submit as submit_job


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--address", metavar="URL", help="Job server; http://127.0.0.1:8265 by default.")
@click.option("--config", "config_file", type=FOLDER, metavar="FILE.toml", help="See --set.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="address, working_dir, exclude, max_mebibytes, environment or install.",
)
@click.option("--stop", is_flag=True, help="End the job of this command; it saves first.")
@click.option("--resume", is_flag=True, help="Start it again after it failed or was stopped.")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True)
def submit(
    address: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    stop: bool,
    resume: bool,
    words: tuple[str, ...],
) -> None:
    """Run a command as a job of a cluster, and follow its log to its end; the exit code is the
    command's.

    The same command finds its job again: it follows one that runs, and does nothing when it has
    finished. Settings files travel with the working folder, data and runs do not: name places that
    all nodes share (s3://, gs://, mounted folders). The token of the cluster is read from
    RAY_AUTH_TOKEN, or the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    Example: sbir-ray submit -- train joint --pairs s3://b/chairs --photos s3://b/photos --out
    s3://b/joint --workers 4 --gpu --worker-resource train --actors 8 --actor-resource draw
    """
    if stop and resume:
        raise UserError("--stop and --resume: give one of them")
    config = strict.load(SubmitConfig, config_file, sets)
    if address:
        config = dataclasses.replace(config, address=address)
    root = click.get_current_context().find_root()
    base = job_name(read_command(root.command, words, config))
    if stop:
        stop_job(base, config, _tell)
        return
    code = submit_job(base, words, config, _say, _tell, resume)
    if code:
        sys.exit(code)


def _say(text: str) -> None:
    click.echo(text, nl=False)


def _tell(line: str) -> None:
    click.echo(line, err=True)


def read_command(
    command: click.Command, words: tuple[str, ...], config: SubmitConfig
) -> dict[str, Any]:
    """The command as plain values, with the content of its settings file.

    Raises:
        UserError: a place that other machines cannot have, a settings file that does not travel.
        click.UsageError: not a command, or not its options.
    """
    context = click.Context(command, info_name="sbir-ray")
    context.meta[ELSEWHERE] = True
    rest, names = list(words), []
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command = found
        names.append(name)
        if not isinstance(command, click.Group):
            context = command.make_context(name, rest, parent=context)
    values: dict[str, Any] = {"command": names}
    for parameter in command.params:
        value = context.params.get(str(parameter.name))
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(parameter.type, Folder) and isinstance(one, Path):
                _refuse_left_behind(parameter, one, config, values)
        values[str(parameter.name)] = _plain(value)
    return values


def _refuse_left_behind(
    parameter: click.Parameter, path: Path, config: SubmitConfig, values: dict[str, Any]
) -> None:
    if parameter.name == "config_file":
        if path.is_absolute() or not is_local(path):
            raise UserError(f"--config {path}: name it as it lies in {config.working_dir}")
        try:
            values["settings"] = (Path(config.working_dir) / path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--config {path}: cannot be read in {config.working_dir} ({error.strerror})"
            ) from error
    elif is_local(path) and not path.is_absolute():
        raise UserError(
            f"{parameter.opts[0]} {path}: is of this machine; name a place that all nodes of the "
            "cluster share, s3://BUCKET/FOLDER or a mounted folder's whole path"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
