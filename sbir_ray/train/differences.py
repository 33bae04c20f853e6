"""Embeddings of sketches less those of their photos, to which the pair norm is fitted.

Shapes: M pairs, P photos, D the length of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbir_ray.data.pairs import PairSet
from sbir_ray.data.raster import rasterise
from sbir_ray.evaluate import pictures
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.train.position import rng_of

PAIRS = 1024
"""Pairs whose differences are taken, at most."""
_BATCH = 64


def fit_pair_norm(
    model: RetrievalNet,
    pairs: PairSet,
    pseudo: PseudoSet | None,
    device: torch.device,
    seed: int,
) -> None:
    """Fit the pair norm of a network in evaluation mode to up to :data:`PAIRS` pairs.

    People's sketches come first; pseudo pairs, weighted by their certainty as in Eq. 7, fill up
    what is left, since with few labels the differences of traced contours are better than none.
    Where there are more than are taken, ``seed`` chooses.
    """
    model.pair_norm.clear()
    people_MD = _differences(model, pairs, PAIRS, device, seed)
    parts = [people_MD]
    if pseudo is not None:
        parts.append(_differences(model, pseudo, PAIRS - len(people_MD), device, seed))
    model.pair_norm.fit(torch.cat(parts))


@torch.no_grad()
def _differences(
    model: RetrievalNet, pairs: PairSet | PseudoSet, most: int, device: torch.device, seed: int
) -> Tensor:
    order = rng_of(seed, "pair norm").permutation(len(pairs.sketches))
    chosen = np.sort(order[:most])
    photos, photo_of_M = np.unique(pairs.photo_of[chosen], return_inverse=True)

    def drawn(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        if isinstance(pairs, PairSet):
            return pictures(pairs, rows)
        return rasterise([pairs.sketches[i] for i in rows], pairs.photos.shape[-1])

    def embedded(
        network: Callable[[Tensor], Tensor],
        picture: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
        rows: NDArray[np.int64],
    ) -> Tensor:
        found = [torch.zeros(0, model.dim, device=device)]
        for start in range(0, len(rows), _BATCH):
            inputs = np.ascontiguousarray(picture(rows[start : start + _BATCH]))
            found.append(network(torch.from_numpy(inputs).to(device)).float())
        return torch.cat(found)

    photo_PD = embedded(model.embed_photos, lambda rows: pairs.photos[rows], photos)
    sketch_MD = embedded(model.embed_sketches, drawn, chosen)
    difference_MD = sketch_MD - photo_PD[torch.from_numpy(photo_of_M).to(device)]
    if isinstance(pairs, PairSet):
        return difference_MD
    # A weight of a square is the square of a factor.
    certainty_M = torch.from_numpy(pairs.certainty[chosen]).to(device)
    return certainty_M.sqrt()[:, None] * difference_MD
