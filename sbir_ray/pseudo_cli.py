"""The commands that look at a PSEUDO folder and choose its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from sbir_ray import config as settings
from sbir_ray import strict
from sbir_ray.cli_options import FOLDER, show, with_json

PSEUDO = click.argument("folder", metavar="PSEUDO", type=FOLDER)


@click.group()
def pseudo() -> None:
    """Pseudo pairs: look at them, choose which drawings count, take them elsewhere."""


@pseudo.command("ls")
@PSEUDO
@with_json
def list_rounds(folder: Path, as_json: bool) -> None:
    """List the rounds: who drew, with which settings, and how many drawings each added.

    The newest round is what is trained on, with the drawings of earlier ones marked `used`.

    Example: sbir-ray pseudo ls pseudo
    """
    from sbir_ray.stream.pseudo_views import rounds

    found = rounds(folder)
    lines = [
        f"round {entry['round']}: {entry['drawings']:,} drawings by {entry['sketcher']} "
        f"{entry['generator_version']} ({entry['generator_digest']}), settings "
        f"{entry['settings_digest'] or 'unknown'}{', used' if entry['used'] else ''}"
        for entry in found
    ]
    show({"rounds": found}, as_json, "\n".join(lines))


@pseudo.command("stats")
@PSEUDO
@with_json
def show_stats(folder: Path, as_json: bool) -> None:
    """Count the drawings by fate, and tell how certain they are, by tenths and by round.

    Example: sbir-ray pseudo stats pseudo --json
    """
    from sbir_ray.runlog import Ledger
    from sbir_ray.stream.pseudo_views import stats

    found = stats(folder)
    ledger = Ledger.from_json("pseudo", found["ledger"], str(folder))
    lines = [f"{found['photos']:,} photos, {found['pairs']:,} pairs", str(ledger)]
    for name in ("points", "strokes", "certainty"):
        if name in found:
            spread = ", ".join(f"{key} {value:.3g}" for key, value in found[name].items())
            lines.append(f"{name} of the pairs: {spread}")
    for tenth in found["deciles"]:
        ranked = f", median rank {tenth['median_rank']:g}" if "median_rank" in tenth else ""
        lines.append(
            f"certainty {tenth['high']:.3f} to {tenth['low']:.3f}: {tenth['drawings']:,} drawings, "
            f"{tenth['kept']:.0%} kept{ranked}"
        )
    for entry in found["rounds"]:
        sure = "" if entry["certainty"] is None else f", mean certainty {entry['certainty']:.3f}"
        lines.append(
            f"round {entry['round']} by {entry['sketcher']} {entry['generator_version']}: "
            f"{entry['drawings']:,} drawings{sure}"
        )
    show(found, as_json, "\n".join(lines))


@pseudo.command("show")
@PSEUDO
@click.option("--out", type=FOLDER, required=True, metavar="FILE.png", help="Picture to write.")
@click.option("--count", type=int, default=24, show_default=True, help="Pairs.")
@click.option("--side", type=click.IntRange(16, 1024), default=128, show_default=True)
@click.option("--all", "every", is_flag=True, help="Drawings that are not kept as well.")
@with_json
def show_sheet(folder: Path, out: Path, count: int, side: int, every: bool, as_json: bool) -> None:
    """Draw a sheet of pairs from the most to the least certain: photo, sketch, certainty.

    Example: sbir-ray pseudo show pseudo --out sheet.png
    """
    from sbir_ray.stream.pseudo_views import write_sheet

    shown = write_sheet(folder, out, count=count, side=side, kept_only=not every)
    show({"sheet": str(out), "pairs": shown}, as_json, f"{out}: {shown} pairs")


@pseudo.command("prune")
@PSEUDO
@click.option("--config", "config_file", type=FOLDER, metavar="FILE.toml", help="Settings as TOML.")
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, for example filters.min_certainty=0.3; may be repeated. `sbir-ray settings "
    "choice` lists them.",
)
@click.option("--dry-run", is_flag=True, help="Only tell what would be kept.")
@click.option("--old-rounds", is_flag=True, help="Remove rounds that the newest does not use.")
@with_json
def prune(
    folder: Path,
    config_file: Path | None,
    sets: tuple[str, ...],
    dry_run: bool,
    old_rounds: bool,
    as_json: bool,
) -> None:
    """Choose anew which drawings become pairs; nothing is drawn again, and none is lost.

    Settings that are not given stay as they are. A looser choice brings drawings back.

    Example: sbir-ray pseudo prune pseudo --set filters.min_certainty=0.3 --set filters.max_rank=20
    """
    from sbir_ray.stream.pseudo_rounds import forget_old, writing
    from sbir_ray.stream.pseudo_store import (
        account,
        choice_of,
        read_header,
        refilter,
        refuse_choice,
    )

    header = read_header(folder)
    choice = strict.load(settings.ChoiceConfig, config_file, sets, choice_of(header))
    result: dict[str, Any] = {"choice": strict.to_dict(choice)}
    lines = []
    if dry_run:
        refuse_choice(choice, header, folder)
        ledger = account(folder, header, choice)
    else:
        with writing(folder, (0, 1)):
            ledger = refilter(folder, choice)
            if old_rounds:
                result["removed"] = forget_old(folder)
                lines = [f"removed {len(result['removed'])} rounds"]
    show({**result, **ledger.to_json()}, as_json, "\n".join([f"{folder}: {ledger}", *lines]))


@pseudo.command("export")
@PSEUDO
@click.option("--out", type=FOLDER, required=True, help="File or folder to write.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["svg", "png", "ndjson", "npz"]),
    required=True,
    help="A folder of SVG or PNG files; a file of QuickDraw ndjson or of stroke-3 arrays.",
)
@click.option(
    "--side", type=click.IntRange(16, 4096), default=256, show_default=True, help="Of a PNG."
)
@with_json
def export_sketches(
    folder: Path,
    out: Path,
    kind: Literal["svg", "png", "ndjson", "npz"],
    side: int,
    as_json: bool,
) -> None:
    """Write the sketches of the pairs, each named PHOTO_SAMPLE, for other programs.

    Example: sbir-ray pseudo export pseudo --format ndjson --out pseudo.ndjson
    """
    from sbir_ray.stream.pseudo_views import export

    count = export(folder, out, kind, side)
    show({"out": str(out), "sketches": count}, as_json, f"{out}: {count} sketches")
