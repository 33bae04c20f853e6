"""Which photos are drawn together, the same for any cluster, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import UserError
from sbir_ray.places import count_rows, open_table, place, read_table

_BLOCK_ROWS = (64, 256)
"""Most photos of a block of a small store, and of any."""
_BLOCKS = 8
_MANY_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class PhotoBlock:
    """Photos that are read and drawn together, from as many files as they lie in."""

    number: int
    runs: tuple[tuple[Path, int, int], ...]
    """Rows ``start`` to ``stop`` of a shard, by (file, start, stop)."""

    @property
    def rows(self) -> int:
        """Number of photos."""
        return sum(stop - start for _, start, stop in self.runs)

    def to_table(self) -> pa.Table:
        """One row, as :func:`read_photos` takes it."""
        files, starts, stops = zip(*self.runs, strict=True)
        return pa.table(
            {
                "block": [self.number],
                "files": [[str(file.absolute()) for file in files]],
                "starts": [list(starts)],
                "stops": [list(stops)],
            }
        )


def shards_of(photos: Path) -> list[Path]:
    """The files of a photo store, in order.

    Raises:
        UserError: not a photo store of a known version.
    """
    next(read_store(photos), None)
    return sorted((photos / "shards").glob("part-*.parquet"))


def photo_ids(files: Iterable[Path]) -> Iterator[str]:
    """Of all rows, in order."""
    for file in files:
        yield from read_table(file, columns=["photo_id"])["photo_id"].to_pylist()


def numbers_of(names: Iterable[str]) -> NDArray[np.uint64]:
    """A number for each name, others for others: the first eight bytes of a hash. Millions fit."""
    found = (int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names)
    return np.fromiter(found, np.uint64)


def plan_blocks(
    photos: Path, batch_size: int, drawn: NDArray[np.uint64] | None = None
) -> list[PhotoBlock]:
    """The blocks of a photo store: whole batches across its files, few enough rows for actors to
    share the work, enough that Ray Data costs little beside it.

    Args:
        drawn: :func:`numbers_of` the photos that are left out; the store is then looked through.

    Raises:
        UserError: not a photo store of a known version, or an empty one.
    """
    left = [
        (shard, start, stop) for shard in shards_of(photos) for start, stop in _runs(shard, drawn)
    ]
    if not left and drawn is None:
        raise UserError(f"{photos}: holds no photo; see its ledger")
    total = sum(stop - start for _, start, stop in left)
    rows = min(max(_BLOCK_ROWS[0], total // _MANY_BLOCKS), _BLOCK_ROWS[1], total // _BLOCKS)
    rows = max(1, -(-rows // batch_size)) * batch_size
    blocks: list[PhotoBlock] = []
    runs: list[tuple[Path, int, int]] = []
    room = rows
    for shard, start, stop in left:
        while start < stop:
            end = min(stop, start + room)
            runs.append((shard, start, end))
            room -= end - start
            start = end
            if not room:
                blocks.append(PhotoBlock(len(blocks), tuple(runs)))
                runs, room = [], rows
    if runs:
        blocks.append(PhotoBlock(len(blocks), tuple(runs)))
    return blocks


def _runs(shard: Path, drawn: NDArray[np.uint64] | None) -> list[tuple[int, int]]:
    """The rows of a shard that are not drawn, as start and stop."""
    if drawn is None:
        return [(0, count_rows(shard))]
    left = ~np.isin(numbers_of(photo_ids([shard])), drawn)
    edges = np.flatnonzero(np.diff(left, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def read_photos(
    plan: pa.Table, image_sizes: Sequence[int], columns: Sequence[str] = ("photo_id", "image")
) -> pa.Table:
    """Task: the photos of one block, for each size S ``aligned_S`` as bytes (S, S, 3), or ``fault``
    and none.

    Args:
        columns: of the store, ``image`` among them.
    """
    (entry,) = plan.to_pylist()
    runs = zip(entry["files"], entry["starts"], entry["stops"], strict=True)
    rows = pa.concat_tables([_read_run(*run, columns) for run in runs])
    aligned: dict[int, list[bytes | None]] = {size: [] for size in image_sizes}
    faults: list[str] = []
    digests: list[str] = []
    for image in rows["image"].to_pylist():
        digests.append(hashlib.sha256(image).hexdigest())
        found: dict[int, bytes] = {}
        try:
            rgb = decode_stored(image)
            found = {size: align(rgb, size).tobytes() for size in image_sizes}
            faults.append("")
        except Exception as error:  # one damaged picture costs its own row alone, and is told
            faults.append(one_line(error))
        for size, column in aligned.items():
            column.append(found.get(size))
    block = np.full(len(faults), entry["block"], np.int64)
    for size, column in aligned.items():
        rows = rows.append_column(f"aligned_{size}", pa.array(column, pa.binary()))
    rows = rows.append_column("photo_sha256", pa.array(digests, pa.string()))
    rows = rows.append_column("fault", pa.array(faults, pa.string()))
    return rows.append_column("block", pa.array(block))


def _read_run(file: str, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
    """Columns of rows ``start`` to ``stop``, from the row groups they are in."""
    with open_table(place(file)) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        edges = np.cumsum([0, *sizes])
        groups = [i for i in range(len(sizes)) if edges[i] < stop and edges[i + 1] > start]
        table = parquet.read_row_groups(groups, columns=list(columns))
        return table.slice(start - int(edges[groups[0]]), stop - start)


def one_line(error: Exception) -> str:
    """An error as a text of one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
