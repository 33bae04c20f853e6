"""Spaces: what a sweep may vary, refused by name where it cannot be."""

from pathlib import Path

import numpy as np
import pytest

from sbir_ray.config import RetrievalTraining
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.strict import load, to_toml
from sbir_ray.tuning.space import Knob, defaults, read_space, with_knobs

SHIPPED = sorted((Path(__file__).parents[2] / "tune").glob("*.toml"))


def space(tmp_path, text, trains='trains = "semi"'):
    file = tmp_path / "mine.toml"
    file.write_text(f"{trains}\n{text}\n")
    return read_space(file)


def refused(tmp_path, text, trains='trains = "semi"'):
    with pytest.raises(UserError) as error:
        space(tmp_path, text, trains)
    return str(error.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_spaces_are_whole_and_explained(file):
    found = read_space(file)
    assert found.knobs
    text = file.read_text()
    for knob in found.knobs:
        head, _, _ = text.partition(f'[knob."{knob.name}"]')
        assert head.rstrip().splitlines()[-1].startswith("# ")  # why this range
        ends = knob.choices or (knob.low, knob.high)
        for end in ends:
            value = int(end) if knob.whole else end
            with_knobs(found.training(), {knob.name: value})
    base = found.training()
    assert set(defaults(base, found.knobs)) == {knob.name for knob in found.knobs}


def test_knobs_are_read_with_the_types_of_their_settings(tmp_path):
    found = space(
        tmp_path,
        '[knob."loss.temperature"]\nrange = [0.03, 1]\nscale = "log"\n'
        "[knob.filters.min_points]\nrange = [4, 24]\n"
        "[knob.loss.certainty]\nchoices = ['raw', 'none']\n"
        '[knob."filters.max_rank"]\nchoices = [0, 20]\n',
    )
    assert found.name == "mine"
    assert found.knobs == (
        Knob(name="loss.temperature", low=0.03, high=1.0, scale="log"),
        Knob(name="filters.min_points", low=4, high=24, whole=True),
        Knob(name="loss.certainty", choices=("raw", "none")),
        Knob(name="filters.max_rank", choices=(0, 20)),
    )


def test_what_cannot_be_varied_is_refused_with_what_to_write(tmp_path):
    knob = '[knob."loss.temprature"]\nrange = [0.1, 1]'
    assert refused(tmp_path, knob) == (
        "mine.toml: loss.temprature: unknown setting loss.temprature; "
        "did you mean loss.temperature?"
    )
    assert "did you mean policy.weight?" in refused(
        tmp_path, "[knob.'policy.weigth']\nrange = [0.1, 1]", 'trains = "joint"'
    )
    assert "set it to one of semi, joint" in refused(tmp_path, knob, 'trains = "retrieval"')
    assert "unknown rang; a knob has" in refused(tmp_path, "[knob.seed2]\nrang = [1, 2]")
    assert "other seeds at its end" in refused(tmp_path, "[knob.seed]\nrange = [0, 9]")
    assert "is a table" in refused(tmp_path, "[knob.'loss']\nrange = [0, 9]")
    assert "range or choices" in refused(tmp_path, "knob = {pseudo_share = 3}")
    for text, told in (
        ("range = [1, 0.1]", "is empty"),
        ("range = [0, 1]\nscale = 'log'", "begins above 0"),
        ("range = [0.1, 1]\nscale = 'Log'", "scale is linear or log"),
        ("range = [0.1]", "two numbers"),
        ("range = [0.1, 1]\nchoices = [1, 2]", "range = [low, high], or choices"),
        ("choices = [1, 1.0]", "comes twice"),
        ("choices = [1]", "two or more"),
        ("choices = ['a', 'b']", "is not of type float"),
        ("range = [-1, 1]", "is less than 0"),
    ):
        assert told in refused(tmp_path, f'[knob."loss.pseudo_weight"]\n{text}'), text
    assert "no knobs" in refused(tmp_path, "")
    assert "unknown epochs" in refused(tmp_path, "epochs = 3")


def test_values_stay_in_their_range_and_are_even_on_its_scale():
    rng = np.random.default_rng(0)
    log = Knob(name="loss.temperature", low=0.01, high=1.0, scale="log")
    drawn = np.array([log.draw(rng) for _ in range(2000)])
    assert drawn.min() >= 0.01
    assert drawn.max() <= 1
    assert abs(np.mean(drawn < 0.1) - 0.5) < 0.05
    whole = Knob(name="filters.min_points", low=4, high=8, whole=True)
    assert {whole.draw(rng) for _ in range(200)} == {4, 5, 6, 7, 8}
    choice = Knob(name="loss.certainty", choices=("raw", "none"))
    assert {choice.draw(rng) for _ in range(50)} == {"raw", "none"}
    assert [log.place(v) for v in (0.001, 0.01, 0.1, 1.0, 7.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert [choice.place(v) for v in ("raw", "none", "normalised")] == [0, 1, 0]
    assert [log.holds(v) for v in (0.01, 0.5, 2.0, "raw")] == [True, True, False, False]


def test_turned_knobs_survive_the_file_that_train_takes(tmp_path):
    knobs = {
        "loss.temperature": 0.0712345678901234,
        "loss.certainty": "none",
        "filters.min_points": 9,
        "filters.min_certainty": 1e-05,
        "filters.require_end": True,
    }
    turned = with_knobs(RetrievalTraining(seed=3), knobs)
    assert turned.filters.min_points == 9
    assert turned.seed == 3
    file = tmp_path / "best.toml"
    file.write_text(to_toml(turned))
    assert load(RetrievalTraining, file) == turned
    joint = with_knobs(JointTraining(), {"policy.weight": 0.3, "retrieval.loss.margin": 0.2})
    file.write_text(to_toml(joint))
    assert load(JointTraining, file) == joint
    with pytest.raises(UserError, match=r"retrieval\.filters: are those of a PSEUDO folder"):
        with_knobs(JointTraining(), {"retrieval.filters.min_points": 9})
