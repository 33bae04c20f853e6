"""``sbir-ray index``, ``search`` and ``serve``: a trained network over one's own photos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from sbir_ray.cli_options import FOLDER, show, with_actors, with_json, with_ray

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sbir_ray.stream.index_store import Hit

_RUN = click.option(
    "--run", type=FOLDER, help="RUN of the network that made INDEX, if it is not where it was."
)
_GPU = click.option("--gpu", is_flag=True, help="Embed sketches on a GPU.")


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--photos", type=FOLDER, required=True, help="PHOTOS folder, as of `ingest`.")
@click.option("--out", type=FOLDER, required=True, help="INDEX folder to make or bring up to date.")
@with_actors
@with_ray
@with_json
def index(
    run: Path,
    photos: Path,
    out: Path,
    actors: tuple[int, int] | None,
    cpus_per_actor: float | None,
    gpus_per_actor: float | None,
    actor_resource: str,
    address: str | None,
    as_json: bool,
) -> None:
    """Embed the photos of a store by a trained network, to be searched by drawings.

    The same command brings OUT up to date: photos that are new in the store are embedded, those it
    has no more are left out; with other weights in RUN all are embedded again. After a kill it goes
    on. A page that serves OUT takes up what is new.

    Example: sbir-ray index runs/semi --photos photos --out shop.index --actors 1:4
    """
    from sbir_ray.doctor import ready
    from sbir_ray.runlog import Progress
    from sbir_ray.stream.fit import Group, request_of
    from sbir_ray.stream.indexing import index as run_index

    actors = actors or (1, 2)
    cpus, gpus = cpus_per_actor or 1.0, gpus_per_actor or 0.0
    embedding = Group("--actors", actors[0], cpus, gpus, actor_resource)
    with ready(request_of(None, embedding), [out.resolve()], address):
        found = run_index(
            photos.resolve(),
            out.resolve(),
            run.resolve(),
            actors=actors,
            cpus_per_actor=cpus,
            gpus_per_actor=gpus,
            actor_resource=actor_resource,
            progress=lambda title: Progress(title, unit="photos"),
        )
    result = {**found.ledger.to_json(), "new": found.new, "before": found.before}
    result["removed"] = found.removed
    text = f"{out}: {found.ledger}; {found.new:,} new, {found.removed:,} removed"
    show(result, as_json, text)


@click.command()
@click.argument("index_dir", metavar="INDEX", type=FOLDER)
@click.argument("sketches", metavar="SKETCH", type=FOLDER, nargs=-1, required=True)
@_RUN
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, metavar="K")
@click.option("--sheet", type=FOLDER, metavar="FILE.png", help="Picture of what was found.")
@_GPU
@with_json
def search(
    index_dir: Path,
    sketches: tuple[Path, ...],
    run: Path | None,
    top: int,
    sheet: Path | None,
    gpu: bool,
    as_json: bool,
) -> None:
    """Find photos by drawings: SVG, canvas JSON, QuickDraw ndjson, stroke arrays, PNG, JPG.

    A file may hold several sketches; each is searched with.

    Example: sbir-ray search shop.index chair.svg --top 5 --sheet found.png
    """
    from sbir_ray.errors import UserError
    from sbir_ray.places import write_bytes
    from sbir_ray.search.searcher import Searcher
    from sbir_ray.search.sheet import sheet_of

    searcher = Searcher(index_dir, run, "cuda" if gpu else "cpu")
    found: list[_Found] = []
    for file in sketches:
        before = len(found)
        for key, raster_SS in searcher.read(file):
            found.append(_Found(str(file), key, raster_SS, searcher.find(raster_SS, top)))
        if len(found) == before:
            raise UserError(f"{file}: holds no sketch")
    if sheet is not None:
        images = [[searcher.index.image(hit.photo_id) for hit in one.hits] for one in found]
        rasters = [one.raster_SS for one in found]
        write_bytes(sheet, sheet_of(list(zip(rasters, images, strict=True))))
    result = [
        {"file": one.file, "sketch": one.key, "found": [hit._asdict() for hit in one.hits]}
        for one in found
    ]
    lines: list[str] = []
    for one in found:
        lines.append(f"{one.file}: {one.key}")
        for place, hit in enumerate(one.hits, 1):
            lines.append(f"{place:4}  {hit.similarity:.3f}  {hit.name or hit.photo_id}")
    show({"photos": len(searcher.index), "sketches": result}, as_json, "\n".join(lines))


class _Found(NamedTuple):
    file: str
    key: str
    """Name of the sketch in the file."""
    raster_SS: NDArray[np.uint8]
    hits: list[Hit]


@click.command()
@click.argument("index_dir", metavar="INDEX", type=FOLDER)
@_RUN
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="0: a free one."
)
@_GPU
def serve(index_dir: Path, run: Path | None, port: int, gpu: bool) -> None:
    """A page to draw on, which shows the nearest photos after each stroke. For this machine alone.

    From another machine: ssh -L 8765:127.0.0.1:8765 THIS_MACHINE

    Example: sbir-ray serve shop.index
    """
    from sbir_ray.search.searcher import Searcher
    from sbir_ray.search.server import serve as run_server

    searcher = Searcher(index_dir, run, "cuda" if gpu else "cpu")

    def begun(address: str) -> None:
        click.echo(f"{len(searcher.index):,} photos; draw at {address} (Ctrl-C ends it)", err=True)

    run_server(searcher, port, begun)


COMMANDS: tuple[Any, ...] = (index, search, serve)
