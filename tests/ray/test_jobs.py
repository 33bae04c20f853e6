"""A command as a job of a Ray that was really started: followed, stopped, resumed, refused.

The Ray is in a network of its own, of the loopback interface alone: its own ports are open to all
interfaces that there are.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from sbir_ray import checkpoint
from tests.faults.kit import assert_ledger
from tests.live_joint import CONFIG, live_joint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 48
LIMIT = 120
"""Seconds for any one command."""


@contextmanager
def own_network():
    """What a command begins with so that it runs in a network of the loopback interface alone."""
    hold = "ip link set lo up && echo up && exec sleep infinity"
    words = ["unshare", "--map-root-user", "--net", "sh", "-c", hold]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            if holder.stdout.readline() != b"up\n":
                pytest.skip(f"no network of one's own here: {holder.stderr.read().decode()}")
            yield [
                *("nsenter", "--target", str(holder.pid), "--user", "--preserve-credentials"),
                *("--net", "--"),
            ]
        finally:
            holder.kill()


@contextmanager
def running(words, environment, log):
    """A process that is ended with the block, and waited for."""
    with open(log, "wb") as stream:
        process = subprocess.Popen(words, env=environment, stdout=stream, stderr=stream)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=LIMIT)


def wait_for(condition, *processes):
    """Until it holds; the processes have to live meanwhile."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Runs the program where a Ray with a token answers on the ports of the pages."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray Data's own actors stay, and the head would wait for them when it ends.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    # Ray's sockets lie there, and their names have to be short.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    start = ["ray", "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={temporary}"]
    start += ["--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    log = folder / "head.log"

    def command(*words, **changes):
        """The words of a command there, its environment, and where it runs."""
        program = [sys.executable, "-m", "sbir_ray.cli", *map(str, words)]
        return {"args": [*inside, *program], "env": {**environment, **changes}, "cwd": folder}

    try:
        with own_network() as inside, running([*inside, *start], environment, log) as process:

            def answers():
                ask = "import socket; socket.create_connection(('127.0.0.1', 8265))"
                asked = [*inside, sys.executable, "-c", ask]
                return not subprocess.run(asked, capture_output=True).returncode

            wait_for(answers, process)
            yield command
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def joint(head, tmp_path_factory):
    """The words of a joint training of some seconds, and its run folder."""
    folder = tmp_path_factory.mktemp("joint")
    words = live_joint(folder, head("doctor")["cwd"], STEPS, 60.0)
    run = folder / "joint"
    words += ["--config", CONFIG, "--out", run]
    return [*words, "--workers", "1", "--cpus-per-worker", "1", "--actors", "1"], run


def submit(head, *words, **changes):
    """Exit code, standard output and standard error of the command."""
    done = subprocess.run(
        **head("submit", *words, **changes), capture_output=True, text=True, timeout=LIMIT
    )
    return done.returncode, done.stdout, done.stderr


def test_a_job_is_followed_stopped_and_resumed_by_the_command_it_was_submitted_with(head, joint):
    words, run = joint
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    with subprocess.Popen(**head("submit", "--", *words), **pipes) as first:
        wait_for(lambda: checkpoint.listed(run), first)
        code, _, told = submit(head, "--stop", "--", *words)
        out, errors = first.communicate(timeout=LIMIT)
    assert code == 0, told
    assert "-1: stopped" in told
    assert first.returncode != 0
    assert "-1: submitted with" in errors
    assert "stopped after step" in out
    reached = max(entry.step for entry in checkpoint.listed(run))
    assert reached < STEPS

    code, _, told = submit(head, "--", *words)
    assert code == 2
    assert "-1: stopped before" in told
    assert "--resume" in told

    with subprocess.Popen(**head("submit", "--resume", "--", *words), **pipes) as second:
        wait_for((run / "messages.log").exists, second)  # that it was resumed
        code, log, told = submit(head, "--", *words)
        out, errors = second.communicate(timeout=LIMIT)
    assert second.returncode == code == 0, errors
    assert "-2: submitted with" in errors
    assert "-2: runs already" in told
    assert out == log
    assert f"resumed at step {reached}" in out
    assert f"{run}: trained." in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [*range(1, STEPS + 1)]
    assert_ledger(run)

    code, out, told = submit(head, "--", *words)
    assert (code, out) == (0, "")
    assert "-2: finished before, nothing to do" in told


def test_the_exit_code_of_a_job_and_its_reason_are_passed_on(head, tmp_path):
    words = ["train", "retrieval", "--pairs", tmp_path / "none", "--out", tmp_path / "run"]
    code, out, told = submit(head, "--", *words)
    assert code == 2
    assert f"{tmp_path}/none: does not exist" in out
    assert "-1: failed" in told


def test_another_token_is_refused(head, tmp_path):
    words = ["train", "retrieval", "--pairs", tmp_path / "none", "--out", tmp_path / "run"]
    other = tmp_path / "token"
    other.write_text(secrets.token_hex(32))
    code, out, told = submit(head, "--", *words, RAY_AUTH_TOKEN_PATH=str(other))
    assert (code, out) == (2, "")
    assert "http://127.0.0.1:8265: no job server can be reached there" in told
