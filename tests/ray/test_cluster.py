"""The Ray that stages run on: joined or refused in seconds, and not stopped by whom it was lent."""

import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from ray import cloudpickle

from sbir_ray.errors import UserError
from sbir_ray.stream import cluster as clusters
from sbir_ray.stream.attempts import LIMIT, Attempts
from sbir_ray.stream.cluster import connect, ensure_fits, run_tasks

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def fragile(plan, folder):
    """Ends its process at every row that is divisible by 3, until that row is given up."""
    out = []
    for number in plan["number"].to_pylist():
        attempts = Attempts(Path(folder) / str(number))
        given_up = attempts.deaths("row") >= LIMIT
        if not given_up:
            with attempts.working_on("row"):
                if number % 3 == 0:
                    os._exit(1)
        attempts.close()
        out.append(-number if given_up else number)
    return pa.table({"number": out})


def test_work_that_kills_its_process_is_given_up_and_the_rest_is_done(tmp_path, cluster):
    plan = [pa.table({"number": [number]}) for number in range(1, 5)]
    tables = run_tasks(plan, fragile, folder=str(tmp_path))
    assert sorted(n for t in tables for n in t["number"].to_pylist()) == [-3, 1, 2, 4]


def niceness():
    return os.nice(0)


def test_workers_come_no_later_than_other_processes(cluster):
    assert cluster.get(cluster.remote(niceness).remote()) == os.nice(0)


def test_a_ray_that_is_up_is_used_and_left_up(cluster):
    with connect():
        assert cluster.is_initialized()
    assert cluster.is_initialized()


@pytest.mark.slow
def test_without_an_address_no_ray_of_this_machine_is_taken(cluster):
    """Though Ray finds one: it notes the newest there is in its folder."""
    text = "import ray; from sbir_ray.stream.cluster import connect\nwith connect(): "
    text += "print(ray.get_runtime_context().gcs_address, len(ray.nodes()))"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    theirs = cluster.get_runtime_context().gcs_address
    # Ray's sockets lie there, and their names have to be short.
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text(theirs)
        done = subprocess.run(
            [sys.executable, "-c", text],
            env={**environment, "RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    own, count = done.stdout.split()
    assert own != theirs
    assert count == "1"


def test_what_does_not_fit_is_refused_with_what_would(cluster):
    assert ensure_fits(1.0, count=3, spare_cpus=1.0) == 3
    with pytest.raises(UserError, match=r"--actors: 4 x \(1 CPU, 0 GPU\) beside 1 CPU.*at most 3"):
        ensure_fits(1.0, count=4, spare_cpus=1.0, what="--actors")
    with pytest.raises(UserError, match="at most 0 would"):
        ensure_fits(5.0)
    with pytest.raises(UserError, match=r"1 x \(1 CPU, 0\.5 GPU\)"):
        ensure_fits(1.0, 0.5)


def test_processes_that_only_fit_a_node_each_are_counted_by_node(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}] * 2
    nodes.append({"Alive": False, "Resources": {"CPU": 64.0}})
    monkeypatch.setattr(clusters.ray, "nodes", lambda: nodes)
    assert ensure_fits(2.0) == 2
    with pytest.raises(UserError, match="at most 0"):
        ensure_fits(4.0)


def test_an_address_without_a_cluster_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(clusters.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: no Ray cluster"), connect("127.0.0.1:1"):
        pass
    assert time.monotonic() - began < 15
    with pytest.raises(UserError, match="leave --num-cpus out"), connect("127.0.0.1:1", 4):
        pass


def test_the_token_of_a_local_ray_is_the_users_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    file = tmp_path / ".ray" / "auth_token"
    clusters._own_token()
    token = file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    clusters._own_token()
    assert file.read_text() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
