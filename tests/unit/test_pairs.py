"""The PAIRS folder: written whole or not at all, loaded by split, checked, with labels hidden."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray.data import photos, strokes
from sbir_ray.data.leaks import Print, near_pairs, print_of
from sbir_ray.data.pair_check import check_pairs
from sbir_ray.data.pairs import (
    PairPhotoRow,
    PairSet,
    SketchRow,
    Split,
    content_digest,
    iter_photos,
    new_pairs,
    read_header,
    split_labels,
)
from sbir_ray.errors import DamagedError, UserError


def picture(number: int) -> np.ndarray:
    """(64, 64, 3): a block of its own form and colours on white."""
    rng = np.random.default_rng(number)
    rgb = np.full((64, 64, 3), 255, np.uint8)
    block = rng.integers(0, 200, (4, 4, 3), np.uint8)
    rgb[8:56, 8:56] = np.asarray(Image.fromarray(block).resize((48, 48), Image.Resampling.NEAREST))
    return rgb


def photo_row(number: int, split: Split, rgb: np.ndarray | None = None) -> PairPhotoRow:
    row = photos.row_of_pixels(
        picture(number) if rgb is None else rgb, f"{number:064x}", f"photo{number:02}", "test"
    )
    return PairPhotoRow(**row, split=split)


def sketch_row(photo: PairPhotoRow, k: int, png: bytes | None = None) -> SketchRow:
    line = strokes.canonical([np.array([[0, 0], [k, 1], [2 * k, 9]], np.float32)])
    return SketchRow(
        sketch_id=f"{photo['name']}_{k}",
        photo_id=photo["photo_id"],
        split=photo["split"],
        strokes=strokes.flatten(line),
        drawing=png,
        origin="test",
    )


def folder_of(out: Path, splits: dict[int, Split], sketches: Callable[[int], int]) -> Path:
    with new_pairs(out, source="test", layout="test") as writer:
        for number in sorted(splits, reverse=True):
            row = photo_row(number, splits[number])
            writer.add_photo(row)
            for k in range(sketches(number), 0, -1):
                writer.add_sketch(sketch_row(row, k))
    return out


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    """20 photos: 14 train, 3 val, 3 test; 1 to 3 sketches each."""
    splits: dict[int, Split] = {n: "train" if n < 14 else "val" for n in range(17)}
    splits |= dict.fromkeys(range(17, 20), "test")
    return folder_of(tmp_path / "pairs", splits, lambda n: n % 3 + 1)


# --------------------------------------------------------------------------- loading


def test_a_split_is_loaded_in_order_with_every_sketch_at_its_photo(twenty: Path) -> None:
    pairs = PairSet.load(twenty, "train", 64)
    assert pairs.photos.shape == (14, 3, 64, 64)
    assert pairs.names == sorted(pairs.names)
    assert pairs.sketch_ids == sorted(pairs.sketch_ids)
    for sketch, photo in zip(pairs.sketch_ids, pairs.photo_of, strict=True):
        assert sketch.rpartition("_")[0] == pairs.names[photo]
    assert [len(of) for of in pairs.sketches_of] == [n % 3 + 1 for n in range(14)]
    assert (pairs.photo_of[np.concatenate(pairs.sketches_of)] == np.sort(pairs.photo_of)).all()
    assert all(np.ptp(np.concatenate(s), axis=0).max() == 190 for s in pairs.sketches)
    expected = photos.align(photos.decode_stored(photo_row(0, "train")["image"]), 64)
    assert (pairs.photos[0].transpose(1, 2, 0) == expected).all()


def test_photos_without_sketches_are_for_the_gallery_alone(tmp_path: Path) -> None:
    folder_of(tmp_path / "p", dict.fromkeys(range(4), "train"), lambda n: n % 2)
    pairs = PairSet.load(tmp_path / "p", "train", 64)
    assert len(pairs.photo_ids) == 4
    assert pairs.drawn_photos.tolist() == [1, 3]
    assert [len(of) for of in pairs.sketches_of] == [0, 1, 0, 1]


def test_sketches_of_one_photo_can_be_told_from_negatives(twenty: Path) -> None:
    """Flaw 13 of the official code: a negative that is the anchor's own photo."""
    pairs = PairSet.load(twenty, "train", 64)
    for sketch, photo in enumerate(pairs.photo_of):
        assert sketch in pairs.sketches_of[photo]
        others = np.flatnonzero(pairs.photo_of != photo)
        assert not {pairs.photo_ids[pairs.photo_of[n]] for n in others} & {pairs.photo_ids[photo]}


def test_splits_share_no_photo_and_no_sketch(twenty: Path) -> None:
    """Flaw 4 of the official code: training on the test split."""
    loaded = [PairSet.load(twenty, split, 64) for split in ("train", "val", "test")]
    ids = [set(pairs.photo_ids) | set(pairs.sketch_ids) for pairs in loaded]
    assert sum(map(len, ids)) == len(set.union(*ids))
    assert {row["photo_id"] for row in iter_photos(twenty, {"train"})} <= ids[0]
    assert len(list(iter_photos(twenty))) == 20


def test_folders_of_the_same_counts_are_told_apart_by_content(tmp_path: Path) -> None:
    first, again, other, split = (tmp_path / name for name in ("first", "again", "other", "split"))
    splits: dict[int, Split] = {0: "train", 1: "train", 2: "val", 3: "val"}
    folder_of(first, splits, lambda n: 2)
    folder_of(again, splits, lambda n: 2)
    folder_of(other, {0: "train", 1: "train", 2: "val", 4: "val"}, lambda n: 2)
    folder_of(split, {0: "val", 1: "train", 2: "train", 3: "val"}, lambda n: 2)
    assert content_digest(first) == content_digest(again)
    assert len({content_digest(folder) for folder in (first, other, split)}) == 3
    # The same names, each with another one's drawing.
    file = again / "sketches.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("strokes")
    drawn = table.column("strokes").take(list(reversed(range(len(table)))))
    pq.write_table(table.set_column(place, table.schema.field(place), drawn), file)
    assert content_digest(first) != content_digest(again)


def test_a_drawing_is_loaded_as_aligned_ink(tmp_path: Path) -> None:
    grey = np.full((100, 100), 255, np.uint8)
    grey[40:60, 10:90] = 0
    with new_pairs(tmp_path / "p", source="", layout="") as writer:
        row = photo_row(1, "train")
        writer.add_photo(row)
        writer.add_sketch(sketch_row(row, 1, photos.encode_png(grey)))
        writer.add_sketch(sketch_row(row, 2))
    drawing, none = PairSet.load(tmp_path / "p", "train", 128).drawings
    assert none is None
    assert drawing is not None
    assert drawing.shape == (128, 128)
    assert (drawing[64, 20:108] == 255).all()
    assert (drawing[0] == 0).all()


def test_an_empty_split_names_those_that_are_not(tmp_path: Path) -> None:
    folder_of(tmp_path / "p", {1: "train"}, lambda n: 1)
    with pytest.raises(UserError, match="no photos in test; it has train"):
        PairSet.load(tmp_path / "p", "test", 64)


# --------------------------------------------------------------------------- the folder


def fail_half_way(out: Path) -> None:
    with new_pairs(out, source="", layout="") as writer:
        writer.add_photo(photo_row(1, "train"))
        raise RuntimeError("power cut")


def test_a_folder_that_fails_half_way_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"):
        fail_half_way(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(twenty: Path) -> None:
    before = (twenty / "pairs.json").read_bytes()
    with (
        pytest.raises(UserError, match="not empty"),
        new_pairs(twenty, source="", layout=""),
    ):
        raise AssertionError("the block must not run")
    assert (twenty / "pairs.json").read_bytes() == before


def test_what_is_no_pairs_folder_is_refused(tmp_path: Path, twenty: Path) -> None:
    with pytest.raises(UserError, match="not a PAIRS folder"):
        read_header(tmp_path)
    header = json.loads((twenty / "pairs.json").read_text())
    for change, error, text in [
        ({"kind": "photos"}, UserError, "not a PAIRS folder"),
        ({"schema_version": 99}, UserError, "newer"),
        ({"schema_version": None}, UserError, "schema_version"),
    ]:
        (twenty / "pairs.json").write_text(json.dumps(header | change))
        with pytest.raises(error, match=text):
            PairSet.load(twenty, "train", 64)
    (twenty / "pairs.json").write_text("{")
    with pytest.raises(DamagedError, match=r"pairs\.json"):
        read_header(twenty)


@pytest.mark.parametrize("table", ["photos.parquet", "sketches.parquet"])
def test_a_damaged_table_is_named(twenty: Path, table: str) -> None:
    data = (twenty / table).read_bytes()
    (twenty / table).write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedError, match=table):
        PairSet.load(twenty, "train", 64)
    (twenty / table).unlink()
    with pytest.raises(DamagedError, match=table):
        PairSet.load(twenty, "train", 64)


# --------------------------------------------------------------------------- checking


def test_a_good_folder_checks_out_with_its_counts(twenty: Path) -> None:
    report = check_pairs(twenty)
    assert report.ok
    assert report.splits["train"] == {"photos": 14, "sketches": 27, "photos without sketch": 0}
    assert report.points == {"least": 3, "median": 3, "mean": 3, "most": 3}
    assert "train: 14 photos, 27 sketches" in report.lines()


def test_a_photo_in_two_splits_is_a_leak_by_content_not_by_name(tmp_path: Path) -> None:
    copy = np.asarray(Image.fromarray(picture(1)).resize((50, 50), Image.Resampling.LANCZOS))
    with new_pairs(tmp_path / "p", source="", layout="") as writer:
        for row in (
            photo_row(1, "train"),
            photo_row(2, "train"),
            photo_row(3, "test", copy),
            photo_row(4, "test"),
            PairPhotoRow(**photo_row(2, "val") | {"name": "other"}),
        ):
            writer.add_photo(row)
            writer.add_sketch(sketch_row(row, 1))
    report = check_pairs(tmp_path / "p")
    assert not report.ok
    found = {(leak.first, leak.second, leak.exact) for leak in report.leaks}
    assert found == {("photo01", "photo03", False), ("photo02", "other", True)}
    assert any("leak: 'photo01' (train) is nearly" in line for line in report.lines())


def test_ids_and_strokes_that_do_not_fit_are_problems(tmp_path: Path) -> None:
    with new_pairs(tmp_path / "p", source="", layout="") as writer:
        row = photo_row(1, "train")
        writer.add_photo(row)
        writer.add_photo(photo_row(2, "test"))
        writer.add_sketch(sketch_row(row, 1))
        writer.add_sketch(sketch_row(row, 1))
        writer.add_sketch(SketchRow(**sketch_row(row, 2) | {"split": "test"}))
        writer.add_sketch(SketchRow(**sketch_row(row, 3) | {"strokes": [[0.0, 0, 9, 9]]}))
    problems = "\n".join(check_pairs(tmp_path / "p").problems)
    assert "photo01_1 is there twice" in problems
    assert "photo01_2: its photo is not in test" in problems
    assert "photo01_3: is not canonical" in problems
    with pytest.raises(DamagedError, match="no photo in test for the sketch photo01_2"):
        PairSet.load(tmp_path / "p", "test", 64)


def test_two_colours_of_one_form_are_two_photos() -> None:
    prints: list[Print] = []
    for number, colour in enumerate([(200, 30, 30), (30, 30, 200)]):
        rgb = np.full((64, 64, 3), 255, np.uint8)
        rgb[10:50, 20:40] = colour
        prints.append(print_of(photo_row(number, "train", rgb)))
    assert near_pairs(prints) == []
    assert near_pairs([prints[0], prints[0]]) == [(0, 1)]


# --------------------------------------------------------------------------- fewer labels


def test_hidden_labels_leave_val_and_test_as_they_are(twenty: Path, tmp_path: Path) -> None:
    counts = split_labels(twenty, 0.5, 3, tmp_path / "half")
    labelled, hidden = tmp_path / "half" / "labelled", tmp_path / "half" / "hidden"
    assert counts["labelled"]["photos"] == counts["hidden"]["photos"] == 7
    assert counts["labelled"]["sketches"] + counts["hidden"]["sketches"] == 27
    for split in ("val", "test"):
        whole, kept = (PairSet.load(folder, split, 64) for folder in (twenty, labelled))
        assert kept.sketch_ids == whole.sketch_ids
        assert (kept.photos == whole.photos).all()
        assert list(iter_photos(hidden, {split})) == []
    parts = [PairSet.load(folder, "train", 64).names for folder in (labelled, hidden)]
    assert sorted(parts[0] + parts[1]) == PairSet.load(twenty, "train", 64).names
    assert check_pairs(labelled).ok
    assert check_pairs(hidden).ok


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32), shares=st.lists(st.floats(0.1, 0.9), min_size=2, max_size=2))
def test_a_smaller_share_is_part_of_a_larger_one(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shares: list[float]
) -> None:
    root = tmp_path_factory.mktemp("shares")
    pairs = folder_of(root / "pairs", dict.fromkeys(range(12), "train"), lambda n: 1)
    kept = []
    for number, share in enumerate(sorted(shares)):
        split_labels(pairs, share, seed, root / str(number))
        names = PairSet.load(root / str(number) / "labelled", "train", 64).names
        assert len(names) == round(share * 12)
        kept.append(set(names))
    assert kept[0] <= kept[1]


def test_the_choice_depends_on_the_seed_and_not_on_other_photos(tmp_path: Path) -> None:
    few = folder_of(tmp_path / "few", dict.fromkeys(range(0, 20, 2), "train"), lambda n: 1)
    many = folder_of(tmp_path / "many", dict.fromkeys(range(20), "train"), lambda n: 1)
    chosen = {}
    for pairs, seed in ((few, 1), (many, 1), (many, 2)):
        out = tmp_path / f"{pairs.name}-{seed}"
        split_labels(pairs, 0.5, seed, out)
        names = PairSet.load(out / "labelled", "train", 64).names
        chosen[pairs.name, seed] = [name for name in names if int(name[-2:]) % 2 == 0]
    both = set(chosen["few", 1]) & set(chosen["many", 1])
    assert len(both) == min(len(chosen["few", 1]), len(chosen["many", 1]))
    assert chosen["many", 1] != chosen["many", 2]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, 0.01, float("nan")])
def test_a_share_without_sense_is_refused(twenty: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="share"):
        split_labels(twenty, share, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
