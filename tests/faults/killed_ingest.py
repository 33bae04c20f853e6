"""Ingestions that are killed by SIGKILL and run again, each in a process of its own.

``python -m tests.faults.killed_ingest inline|ray SOURCE OUT [POINT...]`` makes a store
``OUT/POINT`` for each point and prints how the first run ended; without points, ``OUT/whole``.
A point ``3:update`` is the third call of that function of the driver.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbir_ray.config import IngestConfig
from sbir_ray.runlog import Progress
from sbir_ray.stream import ingest as ingestion
from sbir_ray.stream.cluster import connect
from tests.faults.kit import forked
from tests.inline_tasks import inline_tasks

POINTS = (
    "1:forbid",
    "1:write_plan",
    "1:update",
    "3:update",
    "1:find_duplicates",
    "1:write_ledger",
    "1:join_tables",
    "1:write_shards",
    "1:_write_header",
    "1:store_header",
)
CONFIG = IngestConfig(shard_rows=16)


def _killing(real: Callable[..., Any], calls: int) -> Callable[..., Any]:
    left = calls

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    return call


def _arm(point: str) -> None:
    calls, _, name = point.partition(":")
    holder: Any = Progress if name == "update" else ingestion
    if name == "store_header":
        holder = ingestion.photos
    setattr(holder, name, _killing(getattr(holder, name), int(calls)))


def _run(way: str, source: Path, out: Path, point: str = "") -> int:
    """The state in which a process of its own ends that runs the ingestion."""

    def work() -> int:
        if point:
            _arm(point)
        with connect(num_cpus=4) if way == "ray" else inline_tasks():
            ingestion.ingest([source], out, CONFIG)
        return 0

    return forked(work)


def main() -> None:
    way, source, out, *points = sys.argv[1:]
    for point in points or [""]:
        store = Path(out) / (point or "whole").replace(":", "-")
        status = _run(way, Path(source), store, point)
        if point:
            assert status == -signal.SIGKILL, (point, status)
            status = _run(way, Path(source), store)
        assert status == 0, (point, status)
        print(store)


if __name__ == "__main__":
    main()
