"""What travels to a cluster, what a job is called, and what is refused before anything is sent."""

import json

import pytest
from click.testing import CliRunner

from sbir_ray import strict
from sbir_ray.cli import cli
from sbir_ray.errors import UserError
from sbir_ray.runlog import versions
from sbir_ray.submit import (
    PINNED,
    SubmitConfig,
    job_name,
    refuse_other_versions,
    runtime_env,
    stage,
)
from sbir_ray.submit_cli import read_command

JOINT = ("train", "joint", "--pairs", "s3://b/pairs", "--photos", "s3://b/photos")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder: settings, code, data of all kinds, and a run."""
    texts = {
        "joint.toml": "seed = 1\n",
        "code/extra.py": "x = 1\n",
        "code/__pycache__/extra.pyc": "x",
        ".git/HEAD": "x",
        "chairs/pairs.json": "{}",
        "chairs/notes.txt": "x",
        "runs/joint/run.json": "{}",
        "runs/joint/metrics.jsonl": "x",
        "photo.png": "x",
        "weights/a.safetensors": "x",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_and_code_travel_and_data_and_runs_do_not(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("staged")
    size = stage(folder, target, SubmitConfig())
    found = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert found == ["code/extra.py", "joint.toml"]
    assert size == len("seed = 1\n") + len("x = 1\n")


def test_too_much_is_refused_by_its_largest_files(folder, tmp_path_factory):
    (folder / "big.bin").write_bytes(bytes(3 << 20))
    with pytest.raises(UserError, match=r"3\.0 MiB would travel.*big\.bin \(3\.0 MiB\)"):
        stage(folder, tmp_path_factory.mktemp("staged"), SubmitConfig(max_mebibytes=2))
    size = stage(folder, tmp_path_factory.mktemp("s"), SubmitConfig(exclude=("big.*", ".git")))
    assert size < 1 << 20
    with pytest.raises(UserError, match="no such folder"):
        stage(folder / "nowhere", folder, SubmitConfig())


def name_of(*words, config=SubmitConfig()):  # noqa: B008
    return job_name(read_command(cli, words, config))


def test_a_job_is_named_by_its_command_and_settings_however_they_are_written(folder):
    out = ("--out", "s3://b/joint")
    name = name_of(*JOINT, *out, "--config", "joint.toml")
    assert name.startswith("sbir-ray-")
    assert name == name_of(*JOINT[:2], *out, *JOINT[2:], "--config=joint.toml", "--workers", "1")
    others = [
        name_of(*JOINT, *out),
        name_of(*JOINT, *out, "--config", "joint.toml", "--seed", "2"),
        name_of(*JOINT, "--out", "s3://b/other", "--config", "joint.toml"),
    ]
    (folder / "joint.toml").write_text("seed = 3\n")
    others.append(name_of(*JOINT, *out, "--config", "joint.toml"))
    assert len({name, *others}) == 5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*JOINT, "--out", "runs/joint"), "--out runs/joint: is of this machine"),
        ((*JOINT, "--out", "s3://b/j", "--config", "other.toml"), "cannot be read"),
        ((*JOINT, "--out", "s3://b/j", "--config", "/x.toml"), "name it as it lies in"),
        ((*JOINT, "--out", "s3://b/j", "--photso", "x"), "No such option"),
        (("trian", "joint"), "No such command"),
    ],
)
def test_what_could_only_fail_there_is_refused_here(folder, words, line):
    result = CliRunner().invoke(cli, ["submit", "--address", "http://127.0.0.1:9", "--", *words])
    assert result.exit_code != 0
    assert line in f"{result.output} {result.exception}"


def test_the_environment_is_pinned_and_holds_no_credentials(folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    made = runtime_env(folder, SubmitConfig())
    assert "hidden" not in json.dumps(made)
    assert made["env_vars"]["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"
    assert json.loads(made["env_vars"][PINNED]) == versions()
    assert "pip" not in made
    installed = runtime_env(folder, SubmitConfig(install=True))["pip"]
    assert f"torch=={versions()['torch']}" in installed
    assert not any(line.startswith("ray==") for line in installed)  # the cluster's own


def test_a_job_on_other_versions_is_refused():
    refuse_other_versions({})
    refuse_other_versions({PINNED: json.dumps(versions())})
    odd = {**versions(), "torch": "1.0", "python": "3.9.1"}
    with pytest.raises(UserError, match=r"python 3\.9\.1, here 3.*; torch 1\.0, here 2"):
        refuse_other_versions({PINNED: json.dumps(odd)})


def test_settings_of_submission_are_read_strictly(tmp_path):
    (tmp_path / "submit.toml").write_text('address = "http://127.0.0.1:1"\nexclude = ["data"]\n')
    config = strict.load(SubmitConfig, tmp_path / "submit.toml", ["max_mebibytes=3"])
    assert config == SubmitConfig("http://127.0.0.1:1", exclude=("data",), max_mebibytes=3)
    with pytest.raises(UserError, match="max_mebibytes"):
        strict.load(SubmitConfig, None, ["max_megabytes=3"])


def test_a_cluster_that_is_not_there_is_one_line(folder):
    words = [*JOINT, "--out", "s3://b/joint"]
    result = CliRunner().invoke(cli, ["submit", "--address", "http://127.0.0.1:9", "--", *words])
    assert isinstance(result.exception, UserError)
    assert "http://127.0.0.1:9: no job server can be reached there" in str(result.exception)
