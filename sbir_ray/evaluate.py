"""How well sketches find their photos: ranks, acc@k, intervals, and the difference of two models.

The numbers are made by numpy alone; torch is used for the embeddings only. A rank is the place of
the one relevant photo in the whole gallery. Ties count against the model, so that a network that
maps everything to one point is last and not first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data.pairs import PairSet
from sbir_ray.data.raster import rasterise

if TYPE_CHECKING:
    import torch

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

RESAMPLES = 2000
"""Bootstrap resamples behind every interval."""
TOP = 10
"""Photos listed for each query."""
NAMES = ("acc@1", "acc@5", "acc@10", "mean_rank", "median_rank", "mAP")
"""The metrics that carry an interval, in the order in which they are shown."""
_BLOCK = 1 << 22
"""Numbers held at once while scores are made (32 MB of float64)."""
_TIE = 1e-12
"""Relative difference below which two distances are the same: rounding of float64 sums."""


# --------------------------------------------------------------------------- ranks


def ranks(query_QD: NDArray[Any], gallery_PD: NDArray[Any], target_Q: NDArray[Any]) -> Ints:
    """The rank of each query's photo in the gallery.

    1 + the number of gallery photos, other than the target, that are at least as near to the query
    (Euclidean distance; for unit vectors the order of the cosine). At no time are all Q x P scores
    held.

    Args:
        query_QD: embeddings of the sketches.
        gallery_PD: embeddings of the photos.
        target_Q: for each query the row of its photo in ``gallery_PD``.

    Returns:
        (Q,) int64, 1 to P.

    Raises:
        ValueError: shapes that do not fit, a target outside the gallery, or an embedding that is
            not finite (a comparison with NaN would count for the model).
    """
    return _search(query_QD, gallery_PD, target_Q, top=0)[0]


def _search(
    query_QD: NDArray[Any], gallery_PD: NDArray[Any], target_Q: NDArray[Any], top: int
) -> tuple[Ints, Ints]:
    """Ranks (Q,) and, nearest first, the ``top`` rows of the gallery (Q, min(top, P)).

    The list agrees with the rank: the target comes after the photos that it is tied with.
    """
    target_Q = _checked(query_QD, gallery_PD, target_Q)
    queries, photos = len(query_QD), len(gallery_PD)
    own_Q = np.concatenate(
        [_own_scores(query_QD[s], gallery_PD, target_Q[s]) for s in _slices(query_QD)]
        or [np.zeros(0)]
    )
    nearer_Q = np.zeros(queries, dtype=np.int64)
    kept = min(top, photos - 1)
    best_QK = np.full((queries, kept), -np.inf)
    found_QK = np.full((queries, kept), -1, dtype=np.int64)
    for p in _slices(gallery_PD):
        gallery = gallery_PD[p].astype(np.float64)
        half_norm = 0.5 * np.einsum("pd,pd->p", gallery, gallery)
        for q in _slices(query_QD):
            scores = query_QD[q].astype(np.float64) @ gallery.T - half_norm
            rows = np.arange(q.start, q.stop)
            inside = (target_Q[q] >= p.start) & (target_Q[q] < p.stop)
            scores[np.flatnonzero(inside), target_Q[q][inside] - p.start] = -np.inf
            bar = own_Q[q] - _TIE * np.maximum(1.0, np.abs(own_Q[q]))
            nearer_Q[q] += np.count_nonzero(scores >= bar[:, None], axis=1)
            if kept:
                columns = np.broadcast_to(np.arange(p.start, p.stop), scores.shape)
                both = np.concatenate([best_QK[rows], scores], axis=1)
                ids = np.concatenate([found_QK[rows], columns], axis=1)
                order = np.argsort(-both, axis=1, kind="stable")[:, :kept]
                best_QK[q] = np.take_along_axis(both, order, axis=1)
                found_QK[q] = np.take_along_axis(ids, order, axis=1)
    rank_Q = nearer_Q + 1
    lists = found_QK if kept == top else np.pad(found_QK, ((0, 0), (0, 1)))
    for row in np.flatnonzero(rank_Q <= top):
        whole = np.insert(found_QK[row], rank_Q[row] - 1, target_Q[row])
        lists[row] = whole[: lists.shape[1]]
    return rank_Q, lists


def _own_scores(query: NDArray[Any], gallery_PD: NDArray[Any], target: Ints) -> Floats:
    photo = gallery_PD[target].astype(np.float64)
    product = np.einsum("qd,qd->q", query.astype(np.float64), photo)
    return np.asarray(product - 0.5 * np.einsum("qd,qd->q", photo, photo))


def _slices(rows_ND: NDArray[Any]) -> Iterator[slice]:
    # At most 1024 rows, so that a block of scores is small too.
    step = min(1024, max(1, _BLOCK // max(1, rows_ND.shape[1])))
    for start in range(0, len(rows_ND), step):
        yield slice(start, min(start + step, len(rows_ND)))


def _checked(query_QD: NDArray[Any], gallery_PD: NDArray[Any], target_Q: NDArray[Any]) -> Ints:
    if query_QD.ndim != 2 or gallery_PD.ndim != 2 or query_QD.shape[1] != gallery_PD.shape[1]:
        raise ValueError(f"embeddings of shapes {query_QD.shape} and {gallery_PD.shape}")
    target = np.asarray(target_Q, dtype=np.int64)
    if target.shape != (len(query_QD),):
        raise ValueError(f"{len(query_QD)} queries, targets of shape {target.shape}")
    if len(target) and not (target.min() >= 0 and target.max() < len(gallery_PD)):
        raise ValueError(f"a target is outside the gallery of {len(gallery_PD)} photos")
    for name, rows in (("query", query_QD), ("gallery", gallery_PD)):
        if not all(np.isfinite(rows[s]).all() for s in _slices(rows)):
            raise ValueError(f"a {name} embedding is not finite")
    return target


# --------------------------------------------------------------------------- metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What the ranks of many queries come to."""

    acc1: float
    """Share of the queries, in [0, 1], whose photo is first."""
    acc5: float
    """Share whose photo is among the first 5."""
    acc10: float
    """Share whose photo is among the first 10."""
    mean_rank: float
    median_rank: float
    mean_ap: float
    """Mean average precision. One photo is relevant to each query, so this is the mean of 1 / rank
    (the mean reciprocal rank)."""
    queries: int
    gallery: int
    """Photos searched."""
    ci95: dict[str, tuple[float, float]]
    """For each name of :data:`NAMES` the 95% percentile bootstrap interval. PHOTOS are resampled,
    each with all its sketches, because the sketches of one photo succeed and fail together. It
    covers the choice of photos to test on, not the luck of a training run, and is a point where all
    queries did alike."""

    @property
    def chance(self) -> dict[str, float]:
        """What a random order of the gallery gives on average, for each of :data:`NAMES`."""
        places = np.arange(1, self.gallery + 1)
        return {
            **{f"acc@{k}": min(1.0, k / self.gallery) for k in (1, 5, 10)},
            "mean_rank": (self.gallery + 1) / 2,
            "median_rank": (self.gallery + 1) / 2,
            "mAP": float(np.mean(1 / places)),
        }

    def value(self, name: str) -> float:
        """The metric called ``name`` in :data:`NAMES`."""
        fields = (self.acc1, self.acc5, self.acc10, self.mean_rank, self.median_rank, self.mean_ap)
        return dict(zip(NAMES, fields, strict=True))[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys.

        ``acc@1``, ``acc@5``, ``acc@10``, ``mAP`` in [0, 1]; ``mean_rank``, ``median_rank`` from 1;
        ``queries``, ``gallery`` counts; ``ci95`` {metric: [low, high]} of the first six.
        """
        return {
            **{name: self.value(name) for name in NAMES},
            "queries": self.queries,
            "gallery": self.gallery,
            "ci95": {name: list(self.ci95[name]) for name in NAMES},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Metrics:
        """The inverse of :meth:`to_json`. Raises KeyError where a key is missing."""
        ci95 = {name: (float(lo), float(hi)) for name, (lo, hi) in values["ci95"].items()}
        return cls(
            acc1=values["acc@1"],
            acc5=values["acc@5"],
            acc10=values["acc@10"],
            mean_rank=values["mean_rank"],
            median_rank=values["median_rank"],
            mean_ap=values["mAP"],
            queries=values["queries"],
            gallery=values["gallery"],
            ci95={name: ci95[name] for name in NAMES},
        )


class Difference(TypedDict):
    """Of two models on the same queries: the first minus the second, in shares (0.03: 3 points)."""

    difference: dict[str, float]
    """``acc@1`` and ``acc@10``."""
    ci95: dict[str, list[float]]
    """For each the 95% interval [low, high] of the paired bootstrap."""


def summarise(
    ranks_Q: NDArray[Any], photo_of: Sequence[int] | Ints, gallery: int, seed: int = 0
) -> Metrics:
    """The metrics of ``ranks_Q`` with their intervals.

    Args:
        ranks_Q: (Q,) from 1.
        photo_of: (Q,) which photo each sketch is of: the cluster that is resampled.
        gallery: photos searched.
        seed: of the bootstrap.

    Raises:
        ValueError: no queries, or counts that do not fit.
    """
    rank_Q = np.asarray(ranks_Q, dtype=np.int64)
    if len(rank_Q) == 0 or not (rank_Q.min() >= 1 and rank_Q.max() <= gallery):
        raise ValueError(f"{len(rank_Q)} ranks in a gallery of {gallery} photos")
    values_QM = _values(rank_Q)
    order = np.argsort(rank_Q, kind="stable")
    sorted_ranks = rank_Q[order]
    draws: list[Floats] = []
    for weights_RQ in _resamples(photo_of, len(rank_Q), seed):
        means = _weighted_means(weights_RQ, values_QM)
        medians = _weighted_medians(weights_RQ[:, order], sorted_ranks)
        draws.append(np.column_stack([means, medians]))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5], axis=0)
    columns = ("acc@1", "acc@5", "acc@10", "mean_rank", "mAP", "median_rank")
    interval = {n: (float(a), float(b)) for n, a, b in zip(columns, low, high, strict=True)}
    acc1, acc5, acc10, mean_rank, mean_ap = (float(v) for v in values_QM.mean(axis=0))
    return Metrics(
        acc1=acc1,
        acc5=acc5,
        acc10=acc10,
        mean_rank=mean_rank,
        median_rank=float(np.median(rank_Q)),
        mean_ap=mean_ap,
        queries=len(rank_Q),
        gallery=gallery,
        ci95={name: interval[name] for name in NAMES},
    )


def paired_difference(
    ranks_a: NDArray[Any],
    ranks_b: NDArray[Any],
    photo_of: Sequence[int] | Ints,
    seed: int = 0,
) -> Difference:
    """acc@1 and acc@10 of model a minus those of model b on the same queries, with intervals.

    Both models see the same resampled photos, so what makes a photo easy for both cancels out.

    Args:
        ranks_a: (Q,) of the one model; positive differences speak for it.
        ranks_b: (Q,) of the other, in the same order of queries.
        photo_of: (Q,) which photo each sketch is of.
        seed: of the bootstrap.

    Raises:
        ValueError: the numbers of queries differ, or there are none.
    """
    a, b = np.asarray(ranks_a), np.asarray(ranks_b)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"ranks of shapes {a.shape} and {b.shape} are not of the same queries")
    gain_Q2 = np.stack([(a <= k).astype(float) - (b <= k) for k in (1, 10)], axis=1)
    draws = [_weighted_means(w, gain_Q2) for w in _resamples(photo_of, len(a), seed)]
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5], axis=0)
    mean = gain_Q2.mean(axis=0)
    return {
        "difference": {f"acc@{k}": float(mean[i]) for i, k in enumerate((1, 10))},
        "ci95": {f"acc@{k}": [float(low[i]), float(high[i])] for i, k in enumerate((1, 10))},
    }


def _values(rank_Q: Ints) -> Floats:
    """(Q, 5): acc@1, acc@5, acc@10, rank, 1 / rank of each query."""
    hits = [(rank_Q <= k).astype(np.float64) for k in (1, 5, 10)]
    return np.stack([*hits, rank_Q.astype(np.float64), 1 / rank_Q], axis=1)


def _resamples(photo_of: Sequence[int] | Ints, queries: int, seed: int) -> Iterator[Ints]:
    """Blocks (R, Q) of how often each query is in a resample: as often as its photo was drawn."""
    photos, cluster_Q = np.unique(np.asarray(photo_of), return_inverse=True)
    if cluster_Q.shape != (queries,):
        raise ValueError(f"{queries} queries, photos of shape {cluster_Q.shape}")
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // queries)
    for start in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - start)
        drawn = rng.multinomial(len(photos), np.full(len(photos), 1 / len(photos)), size=count)
        yield drawn[:, cluster_Q]


def _weighted_means(weights_RQ: Ints, values_QM: Floats) -> Floats:
    total = weights_RQ.sum(axis=1, keepdims=True)
    return np.asarray((weights_RQ @ values_QM) / total)


def _weighted_medians(weights_RQ: Ints, sorted_Q: Ints) -> Floats:
    """(R,) medians of ``sorted_Q`` with each value repeated as often as its weight says."""
    below_RQ = weights_RQ.cumsum(axis=1)
    total = below_RQ[:, -1:]
    lower = (below_RQ < (total + 1) // 2).sum(axis=1)
    upper = (below_RQ < total // 2 + 1).sum(axis=1)
    return np.asarray((sorted_Q[lower] + sorted_Q[upper]) / 2)


# --------------------------------------------------------------------------- a model


class Embedder(Protocol):
    """A retrieval network: unit vectors for photos and sketches in one space."""

    training: bool

    def train(self, mode: bool = True) -> object:
        """Switch training mode on or off, as ``torch.nn.Module`` does."""

    def embed_photos(self, photo_B3SS: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, S, S) to (B, d)."""

    def embed_sketches(self, raster_BSS: torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S), 255 = ink, to (B, d)."""


class QueryResult(TypedDict):
    """How one sketch did."""

    sketch_id: str
    photo: str
    """The id of its photo."""
    rank: int
    top: list[str]
    """Ids of the :data:`TOP` nearest photos, nearest first; agrees with ``rank``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The metrics of a model and how each query did."""

    metrics: Metrics
    per_query: list[QueryResult]
    """In the order of the pairs' sketches."""

    def to_json(self) -> dict[str, Any]:
        """``metrics`` (:meth:`Metrics.to_json`) and ``per_query``."""
        return {"metrics": self.metrics.to_json(), "per_query": list(self.per_query)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`. Raises KeyError where a key is missing."""
        return cls(
            metrics=Metrics.from_json(values["metrics"]), per_query=list(values["per_query"])
        )

    @property
    def ranks(self) -> Ints:
        """(Q,) ranks in the order of the queries, for :func:`paired_difference`."""
        return np.array([query["rank"] for query in self.per_query], dtype=np.int64)


def evaluate_retrieval(
    model: Embedder,
    pairs: PairSet,
    device: torch.device | str,
    batch: int = 64,
    extra_gallery: Iterable[tuple[Sequence[str], Bytes]] | None = None,
    mirror: bool = False,
) -> Evaluation:
    """Search the pairs' photos with each of their sketches.

    Every photo and every sketch is embedded once, sketches as in training: as they were drawn where
    they came as pictures, else rasterised. The model is left in the mode in which it came.

    Args:
        model: the retrieval network, on ``device``.
        pairs: the queries and their photos.
        batch: photos or sketches embedded at a time.
        extra_gallery: batches (photo ids, uint8 (B, 3, S, S)) of further photos to search, which
            make it harder; a photo that the gallery has already is left out.
        mirror: compare the mirror images too; a similarity is the mean of both.

    Raises:
        ValueError: the model's embeddings are not finite.
    """
    import torch  # Here, so that reading results and writing reports does not load torch.

    def embed(network: Callable[[torch.Tensor], torch.Tensor], rows: Bytes) -> NDArray[np.float32]:
        inputs = torch.from_numpy(np.ascontiguousarray(rows)).to(device)
        vectors = network(inputs).float()
        if mirror:
            # Beside each other: in a sum, what looks left would be like what looks right.
            vectors = torch.cat([vectors, network(inputs.flip(-1)).float()], dim=1) / 2**0.5
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    ids = list(pairs.photo_ids)
    was_training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            gallery = [
                embed(model.embed_photos, pairs.photos[start : start + batch])
                for start in range(0, len(ids), batch)
            ]
            queries = [
                embed(
                    model.embed_sketches,
                    pictures(pairs, range(len(pairs.sketches))[start : start + batch]),
                )
                for start in range(0, len(pairs.sketches), batch)
            ]
            known = set(ids)
            for more_ids, more_photos in extra_gallery or ():
                new = []
                for i, photo_id in enumerate(more_ids):
                    if photo_id not in known:
                        known.add(photo_id)
                        new.append(i)
                for start in range(0, len(new), batch):
                    rows = new[start : start + batch]
                    gallery.append(embed(model.embed_photos, more_photos[rows]))
                    ids.extend(more_ids[i] for i in rows)
    finally:
        model.train(was_training)
    photo_of = np.asarray(pairs.photo_of, dtype=np.int64)
    rank_Q, top_QK = _search(np.concatenate(queries), np.concatenate(gallery), photo_of, TOP)
    per_query: list[QueryResult] = [
        {
            "sketch_id": sketch_id,
            "photo": ids[photo],
            "rank": int(rank),
            "top": [ids[i] for i in top],
        }
        for sketch_id, photo, rank, top in zip(
            pairs.sketch_ids, photo_of, rank_Q, top_QK, strict=True
        )
    ]
    return Evaluation(metrics=summarise(rank_Q, photo_of, len(ids)), per_query=per_query)


def pictures(pairs: PairSet, chosen: Sequence[int] | Ints) -> Bytes:
    """The chosen sketches as pictures (n, S, S), not augmented: as they were drawn where they came
    as pictures, else rasterised."""
    found = rasterise([pairs.sketches[i] for i in chosen], pairs.photos.shape[-1])
    for place, i in enumerate(chosen):
        drawing = pairs.drawings[i]
        if drawing is not None:
            found[place] = drawing
    return found
