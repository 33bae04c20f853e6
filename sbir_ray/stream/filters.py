"""Which drawings become pseudo pairs: thresholds, and the teacher's rank of the photo.

Shapes: B photos with a drawing each, R reference photos, S the side of the teacher's pictures, D
the length of an embedding. torch is loaded by the teacher alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.config import FilterConfig
from sbir_ray.data.photos import align, chosen_rows, decode_stored
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import Strokes, count_points
from sbir_ray.errors import UserError
from sbir_ray.stream.sketchers import Drawn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sbir_ray.models.retrieval import RetrievalNet

Keep = Literal["best", "all"]
NOT_BEST = "not-best"
"""Reason of a drawing that passes the filters, beside a better one of its photo."""
REFERENCES = 512
"""Most photos among which a photo is ranked."""

_INK_SIDE = 64
_TIE = 1e-6
"""Difference below which two cosines are the same: rounding of float32 sums."""
_GPU_BATCH = 64


def filter_reason(drawn: Drawn, filters: FilterConfig) -> str:
    """The first setting by which a drawing is left out, or "" if it is kept.

    A certainty or log-probability that is not a number is below every least one.
    """
    points, strokes = count_points(drawn.strokes), len(drawn.strokes)
    ink = _ink(drawn.strokes) if filters.min_ink > 0 or filters.max_ink < 1 else 0.0
    met = {
        "min_certainty": drawn.certainty >= filters.min_certainty,
        "min_log_prob": not drawn.rows or drawn.log_prob / drawn.rows >= filters.min_log_prob,
        "require_end": drawn.ended or not filters.require_end,
        "min_points": points >= filters.min_points,
        "max_points": points <= filters.max_points,
        "min_strokes": strokes >= filters.min_strokes,
        "max_strokes": strokes <= filters.max_strokes,
        "min_ink": ink >= filters.min_ink,
        "max_ink": ink <= filters.max_ink,
        "max_rank": not filters.max_rank or drawn.rank <= filters.max_rank,
    }
    return next((name for name, holds in met.items() if not holds), "")


def choose(drawn: Sequence[Drawn], filters: FilterConfig, keep: Keep) -> list[str]:
    """Why each of one photo's drawings is left out, or "" for those that are kept.

    A drawing is left out by the first filter that it does not meet; or, where only the best is
    kept, as :data:`NOT_BEST`. The best is the one by which the photo's rank is the least, then of
    the largest similarity, certainty and mean log-probability, and then the first.
    """
    reasons = [filter_reason(one, filters) for one in drawn]
    passed = [i for i, reason in enumerate(reasons) if not reason]
    if keep == "best" and passed:
        best = max(passed, key=lambda i: (_quality(drawn[i]), -i))
        for i in passed:
            if i != best:
                reasons[i] = NOT_BEST
    return reasons


def _quality(drawn: Drawn) -> tuple[float, ...]:
    """Larger is better; what is not a number is worst."""
    mean = drawn.log_prob / max(drawn.rows, 1)
    numbers = (-drawn.rank, drawn.similarity, drawn.certainty, mean)
    return tuple(-math.inf if math.isnan(number) else number for number in numbers)


def refuse_without_effect(
    filters: FilterConfig, name: str, *, generative: bool, judged: bool, ranked: bool
) -> None:
    """Refuse settings that no drawing of a sketcher can fail.

    Args:
        name, generative, judged: of the sketcher.
        ranked: whether a teacher ranked its drawings' photos.

    Raises:
        UserError: the setting, why it has no effect, and what to do.
    """
    if filters.min_certainty > 0 and not judged:
        raise UserError(
            f"filters.min_certainty={filters.min_certainty:g}: {name} has no discriminator, so all "
            "certainties are 1; leave it at 0"
        )
    if filters.min_log_prob != FilterConfig().min_log_prob and not generative:
        raise UserError(
            f"filters.min_log_prob={filters.min_log_prob:g}: {name} draws without chance, so there "
            "is no log-probability; leave it out"
        )
    if filters.require_end and not generative:
        raise UserError(f"filters.require_end=true: {name} always ends; leave it at false")
    if filters.max_rank > 0 and not ranked:
        raise UserError(
            f"filters.max_rank={filters.max_rank}: ranks are a teacher's; give --teacher RUN to "
            "`sbir-ray sketch`"
        )


def refuse_rank_above_all(filters: FilterConfig, photos: int) -> None:
    """Refuse a largest rank that no drawing can exceed beside so many photos.

    Raises:
        UserError: it is not below the largest rank that there is.
    """
    last = min(photos, REFERENCES + 1)
    if filters.max_rank >= last:
        raise UserError(
            f"filters.max_rank={filters.max_rank}: no rank is above {last} here; set less"
        )


def _ink(strokes: Strokes) -> float:
    return float((rasterise([strokes], _INK_SIDE) > 127).mean())


# --------------------------------------------------------------------------- the teacher


class TeacherRanker:
    """How near photos are to their drawings, beside other photos, by a retrieval network.

    Args:
        model: the teacher, in evaluation mode.
        reference_photos: (R, 3, S, S) the other photos, aligned at the teacher's image size.
    """

    def __init__(self, model: RetrievalNet, reference_photos: NDArray[np.uint8]) -> None:
        self.model = model
        self.image_size = model.config.image_size
        self.device = next(model.parameters()).device
        self.reference_RD = embedded(model.embed_photos, reference_photos, self.device)
        self.places: dict[bytes, list[int]] = defaultdict(list)
        """Where a photo is among the reference photos, by its pixels."""
        for place, photo_3SS in enumerate(reference_photos):
            self.places[_identity(photo_3SS)].append(place)

    def rank(self, photos_B3SS: NDArray[np.uint8], sketches: Sequence[Strokes]) -> list[int]:
        """The rank of each photo for its own drawing, as of :meth:`compare`."""
        return [rank for rank, _ in self.compare(photos_B3SS, sketches)]

    def compare(
        self, photos_B3SS: NDArray[np.uint8], sketches: Sequence[Strokes]
    ) -> list[tuple[int, float]]:
        """The rank, 1 to R + 1, and the cosine of each drawing's photo.

        The rank is 1 + the number of reference photos, other than the photo itself, that are at
        least as near to the drawing. Neither depends on the other rows of the batch.

        Args:
            photos_B3SS: aligned at the teacher's image size.
            sketches: B K of them, canonical, those of a photo side by side.
        """
        photo_BD = embedded(self.model.embed_photos, photos_B3SS, self.device)
        rasters = rasterise(sketches, self.image_size)
        sketch_MD = embedded(self.model.embed_sketches, rasters, self.device)
        each = len(sketches) // len(photos_B3SS)
        own_B = [self.places.get(_identity(photo_3SS), []) for photo_3SS in photos_B3SS]
        found: list[tuple[int, float]] = []
        for number, sketch_D in enumerate(sketch_MD):
            similarity = sketch_D @ photo_BD[number // each]
            further_R = self.reference_RD @ sketch_D < similarity - _TIE
            nearer_R = (~further_R).cpu().numpy()  # as is what cannot be compared
            nearer_R[own_B[number // each]] = False
            found.append((1 + int(nearer_R.sum()), float(similarity)))
        return found


def embedded(
    network: Callable[[Tensor], Tensor], pictures: NDArray[np.uint8], device: torch.device
) -> Tensor:
    """Embeddings (N, D) of length one; those of a picture do not depend on the others."""
    import torch

    # Copied, since what comes from Ray cannot be written to, of which torch would warn.
    picture_N = torch.tensor(pictures)
    # One at a time on a CPU, where a batch is no faster and may round differently.
    at_once = _GPU_BATCH if device.type == "cuda" else 1
    with torch.inference_mode():
        return torch.cat([network(group.to(device)) for group in picture_N.split(at_once)])


def _identity(photo_3SS: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(photo_3SS.tobytes()).digest()


@dataclass(frozen=True, slots=True)
class RankerSpec:
    """How to make a ranker, in any process."""

    run: Path
    """RUN folder of the teacher, absolute."""
    digest: str
    """Of the teacher's weights."""
    image_size: int
    """Side at which the teacher wants its photos aligned, pixels."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads of the teacher."""

    @classmethod
    def of_run(cls, run: Path, device: str = "cpu", threads: int = 1) -> RankerSpec:
        """The spec of a run's retrieval network.

        Raises:
            UserError: not the run of a retrieval network.
            DamagedError: a run without a whole checkpoint.
        """
        from sbir_ray.runs import load_retrieval

        trained = load_retrieval(run)
        # Actors run in other folders.
        size = trained.model.config.image_size
        return cls(run.absolute(), trained.digest, size, device, threads)

    def make(self, reference_photos: NDArray[np.uint8]) -> TeacherRanker:
        """The ranker among these photos (R, 3, S, S); raises as :meth:`of_run`."""
        from sbir_ray.runs import load_retrieval

        return TeacherRanker(load_retrieval(self.run).model.to(self.device), reference_photos)


def reference_rows(photos: Path) -> pa.Table:
    """``photo_id`` and ``image`` of the first photos of a store in the order of their ids, at most
    :data:`REFERENCES`.

    Raises:
        UserError: not a photo store.
    """
    return chosen_rows(photos, REFERENCES, lambda name: name, ("photo_id", "image"))


def reference_photos(photos: Path | pa.Table, image_size: int) -> NDArray[np.uint8]:
    """(R, 3, S, S) :func:`reference_rows`, of a store or read before, aligned; none that is
    damaged.

    Raises:
        UserError: not a photo store.
    """
    table = photos if isinstance(photos, pa.Table) else reference_rows(photos)
    aligned = []
    for image in table["image"].to_pylist():
        try:
            rgb = decode_stored(image)
        except (OSError, SyntaxError, ValueError):  # a failed row of its own when it is drawn
            continue
        aligned.append(align(rgb, image_size).transpose(2, 0, 1))
    return np.array(aligned, np.uint8).reshape(-1, 3, image_size, image_size)
