"""The rows of a batch: photos and raster sketches, augmented alike, and padded sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sbir_ray.config import AugmentConfig
from sbir_ray.data import raster, strokes
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.strokes import Strokes
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.train.position import rng_of

_NOT_YET: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)


@dataclass(frozen=True)
class Row:
    """A row of a batch before it is made: which sketch, and so which photo."""

    sketch: int
    keys: tuple[object, ...]
    """What this row's augmentation depends on."""


def draw(
    pairs: PairSet | PseudoSet,
    rows: Sequence[Row],
    augment: AugmentConfig,
    photos: list[NDArray[np.uint8]],
    sketches: list[NDArray[np.uint8]],
) -> None:
    """Append the photo and the raster sketch of each row, augmented."""
    size = pairs.photos.shape[-1]
    drawn: list[Strokes] = []
    places: list[int] = []
    for row in rows:
        rng = rng_of(*row.keys)
        flip = rng.random() < augment.flip
        photos.append(mirrored(pairs.photos[pairs.photo_of[row.sketch]], flip))
        drawing = pairs.drawings[row.sketch] if isinstance(pairs, PairSet) else None
        if drawing is not None:
            sketches.append(_changed(mirrored(drawing, flip), augment, rng))
            continue
        places.append(len(sketches))
        sketches.append(_NOT_YET)
        drawn.append(augmented(pairs.sketches[row.sketch], flip, augment, rng))
    for place, picture in zip(places, raster.rasterise(drawn, size), strict=True):
        sketches[place] = picture


def augmented(
    sketch: Strokes, flip: bool, augment: AugmentConfig, rng: np.random.Generator
) -> Strokes:
    """The sketch, mirrored if its photo is, as another hand might have drawn it."""
    return strokes.deform(strokes.mirror(sketch) if flip else sketch, rng, augment)


def _changed(
    drawing: NDArray[np.uint8], augment: AugmentConfig, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A drawing that came as a picture, rotated, scaled and shifted as strokes are."""
    angle = math.radians(rng.uniform(-augment.rotate, augment.rotate))
    scale_x, scale_y = 1 + rng.uniform(-augment.scale, augment.scale, 2)
    middle = drawing.shape[0] / 2
    shift = rng.uniform(-augment.shift, augment.shift, 2) * drawing.shape[0] / strokes.CANVAS
    a, b = math.cos(angle) / scale_x, math.sin(angle) / scale_x
    d, e = -math.sin(angle) / scale_y, math.cos(angle) / scale_y
    x, y = middle + shift[0], middle + shift[1]
    back = (a, b, middle - a * x - b * y, d, e, middle - d * x - e * y)
    picture = Image.fromarray(drawing)
    turned = picture.transform(
        picture.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=0
    )
    return np.asarray(turned)


def mirrored(photo: NDArray[np.uint8], flip: bool) -> NDArray[np.uint8]:
    """A picture (..., W), flipped left to right if ``flip``."""
    return photo[..., ::-1] if flip else photo


def padded(sequences: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Stroke-5 sequences padded with end rows, and their lengths (end row included)."""
    lengths = [len(s) for s in sequences]
    points = np.zeros((len(sequences), max(lengths), 5), np.float32)
    points[..., 4] = 1
    for row, sequence in zip(points, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(points), torch.tensor(lengths)
