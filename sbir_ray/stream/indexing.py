"""The photos of a store embedded by actors: an INDEX folder made, or brought up to date.

A Ray Data pipeline as of :mod:`sbir_ray.stream.sketching`: tasks read and align photos, actors
embed them, tasks write parts. Photos that the index has already are not embedded again; a part that
was written before a kill is taken as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from sbir_ray.data.photos import store_header
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import is_local
from sbir_ray.runlog import Ledger, Progress, locked, versions, write_json_atomic
from sbir_ray.stream.cluster import quiet_data, room_for_actors
from sbir_ray.stream.disk import disk_told
from sbir_ray.stream.filters import embedded
from sbir_ray.stream.fit import SPARE_SKETCH, sent_to
from sbir_ray.stream.index_store import HEADER, part_schema, read_header, read_part, write_part
from sbir_ray.stream.sketch_blocks import (
    PhotoBlock,
    numbers_of,
    photo_ids,
    plan_blocks,
    read_photos,
    shards_of,
)
from sbir_ray.stream.sketching import PICTURE
from sbir_ray.strict import SCHEMA_VERSION, digest

_BATCH = 64
"""Photos that an actor embeds at once."""
_COLUMNS = ("photo_id", "name", "uri", "image")
_WRITTEN = pa.schema([("file", pa.string()), ("rows", pa.int64()), ("failed", pa.int64())])

Entry = dict[str, Any]
"""``file`` and ``rows`` of a part, as the header has them."""


class Indexed(NamedTuple):
    """What became of the photos of a store."""

    ledger: Ledger
    new: int
    """Photos that were embedded now."""
    before: int
    """Photos that the index had."""
    removed: int
    """Photos that it had and the store has no more."""


def index(
    photos: Path,
    out: Path,
    run: Path,
    *,
    actors: tuple[int, int] = (1, 2),
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
    actor_resource: str = "",
    progress: Callable[[str], Progress] = Progress,
) -> Indexed:
    """Make the index of a photo store, or bring it up to date. Needs a Ray that is up.

    What is in the store and not in the index is embedded and added; what the store has no more is
    left out; where the weights or the store's pictures are others, all is embedded again. Until the
    end the index is what it was before.

    Args:
        photos: PHOTOS folder.
        out: INDEX folder.
        run: RUN folder of the retrieval network that embeds.
        actors: least and most processes that embed.
        cpus_per_actor, gpus_per_actor: of each; a GPU may be shared.
        actor_resource: custom resource of the nodes that embed; any by default.
        progress: makes a progress line from a title.

    Raises:
        UserError: the store or the run cannot be used, the actors do not fit into the cluster,
            ``out`` is in an object store or holds something else, another run writes it, its disk
            is full.
        DamagedError: the run is damaged. What is damaged of the index is made again.
    """
    from sbir_ray.runs import load_retrieval

    if not is_local(out):
        raise UserError(f"{out}: an index is mapped into memory; give a folder of this machine")
    quiet_data()
    trained = load_retrieval(run)
    dim, size = trained.model.dim, trained.model.config.image_size
    settings = store_header(photos).get("settings", {})
    made_by = {
        "weights": trained.digest,
        "dim": dim,
        "image_size": size,
        "pictures": {name: settings.get(name) for name in PICTURE},
    }
    least, most = actors
    room = room_for_actors(
        actors, cpus_per_actor, gpus_per_actor, actor_resource, spare_cpus=SPARE_SKETCH
    )
    with disk_told(out), _writing(out):
        there = numbers_of(photo_ids(shards_of(photos)))
        kept = _kept(out, f"part-{digest(made_by)}", there, dim)
        plan = plan_blocks(photos, _BATCH, kept.numbers if len(kept.numbers) else None)
        new, failed, parts = 0, 0, list(kept.parts)
        with progress("index") as bar:
            bar.update(0, sum(block.rows for block in plan))
            written = _pipeline(
                plan,
                size,
                {
                    # Actors run in other folders.
                    "run": run.absolute(),
                    "device": "cuda" if gpus_per_actor else "cpu",
                    "threads": max(1, int(cpus_per_actor)),
                },
                {"target": str(out.absolute()), "prefix": kept.prefix},
                ActorPoolStrategy(min_size=least, max_size=most, initial_size=min(most, room)),
                {
                    "num_cpus": cpus_per_actor,
                    "num_gpus": gpus_per_actor,
                    **sent_to(actor_resource),
                },
            )
            for row in written if plan else ():
                new, failed = new + row["rows"], failed + row["failed"]
                if row["rows"]:
                    parts.append({"file": row["file"], "rows": row["rows"]})
                bar.update(new + failed, note=f"{failed} failed" if failed else "")
        ledger = Ledger("index", len(there))
        ledger.add("indexed", count=sum(part["rows"] for part in parts))
        if failed:
            ledger.add("failed", "damaged-photo", failed)
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "index",
            **made_by,
            "run": str(run.absolute()),
            "step": trained.version,
            "photos": str(photos),
            "parts": parts,
            "ledger": ledger.to_json(),
            "versions": versions(),
        }
        write_json_atomic(out / HEADER, header)
        _tidy(out, parts)
        return Indexed(ledger, new, len(kept.numbers), kept.removed)


# --------------------------------------------------------------------------- what is there


class _Kept(NamedTuple):
    """What of an index stays."""

    prefix: str
    """How the names of parts begin that were made in the same way."""
    parts: list[Entry]
    numbers: NDArray[np.uint64]
    """``numbers_of`` their photos."""
    removed: int
    """Photos that it had and the store has no more."""


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """``out`` for this process alone; refuses a folder of something else."""
    if out.exists() and not (out / HEADER).exists():
        others = [e.name for e in out.iterdir() if not e.name.startswith((".", "part-", "lock"))]
        if others:
            raise UserError(f"{out}: holds something else ({others[0]}); choose another folder")
    with locked(out):
        yield


def _kept(out: Path, prefix: str, there: NDArray[np.uint64], dim: int) -> _Kept:
    """The parts that were made in the same way, listed or left by a run that was killed, without
    the photos that are no more in the store."""
    listed: dict[str, int] = {}
    if (out / HEADER).exists():
        with suppress(DamagedError):  # its parts are looked through as those of a killed run
            header = read_header(out)
            listed = {entry["file"]: header["dim"] for entry in header["parts"]}
    left = {file.name: dim for file in sorted(out.glob(f"{prefix}-*")) if file.name not in listed}
    there = np.sort(there)
    parts: list[Entry] = []
    seen = np.empty(0, np.uint64)
    found: list[NDArray[np.uint64]] = []
    removed = 0
    for name, its_dim in {**listed, **left}.items():
        if name not in listed and found:
            seen = np.sort(np.concatenate(found))
        try:
            table = read_part(out / name, its_dim)
        except DamagedError:  # its photos are embedded again
            continue
        numbers = numbers_of(table["photo_id"].to_pylist())
        stays = _among(numbers, there)
        removed += int((~stays).sum()) if name in listed else 0
        if not name.startswith(f"{prefix}-"):
            continue
        stays &= ~_among(numbers, seen)
        if stays.any():
            if not stays.all():
                name = write_table(table.filter(pa.array(stays)), out, prefix)
            parts.append({"file": name, "rows": int(stays.sum())})
            found.append(numbers[stays])
    return _Kept(prefix, parts, np.concatenate([np.empty(0, np.uint64), *found]), removed)


def _among(numbers: NDArray[np.uint64], those: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``numbers`` are in ``those``, which are sorted."""
    if not len(those):
        return np.zeros(len(numbers), bool)
    place = np.searchsorted(those, numbers).clip(max=len(those) - 1)
    return np.asarray(those[place] == numbers)


def _tidy(out: Path, parts: Sequence[Entry]) -> None:
    """Remove parts that are not listed, and what was half written when a process ended."""
    listed = {entry["file"] for entry in parts}
    for file in (*out.glob("part-*"), *out.glob(".part-*"), *out.glob(f".{HEADER}.*")):
        if file.name not in listed:
            file.unlink()


# --------------------------------------------------------------------------- the pipeline


def _pipeline(
    plan: Sequence[PhotoBlock],
    image_size: int,
    embedder: dict[str, Any],
    writer: dict[str, Any],
    pool: ActorPoolStrategy,
    each: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Run it; a row of :data:`_WRITTEN` for each part, as they come.

    Args:
        embedder, writer: arguments of :class:`Embedder` and :func:`write_embedded`.
        pool, each: of the actors: how many, and what each takes.
    """
    tables: dict[str, Any] = {"batch_format": "pyarrow"}
    dataset = (
        ray.data.from_arrow([block.to_table() for block in plan])
        .map_batches(
            cast(Any, read_photos),
            batch_size=1,
            fn_kwargs={"image_sizes": [image_size], "columns": _COLUMNS},
            # As of drawing: a demand of their own keeps the readers apart from the actors.
            memory=1,
            **tables,
        )
        .map_batches(
            cast(Any, Embedder),
            batch_size=_BATCH,
            compute=pool,
            fn_constructor_kwargs=embedder,
            **each,
            **tables,
        )
        .map_batches(cast(Any, write_embedded), batch_size=None, fn_kwargs=writer, **tables)
    )
    rows: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in rows:
        yield from table.to_pylist()


class Embedder:
    """Actor: embeds photos by a run's retrieval network."""

    def __init__(self, run: Path, device: str = "cpu", threads: int = 1) -> None:
        import torch

        from sbir_ray.runs import load_retrieval

        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.model = load_retrieval(run).model.to(self.device)

    def __call__(self, photos: pa.Table) -> pa.Table:
        """``photos`` of :func:`read_photos` with an ``embedding``, zeros for those with a fault."""
        size, dim = self.model.config.image_size, self.model.dim
        whole = np.array([not fault for fault in photos["fault"].to_pylist()], bool)
        found_BD = np.zeros((len(photos), dim), np.float32)
        if whole.any():
            flat = b"".join(pixels for pixels in photos[f"aligned_{size}"].to_pylist() if pixels)
            photo_B3SS = np.frombuffer(flat, np.uint8).reshape(-1, size, size, 3)
            photo_B3SS = photo_B3SS.transpose(0, 3, 1, 2)
            found = embedded(self.model.embed_photos, photo_B3SS, self.device)
            found_BD[whole] = found.float().cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(found_BD.ravel()), dim)
        return photos.select([*_COLUMNS, "fault"]).append_column("embedding", column)


def write_embedded(photos: pa.Table, target: str, prefix: str) -> pa.Table:
    """Task: photos with their embeddings as a part; returns a row of :data:`_WRITTEN`."""
    whole = photos.filter(pc.equal(photos["fault"], ""))
    name = write_table(whole.drop_columns("fault"), Path(target), prefix) if len(whole) else ""
    row = {"file": name, "rows": len(whole), "failed": len(photos) - len(whole)}
    return pa.Table.from_pylist([row], schema=_WRITTEN)


def write_table(table: pa.Table, out: Path, prefix: str) -> str:
    """A part under a name that tells its content; the name."""
    ids = "".join(table["photo_id"].to_pylist())
    name = f"{prefix}-{hashlib.sha256(ids.encode()).hexdigest()[:12]}.arrow"
    dim = table.schema.field("embedding").type.list_size
    write_part(table.select(part_schema(dim).names).cast(part_schema(dim)), out / name)
    return name
