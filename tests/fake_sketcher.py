"""A sketcher for tests that draws at once, and does on some photos what it is told to."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from sbir_ray.data import photos
from sbir_ray.data.strokes import canonical
from sbir_ray.stream.sketchers import Drawn, SketcherSpec
from tests.tiny import photo

SIDE = 32


class Fake:
    """Draws as many points as the seed says; on photos that look like one of ``plans``, worse:
    ``raise``, ``nothing``, ``die`` (always), or ``kill FILE`` (-9, unless FILE is there)."""

    name, image_size = "fake", SIDE
    generative = judged = True

    def __init__(self, spec: FakeSpec) -> None:
        self.config: dict[str, Any] = {}
        self.plans = dict(spec.plans)
        self.version, self.digest, self.seconds = spec.version, spec.digest, spec.seconds

    def draw(self, photos_BHW3, seeds):
        time.sleep(self.seconds * len(seeds))
        each = len(seeds) // len(photos_BHW3)
        return [self._one(photos_BHW3[i // each], seed) for i, seed in enumerate(seeds)]

    def _one(self, rgb, seed):
        plan = self.plans.get(rgb.tobytes(), "draw")
        if plan == "raise":
            raise ArithmeticError("no\nsketch")
        if plan == "die":
            os._exit(1)
        if plan == "nothing":
            return Drawn([])
        if plan.startswith("kill") and not Path(plan.split()[1]).exists():
            Path(plan.split()[1]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(seed + self.version)
        strokes = canonical([rng.random((4 + seed % 9, 2)) for _ in range(1 + seed % 3)])
        return Drawn(strokes, float(rng.random()), -float(rng.random()), rows=4)


@dataclasses.dataclass(frozen=True)
class FakeSpec(SketcherSpec):
    """How to make one."""

    source: str = "fake"
    plans: tuple[tuple[bytes, str], ...] = ()
    version: int = 3
    digest: str = "f00d"
    seconds: float = 0.0
    """A drawing takes."""

    def make(self):
        return Fake(self)


def aligned(number):
    """Bytes of the shape's photo as the sketcher sees it."""
    return photos.align(photos.decode_stored(photos.encode_jpeg(photo(number))), SIDE).tobytes()
