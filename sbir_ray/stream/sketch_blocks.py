"""Which photos are drawn together, the same for any cluster, and how they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import UserError
from sbir_ray.places import count_rows, open_table, place

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


def plan_blocks(photos: Path, batch_size: int) -> list[PhotoBlock]:
    """The blocks of a photo store: whole batches across its files, few enough rows for actors to
    share the work, enough that Ray Data costs little beside it.

    Raises:
        UserError: not a photo store of a known version, or an empty one.
    """
    if next(read_store(photos), None) is None:
        raise UserError(f"{photos}: holds no photo; see its ledger")
    shards = sorted((photos / "shards").glob("part-*.parquet"))
    left = [(shard, 0, count_rows(shard)) for shard in shards]
    total = sum(stop for _, _, stop in left)
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


def read_photos(plan: pa.Table, image_sizes: Sequence[int]) -> pa.Table:
    """Task: the photos of one block, for each size S ``aligned_S`` as bytes (S, S, 3), or ``fault``
    and none."""
    (entry,) = plan.to_pylist()
    runs = zip(entry["files"], entry["starts"], entry["stops"], strict=True)
    rows = pa.concat_tables([_read_run(*run) for run in runs])
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


def _read_run(file: str, start: int, stop: int) -> pa.Table:
    """``photo_id`` and ``image`` of rows ``start`` to ``stop``, from the row groups they are in."""
    with open_table(place(file)) as parquet:
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        edges = np.cumsum([0, *sizes])
        groups = [i for i in range(len(sizes)) if edges[i] < stop and edges[i + 1] > start]
        table = parquet.read_row_groups(groups, columns=["photo_id", "image"])
        return table.slice(start - int(edges[groups[0]]), stop - start)


def one_line(error: Exception) -> str:
    """An error as a text of one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
