"""A run that begins where another ended goes on as that one would have."""

import dataclasses

import pytest
import torch

from sbir_ray import checkpoint
from sbir_ray.errors import UserError
from sbir_ray.runs import weights_digest
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from tests.tiny import retrieval_config, tiny_pairs


def weights(run):
    return checkpoint.load(run).model


def test_phases_of_one_training_equal_it_and_may_differ_in_settings(tmp_path):
    pairs = {"pairs": str(tiny_pairs(tmp_path / "pairs"))}

    def train(name, steps, begin="", **changes):
        config = retrieval_config(steps)
        optim = dataclasses.replace(config.optim, schedule="constant", **changes)
        inputs = {**pairs, "begin": str(tmp_path / begin)} if begin else pairs
        job = Job(
            "retrieval", str(tmp_path / name), dataclasses.replace(config, optim=optim), inputs
        )
        fit(job, Ranks(), torch.device("cpu"), lambda line: None)
        return weights(tmp_path / name)

    whole = train("whole", 4)
    first = train("first", 2)
    second = train("second", 4, begin="first")
    assert all(torch.equal(second[name], value) for name, value in whole.items())
    assert any(not torch.equal(second[name], value) for name, value in first.items())
    slower = train("slower", 4, begin="first", lr=1e-5)
    assert any(not torch.equal(slower[name], value) for name, value in whole.items())
    # Where it began is left as it was, and a run that is done is not begun again.
    assert all(
        torch.equal(value, weights(tmp_path / "first")[name]) for name, value in first.items()
    )
    with pytest.raises(UserError, match="pairs: has no checkpoint to begin with"):
        train("third", 4, begin="pairs")
    # A run is told from others, and from itself before, by its weights.
    marks = [weights_digest(tmp_path / name) for name in ("whole", "first", "second", "slower")]
    assert marks[0] == marks[2]
    assert len(set(marks)) == 3
    # One that is as long already would leave nothing to train.
    with pytest.raises(UserError, match=r"first: is at step 2, and optim\.steps=2, which"):
        train("fourth", 2, begin="first")
    assert checkpoint.load(tmp_path / "fourth") is None
