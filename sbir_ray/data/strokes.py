"""A sketch as strokes: its canonical form, its simplification, its sequence forms, its deformation.

A sketch is a list of strokes; a stroke is a float32 array (n, 2) of points (x right, y down) in
canvas units, drawn with the pen down. Sketches by people and by the generator take the same
canonical form, so that neither the discriminator nor the retrieval network can tell them apart by
their box.

Sequence forms, one row a point, row i moves the pen to point i:

- stroke-3: (dx, dy, lifted), lifted = 1 on the last point of a stroke; the first row is the first
  point's position;
- stroke-5: (dx, dy, down, up, end), one-hot in the last three, offsets divided by one scale; the
  first row is the first point's offset from the centre of the canvas, and one row (0, 0, 0, 0, 1)
  follows the last point.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sbir_ray.config import AugmentConfig
from sbir_ray.errors import UserError

Strokes: TypeAlias = list[NDArray[np.float32]]

CANVAS = 256.0
"""Side of the square canvas."""
CENTRE = CANVAS / 2
LONGEST = 190.0
"""Longest side of a canonical sketch's bounding box, as in the published QMUL coordinates."""

MAX_STROKES = 2_000
MAX_POINTS = 50_000
MAX_VALUE = 1e6
"""Limits of one sketch: strokes, points, and the largest coordinate."""

_BEND_WAVES = 4
_BEND_LENGTH = 2 * LONGEST
_RAISE = 1.15


# --------------------------------------------------------------------------- form


def count_points(strokes: Strokes) -> int:
    """Points of all strokes together."""
    return sum(len(stroke) for stroke in strokes)


def check(strokes: Iterable[Any], where: str) -> Strokes:
    """``strokes`` as float32 arrays (n, 2); strokes without points are left out.

    Raises:
        UserError: no points at all, a stroke that is not (n, 2) numbers, a value that is not
            finite or too large, too many strokes or points. The message starts with ``where``.
    """
    checked: Strokes = []
    points = 0
    for stroke in strokes:
        try:
            array = np.asarray(stroke, dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{where}: a stroke is not a list of (x, y) numbers") from error
        if array.size == 0:
            continue
        if array.ndim != 2 or array.shape[1] != 2:
            raise UserError(f"{where}: a stroke has the shape {array.shape}; points are (x, y)")
        points += len(array)
        if len(checked) == MAX_STROKES:
            raise UserError(f"{where}: more than {MAX_STROKES} strokes; simplify the sketch")
        if points > MAX_POINTS:
            raise UserError(f"{where}: more than {MAX_POINTS} points; simplify the sketch")
        if not np.abs(array).max() <= MAX_VALUE:  # also false for NaN
            raise UserError(
                f"{where}: a coordinate is not a number within +-{MAX_VALUE:.0f}; rescale it"
            )
        checked.append(array.astype(np.float32))
    if not checked:
        raise UserError(f"{where}: the sketch has no points; leave it out or draw it again")
    return checked


def canonical(strokes: Strokes) -> Strokes:
    """The sketch with its box centred on the canvas, longest side ``LONGEST``, aspect kept.

    A sketch whose points are all equal is moved to the centre and not scaled.

    Raises:
        UserError: a sketch without points.
    """
    low, high = _box(strokes)
    middle = (low + high) / 2
    longest = float((high - low).max())
    scale = LONGEST / longest if longest > 0 else 1.0
    return [((s.astype(np.float64) - middle) * scale + CENTRE).astype(np.float32) for s in strokes]


def mirror(strokes: Strokes) -> Strokes:
    """The sketch flipped left to right about the middle of the canvas."""
    return [np.stack([np.float32(CANVAS) - s[:, 0], s[:, 1]], axis=1) for s in strokes]


def flatten(strokes: Strokes) -> list[list[float]]:
    """Each stroke as x0, y0, x1, y1, ..., the form of the Parquet column."""
    return [stroke.ravel().tolist() for stroke in strokes]


def unflatten(rows: Iterable[Sequence[float] | NDArray[Any]]) -> Strokes:
    """The strokes of a Parquet column's value; the inverse of :func:`flatten`."""
    return [np.asarray(row, dtype=np.float32).reshape(-1, 2) for row in rows]


# --------------------------------------------------------------------------- simplification


def rdp(points: NDArray[Any], epsilon: float) -> NDArray[np.float32]:
    """Points (n, 2) thinned by Ramer-Douglas-Peucker; the ends stay.

    The distance is that to the chord itself, not to its line, so that every point left out lies
    within ``epsilon`` of the result also where the stroke turns back on itself.
    """
    line = np.asarray(points, dtype=np.float64)
    keep = np.zeros(len(line), dtype=bool)
    keep[:1] = keep[-1:] = True
    limit = epsilon * epsilon
    spans = [(0, len(line) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        chord = line[last] - line[first]
        inner = line[first + 1 : last] - line[first]
        square = float(chord @ chord)
        if square > 0:
            along = np.clip(inner @ (chord / square), 0.0, 1.0)
            inner -= along[:, None] * chord
        distance = np.einsum("ij,ij->i", inner, inner)
        farthest = int(distance.argmax())
        if distance[farthest] > limit:
            middle = first + 1 + farthest
            keep[middle] = True
            spans += [(first, middle), (middle, last)]
    return line[keep].astype(np.float32)


def simplify(strokes: Strokes, epsilon: float) -> Strokes:
    """Each stroke thinned by :func:`rdp` with the tolerance ``epsilon``, canvas units."""
    return [rdp(stroke, epsilon) for stroke in strokes]


def fit(strokes: Strokes, max_points: int, epsilon: float) -> Strokes:
    """The sketch simplified with ``epsilon`` or, if it is still too long, with the least raised
    tolerance that brings it to ``max_points``.

    A raised tolerance also leaves out strokes smaller than itself (never the largest one): with
    many strokes their ends alone would use up the points, and turn the large ones into lines.

    Raises:
        ValueError: ``max_points`` below 2.
        UserError: a sketch without points.
    """
    if max_points < 2:
        raise ValueError(f"max_points: {max_points} is less than 2")
    if not strokes:
        raise UserError("a sketch without points cannot be simplified")
    short = simplify(strokes, epsilon)
    if count_points(short) <= max_points:
        return short
    sizes = [float(np.hypot(*np.ptp(stroke.astype(np.float64), axis=0))) for stroke in strokes]
    largest = int(np.argmax(sizes))
    smallest_step = max(sizes[largest] * 1e-3, np.finfo(np.float64).tiny)
    raised = max(epsilon, smallest_step)
    while count_points(short) > max_points:
        raised *= _RAISE
        short = [
            rdp(stroke, raised)
            for index, stroke in enumerate(strokes)
            if sizes[index] > raised or index == largest
        ]
    return short


def resample(strokes: Strokes, spacing: float) -> Strokes:
    """Each stroke with points at equal distances along it, about ``spacing``; the ends stay.

    A stroke without length becomes one point.
    """
    if not spacing > 0:
        raise ValueError(f"spacing: {spacing} has to be above 0")
    even: Strokes = []
    for stroke in strokes:
        line = stroke.astype(np.float64)
        along = _arc(line)
        if along[-1] == 0:
            even.append(stroke[:1].copy())
            continue
        places = np.linspace(0.0, along[-1], max(1, round(along[-1] / spacing)) + 1)
        columns = [np.interp(places, along, line[:, axis]) for axis in (0, 1)]
        even.append(np.stack(columns, axis=1).astype(np.float32))
    return even


# --------------------------------------------------------------------------- sequences


def to_stroke3(strokes: Strokes) -> NDArray[np.float32]:
    """Rows (n, 3) of (dx, dy, lifted); the first row is the first point's position."""
    offsets, last = _offsets(strokes, 0.0)
    return np.concatenate([offsets, last[:, None]], axis=1).astype(np.float32)


def from_stroke3(rows: NDArray[Any]) -> Strokes:
    """The strokes of stroke-3 rows (n, 3); [] for no rows. The last stroke may lack its lift."""
    return _cut(rows[:, :2].astype(np.float64), rows[:, 2] > 0.5, 0.0)


def to_stroke5(strokes: Strokes, scale: float, max_points: int) -> NDArray[np.float32]:
    """Rows (n + 1, 5) for n points, the end row included; offsets divided by ``scale``.

    Raises:
        ValueError: more than ``max_points`` points; :func:`fit` the sketch first.
    """
    points = count_points(strokes)
    if points > max_points:
        raise ValueError(f"{points} points are more than max_points={max_points}: fit() first")
    offsets, last = _offsets(strokes, CENTRE)
    rows = np.zeros((points + 1, 5), dtype=np.float32)
    rows[:-1, :2] = offsets / scale
    rows[:-1, 2] = ~last
    rows[:-1, 3] = last
    rows[-1, 4] = 1
    return rows


def from_stroke5(rows: NDArray[Any], scale: float) -> Strokes:
    """The strokes of stroke-5 rows (n, 5) up to the first end row, or all rows if there is none.

    [] for a sequence that ends at once. The offset of an end row is no point.
    """
    ends = np.flatnonzero(rows[:, 2:].argmax(axis=1) == 2)
    real = rows[: ends[0]] if len(ends) else rows
    return _cut(real[:, :2].astype(np.float64) * scale, real[:, 3] > real[:, 2], CENTRE)


def offset_scale(sketches: Iterable[Strokes]) -> float:
    """Standard deviation of all stroke-5 offsets, dx and dy pooled; 1 if they are all equal.

    Call it on the training sketches alone, in the form in which they are trained.

    Raises:
        UserError: no sketches.
    """
    count, total, square = 0, 0.0, 0.0
    for strokes in sketches:
        offsets, _ = _offsets(strokes, CENTRE)
        count += offsets.size
        total += float(offsets.sum())
        square += float((offsets * offsets).sum())
    if count == 0:
        raise UserError("no training sketches: the scale of the offsets cannot be measured")
    variance = square / count - (total / count) ** 2
    return math.sqrt(variance) if variance > 1e-12 else 1.0


# --------------------------------------------------------------------------- deformation


def deform(strokes: Strokes, rng: np.random.Generator, config: AugmentConfig) -> Strokes:
    """The sketch as another hand might have drawn it; ``flip`` is the caller's (the photo flips
    along, see :func:`mirror`).

    Strokes are left out, bent by a smooth displacement along their length, and the sketch is
    rotated, scaled per axis and shifted about the centre of the canvas. The result is not canonical
    again. The strokes given are not changed.
    """
    kept = rng.random(len(strokes)) >= config.stroke_dropout
    if not kept.any():
        kept[rng.integers(len(strokes))] = True
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    scale = 1 + rng.uniform(-config.scale, config.scale, size=2)
    shift = rng.uniform(-config.shift, config.shift, size=2)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * scale
    changed: Strokes = []
    for stroke, keep in zip(strokes, kept, strict=True):
        if keep:
            line = stroke.astype(np.float64)
            line += _bend(_arc(line), rng, config.bend)
            changed.append(((line - CENTRE) @ turn + (CENTRE + shift)).astype(np.float32))
    return changed


def _bend(along: NDArray[np.float64], rng: np.random.Generator, size: float) -> NDArray[np.float64]:
    """Displacement (n, 2) at the lengths ``along``: a few long waves, standard deviation ``size``.

    The first wave is constant (the stroke is misplaced), the others have the wavelengths 380, 190
    and 127 canvas units, so that short strokes keep their form and long ones bend.
    """
    height = rng.normal(0.0, size * math.sqrt(2 / _BEND_WAVES), size=(_BEND_WAVES, 2))
    phase = rng.uniform(0.0, 2 * math.pi, size=(_BEND_WAVES, 2))
    turns = np.arange(_BEND_WAVES) * (2 * math.pi / _BEND_LENGTH)
    waves = np.cos(along[:, None, None] * turns[:, None] + phase)
    return np.asarray((waves * height).sum(axis=1))


def _arc(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length along a stroke (n, 2) up to each of its points."""
    steps = np.hypot(*np.diff(line, axis=0).T)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _box(strokes: Strokes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if count_points(strokes) == 0:
        raise UserError("the sketch has no points; leave it out or draw it again")
    points = np.concatenate(strokes).astype(np.float64)
    return points.min(axis=0), points.max(axis=0)


def _offsets(strokes: Strokes, start: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Offsets (n, 2) from point to point, the first from ``start``, and which points are last."""
    if not strokes:
        return np.zeros((0, 2)), np.zeros(0, dtype=bool)
    points = np.concatenate(strokes).astype(np.float64)
    last = np.zeros(len(points), dtype=bool)
    last[np.cumsum([len(stroke) for stroke in strokes]) - 1] = True
    return np.diff(points, axis=0, prepend=np.full((1, 2), start)), last


def _cut(offsets: NDArray[np.float64], last: NDArray[np.bool_], start: float) -> Strokes:
    """Strokes from offsets (n, 2), cut after the points that are last."""
    points = (np.cumsum(offsets, axis=0) + start).astype(np.float32)
    parts = np.split(points, np.flatnonzero(last) + 1)
    return [part for part in parts if len(part)]
