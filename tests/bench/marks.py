"""Who does what when in a live stream: notes that its processes leave in a folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import cloudpickle
from torch import Tensor

from sbir_ray.stream import live
from sbir_ray.stream.live_rows import LiveRow, LiveSketcher, Photos

# Workers need not find this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that a process did, by the clock that all processes of the machine share."""

    what: str
    began: float
    ended: float
    values: Mapping[str, float]


def mark(folder: Path, what: str, began: float, **values: float) -> None:
    """Note what ended now in a file of this process."""
    line = {"what": what, "began": began, "ended": time.monotonic(), "values": values}
    with (folder / f"{os.getpid()}.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def read_marks(folder: Path) -> list[Mark]:
    """Those of all processes, by their ends."""
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    return sorted((Mark(**json.loads(line)) for line in lines), key=lambda m: m.ended)


def share(marks: Sequence[Mark], what: str, since: float, until: float) -> float:
    """Of the time from ``since`` to ``until`` that ``what`` took."""
    spans = [min(m.ended, until) - max(m.began, since) for m in marks if m.what == what]
    return sum(span for span in spans if span > 0) / (until - since)


class MarkedShard(live.Shard):
    """Marks ``wait`` (for a drawing) and ``publish``."""

    def __init__(self, *given: Any, marks: Path) -> None:
        super().__init__(*given)
        self.marks = marks

    def next(self) -> LiveRow:
        began, waited = time.monotonic(), self.waited
        row = super().next()
        if self.waited - waited > 1e-3:
            mark(self.marks, "wait", began)
        return row

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        began = time.monotonic()
        super().publish(version, tensors)
        mark(self.marks, "publish", began, version=version)


class MarkedSketcher:
    """Marks ``load`` and ``draw``."""

    def __init__(self, sketcher: LiveSketcher, marks: Path) -> None:
        self.sketcher, self.marks = sketcher, marks
        self.sides = sketcher.sides

    def load(self, version: int, weights: Mapping[str, Any]) -> None:
        began = time.monotonic()
        self.sketcher.load(version, weights)
        mark(self.marks, "load", began, version=version)

    def draw(
        self,
        tickets: Sequence[int],
        photo_ids: Sequence[str],
        photos: Sequence[Photos],
        seeds: Sequence[int],
    ) -> list[LiveRow]:
        began = time.monotonic()
        rows = self.sketcher.draw(tickets, photo_ids, photos, seeds)
        points = sum(row.drawn.rows for row in rows)
        mark(self.marks, "draw", began, photos=len(rows), points=points)
        return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkedSpec(live.StreamSpec):
    """Of actors that mark what they do."""

    marks: Path

    def make(self, references: NDArray[np.uint8] | None) -> Any:
        return MarkedSketcher(super().make(references), self.marks)


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Streams that are started meanwhile leave marks in ``folder``."""
    kept = live.Shard, live.StreamSpec
    folder.mkdir()
    replaced: Any = live
    replaced.Shard = functools.partial(MarkedShard, marks=folder)
    replaced.StreamSpec = functools.partial(MarkedSpec, marks=folder)
    try:
        yield
    finally:
        replaced.Shard, replaced.StreamSpec = kept
