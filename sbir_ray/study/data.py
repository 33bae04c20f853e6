"""What the trainings of a study learn from: labelled pairs, and photos without sketches.

All photos that may be in some pool go through ``ingest`` once. The pool of one share of labels and
one seed is the part of them that is not labelled there, so a smaller share hides more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from sbir_ray.data.atomic import new_folder
from sbir_ray.data.pairs import hash_of, iter_photos, iter_sketches, split_labels
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoRow, read_store
from sbir_ray.errors import UserError
from sbir_ray.places import place, read_table, remove_tree, write_table
from sbir_ray.runlog import Ledger, Progress, versions, write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION

_SHARD_ROWS = 512
_ROW_GROUP = 64


@dataclass(frozen=True, slots=True)
class Cell:
    """What one training may learn from."""

    labels: float
    """Share of the training photos that keep their sketches."""
    seed: int
    """Of the choice which, and of everything else."""
    pairs: str
    """PAIRS folder with the labelled pairs."""
    whole: str
    """PAIRS folder with all labels, whose held-out photos are measured on."""
    pool: str
    """PHOTOS folder of the photos without sketches; "" if there are none."""
    photos: int
    """How many the pool has."""
    part: int | None = None
    """How many of them were taken, if not all."""
    fold: int = 0
    """Number of ``whole`` among the study's PAIRS folders."""

    @property
    def labelled(self) -> str:
        """Where those runs lie for which the pool does not matter, ``labels-0.4/seed-0``."""
        return f"labels-{self.labels:g}/seed-{self.seed}"

    @property
    def name(self) -> str:
        """Where the others lie, ``labels-0.4/seed-0/photos-200`` where a part was taken."""
        return self.labelled + ("" if self.part is None else f"/photos-{self.part}")


def prepare(
    out: Path,
    folds: Sequence[Path],
    photos: Path | None,
    shares: Iterable[float],
    seeds: Iterable[int],
    progress: Callable[[str], Progress],
) -> list[Cell]:
    """The cells of all shares and seeds, made where they are missing. Needs a Ray that is up.

    Args:
        out: folder of the study's data.
        folds: PAIRS folders with all labels; the seeds take them in turn.
        photos: PHOTOS folder of photos without sketches, if there are any.
        progress: makes a progress line from a title.

    Raises:
        UserError: the folders cannot be used, or a share leaves one part empty.
    """
    shares, seeds = list(shares), list(seeds)
    hiding = any(share < 1 for share in shares)
    for fold, pairs in enumerate(folds):
        drawn = {row["photo_id"] for row in iter_sketches(pairs, {"train"})}
        undrawn = any(row["photo_id"] not in drawn for row in iter_photos(pairs, {"train"}))
        everything = out / _of_fold("photos", fold)
        if not _made(everything) and (photos is not None or hiding or undrawn):
            from sbir_ray.stream.ingest import ingest

            sources = [pairs, *([photos] if photos is not None else [])]
            ingest(sources, everything, exclude=[pairs], progress=progress)
    return [
        _cell(out, folds, turn % len(folds), share, seed)
        for share in shares
        for turn, seed in enumerate(seeds)
    ]


def _of_fold(name: str, fold: int) -> str:
    return f"{name}-of-fold-{fold}" if fold else name


def _cell(out: Path, folds: Sequence[Path], fold: int, share: float, seed: int) -> Cell:
    pairs, everything = folds[fold], out / _of_fold("photos", fold)
    folder = out / f"labels-{share:g}" / f"seed-{seed}"
    labelled = pairs
    if share < 1:
        labelled = folder / "pairs" / "labelled"
        if not (labelled / "pairs.json").exists():
            # Of a copy to an object store that was stopped.
            remove_tree(folder / "pairs")
            split_labels(pairs, share, seed, folder / "pairs")
    ids: set[str] = set()
    pool = folder / "photos" if share < 1 else folder.parent / _of_fold("photos", fold)
    if _made(everything):
        ids = _ids(everything) - {row["photo_id"] for row in iter_sketches(labelled, {"train"})}
    if ids:
        _part_of(everything, pool, ids)
    there = str(pool) if ids else ""
    return Cell(share, seed, str(labelled), str(pairs), there, len(ids), fold=fold)


def part_of_pool(out: Path, cell: Cell, count: int) -> Cell:
    """The cell with ``count`` of its photos; those of a smaller count are among them.

    Args:
        out: folder of the study's data.

    Raises:
        UserError: the pool has not so many.
    """
    if count > cell.photos:
        raise UserError(
            f"--counts {count}: only {cell.photos} photos are without a sketch at "
            f"labels={cell.labels:g}; choose fewer, or give more --photos"
        )
    part = replace(cell, photos=count, pool="", part=count)
    if not count:
        return part
    ids = sorted(_ids(place(cell.pool)), key=lambda photo: (hash_of(cell.seed, photo), photo))
    pool = out / part.name / "photos"
    _part_of(place(cell.pool), pool, set(ids[:count]))
    return replace(part, pool=str(pool))


def _made(store: Path) -> bool:
    """Whether a photo store is whole: its header comes last."""
    return (store / "store.json").exists()


def _ids(store: Path) -> set[str]:
    shards = sorted((store / "shards").glob("part-*.parquet"))
    return {
        photo
        for shard in shards
        for photo in read_table(shard, columns=["photo_id"])["photo_id"].to_pylist()
    }


def _part_of(store: Path, out: Path, ids: Collection[str]) -> None:
    """Write these photos of a store as a store of their own, unless it is there."""
    if _made(out):
        return
    remove_tree(out)
    with new_folder(out) as folder:
        (folder / "shards").mkdir()
        rows: list[PhotoRow] = []
        for row in read_store(store):
            if row["photo_id"] in ids:
                rows.append(row)
            if len(rows) == _SHARD_ROWS:
                _write(rows, folder / "shards")
        if rows:
            _write(rows, folder / "shards")
        ledger = Ledger("photos", len(ids))
        ledger.add("stored", count=len(ids))
        # Drawings are kept by the digest of this file, so it has to tell one part from another.
        digest = hashlib.sha256("".join(sorted(ids)).encode()).hexdigest()
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "photos",
            "settings": {"part_of": str(store), "photo_ids": digest},
            "ledger": ledger.to_json(),
            "versions": versions(),
        }
        write_json_atomic(folder / "store.json", header)


def _write(rows: list[PhotoRow], shards: Path) -> None:
    """The rows as the next shard; ``rows`` is empty after it."""
    file = shards / f"part-{len(list(shards.iterdir())):05d}.parquet"
    table = pa.Table.from_pylist(rows, schema=PHOTO_SCHEMA)
    # JPEG files do not get smaller, and no two of them are equal.
    write_table(table, file, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False)
    rows.clear()
