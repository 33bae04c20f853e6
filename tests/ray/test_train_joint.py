"""Joint training fed by live generator actors: it trains, every drawing has one fate, and it goes
on where it was stopped."""

import json
from pathlib import Path

import pytest

from sbir_ray import checkpoint
from sbir_ray.config import FilterConfig
from sbir_ray.joint_config import ScheduleConfig, StreamConfig
from sbir_ray.train.launch import Actors, train
from sbir_ray.train.tasks import joint_jobs
from tests.interrupted import interrupted
from tests.tiny import joint_config, tiny_pairs
from tests.tiny_store import tiny_store


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    found = {
        "pairs": str(tiny_pairs(folder / "pairs")),
        "photos": str(tiny_store(folder / "photos", 9)),
    }
    train(joint_jobs(str(folder / "run"), joint_config(), found)[:-1], workers=0)
    return {
        **found,
        "teacher": str(folder / "run" / "supervised"),
        "generator": str(folder / "run" / "generator"),
    }


def lines(run, kind="step"):
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def accounted(run):
    ledger = json.loads((run / "ledger.json").read_text())
    told = ledger["used"] + ledger["stale"] + sum(ledger["filtered"].values())
    assert ledger["drawn"] == told + ledger["in_flight"]
    return ledger


def test_two_workers_train_on_what_actors_draw_with_newer_and_newer_weights(
    tmp_path, inputs, cluster
):
    config = joint_config(
        schedule=ScheduleConfig(steps=9, retrieval_steps=2, generator_steps=1),
        filters=FilterConfig(min_points=1, max_rank=8),
        stream=StreamConfig(batch_size=4, window=2, max_staleness=3, wait_limit=60.0),
    )
    (job,) = joint_jobs(str(tmp_path / "run"), config, inputs)
    (result,) = train([job], workers=2, actors=Actors(1, 1))
    assert "acc@1" in result
    run = tmp_path / "run"
    steps = lines(run)
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert [line["version"] for line in steps] == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    ledger = accounted(run)
    # 6 steps of 4 pseudo pairs, each drawn up to 3 times, and 3 of 2 rewarded photos.
    assert 6 * 4 + 3 * 2 <= ledger["used"] + sum(ledger["filtered"].values()) <= 6 * 12 + 3 * 2
    assert set(ledger["filtered"]) <= {"max_rank"}
    assert sum(ledger["staleness"].values()) == ledger["drawn"] - ledger["in_flight"]
    late = {int(lag): n for lag, n in ledger["staleness"].items()}
    assert sum(n for lag, n in late.items() if lag > 3) == ledger["stale"]
    assert max(late) > 0  # the learners did not wait for the actors after each turn
    assert checkpoint.load(run).step == 9


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_counts_in_this_process(tmp_path, inputs, cluster):
    config = joint_config(
        filters=FilterConfig(min_points=1),
        stream=StreamConfig(batch_size=4, wait_limit=60.0),
    )
    (job,) = joint_jobs(str(tmp_path / "run"), config, inputs)
    interrupted(lambda: train([job], workers=0))
    before = accounted(Path(job.out))
    train([job], workers=0)
    after = accounted(Path(job.out))
    assert after["used"] > before["used"] > 0
    assert after["filtered"].get("lost", 0) == before["in_flight"]
    steps = [line["step"] for line in lines(Path(job.out))]
    assert steps == [1, 2, 3, 4]
