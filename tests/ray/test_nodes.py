"""A cluster of three nodes: workers and actors run where their resources are; a node is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray._raylet import Config
from ray.cluster_utils import Cluster

from sbir_ray import checkpoint
from sbir_ray.stream import cluster as clusters
from tests.faults.kit import DRAWS, TRAINS, assert_ledger
from tests.live_joint import CONFIG, live_joint

STEPS = 60
LIMIT = 420
"""Seconds for the whole run."""


@pytest.fixture
def three():
    """Two CPUs to train with, and two nodes of one CPU to draw on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        # Ray's core has read its settings when it was imported.
        Config.initialize("")
        clusters._own_token()
        head = {"num_cpus": 2, "resources": {"train": 1}, "include_dashboard": True}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, resources={"draw": 1})
            yield cluster
        finally:
            cluster.shutdown()


def used(cluster, part):
    """Nodes of the actors that are alive with ``part`` in their class names."""
    actors = cluster.global_state.actor_table(None, None, "ALIVE").values()
    return {actor["Address"]["NodeID"] for actor in actors if part in actor["ActorClassName"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_and_actors_are_on_their_nodes_and_a_node_is_lost(tmp_path, three):
    words = live_joint(tmp_path, tmp_path, STEPS, 90.0)
    run = tmp_path / "run"
    words += ["--config", tmp_path / CONFIG, "--out", run]
    words += ["--address", three.address, "--workers", "1", "--worker-resource", "train"]
    words += ["--actors", "2:2", "--actor-resource", "draw"]
    lost, kept = sorted(three.worker_nodes, key=lambda node: node.node_id)
    trained, drew = set(), set()
    log = tmp_path / "log"
    with open(log, "wb") as stream:
        driver = subprocess.Popen(
            [sys.executable, "-m", "sbir_ray.cli", *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=stream,
            stderr=stream,
        )
    try:
        end = time.monotonic() + LIMIT
        reached = 0
        while driver.poll() is None:
            assert time.monotonic() < end, log.read_text()
            trained |= used(three, TRAINS)
            drew |= used(three, DRAWS)
            saved = max((entry.step for entry in checkpoint.listed(run)), default=0)
            if not reached and saved and len(drew) == 2:
                reached = saved
                three.remove_node(lost, allow_graceful=False)
            time.sleep(0.2)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, log.read_text()
    assert 0 < reached < STEPS
    assert trained == {three.head_node.node_id}
    assert drew == {lost.node_id, kept.node_id}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if line["kind"] == "step"] == [*range(1, STEPS + 1)]
    assert checkpoint.load(run).step == STEPS
    assert_ledger(run)
    end = time.monotonic() + 30
    while (left := [used(three, part) for part in (TRAINS, DRAWS, "Stream")]) != [set()] * 3:
        assert time.monotonic() < end, left
        time.sleep(0.2)
