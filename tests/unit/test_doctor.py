"""What the doctor concludes from what nodes report."""

import contextlib
from pathlib import Path

import pytest
import ray
from click.testing import CliRunner

from sbir_ray import doctor
from sbir_ray.cli import cli
from sbir_ray.doctor import (
    Finding,
    check_gpus,
    check_resources,
    check_room,
    check_storage,
    check_versions,
    ready,
)
from sbir_ray.errors import UserError
from sbir_ray.runlog import versions
from sbir_ray.stream import cluster
from sbir_ray.stream.fit import Group, Node, request_of
from tests.tiny import tiny_pairs
from tests.tiny_store import tiny_store

GIB = 1 << 30
ELSEWHERE = "is not the same place there"


def report(**changes):
    return {
        "versions": versions(),
        "storage": {"s3://b/runs": ""},
        "gpus": 0,
        "gpu_fault": "",
        "has_gpus": 0.0,
        "shm": 8 * GIB,
        "object_store": 4.0 * GIB,
        "disk": 100 * GIB,
        **changes,
    }


def request(gpus=0.0):
    return request_of(Group("--workers", 2, 1.0, gpus))


def test_a_sound_cluster_has_nothing_to_change():
    reports = {"a": report(), "b": report()}
    nodes = [Node(2), Node(2)]
    findings = [
        check_resources(nodes, request()),
        *check_storage(reports, {"s3://b/runs": "token"}),
        check_versions(reports),
        check_gpus(reports, nodes, request()),
        *check_room(reports),
    ]
    assert [finding.ok for finding in findings] == [True] * 6
    assert findings[1].line().startswith("ok       storage: s3://b/runs is read and written from 2")


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (
            lambda r: check_storage(
                {
                    "a": report(),
                    "b": report(storage={"s3://b/runs": "is not the same place there"}),
                },
                {"s3://b/runs": "token"},
            )[0],
            ["from 1 of 2", "b: is not the same place there", "name storage that all nodes share"],
        ),
        (
            lambda r: check_versions({"a": report(), "b": {"fault": "ModuleNotFoundError: x"}}),
            ["b: ModuleNotFoundError: x", "one image for all"],
        ),
        (
            lambda r: check_versions({"a": report(versions={**versions(), "ray": "2.1.0"})}),
            ["a: ray 2.1.0, here 2.", "install the same versions"],
        ),
        (
            lambda r: check_gpus({"a": report(has_gpus=1.0)}, [Node(2, 1)], request(1)),
            ["a: Ray counts 1, PyTorch sees none", "install a build"],
        ),
        (
            lambda r: check_gpus(
                {"a": report(has_gpus=1.0, gpus=1, gpu_fault="no kernel image")},
                [Node(2, 1)],
                request(1),
            ),
            ["PyTorch cannot use them (no kernel image)"],
        ),
        (
            lambda r: check_gpus({"a": report()}, [Node(2)], request(1)),
            ["no node has a GPU", "leave out --gpu"],
        ),
        (
            lambda r: check_room({"a": report(shm=GIB // 16)})[0],
            ["a: 0.1 GiB for an object store of 4.0 GiB", "--shm-size"],
        ),
        (
            lambda r: check_room({"a": report(disk=GIB)})[1],
            ["a: 1.0 GiB free", "free 5.0 GiB there"],
        ),
    ],
)
def test_what_is_wrong_is_told_by_node_with_what_to_do(finding, words):
    found = finding(report)
    assert not found.ok
    line = found.line()
    assert line.startswith("problem ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_patch_release_of_python_and_another_build_of_torch_are_the_same():
    own = versions()
    near = {
        **own,
        "python": own["python"].rpartition(".")[0] + ".99",
        "torch": own["torch"].partition("+")[0] + "+cu999",
    }
    assert check_versions({"a": report(versions=near)}).ok


def test_a_node_leaves_nothing_and_tells_a_place_that_is_another_one_there(tmp_path):
    (tmp_path / "token").write_text("token")
    assert doctor._seen(str(tmp_path), "token") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["token"]
    assert doctor._seen(str(tmp_path / "elsewhere"), "token") == "is not the same place there"
    (tmp_path / "file").write_text("")
    assert doctor._seen(str(tmp_path / "file"), "token").startswith("is not the same")


SPACE = Path(__file__).parents[2] / "tune" / "loss_weights.toml"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "retrieval", "--pairs", "pairs", "--workers", "400"], "--workers 400 x"),
        (["sketch", "--sketcher", "edges", "--photos", "photos", "--actors", "400"], "--actors"),
        (
            ["tune", str(SPACE), "--pairs", "pairs", "--photos", "photos", "--parallel", "400"],
            "--parallel 400 x --workers 1 x (1 CPU, 0 GPU) and 0.1 CPU for Ray Tune need 440 CPU",
        ),
    ],
)
def test_what_can_never_fit_is_refused_before_ray_is_started(tmp_path, monkeypatch, words, line):
    tiny_pairs(tmp_path / "pairs")
    tiny_store(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    result = CliRunner().invoke(cli, [*words, "--out", "out"])
    assert isinstance(result.exception, UserError), result.output
    assert line in str(result.exception)
    assert "what would fit: " in str(result.exception)


@pytest.fixture
def started(monkeypatch):
    """No Ray is up, and none is started; what is found there is set."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    looks = []

    def found(*findings):
        def examine(request, storage, by_node):
            looks.append((list(storage), by_node))
            return list(findings)

        monkeypatch.setattr(doctor, "examine", examine)
        return looks

    return found


def test_nothing_starts_that_would_fail_and_all_that_has_to_be_changed_is_told(started):
    looks = started(
        Finding("versions", True, "the same"),
        Finding("storage", False, "/a is read from 1 of 2 node(s)", "name another"),
        Finding("gpus", False, "no node has a GPU", "leave out --gpu"),
    )
    line = r"^storage: /a is read .*; name another; and gpus: no node has a GPU; leave out --gpu$"
    with pytest.raises(UserError, match=line), ready(request(), [Path("/a")], "head:6379"):
        pytest.fail("it ran")
    assert looks == [([Path("/a")], True)]


def test_what_only_slows_a_run_is_told_and_it_runs(started, capsys):
    looks = started(*check_room({"a": report(shm=GIB // 16, disk=GIB)}))
    ran = False
    with ready(request(), [Path("/a")]):
        ran = True
    assert ran
    assert looks == [([Path("/a")], False)]
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in told] == [["problem", "/dev/shm:"], ["problem", "disk:"]]
