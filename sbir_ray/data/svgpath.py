"""The geometry of SVG: path data, transforms and basic shapes as chains of cubic curves.

A chain is a float64 array (3k + 1, 2): its start, then three control points for each curve. Lines,
quadratic curves and arcs are written as cubic curves, so that a transform is one product and there
is one way to cut them into points. Every function takes time in proportion to its text.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.strokes import MAX_POINTS, MAX_VALUE

Chain = NDArray[np.float64]

_LONGEST_NUMBER = 64
_TINY = 1e-12
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_COMMAND = re.compile(r"[\s,]*+([MmZzLlHhVvCcSsQqTtAa])")
_FIELD = re.compile(rf"[\s,]*+({_NUMBER})")
_FLAG = re.compile(r"[\s,]*+([01])")
_FUNCTION = re.compile(r"[\s,]*+(\w{1,10})\s*+\(([^()]*+)\)")
_FIELDS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}


class GeometryError(ValueError):
    """Text that is not SVG geometry; says what is wrong with it."""


def number(text: str) -> float:
    """One number, written as in SVG, not larger than ``MAX_VALUE``.

    Raises:
        GeometryError: something else.
    """
    if len(text) > _LONGEST_NUMBER or not re.fullmatch(_NUMBER, text):
        raise GeometryError(f"{text[:20]!r} is not a number")
    value = float(text)
    if not abs(value) <= MAX_VALUE:
        raise GeometryError(f"{text[:20]} is not within +-{MAX_VALUE:.0f}")
    return value


def numbers(text: str) -> list[float]:
    """Numbers parted by blanks and commas.

    Raises:
        GeometryError: something else in between.
    """
    text = text.strip(" \t\r\n,")
    values: list[float] = []
    place = 0
    while place < len(text):
        match = _FIELD.match(text, place)
        if match is None:
            raise GeometryError(f"{text[place : place + 20]!r} is not a number")
        values.append(number(match[1]))
        place = match.end()
    return values


def transform(text: str) -> NDArray[np.float64]:
    """The matrix (3, 3) of a transform attribute.

    Raises:
        GeometryError: an unknown function, or one with the wrong numbers.
    """
    matrix = np.eye(3)
    text = text.strip(" \t\r\n,")
    place = 0
    while place < len(text):
        match = _FUNCTION.match(text, place)
        if match is None:
            raise GeometryError(f"{text[place : place + 20]!r} is not a transform")
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at the result
            matrix = matrix @ _function(match[1], numbers(match[2]))
        place = match.end()
    return matrix


def polyline(points: Sequence[tuple[float, float]] | NDArray[np.float64]) -> Chain:
    """The chain of a polyline (n, 2)."""
    line = np.asarray(points, dtype=np.float64)
    start, end = line[:-1], line[1:]
    thirds = np.stack([start + (end - start) / 3, end - (end - start) / 3, end], axis=1)
    return np.concatenate([line[:1], thirds.reshape(-1, 2)])


def rectangle(x: float, y: float, width: float, height: float, rx: float, ry: float) -> list[Chain]:
    """The outline of a rectangle with rounded corners; [] without an area."""
    if not (width > 0 and height > 0):
        return []
    rx, ry = min(rx, width / 2), min(ry, height / 2)
    if not (rx > 0 and ry > 0):
        right, bottom = x + width, y + height
        return [polyline([(x, y), (right, y), (right, bottom), (x, bottom), (x, y)])]
    corners = [(rx, ry), (-rx, ry), (-rx, -ry), (rx, -ry)]
    sides = [
        f"h{width - 2 * rx}",
        f"v{height - 2 * ry}",
        f"h{2 * rx - width}",
        f"v{2 * ry - height}",
    ]
    arcs = [
        f"{side}a{rx} {ry} 0 0 1 {dx} {dy}" for side, (dx, dy) in zip(sides, corners, strict=True)
    ]
    return path(f"M{x + rx} {y}{''.join(arcs)}z")


def ellipse(cx: float, cy: float, rx: float, ry: float) -> list[Chain]:
    """The outline of an ellipse; [] without an area."""
    if not (rx > 0 and ry > 0):
        return []
    return path(f"M{cx - rx} {cy}a{rx} {ry} 0 0 1 {2 * rx} 0a{rx} {ry} 0 0 1 {-2 * rx} 0z")


def path(text: str) -> list[Chain]:
    """The chains of path data, one a subpath; a subpath that only moves the pen is left out.

    Raises:
        GeometryError: an unknown command, one with the wrong numbers, or too many of them.
    """
    parts: list[list[complex]] = []
    start = here = control = 0j
    before = "Z"
    for count, (letter, fields) in enumerate(_commands(text)):
        if count == MAX_POINTS:
            raise GeometryError(f"more than {MAX_POINTS} commands in a path")
        kind = letter.upper()
        base = here if letter.islower() else 0j
        if kind == "M":
            start = here = base + complex(*fields)
            parts.append([here])
            before = kind
            continue
        if not parts:
            raise GeometryError("a path does not start with M")
        if before == "Z":
            parts.append([here])
        curve, control = _curve(kind, fields, base, here, start, control, before)
        parts[-1] += curve
        here = curve[-1]
        before = kind
    return [np.array(part).view(np.float64).reshape(-1, 2) for part in parts if len(part) > 1]


def _commands(text: str) -> Iterator[tuple[str, list[float]]]:
    """Letters of path data, each with the numbers of one use."""
    text = text.strip(" \t\r\n,")
    place = 0
    while place < len(text):
        match = _COMMAND.match(text, place)
        if match is None:
            raise GeometryError(f"a path has {text[place : place + 20]!r}")
        letter, place = match[1], match.end()
        count = _FIELDS[letter.upper()]
        arc = letter in "Aa"
        repeated = False
        while True:
            fields: list[float] = []
            for index in range(count):
                # The flags of an arc may be written without a blank after them.
                pattern = _FLAG if arc and index in (3, 4) else _FIELD
                field = pattern.match(text, place)
                if field is None:
                    break
                fields.append(number(field[1]))
                place = field.end()
            if repeated and not fields:
                break
            if len(fields) < count:
                raise GeometryError(f"the command {letter} of a path lacks numbers")
            yield letter, fields
            if count == 0:
                break
            repeated = True
            letter = {"M": "L", "m": "l"}.get(letter, letter)


def _curve(
    kind: str,
    fields: list[float],
    base: complex,
    here: complex,
    start: complex,
    control: complex,
    before: str,
) -> tuple[list[complex], complex]:
    """The control points of a command, and the last one of its own that the next may mirror."""
    if kind == "A":
        return _arc(here, fields, base + complex(*fields[5:])), here
    if kind == "Z":
        return _line(here, start), start
    if kind in "HV":
        value = fields[0]
        end = complex(value, here.imag) if kind == "H" else complex(here.real, value)
        if base:
            end = here + (value if kind == "H" else value * 1j)
        return _line(here, end), end
    points = [base + complex(*pair) for pair in zip(fields[::2], fields[1::2], strict=True)]
    if kind == "L":
        return _line(here, points[0]), points[0]
    if kind in "ST":
        mirrored = before in ("CS" if kind == "S" else "QT")
        points = [2 * here - control if mirrored else here, *points]
    if len(points) == 3:
        return points, points[1]
    middle, end = points
    return [here + (middle - here) * 2 / 3, end + (middle - end) * 2 / 3, end], middle


def _line(start: complex, end: complex) -> list[complex]:
    return [start + (end - start) / 3, end - (end - start) / 3, end]


def _arc(start: complex, fields: list[float], end: complex) -> list[complex]:
    """An elliptical arc by its ends, as curves of at most a quarter turn (SVG 1.1, F.6.5, F.6.6).

    ``half`` and ``centre`` are in the ellipse's own frame, in which it is the unit circle.
    """
    rx, ry = abs(fields[0]), abs(fields[1])
    if rx < _TINY or ry < _TINY or abs(end - start) < _TINY:
        return _line(start, end)
    turn = cmath.rect(1.0, math.radians(fields[2]))
    half = (start - end) / 2 / turn
    half = complex(half.real / rx, half.imag / ry)
    square = abs(half) ** 2
    if square > 1:  # too small to reach both ends: as large as needed
        grow = math.sqrt(square)
        rx, ry, half, square = rx * grow, ry * grow, half / grow, 1.0
    large, sweep = fields[3] != 0, fields[4] != 0
    centre = math.sqrt((1 - square) / square) * half * (-1j if large != sweep else 1j)
    first = cmath.phase(half - centre)
    angle = cmath.phase((-half - centre) / (half - centre)) % (2 * math.pi)
    if not sweep:
        angle -= 2 * math.pi
    middle = (start + end) / 2
    pieces = max(1, math.ceil(abs(angle) / (math.pi / 2) - 1e-9))
    reach = 4 / 3 * math.tan(angle / pieces / 4)
    curve: list[complex] = []
    for piece in range(pieces):
        near = cmath.rect(1.0, first + angle * piece / pieces)
        far = cmath.rect(1.0, first + angle * (piece + 1) / pieces)
        for unit in (near * (1 + 1j * reach), far * (1 - 1j * reach), far):
            place = unit + centre
            curve.append(middle + turn * complex(place.real * rx, place.imag * ry))
    curve[-1] = end
    return curve


def _function(name: str, values: list[float]) -> NDArray[np.float64]:
    """The matrix of one function of a transform attribute."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 1.0, 0.0, 0.0
    match name, len(values):
        case "matrix", 6:
            a, b, c, d, e, f = values
        case "translate", 1 | 2:
            e, f = (*values, 0.0)[:2]
        case "scale", 1 | 2:
            a, d = values[0], values[-1]
        case "rotate", 1 | 3:
            angle = math.radians(values[0])
            a, b = math.cos(angle), math.sin(angle)
            c, d = -b, a
            x, y = (*values[1:], 0.0, 0.0)[:2]
            e, f = x - a * x - c * y, y - b * x - d * y
        case "skewX", 1:
            c = math.tan(math.radians(values[0]))
        case "skewY", 1:
            b = math.tan(math.radians(values[0]))
        case _:
            raise GeometryError(f"the transform {name} has {len(values)} numbers")
    return np.array([[a, c, e], [b, d, f], [0.0, 0.0, 1.0]])


# --------------------------------------------------------------------------- points


def pieces(chain: Chain, tolerance: float) -> NDArray[np.intp]:
    """Into how many equal steps of its parameter each curve is cut, so that the line through the
    points stays within ``tolerance`` of it (Wang's bound on the second differences)."""
    p0, p1, p2, p3 = chain[:-1:3], chain[1::3], chain[2::3], chain[3::3]
    bend = np.maximum(np.hypot(*(p0 - 2 * p1 + p2).T), np.hypot(*(p1 - 2 * p2 + p3).T))
    steps: NDArray[np.float64] = np.ceil(np.sqrt(0.75 * bend / tolerance))
    return np.maximum(steps, 1).astype(np.intp)


def points(chain: Chain, counts: NDArray[np.intp]) -> NDArray[np.float32]:
    """The points (n, 2) of a chain cut into ``counts``, without those that repeat the last one."""
    which = np.repeat(np.arange(len(counts)), counts)
    step = np.arange(1, len(which) + 1) - np.repeat(np.cumsum(counts) - counts, counts)
    t = (step / counts[which])[:, None]
    p0, p1, p2, p3 = chain[:-1:3][which], chain[1::3][which], chain[2::3][which], chain[3::3][which]
    s = 1 - t
    curve = s * s * (s * p0 + 3 * t * p1) + t * t * (3 * s * p2 + t * p3)
    line = np.concatenate([chain[:1], curve]).astype(np.float32)
    new = np.ones(len(line), dtype=bool)
    new[1:] = (line[1:] != line[:-1]).any(axis=1)
    return line[new]
