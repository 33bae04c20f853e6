"""How well drawings of photos find their photo, by a judge (the paper's Table 1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sbir_ray.data.pairs import PairSet, Split
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import Strokes
from sbir_ray.evaluate import evaluate_retrieval, ranks
from sbir_ray.runs import load_retrieval
from sbir_ray.stream.sketchers import SketcherSpec, row_seed
from sbir_ray.study.intervals import Found
from sbir_ray.study.people import PEOPLE

_AT_ONCE = 32


def judged(
    sketcher: SketcherSpec,
    seed: int,
    judge: Path,
    folder: Path,
    split: Split,
    gallery: Path | None = None,
) -> Found:
    """The ranks of the photos of a split for the drawings that a sketcher makes of them.

    A photo for which nothing was drawn is last.

    Args:
        sketcher: its source may be :data:`PEOPLE` too; on its device the judge runs as well.
        seed: of the drawings.
        judge: RUN of an F that had no part in the sketcher's training.
        folder: PAIRS folder.
        gallery: PHOTOS folder whose photos are searched as well.

    Raises:
        UserError: not such runs, folders or split.
    """
    model = load_retrieval(judge).model.to(sketcher.device).eval()
    size = model.config.image_size
    pairs = PairSet.load(folder, split, size)
    more = None if gallery is None else PhotoSet.load(gallery, size)
    if sketcher.source == PEOPLE:
        extra = None if more is None else [(more.photo_ids, more.photos)]
        found = evaluate_retrieval(model, pairs, sketcher.device, extra_gallery=extra)
        photos = [query["photo"] for query in found.per_query]
        return Found(photos, found.ranks.tolist(), found.metrics.gallery)
    drawings = _drawings(sketcher, seed, folder, split)
    searched = pairs.photos
    if more is not None:
        known = set(pairs.photo_ids)
        new = [i for i, photo in enumerate(more.photo_ids) if photo not in known]
        searched = np.concatenate([searched, more.photos[new]])
    photo_PD = _embedded(model.embed_photos, searched, sketcher.device)
    sketch_PD = _embedded(model.embed_sketches, rasterise(drawings, size), sketcher.device)
    rank_P = ranks(sketch_PD, photo_PD, np.arange(len(drawings)))
    rank_P[[not drawing for drawing in drawings]] = len(searched)
    return Found(pairs.photo_ids, rank_P.tolist(), len(searched))


def _drawings(spec: SketcherSpec, seed: int, folder: Path, split: Split) -> list[Strokes]:
    """One of each photo of the split, in its order."""
    sketcher = spec.make()
    pairs = PairSet.load(folder, split, sketcher.image_size)
    photos_BHW3 = np.ascontiguousarray(pairs.photos.transpose(0, 2, 3, 1))
    seeds = [row_seed(seed, photo, 0) for photo in pairs.photo_ids]
    found: list[Strokes] = []
    for start in range(0, len(seeds), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found += [drawn.strokes for drawn in sketcher.draw(photos_BHW3[part], seeds[part])]
    return found


def _embedded(
    network: Callable[[torch.Tensor], torch.Tensor], pictures: NDArray[np.uint8], device: str
) -> NDArray[np.float32]:
    """(N, D)"""
    with torch.inference_mode():
        parts = [
            network(torch.from_numpy(pictures[i : i + _AT_ONCE]).to(device)).float().cpu().numpy()
            for i in range(0, len(pictures), _AT_ONCE)
        ]
    return np.concatenate(parts)
