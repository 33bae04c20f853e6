"""The tasks of an ingestion one after another in this process, instead of on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sbir_ray.stream import forbidden, ingest, photo_shards


def _run(plan, task, **settings):
    for table in plan:
        yield task(table, **settings)


@contextmanager
def inline_tasks() -> Iterator[None]:
    """Ingestion without Ray for the length of a ``with`` block; what it does is the same."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (forbidden, ingest, photo_shards):
            patch.setattr(module, "run_tasks", _run)
        yield
