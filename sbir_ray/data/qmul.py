"""The layout of QMUL ChairV2 and ShoeV2: ``photo/<name>.png`` and a ``*_Coordinate`` file.

The coordinates are a pickle, from the days of Python 2, of ``{"/train/<name>_<k>": rows}``; rows
are float64 (N, 3): x, y and pen = 1 on the last point of a stroke. A pickle is a program; this
module does not run it. It walks through the opcodes, builds numbers, strings, tuples, dicts and
numeric numpy arrays from them and refuses everything else: no name in the file is ever looked up or
called.
"""

from __future__ import annotations

import ast
import io
import math
import pickletools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sbir_ray.data import photos as photo_files
from sbir_ray.data.photos import PhotoLimits
from sbir_ray.data.sources import (
    Found,
    Reject,
    SourceOptions,
    SourceSketch,
    photo_file,
    split_named,
)
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError

MAX_BYTES = 512 * 2**20
"""Largest coordinate file; ShoeV2's has about 20 MB."""

PUBLISHED = {
    "ChairV2": "train 300 photos, 952 sketches; test 100 photos, 323 sketches",
    "ShoeV2": "train 1800 photos; test 200 photos, 666 sketches",
}
"""What the released files hold (papers state other numbers)."""

_ARRAY_MAKERS = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    }
)
_NUMBERS = frozenset({"f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
_MAX_DIMENSIONS = 4


# --------------------------------------------------------------------------- the layout


def read_qmul(src: Path, options: SourceOptions) -> Found:
    """Photos and sketches of a QMUL folder.

    Raises:
        UserError: no ``photo`` folder, not one coordinate file, or one that is not such a pickle.
    """
    if options.pairs is not None:
        raise UserError("--pairs-csv: the qmul layout pairs by its keys; leave it out")
    photo_folder = options.photos or src / "photo"
    if not photo_folder.is_dir():
        raise UserError(f"{photo_folder}: no such folder; the qmul layout has photo/<name>.png")
    file = options.sketches or _coordinate_file(src)
    found = Found()
    for path in sorted(photo_folder.iterdir()):
        if path.suffix.lower() in photo_files.SUFFIXES:
            found.photos.append(photo_file(path, path.stem, None))
    for name, counts in PUBLISHED.items():
        if name.lower() in file.name.lower():
            found.notes.append(f"{name} as released: {counts}")
    for key, rows in read_coordinates(file).items():
        folder, _, name = key.rpartition("/")
        split = split_named(folder.strip("/").rpartition("/")[2])
        photo = name.rpartition("_")[0]
        origin = f"{file.name}:{key}"
        if split is None or not photo:
            text = "a key is /train/<photo>_<k> or /test/<photo>_<k>"
            found.rejects.append(Reject("sketch", "damaged", origin, text))
            continue
        load = partial(_strokes, rows, origin)
        found.sketches.append(SourceSketch(name, photo, origin, split, load))
    return found


def _coordinate_file(src: Path) -> Path:
    files = sorted(path for path in src.glob("*_Coordinate*") if path.is_file())
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"{src}: needs one *_Coordinate file, found {names}; name it with --sketches"
        )
    return files[0]


def _strokes(rows: npt.NDArray[Any], origin: str, _: PhotoLimits) -> tuple[Strokes, None]:
    if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
        raise UserError(f"{origin}: has the shape {rows.shape}; rows are (x, y, pen)")
    points = rows[:, :2].astype(np.float64)
    # The last row ends a stroke whether it says so or not.
    ends = np.flatnonzero(rows[:-1, 2] > 0.5) + 1
    return [stroke.astype(np.float32) for stroke in np.split(points, ends)], None


# --------------------------------------------------------------------------- the pickle


def read_coordinates(file: str | Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a coordinate pickle by key.

    Raises:
        UserError: the file cannot be read, is too large, or holds anything but a dict of strings to
            numeric arrays.
    """
    file = Path(file)
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{file}: {size} bytes are more than the limit of {MAX_BYTES}")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    try:
        value = _Machine(len(data)).run(data)
        if not isinstance(value, dict) or not value:
            raise _RefusedError(f"a {type(value).__name__}, not a dict of sketches")
        arrays: dict[str, npt.NDArray[Any]] = {}
        for key, item in value.items():
            if not isinstance(item, _Array) or item.value is None:
                raise _RefusedError(f"{key[:80]!r} is not the key of a numeric array")
            arrays[key] = item.value
        return arrays
    except _RefusedError as error:
        raise UserError(f"{file}: refused, it is no pickle of coordinates ({error})") from error
    except Exception as error:  # opcodes in no meaningful order may end in any error
        text = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise UserError(f"{file}: not a readable pickle ({text})") from error


class _RefusedError(Exception):
    """The pickle asks for something that coordinates do not need."""


@dataclass(frozen=True, slots=True)
class _Global:
    """A name from the file, never looked up."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class _Dtype:
    code: str
    order: str = "<"


@dataclass(slots=True, eq=False)
class _Array:
    value: npt.NDArray[Any] | None = None


class _Mark:
    pass


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_PUSH_ARGUMENT = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES"}
    | {"BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING", "INT", "LONG", "LONG1", "LONG4"}
    | {"BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
)
_PUSH_CONSTANT: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSH_NEW: dict[str, Any] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GET = frozenset({"GET", "BINGET", "LONG_BINGET"})


class _Machine:
    """Evaluates the opcodes of a pickle as far as coordinates need them."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Strings may be turned to bytes, and bytes to arrays, again and again from one copy.
        self.budget = 8 * size + 2**20

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        while code := stream.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise _RefusedError(f"the byte {code!r}, which is no opcode")
            if opcode.name == "STOP":
                return self.stack[-1]
            if opcode.name == "STRING":
                # A Python 2 string in quotes; pickletools reads only those that are ASCII.
                argument = ast.literal_eval("b" + stream.readline().decode("ascii"))
            else:
                argument = opcode.arg.reader(stream) if opcode.arg is not None else None
            self._step(opcode.name, argument)
        raise _RefusedError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUT:
            self.memo[argument] = stack[-1]
        elif name in _GET:
            stack.append(self.memo[argument])
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name in _PUSH_NEW:
            stack.append(_PUSH_NEW[name]())
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name == "DICT":
            items = self._to_mark()
            stack.append({})
            self._set(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set([key, value])
        elif name == "SETITEMS":
            items = self._to_mark()
            self._set(items)
        elif name == "GLOBAL":
            stack.append(_Global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Global(_text(module), _text(attribute)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"the opcode {name}")

    def _to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _Mark:
            start -= 1
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _set(self, items: Sequence[Any]) -> None:
        """Put key, value, key, value, ... into the dict on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _RefusedError("items for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_text(key)] = value

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global):
            raise _RefusedError("a call of what is no name")
        called = (function.module, function.name)
        if called in _ARRAY_MAKERS and arguments[0] == _Global("numpy", "ndarray"):
            return _Array()
        if called == ("numpy", "dtype"):
            return _Dtype(_text(arguments[0]))
        if called == ("_codecs", "encode") and arguments[1:] in ((), ("latin1",), ("latin-1",)):
            self._spend(len(arguments[0]))
            return _bytes(arguments[0])
        if called in (("builtins", "bytes"), ("__builtin__", "bytes")) and arguments == ():
            return b""
        raise _RefusedError(f"a call of {function.module}.{function.name}")

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Dtype):
            target.order = _text(state[1])
            if any(part is not None for part in state[2:5]):
                raise _RefusedError("a structured array")
        elif isinstance(target, _Array):
            _, shape, dtype, fortran, content = state
            if not isinstance(dtype, _Dtype):
                raise _RefusedError("an array without a dtype")
            target.value = self._array(shape, dtype, bool(fortran), content)
        else:
            raise _RefusedError("a state for what is no array")

    def _array(
        self, shape: tuple[int, ...], dtype: _Dtype, fortran: bool, content: Any
    ) -> npt.NDArray[Any]:
        if dtype.code not in _NUMBERS or dtype.order not in ("<", ">", "|", "="):
            raise _RefusedError(f"an array of {dtype.order}{dtype.code}, not of numbers")
        if len(shape) > _MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
            raise _RefusedError("an array of an impossible shape")
        kind = np.dtype(dtype.order + dtype.code)
        raw = _bytes(content)
        if math.prod(shape) * kind.itemsize != len(raw):
            raise _RefusedError("an array whose bytes do not fill its shape")
        self._spend(len(raw))
        return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")

    def _spend(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise _RefusedError("more bytes in its arrays than the file can hold")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, str):
        return value
    raise _RefusedError(f"{type(value).__name__} where text belongs")


def _bytes(value: Any) -> bytes:
    """Bytes of a Python 2 string or of Python 3 bytes (which numpy's pickles carry as latin-1)."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if isinstance(value, bytes):
        return value
    raise _RefusedError(f"{type(value).__name__} where bytes belong")
