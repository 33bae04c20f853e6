"""Raster sketches: strokes drawn as anti-aliased lines, a whole batch at once.

The value of a pixel follows from the distance of its centre to the nearest stroke alone: ink up to
half the line width, then a ramp one pixel wide. So a line looks the same in every direction, a
stroke of one point is a dot, and 64 to 128 pixels a side keep what hard-edged lines would lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.strokes import CANVAS, Strokes

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 2.5
"""Line width, canvas units; the mean width of the paper's lines (Bresenham, then one dilation by a
3 x 3 cross: 3 pixels along an axis, 2.1 on a diagonal). A line is never thinner than one pixel."""

TOLERANCE = 1
"""Largest difference, of 255, between :func:`rasterise` and :func:`rasterise_reference`."""

_AT_ONCE = 24_576
"""Steps of runs evaluated at a time: few enough for the cache, enough to hide numpy's cost of a
call."""


# --------------------------------------------------------------------------- hard raster


def rasterise(
    batch: Sequence[Strokes],
    size: int,
    width: float = WIDTH,
    points: int | Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """Raster sketches (B, size, size), 255 is ink; the canvas is scaled to ``size`` pixels.

    ``width`` is in canvas units. ``points`` draws only the first so many points of each sketch
    (one number, or one a sketch): the drawing as far as the pen has come. What lies outside the
    canvas is cut off.

    Raises:
        ValueError: ``points`` is negative or not one a sketch.
    """
    canvas_BSS = np.zeros((len(batch), size, size), dtype=np.uint8)
    xy, lengths, owner = _points(batch, points)
    if len(xy) == 0:
        return canvas_BSS
    xy *= size / CANVAS
    xy -= 0.5  # pixel i has its centre at i
    reach = _half_width(size, width) + 0.5
    runs = _runs(xy, lengths, owner, size, reach)
    clip = bool(xy.min() <= 2 * reach or xy.max() >= size - 1 - 2 * reach)
    # Runs with the same direction and thickness share strides and array shapes.
    kinds = 2 * runs.rows + runs.steep
    for kind in np.flatnonzero(np.bincount(kinds)).tolist():
        _draw(canvas_BSS.reshape(-1), runs, np.flatnonzero(kinds == kind), size, reach, clip)
    return canvas_BSS


def rasterise_reference(
    batch: Sequence[Strokes],
    size: int,
    width: float = WIDTH,
    points: int | Sequence[int] | None = None,
) -> NDArray[np.uint8]:
    """What :func:`rasterise` has to give, from the distance of every pixel to every segment."""
    half = _half_width(size, width)
    y_SS, x_SS = np.mgrid[:size, :size] + 0.5
    canvas_BSS = np.zeros((len(batch), size, size), dtype=np.uint8)
    for canvas_SS, strokes, limit in zip(canvas_BSS, batch, _limits(batch, points), strict=True):
        distance_SS = np.full((size, size), np.inf)
        drawn = 0
        for stroke in strokes:
            line = stroke[: max(0, limit - drawn)].astype(np.float64) * (size / CANVAS)
            drawn += len(line)
            for (ax, ay), (bx, by) in zip(line, [*line[1:], *line[-1:]], strict=True):
                dx, dy = bx - ax, by - ay
                square = dx * dx + dy * dy
                along_SS = ((x_SS - ax) * dx + (y_SS - ay) * dy) / (square or 1.0)
                along_SS = along_SS.clip(0, 1)
                to_segment_SS = np.hypot(x_SS - ax - along_SS * dx, y_SS - ay - along_SS * dy)
                distance_SS = np.minimum(distance_SS, to_segment_SS)
        canvas_SS[:] = np.rint(255 * (half + 0.5 - distance_SS).clip(0, 1))
    return canvas_BSS


def _half_width(size: int, width: float) -> float:
    return max(width * size / CANVAS, 1.0) / 2


def _limits(batch: Sequence[Strokes], points: int | Sequence[int] | None) -> list[int]:
    """Points to draw of each sketch."""
    if points is None:
        return [sum(map(len, strokes)) for strokes in batch]
    limits = [points] * len(batch) if isinstance(points, int) else [int(n) for n in points]
    if len(limits) != len(batch) or min(limits, default=0) < 0:
        raise ValueError(f"points: {points!r} for a batch of {len(batch)} sketches")
    return limits


def _points(
    batch: Sequence[Strokes], points: int | Sequence[int] | None
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """The points (n, 2) to draw, the points of each stroke, and the sketch of each point."""
    strokes = [stroke for sketch in batch for stroke in sketch]
    if not strokes:
        empty = np.zeros(0, dtype=np.int64)
        return np.zeros((0, 2), dtype=np.float32), empty, empty
    xy = np.concatenate(strokes)
    lengths = np.fromiter(map(len, strokes), np.int64, len(strokes))
    sketch = np.repeat(np.arange(len(batch)), [len(s) for s in batch])
    owner = np.repeat(sketch, lengths)
    if points is None:
        return xy, lengths, owner
    limit = np.array(_limits(batch, points), dtype=np.int64)
    before = np.cumsum(lengths) - lengths  # points before the stroke, in the batch
    start = np.searchsorted(owner, np.arange(len(batch)))  # and before the sketch
    drawn = np.arange(len(xy)) - start[owner] < limit[owner]
    lengths = np.clip(limit[sketch] - (before - start[sketch]), 0, lengths)
    return xy[drawn], lengths[lengths > 0], owner[drawn]


class _Runs(NamedTuple):
    """Line segments as runs of pixels along their major axis, the one on which they are longer.

    All arrays hold one value a segment. Each step along the major axis evaluates ``rows`` pixels
    across it, around the line.
    """

    steep: NDArray[np.bool_]
    """The major axis is y."""
    rows: NDArray[np.int64]
    """Pixels across; 0 for a segment that misses the canvas along its major axis."""
    steps: NDArray[np.int64]
    """Pixels along."""
    base: NDArray[np.int64]
    """Flat index of the first step's pixel in row (or column) 0 of its sketch."""
    line: NDArray[np.float32]
    """(5, n): slope; minor coordinate at the first step; cosine of the angle to the major axis;
    distance of the first step from the segment's middle, along the segment; half its length."""


def _runs(
    xy: NDArray[np.float32],
    lengths: NDArray[np.int64],
    owner: NDArray[np.int64],
    size: int,
    reach: float,
) -> _Runs:
    ends = np.cumsum(lengths) - 1
    last = np.zeros(len(xy), dtype=bool)
    last[ends] = True
    starts = ~last
    starts[ends[lengths == 1]] = True  # a dot: a segment from the point to itself
    a = np.flatnonzero(starts)
    b = a + ~last[a]
    start_2n, step_2n = xy[a].T, (xy[b] - xy[a]).T
    steep = np.abs(step_2n[1]) > np.abs(step_2n[0])
    major, minor = np.where(steep, start_2n[::-1], start_2n)
    d_major, d_minor = np.where(steep, step_2n[::-1], step_2n)
    length = np.hypot(d_major, d_minor)
    dot = length == 0
    slope = d_minor / np.where(dot, 1, d_major)
    cosine = np.where(dot, 1, np.abs(d_major)) / np.where(dot, 1, length)
    # Around its start a segment draws the whole round end; beyond its end, only its own slanted
    # body: there the next segment of the stroke begins with a round end of its own.
    tail = np.where(last[b] | dot, reach, reach * np.abs(slope) * cosine)
    forward = d_major >= 0
    low = major + np.where(forward, -reach, d_major - tail)
    high = major + np.where(forward, d_major + tail, reach)
    first = np.clip(np.ceil(low), 0, size)
    steps = np.clip(np.floor(high), -1, size - 1) + 1 - first
    first_index = first.astype(np.int64)
    return _Runs(
        steep=steep,
        rows=np.where(steps > 0, np.ceil(2 * reach / cosine), 0).astype(np.int64),
        steps=np.maximum(steps, 0).astype(np.int64),
        base=owner[a] * (size * size) + first_index * np.where(steep, size, 1),
        line=np.stack(
            [
                slope,
                minor + (first - major) * slope,
                cosine,
                (first - major - d_major / 2) / cosine,
                length / 2,
            ]
        ).astype(np.float32),
    )


def _draw(
    flat: NDArray[np.uint8],
    runs: _Runs,
    chosen: NDArray[np.int64],
    size: int,
    reach: float,
    clip: bool,
) -> None:
    """Draw the chosen runs, which have ``steep`` and ``rows`` in common."""
    rows = int(runs.rows[chosen[0]])
    if rows == 0:
        return
    along, across = (size, 1) if runs.steep[chosen[0]] else (1, size)
    steps = runs.steps[chosen]
    done = np.cumsum(steps)
    base = runs.base[chosen] - (done - steps) * along
    at_once = max(_AT_ONCE, size)  # a run has at most ``size`` steps
    cuts = np.searchsorted(done, np.arange(at_once, done[-1], at_once)).tolist()
    for low, high in zip([0, *cuts], [*cuts, len(chosen)], strict=True):
        times = steps[low:high]
        slope, centre, cosine, lengthwise, half = np.repeat(
            runs.line[:, chosen[low:high]], times, axis=1
        )
        begin = int(done[low] - steps[low])
        index = np.arange(begin, begin + len(slope))
        step = (index - np.repeat(done[low:high] - times, times)).astype(np.float32)
        index *= along
        index += np.repeat(base[low:high], times)
        centre += step * slope
        if clip:
            # Keeps the integers small; what is moved stays off the canvas.
            np.clip(centre, -2 * rows, size + 2 * rows, out=centre)
        top = np.ceil(centre - rows / 2)
        index += top.astype(np.int64) * across
        # Of the first row's pixels: the distance to the line, and the place along it, from the
        # segment's middle. Both grow by a constant from row to row.
        offset = top - centre
        lengthwise += step / cosine + offset * slope * cosine
        offset *= cosine
        sine = slope * cosine
        distance, beyond = np.empty_like(offset), np.empty_like(offset)
        for row in range(rows):
            if row:
                offset += cosine
                lengthwise += sine
                index += across
            np.abs(lengthwise, out=beyond)
            np.maximum(beyond, half, out=beyond)
            beyond -= half
            beyond *= beyond
            np.multiply(offset, offset, out=distance)
            distance += beyond
            np.sqrt(distance, out=distance)
            np.subtract(reach + 0.5 / 255, distance, out=distance)
            distance *= 255
            ink = np.clip(distance, 0, 255, out=distance).astype(np.uint8)
            if clip:
                seen = (top + row >= 0) & (top + row < size)
                np.maximum.at(flat, index[seen], ink[seen])
            else:
                np.maximum.at(flat, index, ink)


# --------------------------------------------------------------------------- soft raster


def soft_rasterise(points_BN2: Tensor, pen_BN: Tensor, size: int, sigma: float) -> Tensor:
    """Rasters (B, size, size) in [0, 1], 1 is ink, with gradients to the points and the pen.

    A pixel is the largest ``pen * exp(-d^2 / (2 sigma^2))`` of all segments, d being the distance
    of its centre. ``pen_BN[:, i]``, in [0, 1], is the ink of the segment from point i to point
    i + 1 (0: the pen is lifted; the last column has no segment). Points and ``sigma`` are in
    canvas units. A stroke of one point leaves no ink.
    """
    import torch

    points_BN2 = points_BN2 * (size / CANVAS)
    sigma = sigma * size / CANVAS
    start_BM2, end_BM2, pen_BM = points_BN2[:, :-1], points_BN2[:, 1:], pen_BN[:, :-1]
    axis_S = torch.arange(size, device=points_BN2.device, dtype=points_BN2.dtype) + 0.5
    pixel_P2 = torch.cartesian_prod(axis_S, axis_S).flip(1)

    def exponent(start_BP2: Tensor, end_BP2: Tensor) -> Tensor:
        step_BP2 = end_BP2 - start_BP2
        to_pixel_BP2 = pixel_P2 - start_BP2
        square_BP1 = step_BP2.square().sum(-1, keepdim=True)
        along_BP1 = (to_pixel_BP2 * step_BP2).sum(-1, keepdim=True) / square_BP1.clamp(min=1e-12)
        away_BP2 = to_pixel_BP2 - along_BP1.clamp(0, 1) * step_BP2
        return away_BP2.square().sum(-1) / (-2 * sigma * sigma)

    # Only the nearest segment of a pixel has a gradient, so only it needs a graph: memory does not
    # grow with the number of segments.
    with torch.no_grad():
        shape_BP = (len(points_BN2), len(pixel_P2))
        best_BP = points_BN2.new_full(shape_BP, -torch.inf)
        nearest_BP = torch.zeros(shape_BP, dtype=torch.long, device=points_BN2.device)
        for m in range(pen_BM.shape[1]):
            log_ink_BP = exponent(start_BM2[:, m, None], end_BM2[:, m, None])
            log_ink_BP += pen_BM[:, m, None].log()
            nearest_BP[log_ink_BP > best_BP] = m
            torch.maximum(best_BP, log_ink_BP, out=best_BP)
    index_BP2 = nearest_BP[..., None].expand(-1, -1, 2)
    chosen_BP = exponent(start_BM2.gather(1, index_BP2), end_BM2.gather(1, index_BP2))
    ink_BP = pen_BM.gather(1, nearest_BP) * chosen_BP.exp()
    return ink_BP.view(-1, size, size)
