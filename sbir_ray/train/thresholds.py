"""The pseudo pairs of a PSEUDO folder by other filters than it was drawn with: nothing is drawn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbir_ray.config import FilterConfig
from sbir_ray.data.strokes import unflatten
from sbir_ray.errors import UserError
from sbir_ray.stream.filters import choose
from sbir_ray.stream.pseudo_store import PseudoSet, iter_rows, read_header
from sbir_ray.stream.sketchers import Drawn

_COLUMNS = (
    "photo_id",
    "seed",
    "sample",
    "strokes",
    "certainty",
    "log_prob",
    "rows",
    "ended",
    "rank",
    "similarity",
    "status",
)


def chosen_pairs(folder: Path, image_size: int, filters: FilterConfig) -> PseudoSet:
    """The pairs that ``filters`` keep of all that were drawn, as drawing with them would have kept;
    with the default filters those that the folder itself kept. The set may be empty.

    Args:
        image_size: of the photos, pixels.

    Raises:
        UserError, DamagedError: as :meth:`PseudoSet.load`; or ``filters.max_rank`` where no teacher
            ranked the drawings.
    """
    if filters == FilterConfig():
        return PseudoSet.load(folder, image_size)
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in iter_rows(folder, kept_only=False, columns=list(_COLUMNS)):
        if row["status"] != "failed":
            rows_of[row["photo_id"]].append(row)
    if filters.max_rank and not any(row["rank"] for rows in rows_of.values() for row in rows):
        raise UserError(
            f"{folder}: filters.max_rank={filters.max_rank}: no teacher ranked its drawings; "
            "sketch with --teacher, or leave it at 0"
        )
    keep = read_header(folder)["settings"]["keep"]
    kept: dict[tuple[str, int], bool] = {}
    for photo, rows in rows_of.items():
        rows.sort(key=lambda row: row["sample"])
        for row, reason in zip(rows, choose([*map(_drawn, rows)], filters, keep), strict=True):
            kept[photo, row["seed"]] = not reason
    # In the order of the set.
    kept_M = np.array([kept[key] for key in sorted(kept)], bool)
    return _part(PseudoSet.load(folder, image_size, kept_only=False), kept_M)


def _drawn(row: Mapping[str, Any]) -> Drawn:
    names = ("certainty", "log_prob", "rows", "ended", "rank", "similarity")
    return Drawn(unflatten(row["strokes"]), **{name: row[name] for name in names})


def _part(pairs: PseudoSet, kept_M: NDArray[np.bool_]) -> PseudoSet:
    """Some sketches of a set, and their photos."""
    photos, photo_of = np.unique(pairs.photo_of[kept_M], return_inverse=True)
    return PseudoSet(
        photo_ids=[pairs.photo_ids[i] for i in photos],
        photos=pairs.photos[photos],
        sketches=[s for s, kept in zip(pairs.sketches, kept_M, strict=True) if kept],
        photo_of=photo_of.astype(np.int64),
        certainty=pairs.certainty[kept_M],
    )
