"""A checkpoint is complete or absent, and a damaged one is never used."""

import json
import shutil

import pytest
import torch

from sbir_ray import checkpoint
from sbir_ray.errors import DamagedError, UserError


def _save(run, step, keep=5):
    model = {"w": torch.full((3,), float(step)), "n": torch.tensor(step)}
    return checkpoint.save(run, step, model, {"0.exp_avg": torch.ones(2)}, {"world": 1}, keep)


def test_what_is_saved_comes_back(tmp_path):
    _save(tmp_path, 3)
    _save(tmp_path, 12)
    found = checkpoint.load(tmp_path)
    assert found.step == 12
    assert found.state["world"] == 1
    assert torch.equal(found.model["w"], torch.full((3,), 12.0))
    assert torch.equal(found.optim["0.exp_avg"], torch.ones(2))


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 30, 400):
        _save(tmp_path, step, keep=2)
    names = [f.name for f in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000030", "step-00000400"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.load(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optim.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_newest_one_is_refused_and_the_one_before_used(tmp_path, name, damage):
    _save(tmp_path, 1)
    file = _save(tmp_path, 2) / name
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        file.write_bytes(bytes([data[0] ^ 255]) + data[1:])
    else:
        file.unlink()
    said = []
    assert checkpoint.load(tmp_path, said.append).step == 1
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_nothing_whole_left_is_an_error(tmp_path):
    folder = _save(tmp_path, 1)
    (folder / "state.json").unlink()
    with pytest.raises(DamagedError, match="no whole checkpoint is left"):
        checkpoint.load(tmp_path)


def test_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    folder = _save(tmp_path, 1)
    (folder / "extra").write_text("x")
    with pytest.raises(DamagedError, match="extra"):
        checkpoint.verify(folder)


def test_a_newer_schema_is_refused(tmp_path):
    folder = _save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="newer"):
        checkpoint.load(tmp_path)


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    _save(tmp_path, 1)
    whole = _save(tmp_path, 2)
    shutil.move(whole, whole.with_name(".step-00000002.77"))
    assert checkpoint.load(tmp_path).step == 1


def test_an_optimiser_goes_on_as_if_never_stopped(tmp_path):
    def steps(weights, optimizer, count):
        for i in range(count):
            optimizer.zero_grad()
            ((weights - i) ** 2).sum().backward()
            optimizer.step()

    straight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.AdamW([straight], lr=0.1)
    steps(straight, optimizer, 3)
    saved, values = checkpoint.optim_tensors(optimizer), straight.detach().clone()
    steps(straight, optimizer, 3)
    resumed = torch.nn.Parameter(values)
    again = torch.optim.AdamW([resumed], lr=0.1)
    checkpoint.restore_optim(again, saved)
    steps(resumed, again, 3)
    assert torch.equal(straight, resumed)


def scored(run, step, *score, keep=2):
    model = {"w": torch.zeros(1)}
    checkpoint.save(run, step, model, {}, {}, keep, score=score)


def steps(run):
    return [entry.step for entry in checkpoint.listed(run)]


def test_the_best_by_validation_is_kept_beside_the_newest(tmp_path):
    for step, score in enumerate([(0.2, 0.5), (0.4, 0.1), (0.4, 0.3), (0.4, 0.3), (0.1, 0.9)]):
        scored(tmp_path, step, *score)
    scored(tmp_path, 5)
    assert steps(tmp_path) == [5, 4, 2]
    assert checkpoint.best(tmp_path).name == "step-00000002"
    scored(tmp_path, 6, 0.5, 0.5, keep=1)
    assert steps(tmp_path) == [6]


def test_another_runs_checkpoint_is_refused_by_reason(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(1)}, {}, {}, 5, identity="mine")
    checkpoint.save(tmp_path, 2, {"w": torch.ones(1)}, {}, {}, 5, identity="other")
    said = []
    assert checkpoint.load(tmp_path, said.append, identity="mine").step == 1
    assert "is of another run (digest other, this one's mine)" in said[0]
    folder = tmp_path / "checkpoints"
    (folder / "step-00000001").rename(folder / "step-00000003")
    with pytest.raises(DamagedError, match="its manifest is that of step 1"):
        checkpoint.load(tmp_path, identity="mine")


def test_damaged_later_ones_do_not_push_out_good_ones(tmp_path):
    for step in (1, 2, 3):
        _save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000003" / "state.json").unlink()
    _save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2]
    assert checkpoint.load(tmp_path).step == 2


def test_an_optimisers_state_of_another_network_is_refused():
    weights = torch.nn.Parameter(torch.zeros(4))
    for key in ("1.exp_avg", "0.exp_avg"):
        with pytest.raises(ValueError, match="no parameter of its shape"):
            checkpoint.restore_optim(torch.optim.AdamW([weights]), {key: torch.zeros(3)})
