"""The commands on the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import click

from sbir_ray.cli_options import FOLDER, show, with_json
from sbir_ray.errors import DamagedError


@click.group("checkpoint")
def checkpoint() -> None:
    """Look at, check and export the checkpoints of a run."""


@checkpoint.command("ls")
@click.argument("run", type=FOLDER)
@with_json
def list_command(run: Path, as_json: bool) -> None:
    """The checkpoints of RUN, newest first, with their score on the validation split.

    Example: sbir-ray checkpoint ls runs/semi
    """
    from sbir_ray.export import rows_of

    rows = rows_of(run)
    show({"checkpoints": rows}, as_json, "\n".join(map(_line, rows)) or f"{run}: no checkpoints")


@checkpoint.command()
@click.argument("run", type=FOLDER)
@with_json
def verify(run: Path, as_json: bool) -> None:
    """Compare every file of the checkpoints of RUN with its hash; exit code 3 if one is damaged.

    Example: sbir-ray checkpoint verify runs/semi
    """
    from sbir_ray.export import verified

    rows = verified(run)
    lines = [f"{_line(row)}  {row['fault'] or 'whole'}" for row in rows]
    show({"checkpoints": rows}, as_json, "\n".join(lines) or f"{run}: no checkpoints")
    damaged = [row["name"] for row in rows if row["fault"]]
    if damaged:
        raise DamagedError(
            f"{run}: {', '.join(damaged)} cannot be used; remove them, the others are used"
        )


@checkpoint.command("export")
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder to write.")
@click.option(
    "--which",
    default="newest",
    show_default=True,
    metavar="newest|best|STEP",
    help="best: by the validation split.",
)
@click.option("--onnx", is_flag=True, help="The retrieval network as ONNX too.")
@with_json
def export_command(run: Path, out: Path, which: str, onnx: bool, as_json: bool) -> None:
    """Write the networks of a checkpoint as safetensors with their settings as JSON.

    Example: sbir-ray checkpoint export runs/semi --which best --onnx --out model
    """
    from sbir_ray.export import export

    header = export(run, out, which, onnx)
    names = ", ".join(header["networks"])
    text = f"{out}: {names} of step {header['step']}"
    if onnx:
        text += f"; ONNX differs by {header['onnx']['difference']:.1g} at most"
    show(header, as_json, text)


def _line(row: dict[str, object]) -> str:
    score = row["score"]
    assert isinstance(score, list)
    told = " ".join(f"{value:.4f}" for value in score) or "not measured"
    best = "  best" if row["best"] else ""
    return f"{row['name']}  {row['bytes']:>12,} bytes  {told}{best}"
