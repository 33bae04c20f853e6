"""What the pen generator learns from beside people's sketches: traced contours, slips, frames.

Shapes: N photos, S the image's side, n points of a sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sbir_ray.config import PenConfig
from sbir_ray.data import trace
from sbir_ray.data.strokes import CENTRE, Strokes, fit
from sbir_ray.models.drawing import PEN_START

_FINER = 0.6
"""Tolerance of the contours' simplification, as a share of that of people's sketches."""
_SLIPPING = 0.8
"""Share of the rows in which the pen slips."""


@dataclass(frozen=True)
class Traced:
    """Contours of photos."""

    photo: list[int]
    """Number of each one's photo."""
    sketches: list[Strokes]

    @classmethod
    def of(cls, photos_N3SS: NDArray[np.uint8], max_points: int, epsilon: float) -> Traced:
        """The contours of aligned photos, of those that have any."""
        numbers, sketches = [], []
        for number, photo_3SS in enumerate(photos_N3SS):
            contours = trace.trace_photo(np.ascontiguousarray(photo_3SS.transpose(1, 2, 0)))
            if contours:
                numbers.append(number)
                sketches.append(fit(contours, max_points, _FINER * epsilon))
        return cls(numbers, sketches)


def framed(
    sketch: Strokes, rng: np.random.Generator, config: PenConfig
) -> tuple[Strokes, NDArray[np.float32]]:
    """The sketch as if its photo had been turned, stretched and moved, and the way back (2, 3) from
    its canvas to the photo's (``models.generator.Seen.frame_B23``)."""
    angle = math.radians(rng.uniform(-config.rotate, config.rotate))
    cos, sin = math.cos(angle), math.sin(angle)
    scale_2 = 1 + rng.uniform(-config.scale, config.scale, 2)
    turn_22 = np.array([[cos, -sin], [sin, cos]]) * scale_2[:, None]
    shift_2 = rng.uniform(-config.shift, config.shift, 2)
    moved = [
        ((stroke - CENTRE) @ turn_22.T + (CENTRE + shift_2)).astype(np.float32) for stroke in sketch
    ]
    back_22 = np.linalg.inv(turn_22)
    frame_23 = np.concatenate([back_22, (-back_22 @ shift_2)[:, None]], 1)
    return moved, frame_23.astype(np.float32)


def slipped(
    rows_n5: NDArray[np.float32],
    slip: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The rows before each row, as a pen that slips made them, and the rows that lead from there to
    where the sketch goes on.

    Args:
        rows_n5: stroke-5 rows of a sketch, with its end row.
        slip: standard deviation of the pen's places, in units of the offsets.
    """
    place_n2 = rows_n5[:-1, :2].cumsum(0, dtype=np.float64)
    slips_n2 = rng.normal(0, slip, place_n2.shape) * (rng.random() < _SLIPPING)
    pen_n2 = place_n2 + slips_n2
    from_n2 = np.concatenate([np.zeros((1, 2)), pen_n2[:-1]])
    before, target = rows_n5.copy(), rows_n5.copy()
    before[0] = PEN_START
    before[1:, :2] = pen_n2 - from_n2
    before[1:, 2:] = rows_n5[:-1, 2:]
    target[:-1, :2] = place_n2 - from_n2
    return before, target
