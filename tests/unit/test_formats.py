from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.data import formats
from sbir_ray.data import strokes as sk
from sbir_ray.errors import UserError

# Points a tenth apart at least: text has three decimals, and SVG joins points that are equal.
grid = st.integers(-2000, 2000).map(lambda value: value / 10)


@st.composite
def sketches(draw: st.DrawFn) -> sk.Strokes:
    strokes = []
    for _ in range(draw(st.integers(1, 4))):
        line = draw(st.lists(st.tuples(grid, grid), min_size=1, max_size=8))
        kept = [p for i, p in enumerate(line) if i == 0 or p != line[i - 1]]
        strokes.append(np.array(kept, dtype=np.float32))
    return strokes


def same(a: sk.Strokes, b: sk.Strokes, tolerance: float) -> bool:
    return [len(s) for s in a] == [len(s) for s in b] and all(
        np.abs(p - q).max() <= tolerance for p, q in zip(a, b, strict=True)
    )


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


SKETCH = [
    np.array([[10, 20], [30.5, 20], [30, 60]], np.float32),
    np.array([[100, 200]], np.float32),
]


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", ["svg", "json", "ndjson", "npz"])
@given(sketch=sketches())
@settings(deadline=None, max_examples=25)
def test_a_written_sketch_is_read_back_within_a_thousandth(
    kind: formats.Kind, sketch: sk.Strokes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("round") / f"chair_1.{kind}"
    assert formats.write_sketches(path, [("chair_1", sketch)]) == 1
    ((key, back),) = formats.read_sketches(path)
    assert key == "chair_1"
    assert same(back, sketch, 2e-3)
    again = sk.from_stroke5(sk.to_stroke5(back, 7.0, 100), 7.0)
    assert same(again, sketch, 3e-3)


@pytest.mark.parametrize("kind", ["ndjson", "npz"])
def test_many_sketches_keep_their_keys_and_their_order(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"all.{kind}"
    items = [(f"train/{name}_1", [stroke + i for stroke in SKETCH]) for i, name in enumerate("cab")]
    assert formats.write_sketches(path, iter(items)) == 3
    back = list(formats.read_sketches(path))
    assert [key for key, _ in back] == ["train/c_1", "train/a_1", "train/b_1"]
    assert all(same(a, b, 1e-3) for (_, a), (_, b) in zip(items, back, strict=True))


def test_a_npz_file_has_the_same_bytes_every_time_and_numpy_reads_it(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        formats.write_sketches(tmp_path / name, [("x", SKETCH)])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["x"][:, 2], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("name", "items", "says"),
    [
        ("a.svg", [("x", SKETCH), ("y", SKETCH)], "one sketch, not 2"),
        ("a.json", [], "one sketch, not 0"),
        ("a.npy", [("x", SKETCH)], "write npz"),
        ("a.npz", [("x", SKETCH), ("x", SKETCH)], "'x' is there twice"),
        ("a.png", [("x", SKETCH)], "known are svg"),
    ],
)
def test_what_a_file_cannot_hold_is_not_written(
    name: str, items: list[formats.Item], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        formats.write_sketches(tmp_path / name, items)


# ------------------------------------------------------------------ forms of other programs


def test_quickdraw_is_read_raw_with_times_and_simplified() -> None:
    raw = {"key_id": "5201136883597312", "drawing": [[[1.5, 2, 3], [4, 5, 6], [0, 16, 33]]]}
    plain = {"word": "cat", "drawing": [[[1, 2], [4, 5]], [[7], [8]]]}
    data = f"{json.dumps(raw)}\n\n{json.dumps(plain)}".encode()
    first, second = formats.read_sketches(data, "ndjson")
    assert first[0] == "5201136883597312"
    assert first[1][0].tolist() == [[1.5, 4], [2, 5], [3, 6]]
    assert second[0] == "3"  # its line
    assert [s.tolist() for s in second[1]] == [[[1, 4], [2, 5]], [[7, 8]]]


def test_canvas_points_are_read_as_objects_and_as_lists_with_a_time() -> None:
    drawing = {
        "width": 800,
        "height": 600,
        "strokes": [[{"x": 1, "y": 2, "t": 5}, {"x": 3, "y": 4}], [[5, 6], [7, 8, 99]]],
    }
    strokes = formats.read_sketch(json.dumps(drawing).encode(), "json")
    assert [s.tolist() for s in strokes] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.float32, np.float64, ">i2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_sketch_rnn_offsets_start_at_the_origin(dtype: Any, order: Any) -> None:
    stroke3 = np.array(
        [[0, 0, 0], [10, 0, 0], [0, 5, 1], [-3, 2, 0], [4, 4, 1]], dtype, order=order
    )
    stroke5 = np.array(
        [
            [0, 0, 1, 0, 0],
            [10, 0, 1, 0, 0],
            [0, 5, 0, 1, 0],
            [-3, 2, 1, 0, 0],
            [4, 4, 0, 1, 0],
            [0, 0, 0, 0, 1],
            [0, 0, 0, 0, 1],
        ],
        dtype,
        order=order,
    )
    expected = [[[0, 0], [10, 0], [10, 5]], [[7, 7], [11, 11]]]
    for rows in (stroke3, stroke5):
        strokes = formats.read_sketch(npy(rows), "npy")
        moved = [(s - strokes[0][0]).tolist() for s in strokes]
        assert moved == expected


def test_padded_stroke5_sketches_of_one_array_are_read_one_by_one() -> None:
    sketches = [[np.array([[128 + k, 128], [0, k]], np.float32)] for k in (1, 2)]
    rows = np.stack([sk.to_stroke5(s, 1.0, 9) for s in sketches])
    back = list(formats.read_sketches(npy(rows), "npy", "all.npy"))
    assert [key for key, _ in back] == ["all_0", "all_1"]
    assert all(same(a, b, 1e-3) for a, (_, b) in zip(sketches, back, strict=True))


# ------------------------------------------------------------------ refusals


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_an_array_of_objects_is_refused_and_the_way_out_named(tmp_path: Path) -> None:
    """sketch-rnn's own npz files hold pickled lists of arrays."""
    path = tmp_path / "sketchrnn_shoe.npz"
    sketches = np.empty(2, dtype=object)
    sketches[:] = [np.zeros((4, 3), np.int16), Trap()]
    np.savez(path, train=sketches)
    with pytest.raises(UserError, match=r"array train: holds Python objects.*numpy\.savez"):
        formats.read_sketch(path)


def _npz(members: dict[str, bytes], **options: Any) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


ROWS = np.array([[0, 0, 0], [1, 1, 1]], np.float32)
HOSTILE: dict[str, tuple[formats.Kind, bytes, str]] = {
    "pickle": ("npy", pickle.dumps([1]), "not a npy array"),
    "header that lies": ("npy", _header("(1000000000000, 3)") + b"0" * 64, "than its header"),
    "header that overflows": ("npy", _header("(0, 9999999999999999999, 3)"), "than its header"),
    "negative shape": ("npy", _header("(-1, -3)") + b"0" * 12, "not a npy array"),
    "program in the header": ("npy", _header("(print(1), 3)"), "not a npy array"),
    "no rows": ("npy", npy(np.zeros((0, 3))), "no points"),
    "end only": ("npy", npy(np.array([[0, 0, 0, 0, 1.0]])), "no points"),
    "open header": ("npy", _header("(2, 3"), "not a npy array"),
    "long header": ("npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "not a npy array"),
    "structured": ("npy", npy(np.zeros(2, [("x", "f4"), ("y", "f4")])), "not a npy array"),
    "flat": ("npy", npy(np.zeros(3)), "shape"),
    "text": ("npy", npy(np.array([["a", "b", "c"]])), "integers or floats"),
    "complex": ("npy", npy(np.zeros((2, 3), complex)), "integers or floats"),
    "nan": ("npy", npy(ROWS * np.float32("nan")), "within"),
    "1e308": ("npy", npy(ROWS.astype(np.float64) * 1e308), "within"),
    "smallest integer": ("npy", npy(np.full((2, 3), -(2**63))), "within"),
    "drifts away": ("npy", npy(np.tile([[9e5, 0, 1]], (9, 1))), "within"),
    "absolute times": ("npy", npy(np.array([[1, 2, 16], [3, 4, 33]])), "states of the pen"),
    "too long": ("npy", npy(np.zeros((sk.MAX_POINTS + 1, 3), np.int8)), "50000 points"),
    "not a zip": ("npz", b"PK\x03\x04junk", "not a readable npz"),
    "not an array": ("npz", _npz({"a.npy": b"hello"}), "array a: not a npy array"),
    "odd compression": ("npz", _npz({"a.npy": npy(ROWS)}, compression=zipfile.ZIP_LZMA), "savez"),
    "zip bomb": (
        "npz",
        _npz({"a.npy": b"\0" * (300 << 20)}, compression=zipfile.ZIP_DEFLATED, compresslevel=1),
        "array a: larger than 268435456 bytes",
    ),
    "deep json": ("json", b'{"strokes":' + b"[" * 1_000_000, "not valid JSON"),
    "not json": ("json", b"\xff\xfe", "not valid JSON"),
    "json list": ("json", b"[[1, 2]]", "not a drawing"),
    "no strokes": ("json", b'{"strokes": []}', "no points"),
    "strokes of numbers": ("json", b'{"strokes": [1]}', "not a list of points"),
    "points of text": ("json", b'{"strokes": [["ab"]]}', "a point is neither"),
    "point without y": ("json", b'{"strokes": [[{"x": 1}]]}', "a point is neither"),
    "json nan": ("json", b'{"strokes": [[[NaN, 1]]]}', "within"),
    "json 1e308": ("json", b'{"strokes": [[[1e308, 1]]]}', "within"),
    "json integer": ("json", b'{"strokes": [[[' + b"9" * 400 + b", 1]]]}", "numbers"),
    "json long integer": ("json", b'{"strokes": [[[' + b"9" * 9000 + b", 1]]]}", "valid JSON"),
    "nested points": ("json", b'{"strokes": [[[[1, 2], [3, 4]]]]}', "shape"),
    "large json": ("json", b" " * (formats.MAX_BYTES + 1), "4194304 bytes"),
    "many points": ("json", json.dumps({"strokes": [[[0, 0]] * 50_001]}).encode(), "50000 points"),
    "many strokes": ("json", json.dumps({"strokes": [[[0, 0]]] * 2001}).encode(), "2000 strokes"),
    "ndjson without drawing": ("ndjson", b'{"word": "cat"}', "line 1: not a QuickDraw"),
    "ndjson of uneven axes": ("ndjson", b'\n{"drawing": [[[1, 2], [3]]]}', "line 2: .* 2 x and 1"),
    "ndjson of one axis": ("ndjson", b'{"drawing": [[[1, 2]]]}', r"not \[\[x"),
    "ndjson of one line": ("ndjson", b"[" * (formats.MAX_BYTES + 1), "line 1: longer than"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_a_hostile_file_ends_in_an_error_that_names_the_place_and_the_limit(name: str) -> None:
    kind, data, says = HOSTILE[name]
    with pytest.raises(UserError, match=says) as caught:
        list(formats.read_sketches(data, kind, f"bad.{kind}"))
    assert str(caught.value).startswith(f"bad.{kind}: ")
    assert "\n" not in str(caught.value)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_damaged_npz_file_gives_sketches_or_a_user_error(data: st.DataObject) -> None:
    damaged = bytearray(_npz({"a.npy": npy(ROWS), "b.npy": npy(ROWS, (2, 0))}))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        for _, strokes in formats.read_sketches(bytes(damaged), "npz"):
            assert sk.count_points(strokes) > 0
    except UserError:
        pass


@pytest.mark.parametrize("name", ["none.svg", "folder.svg", "none.npz"])
def test_a_file_that_cannot_be_opened_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(UserError, match=rf"{name}: cannot be read"):
        formats.read_sketch(tmp_path / name)


def test_a_file_of_several_sketches_is_not_taken_for_one() -> None:
    line = json.dumps({"drawing": [[[1, 2], [4, 5]]]}) + "\n"
    assert len(formats.read_sketch(line.encode(), "ndjson")) == 1
    with pytest.raises(UserError, match="more than one sketch"):
        formats.read_sketch((line * 2).encode(), "ndjson")
    with pytest.raises(UserError, match="holds no sketch"):
        formats.read_sketch(b"", "ndjson")
