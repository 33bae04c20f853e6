"""The node on which a worker trains is lost: the run goes on on another one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sbir_ray import strict
from sbir_ray.config import RetrievalTraining
from sbir_ray.train.job import Job
from tests.faults.calm import assert_same_weights, train_undisturbed
from tests.ray.test_drivers import SETTINGS
from tests.tiny import tiny_pairs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_node_is_lost_goes_on_elsewhere_from_its_newest_checkpoint(tmp_path):
    pairs, run = tiny_pairs(tmp_path / "pairs"), tmp_path / "run"
    words = ["train", "retrieval", "--workers", "1", "--cpus-per-worker", "1", "--pairs", pairs]
    sets = [word for line in SETTINGS for word in ("--set", line)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.lost_node", run, *words, "--out", run, *sets],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "lost the node of the worker" in done.stdout
    said = (run / "messages.log").read_text()
    (step,) = re.findall(r"resumed at step (\d+)", said)
    assert int(step) >= 10
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 151))
    config = strict.load(RetrievalTraining, None, SETTINGS)
    calm = Job("retrieval", str(tmp_path / "calm"), config, {"pairs": str(pairs)})
    train_undisturbed(calm, world=1)
    assert_same_weights(run, tmp_path / "calm")
