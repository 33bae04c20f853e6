"""Studies: honest intervals, fair judges of drawings, tables and plots that say what was found."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray.data.pairs import PairSet
from sbir_ray.data.raster import rasterise
from sbir_ray.evaluate import paired_difference, ranks, summarise
from sbir_ray.runs import load_retrieval
from sbir_ray.stream.sketchers import Drawn, SketcherSpec
from sbir_ray.study import intervals
from sbir_ray.study.intervals import NAMES, Found
from sbir_ray.study.judging import PEOPLE, judged
from sbir_ray.study.plan import Row
from sbir_ray.study.tables import markdown, numbers, plot
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from tests.tiny import retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

# --------------------------------------------------------------------------- intervals


def slow_interval(runs, others, k, resamples=4000):
    """Runs and photos drawn one by one, in loops."""
    rng = np.random.default_rng(7)
    names = sorted(set(runs[0].photos))
    count = len(runs)
    values = []
    for _ in range(resamples):
        queries = [
            q
            for photo in rng.choice(names, len(names))
            for q, own in enumerate(runs[0].photos)
            if own == photo
        ]
        means = []
        for run, other in zip(runs, others, strict=True):
            hits = [run.ranks[q] <= k for q in queries]
            if other is not None:
                hits = [a - (other.ranks[q] <= k) for a, q in zip(hits, queries, strict=True)]
            means.append(sum(hits) / len(hits))
        middle = sum(means) / count
        drawn = sum(means[i] for i in rng.integers(count, size=count)) / count
        values.append(middle + (count / (count - 1)) ** 0.5 * (drawn - middle))
    return np.percentile(values, [2.5, 97.5])


def runs_of(seed, count=3, photos=25):
    rng = np.random.default_rng(seed)
    owners = [f"p{i}" for i in range(photos) for _ in range(1 + i % 3)]
    easy = rng.normal(0, 1, photos)
    found = []
    for luck in rng.normal(0, 0.7, count):
        place = [easy[int(own[1:])] + luck + rng.normal(0, 0.5) for own in owners]
        found.append(Found(owners, [1 + int(max(0, 3 * p)) for p in place], photos))
    return found


def test_intervals_agree_with_a_slow_bootstrap():
    runs, others = runs_of(0), runs_of(1)
    found, gained = intervals.accuracy(runs), intervals.difference(runs, others)
    for name, k in (("acc@1", 1), ("acc@5", 5)):
        low, high = np.clip(slow_interval(runs, [None] * 3, k), 0, 1)
        assert found[name].mean == pytest.approx(
            np.mean([np.mean(np.array(r.ranks) <= k) for r in runs])
        )
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=0.02)
        low, high = slow_interval(runs, others, k)
        assert gained[name].mean == pytest.approx(
            found[name].mean - intervals.accuracy(others)[name].mean
        )
        assert (gained[name].low, gained[name].high) == pytest.approx((low, high), abs=0.02)


def test_one_run_has_the_interval_of_its_photos():
    (run,) = runs_of(2, count=1)
    (other,) = runs_of(3, count=1)
    found = intervals.accuracy([run])
    theirs = summarise(
        np.array(run.ranks), np.unique(run.photos, return_inverse=True)[1], run.gallery
    )
    for name in NAMES:
        assert found[name].mean == pytest.approx(theirs.value(name))
        assert (found[name].low, found[name].high) == pytest.approx(theirs.ci95[name], abs=0.02)
    gained = intervals.difference([run], [other])["acc@1"]
    theirs = paired_difference(
        np.array(run.ranks), np.array(other.ranks), np.unique(run.photos, return_inverse=True)[1]
    )
    assert gained.mean == pytest.approx(theirs["difference"]["acc@1"])
    assert [gained.low, gained.high] == pytest.approx(theirs["ci95"]["acc@1"], abs=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6))
def test_the_luck_of_a_run_is_as_wide_as_its_standard_error(count):
    """Runs that get the same share of every photo: only their own luck is left."""
    photos = [f"p{i}" for i in range(8) for _ in range(10)]
    right = np.linspace(2, 8, count).astype(int)
    runs = [Found(photos, ([1] * n + [9] * (10 - n)) * 8, 80) for n in right]
    found = list(intervals._resampled([(r.photos, np.array(r.ranks) == 1.0) for r in runs]))
    shares = right / 10
    assert np.std(np.concatenate(found)) == pytest.approx(
        np.std(shares, ddof=1) / count**0.5, rel=0.06
    )


def test_folds_are_resampled_by_themselves_and_count_alike():
    """Two runs of each of two folds, the second fold of half as many photos."""
    folds = [runs_of(4, count=2), runs_of(5, count=2, photos=12)]
    runs = [run for fold in folds for run in fold]
    found = intervals.accuracy(runs)["acc@1"]
    assert found.mean == pytest.approx(np.mean([intervals.shares(run)["acc@1"] for run in runs]))
    rng = np.random.default_rng(7)
    values = []
    for _ in range(4000):
        means = []
        for fold in folds:
            owners = np.array(fold[0].photos)
            drawn = rng.choice(np.unique(owners), len(np.unique(owners)))
            queries = np.concatenate([np.flatnonzero(owners == photo) for photo in drawn])
            means += [np.mean(np.array(run.ranks)[queries] == 1) for run in fold]
        chosen = np.mean([means[i] for i in rng.integers(4, size=4)])
        values.append(np.mean(means) + (4 / 3) ** 0.5 * (chosen - np.mean(means)))
    low, high = np.clip(np.percentile(values, [2.5, 97.5]), 0, 1)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_runs_of_other_queries_are_not_compared():
    (run,) = runs_of(2, count=1)
    with pytest.raises(ValueError, match="no runs"):
        intervals.accuracy([])
    with pytest.raises(ValueError, match="same queries"):
        intervals.difference([run], [dataclasses.replace(run, photos=run.photos[::-1])])
    with pytest.raises(ValueError, match="2 runs and 1"):
        intervals.difference([run, run], [run])


# --------------------------------------------------------------------------- the judge


@pytest.fixture(scope="module")
def judging(tmp_path_factory):
    """A PAIRS folder, and the run of a judge that was trained for a step."""
    root = tmp_path_factory.mktemp("judge")
    pairs, run = tiny_pairs(root / "pairs"), root / "run"
    train([Job("retrieval", str(run), retrieval_config(1), {"pairs": str(pairs)})], workers=0)
    return pairs, run


def test_drawings_are_ranked_among_the_photos(tmp_path, judging):
    pairs, run = judging
    model = load_retrieval(run).model
    size = model.config.image_size
    test = PairSet.load(pairs, "test", size)

    found = judged(SketcherSpec("contours"), 0, run, pairs, "test")
    assert (list(found.photos), found.gallery) == (test.photo_ids, 4)
    seen = PairSet.load(pairs, "test", 256)
    drawn = SketcherSpec("contours").make().draw(seen.photos.transpose(0, 2, 3, 1), [0] * 4)
    with torch.inference_mode():
        sketches = model.embed_sketches(
            torch.from_numpy(rasterise([d.strokes for d in drawn], size))
        )
        photos = model.embed_photos(torch.from_numpy(test.photos))
    assert list(found.ranks) == ranks(sketches.numpy(), photos.numpy(), np.arange(4)).tolist()

    people = judged(SketcherSpec(PEOPLE), 0, run, pairs, "test")
    assert list(people.photos) == [test.photo_ids[i] for i in test.photo_of]
    store = tiny_store(tmp_path / "more", 20)
    for source, easier in (("contours", found), (PEOPLE, people)):
        harder = judged(SketcherSpec(source), 0, run, pairs, "test", store)
        assert harder.gallery == 4 + 20
        assert all(a >= b for a, b in zip(harder.ranks, easier.ranks, strict=True))


def test_a_photo_of_which_nothing_was_drawn_is_last(monkeypatch, judging):
    pairs, run = judging
    monkeypatch.setattr("sbir_ray.stream.sketchers.Tracer.draw", lambda *_: [Drawn([])] * 4)
    assert list(judged(SketcherSpec("edges"), 0, run, pairs, "test").ranks) == [4] * 4


# --------------------------------------------------------------------------- tables


PHOTOS = ["a", "b", "c", "d"]


def table_rows():
    base = Row("supervised", "labelled pairs alone", "supervised", found={0: "s0", 1: "s1"})
    facts = {"updates": 14, "labels": 0.4, "photos": {0: 9, 1: 9}}
    full = Row(
        "full",
        "joint | training",
        "full",
        baseline="supervised",
        found={0: "f0", 1: "f1"},
        drawn={0: "d0", 1: "d1"},
        facts=facts,
    )
    found = {
        "s0": Found(PHOTOS, [1, 9, 9, 9], 12),
        "s1": Found(PHOTOS, [1, 9, 1, 9], 12),
        "f0": Found(PHOTOS, [1, 1, 9, 11], 12),
        "d0": Found(PHOTOS, [12, 1, 4, 6], 12),
    }
    return [base, full], found, {"f1": "in x: broke", "d1": "in x: broke"}


def values_of(lines, study="ablation"):
    return {
        "study": study,
        "request": {
            "pairs": [["pairs", "0"]],
            "split": "val",
            "gallery": None,
            "seeds": [0, 1],
            "labels": [0.4],
        },
        "rows": lines,
        "searched": 12,
        "intervals": intervals.METHOD,
        "command": "sbir-ray study ablation",
        "versions": {"torch": "2"},
    }


def test_numbers_are_those_worked_out_by_hand():
    supervised, full = numbers(*table_rows())
    assert supervised["accuracy"]["acc@1"]["mean"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert supervised["accuracy"]["acc@1"]["by_seed"] == {"0": 0.25, "1": 0.5}
    assert supervised["accuracy"]["acc@10"]["mean"] == 1
    assert "difference" not in supervised
    assert full["seeds"] == [0]
    assert full["failed"] == {"1": "in x: broke"}
    assert full["accuracy"]["acc@1"]["mean"] == 0.5
    assert full["accuracy"]["acc@10"]["mean"] == 0.75
    assert full["baseline"] == "supervised"
    assert full["difference"]["acc@1"]["mean"] == pytest.approx(0.25)
    assert full["difference"]["acc@10"]["mean"] == pytest.approx(-0.25)
    assert full["drawings"]["acc@5"]["mean"] == 0.5
    assert full["updates"] == 14


def test_the_table_has_each_row_with_its_failures():
    lines = numbers(*table_rows())
    text = markdown("ablation", values_of(lines))
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == (
        "| trained with | acc@1 | acc@5 | acc@10 | acc@1 against supervised | "
        "acc@10 against supervised | drawings acc@1 | drawings acc@10 | runs |"
    )
    assert table[2].startswith("| labelled pairs alone | 37.5 (")
    assert table[2].endswith("|  |  |  |  | 2 |")
    assert table[3].startswith("| joint / training | 50.0 (")
    assert " | +25.0 (" in table[3]
    assert table[3].endswith(" | 1; seed 1 failed: in x: broke |")
    assert len({line.count("|") for line in table}) == 1
    for told in ("bootstrap over training runs", "FID", "same number of updates", "Seeds: 0, 1"):
        assert told in text


def test_a_row_without_a_run_that_counts_is_in_the_table():
    rows, found, _ = table_rows()
    (line,) = numbers([rows[0]], {}, {"s0": "broke", "s1": "broke"})
    assert "accuracy" not in line
    text = markdown("ablation", values_of([line]))
    assert (
        "| labelled pairs alone |  |  |  | 0; seed 0 failed: broke; seed 1 failed: broke |" in text
    )
    assert found


@pytest.mark.parametrize("study", ["ablation", "labels", "photos", "generation"])
def test_each_study_has_a_plot(tmp_path, study):
    rows, found, failed = table_rows()
    rows = [dataclasses.replace(row, x=0.4) for row in rows]
    lines = numbers(rows, found, failed)
    plot(study, lines, tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 150
    assert (pixels < 128).mean() > 0.002
    plot(study, [], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 500
    text = markdown(study, values_of(lines, study))
    assert ("| 0.4 |" in text) == (study in ("labels", "photos"))
