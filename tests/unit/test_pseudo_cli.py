"""`sbir-ray pseudo`: what it tells is what lies there, and what it writes comes back."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from sbir_ray import cli
from sbir_ray.config import ChoiceConfig
from sbir_ray.data.formats import read_sketches
from sbir_ray.data.photos import align, decode_stored, encode_jpeg
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import unflatten
from sbir_ray.stream.pseudo_store import iter_rows, read_header
from tests.tiny import photo, sketch
from tests.tiny_pseudo import pseudo_row, tiny_pseudo

SURE = [0.9, 0.1, 0.8, 0.3, 0.7, 0.5]
"""Of the drawings, two of each of three photos; those below 0.4 are filtered."""


@pytest.fixture
def folder(tmp_path):
    choice = ChoiceConfig(keep="all")
    old = [pseudo_row(9, generator_digest="old", certainty=0.2)]
    tiny_pseudo(tmp_path / "p", old, choice=choice, generator_digest="old", teacher_digest="t")
    rows = [
        pseudo_row(i // 2, i % 2, certainty=sure, rank=i + 1, similarity=0.5, round=1)
        for i, sure in enumerate(SURE)
    ]
    failed = [pseudo_row(3, k, status="failed", reason="nothing-to-draw") for k in range(2)]
    tiny_pseudo(tmp_path / "p", rows, failed, choice=choice, number=1, teacher_digest="t")
    return tmp_path / "p"


@pytest.fixture
def run(monkeypatch, capsys):
    """The command's exit code, output and errors."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["sbir-ray", "pseudo", *map(str, words)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_the_rounds_are_listed(run, folder):
    code, out, _ = run("ls", folder)
    assert code == 0
    assert out.splitlines() == [
        "round 0: 1 drawings by generator 1 (old), settings def",
        "round 1: 8 drawings by generator 1 (abc), settings def, used",
    ]
    found = json.loads(run("ls", folder, "--json")[1])["rounds"]
    assert [entry["used"] for entry in found] == [False, True]


def test_numbers_are_those_of_the_rows(run, folder):
    run("prune", folder, "--set", "filters.min_certainty=0.4")
    found = json.loads(run("stats", folder, "--json")[1])
    assert (found["photos"], found["pairs"]) == (4, 4)
    assert found["ledger"] == {
        "drawn": 8,
        "kept": 4,
        "filtered": {"min_certainty": 2},
        "failed": {"nothing-to-draw": 2},
    }
    kept = [sure for sure in SURE if sure > 0.4]
    assert found["certainty"]["mean"] == pytest.approx(np.mean(kept))
    assert found["strokes"]["most"] == 2
    assert found["points"]["least"] == min(
        sum(map(len, sketch(i // 2, i % 2))) for i, sure in enumerate(SURE) if sure > 0.4
    )
    assert [tenth["drawings"] for tenth in found["deciles"]] == [1] * 6
    assert [tenth["high"] for tenth in found["deciles"]] == pytest.approx(sorted(SURE)[::-1])
    assert [tenth["kept"] for tenth in found["deciles"]] == [1, 1, 1, 1, 0, 0]
    assert [tenth["median_rank"] for tenth in found["deciles"]] == [1, 3, 5, 6, 4, 2]
    assert [entry["certainty"] for entry in found["rounds"]] == pytest.approx([0.2, np.mean(SURE)])
    text = run("stats", folder)[1]
    assert "8 drawn: 4 kept, 2 filtered (min_certainty 2), 2 failed (nothing-to-draw 2)" in text


def test_a_sheet_shows_photo_and_sketch_from_the_most_to_the_least_certain(run, folder, tmp_path):
    code, out, _ = run("show", folder, "--out", tmp_path / "s" / "a.png", "--count", 3)
    assert (code, out.strip()) == (0, f"{tmp_path / 's' / 'a.png'}: 3 pairs")
    with Image.open(tmp_path / "s" / "a.png") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (128 + 22, 3 * 264, 3)
    for place, i in enumerate((0, 4, 1)):  # the most certain, the third, the last
        left = 264 * place
        stored = align(decode_stored(encode_jpeg(photo(i // 2))), 128)
        np.testing.assert_array_equal(sheet[:128, left : left + 128], stored)
        ink = 255 - rasterise([sketch(i // 2, i % 2)], 128)[0]
        np.testing.assert_array_equal(sheet[:128, left + 128 : left + 256, 0], ink)
        assert sheet[128:142, left : left + 60].min() < 128  # told under it
    nothing = ["--set", "filters.min_certainty=0.95"]
    run("prune", folder, *nothing)
    code, _, err = run("show", folder, "--out", tmp_path / "b.png")
    assert (code, "holds no drawing to show" in err) == (2, True)
    assert run("show", folder, "--out", tmp_path / "b.png", "--all")[0] == 0


def test_pruning_keeps_what_was_not_set_and_can_be_taken_back(run, folder):
    dry = json.loads(run("prune", folder, "--set", "filters.max_rank=3", "--dry-run", "--json")[1])
    assert (dry["kept"], dry["filtered"]) == (3, {"max_rank": 3})
    assert dry["choice"]["keep"] == "all"
    assert read_header(folder)["ledger"]["kept"] == 6
    run("prune", folder, "--set", "filters.max_rank=3")
    run("prune", folder, "--set", "filters.min_certainty=0.4")
    assert [row["rank"] for row in iter_rows(folder)] == [1, 3]
    run("prune", folder, "--set", "filters.max_rank=0", "--set", "filters.min_certainty=0")
    assert len(list(iter_rows(folder))) == 6
    code, _, err = run("prune", folder, "--set", "filters.min_certainy=0.4")
    assert (code, "did you mean filters.min_certainty" in err) == (2, True)


def test_old_rounds_are_removed_when_asked(run, folder):
    code, out, _ = run("prune", folder, "--old-rounds")
    assert (code, out.splitlines()[-1]) == (0, "removed 1 rounds")
    assert not (folder / "round-0000").exists()
    assert len(list(iter_rows(folder))) == 6


@pytest.mark.parametrize("kind", ["ndjson", "npz", "svg"])
def test_exported_sketches_come_back(run, folder, tmp_path, kind):
    run("prune", folder, "--set", "filters.min_certainty=0.4")
    out = tmp_path / ("svgs" if kind == "svg" else f"all.{kind}")
    assert run("export", folder, "--format", kind, "--out", out)[0] == 0
    files = sorted(out.iterdir()) if kind == "svg" else [out]
    found = {}
    for file in files:
        for key, strokes in read_sketches(file):
            found[file.stem if kind == "svg" else key] = strokes
    rows = {f"{row['photo_id']}_{row['sample']}": row for row in iter_rows(folder)}
    assert sorted(found) == sorted(rows)
    for key, strokes in found.items():
        expected = unflatten(rows[key]["strokes"])
        start = 0 if kind != "npz" else strokes[0][0] - expected[0][0]  # offsets have no place
        for a, b in zip(strokes, expected, strict=True):
            np.testing.assert_allclose(a - start, b, atol=2e-3)
    code, _, err = run("export", folder, "--format", kind, "--out", out)
    assert (code, "exists already" in err) == (2, True)


def test_exported_pictures_are_the_rasters(run, folder, tmp_path):
    run("export", folder, "--format", "png", "--out", tmp_path / "pngs", "--side", 64)
    files = sorted((tmp_path / "pngs").iterdir())
    assert [file.stem for file in files] == [f"0{i // 2}_{i % 2}" for i in range(6)]
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            expected = 255 - rasterise([sketch(i // 2, i % 2)], 64)[0]
            np.testing.assert_array_equal(np.asarray(picture), expected)
