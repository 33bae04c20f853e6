"""Processes of training are killed: the run goes on, with the weights and the account it would
have had."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from ray import cloudpickle

from sbir_ray import checkpoint
from sbir_ray.config import FilterConfig, OptimConfig, SaveConfig
from sbir_ray.errors import SbirError
from sbir_ray.joint_config import ScheduleConfig, StreamConfig
from sbir_ray.train.job import Job
from sbir_ray.train.launch import Actors, train
from sbir_ray.train.tasks import joint_jobs
from tests.faults.calm import assert_same_weights, train_undisturbed
from tests.faults.kit import DRAWS, TRAINS, assert_ledger, killing
from tests.tiny import joint_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Fragile(dict):
    """Inputs that the worker of rank 1 alone cannot read."""

    def get(self, name, default=None):
        if name == "begin" and dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("the bits fell out")
        return super().get(name, default)


def saved(run, step):
    return lambda: any(entry.step >= step for entry in checkpoint.listed(Path(run)))


def logged(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_worker_leaves_the_weights_of_a_run_that_was_not_disturbed(tmp_path, cluster):
    config = retrieval_config(
        optim=OptimConfig(steps=60, batch_size=4, lr=1e-3),
        save=SaveConfig(log_every=1, checkpoint_every=5),
    )
    inputs = {"pairs": str(tiny_pairs(tmp_path / "pairs"))}
    job = Job("retrieval", str(tmp_path / "a"), config, inputs)
    with killing((saved(job.out, 10), TRAINS)) as killed:
        train([job], workers=2, cpus_per_worker=1.0)
    assert len(killed) == 1
    said = (tmp_path / "a" / "messages.log").read_text()
    assert "resumed at step" in said
    steps = [line["step"] for line in logged(job.out) if line["kind"] == "step"]
    assert steps == list(range(1, 61))

    calm = dataclasses.replace(job, out=str(tmp_path / "b"))
    train_undisturbed(calm)
    assert checkpoint.load(tmp_path / "a").step == 60
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_a_fault_of_one_worker_ends_all_of_them_by_its_rank(tmp_path, cluster):
    inputs = Fragile(pairs=str(tiny_pairs(tmp_path / "pairs")))
    job = Job("retrieval", str(tmp_path / "a"), retrieval_config(), inputs)
    match = r"a: the workers died 3 times .* \(rank 1: the bits fell out\)$"
    with pytest.raises(SbirError, match=match):
        train([job], workers=2, cpus_per_worker=1.0)


@pytest.mark.slow
def test_a_killed_learner_and_a_killed_generator_leave_an_account_that_adds_up(tmp_path, cluster):
    inputs = {
        "pairs": str(tiny_pairs(tmp_path / "pairs")),
        "photos": str(tiny_store(tmp_path / "photos", 9)),
    }
    config = joint_config(
        schedule=ScheduleConfig(steps=36, retrieval_steps=2, generator_steps=1),
        filters=FilterConfig(min_points=1),
        stream=StreamConfig(batch_size=4, window=2, max_staleness=3, wait_limit=90.0),
    )
    *before, job = joint_jobs(str(tmp_path / "run"), config, inputs)
    train(before, workers=0)
    ctrl_c = signal.getsignal(signal.SIGINT)
    run = Path(job.out)
    with killing((saved(run, 3), TRAINS), (saved(run, 9), DRAWS)) as killed:
        train([job], workers=1, cpus_per_worker=1.0, actors=Actors(1, 1))
    assert len(killed) == 2
    assert signal.getsignal(signal.SIGINT) == ctrl_c
    steps = [line["step"] for line in logged(run) if line["kind"] == "step"]
    assert steps == list(range(1, 37))
    ledger = assert_ledger(run)
    # What the dead learner held is lost, and counted.
    assert set(ledger["filtered"]) <= {"lost", "min_points"}
    assert ledger["used"] >= 24 * 4 + 12 * 2
