"""What an ingestion reads: all that its sources name, each once, in blocks; a file, not a list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.places import open_table, read_table
from sbir_ray.stream.spill import PART_RECORDS, Spill, on_disk
from sbir_ray.stream.tables import table_writer
from sbir_ray.stream.units import Unit

PLAN_SCHEMA = pa.schema(
    [("block", pa.int64()), ("photos", pa.int64()), ("web", pa.bool_()), ("units", pa.string())]
)
"""A row of ``plan.parquet``: photos that one task reads together."""

GROUP = 16
"""Blocks of a row group: what a task has to decode to find its own."""
_KEY = np.dtype([("key", "S16"), ("unit", "<i8")])
_TASKS = 64
_TASK_ROWS = (64, 512)
_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Plan:
    """``plan.parquet``, counted."""

    file: Path
    photos: NDArray[np.int64]
    """By block."""
    web: bool
    """Whether anything is asked of web servers."""

    @classmethod
    def load(cls, file: Path) -> Plan:
        """The plan that is there."""
        table = read_table(file, columns=["photos", "web"])
        return cls(file, table["photos"].to_numpy(), any(table["web"].to_pylist()))

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.photos)

    @property
    def total(self) -> int:
        """Number of photos."""
        return int(self.photos.sum())

    def units(self) -> Iterator[Unit]:
        """All units, in order."""
        with open_table(self.file) as parquet:
            for batch in parquet.iter_batches(batch_size=GROUP, columns=["units"]):
                for text in batch.column(0).to_pylist():
                    yield from map(Unit.from_json, json.loads(text))


def block_units(file: Path, block: int) -> list[Unit]:
    """The units of one block."""
    with open_table(file) as parquet:
        group = parquet.read_row_group(block // GROUP, columns=["units"])
    return [Unit.from_json(values) for values in json.loads(group["units"][block % GROUP].as_py())]


def write_plan(units: Iterable[Unit], file: Path, folder: Path, known: Iterable[Unit] = ()) -> Plan:
    """Plan to read ``units``, each once and none that is ``known``, as ``file``.

    Args:
        folder: on this machine, for what does not fit into memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "listing.jsonl"
    count = photos = 0
    with listing.open("w", encoding="ascii") as stream, (folder / "keys").open("wb") as keys:
        for batch in _batches(known):
            keys.write(_keys(batch, np.full(len(batch), -1)).tobytes())
        for batch in _batches(units):
            stream.writelines(json.dumps(unit.to_json()) + "\n" for unit in batch)
            keys.write(_keys(batch, np.arange(count, count + len(batch))).tobytes())
            count += len(batch)
            photos += sum(unit.rows for unit in batch)
    again = _again(folder / "keys", count)
    with listing.open(encoding="ascii") as stream:
        fresh = (
            Unit.from_json(json.loads(line))
            for number, line in enumerate(stream)
            if not again[number]
        )
        _write(fresh, photos, file)
    for name in ("listing.jsonl", "keys", "again"):
        (folder / name).unlink(missing_ok=True)
    return Plan.load(file)


def _write(units: Iterable[Unit], photos: int, file: Path) -> None:
    size = min(max(photos // _TASKS, _TASK_ROWS[0]), _TASK_ROWS[1])
    with table_writer(file, PLAN_SCHEMA, group=GROUP) as writer:
        for number, block in enumerate(_blocks(units, size)):
            row = {
                "block": number,
                "photos": sum(unit.rows for unit in block),
                "web": any(unit.file.startswith("http") for unit in block),
                "units": json.dumps([unit.to_json() for unit in block]),
            }
            writer.add(pa.Table.from_pylist([row], schema=PLAN_SCHEMA))


def _blocks(units: Iterable[Unit], size: int) -> Iterator[list[Unit]]:
    """Units in groups, one for a task; the same whatever the cluster, so that a rerun fits."""
    block: list[Unit] = []
    filled = 0
    for unit in units:
        if filled >= size:
            yield block
            block, filled = [], 0
        block.append(unit)
        filled += unit.rows
    if block:
        yield block


def _again(keys: Path, count: int) -> NDArray[np.bool_]:
    """By unit: whether it is known, or was listed before."""
    again = on_disk(keys.with_name("again"), np.bool_, count)
    total = keys.stat().st_size // _KEY.itemsize
    spill = Spill(keys.with_name("keys.parts"), _KEY, total)
    for start in range(0, total, PART_RECORDS):
        found = np.fromfile(keys, _KEY, PART_RECORDS, offset=start * _KEY.itemsize)
        heads = np.ascontiguousarray(found["key"]).view(">u8")[::2]
        spill.add(heads.astype(np.uint64), found)
    for part in range(spill.parts):
        found = spill.read(part)
        found = found[np.lexsort((found["unit"], found["key"]))]
        repeated = np.zeros(len(found), bool)
        repeated[1:] = found["key"][1:] == found["key"][:-1]
        again[found["unit"][repeated & (found["unit"] >= 0)]] = True
    spill.remove()
    return again


def _keys(units: Sequence[Unit], numbers: NDArray[np.int64]) -> NDArray[Any]:
    records = np.zeros(len(units), _KEY)
    records["unit"] = numbers
    records["key"] = [
        hashlib.blake2b(unit.key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        for unit in units
    ]
    return records


def _batches(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    for unit in units:
        batch.append(unit)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
