"""What trained networks and pseudo pairs are worth: evaluations of runs, and of stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sbir_ray.data.pairs import PairSet, Split
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.raster import rasterise
from sbir_ray.errors import UserError
from sbir_ray.evaluate import Evaluation, evaluate_retrieval, ranks
from sbir_ray.runlog import versions, write_json_atomic
from sbir_ray.runs import load_retrieval
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.strict import SCHEMA_VERSION


def evaluate_run(
    run: Path,
    folder: Path,
    split: Split,
    *,
    gallery: Path | None = None,
    mirror: bool = False,
    gpu: bool = False,
) -> Evaluation:
    """Evaluate a retrieval network's run on a split of a PAIRS folder.

    Writes ``run/evaluation-<split>.json``.

    Args:
        gallery: a photo store whose photos are searched as well.

    Raises:
        UserError: not such a run, folder or split.
    """
    trained = load_retrieval(run)
    size = trained.model.config.image_size
    pairs = PairSet.load(folder, split, size)
    if not pairs.sketches:
        raise UserError(f"{folder}: no sketches in {split} to search with")
    device = "cuda" if gpu else "cpu"
    more = None
    if gallery is not None:
        others = PhotoSet.load(gallery, size)
        more = [(others.photo_ids, others.photos)]
    evaluation = evaluate_retrieval(
        trained.model.to(device), pairs, device, extra_gallery=more, mirror=mirror
    )
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "split": split,
        "pairs": str(folder.resolve()),
        "gallery": None if gallery is None else str(gallery.resolve()),
        "mirror": mirror,
        "step": trained.version,
        "weights": trained.digest,
        "versions": versions(),
        **evaluation.to_json(),
    }
    write_json_atomic(run / f"evaluation-{split}.json", record)
    return evaluation


def pseudo_ranks(run: Path, pseudo: PseudoSet, batch: int = 64) -> NDArray[np.int64]:
    """(M,) rank of each pseudo sketch's own photo among the store's photos, by a run's network.

    How well generated sketches of photos retrieve their photo (the paper's Table 1 and Fig. 4a).

    Args:
        pseudo: loaded at the network's image size.
    """
    model = load_retrieval(run).model
    size = model.config.image_size
    with torch.inference_mode():
        photos = [
            model.embed_photos(torch.from_numpy(pseudo.photos[i : i + batch])).numpy()
            for i in range(0, len(pseudo.photos), batch)
        ]
        sketches = [
            model.embed_sketches(
                torch.from_numpy(rasterise(pseudo.sketches[i : i + batch], size))
            ).numpy()
            for i in range(0, len(pseudo.sketches), batch)
        ]
    return ranks(np.concatenate(sketches), np.concatenate(photos), pseudo.photo_of)
