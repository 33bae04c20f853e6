"""Importing folders, QuickDraw files and OpenMoji: pairing, disagreements, splits, rejects."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sbir_ray.data import formats
from sbir_ray.data.layouts import ImportOptions, import_pairs
from sbir_ray.data.pair_check import check_pairs
from sbir_ray.data.pairs import PairSet, iter_photos, iter_sketches
from sbir_ray.data.sources import (
    CONSEQUENCES,
    DisagreementError,
    SourceOptions,
)
from sbir_ray.data.splits import SplitOptions
from sbir_ray.errors import UserError
from tests.layout_files import (
    LINE,
    disagreements,
    draw_photo,
    draw_sketch,
    imported,
    owners,
    split_of,
    tree,
)

# --------------------------------------------------------------------------- pairing


def test_a_folder_of_files_becomes_pairs(tmp_path: Path) -> None:
    src = tree(
        tmp_path / "src",
        ["a.png", "b.JPG", "c.webp"],
        ["a.svg", "a_2.json", "b-1.svg", "b-2.png", "c_10.npz"],
    )
    report, out = imported(src)
    assert report.splits["train"] == {"photos": 3, "sketches": 5}
    assert owners(out) == {
        "sketches/a.svg": "a",
        "sketches/a_2.json": "a",
        "sketches/b-1.svg": "b",
        "sketches/b-2.png": "b",
        "sketches/c_10.npz": "c",
    }
    assert check_pairs(out).ok
    pairs = PairSet.load(out, "train", 64)
    assert pairs.sketch_ids == ["a_1", "a_2", "b_1", "b_2", "c_10"]
    expected = np.array([[33, 42.5], [128, 213.5], [223, 80.5]])
    assert np.abs(pairs.sketches[0][0] - expected).max() < 0.01


def test_a_drawing_is_traced_and_kept(tmp_path: Path) -> None:
    _, out = imported(tree(tmp_path / "src", ["a.png"], ["a_1.png", "a_2.svg"]))
    traced, none = PairSet.load(out, "train", 128).drawings
    assert none is None
    assert traced is not None
    strokes = PairSet.load(out, "train", 128).sketches[0]
    box = np.ptp(np.concatenate(strokes), axis=0)
    assert abs(box[0] - 190) < 1
    assert abs(box[1] - 190 * 60 / 80) < 6
    rows, columns = np.nonzero(traced > 128)
    assert abs(np.ptp(columns) - 95) <= 2
    assert abs(np.ptp(rows) - 95 * 62 / 82) <= 2


def test_many_sketches_in_one_file_are_paired_by_their_keys(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png", "b.png"], [])
    (src / "sketches").mkdir()
    formats.write_sketches(src / "sketches" / "all.npz", [("a_1", LINE), ("a_2", LINE)])
    lines = [
        {"key_id": "b_1", "drawing": [[[0, 5], [0, 9]]]},
        {"key_id": "77", "photo": "a", "drawing": [[[0, 5], [0, 9]]]},
    ]
    text = "\n".join(map(json.dumps, lines))
    (src / "sketches" / "more.ndjson").write_text(f"{text}\nno json\n\n")
    report, out = imported(src)
    assert sorted(owners(out).values()) == ["a", "a", "a", "b"]
    assert report.rejected("sketch") == {"damaged": 1}
    assert report.rejects[0].origin == "sketches/more.ndjson:3"


def test_folders_between_belong_to_the_name(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["cat/1.png", "dog/1.png"], ["cat/1_1.svg", "dog/1_1.svg"])
    _, out = imported(src)
    assert owners(out) == {"sketches/cat/1_1.svg": "cat/1", "sketches/dog/1_1.svg": "dog/1"}


def test_sketches_need_not_lie_as_deep_as_their_photos(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["cat/x.png", "dog/y.png"], ["x_1.svg", "people/ann/y.svg"])
    _, out = imported(src)
    assert sorted(owners(out).values()) == ["cat/x", "dog/y"]


@pytest.mark.parametrize(
    "places",
    [
        ("train/photo", "train/sketch", "test/photo", "test/sketch"),
        ("photos/train", "sketches/train", "photos/test", "sketches/test"),
        ("trainB", "trainA", "testB", "testA"),
        ("images/Training", "drawings/Training", "images/testing", "drawings/testing"),
    ],
)
def test_trees_give_the_splits(tmp_path: Path, places: tuple[str, str, str, str]) -> None:
    src = tmp_path / "src"
    for photo, sketch, name in ((places[0], places[1], "a"), (places[2], places[3], "b")):
        draw_photo(src / photo / f"{name}.png")
        draw_sketch(src / sketch / f"{name}_1.svg")
    _, out = imported(src)
    assert split_of(out) == {"a": "train", "b": "test"}


def test_folders_of_any_name_can_be_given(tmp_path: Path) -> None:
    draw_photo(tmp_path / "src" / "catalogue" / "a.png")
    draw_sketch(tmp_path / "elsewhere" / "a_1.svg")
    source = SourceOptions(photos=tmp_path / "src" / "catalogue", sketches=tmp_path / "elsewhere")
    report, _ = imported(tmp_path / "src", source=source)
    assert report.count("sketches") == 1
    one_file = SourceOptions(source.photos, tmp_path / "elsewhere" / "a_1.svg")
    options = ImportOptions(source=one_file)
    assert import_pairs(tmp_path / "src", "folder", tmp_path / "o1", options).count("sketches") == 1
    with pytest.raises(UserError, match="no photo in it; photos belong in"):
        import_pairs(tmp_path / "src", "folder", tmp_path / "out2")


def test_the_source_s_listing_order_does_not_matter(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    outs = []
    for number, order in enumerate((names, names[::-1])):
        src = tmp_path / str(number) / "src"
        for name in order:
            tree(src, [f"{name}.png"], [f"{name}_{k}.svg" for k in (1, 2)])
        imported(src, splits=SplitOptions(val_every=2))
        outs.append(tmp_path / str(number) / "out")
    for table in ("photos", "sketches"):
        first, second = (
            [dict(row) | {"uri": ""} for row in reader(out)]
            for out in outs
            for reader in ((iter_photos if table == "photos" else iter_sketches),)
        )
        assert first == second


# --------------------------------------------------------------------------- disagreements


def test_everything_that_disagrees_is_listed_at_once(tmp_path: Path) -> None:
    accent = "caf\u00e9"
    src = tree(
        tmp_path / "src",
        ["train/a.png", "train/B.png", "train/b.png", "train/alone.png", "train/two.png"],
        ["train/a_1.svg", "train/B_1.svg", "train/b_1.svg", "train/lost_1.svg", "train/two.svg"],
    )
    draw_photo(src / "photos" / "train" / "two.jpg")
    draw_photo(src / "photos" / "test" / "a.png")
    draw_sketch(src / "sketches" / "test" / "a_2.svg")
    draw_photo(src / "photos" / f"{unicodedata.normalize('NFD', accent)}.png")
    draw_sketch(src / "sketches" / f"{accent}_1.svg")
    found = disagreements(src)
    assert found.keys() == {
        "photo-without-sketch",
        "sketch-without-photo",
        "sketch-of-two-photos",
        "twins",
        "split-conflict",
    }
    assert found["sketch-without-photo"] == ["sketches/train/lost_1.svg"]
    assert found["split-conflict"] == ["'a' is in train and test"]
    assert any("'B', 'b'" in text for text in found["twins"])
    assert any(accent in text for text in found["twins"])
    assert any("two.jpg" in t and "two.png" in t for t in found["sketch-of-two-photos"])
    assert any("alone.png" in text for text in found["photo-without-sketch"])


@pytest.mark.parametrize("kind", ["photo-without-sketch", "sketch-without-photo", "twins"])
def test_a_kind_that_is_allowed_is_done_as_its_text_says(tmp_path: Path, kind: str) -> None:
    src = tree(tmp_path / "src", ["a.png", "b.png"], ["a_1.svg", "b_1.svg"])
    if kind == "photo-without-sketch":
        draw_photo(src / "photos" / "c.png")
    elif kind == "sketch-without-photo":
        draw_sketch(src / "sketches" / "lost_1.svg")
    else:
        draw_sketch(src / "sketches" / "A_2.svg")
    assert disagreements(src).keys() == {kind}
    report, out = imported(src, allow=frozenset({kind}))
    assert report.count("photos") == (3 if kind == "photo-without-sketch" else 2)
    assert report.sketches_left_out == (kind == "sketch-without-photo")
    assert report.count("sketches") == (3 if kind == "twins" else 2)
    assert f"allowed, {kind}: 1" in report.lines()
    assert kind in CONSEQUENCES
    assert check_pairs(out).ok


def test_what_cannot_be_allowed_is_refused_by_name(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png"], ["a.svg"])
    for name in ("split-conflict", "twin"):
        with pytest.raises(UserError, match=f"--allow {name}: cannot be allowed; known are"):
            imported(src, allow=frozenset({name}))


def write_csv(src: Path, *rows: str) -> Path:
    (src / "pairs.csv").write_text("\n".join(["photo,sketch,split", *rows]) + "\n")
    return src


def test_a_csv_pairs_what_the_names_do_not(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png", "b.png"], ["x.svg", "y.svg", "z.svg"])
    write_csv(src, "a,x,train", "photos/a.png,sketches/y.svg,train", "b.png,./sketches/z.svg,test")
    _, out = imported(src)
    assert owners(out) == {"sketches/x.svg": "a", "sketches/y.svg": "a", "sketches/z.svg": "b"}
    assert split_of(out) == {"a": "train", "b": "test"}


def test_csv_and_folder_are_compared_both_ways(tmp_path: Path) -> None:
    src = tree(
        tmp_path / "src",
        ["a.png", "b.png", "extra.png", "B2.png"],
        ["a_1.svg", "b_1.svg", "unnamed.svg", "two.svg", "s.svg"],
    )
    write_csv(
        src,
        "a,b_1,",  # by its name it is of b
        "b,a_1,",
        "a,two,",
        "b,two,",  # one sketch of two photos
        "gone,s,",  # no such photo
        "b2,s,train",  # case alone
        "B2,s,test",  # two splits
    )
    found = disagreements(src)
    assert found.keys() == {
        "csv-against-folder",
        "sketch-of-two-photos",
        "split-conflict",
        "twins",
    }
    text = "\n".join(found["csv-against-folder"])
    for part in (
        "sketches/b_1.svg is of 'a', by its name of 'b'",
        "photo 'gone': no such file",
        "sketches/unnamed.svg: the sketch is in no row",
        "extra.png: the photo is in no row",
    ):
        assert part in text


def test_what_a_csv_does_not_name_is_left_out_if_allowed(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png", "b.png"], ["a_1.svg", "b_1.svg"])
    write_csv(src, "a,a_1,")
    report, out = imported(src, allow=frozenset({"csv-against-folder"}))
    assert list(split_of(out)) == ["a"]
    assert (report.photos_left_out, report.sketches_left_out) == (1, 1)
    assert (report.photos_found, report.sketches_found) == (2, 2)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sketch\nx\n", "no column photo"),
        ("photo,sketch\na,\n", r"pairs\.csv:2: sketch is empty"),
        ("photo,sketch,split\na,a_1,dev\n", "'dev' is not train, val or test"),
        ("photo,sketch\n\xff,b\n", "not a CSV file in UTF-8"),
    ],
)
def test_a_csv_that_is_none_is_refused(tmp_path: Path, text: str, match: str) -> None:
    src = tree(tmp_path / "src", ["a.png"], ["a_1.svg"])
    (src / "pairs.csv").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=match):
        imported(src)


# --------------------------------------------------------------------------- rejects


def test_a_damaged_file_costs_one_row_and_is_listed(tmp_path: Path) -> None:
    src = tree(
        tmp_path / "src",
        ["a.png", "b.png", "c.png", "d.png"],
        ["a_1.svg", "b_1.svg", "c_1.svg", "c_2.svg", "d_1.svg", "d_2.svg", "d_3.png"],
    )
    (src / "photos" / "a.png").write_bytes(b"")
    (src / "photos" / "b.png").write_bytes(b"<html>not found</html>")
    (src / "sketches" / "c_1.svg").write_bytes(b"<svg")
    (src / "sketches" / "d_2.svg").write_bytes(b"\xff\xfe\x00")
    (src / "sketches" / "d_3.png").write_bytes(b"no picture")
    (src / "photos" / "dir.png").mkdir()
    (src / "photos" / "loop.png").symlink_to("loop.png")
    (src / "photos" / ".hidden").write_bytes(b"x")
    (src / "readme.txt").write_text("about")
    report, out = imported(src, allow=frozenset({"photo-without-sketch"}))
    assert report.rejected("photo") == {"empty": 1, "not-an-image": 1, "unreadable": 2}
    assert report.rejected("sketch") == {"photo-rejected": 2, "damaged": 3}
    assert report.splits["train"] == {"photos": 2, "sketches": 2}
    text = "\n".join(report.lines())
    for part in ("loop.png", "dir.png", "sketches/c_1.svg", "sketches/d_3.png: not-an-image"):
        assert part in text
    assert "1 other files were not looked at" in text
    assert json.loads(json.dumps(report.to_dict()))["photos_found"] == 6
    assert check_pairs(out).ok


def test_nothing_is_written_when_no_pair_is_left(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png"], ["a_1.svg"])
    (src / "photos" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="no pair is left"):
        imported(src)
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists already and is not empty"):
        import_pairs(tmp_path / "missing", "folder", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_unknown_layout_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known are qmul, folder, quickdraw, openmoji"):
        import_pairs(tmp_path, "sketchy", tmp_path / "out")


# --------------------------------------------------------------------------- splits


def test_all_sketches_follow_their_photo(tmp_path: Path) -> None:
    names = [f"p{n}" for n in range(8)]
    src = tree(
        tmp_path / "src",
        [f"{name}.png" for name in names],
        [f"{name}_{k}.svg" for name in names for k in range(3)],
    )
    _, out = imported(src, splits=SplitOptions(val_fraction=0.4, test_fraction=0.2, seed=2))
    splits = {row["photo_id"]: row["split"] for row in iter_photos(out)}
    assert len(set(splits.values())) == 3
    assert all(row["split"] == splits[row["photo_id"]] for row in iter_sketches(out))


def test_copies_of_a_photo_go_to_one_split_when_the_splits_are_chosen(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", [], [])
    for n in range(6):
        draw_photo(src / "photos" / f"a{n}.png", seed=n)
        draw_photo(src / "photos" / f"b{n}.jpg", seed=n, quality=80)
        draw_sketch(src / "sketches" / f"a{n}.svg")
        draw_sketch(src / "sketches" / f"b{n}.svg")
    _, out = imported(src, splits=SplitOptions(val_every=2))
    splits = split_of(out)
    assert [splits[f"a{n}"] for n in range(6)] == ["val", "train"] * 3
    assert all(splits[f"a{n}"] == splits[f"b{n}"] for n in range(6))
    assert check_pairs(out).ok


def test_a_photo_of_the_test_split_in_train_is_refused_unless_allowed(tmp_path: Path) -> None:
    src = tree(
        tmp_path / "src",
        ["train/a.png", "train/b.png", "test/c.png"],
        ["train/a.svg", "train/b.svg", "test/c.svg"],
    )
    draw_photo(src / "photos" / "train" / "copy.jpg", seed=5, quality=70)
    draw_photo(src / "photos" / "test" / "original.png", seed=5)
    draw_sketch(src / "sketches" / "train" / "copy.svg")
    draw_sketch(src / "sketches" / "test" / "original.svg")
    found = disagreements(src, splits=SplitOptions(val_every=2))
    assert found == {"leak": ["'copy' (train) is nearly the same as 'original' (test)"]}
    _, out = imported(src, allow=frozenset({"leak"}))
    assert not check_pairs(out).ok


def test_the_same_file_twice_in_one_split_is_one_photo(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png"], ["a_1.svg", "b_1.svg"])
    (src / "photos" / "b.png").write_bytes((src / "photos" / "a.png").read_bytes())
    report, out = imported(src)
    assert (report.photos_merged, report.count("photos"), report.count("sketches")) == (1, 1, 2)
    assert PairSet.load(out, "train", 64).photo_of.tolist() == [0, 0]
    assert check_pairs(out).ok


def test_a_split_csv_decides_and_is_compared(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["a.png", "b.png"], ["a.svg", "b.svg"])
    table = tmp_path / "splits.csv"
    table.write_text("photo,split\na,val\nb,train\n")
    _, out = imported(src, splits=SplitOptions(csv=table))
    assert split_of(out) == {"a": "val", "b": "train"}
    table.write_text("photo,split\na,val\na,test\nc,train\n")
    with pytest.raises(DisagreementError) as error:
        import_pairs(src, "folder", tmp_path / "o", ImportOptions(splits=SplitOptions(csv=table)))
    assert {d.kind for d in error.value.disagreements} == {"split-conflict", "csv-against-folder"}


def test_a_split_is_not_chosen_where_the_data_has_one(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", ["train/a.png", "val/b.png"], ["train/a.svg", "val/b.svg"])
    with pytest.raises(UserError, match="a val split of its own"):
        imported(src, splits=SplitOptions(val_every=5))
