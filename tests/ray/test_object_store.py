"""Everything lies in an object store: photos, drawings, and a run that is stopped and resumed."""

import json
import os
import signal
import threading
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from PIL import Image

from sbir_ray import checkpoint
from sbir_ray.cli import cli
from sbir_ray.config import SaveConfig
from sbir_ray.errors import StoppedError
from sbir_ray.places import copy_tree, place
from sbir_ray.runs import load_retrieval
from sbir_ray.strict import to_toml
from tests.tiny import joint_config, photo, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

STEPS = 40


def sbir_ray(*words):
    """What a command prints as JSON."""
    done = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@contextmanager
def stopping(run, step):
    """While in the block, SIGTERM to this process once ``run`` has a checkpoint of that step."""
    over = threading.Event()

    def wait():
        while not over.wait(0.1):
            if any(entry.step >= step for entry in checkpoint.listed(run)):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_photos_drawings_and_a_run_that_is_resumed_lie_in_an_object_store(tmp_path, bucket):
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(14, 20):
        Image.fromarray(photo(number)).save(sources / f"{number}.png")
    copy_tree(sources, place(f"{bucket}/sources"))
    copy_tree(tiny_pairs(tmp_path / "pairs"), place(f"{bucket}/pairs"))
    config = tmp_path / "semi.toml"
    save = SaveConfig(log_every=1, checkpoint_every=STEPS // 4)
    config.write_text(to_toml(retrieval_config(STEPS, save=save)))

    stored = sbir_ray("ingest", f"{bucket}/sources", "--out", f"{bucket}/photos")
    assert (stored["read"], stored["stored"]) == (6, 6)
    drawing = ("--photos", f"{bucket}/photos", "--out", f"{bucket}/pseudo", "--actors", "1")
    drawn = sbir_ray("sketch", "--sketcher", "contours", *drawing)
    assert (drawn["drawn"], drawn["kept"]) == (6, 6)

    train = ("train", "semi", "--pairs", f"{bucket}/pairs", "--pseudo", f"{bucket}/pseudo")
    train += ("--out", f"{bucket}/semi", "--config", str(config), "--workers", "1")
    run = place(f"{bucket}/semi")
    stopped = f"stopped after step .* of {STEPS}"
    with pytest.raises(StoppedError, match=stopped), stopping(run, STEPS // 4):
        sbir_ray(*train)
    stopped = max(entry.step for entry in checkpoint.listed(run))
    assert STEPS // 4 <= stopped < STEPS
    result = sbir_ray(*train)
    assert result["run"] == str(run)

    assert f"resumed at step {stopped}" in (run / "messages.log").read_text()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "step"] == [*range(1, STEPS + 1)]
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    for entry in checkpoint.listed(run):
        assert checkpoint.read(entry.path).step == entry.step
    assert load_retrieval(run).version == STEPS
    found = sbir_ray("evaluate", str(run), "--pairs", f"{bucket}/pairs", "--split", "val")
    assert found["acc@1"] == result["validation"]["acc@1"]
    sbir_ray("report", str(run))
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    # What Ray keeps of its own and the request to stop are gone.
    assert not [entry.name for entry in run.iterdir() if entry.name in ("ray", "stop")]


@pytest.fixture
def sweep(tmp_path, bucket):
    """Runs a sweep over drawings and to a folder in the object store."""
    there = f"{bucket}/{tmp_path.name}"
    copy_tree(tiny_pairs(tmp_path / "pairs", train=8, val=4, hands=1), place(f"{there}/pairs"))
    copy_tree(tiny_store(tmp_path / "photos", 8), place(f"{there}/photos"))
    drawing = ("--photos", f"{there}/photos", "--out", f"{there}/pseudo")
    sbir_ray("sketch", "--sketcher", "contours", *drawing)
    space, config = tmp_path / "space.toml", tmp_path / "base.toml"
    space.write_text('trains = "semi"\n[knob."loss.pseudo_weight"]\nrange = [0.1, 3.0]\n')
    config.write_text(to_toml(retrieval_config(4)))

    def run(*more):
        words = ["tune", str(space), "--pairs", f"{there}/pairs", "--pseudo", f"{there}/pseudo"]
        words += ["--config", str(config), "--searcher", "random", "--seeds", "1"]
        return sbir_ray(*words, *more, "--parallel", "2", "--out", f"{there}/sweep")

    return run, place(f"{there}/sweep")


@pytest.mark.slow
def test_sweeps_lie_in_an_object_store_and_go_on_there(sweep):
    run, out = sweep
    first = run("--scheduler", "none", "--trials", "1")
    found = run("--scheduler", "none", "--trials", "2")
    assert [one["status"] for one in found["trials"]] == ["done", "done"]
    assert found["trials"][0]["evaluations"] == first["trials"][0]["evaluations"]
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert "pseudo_weight" in (out / "best.toml").read_text()
    assert not (out / "ray").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_populations_hand_on_their_networks_in_an_object_store(sweep):
    run, out = sweep
    short = ("--set", "optim.schedule=constant", "--set", "optim.steps=2")
    found = run("--scheduler", "pbt", "--trials", "4", *short)
    assert [one["status"] for one in found["trials"]] == ["done"] * 4
    assert any(one["changes"] for one in found["trials"])
    assert (out / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_studies_lie_in_an_object_store_and_go_on_there(tmp_path, bucket):
    copy_tree(tiny_pairs(tmp_path / "pairs", train=12, val=3, hands=1), place(f"{bucket}/twelve"))
    config = tmp_path / "study.toml"
    config.write_text(to_toml(joint_config()))

    def study(labels):
        words = ["study", "labels", "--pairs", f"{bucket}/twelve", "--config", str(config)]
        words += ["--rows", "supervised,contours", "--seeds", "1"]
        return sbir_ray(*words, "--labels", labels, "--out", f"{bucket}/study")

    half = study("0.5")
    # What copies that were stopped leave: headers come last.
    for name in ("pairs/labelled/photos.parquet", "photos/shards/part-00000.parquet"):
        place(f"{bucket}/study/data/labels-0.75/seed-0/{name}").write_bytes(b"half a file")
    whole = study("0.5,0.75")
    assert not whole["failed"]
    assert len(whole["rows"]) > len(half["rows"])
    assert "contours" in (place(f"{bucket}/study") / "study.md").read_text()
    assert (place(f"{bucket}/study") / "study.png").read_bytes().startswith(b"\x89PNG")
