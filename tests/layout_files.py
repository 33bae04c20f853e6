"""Folders of photos and sketches as people have them, and what was imported of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sbir_ray.data import formats
from sbir_ray.data.layouts import ImportOptions, ImportReport, import_pairs
from sbir_ray.data.pairs import Split, iter_photos, iter_sketches
from sbir_ray.data.sources import (
    DisagreementError,
)

LINE = [np.array([[0, 0], [50, 90], [100, 20]], np.float32)]


def draw_photo(path: Path, seed: int | None = None, **save: object) -> None:
    """A photo that is unlike those of other names."""
    rng = np.random.default_rng(list("/".join(path.parts[-2:]).encode()) if seed is None else seed)
    block = Image.fromarray(rng.integers(0, 200, (5, 5, 3), np.uint8))
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(block.resize((48, 40), Image.Resampling.NEAREST), (8, 12))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **save)


def draw_sketch(path: Path, scale: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        picture = Image.new("L", (100, 100), 255)
        ImageDraw.Draw(picture).line([(10, 10), (90, 10), (90, 70)], fill=0, width=3)
        picture.save(path)
    else:
        formats.write_sketches(path, [(path.stem, [scale * LINE[0]])])


def tree(root: Path, photos: list[str], sketches: list[str]) -> Path:
    for name in photos:
        draw_photo(root / "photos" / name)
    for name in sketches:
        draw_sketch(root / "sketches" / name)
    return root


def owners(folder: Path) -> dict[str, str]:
    """The photo of each sketch, by the sketch's origin."""
    names = {row["photo_id"]: row["name"] for row in iter_photos(folder)}
    return {row["origin"]: names[row["photo_id"]] for row in iter_sketches(folder)}


def split_of(folder: Path) -> dict[str, Split]:
    return {row["name"]: row["split"] for row in iter_photos(folder)}


def imported(src: Path, **options: object) -> tuple[ImportReport, Path]:
    out = src.parent / "out"
    return import_pairs(src, "folder", out, ImportOptions(**options)), out  # type: ignore[arg-type]


def disagreements(src: Path, **options: object) -> dict[str, list[str]]:
    with pytest.raises(DisagreementError) as error:
        imported(src, **options)
    assert error.value.exit_code == 2
    assert not (src.parent / "out").exists()
    found: dict[str, list[str]] = {}
    for item in error.value.disagreements:
        found.setdefault(item.kind, []).append(item.text)
        assert item.text in str(error.value)
    return found
