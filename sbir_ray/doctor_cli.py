"""The command that looks before anything starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from sbir_ray.cli_options import FOLDER, show, with_actors, with_json, with_workers
from sbir_ray.errors import UserError


@click.command()
@click.option(
    "--storage",
    type=FOLDER,
    multiple=True,
    metavar="PLACE",
    help="Has to be read and written from every node; may be repeated.",
)
@click.option(
    "--trials", type=click.IntRange(1), default=1, show_default=True, help="Runs side by side."
)
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=0.0,
    metavar="SECONDS",
    help="Give nodes that are starting so long to come.",
)
@with_actors
@with_workers
@with_json
def doctor(
    storage: tuple[Path, ...],
    trials: int,
    wait: float,
    actors: tuple[int, int] | None,
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    actor_resource: str,
    workers: int,
    cpus_per_worker: float | None,
    gpu: bool,
    worker_resource: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Whether a cluster can run a request: do its processes fit, do all nodes reach the storage,
    are versions the same, can PyTorch use the GPUs, is there room in /dev/shm and on disk.

    Takes the options of training and drawing, and says what to change. Without --actors no actors
    are counted. Ends with exit code 2 when something is wrong.

    Example: sbir-ray doctor --workers 4 --gpu --actors 8 --storage s3://bucket/runs
    """
    from sbir_ray.doctor import check_resources, examine
    from sbir_ray.stream.cluster import connect, nodes
    from sbir_ray.stream.fit import Group, request_of

    training = Group("--workers", workers, cpus_per_worker or 1.0, float(gpu), worker_resource)
    drawing = None
    if actors is not None:
        drawing = Group(
            "--actors", actors[0], cpus_per_actor or 1.0, gpus_per_actor or 0.0, actor_resource
        )
    elif cpus_per_actor or gpus_per_actor or actor_resource:
        raise UserError("the actors' CPUs, GPUs and resource do nothing without --actors")
    request = request_of(training if workers else None, drawing, trials)
    with connect(address):
        end = time.monotonic() + wait
        while not check_resources(nodes(), request).ok and time.monotonic() < end:
            time.sleep(1.0)
        findings = examine(request, storage)
    bad = [finding for finding in findings if not finding.ok]
    result: dict[str, Any] = {
        "ok": not bad,
        "findings": [vars(finding) for finding in findings],
    }
    show(result, as_json, "\n".join(finding.line() for finding in findings))
    if bad:
        raise UserError(
            f"{len(bad)} of {len(findings)} checks found something to change, see above"
        )
