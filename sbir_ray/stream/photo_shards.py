"""The second pass of an ingestion: the photos that are stored, copied to shards of even size."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sbir_ray.data.photos import PHOTO_SCHEMA
from sbir_ray.places import place, read_table, write_bytes
from sbir_ray.runlog import Progress
from sbir_ray.stream.cluster import run_tasks
from sbir_ray.stream.staging import Staging, photo_file
from sbir_ray.stream.tables import table_writer

SHARD_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("photos", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("image_bytes", pa.int64()),
        ("shortest", pa.int32()),
        ("longest", pa.int32()),
        ("mean_width", pa.float64()),
        ("mean_height", pa.float64()),
    ]
)
"""A row of ``shards.parquet``: a file of the store, its hash, and what is in it."""

_WAVE = 256
_GROUP = 4096


def write_shards(
    stored: Iterable[tuple[int, int]],
    count: int,
    staging: Staging,
    folder: Path,
    before: Iterable[pa.Table],
    bar: Progress,
) -> None:
    """Write ``folder/shards``, which is there, and ``folder/shards.parquet``.

    Args:
        stored: (block, row) of each of the ``count`` photos to store, in order.
        before: rows of ``shards.parquet`` of shards that are there already, numbered from 0.
    """
    with table_writer(folder / "shards.parquet", SHARD_SCHEMA, _GROUP) as writer:
        number = 0
        for table in before:
            writer.add(table)
            number += table.num_rows
        plans = _plans(stored, count, number, staging.config.shard_rows)
        while wave := list(itertools.islice(plans, _WAVE)):
            tables = list(
                run_tasks(wave, write_shard, staging=staging, folder=str(folder / "shards"))
            )
            made = pa.concat_tables(tables).sort_by("file")
            writer.add(made)
            bar.update(bar.done + pc.sum(made["photos"]).as_py(), count)
    assert bar.done == count, (bar.done, count)


def _plans(
    stored: Iterable[tuple[int, int]], count: int, first: int, shard_rows: int
) -> Iterator[pa.Table]:
    """Shards of ``shard_rows`` photos at most; all have as many, or one less."""
    shards = math.ceil(count / shard_rows)
    edges = [count * i // max(shards, 1) for i in range(shards + 1)]
    rest = iter(stored)
    for number, (start, stop) in enumerate(itertools.pairwise(edges), first):
        rows = np.array(list(itertools.islice(rest, stop - start)), np.int64).reshape(-1, 2)
        yield pa.table({"shard": [number], "blocks": [rows[:, 0]], "rows": [rows[:, 1]]})


def write_shard(plan: pa.Table, staging: Staging, folder: str) -> pa.Table:
    """The task: the shards of ``plan``, as rows of ``shards.parquet``."""
    rows = []
    for entry in plan.to_pylist():
        wanted: dict[int, list[int]] = defaultdict(list)
        for block, row in zip(entry["blocks"], entry["rows"], strict=True):
            wanted[block].append(row)
        parts = [
            read_table(staging.staged(block), columns=PHOTO_SCHEMA.names).take(rows)
            for block, rows in wanted.items()
        ]
        file = place(folder) / f"part-{entry['shard']:05d}.parquet"
        table = pa.concat_tables(parts)
        rows.append(write_shard_file(table, file))
    return pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)


def write_shard_file(table: pa.Table, file: Path) -> dict[str, object]:
    """Write a shard as a whole file; its row of ``shards.parquet``."""
    data = photo_file(table)
    write_bytes(file, data)
    width, height = table["width"].to_numpy(), table["height"].to_numpy()
    return {
        "file": file.name,
        "photos": table.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "image_bytes": pc.sum(pc.binary_length(table["image"])).as_py(),
        "shortest": int(np.minimum(width, height).min()),
        "longest": int(np.maximum(width, height).max()),
        "mean_width": float(width.mean()),
        "mean_height": float(height.mean()),
    }
