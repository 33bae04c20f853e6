"""The demo goes the whole way, says what it found, and does not repeat what is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sbir_ray import demo
from sbir_ray.data.pairs import PairSet
from sbir_ray.stream.pseudo_store import PseudoSet, read_header


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [
        Path(sys.executable).with_name("sbir-ray"),
        "demo",
        "--quick",
        "--json",
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout), done.stderr, command


def test_it_compares_all_five_ways_with_intervals(finished):
    _, result, _, _ = finished
    assert list(result["accuracy"]) == list(demo.NAMES)
    assert list(result["difference"]) == [name for name in demo.NAMES if name != "supervised"]
    for name, found in result["difference"].items():
        low, high = found["ci95"]["acc@1"]
        assert low <= found["difference"]["acc@1"] <= high
        gain = result["accuracy"][name]["acc@1"] - result["accuracy"]["supervised"]["acc@1"]
        assert found["difference"]["acc@1"] == pytest.approx(gain)
    assert (
        result["accuracy"]["supervised"]["acc@1"] > 5 / result["accuracy"]["supervised"]["gallery"]
    )


def test_it_says_what_the_numbers_are_of(finished):
    out, result, progress, _ = finished
    page = (out / "report.html").read_text()
    assert "aligned to the pixel" in result["text"]
    assert f"sbir-ray serve {out / 'index'}" in result["text"]
    assert "aligned to the pixel" in page
    for section in ("Accuracy", "Learning curves", "Queries", "Pseudo sketches", "Timings"):
        assert section in page
    assert "[6/6]" in progress
    assert "left in all" in progress


def test_no_test_photo_and_no_hidden_sketch_reached_the_training(finished):
    out, _, _, _ = finished
    test = set(PairSet.load(out / "pairs" / "labelled", "test", 64).photo_ids)
    labelled = set(PairSet.load(out / "pairs" / "labelled", "train", 64).photo_ids)
    drawn = set(PseudoSet.load(out / "pseudo-generator", 64).photo_ids)
    assert drawn
    assert not drawn & test
    assert not drawn & labelled
    semi = json.loads((out / "runs" / "semi" / "run.json").read_text())
    assert set(semi["inputs"]) == {"pairs", "pseudo", "teacher"}
    header = read_header(out / "pseudo-generator")
    generator = json.loads((out / "runs" / "generator" / "run.json").read_text())
    assert header["generator_config"]["generator"] == generator["config"]["model"]


@pytest.mark.slow
def test_the_same_command_again_has_nothing_to_do(finished):
    out, result, _, command = finished
    before = {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["accuracy"] == result["accuracy"]
    assert again.stderr.count("done before") == 6
    assert {f: f.stat().st_mtime_ns for f in (out / "runs").rglob("*.safetensors")} == before
