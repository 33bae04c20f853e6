"""A sweep goes on where it was killed, trains no finished trial again, and survives a bad one."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sbir_ray.config import FilterConfig, SketchConfig
from sbir_ray.errors import UserError
from sbir_ray.runlog import Progress
from sbir_ray.stream.sketching import sketch
from sbir_ray.strict import load, to_toml
from sbir_ray.tuning.request import Effort, Request
from sbir_ray.tuning.run import run_sweep
from sbir_ray.tuning.space import read_space
from tests.tiny import retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

SPACE = """
trains = "semi"
[knob."loss.pseudo_weight"]
range = [0.1, 3.0]
scale = "log"
[knob."filters.min_points"]
choices = [2, 200]
"""


class KilledError(Exception):
    pass


class Line(Progress):
    """Ends the sweep when one trial is at its end."""

    def update(self, done, total=None, note=""):
        super().update(done, total, note)
        if self.label == "tune" and ", best " in note:
            raise KilledError


def quiet(title):
    return Progress(title, file=io.StringIO(), every=0)


def killing(title):
    return Line(title, file=io.StringIO(), every=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory, cluster):
    """Photos 0-7 train, 8-11 val, 12 test; traced photos; a space in which half of the settings
    leave no pseudo pair."""
    folder = tmp_path_factory.mktemp("tune")
    tiny_pairs(folder / "pairs", train=8, val=4, test=1, hands=1)
    photos = tiny_store(folder / "photos", 8)
    settings = SketchConfig(filters=FilterConfig(min_points=2))
    sketch(photos, folder / "pseudo", "contours", settings, progress=quiet)
    (folder / "space.toml").write_text(SPACE)
    (folder / "base.toml").write_text(to_toml(retrieval_config(4)))
    return folder


def trained(out):
    """When each file of weights was written, by run."""
    files = (out / "trials").rglob("model.safetensors")
    return {str(f.relative_to(out / "trials")): f.stat().st_mtime_ns for f in files}


def fates(out):
    found = {}
    for file in sorted((out / "trials").glob("*/trial.json")):
        values = json.loads(file.read_text())
        found[values["number"]] = values
    return found


def killed_at_the_first_finished_trial(words, out):
    """Run the command until one trial is at its end; then kill it and all that it started."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    with open(out.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sbir_ray.cli", *words],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if finished(out):
                    break
                time.sleep(0.2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL, out.with_suffix(".log").read_text()


def request_of(data, **changes):
    space = read_space(data / "space.toml")
    return Request(
        **{
            "space": space,
            "file": data / "space.toml",
            "pairs": data / "pairs",
            "pseudo": data / "pseudo",
            "config": load(space.training, data / "base.toml"),
            "searcher": "random",
            "scheduler": "none",
            **changes,
        }
    )


def finished(out):
    return {number: one for number, one in fates(out).items() if one["status"] == "done"}


def weights_of(numbers, out):
    return {name: when for name, when in trained(out).items() if int(name[:3]) in numbers}


def gone_on(data, out):
    """Finish a sweep of three trials that was ended after the first; what it found."""
    ended = finished(out)
    assert ended
    assert len(ended) < 3
    before = weights_of(ended, out)
    assert before
    assert not (out / "tune.json").exists()
    request, effort = request_of(data), Effort(trials=3, seeds=1, parallel=2, retries=1)
    found = run_sweep(request, effort, out, progress=quiet)
    assert weights_of(ended, out) == before
    told = {one["number"]: one for one in found["trials"]}
    assert list(told) == [0, 1, 2]
    for number, one in ended.items():
        assert told[number]["knobs"] == one["knobs"]
        assert told[number]["evaluations"] == one["evaluations"]
    return found


def test_a_sweep_leaves_what_train_takes(data, tmp_path, cluster):
    out = tmp_path / "sweep"
    found = run_sweep(request_of(data), Effort(trials=2, seeds=0, parallel=2), out, progress=quiet)
    assert found["trials"][0]["status"] == "done"
    assert found["confirmed"]["status"] in ("skipped", "default")
    assert (out / "report.html").stat().st_size > 10_000
    best = load(request_of(data).space.training, out / "best.toml")
    assert best.loss.pseudo_weight == found["best"]["knobs"].get("loss.pseudo_weight", 1.0)
    assert not (out / "ray").exists()


@pytest.mark.slow
def test_an_ended_sweep_goes_on_and_trains_no_finished_trial_again(data, tmp_path, cluster):
    out = tmp_path / "sweep"
    effort = Effort(trials=3, seeds=1, parallel=2, retries=1)
    with pytest.raises(KilledError):
        run_sweep(request_of(data), effort, out, progress=killing)
    found = gone_on(data, out)
    told = {one["number"]: one for one in found["trials"]}
    # A setting that leaves no pair is told, once, and is no reason for another try.
    for one in told.values():
        if one["knobs"].get("filters.min_points") == 200:
            assert one["status"] == "refused"
            (reason,) = one["failures"]
            assert "no pseudo pair was kept" in reason
        else:
            assert one["status"] == "done"
            assert [line["step"] for line in one["evaluations"]] == [1, 2, 3, 4]
            assert 0 <= one["accuracy"]["acc@1"]["mean"] <= 1
    assert {one["status"] for one in told.values()} == {"done", "refused"}
    assert found["confirmed"]["status"] in ("done", "default")
    assert (out / "report.html").stat().st_size > 10_000
    best = load(request_of(data).space.training, out / "best.toml")
    knobs = found["best"]["knobs"]
    assert best.loss.pseudo_weight == knobs.get("loss.pseudo_weight", 1.0)
    assert not (out / "ray").exists()

    # The same again does nothing; another request is refused.
    after = trained(out)
    again = run_sweep(request_of(data), effort, out, progress=quiet)
    assert trained(out) == after
    assert again["trials"] == found["trials"]
    other = load(request_of(data).space.training, data / "base.toml", ["optim.lr=0.5"])
    with pytest.raises(UserError, match=r"holds a sweep with another optim\.lr; choose"):
        run_sweep(request_of(data, config=other), effort, out, progress=quiet)


@pytest.mark.slow
def test_a_sweep_whose_processes_were_killed_goes_on(data, tmp_path, cluster):
    out = tmp_path / "sweep"
    words = ["tune", str(data / "space.toml"), "--pairs", str(data / "pairs")]
    words += ["--pseudo", str(data / "pseudo"), "--config", str(data / "base.toml")]
    words += ["--searcher", "random", "--scheduler", "none", "--trials", "3", "--seeds", "1"]
    killed_at_the_first_finished_trial([*words, "--parallel", "1", "--out", str(out)], out)
    gone_on(data, out)


@pytest.mark.slow
@pytest.mark.timeout(900)  # sixteen trainings and more, each with a start of its own
def test_a_population_finds_a_schedule_that_trains_again(data, tmp_path, cluster):
    space = tmp_path / "schedule.toml"
    space.write_text('trains = "semi"\n[knob."optim.lr"]\nrange = [1e-5, 1e-2]\nscale = "log"\n')
    found_space = read_space(space)
    config = load(found_space.training, data / "base.toml", ["optim.schedule=constant"])
    request = request_of(data, space=found_space, file=space, config=config, scheduler="pbt")
    out = tmp_path / "sweep"
    found = run_sweep(request, Effort(trials=4, seeds=1, parallel=2), out, progress=quiet)
    assert [one["status"] for one in found["trials"]] == ["done"] * 4
    for one in found["trials"]:
        assert [line["step"] for line in one["evaluations"]] == [1, 2, 3, 4]
    phases = found["best"]["phases"]
    assert phases[-1]["end"] == 4
    changed = [change for one in found["trials"] for change in one["changes"]]
    assert changed  # the worst of four took up the best's network
    assert {change["came_from"] for change in changed} <= {0, 1, 2, 3}
    if len(phases) > 1:
        files = sorted((out / "schedule").glob("*.toml"))
        assert [load(found_space.training, file).optim.steps for file in files] == [
            phase["end"] for phase in phases
        ]
    after = trained(out)
    assert (
        run_sweep(request, Effort(trials=4, seeds=1), out, progress=quiet)["trials"]
        == (found["trials"])
    )
    assert trained(out) == after
