"""The account of every photo that was read: ``ledger.parquet``, and its summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sbir_ray.places import open_table
from sbir_ray.runlog import Ledger
from sbir_ray.stream.tables import table_writer

LEDGER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("uri", "photo_id", "status", "reason", "detail", "of")]
)
"""A row of ``ledger.parquet``, in the order of ``plan.parquet``: ``of`` is the photo_id of what is
stored instead of a duplicate."""
AGAIN = ("failed", "quarantined")
"""States that another attempt may change."""

_GROUP = 32_768
_EXAMPLES = 3
_REASONED = ("rejected", "failed")


@dataclass
class Summary:
    """What a ledger says, counted."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str], list[dict[str, str]]] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        """Count rows of a ledger."""
        grouped = table.group_by(["status", "reason"], use_threads=False).aggregate(
            [("uri", "count")]
        )
        for row in grouped.to_pylist():
            key = (row["status"], row["reason"])
            self.counts[key] = self.counts.get(key, 0) + row["uri_count"]
            some = self.examples.setdefault(key, [])
            if key[0] != "stored" and len(some) < _EXAMPLES:
                mask = pc.and_(pc.equal(table["status"], key[0]), pc.equal(table["reason"], key[1]))
                found = table.filter(mask).slice(0, _EXAMPLES - len(some))
                some += found.select(["uri", "detail"]).to_pylist()

    @property
    def ledger(self) -> Ledger:
        """The counts as the account that has to add up."""
        ledger = Ledger("photos", sum(self.counts.values()))
        for (status, reason), count in self.counts.items():
            ledger.add(status, reason if status in _REASONED else "", count)
        return ledger

    def reasons(self) -> list[dict[str, Any]]:
        """Why photos are not stored, the most frequent reason first, with examples."""
        rows = [
            {"status": key[0], "reason": key[1], "photos": count, "examples": self.examples[key]}
            for key, count in self.counts.items()
            if key[0] != "stored"
        ]
        return sorted(rows, key=lambda row: (-row["photos"], row["status"], row["reason"]))


def write_ledger(tables: Iterable[pa.Table], file: Path) -> Summary:
    """Write a ledger as a whole file, and count it."""
    summary = Summary()
    with table_writer(file, LEDGER_SCHEMA, _GROUP) as writer:
        for table in tables:
            summary.add(table)
            writer.add(table)
    return summary


def read_ledger(file: Path) -> Iterator[pa.Table]:
    """A ledger in parts."""
    with open_table(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_GROUP):
            yield pa.Table.from_batches([batch])


def replaced(old: Iterable[pa.Table], new: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """``old`` with the rows that :data:`AGAIN` names changed to those of ``new``, in order."""
    fresh = (row for table in new for row in table.to_pylist())
    for table in old:
        mask = np.isin(table["status"].to_numpy(zero_copy_only=False).astype(str), AGAIN)
        if mask.any():
            rows = table.to_pylist()
            for number in np.flatnonzero(mask).tolist():
                rows[number] = next(fresh)
            table = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA)
        yield table
    assert next(fresh, None) is None
