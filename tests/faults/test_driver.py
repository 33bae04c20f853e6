"""The driver of a training is killed: the same command goes on, to the weights of a training that
was not disturbed."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from sbir_ray import checkpoint
from tests.faults.drivers import marked
from tests.tiny import tiny_pairs
from tests.tiny_pseudo import pseudo_row, tiny_pseudo

SETTINGS = {
    "model.weights": "none",
    "model.image_size": 64,
    "model.grid": 2,
    "optim.steps": 6,
    "optim.batch_size": 4,
    "loss.distill": "none",
    "save.log_every": 1,
    "save.checkpoint_every": 2,
}
# Points of tests.faults.killed_training.
OFTEN = ("mid-step", "mid-checkpoint", "before-log", "before-done")
SELDOM = ("before-rename", "mid-log")
RESUMED = {
    "mid-step": 2,
    "mid-checkpoint": 2,
    "before-rename": 2,
    "before-log": 4,
    "mid-log": 4,
    "before-done": 6,
}


def lines(run):
    """What a run has logged, but for what it took in time."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = {"seconds", "steps_per_second", "wait_share"}
    return [{k: v for k, v in line.items() if k not in timings} for line in found]


@pytest.mark.parametrize("points", [OFTEN, pytest.param(SELDOM, marks=pytest.mark.slow)])
def test_a_driver_killed_anywhere_goes_on_to_the_same_weights_and_the_same_log(tmp_path, points):
    pairs = tiny_pairs(tmp_path / "pairs")
    pseudo = tiny_pseudo(tmp_path / "pseudo", [pseudo_row(number) for number in range(20, 32)])
    command = ["train", "semi", "--workers", "0", "--pairs", pairs, "--pseudo", pseudo]
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    mark = uuid.uuid4().hex
    runs = tmp_path / "runs"
    runs.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults.killed_training",
            runs,
            *points,
            "--",
            *command,
            *sets,
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SBIR_RAY_TEST_MARK": mark},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ends = json.loads((runs / "ends.json").read_text())
    assert ends == {"whole": [0], **{point: [-9, 0] for point in points}}
    assert marked(mark) == []
    whole = checkpoint.load(runs / "whole")
    for point in points:
        run = runs / point
        found = checkpoint.load(run)
        assert found.step == whole.step == 6, point
        assert all(torch.equal(found.model[k], v) for k, v in whole.model.items()), point
        assert all(torch.equal(found.optim[k], v) for k, v in whole.optim.items()), point
        assert f"resumed at step {RESUMED[point]}" in (run / "messages.log").read_text(), point
        assert lines(run) == lines(runs / "whole"), point
        kept = sorted(file.name for file in (run / "checkpoints").iterdir())
        assert kept == sorted(f.name for f in (runs / "whole" / "checkpoints").iterdir()), point
