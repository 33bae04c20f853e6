"""What a run of joint training left to be looked at: its files, as a report shows them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbir_ray.certainty import Decile
from sbir_ray.data.photos import decode_stored
from sbir_ray.data.strokes import Strokes, unflatten
from sbir_ray.errors import DamagedError
from sbir_ray.strict import check_schema

Bytes = NDArray[np.uint8]

PHOTOS, DRAWINGS = "exhibits.json", "drawings.jsonl"
CERTAINTY, ATTENTION = "certainty.json", "attention.json"
LEDGER = "ledger.json"
FULL = 65535
"""Attention is kept in whole numbers of this part."""

COLUMNS = 5
"""Times of those at which the photos were drawn that are shown."""
MOMENTS = 6
"""Parts of a drawing for which it is shown where the generator looked."""


# --------------------------------------------------------------------------- drawings over time


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnPhoto:
    """A photo and its drawings over the steps."""

    photo: Bytes
    """(H, W, 3)"""
    sketches: Sequence[Strokes]
    certainty: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """The same photos drawn again and again by a generator that learns."""

    columns: Sequence[tuple[int, int]]
    """Step and version of the weights, of each drawing that is shown."""
    photos: Sequence[DrawnPhoto]
    times: int
    """How often they were drawn."""


def read_lessons(run: Path, columns: int = COLUMNS) -> Lessons | None:
    """The drawings of ``drawings.jsonl``: the first, the last, and some evenly spaced between.

    None if nothing has been drawn yet.

    Raises:
        DamagedError: a file cannot be read.
    """
    file = run / DRAWINGS
    record = _read(run / PHOTOS)
    if record is None or not file.exists():
        return None
    with _naming(file):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not lines:
            return None
        places = np.linspace(0, len(lines) - 1, min(columns, len(lines))).round().astype(int)
        shown = [lines[place] for place in places]
        return Lessons(
            columns=[(line["step"], line["version"]) for line in shown],
            photos=[
                DrawnPhoto(
                    photo=_photo(text),
                    sketches=[unflatten(line["strokes"][number]) for line in shown],
                    certainty=[float(line["certainty"][number]) for line in shown],
                )
                for number, text in enumerate(record["photos"])
            ],
            times=len(lines),
        )


# --------------------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A part of a drawing, and where the generator looked meanwhile."""

    before: Strokes
    now: Strokes
    share: NDArray[np.float64]
    """(H, W): the share of its looks that each cell of the map got, a mean over the part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A photo, and the moments of its drawing."""

    photo: Bytes
    """(H, W, 3)"""
    moments: Sequence[Moment]


def read_looks(run: Path, moments: int = MOMENTS) -> list[Look]:
    """The drawings of ``attention.json`` in parts; [] if there are none.

    Raises:
        DamagedError: the file cannot be read.
    """
    file = run / ATTENTION
    record = _read(file)
    if record is None:
        return []
    looks = []
    with _naming(file):
        for look in record["looks"]:
            strokes = unflatten(look["strokes"])
            whole = np.frombuffer(base64.b64decode(look["attention"]), "<u2")
            share_THW = whole.reshape(look["shape"]) / FULL
            bounds = parts(strokes, moments)
            if bounds[-1] != len(share_THW):
                raise ValueError(f"{bounds[-1]} points, {len(share_THW)} looks")
            found = [
                Moment(
                    before=_points(strokes, 0, first),
                    now=_points(strokes, first, last, joined=True),
                    share=share_THW[first:last].mean(axis=0),
                )
                for first, last in pairwise(bounds)
            ]
            looks.append(Look(photo=_photo(look["photo"]), moments=found))
    return looks


def parts(strokes: Strokes, count: int) -> list[int]:
    """Where a drawing is cut, in points from 0 to all of them: at the ends of its strokes.

    With more strokes than ``count`` the smallest neighbours stay together; with fewer, the longest
    are cut in the middle, as long as they have two points.
    """
    cuts = [0, *np.cumsum([len(stroke) for stroke in strokes]).tolist()]
    while len(cuts) - 1 > count:
        spans = [cuts[i + 1] - cuts[i - 1] for i in range(1, len(cuts) - 1)]
        del cuts[1 + int(np.argmin(spans))]
    while len(cuts) - 1 < count:
        longest = int(np.argmax(np.diff(cuts)))
        middle = (cuts[longest] + cuts[longest + 1]) // 2
        if middle == cuts[longest]:
            break
        cuts.insert(longest + 1, middle)
    return cuts


def _points(strokes: Strokes, first: int, last: int, joined: bool = False) -> Strokes:
    """The points from ``first`` up to ``last``; ``joined``: with the line that leads to them."""
    found: Strokes = []
    start = 0
    for stroke in strokes:
        low, high = max(first - start, 0), min(last - start, len(stroke))
        if low < high:
            found.append(stroke[max(0, low - 1) if joined else low : high])
        start += len(stroke)
    return found


# --------------------------------------------------------------------------- certainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A pseudo pair, its certainty, and the rank of its photo for its sketch."""

    photo: Bytes
    """(H, W, 3)"""
    sketch: Strokes
    certainty: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CertaintyTable:
    """How certain the pseudo sketches of a pool's photos are, and how well they are found."""

    step: int
    temperature: float
    pairs: int
    """Pseudo pairs, one a photo; each sketch is searched with among their photos."""
    deciles: Sequence[Decile]
    examples: Sequence[Judged]
    """Most certain first."""


def read_certainty(run: Path) -> CertaintyTable | None:
    """``certainty.json``, or None if there is none.

    Raises:
        DamagedError: the file cannot be read.
    """
    file = run / CERTAINTY
    record = _read(file)
    if record is None:
        return None
    with _naming(file):
        certainty, rank = record["certainty"], record["rank"]
        return CertaintyTable(
            step=record["step"],
            temperature=record["temperature"],
            pairs=len(rank),
            deciles=[Decile(**values) for values in record["deciles"]],
            examples=[
                Judged(
                    photo=_photo(example["photo"]),
                    sketch=unflatten(example["strokes"]),
                    certainty=certainty[example["number"]],
                    rank=rank[example["number"]],
                )
                for example in record["examples"]
            ],
        )


# --------------------------------------------------------------------------- the stream


class Stage(NamedTuple):
    """A step of the way from what was drawn to what was used."""

    name: str
    kept: bool
    """False: what is lost here."""
    number: int
    start: float
    """Share of all drawings where its bar begins."""
    share: float
    """Share of all drawings."""
    reasons: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamAccount:
    """What became of the drawings that a generator made while the learners trained."""

    drawn: int
    stale: int
    filtered: Mapping[str, int]
    """By the setting that left them out."""
    in_flight: int
    """Still to be judged or used."""
    used: int
    staleness: Mapping[int, int]
    """Drawings by the versions that they lay behind the learner's; all that were too old have the
    largest number."""
    max_staleness: int
    """Versions that they may lie behind."""

    @property
    def stages(self) -> list[Stage]:
        """From drawn to used, each with a bar that begins where the next one ends."""
        total = max(self.drawn, 1)
        found = [Stage("drawn", True, self.drawn, 0.0, self.drawn / total)]
        left = self.drawn
        by_number = sorted(self.filtered.items(), key=lambda item: -item[1])
        for name, number, reasons in (
            ("stale", self.stale, ()),
            ("filtered", sum(self.filtered.values()), by_number),
            ("in flight", self.in_flight, ()),
        ):
            left -= number
            found.append(Stage(name, False, number, left / total, number / total, reasons))
        return [*found, Stage("used", True, left, 0.0, left / total)]


def read_stream(run: Path, max_staleness: int) -> StreamAccount | None:
    """``ledger.json`` of live drawings, or None if there is none.

    Raises:
        DamagedError: it cannot be read, or does not add up.
    """
    file = run / LEDGER
    record = _read(file)
    if record is None:
        return None
    with _naming(file):
        account = StreamAccount(
            drawn=record["drawn"],
            stale=record["stale"],
            filtered=dict(record["filtered"]),
            in_flight=record["in_flight"],
            used=record["used"],
            staleness={int(lag): n for lag, n in record["staleness"].items()},
            max_staleness=max_staleness,
        )
        if account.stages[-1].number != account.used:
            raise ValueError("it does not add up")
    return account


# --------------------------------------------------------------------------- files


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name ``file`` where it holds something else than it should."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
        raise DamagedError(f"{file}: cannot be read ({error!r})") from error


def _read(file: Path) -> Any:
    """The JSON of ``file``, or None if there is none."""
    if not file.exists():
        return None
    with _naming(file):
        record = json.loads(file.read_bytes())
        version = record.get("schema_version")
    check_schema(version, str(file))
    return record


def _photo(text: str) -> Bytes:
    return decode_stored(base64.b64decode(text))
