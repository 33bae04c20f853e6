"""Parquet files that are written part by part and are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbir_ray.places import file_system, is_local, open_table, sync, told

_GROUP = 1024


class TableWriter:
    """Gathers tables to row groups of ``group`` rows."""

    def __init__(self, writer: Any, group: int) -> None:
        self._writer, self.group = writer, group
        self._tables: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Rows of the file's schema."""
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows >= self.group:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered."""
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._tables), row_group_size=self.group)
        self._tables, self._rows = [], 0


@contextmanager
def table_writer(file: Path, schema: pa.Schema, group: int) -> Iterator[TableWriter]:
    """A writer of ``file``, which is there when the block ends without an error."""
    if is_local(file):
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
    else:
        temporary = Path(tempfile.mkdtemp()) / file.name
    try:
        with temporary.open("wb") as stream:
            writer = pq.ParquetWriter(stream, schema, compression="zstd")
            try:
                rows = TableWriter(writer, group)
                yield rows
                rows.flush()
                writer.close()
            finally:
                # After a fault it must not try to write the rest when it is forgotten.
                writer.is_open = False
            stream.flush()
            os.fsync(stream.fileno())
        if is_local(file):
            temporary.replace(file)
            sync(file.parent)
        else:
            system, name = file_system(file)
            with told(file):
                system.put_file(str(temporary), name)
    finally:
        temporary.unlink(missing_ok=True)
        if not is_local(file):
            temporary.parent.rmdir()


def join_tables(files: Sequence[Path], out: Path) -> None:
    """The rows of Parquet files of one schema, one after another, as a whole file."""
    with open_table(files[0]) as first:
        schema = first.schema_arrow
    with table_writer(out, schema, _GROUP) as writer:
        for file in files:
            with open_table(file) as parquet:
                for batch in parquet.iter_batches(batch_size=_GROUP):
                    writer.add(pa.Table.from_batches([batch]))
