"""Ray Train runs the jobs, with the result of one process, and hands errors back in one line."""

import dataclasses
import json
from pathlib import Path

import pytest

from sbir_ray import checkpoint
from sbir_ray.cli import cli
from sbir_ray.errors import UserError
from sbir_ray.stream.pseudo_store import HEADER, read_header
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from tests.tiny import retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return str(tiny_pairs(tmp_path_factory.mktemp("tiny") / "pairs"))


def test_two_ray_workers_equal_this_process(tmp_path, pairs, cluster):
    def jobs(folder):
        config = retrieval_config()
        return [
            Job(
                "retrieval",
                str(folder / name),
                dataclasses.replace(config, seed=seed),
                {"pairs": pairs},
            )
            for seed, name in enumerate("ab")
        ]

    here = train(jobs(tmp_path / "here"), workers=0)
    there = train(jobs(tmp_path / "there"), workers=2)
    assert there[0].keys() == here[0].keys()
    for name in "ab":
        one, two = (
            [
                json.loads(line)
                for line in (tmp_path / place / name / "metrics.jsonl").read_text().splitlines()
            ]
            for place in ("here", "there")
        )
        assert [line["step"] for line in two] == [line["step"] for line in one]
        for a, b in zip(one, two, strict=True):
            if a["kind"] == "step":
                # Adam makes much of rounding where a gradient is almost 0, hence the tolerance.
                assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
        assert checkpoint.load(tmp_path / "there" / name).step == 4
    record = json.loads((tmp_path / "there" / "a" / "run.json").read_text())
    assert record["status"] == "done"
    assert not (tmp_path / "there" / "a" / "ray").exists()


def test_an_error_of_a_worker_comes_back_as_one_line(tmp_path, pairs, cluster):
    config = retrieval_config()
    odd = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=5))
    job = Job("retrieval", str(tmp_path / "a"), odd, {"pairs": pairs})
    with pytest.raises(UserError, match=r"^optim\.batch_size: 5 rows cannot be divided among 2"):
        train([job], workers=2)
    assert not list(Path(tmp_path / "a").glob("checkpoints/*"))


def test_more_workers_than_fit_are_refused_by_name(tmp_path, pairs, cluster):
    job = Job("retrieval", str(tmp_path / "a"), retrieval_config(), {"pairs": pairs})
    with pytest.raises(UserError, match="--workers 400 x"):
        train([job], workers=400)


def test_photos_alone_are_traced_and_trained_on(tmp_path, pairs, cluster, capsys):
    shop = tiny_store(tmp_path / "shop", 6)
    sizes = ["optim.steps=2", "optim.batch_size=4", "negatives=2"]
    sizes += ["model.weights=none", "model.image_size=64", "model.grid=2"]
    out = tmp_path / "run"
    command = ["train", "semi", "--pairs", pairs, "--photos", str(shop), "--workers", "0"]
    command += [word for setting in sizes for word in ("--set", setting)] + ["--out", str(out)]
    cli(command, standalone_mode=False)
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done"
    assert record["inputs"]["pseudo"] == str(out / "traced")
    assert record["inputs"]["negatives"] == str(shop)
    assert read_header(out / "traced")["sketcher"] == "contours"
    drawn = (out / "traced" / HEADER).read_bytes()
    capsys.readouterr()
    cli(command, standalone_mode=False)
    assert "nothing to do" in capsys.readouterr().err
    assert (out / "traced" / HEADER).read_bytes() == drawn
    with pytest.raises(UserError, match="--photos: stands for --pseudo"):
        cli([*command, "--pseudo", str(out / "traced")], standalone_mode=False)
