"""Rasters and photos to strokes: threshold or edges, thin, follow, join, simplify, order.

``trace_drawing`` turns a raster sketch back into the strokes it was drawn with, so that the
generator can learn from it. ``trace_photo`` draws the contours of a photo: the simplest sketcher.
Both are deterministic.

The thinned lines are a graph: pixels with two neighbours form chains, all others are nodes. At a
node two chains become one stroke where they go on straightest, as a pen does at a crossing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu
from skimage.morphology import skeletonize

from sbir_ray.data.strokes import Strokes, canonical, rdp

MAX_POINTS = 400
"""Most points of a traced sketch; the least visible strokes beyond it are left out."""
EPSILON = 1.0
"""Tolerance of the simplification (RDP), pixels."""

_PHOTO_SIDE = 256
_DRAWING_SIDE = 512
"""Longest sides, pixels, at which photos and drawings are traced; larger ones are reduced."""
_BLUR = 1.4
"""Standard deviation of the blur before the gradient of a photo, pixels."""
_WEAK, _STRONG = 1.3, 3.5
"""Thresholds of the gradient's hysteresis, grey levels (of 255) a pixel."""
_FAINT = 0.05
"""A photo's contours that extend over less than this share of its longest side are left out; faint
ones have to be larger."""
_SPECK = 3
"""Strokes that extend over less, in pixels, are specks."""
_TOUCHING = 3
"""Pixels between two nodes up to which they are one in any case."""
_TANGENT = 7
"""Pixels over which the direction of a chain's end is taken."""
_TURN, _JOIN_TURN, _FAN = np.cos(np.radians([50.0, 40.0, 65.0])).tolist()
"""Cosines of the sharpest turns at which a stroke goes on through a node and across a gap, and at
which chains fan out from the one that crossing lines share."""
_PAPER = 8
"""Range of grey levels below which a drawing is blank."""

_STAIRS = np.array([1, 2, 3, 2, 1]) / 9
_TRAVEL = 40.0
"""Way of the lifted pen, pixels, that halves a stroke's claim to be drawn next."""

Chain: TypeAlias = NDArray[np.intp]
"""Pixels (n, 2) as (row, column), each beside the next."""
Line: TypeAlias = NDArray[np.float64]
"""Points (n, 2) as (x, y), pixels; the centre of the first pixel is (0.5, 0.5)."""


# --------------------------------------------------------------------------- drawings


def trace_drawing(grey: NDArray[np.uint8]) -> Strokes:
    """The strokes of a raster sketch (H, W), in canonical form; [] for a blank one.

    Dark ink on light paper or the reverse: the larger part is the paper. Sides above 512 pixels are
    reduced. Filled areas are drawn as their middle line.
    """
    grey = _reduce(grey, _DRAWING_SIDE)
    if int(np.ptp(grey)) < _PAPER:
        return []
    ink = grey > threshold_otsu(grey)
    if ink.mean() > 0.5:
        ink = ~ink
    lines = _thin(ink)
    thickness = float(ink.sum() / lines.sum())
    smooth = [_smooth(chain) for chain in _follow(lines, spur=thickness + 1, bridge=5 * thickness)]
    joined = _join(smooth, gap=thickness + 2)
    return _sketch(joined, [_length(line) for line in joined], MAX_POINTS)


# --------------------------------------------------------------------------- photos


def edge_map(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The edges of a photo (H, W, 3) as an ink raster (H, W): 255 on an edge, one pixel wide."""
    found, _ = _edges(rgb)
    return np.where(found, 255, 0).astype(np.uint8)


def trace_photo(rgb: NDArray[np.uint8], max_points: int = MAX_POINTS) -> Strokes:
    """The contours of a photo (H, W, 3) as strokes, in canonical form, long strong ones first.

    At most ``max_points`` points. [] for a photo without edges: there is nothing to draw, and the
    caller counts it as failed. Photos with sides above 256 pixels are reduced.
    """
    rgb = _reduce(rgb, _PHOTO_SIDE)
    found, strength = _edges(rgb)
    if not found.any():
        return []
    strong = float(np.quantile(strength[found], 0.9))
    lines = _join([_smooth(chain) for chain in _follow(found, spur=4, bridge=_TOUCHING)], gap=6)
    weights = [_extent(line) * math.sqrt(_contrast(line, strength) / strong) for line in lines]
    least = _FAINT * max(found.shape)
    visible = [n for n, weight in enumerate(weights) if weight > least]
    return _sketch([lines[n] for n in visible], [weights[n] for n in visible], max_points)


def _edges(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Canny's edges of a colour photo: where one runs (H, W), and the gradient's strength (H, W).

    The gradient of a pixel is that of the channel in which it is largest, so that an edge between
    two colours of the same brightness counts, and an edge in all channels is found once.
    """
    blurred = rgb.astype(np.float32)
    for axis in (0, 1):
        blurred = ndimage.gaussian_filter1d(blurred, _BLUR, axis=axis, truncate=3, mode="nearest")
    padded = np.pad(blurred, ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx_HW3 = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    dy_HW3 = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    square_HW3 = dx_HW3 * dx_HW3 + dy_HW3 * dy_HW3
    channel = square_HW3.argmax(axis=2)[..., None]
    dx, dy, square = (
        np.take_along_axis(x, channel, 2)[..., 0] for x in (dx_HW3, dy_HW3, square_HW3)
    )
    strength = np.sqrt(square)
    # Keep the ridge: pixels not weaker than their neighbours across the edge.
    around = np.pad(strength, 1)
    height, width = strength.shape
    sector = np.rint(np.arctan2(dy, dx) * (4 / np.pi)).astype(np.int8) % 4
    ridge = np.zeros(strength.shape, dtype=bool)
    for number, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = around[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = around[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        ridge |= (sector == number) & (strength > ahead) & (strength >= behind)
    weak = ridge & (strength > _WEAK)
    parts, count = ndimage.label(weak, np.ones((3, 3)))
    good = np.zeros(count + 1, dtype=bool)
    good[parts[weak & (strength > _STRONG)]] = True
    return _thin(good[parts]), strength


def _thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    thinned: NDArray[np.bool_] = skeletonize(mask)
    return thinned


# --------------------------------------------------------------------------- following


def _follow(lines: NDArray[np.bool_], spur: float, bridge: float) -> list[Chain]:
    """The strokes of thinned lines (H, W), pixel by pixel.

    Side branches of at most ``spur`` pixels that end freely are thinning's own and are left out.
    Lines that cross share up to ``bridge`` pixels, more the smaller the angle: the chain between
    two nodes that fan out from it, which thus are one.
    """
    place = np.argwhere(lines)
    neighbours = _neighbours(lines, place)
    node_of = _nodes(neighbours)

    def free(pixel: int) -> bool:
        return len(neighbours[pixel]) == 1

    chains = [
        chain
        for chain in _chains(neighbours, node_of)
        if len(chain) - 1 > spur or free(chain[0]) == free(chain[-1])
    ]
    paths = [place[chain] for chain in chains]
    outward = [_outward(path, end) for path in paths for end in (0, 1)]
    node = [node_of.get(chain[end], -1 - chain[end]) for chain in chains for end in (0, -1)]
    meeting: dict[int, set[int]] = {}  # node -> the ends that meet there, 2 * chain + (0 or 1)
    for end, at in enumerate(node):
        meeting.setdefault(at, set()).add(end)

    def straight(one: int, other: int) -> float:
        return -float(outward[one] @ outward[other])

    merged: set[int] = set()
    for number, chain in enumerate(chains):
        ends = 2 * number, 2 * number + 1
        nodes = node[ends[0]], node[ends[1]]
        if len(chain) - 1 > bridge or nodes[0] == nodes[1] or merged & {*nodes}:
            continue
        others = [meeting[at] - {end} for end, at in zip(ends, nodes, strict=True)]
        fan_out = all(
            len(side) > 1 and all(straight(end, e) > _FAN for e in side)
            for end, side in zip(ends, others, strict=True)
        )
        if fan_out or (len(chain) - 1 <= _TOUCHING and not free(chain[0])):
            merged |= {*nodes}
            meeting[nodes[0]], meeting[nodes[1]] = others[0] | others[1], set()
            paths[number] = paths[number][:0]
    bonds: dict[int, int] = {}
    for ends_here in meeting.values():
        least = -1.0 if len(ends_here) == 2 else _TURN
        turns = [(straight(i, j), i, j) for i, j in combinations(sorted(ends_here), 2)]
        for turn, i, j in sorted(turns, key=lambda t: -t[0]):
            if turn >= least and i not in bonds and j not in bonds:
                bonds[i], bonds[j] = j, i
    return [stroke for stroke in _concatenate(paths, bonds) if len(stroke)]


def _neighbours(lines: NDArray[np.bool_], place: NDArray[np.intp]) -> list[list[int]]:
    """The neighbours of each line pixel, by number.

    Pixels that touch at a corner are neighbours only if no third one joins them, so that stairs
    are chains and not a row of junctions.
    """
    number = np.full((lines.shape[0] + 1, lines.shape[1] + 2), -1)
    number[:-1, 1:-1][lines] = np.arange(len(place))
    here, right = number[:-1, 1:-1], number[:-1, 2:]
    left, below = number[:-1, :-2], number[1:, 1:-1]
    below_right, below_left = number[1:, 2:], number[1:, :-2]
    pairs = []
    for other, free in (
        (right, True),
        (below, True),
        (below_right, (right < 0) & (below < 0)),
        (below_left, (left < 0) & (below < 0)),
    ):
        linked = (here >= 0) & (other >= 0) & free
        pairs.append(np.stack([here[linked], other[linked]]))
    one, two = np.concatenate(pairs, axis=1)
    source, target = np.concatenate([one, two]), np.concatenate([two, one])
    targets = target[np.argsort(source, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(source, minlength=len(place))).tolist()
    return [targets[low:high] for low, high in zip([0, *ends], ends, strict=False)]


def _nodes(neighbours: list[list[int]]) -> dict[int, int]:
    """The node of each pixel that has not two neighbours; junction pixels side by side are one."""
    node_of: dict[int, int] = {}
    for pixel, around in enumerate(neighbours):
        if len(around) == 2 or pixel in node_of:
            continue
        node_of[pixel] = pixel
        waiting = [pixel] if len(around) > 2 else []
        while waiting:
            for other in neighbours[waiting.pop()]:
                if len(neighbours[other]) > 2 and other not in node_of:
                    node_of[other] = pixel
                    waiting.append(other)
    return node_of


def _chains(neighbours: list[list[int]], node_of: dict[int, int]) -> list[list[int]]:
    """Pixel numbers from node to node, both included; then loops without a node, closed."""
    seen: set[int] = set()
    chains: list[list[int]] = []

    def walk(chain: list[int], start: int) -> None:
        before, here = chain[-1], start
        while here not in node_of and here not in seen:
            seen.add(here)
            chain.append(here)
            first, second = neighbours[here]
            before, here = here, second if first == before else first
        chains.append([*chain, here])

    for pixel, node in node_of.items():
        for other in neighbours[pixel]:
            if other in node_of:
                if node_of[other] != node and pixel < other:
                    chains.append([pixel, other])
            elif other not in seen:
                walk([pixel], other)
    for pixel in range(len(neighbours)):
        if pixel not in node_of and pixel not in seen:
            seen.add(pixel)
            walk([pixel], neighbours[pixel][0])
    return chains


def _outward(path: NDArray[np.generic], end: int) -> NDArray[np.float64]:
    """Unit vector that leaves a path at its beginning (``end`` 0) or its end (1)."""
    tail = path[-1 - _TANGENT :] if end else path[_TANGENT::-1]
    vector = np.subtract(tail[-1], tail[0], dtype=np.float64)
    unit: NDArray[np.float64] = vector / max(math.hypot(*vector), 1e-9)
    return unit


def _concatenate(paths: Sequence[NDArray[Any]], bonds: dict[int, int]) -> list[NDArray[Any]]:
    """Paths joined at their bonded ends; end e of path p has the number 2 p + e."""
    used: set[int] = set()
    joined: list[NDArray[Any]] = []
    for path in range(len(paths)):
        if path in used:
            continue
        begin = 2 * path
        while begin in bonds:
            begin = bonds[begin] ^ 1
            if begin // 2 == path:  # closed
                break
        pieces: list[NDArray[Any]] = []
        end: int | None = begin
        while end is not None and end // 2 not in used:
            used.add(end // 2)
            pieces.append(paths[end // 2][:: -1 if end % 2 else 1])
            end = bonds.get(end ^ 1)
        if end == begin:  # a closed stroke ends where it began
            pieces.append(pieces[0][:1])
        whole = np.concatenate(pieces)
        new = np.ones(len(whole), dtype=bool)  # two chains share the pixel at which they meet
        new[1:] = (whole[1:] != whole[:-1]).any(axis=1)
        joined.append(whole[new])
    return joined


# --------------------------------------------------------------------------- strokes


def _smooth(chain: Chain) -> Line:
    """The points of a chain without the stairs of its pixels; its ends stay."""
    points: Line = chain[:, ::-1].astype(np.float64) + 0.5
    reach = len(_STAIRS) // 2
    if len(points) <= reach + 1:
        return points
    if (chain[0] == chain[-1]).all():
        padded = np.concatenate([points[-1 - reach : -1], points, points[1 : 1 + reach]])
    else:
        before = 2 * points[0] - points[reach:0:-1]
        after = 2 * points[-1] - points[-2 : -2 - reach : -1]
        padded = np.concatenate([before, points, after])
    smooth: Line = np.stack([np.convolve(c, _STAIRS, "valid") for c in padded.T], axis=1)
    return smooth


def _join(lines: Sequence[Line], gap: float) -> list[Line]:
    """Lines whose ends lie within ``gap`` and point at each other, joined; nearest first."""
    if not lines:
        return []
    tips = np.array([line[end] for line in lines for end in (0, -1)])
    outward = [_outward(line, end) for line in lines for end in (0, 1)]
    found = []
    for i, j in cKDTree(tips).query_pairs(gap):
        across = tips[j] - tips[i]
        distance = math.hypot(*across)
        if i // 2 == j // 2 and _length(lines[i // 2]) < 4 * gap:
            continue
        if distance > 1.5:
            across /= distance
            aligned = min(float(outward[i] @ across), -float(outward[j] @ across))
        else:
            aligned = -float(outward[i] @ outward[j])
        if aligned > _JOIN_TURN:
            found.append((distance, i, j))
    bonds: dict[int, int] = {}
    for _, i, j in sorted(found):
        if i not in bonds and j not in bonds:
            bonds[i], bonds[j] = j, i
    return _concatenate(lines, bonds)


def _sketch(lines: Sequence[Line], weights: Sequence[float], max_points: int) -> Strokes:
    """The sketch of the weightiest lines, simplified, in the order a person might draw them."""
    kept: list[tuple[float, Line]] = []
    points = 0
    large = [n for n, line in enumerate(lines) if _extent(line) > _SPECK]
    for number in sorted(large, key=lambda n: (-weights[n], n)):
        line = rdp(lines[number], EPSILON).astype(np.float64)
        if points + len(line) <= max_points:
            points += len(line)
            kept.append((weights[number], line))
    strokes: Strokes = []
    pen = np.zeros(2)
    while kept:
        # What stands out comes first, but the pen rather goes on nearby.
        claims = [weight / (_TRAVEL + min(_ways(pen, line))) for weight, line in kept]
        line = kept.pop(int(np.argmax(claims)) if strokes else 0)[1]
        to_first, to_last = _ways(pen, line)
        if to_last < to_first:
            line = line[::-1]
        pen = line[-1]
        strokes.append(line.astype(np.float32))
    return canonical(strokes) if strokes else []


def _ways(pen: NDArray[np.float64], line: Line) -> tuple[float, float]:
    """Ways of the pen to the line's beginning and to its end."""
    return math.dist(pen, line[0]), math.dist(pen, line[-1])


def _extent(line: Line) -> float:
    """Diagonal of the box: unlike the length, small for the scribble of a texture."""
    return math.hypot(*np.ptp(line, axis=0))


def _contrast(line: Line, strength: NDArray[np.float32]) -> float:
    """Mean gradient along the line."""
    column, row = line.astype(int).T
    return float(strength[row, column].mean())


def _length(line: Line) -> float:
    return float(np.hypot(*np.diff(line, axis=0).T).sum())


def _reduce(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image (H, W) or (H, W, 3) with its longest side at most ``side``."""
    longest = max(image.shape[:2])
    if longest <= side:
        return image
    height, width = (max(1, round(n * side / longest)) for n in image.shape[:2])
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
    return np.asarray(small)
