"""Checkpoints listed, verified and exported; ONNX computes what PyTorch computes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from sbir_ray import checkpoint
from sbir_ray.cli import cli
from sbir_ray.config import SaveConfig
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.export import export
from sbir_ray.runs import load_retrieval
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from tests.tiny import retrieval_config, tiny_pairs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    pairs = {"pairs": str(tiny_pairs(folder / "pairs"))}
    save = SaveConfig(log_every=1, checkpoint_every=1, evaluate_every=1, keep=3)
    job = Job("retrieval", str(folder / "run"), retrieval_config(save=save), pairs)
    fit(job, Ranks(), torch.device("cpu"), lambda _: None)
    return folder / "run"


def call(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    return done.output, done.exception


def test_checkpoints_are_listed_with_their_score_and_verified(run):
    output, _ = call("checkpoint", "ls", run, "--json")
    rows = json.loads(output)["checkpoints"]
    assert [row["step"] for row in rows][:3] == [4, 3, 2]
    assert all(len(row["score"]) == 2 for row in rows)
    scores = [row["score"] for row in rows]
    assert [row["best"] for row in rows].index(True) == len(scores) - 1 - scores[::-1].index(
        max(scores)
    )
    output, error = call("checkpoint", "verify", run)
    assert error is None
    assert output.count("whole") == len(rows)


def test_a_damaged_one_is_named_and_ends_in_an_error(run, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    output, error = call("checkpoint", "verify", copy)
    assert "step-00000003/state.json: its sha256 is not the manifest's" in output
    assert isinstance(error, DamagedError)
    _, error = call("checkpoint", "export", copy, "--which", "3", "--out", tmp_path / "out")
    assert isinstance(error, DamagedError)
    assert not (tmp_path / "out").exists()


def test_an_export_holds_the_weights_their_settings_and_onnx_that_agrees(run, tmp_path):
    output, error = call(
        "checkpoint", "export", run, "--which", "newest", "--onnx", "--out", tmp_path / "model"
    )
    assert error is None, output
    header = json.loads((tmp_path / "model" / "export.json").read_text())
    model = load_retrieval(run).model
    tensors = load_file(tmp_path / "model" / "retrieval.safetensors")
    assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
    assert header["networks"]["retrieval"]["settings"]["image_size"] == 64
    session = onnxruntime.InferenceSession(tmp_path / "model" / header["onnx"]["file"])
    rng = np.random.default_rng(5)
    photos = rng.integers(0, 256, (4, 3, 64, 64), np.uint8)
    ink = rng.integers(0, 2, (2, 64, 64), np.uint8) * 255
    paper = np.repeat(255 - ink[:, None], 3, axis=1)
    with torch.no_grad():
        for pictures, expected in (
            (photos, model.embed_photos(torch.from_numpy(photos))),
            (paper, model.embed_sketches(torch.from_numpy(ink))),
        ):
            (found,) = session.run(None, {"picture": pictures})
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_the_best_is_exported_by_name_and_what_is_not_there_is_refused(run, tmp_path):
    best = checkpoint.read(checkpoint.best(run))
    assert export(run, tmp_path / "best", "best", onnx=False)["step"] == best.step
    saved = load_file(tmp_path / "best" / "retrieval.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in best.model.items())
    with pytest.raises(UserError, match="has no checkpoint 99; it has best, newest and the steps"):
        export(run, tmp_path / "none", "99", onnx=False)
    with pytest.raises(UserError, match="exists already"):
        export(run, tmp_path / "best", "best", onnx=False)


def test_what_decides_the_best_is_never_the_test_split(run, tmp_path, monkeypatch):
    from sbir_ray.data.pairs import PairSet

    asked = []
    load = PairSet.load.__func__

    def told(cls, folder, split, size):
        asked.append(split)
        return load(cls, folder, split, size)

    monkeypatch.setattr(PairSet, "load", classmethod(told))
    pairs = {"pairs": json.loads((run / "run.json").read_text())["inputs"]["pairs"]}
    save = SaveConfig(log_every=1, checkpoint_every=1, evaluate_every=1)
    job = Job("retrieval", str(tmp_path / "run"), retrieval_config(2, save=save), pairs)
    fit(job, Ranks(), torch.device("cpu"), lambda _: None)
    assert set(asked) == {"train", "val"}
