"""A photo store for tests, written without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sbir_ray.data import photos
from sbir_ray.strict import SCHEMA_VERSION
from tests.tiny import photo


def tiny_store(
    folder: Path, count: int, *, damaged: Sequence[int] = (), shard: int = 16, group: int = 4
) -> Path:
    """A PHOTOS folder of the shapes 0 to ``count`` - 1, named ``photo00`` and so on; no pixels can
    be read of the ``damaged`` ones. ``shard`` and ``group`` are rows of a file and of its groups.
    """
    (folder / "shards").mkdir(parents=True)
    header = {"schema_version": SCHEMA_VERSION, "kind": "photos"}
    (folder / "store.json").write_text(json.dumps(header))
    rows = []
    for number in range(count):
        row = photos.row_of_pixels(photo(number), f"photo{number:02d}")
        rows.append({**row, "image": b"none"} if number in damaged else row)
    for start in range(0, count, shard):
        table = pa.Table.from_pylist(rows[start : start + shard], schema=photos.PHOTO_SCHEMA)
        file = folder / "shards" / f"part-{start:05d}.parquet"
        pq.write_table(table, file, row_group_size=group)
    return folder
