"""A study goes on where it was killed, repeats nothing, and survives the failure of a run."""

import dataclasses
import io
import json

import pytest

from sbir_ray.config import FilterConfig, SaveConfig
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.errors import UserError
from sbir_ray.joint_config import ScheduleConfig, StreamConfig
from sbir_ray.runlog import Progress
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.study.run import Request, run_study
from tests.tiny import generator_config, joint_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

CONFIG = joint_config(
    retrieval=retrieval_config(2),
    generator=generator_config(2),
    schedule=ScheduleConfig(steps=4, retrieval_steps=1, generator_steps=1),
    filters=FilterConfig(min_points=2),
    stream=StreamConfig(batch_size=4),
    save=SaveConfig(log_every=1, checkpoint_every=100),
)


class KilledError(Exception):
    pass


class Line(Progress):
    """Ends the study when ``stop`` steps are done."""

    def __init__(self, title, stop=None):
        super().__init__(title, file=io.StringIO(), every=0)
        self.stop = stop if title == "study" else None

    def update(self, done, total=None, note=""):
        super().update(done, total, note)
        if self.stop is not None and done >= self.stop:
            raise KilledError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Photos 0-11 train, 12-14 val, 15 test."""
    return tiny_pairs(tmp_path_factory.mktemp("study") / "pairs", train=12, val=3, test=1, hands=1)


def run(request, out, line=Line):
    return run_study(request, out, parallel=2, progress=line)


def trained(out):
    """When each file of weights was written, by run."""
    files = (out / "runs").rglob("model.safetensors")
    return {str(f.relative_to(out / "runs")): f.stat().st_mtime_ns for f in files}


def test_a_killed_study_goes_on_and_repeats_nothing(tmp_path, pairs, cluster):
    photos = tiny_store(tmp_path / "photos", 20)
    request = Request(
        study="ablation",
        pairs=(pairs,),
        photos=photos,
        config=CONFIG,
        labels=(0.5,),
        seeds=1,
        rows=("supervised", "full", "contours"),
    )
    out = tmp_path / "study"
    with pytest.raises(KilledError):
        run(request, out, lambda title: Line(title, stop=8))
    before = trained(out)
    assert before
    assert not (out / "study.json").exists()

    lines = []
    found = run(request, out, lambda title: lines.append(Line(title)) or lines[-1])
    assert not found["failed"]
    after = trained(out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/checkpoints")[0] for name in after} == {
        "judge",
        *(
            f"labels-0.5/seed-0/{name}"
            for name in (
                "supervised",
                "teacher",
                "generator",
                "generator/discriminator",
                "full",
                "contours",
            )
        ),
    }
    assert [row["name"] for row in found["rows"]] == ["supervised", "full", "contours"]
    assert {row["updates"] for row in found["rows"]} == {2}
    for row in found["rows"]:
        assert row["accuracy"]["acc@5"]["mean"] == 1  # of three photos
        assert ("difference" in row) == (row["name"] != "supervised")
    assert found["rows"][1]["drawings"]["acc@10"]["mean"] == 1
    saved = json.loads((out / "study.json").read_text())
    assert saved == json.loads(json.dumps({k: v for k, v in found.items() if k != "text"}))
    assert (out / "study.md").read_text() == found["text"]
    assert (out / "study.png").stat().st_size > 1000
    study = lines[-1]
    assert study.done == study.total
    assert "pieces" in study.file.getvalue()

    # The pool: what is hidden and the photos, without the pairs' validation and test photos.
    data = out / "data" / "labels-0.5" / "seed-0"
    labelled = set(PairSet.load(data / "pairs" / "labelled", "train", 32).photo_ids)
    held_out = {i for split in ("val", "test") for i in PairSet.load(pairs, split, 32).photo_ids}
    pool = set(PhotoSet.load(data / "photos", 32).photo_ids)
    hidden = set(PairSet.load(pairs, "train", 32).photo_ids) - labelled
    assert len(labelled) == len(hidden) == 6
    assert not pool & (labelled | held_out)
    assert len(pool & hidden) >= 4  # some of the shapes look alike

    # The same again does nothing, another request is refused, another row is added.
    again = run(request, out)
    assert again["rows"] == found["rows"]
    other = dataclasses.replace(request, config=dataclasses.replace(CONFIG, warm_start=True))
    with pytest.raises(UserError, match="holds a study with another warm_start; choose"):
        run(other, out)
    more = run(dataclasses.replace(request, rows=("supervised", "negatives")), out)
    assert [row["name"] for row in more["rows"]] == ["supervised", "negatives"]
    assert {name: trained(out)[name] for name in after} == after


def test_people_are_the_ceiling_of_those_who_draw(tmp_path, pairs, cluster):
    request = Request(
        study="labels", pairs=(pairs,), config=CONFIG, labels=(0.5,), seeds=1, rows=("people",)
    )
    out = tmp_path / "study"
    found = run(request, out)
    assert not found["failed"]
    (row,) = found["rows"]
    assert row["accuracy"]["acc@5"]["mean"] == 1
    data = out / "data" / "labels-0.5" / "seed-0"
    hidden = PairSet.load(data / "pairs" / "hidden", "train", 32).photo_ids
    pool = PhotoSet.load(data / "photos", 32).photo_ids
    drawn = PseudoSet.load(out / "pseudo" / "labels-0.5" / "seed-0" / "drawn-by-people", 32)
    assert drawn.photo_ids == sorted(set(hidden) & set(pool))
    assert len(drawn.photo_ids) >= 4  # some of the shapes look alike


def test_a_failed_run_is_told_and_stops_no_other(tmp_path, pairs, cluster):
    config = dataclasses.replace(CONFIG, filters=FilterConfig(min_points=200, max_points=300))
    request = Request(
        study="photos", pairs=(pairs,), config=config, labels=(0.5,), seeds=1, counts=(0, 3)
    )
    out = tmp_path / "study"
    found = run(request, out)
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["supervised-0", "full-3", "negatives-3", "contours-3"]
    assert rows["negatives-3"]["accuracy"]["acc@10"]["mean"] == 1
    reason = rows["contours-3"]["failed"]["0"]
    assert reason.startswith("in labels-0.5/seed-0/photos-3/contours: ")
    assert "no pseudo pair was kept" in reason
    assert "accuracy" not in rows["contours-3"]
    assert set(found["failed"]) >= {
        "labels-0.5/seed-0/photos-3/contours",
        "labels-0.5/seed-0/photos-3/contours/found",
    }
    assert f"seed 0 failed: {reason}" in found["text"]
    assert "full-3" in rows
