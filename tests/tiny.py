"""A tiny world for tests: photos of drawn shapes, and sketches of them by another hand."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from sbir_ray.config import (
    AugmentConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    GeneratorTraining,
    OptimConfig,
    PenConfig,
    RetrievalConfig,
    RetrievalTraining,
    SaveConfig,
)
from sbir_ray.data import photos
from sbir_ray.data.pairs import new_pairs
from sbir_ray.data.strokes import Strokes, canonical, flatten
from sbir_ray.joint_config import JointTraining, PolicyConfig, ScheduleConfig, StreamConfig

NO_CHANGE = AugmentConfig(flip=0.0, rotate=0.0, scale=0.0, shift=0.0, bend=0.0, stroke_dropout=0.0)


def shape(number: int) -> np.ndarray:
    """A closed polygon, other than that of any other number, canvas units."""
    rng = np.random.default_rng(number)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 4 + number % 5))
    radii = rng.uniform(45, 95, len(angles))
    corners = 128 + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return np.concatenate([corners, corners[:1]])


def photo(number: int) -> np.ndarray:
    """(128, 128, 3) the shape filled with a colour, on white."""
    image = Image.new("RGB", (256, 256), "white")
    colour = tuple(int(c) for c in np.random.default_rng(100 + number).integers(0, 200, 3))
    ImageDraw.Draw(image).polygon([tuple(p) for p in shape(number)], fill=colour)
    return np.asarray(image.resize((128, 128), Image.Resampling.LANCZOS))


def sketch(number: int, hand: int = 0) -> Strokes:
    """The shape's outline in two strokes, a little off, canonical."""
    rng = np.random.default_rng(1000 * hand + number)
    outline = shape(number) + rng.normal(0, 3, (len(shape(number)), 2))
    middle = len(outline) // 2
    return canonical(
        [outline[: middle + 1].astype(np.float32), outline[middle:].astype(np.float32)]
    )


def tiny_pairs(out: Path, train: int = 8, val: int = 2, test: int = 4, hands: int = 2) -> Path:
    """A PAIRS folder of ``train`` + ``val`` + ``test`` photos with ``hands`` sketches each."""
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    with new_pairs(out, source="tiny", layout="folder") as writer:
        for number, split in enumerate(splits):
            rgb = photo(number)
            identity = photos.photo_id(rgb.tobytes())
            row = photos.row_of_pixels(
                rgb, identity, f"shape{number:02d}", f"shape{number:02d}.png"
            )
            writer.add_photo({**row, "split": split})
            for hand in range(hands):
                writer.add_sketch(
                    {
                        "sketch_id": f"shape{number:02d}_{hand + 1}",
                        "photo_id": identity,
                        "split": split,
                        "strokes": flatten(sketch(number, hand)),
                        "drawing": None,
                        "origin": "tiny",
                    }
                )
    return out


def retrieval_config(steps: int = 4, **changes: object) -> RetrievalTraining:
    """A retrieval network that trains in seconds, with random weights."""
    return RetrievalTraining(
        **{
            "model": RetrievalConfig(weights="none", image_size=64, grid=2),
            "optim": OptimConfig(steps=steps, batch_size=4, lr=1e-3),
            "save": SaveConfig(log_every=1, checkpoint_every=2),
            **changes,
        }
    )


def generator_config(
    steps: int = 4, kind: Literal["pen", "paper"] = "pen", **changes: object
) -> GeneratorTraining:
    """A generator and a discriminator that train in seconds, with random weights."""
    return GeneratorTraining(
        model=GeneratorConfig(
            backbone="mobilenetv2",
            weights="none",
            image_size=64,
            kind=kind,
            pen=PenConfig(width=16, heads=2, blocks=1, contour_steps=1),
            latent=8,
            hidden=32,
            attention=16,
            mixtures=3,
            max_points=24,
            train_backbone=False,
        ),
        discriminator=DiscriminatorConfig(
            channels=8, layers=2, image_size=64, steps=2, batch_size=4
        ),
        optim=OptimConfig(steps=steps, batch_size=4, lr=1e-3, schedule="constant"),
        save=SaveConfig(log_every=1, checkpoint_every=2),
        **changes,
    )


def joint_config(**changes: object) -> JointTraining:
    """Joint training in seconds: a turn of two steps of F and D, then one of G."""
    settings: dict[str, object] = {
        "retrieval": retrieval_config(),
        "generator": generator_config(),
        "policy": PolicyConfig(kind="reinforce", batch_size=2),
        "schedule": ScheduleConfig(steps=4, retrieval_steps=2, generator_steps=1),
        "stream": StreamConfig(sync=True),
        "save": SaveConfig(log_every=1, checkpoint_every=2),
    }
    return JointTraining(**{**settings, **changes})
