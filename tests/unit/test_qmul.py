"""The QMUL layout, and that its pickle is read without being run."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sbir_ray.data import qmul
from sbir_ray.data.layouts import ImportOptions, SplitOptions, import_pairs
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.qmul import read_coordinates
from sbir_ray.data.sources import DisagreementError
from sbir_ray.data.strokes import count_points
from sbir_ray.errors import UserError

ROWS = np.array([[33, 33, 0], [33, 223, 1], [100, 50, 0], [200, 200, 0], [150, 90, 1]], float)


def written(tmp_path: Path, data: bytes) -> Path:
    file = tmp_path / "ChairV2_Coordinate"
    file.write_bytes(data)
    return file


def refused(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(UserError) as error:
        read_coordinates(written(tmp_path, data))
    assert "\n" not in str(error.value)
    return str(error.value)


def python2_pickle(protocol: int) -> bytes:
    """What Python 2 and numpy 1 write for {"/train/a_1": ROWS}: strings that are bytes."""
    raw = ROWS.tobytes()
    if protocol == 0:
        return (
            b"(dp0\nS'/train/a_1'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n"
            b"(cnumpy\nndarray\np3\n(I0\ntp4\nS'b'\np5\ntp6\nRp7\n"
            b"(I1\n(I5\nI3\ntp8\ncnumpy\ndtype\np9\n(S'f8'\np10\nI0\nI1\ntp11\nRp12\n"
            b"(I3\nS'<'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS" + repr(raw)[1:].encode() + b"\n"
            b"p15\ntp16\nbs."
        )
    length = len(raw).to_bytes(4, "little")
    return (
        b"\x80\x02}q\x00U\x0a/train/a_1q\x01cnumpy.core.multiarray\n_reconstruct\nq\x02"
        b"cnumpy\nndarray\nq\x03K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01K\x05K\x03\x86q\x08"
        b"cnumpy\ndtype\nq\x09U\x02f8q\x0aK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01<q\x0dNNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb\x89T" + length + raw + b"q\x0ftq\x10bs."
    )


@pytest.mark.parametrize("protocol", [0, 2])
def test_what_python_2_wrote_is_read(tmp_path: Path, protocol: int) -> None:
    arrays = read_coordinates(written(tmp_path, python2_pickle(protocol)))
    assert list(arrays) == ["/train/a_1"]
    assert (arrays["/train/a_1"] == ROWS).all()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["<f8", ">f8", "<f4", "<i2", "|u1"])
def test_what_numpy_writes_today_is_read(tmp_path: Path, protocol: int, kind: str) -> None:
    value = {"/train/a_1": ROWS.astype(kind), "/test/b_1": np.asfortranarray(ROWS.astype(kind))}
    arrays = read_coordinates(written(tmp_path, pickle.dumps(value, protocol)))
    assert all((array == ROWS).all() for array in arrays.values())
    assert arrays.keys() == value.keys()


class Attack:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    attacks = [
        Attack(os.system, f"touch {target}"),
        Attack(eval, f"open({str(target)!r}, 'w')"),
        Attack(open, str(target), "w"),
        {"/train/a_1": Attack(os.system, f"touch {target}")},
        {"/train/a_1": [ROWS, (1, {"x": Attack(os.system, f"touch {target}")})]},
        Attack(getattr, Attack(__import__, "os"), "system"),
    ]
    for attack in attacks:
        for protocol in range(5):
            assert "refused" in refused(tmp_path, pickle.dumps(attack, protocol))
    assert not target.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncbuiltins\neval\nK\x00\x85U\x01b\x87R.",
        b"(S'touch x'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93)\x81.",
        b"\x80\x02cnumpy\ndtype.__class__\n.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
        b"\x80\x02cos\nsystem\n}b.",
        b"\x80\x02Pevil\n.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_hand_made_pickles_are_refused(tmp_path: Path, opcodes: bytes) -> None:
    assert "ChairV2_Coordinate: " in refused(tmp_path, opcodes)


def test_object_and_structured_arrays_are_refused(tmp_path: Path) -> None:
    objects = np.empty(2, object)
    objects[:] = [Attack(os.getcwd), 1]
    for array in (objects, np.zeros(2, [("x", "f8")]), np.array(["a"]), np.zeros(1, "M8[s]")):
        assert "refused" in refused(tmp_path, pickle.dumps({"/train/a_1": array}, 2))


def test_an_array_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    data = pickle.dumps({"/train/a_1": ROWS}, 2)
    lying = data.replace(b"K\x05K\x03\x86", b"K\xffK\xff\x86")
    assert lying != data
    assert "do not fill its shape" in refused(tmp_path, lying)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    # One string of 100 kB, turned into bytes a thousand times.
    text = b"X" + (100_000).to_bytes(4, "little") + b"a" * 100_000
    once = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"[:-1]
    many = b"\x80\x02" + text + b"q\x00" + once * 1000 + b"."
    assert "more bytes" in refused(tmp_path, many)
    # A place in the memo that an array of that length would have to be made for.
    assert "not a dict" in refused(tmp_path, b"\x80\x02Nr\xff\xff\xff\x7f.")


def test_too_large_a_file_and_half_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps({"/train/a_1": ROWS}, 2)
    assert "pickle" in refused(tmp_path, data[: len(data) // 2])
    assert "pickle" in refused(tmp_path, b"")
    assert "refused" in refused(tmp_path, pickle.dumps([1, 2], 2))
    monkeypatch.setattr(qmul, "MAX_BYTES", 10)
    assert "limit" in refused(tmp_path, data)


# --------------------------------------------------------------------------- the layout


def qmul_folder(root: Path, sketches: dict[str, np.ndarray], photos: list[str]) -> Path:
    (root / "photo").mkdir(parents=True)
    for number, name in enumerate(photos):
        rgb = np.full((64, 64, 3), 255, np.uint8)
        rgb[10 : 20 + number * 3, 10:50] = (number * 40, 90, 200)
        Image.fromarray(rgb).save(root / "photo" / f"{name}.png")
    (root / "Chair_Coordinate").write_bytes(pickle.dumps(sketches, 2))
    return root


def test_keys_give_split_photo_and_number(tmp_path: Path) -> None:
    src = qmul_folder(
        tmp_path / "src",
        {"/train/a_v1_1": ROWS, "/train/a_v1_2": ROWS[::-1], "/test/test-b_1": ROWS},
        ["a_v1", "test-b"],
    )
    report = import_pairs(src, "qmul", tmp_path / "out")
    assert report.splits["train"] == {"photos": 1, "sketches": 2}
    train = PairSet.load(tmp_path / "out", "train", 64)
    test = PairSet.load(tmp_path / "out", "test", 64)
    assert train.sketch_ids == ["a_v1_1", "a_v1_2"]
    assert (train.names, test.names) == (["a_v1"], ["test-b"])
    assert [len(stroke) for stroke in train.sketches[0]] == [2, 3]
    assert count_points(train.sketches[0]) == len(ROWS)


def test_a_last_point_without_a_lifted_pen_still_ends_the_sketch(tmp_path: Path) -> None:
    rows = ROWS.copy()
    rows[-1, 2] = 0
    import_pairs(qmul_folder(tmp_path / "src", {"/train/a_1": rows}, ["a"]), "qmul", tmp_path / "o")
    strokes = PairSet.load(tmp_path / "o", "train", 64).sketches[0]
    assert [len(stroke) for stroke in strokes] == [2, 3]


def test_disagreements_of_keys_and_photos_are_listed_together(tmp_path: Path) -> None:
    src = qmul_folder(
        tmp_path / "src",
        {"/train/a_1": ROWS, "/test/a_2": ROWS, "/train/lost_1": ROWS, "/train/c_1": ROWS},
        ["a", "b", "c"],
    )
    with pytest.raises(DisagreementError) as error:
        import_pairs(src, "qmul", tmp_path / "out")
    kinds = {d.kind: d.text for d in error.value.disagreements}
    assert kinds.keys() == {"split-conflict", "sketch-without-photo", "photo-without-sketch"}
    assert "'a' is in train and test" in str(error.value)
    assert "/train/lost_1" in str(error.value)
    assert "--allow photo-without-sketch" in str(error.value)
    assert "--allow split-conflict" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_keys_and_rows_that_are_none_are_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    src = qmul_folder(
        tmp_path / "src",
        {
            "/train/a_1": ROWS,
            "/train/a_2": ROWS[:, :2],
            "/train/a_3": np.full((3, 3), np.nan),
            "/train/a_4": np.ones((2, 3)),
            "/elsewhere/a_5": ROWS,
        },
        ["a"],
    )
    report = import_pairs(src, "qmul", tmp_path / "out")
    assert report.rejected("sketch") == {"damaged": 3, "no-extent": 1}
    assert report.count("sketches") == 1
    assert report.sketches_found == 5
    assert any("/train/a_2" in line for line in report.lines())


def test_the_published_counts_are_told(tmp_path: Path) -> None:
    src = qmul_folder(tmp_path / "src", {"/train/a_1": ROWS}, ["a"])
    (src / "Chair_Coordinate").rename(src / "ChairV2_Coordinate")
    report = import_pairs(src, "qmul", tmp_path / "out", ImportOptions(splits=SplitOptions(seed=1)))
    assert any("952 sketches" in line for line in report.lines())


def test_a_folder_without_coordinates_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "photo").mkdir()
    with pytest.raises(UserError, match=r"needs one \*_Coordinate file, found none"):
        import_pairs(tmp_path, "qmul", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        import_pairs(tmp_path / "nowhere", "qmul", tmp_path / "out")


def test_reading_goes_through_no_unpickler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps({"/train/a_1": ROWS}, 2)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    with pytest.raises(AssertionError):
        pickle.load(io.BytesIO(data))
    assert len(read_coordinates(written(tmp_path, data))) == 1
