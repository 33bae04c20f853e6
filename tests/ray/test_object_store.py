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
from tests.tiny import photo, retrieval_config, tiny_pairs

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
