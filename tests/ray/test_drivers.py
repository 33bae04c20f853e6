"""The driver of Ray workers is killed, or asked to end as ``ray job stop`` asks: the same command
goes on, to the weights of a training that was not disturbed, and no process is left."""

import contextlib
import json
import signal
import subprocess

import pytest

from sbir_ray import checkpoint, strict
from sbir_ray.config import RetrievalTraining
from sbir_ray.train.job import Job
from tests.faults.calm import assert_same_weights, train_undisturbed
from tests.faults.drivers import driving
from tests.tiny import tiny_pairs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = [
    "model.weights=none",
    "model.image_size=64",
    "model.grid=2",
    "optim.steps=150",
    "optim.batch_size=4",
    "save.log_every=1",
    "save.checkpoint_every=5",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs, and with the undisturbed run."""
    folder = tmp_path_factory.mktemp("drivers")
    pairs = tiny_pairs(folder / "pairs")
    config = strict.load(RetrievalTraining, None, SETTINGS)
    train_undisturbed(Job("retrieval", str(folder / "calm"), config, {"pairs": str(pairs)}))
    return folder


def command(world, run):
    words = ["train", "retrieval", "--workers", 2, "--pairs", world / "pairs", "--out", run]
    return [*words, *(word for line in SETTINGS for word in ("--set", line))]


def newest(run):
    return max((entry.step for entry in checkpoint.listed(run)), default=0)


def check(world, run):
    assert_same_weights(run, world / "calm")
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 151))
    assert not (run / "ray").exists()


def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on(tmp_path, world):
    run = tmp_path / "run"
    ended = []

    def writing():
        return newest(run) > before and any((run / "checkpoints").glob(".step-*"))

    for ready in (lambda: newest(run) >= 10, writing):
        before = newest(run)
        with driving(*command(world, run), folder=tmp_path) as driver:
            driver.until(ready)
            assert driver.end(signal.SIGKILL) == -signal.SIGKILL
            ended.append(driver)
    with driving(*command(world, run), folder=tmp_path) as driver:
        assert driver.wait() == 0, driver.said.read_text()
    for one in [*ended, driver]:
        one.assert_no_processes()
    assert (run / "messages.log").read_text().count("resumed at step") == 2
    check(world, run)


def test_a_driver_that_is_asked_to_end_does_and_the_same_command_goes_on(tmp_path, world):
    run = tmp_path / "run"
    with driving(*command(world, run), folder=tmp_path) as interrupted:
        interrupted.until(lambda: newest(run) >= 5)
        assert interrupted.end(signal.SIGINT) == 130, interrupted.said.read_text()
    reached = newest(run)
    with driving(*command(world, run), folder=tmp_path) as asked:
        asked.until(lambda: newest(run) >= reached + 5)
        assert asked.end(signal.SIGTERM) == 143, asked.said.read_text()
    reached = newest(run)
    assert f"stopped after step {reached} of 150" in asked.said.read_text()
    # As `ray job stop` ends it: three seconds after SIGTERM, whatever it has come to.
    with driving(*command(world, run), folder=tmp_path) as struck:
        struck.until(lambda: newest(run) >= reached + 10)
        with contextlib.suppress(subprocess.TimeoutExpired):
            struck.end(signal.SIGTERM, seconds=3.0)
        struck.end(signal.SIGKILL)
    with driving(*command(world, run), folder=tmp_path) as driver:
        assert driver.wait() == 0, driver.said.read_text()
    for one in (interrupted, asked, struck, driver):
        one.assert_no_processes()
    check(world, run)
