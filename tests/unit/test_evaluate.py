from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial.distance import cdist

from sbir_ray import evaluate
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.raster import rasterise
from sbir_ray.evaluate import (
    NAMES,
    Evaluation,
    Metrics,
    evaluate_retrieval,
    paired_difference,
    ranks,
    summarise,
)

# --------------------------------------------------------------------------- ranks


def slow_ranks(query: NDArray[Any], gallery: NDArray[Any], target: NDArray[Any]) -> list[int]:
    found = []
    for q, own in zip(query, target, strict=True):
        rank = 1
        for i, photo in enumerate(gallery):
            if i != own and ((q - photo) ** 2).sum() <= ((q - gallery[own]) ** 2).sum():
                rank += 1
        found.append(rank)
    return found


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_ranks_are_those_of_plain_loops_ties_included(data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, 7))
    photos = data.draw(st.integers(1, 9))
    # Small whole numbers: many ties, and distances without rounding.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    query = rng.integers(-1, 2, (queries, 3)).astype(np.float32)
    gallery = rng.integers(-1, 2, (photos, 3)).astype(np.float32)
    target = rng.integers(0, photos, queries)
    assert ranks(query, gallery, target).tolist() == slow_ranks(query, gallery, target)


def test_ranks_agree_with_scipy_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(31, 20)), rng.normal(size=(57, 20))
    target = rng.integers(0, 57, 31)
    distance = cdist(query, gallery)
    expected = (distance <= distance[np.arange(31), target][:, None]).sum(axis=1)
    for block in (1, 60, 700, 1 << 22):
        monkeypatch.setattr(evaluate, "_BLOCK", block)
        assert (ranks(query, gallery, target) == expected).all()


def test_a_network_that_maps_everything_to_one_point_is_last() -> None:
    same = np.ones((6, 4), dtype=np.float32) / 2
    assert ranks(same[:3], same, np.arange(3)).tolist() == [6, 6, 6]


def test_a_copy_of_the_right_photo_counts_against_in_spite_of_rounding() -> None:
    rng = np.random.default_rng(1)
    gallery = rng.normal(size=(1100, 129)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    gallery[[3, 555, 1090]] = gallery[1]
    query = (gallery[[1]] + 0.01 * rng.normal(size=(40, 129))).astype(np.float32)
    assert set(ranks(query, gallery, np.ones(40, dtype=int)).tolist()) == {4}


def test_an_embedding_that_is_not_finite_is_refused_and_never_counted_as_a_success() -> None:
    gallery = np.eye(3)
    for bad in (np.nan, np.inf):
        query = np.array([[bad, 0, 0]])
        with pytest.raises(ValueError, match="query embedding is not finite"):
            ranks(query, gallery, np.array([0]))
        with pytest.raises(ValueError, match="gallery embedding is not finite"):
            ranks(gallery[:1], np.vstack([gallery, query]), np.array([0]))


def test_targets_and_shapes_that_do_not_fit_are_refused() -> None:
    eye = np.eye(3)
    for query, target in (
        (eye, [0, 1]),
        (eye, [0, 1, 3]),
        (eye, [0, 1, -1]),
        (eye[:, :2], [0] * 3),
    ):
        with pytest.raises(ValueError, match=r"target|shape"):
            ranks(query, eye, np.array(target))


def test_the_scores_of_all_queries_and_photos_are_never_held_at_once() -> None:
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(4000, 4)), rng.normal(size=(4000, 4))
    tracemalloc.start()
    ranks(query, gallery, np.arange(4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * 4000 * 8 / 3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 6))
def test_the_list_of_nearest_photos_agrees_with_the_rank(seed: int, photos: int, top: int) -> None:
    rng = np.random.default_rng(seed)
    query, gallery = rng.integers(-1, 2, (5, 2)), rng.integers(-1, 2, (photos, 2))
    target = rng.integers(0, photos, 5)
    rank, lists = evaluate._search(query, gallery, target, top)
    assert lists.shape == (5, min(top, photos))
    distance = cdist(query, gallery)
    for q in range(5):
        assert len(set(lists[q])) == len(lists[q])
        shown = distance[q, lists[q]]
        assert (shown == np.sort(distance[q])[: len(shown)]).all()
        place = np.flatnonzero(lists[q] == target[q])
        assert place.tolist() == ([rank[q] - 1] if rank[q] <= top else [])


# --------------------------------------------------------------------------- metrics


def made_up(queries: int = 60, photos: int = 24, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, photos + 1, queries), rng.integers(0, photos, queries)


def test_metrics_are_those_of_plain_loops() -> None:
    rank, photo_of = made_up()
    metrics = summarise(rank, photo_of, 24)
    count = len(rank)
    assert metrics.acc1 == pytest.approx(sum(1 for r in rank if r == 1) / count)
    assert metrics.acc5 == pytest.approx(sum(1 for r in rank if r <= 5) / count)
    assert metrics.acc10 == pytest.approx(sum(1 for r in rank if r <= 10) / count)
    assert metrics.mean_rank == pytest.approx(sum(rank) / count)
    assert metrics.mean_ap == pytest.approx(sum(1 / r for r in rank) / count)
    assert metrics.median_rank == np.median(rank)
    assert (metrics.queries, metrics.gallery) == (60, 24)


@pytest.mark.parametrize("photos", [1, 3, 7, 40])
def test_chance_is_what_all_ranks_equally_often_give(photos: int) -> None:
    metrics = summarise(np.arange(1, photos + 1), np.arange(photos), photos)
    for name in NAMES:
        assert metrics.value(name) == pytest.approx(metrics.chance[name])


def test_the_interval_of_independent_queries_is_that_of_the_binomial() -> None:
    # One sketch a photo: the resampled share is Binomial(n, p) / n exactly.
    rank = np.where(np.arange(80) < 26, 1, 7)
    low, high = summarise(rank, np.arange(80), 80).ci95["acc@1"]
    expected = stats.binom.ppf([0.025, 0.975], 80, 26 / 80) / 80
    assert [low, high] == pytest.approx(expected, abs=1 / 80 + 1e-9)


def test_more_sketches_of_the_same_photos_do_not_narrow_the_interval() -> None:
    rank = np.random.default_rng(0).integers(1, 12, 30)
    once = summarise(rank, np.arange(30), 30)
    often = summarise(np.repeat(rank, 4), np.repeat(np.arange(30), 4), 30)
    for name in NAMES:
        assert often.ci95[name] == pytest.approx(once.ci95[name])


def test_every_interval_holds_its_value_and_a_perfect_model_has_a_point() -> None:
    metrics = summarise(*made_up(seed=3), 24)
    for name in NAMES:
        low, high = metrics.ci95[name]
        assert low < metrics.value(name) < high
    perfect = summarise(np.ones(9, dtype=int), np.arange(9), 9)
    assert set(perfect.ci95.values()) == {(1.0, 1.0)}


def test_the_seed_decides_the_interval() -> None:
    rank, photo_of = made_up()
    assert summarise(rank, photo_of, 24, seed=4) == summarise(rank, photo_of, 24, seed=4)
    assert summarise(rank, photo_of, 24, seed=4) != summarise(rank, photo_of, 24, seed=5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=12))
def test_weighted_medians_are_medians_of_repeated_values(rows: list[tuple[int, int]]) -> None:
    values = np.sort([value for value, _ in rows])
    weights = np.array([weight for _, weight in rows])
    if weights.sum() == 0:
        weights[0] = 1
    found = evaluate._weighted_medians(weights[None], values)
    assert found.tolist() == [np.median(np.repeat(values, weights))]


def test_no_queries_and_impossible_ranks_are_refused() -> None:
    for rank in ([], [0, 1], [1, 5]):
        with pytest.raises(ValueError, match="in a gallery of 4 photos"):
            summarise(np.array(rank, dtype=int), list(range(len(rank))), 4)
    with pytest.raises(ValueError, match="3 queries"):
        summarise(np.array([1, 1, 1]), [0, 0], 4)


def test_the_json_has_exactly_the_documented_keys_and_comes_back() -> None:
    metrics = summarise(*made_up(), 24)
    values = json.loads(json.dumps(metrics.to_json()))
    assert list(values) == [
        "acc@1",
        "acc@5",
        "acc@10",
        "mean_rank",
        "median_rank",
        "mAP",
        "queries",
        "gallery",
        "ci95",
    ]
    assert list(values["ci95"]) == list(values)[:6]
    assert Metrics.from_json(values) == metrics


# --------------------------------------------------------------------------- differences


def test_a_difference_is_positive_where_the_first_model_is_better() -> None:
    photo_of = np.arange(10)
    a, b = np.array([1] * 8 + [30] * 2), np.array([1] * 5 + [9] * 3 + [30] * 2)
    found = paired_difference(a, b, photo_of)
    assert found["difference"] == pytest.approx({"acc@1": 0.3, "acc@10": 0.0})
    assert found["ci95"]["acc@10"] == [0.0, 0.0]
    back = paired_difference(b, a, photo_of)
    low, high = found["ci95"]["acc@1"]
    assert back["ci95"]["acc@1"] == pytest.approx([-high, -low])


def test_what_both_models_share_cancels_out_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    b = np.where(rng.random(400) < 0.5, 1, 20)
    a = np.where(np.arange(400) < 20, 1, b)
    found = paired_difference(a, b, np.arange(400))
    low, high = found["ci95"]["acc@1"]
    gain = (a == 1).astype(float) - (b == 1)
    error = gain.std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    alone = summarise(a, np.arange(400), 400).ci95["acc@1"]
    assert high - low < 0.5 * (alone[1] - alone[0])


def test_ranks_of_different_queries_have_no_difference() -> None:
    with pytest.raises(ValueError, match="not of the same queries"):
        paired_difference(np.array([1, 2]), np.array([1]), [0, 1])


# --------------------------------------------------------------------------- a model

SIDE = 32


class Pixels(torch.nn.Module):
    """Embeds a picture as its pixels, and counts what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.photos = self.sketches = 0
        self.modes: set[bool] = set()

    def embed_photos(self, photo_B3SS: torch.Tensor) -> torch.Tensor:
        assert photo_B3SS.dtype == torch.uint8
        self.photos += len(photo_B3SS)
        return self._embed(photo_B3SS[:, 0])

    def embed_sketches(self, raster_BSS: torch.Tensor) -> torch.Tensor:
        assert raster_BSS.dtype == torch.uint8
        self.sketches += len(raster_BSS)
        return self._embed(raster_BSS)

    def _embed(self, picture: torch.Tensor) -> torch.Tensor:
        self.modes.add(self.training)
        return torch.nn.functional.normalize(picture.flatten(1).float(), dim=1)


def line(angle: float) -> list[NDArray[np.float32]]:
    end = 95 * np.array([np.cos(angle), np.sin(angle)])
    return [np.array([128 - end, 128 + end], dtype=np.float32)]


def pairs() -> PairSet:
    """Photos that show a line each; two sketches of each but the last, which has none."""
    sketches = [line(angle) for angle in np.arange(7) * 0.3]
    photos = np.repeat(rasterise(sketches, SIDE)[:, None], 3, axis=1)
    return PairSet(
        split="test",
        photo_ids=[f"photo{i}" for i in range(7)],
        names=[f"name{i}" for i in range(7)],
        photos=photos,
        sketch_ids=[f"name{i}_{k}" for i in range(6) for k in range(2)],
        sketches=[sketches[i] for i in range(6) for _ in range(2)],
        drawings=[None] * 12,
        photo_of=np.repeat(np.arange(6), 2),
    )


def test_sketches_find_the_photos_that_look_like_them() -> None:
    evaluation = evaluate_retrieval(Pixels(), pairs(), "cpu", batch=4)
    assert evaluation.metrics.acc1 == 1
    assert (evaluation.metrics.queries, evaluation.metrics.gallery) == (12, 7)
    assert [q["sketch_id"] for q in evaluation.per_query] == pairs().sketch_ids
    third = evaluation.per_query[4]
    assert (third["photo"], third["rank"]) == ("photo2", 1)
    assert third["top"][0] == "photo2"
    assert sorted(third["top"]) == pairs().photo_ids
    assert evaluation.ranks.tolist() == [1] * 12


def test_every_photo_and_every_sketch_is_embedded_once() -> None:
    model = Pixels()
    evaluate_retrieval(model, pairs(), "cpu", batch=5)
    assert (model.photos, model.sketches) == (7, 12)


def test_the_model_is_evaluated_in_evaluation_mode_and_comes_back_in_its_own() -> None:
    for mode in (True, False):
        model = Pixels().train(mode)
        evaluate_retrieval(model, pairs(), "cpu", batch=64)
        assert model.modes == {False}
        assert model.training is mode


def test_the_size_of_the_batch_changes_nothing() -> None:
    one = evaluate_retrieval(Pixels(), pairs(), "cpu", batch=1)
    assert one == evaluate_retrieval(Pixels(), pairs(), "cpu", batch=64)


def test_more_photos_make_it_harder_and_a_known_photo_is_searched_once() -> None:
    known = pairs()
    twins = known.photos[:2]  # Look like photos 0 and 1 under other ids.
    more = [
        (["twin0", "photo3", "twin1"], np.concatenate([twins[:1], known.photos[3:4], twins[1:]]))
    ]
    evaluation = evaluate_retrieval(Pixels(), known, "cpu", batch=2, extra_gallery=more)
    assert evaluation.metrics.gallery == 9
    assert evaluation.ranks.tolist() == [2] * 4 + [1] * 8
    assert evaluation.per_query[0]["top"][:2] == ["twin0", "photo0"]


class Narrow(Pixels):
    """Sees little of a picture, and another part of its mirror image."""

    def _embed(self, picture: torch.Tensor) -> torch.Tensor:
        view = torch.randn(SIDE * SIDE, 3, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(picture.flatten(1).float() @ view, dim=1)


def test_with_mirror_a_similarity_is_the_mean_of_both_images() -> None:
    given, network = pairs(), Narrow()
    sketches = torch.from_numpy(rasterise(given.sketches, SIDE))
    photos = torch.from_numpy(given.photos)
    plain = network.embed_sketches(sketches) @ network.embed_photos(photos).T
    flipped = network.embed_sketches(sketches.flip(-1)) @ network.embed_photos(photos.flip(-1)).T
    found = evaluate_retrieval(network, given, "cpu", mirror=True)
    alike = (plain + flipped).numpy()
    order = [[given.photo_ids[i] for i in np.argsort(-row)] for row in alike]
    assert [query["top"] for query in found.per_query] == order
    assert found.per_query != evaluate_retrieval(network, given, "cpu").per_query


def test_an_evaluation_comes_back_from_json() -> None:
    evaluation = evaluate_retrieval(Pixels(), pairs(), "cpu")
    values = json.loads(json.dumps(evaluation.to_json()))
    assert Evaluation.from_json(values) == evaluation


def test_metrics_and_reports_do_not_load_torch() -> None:
    code = "import sys, sbir_ray.evaluate, sbir_ray.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
