"""Pseudo sketches: the same rows by any number of actors, every photo accounted for, resumed."""

import collections
import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray import cloudpickle

from sbir_ray.config import FilterConfig, SketchConfig
from sbir_ray.data import photos
from sbir_ray.data.strokes import unflatten
from sbir_ray.errors import SbirError, UserError
from sbir_ray.runlog import Ledger, Progress
from sbir_ray.stream.filters import RankerSpec, reference_photos
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.pseudo_store import PseudoSet, iter_rows, read_header
from sbir_ray.stream.sketch_blocks import plan_blocks
from sbir_ray.stream.sketchers import row_seed
from sbir_ray.stream.sketching import sketch
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from tests import fake_sketcher
from tests.fake_sketcher import FakeSpec, aligned
from tests.tiny import photo, retrieval_config, tiny_pairs

# Workers cannot import it.
cloudpickle.register_pickle_by_value(fake_sketcher)

PHOTOS = 21


@pytest.fixture(scope="module")
def store(tmp_path_factory, cluster):
    folder = tmp_path_factory.mktemp("sketching")
    for number in range(PHOTOS):
        out = io.BytesIO()
        Image.fromarray(photo(number)).save(out, "PNG")
        (folder / f"{number}.png").write_bytes(out.getvalue())
    ingest([folder], folder / "store")
    return folder / "store"


def rows_of(out):
    return {(row["photo_id"], row["seed"]): row for row in iter_rows(out, kept_only=False)}


def test_the_same_rows_come_from_any_batches_and_actors(tmp_path, store):
    config = SketchConfig(
        seed=5,
        samples=2,
        keep="all",
        temperature=1.0,
        batch_size=2,
        filters=FilterConfig(min_certainty=0.3),
    )
    one = sketch(store, tmp_path / "one", FakeSpec(), config, actors=(1, 1))
    other = dataclasses.replace(config, batch_size=5)
    two = sketch(store, tmp_path / "two", FakeSpec(), other, actors=(2, 2))
    assert one == two
    rows = rows_of(tmp_path / "one")
    assert len(rows) == 2 * PHOTOS
    assert rows == rows_of(tmp_path / "two")

    row = next(row for row in rows.values() if row["kept"])
    assert row["seed"] in {row_seed(5, row["photo_id"], sample) for sample in (0, 1)}
    assert (row["generator_version"], row["generator_digest"], row["round"]) == (3, "f00d", 0)
    pictures = {r["photo_id"]: r["image"] for r in photos.read_store(store)}
    assert row["image"] == pictures[row["photo_id"]]
    kept = [row for row in rows.values() if row["certainty"] >= 0.3]
    assert one.by_reason["filtered"] == {"min_certainty": 2 * PHOTOS - len(kept)}

    loaded = PseudoSet.load(tmp_path / "two", 48)
    assert len(loaded.sketches) == len(kept) == one.count("kept")
    assert loaded.photos.shape == (len(loaded.photo_ids), 3, 48, 48)
    for sketch_, place, sure in zip(
        loaded.sketches, loaded.photo_of, loaded.certainty, strict=True
    ):
        mine = [row for row in kept if row["certainty"] == sure]
        assert [row["photo_id"] for row in mine] == [loaded.photo_ids[place]]
        np.testing.assert_array_equal(
            np.concatenate([s.ravel() for s in sketch_]), np.concatenate(mine[0]["strokes"])
        )


def test_the_best_of_several_drawings_is_kept_and_all_are_stored(tmp_path, store, teachers):
    config = SketchConfig(samples=3, batch_size=4, filters=FilterConfig(min_certainty=0.3))
    by = FakeSpec(plans=((aligned(3), "raise"), (aligned(7), "nothing")))
    ledger = sketch(store, tmp_path / "best", by, config, teacher=teachers[0])
    assert ledger.total == 3 * PHOTOS
    assert ledger.by_reason["failed"] == {"error-ArithmeticError": 3, "nothing-to-draw": 3}
    rows = collections.defaultdict(list)
    for row in iter_rows(tmp_path / "best", kept_only=False):
        rows[row["photo_id"]].append(row)
    assert len(rows) == PHOTOS
    for photo_id, drawings in rows.items():
        assert [row["sample"] for row in drawings] == [0, 1, 2]
        assert [row["seed"] for row in drawings] == [row_seed(0, photo_id, k) for k in range(3)]
        certain = [row for row in drawings if row["certainty"] >= 0.3]
        best = min(certain, key=lambda row: (row["rank"], -row["similarity"]), default=None)
        for row in drawings:
            if row["status"] == "failed":
                assert not row["kept"]
            elif row["certainty"] < 0.3:
                assert (row["status"], row["reason"]) == ("filtered", "min_certainty")
            elif row is best:
                assert (row["kept"], row["reason"]) == (True, "")
            else:
                assert (row["status"], row["reason"]) == ("filtered", "not-best")
            assert row["status"] == "failed" or (row["rank"] > 0 and row["similarity"] != 0)
    kept = list(iter_rows(tmp_path / "best"))
    assert len(kept) == ledger.count("kept") > PHOTOS / 2
    assert len(PseudoSet.load(tmp_path / "best", 32).photo_ids) == len(kept)


def test_photos_that_fail_are_accounted_for_and_do_not_touch_the_others(tmp_path, store):
    plans = ((aligned(3), "raise"), (aligned(7), "nothing"), (aligned(12), "die"))
    spec = FakeSpec(plans=plans)
    ledger = sketch(store, tmp_path / "bad", spec, SketchConfig(batch_size=4), actors=(1, 1))
    assert ledger.by_reason["failed"] == {
        "error-ArithmeticError": 1,
        "nothing-to-draw": 1,
        "killed-its-process": 1,
    }
    assert (ledger.total, ledger.count("kept")) == (PHOTOS, PHOTOS - 3)
    header = read_header(tmp_path / "bad")
    assert Ledger.from_json("pseudo", header["ledger"], "pseudo.json") == ledger
    good = sketch(store, tmp_path / "good", FakeSpec(), SketchConfig(batch_size=4))
    assert good.count("kept") == PHOTOS
    expected = rows_of(tmp_path / "good")
    for key, row in rows_of(tmp_path / "bad").items():
        if row["kept"]:
            assert row == expected[key]
        else:
            assert (row["strokes"], row["points"], row["certainty"]) == ([], 0, 0.0)
    assert len(PseudoSet.load(tmp_path / "bad", 32, kept_only=False).sketches) == PHOTOS - 3


class Stopped(Progress):
    """Ends the run, as a user would, once some rows are written."""

    def update(self, done, total=None, note=""):
        if done:
            raise KeyboardInterrupt


def identity(file):
    """Changes when a file is written anew: inode numbers alone are given again to new files."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def test_a_stopped_run_draws_only_what_is_left(tmp_path, store):
    out, config = tmp_path / "out", SketchConfig(batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        sketch(store, out, FakeSpec(), config, actors=(1, 1), progress=Stopped)
    with pytest.raises(UserError, match="not a folder of pseudo pairs"):
        read_header(out)
    first = {f.name: identity(f) for f in out.glob("round-0000/part-*")}
    assert first
    # What was half written must go, and be drawn again.
    half = next(out.glob("round-0000/part-*"))
    pq.write_table(pq.read_table(half).slice(1), half)

    ledger = sketch(store, out, FakeSpec(), config, actors=(1, 1))

    ledger.check()
    assert ledger.count("kept") == PHOTOS
    assert len(rows_of(out)) == PHOTOS
    final = {f.name: identity(f) for f in out.glob("round-0000/part-*")}
    assert len(final) == len(plan_blocks(store, 4))
    again = {name for name, before in first.items() if final.get(name) != before}
    assert again == {half.name}


def test_a_sketcher_that_fails_on_everything_stops_the_run(tmp_path, store):
    plans = tuple((aligned(number), "raise") for number in range(PHOTOS))
    with pytest.raises(
        SbirError, match="drawings failed, most often by ArithmeticError: no sketch"
    ):
        sketch(store, tmp_path / "out", FakeSpec(plans=plans))
    assert not (tmp_path / "out" / "pseudo.json").exists()
    # Once its fault is mended, no photo is counted as failed for it.
    assert sketch(store, tmp_path / "out", FakeSpec()).count("kept") == PHOTOS


@pytest.mark.parametrize(
    ("sketcher", "settings", "options", "message"),
    [
        (
            "contours",
            {"filters": FilterConfig(min_certainty=0.5)},
            {},
            r"filters\.min_certainty=0\.5: contours has no discriminator",
        ),
        ("contours", {"temperature": 1.0}, {}, "temperature=1: contours draws without chance"),
        ("contours", {"samples": 2}, {}, "samples=2: at temperature=0"),
        ("countours", {}, {}, "countours: no such run folder; name one, or contours, edges"),
        ("contours", {}, {"actors": (50, 50)}, "--actors: 50 x"),
        ("contours", {}, {"gpus_per_actor": 1.0}, "--actors: 1 x"),
        ("contours", {}, {"actors": (2, 1)}, "--actors 2:1"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(
    tmp_path, store, sketcher, settings, options, message
):
    with pytest.raises(UserError, match=message):
        sketch(store, tmp_path / "out", sketcher, SketchConfig(**settings), **options)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two retrieval networks, nearly as they began: such small ones soon see all photos as one."""
    root = tmp_path_factory.mktemp("teachers")
    inputs = {"pairs": str(tiny_pairs(root / "pairs"))}
    runs = [root / f"f{seed}" for seed in range(2)]
    for seed, run in enumerate(runs):
        config = retrieval_config(seed=seed)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-9))
        train([Job("retrieval", str(run), config, inputs)], workers=0)
    return runs


@pytest.mark.slow
def test_a_teacher_leaves_out_drawings_whose_photo_it_ranks_behind(tmp_path, store, teachers):
    config = SketchConfig(batch_size=2, filters=FilterConfig(min_certainty=0.2, max_rank=9))
    by, teacher = FakeSpec(), teachers[0]
    ledger = sketch(store, tmp_path / "one", by, config, teacher=teacher, actors=(1, 1))
    rows = rows_of(tmp_path / "one")

    # The same ranks as of the drawings as they are stored, all at once.
    spec = RankerSpec.of_run(teacher)
    size = spec.image_size
    ranker = spec.make(reference_photos(store, size))
    pictures = np.stack(
        [photos.align(photos.decode_stored(row["image"]), size) for row in rows.values()]
    )
    ranks = ranker.rank(
        pictures.transpose(0, 3, 1, 2), [unflatten(row["strokes"]) for row in rows.values()]
    )
    assert [row["rank"] for row in rows.values()] == ranks
    assert len(set(ranks)) > 5

    reasons = collections.Counter()
    for row in rows.values():
        expected = "max_rank" if row["rank"] > 9 else ""
        expected = "min_certainty" if row["certainty"] < 0.2 else expected
        assert (row["reason"], row["kept"]) == (expected, not expected)
        reasons[expected] += 1
    assert ledger.count("kept") == reasons.pop("")
    assert ledger.by_reason["filtered"] == reasons
    assert set(reasons) == {"min_certainty", "max_rank"}
    header = read_header(tmp_path / "one")
    assert header["teacher_digest"] == spec.digest
    left = {entry.name for entry in (tmp_path / "one").iterdir() if entry.name[0] != "."}
    assert left == {"pseudo.json", "round-0000"}

    other = dataclasses.replace(config, batch_size=5)
    sketch(store, tmp_path / "two", by, other, teacher=teacher, actors=(2, 2))
    assert rows_of(tmp_path / "two") == rows


@pytest.mark.slow
def test_what_was_ranked_by_another_teacher_is_drawn_again(tmp_path, store, teachers):
    out, config = tmp_path / "out", SketchConfig(batch_size=4, filters=FilterConfig(max_rank=9))
    how = {"config": config, "actors": (1, 1)}
    with pytest.raises(KeyboardInterrupt):
        sketch(store, out, FakeSpec(), teacher=teachers[0], progress=Stopped, **how)
    parts = out.glob("round-0000/part-*")
    first = {(file.name, identity(file)) for file in parts}
    assert first
    sketch(store, out, FakeSpec(), teacher=teachers[1], **how)
    final = {(file.name, identity(file)) for file in out.glob("round-0000/part-*")}
    assert not first & final
    assert {name for name, _ in first} <= {name for name, _ in final}
