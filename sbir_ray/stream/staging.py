"""The first pass of an ingestion: blocks of photos read, decoded, hashed and put into staged files.

Each photo is accounted for in its block's file, with its picture where it may be stored.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.data.decoding import MAY_PASS
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoError, PhotoLimits, PhotoRow
from sbir_ray.places import place, read_table, write_bytes
from sbir_ray.stream.attempts import KILLED, LIMIT, Attempts
from sbir_ray.stream.fetch import Fetcher, Wait
from sbir_ray.stream.forbidden import Forbidden
from sbir_ray.stream.photo_plan import block_units
from sbir_ray.stream.units import Item, MakeRow

STAGED_SCHEMA = PHOTO_SCHEMA.append(pa.field("detail", pa.string()))
ACCOUNT = ["uri", "photo_id", "phash", "status", "reason", "detail"]
"""Columns of a staged file that are not the picture."""
BAD = ("rejected", "failed", "quarantined")
"""States of photos that cannot be used."""

_ROW_GROUP = 64


@dataclass(frozen=True)
class Staging:
    """What every task of the first pass needs to know."""

    folder: str
    """The folder of the run: ``plan.parquet``, ``exclude``, ``staged``, ``attempts``."""
    config: IngestConfig
    session: str
    """Of the process that started the tasks; tells its end from that of a worker."""
    make_row: MakeRow = photos.make_row
    pace: Any = None
    """Actor that says when a web server may be asked again."""

    def staged(self, block: int) -> Path:
        """The file of a block."""
        return place(self.folder) / "staged" / f"part-{block:07d}.parquet"

    @property
    def limits(self) -> PhotoLimits:
        """What a photo may cost, as the settings say."""
        config = self.config
        return PhotoLimits(
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            longest=config.longest,
            form=config.form,
            quality=config.quality,
        )


def stage_blocks(plan: pa.Table, staging: Staging) -> pa.Table:
    """The task: each block of ``plan`` to its staged file, unless it is there.

    Returns:
        How many photos of each block have which status and reason, with the first of them.
    """
    tables = []
    for block in plan["block"].to_pylist():
        file = staging.staged(block)
        if not file.exists():
            _stage(block, staging)
        account = read_table(file, columns=ACCOUNT)
        found = account.group_by(["status", "reason"], use_threads=False).aggregate(
            [("uri", "count"), ("uri", "first"), ("detail", "first")]
        )
        found = found.rename_columns(
            {"uri_count": "photos", "uri_first": "uri", "detail_first": "detail"}
        )
        tables.append(found.append_column("block", pa.array([block] * found.num_rows)))
    return pa.concat_tables(tables)


def _stage(block: int, staging: Staging) -> None:
    attempts = Attempts(place(staging.folder) / "attempts" / f"{block:07d}", staging.session)
    forbidden = Forbidden.load(str(place(staging.folder) / "exclude"), staging.session)
    fetcher = Fetcher(staging.config.web, staging.limits, _wait(staging.pace))
    units = block_units(place(staging.folder) / "plan.parquet", block)
    items = itertools.chain.from_iterable(unit.items(fetcher) for unit in units)
    rows = list(_rows(items, staging, forbidden, attempts))
    attempts.close()
    table = pa.Table.from_pylist(rows, schema=STAGED_SCHEMA)
    write_bytes(staging.staged(block), photo_file(table))


def photo_file(table: pa.Table) -> bytes:
    """Rows with pictures as a Parquet file; JPEG files do not get smaller, no two are equal."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False)
    return cast(bytes, sink.getvalue().to_pybytes())


def _rows(
    items: Iterable[Item], staging: Staging, forbidden: Forbidden, attempts: Attempts
) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(staging.config.web.threads) as pool:
        for number, (item, found) in enumerate(_fetched(items, pool, staging.config.web.threads)):
            key = str(number)
            if attempts.deaths(key) >= LIMIT:
                text = f"{attempts.deaths(key)} processes ended while they worked on it"
                yield _unusable(item, "quarantined", KILLED, text)
                continue
            with attempts.working_on(key):
                yield _row(item, found, staging, forbidden)


def _fetched(
    items: Iterable[Item], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[Item, Future[bytes | PhotoRow] | None]]:
    """The items in order; those that are far are asked for ``ahead`` at a time."""
    waiting: deque[tuple[Item, Future[bytes | PhotoRow] | None]] = deque()
    for item in items:
        waiting.append((item, pool.submit(item.fetch) if item.far else None))
        while waiting and (waiting[0][1] is None or len(waiting) > ahead):
            yield waiting.popleft()
    yield from waiting


def _row(
    item: Item,
    found: Future[bytes | PhotoRow] | None,
    staging: Staging,
    forbidden: Forbidden,
) -> dict[str, Any]:
    try:
        data = item.fetch() if found is None else found.result()
        if isinstance(data, bytes):
            row = staging.make_row(data, item.name, item.uri, staging.limits)
        else:
            row = data
        leak = forbidden.leak_of(row)
    except PhotoError as error:
        status = "failed" if error.reason in MAY_PASS else "rejected"
        return _unusable(item, status, error.reason, error.text)
    except Exception as error:  # any fault costs its own row alone, and is told
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _unusable(item, "failed", f"error-{type(error).__name__}", text)
    if leak is None:
        return {**row, "status": "stored", "reason": "", "detail": ""}
    reason, text = leak
    return {**row, "image": None, "status": "leaked", "reason": reason, "detail": text}


def _unusable(item: Item, status: str, reason: str, text: str) -> dict[str, Any]:
    values = {"photo_id": "", "name": item.name, "uri": item.uri, "phash": 0}
    fate = {"status": status, "reason": reason, "detail": photos.printable(text)}
    return dict.fromkeys(STAGED_SCHEMA.names) | values | fate


# --------------------------------------------------------------------------- a pace for all


class Pace:
    """An actor: how long to wait before a host is asked again, by whichever worker.

    Args:
        rate: requests a second to one host.
    """

    def __init__(self, rate: float) -> None:
        self.gap = 1 / rate
        self.next: dict[str, float] = {}

    def turn(self, host: str) -> float:
        """Seconds to wait; the turn is taken."""
        now = time.monotonic()
        if len(self.next) > 10_000:
            self.next = {name: at for name, at in self.next.items() if at > now}
        at = max(now, self.next.get(host, 0.0))
        self.next[host] = at + self.gap
        return at - now


def _wait(pace: Any) -> Wait:
    if pace is None:
        return lambda host: None
    return lambda host: time.sleep(ray.get(pace.turn.remote(host)))
