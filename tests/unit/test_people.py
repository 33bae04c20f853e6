"""People's hidden sketches as pseudo pairs."""

import numpy as np
import pyarrow.parquet as parquet
import pytest

from sbir_ray.cli import main
from sbir_ray.config import FilterConfig, SketchConfig
from sbir_ray.data.pairs import PairSet, iter_photos
from sbir_ray.data.photos import read_store
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.stream.pseudo_store import HEADER, PseudoSet, read_header, rounds_of
from sbir_ray.study import studies
from sbir_ray.study.data import Cell
from sbir_ray.study.people import people_drew
from sbir_ray.study.plan import Plan
from tests.pseudo_rows import rows_of
from tests.tiny import tiny_pairs
from tests.tiny_store import tiny_store

ALL = SketchConfig(keep="all", temperature=0.0)


@pytest.fixture
def pool(tmp_path):
    """A store of the shapes 0 to 7, and pairs of the first six: four to train on, one to validate
    and one to test with, each drawn by two people; ids are the same in both, as after ``ingest``.
    """
    store = tiny_store(tmp_path / "pool", 8)
    pairs = tiny_pairs(tmp_path / "pairs", train=4, val=1, test=1)
    (file,) = (store / "shards").iterdir()
    table = parquet.read_table(file)
    ids = [row["photo_id"] for row in sorted(iter_photos(pairs), key=lambda row: row["name"])]
    ids += table["photo_id"].to_pylist()[len(ids) :]
    parquet.write_table(table.set_column(0, "photo_id", [ids]), file)
    return store, pairs


def test_all_sketches_of_the_pools_photos_are_kept(tmp_path, pool):
    store, pairs = pool
    image = {row["photo_id"]: row["image"] for row in read_store(store)}
    out = tmp_path / "pseudo"
    ledger = people_drew(store, pairs, out, ALL)
    people = PairSet.load(pairs, "train", 32)
    assert (ledger.total, ledger.count("kept")) == (8, 8)
    rows = rows_of(out)
    assert set(rows) == {(photo_id, hand) for photo_id in people.photo_ids for hand in (0, 1)}
    assert all(row["image"] == image[photo_id] for (photo_id, _), row in rows.items())
    assert {row["certainty"] for row in rows.values()} == {1}
    # Validation and test photos are in the store and drawn too, but not for training.
    assert not set(PairSet.load(pairs, "val", 32).photo_ids) & {name for name, _ in rows}
    found = PseudoSet.load(out, 32)
    sketches = {name: [] for name in found.photo_ids}
    for sketch, photo in zip(found.sketches, found.photo_of, strict=True):
        sketches[found.photo_ids[photo]].append(sketch)
    for number, name in enumerate(people.photo_ids):
        theirs = [people.sketches[i] for i in people.sketches_of[number]]
        for one, other in zip(sketches[name], theirs, strict=True):
            for stroke, same in zip(one, other, strict=True):
                np.testing.assert_array_equal(stroke, same)


def test_the_folder_is_one_of_pseudo_pairs(tmp_path, pool, monkeypatch, capsys):
    store, pairs = pool
    out = tmp_path / "pseudo"
    people_drew(store, pairs, out, ALL)
    header = read_header(out)
    assert (header["sketcher"], header["choice"]["keep"]) == ("people", "all")
    assert rounds_of(out, header) == [0]
    monkeypatch.setattr("sys.argv", ["sbir-ray", "pseudo", "stats", str(out)])
    main()
    assert "8 drawn: 8 kept" in capsys.readouterr().out
    before = (out / HEADER).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        people_drew(store, pairs, out, ALL)
    assert (out / HEADER).read_bytes() == before


def test_filters_are_asked_and_counted(tmp_path, pool):
    store, pairs = pool
    config = SketchConfig(keep="all", temperature=0.0, filters=FilterConfig(min_points=1000))
    ledger = people_drew(store, pairs, tmp_path / "pseudo", config)
    assert (ledger.count("kept"), ledger.count("filtered")) == (0, 8)


def test_a_pool_that_nobody_drew_is_told(tmp_path, pool):
    _, pairs = pool
    store = tiny_store(tmp_path / "other" / "pool", 2)
    with pytest.raises(UserError, match=r"pool: .*pairs has no sketch of any of its photos"):
        people_drew(store, pairs, tmp_path / "pseudo", ALL)
    assert not (tmp_path / "pseudo").exists()


# --------------------------------------------------------------------------- rows of a study


def rows_of_share(tmp_path, labels, names):
    """The plan and the rows of a share of labels."""
    base = JointTraining(filters=FilterConfig(min_certainty=0.5))
    plan = Plan(tmp_path, base, "val")
    cell = Cell(labels, 0, "labelled", "pairs", "pool", 60)
    return plan, {row.name: row for row in studies.labels(plan, [cell], names)}


def test_ceilings_have_people_where_the_others_have_a_sketcher(tmp_path):
    names = ("people", "contours", "people-mixed", "mixed")
    plan, rows = rows_of_share(tmp_path, 0.2, names)
    jobs = {
        name: plan.work[plan.work[rows[f"{name}-0.2"].found[0]].needs[0]].jobs[0] for name in names
    }
    drawn = plan.work["labels-0.2/seed-0/drawn-by-people"]
    assert (drawn.sketcher, drawn.photos, drawn.pairs) == ("people", "pool", "pairs")
    assert drawn.config.filters.min_certainty == 0
    assert jobs["people"].config == jobs["contours"].config
    assert {**jobs["contours"].inputs, "pseudo": drawn.out} == jobs["people"].inputs
    assert jobs["people-mixed"].config == jobs["mixed"].config
    assert {**jobs["mixed"].inputs, "pseudo": drawn.out} == jobs["people-mixed"].inputs


def test_no_ceiling_where_no_sketch_is_hidden(tmp_path):
    assert list(rows_of_share(tmp_path, 1.0, ("contours", "people"))[1]) == ["contours-1"]
