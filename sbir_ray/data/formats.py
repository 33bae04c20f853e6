"""Sketch files: SVG, QuickDraw ndjson, stroke-3 and stroke-5 arrays, and the canvas's JSON.

A file holds one sketch or many; reading gives (key, strokes) one by one, in the file's own units
(:func:`sbir_ray.data.strokes.canonical` brings them to the canvas). No file is trusted: sizes are
checked before memory is taken, and nothing is unpickled.

==========  ====  ==========================================================================
kind        many  form
==========  ====  ==========================================================================
``svg``     no    see :mod:`sbir_ray.data.svg`
``json``    no    ``{"width": w, "height": h, "strokes": [[{"x": x, "y": y}, ...], ...]}``,
                  or ``[x, y, ...]`` for a point; a time ``t`` may stand beside
``ndjson``  yes   QuickDraw: a line ``{"key_id": key, "drawing": [[[x...], [y...]], ...]}`` a
                  sketch, each stroke with or without the times of its points
``npy``     yes   one array (n, 3) or (n, 5), or padded stroke-5 sketches (sketches, n, 5)
``npz``     yes   such arrays, each sketch under its own name
==========  ====  ==========================================================================

Arrays are offsets (stroke-3 and stroke-5 of :mod:`sbir_ray.data.strokes`, at the scale 1): row i
moves the pen to point i, and the first row starts from the origin, as sketch-rnn stores them.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.strokes import (
    CANVAS,
    MAX_POINTS,
    MAX_VALUE,
    Strokes,
    check,
    from_stroke3,
    from_stroke5,
    to_stroke3,
)
from sbir_ray.data.svg import read_svg, svg_text
from sbir_ray.errors import UserError

Kind: TypeAlias = Literal["svg", "json", "ndjson", "npy", "npz"]
Item: TypeAlias = tuple[str, Strokes]

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_BYTES = 4 << 20
"""Largest SVG or JSON file, and longest line of an ndjson file."""
MAX_ARRAY_BYTES = 256 << 20
"""Largest array of a npy or npz file."""

_DECIMALS = 3
_MAX_HEADER = 10_000
_HEADER = re.compile(
    rb"\{'descr': '([ -~]{1,20})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,19}L?(?:, ?|(?=\))))*)\),? ?\}\s*"
)
_NUMERIC = re.compile(r"[<>|=][iu][1248]|[<>=]f[248]")
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,  # a password, a method of compression that is unknown
    ValueError,
)
_PICKLED = (
    "holds Python objects, as sketch-rnn's files do; loading them would run a program. Where you "
    "trust the file, save each of its sketches as an array with a name of its own: numpy.savez("
    "'new.npz', **{f'{name}_{i}': rows for name in old.files for i, rows in enumerate(old[name])})"
)


# --------------------------------------------------------------------------- reading


def kind_of(name: str) -> Kind:
    """The kind of a file by the end of its name.

    Raises:
        UserError: none of the known ones.
    """
    suffix = Path(name).suffix.lower().removeprefix(".")
    for kind in KINDS:
        if suffix == kind:
            return kind
    raise UserError(f"{name}: not a sketch file; known are {', '.join(KINDS)}")


def read_sketches(
    source: str | Path | bytes, kind: Kind | None = None, name: str = ""
) -> Iterator[Item]:
    """The sketches of a file, or of its bytes, one by one as (key, strokes).

    The key is the one in the file, or the file's stem, or the sketch's number. ``kind`` is needed
    for bytes; ``name`` stands for the file in their keys and messages.

    Raises:
        UserError: a file that cannot be read, is of no known kind, is damaged or over a limit, or a
            sketch in it that is none. The message names the file, and the line or the array.
    """
    where = name or ("sketch" if isinstance(source, bytes) else str(source))
    kind = kind or kind_of(where)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
            if kind == "npz":
                yield from _read_npz(stream, where)
            elif kind == "npy":
                size = stream.seek(0, io.SEEK_END)
                stream.seek(0)
                yield from _read_rows(_read_array(stream, size, where), Path(where).stem, where)
            elif kind == "ndjson":
                yield from _read_ndjson(stream, where)
            else:
                data = stream.read(MAX_BYTES + 1)
                if len(data) > MAX_BYTES:
                    raise UserError(f"{where}: larger than {MAX_BYTES} bytes; simplify the drawing")
                read = read_svg if kind == "svg" else _read_json
                yield Path(where).stem, read(data, where)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error


def read_sketch(source: str | Path | bytes, kind: Kind | None = None, name: str = "") -> Strokes:
    """The strokes of a file, or of its bytes, that holds one sketch.

    Raises:
        UserError: see :func:`read_sketches`; also a file with several sketches or none.
    """
    sketches = read_sketches(source, kind, name)
    where = name or ("sketch" if isinstance(source, bytes) else str(source))
    first = next(sketches, None)
    if first is None:
        raise UserError(f"{where}: holds no sketch")
    if next(sketches, None) is not None:
        raise UserError(f"{where}: holds more than one sketch; give a file with one")
    return first[1]


def strokes_from_json(value: Any, where: str) -> Strokes:
    """The strokes of the canvas's JSON, parsed (see the module's table).

    Width and height are those of the canvas on which it was drawn; the strokes are in its units.

    Raises:
        UserError: another form, no points, or a limit exceeded.
    """
    strokes = value.get("strokes") if isinstance(value, dict) else None
    if not isinstance(strokes, list):
        raise UserError(f'{where}: not a drawing; it has to be {{"strokes": [[[x, y], ...], ...]}}')
    drawn: list[list[tuple[Any, Any]]] = []
    left = MAX_POINTS
    for stroke in strokes:
        if not isinstance(stroke, list):
            raise UserError(f"{where}: a stroke is not a list of points")
        left -= len(stroke)
        if left < 0:
            raise UserError(f"{where}: more than {MAX_POINTS} points; simplify the sketch")
        drawn.append([_point(point, where) for point in stroke])
    return check(drawn, where)


def _point(point: Any, where: str) -> tuple[Any, Any]:
    if isinstance(point, dict) and "x" in point and "y" in point:
        return point["x"], point["y"]
    if isinstance(point, list) and len(point) >= 2:
        return point[0], point[1]
    raise UserError(f'{where}: a point is neither {{"x": x, "y": y}} nor [x, y]')


def _read_json(data: bytes, where: str) -> Strokes:
    return strokes_from_json(_parse_json(data, where), where)


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _read_ndjson(stream: IO[bytes], where: str) -> Iterator[Item]:
    number = 0
    while line := stream.readline(MAX_BYTES + 1):
        number += 1
        if len(line) > MAX_BYTES:
            raise UserError(f"{where}: line {number}: longer than {MAX_BYTES} bytes")
        if not line.strip():
            continue
        place = f"{where}: line {number}"
        row = _parse_json(line, place)
        drawing = row.get("drawing") if isinstance(row, dict) else None
        if not isinstance(drawing, list):
            raise UserError(f'{place}: not a QuickDraw drawing; it has no list "drawing"')
        yield str(row.get("key_id", number)), check(_quickdraw(drawing, place), place)


def _quickdraw(drawing: list[Any], where: str) -> Iterator[list[tuple[Any, Any]]]:
    for stroke in drawing:
        axes = stroke[:2] if isinstance(stroke, list) else []
        if len(axes) < 2 or not all(isinstance(axis, list) for axis in axes):
            raise UserError(f"{where}: a stroke is not [[x, ...], [y, ...]]")
        if len(axes[0]) != len(axes[1]):
            raise UserError(f"{where}: a stroke has {len(axes[0])} x and {len(axes[1])} y")
        yield list(zip(*axes, strict=True))


def _read_npz(stream: IO[bytes], where: str) -> Iterator[Item]:
    try:
        archive = zipfile.ZipFile(stream)
    except _DAMAGED as error:
        raise UserError(f"{where}: not a readable npz file ({error})") from error
    with archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            place = f"{where}: array {key}"
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{place}: neither stored nor deflated; save it by numpy.savez")
            try:
                with archive.open(member) as array:
                    rows = _read_array(array, member.file_size, place)
            except _DAMAGED as error:
                raise UserError(f"{place}: cannot be unpacked ({error})") from error
            yield from _read_rows(rows, key, place)


def _read_array(stream: IO[bytes], size: int, where: str) -> NDArray[Any]:
    """A numeric npy array of ``size`` bytes, its header included.

    The header is matched, not evaluated as numpy does, which lets errors of Python's tokeniser out.
    """
    if size > MAX_ARRAY_BYTES:
        raise UserError(f"{where}: larger than {MAX_ARRAY_BYTES} bytes; split it")
    start = stream.read(8)
    wide = start[6:7] in (b"\2", b"\3")
    length = int.from_bytes(stream.read(4 if wide else 2), "little")
    header = stream.read(length) if length <= _MAX_HEADER else b""
    match = _HEADER.fullmatch(header) if start.startswith(b"\x93NUMPY") else None
    if match is None:
        raise UserError(f"{where}: not a npy array of numbers; save it by numpy.save")
    descr, order, sides = (text.decode("ascii") for text in match.groups())
    if descr == "|O":
        raise UserError(f"{where}: {_PICKLED}")
    if not _NUMERIC.fullmatch(descr):
        raise UserError(f"{where}: an array of {descr}; sketches are integers or floats")
    dtype, shape = np.dtype(descr), tuple(int(side) for side in re.findall(r"\d+", sides))
    data = stream.read(size)
    cut = UserError(f"{where}: the array is cut off or longer than its header says")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise cut
    try:
        return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "True" else "C")
    except ValueError as error:  # no data, and sides that numpy cannot hold
        raise cut from error


def _read_rows(rows: NDArray[Any], key: str, where: str) -> Iterator[Item]:
    """The sketch of an array (n, 3) or (n, 5), or the sketches of one (sketches, n, 5)."""
    if rows.ndim == 3 and rows.shape[2] == 5:
        for index, sketch in enumerate(rows):
            yield from _read_rows(sketch, f"{key}_{index}", f"{where}: sketch {index}")
        return
    if rows.ndim != 2 or rows.shape[1] not in (3, 5):
        raise UserError(
            f"{where}: the shape {rows.shape} is not stroke-3 (n, 3) or stroke-5 (n, 5)"
        )
    if len(rows) > MAX_POINTS:
        raise UserError(f"{where}: more than {MAX_POINTS} points; simplify the sketch")
    rows = rows.astype(np.float64)
    if len(rows) and not np.abs(rows).max() <= MAX_VALUE:  # also false for NaN
        raise UserError(f"{where}: a value is not a number within +-{MAX_VALUE:.0f}; rescale it")
    if not np.isin(rows[:, 2:], (0.0, 1.0)).all():
        raise UserError(f"{where}: the states of the pen, behind dx and dy, are not all 0 or 1")
    yield key, check(from_stroke3(rows) if rows.shape[1] == 3 else from_stroke5(rows, 1.0), where)


# --------------------------------------------------------------------------- writing


def write_sketches(path: str | Path, items: Iterable[Item], kind: Kind | None = None) -> int:
    """Write (key, strokes) to a file that :func:`read_sketches` gives back; the number written.

    Text has three decimals: points come back within 0.001. A npz file has stroke-3 offsets in
    float32: points come back within a 100,000th of the sketch's size. An SVG or JSON file takes one
    sketch, and a npy file is not written; use npz.

    Raises:
        UserError: a key that is there twice (npz), a kind that takes one sketch and gets another
            number, or npy.
    """
    kind = kind or kind_of(str(path))
    if kind == "npz":
        return _write_npz(path, items)
    if kind == "ndjson":
        count = 0
        with open(path, "w", encoding="utf-8") as stream:
            for key, strokes in items:
                count += 1
                drawing = [_rounded(stroke.T) for stroke in strokes]
                stream.write(json.dumps({"key_id": key, "drawing": drawing}) + "\n")
        return count
    if kind == "npy":
        raise UserError(f"{path}: npy is read only; write npz")
    sketches = [strokes for _, strokes in items]
    if len(sketches) != 1:
        raise UserError(
            f"{path}: {kind} takes one sketch, not {len(sketches)}; write ndjson or npz"
        )
    text = svg_text(sketches[0]) if kind == "svg" else json.dumps(strokes_to_json(sketches[0]))
    Path(path).write_text(text, encoding="utf-8")
    return 1


def strokes_to_json(strokes: Strokes) -> dict[str, Any]:
    """The canvas's JSON of a sketch, ready for ``json.dumps``."""
    return {
        "width": CANVAS,
        "height": CANVAS,
        "strokes": [_rounded(stroke) for stroke in strokes],
    }


def _rounded(points: NDArray[np.float32]) -> list[list[float]]:
    rounded: list[list[float]] = np.round(points.astype(np.float64), _DECIMALS).tolist()
    return rounded


def _write_npz(path: str | Path, items: Iterable[Item]) -> int:
    names: set[str] = set()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, strokes in items:
            if key in names:
                raise UserError(f"{path}: the key {key!r} is there twice")
            names.add(key)
            # ZipInfo's fixed date: the same sketches give the same bytes.
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w") as stream:
                np.lib.format.write_array(stream, to_stroke3(strokes))
    return len(names)
