"""Strict settings: what is unknown, of the wrong type or out of range is refused by name."""

import dataclasses
from pathlib import Path

import pytest

from sbir_ray.config import ChoiceConfig, FilterConfig, GeneratorTraining, RetrievalTraining
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.strict import check_schema, digest, from_dict, load, to_dict


def test_defaults_survive_the_way_through_plain_values():
    config = RetrievalTraining()
    assert from_dict(RetrievalTraining, to_dict(config)) == config


def test_file_and_settings_change_nested_values_and_settings_win(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("seed = 3\n[optim]\nlr = 1\nsteps = 5\n")
    config = load(RetrievalTraining, file, ["optim.lr=2e-3", "model.backbone=vgg16"])
    assert (config.seed, config.optim.lr, config.optim.steps) == (3, 2e-3, 5)
    assert config.model.backbone == "vgg16"


def test_a_partial_table_keeps_the_other_defaults_of_its_owner():
    config = load(GeneratorTraining, None, ["optim.steps=700"])
    assert config.optim == dataclasses.replace(GeneratorTraining().optim, steps=700)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.stepz=3", "optim.stepz; did you mean optim.steps"),
        ("optimm.steps=3", "optimm; did you mean optim"),
        ("optim.steps=many", "optim.steps: 'many' is not of type int"),
        ("optim.steps=true", "is not of type int"),
        ("optim.lr=nan", "is not a finite number"),
        ("optim.steps=0", "steps: 0 is less than 1"),
        ("loss.kind=quadruplet", "is not one of infonce, triplet"),
        ("optim=3", "optim: is a table"),
        ("steps", "write it as key=value"),
    ],
)
def test_wrong_settings_are_refused_by_name(setting, words):
    with pytest.raises(UserError, match=words):
        load(RetrievalTraining, None, [setting])


def test_a_file_that_is_no_toml_is_named(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[optim\n")
    with pytest.raises(UserError, match=r"a\.toml: not a TOML file"):
        load(RetrievalTraining, file)
    with pytest.raises(UserError, match=r"b\.toml: cannot read"):
        load(RetrievalTraining, tmp_path / "b.toml")


def test_the_digest_depends_on_every_value():
    config = RetrievalTraining()
    assert digest(config) == digest(RetrievalTraining())
    assert digest(config) != digest(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize("found", [None, "1", True])
def test_a_file_without_a_version_is_refused(found):
    with pytest.raises(UserError, match="no schema_version"):
        check_schema(found, "x.json")


def test_a_newer_version_is_refused_by_name():
    with pytest.raises(UserError, match=r"x\.json: schema_version 99 is newer"):
        check_schema(99, "x.json")


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda f: f.stem
)
def test_every_recipe_loads(file):
    kinds = {
        "generator": GeneratorTraining,
        "retrieval": RetrievalTraining,
        "joint": JointTraining,
        "chairv2": RetrievalTraining,
    }
    (cls,) = (cls for name, cls in kinds.items() if name in file.stem)
    assert load(cls, file) != cls()


def test_a_base_takes_the_place_of_the_defaults():
    base = load(ChoiceConfig, None, ["filters.min_certainty=0.5", "keep=all"])
    found = load(ChoiceConfig, None, ["filters.max_rank=3"], base)
    assert found == ChoiceConfig(keep="all", filters=FilterConfig(min_certainty=0.5, max_rank=3))
