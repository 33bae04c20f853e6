"""What draws a photo: one interface for the generator and for what it is compared with.

A sketcher is made twice: by the driver, which asks who it is, and in each actor, which lets it
draw. Workers that trace contours do not import torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sbir_ray.data import trace
from sbir_ray.data.strokes import CANVAS, Strokes, fit
from sbir_ray.errors import UserError
from sbir_ray.places import place
from sbir_ray.strict import to_dict

if TYPE_CHECKING:
    from torch import Tensor

    from sbir_ray.models.drawing import Drawing

_GPU_BATCH = 256
"""Pairs that a discriminator judges at once on a GPU."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A pseudo sketch, before it is filtered."""

    strokes: Strokes
    """Canonical; [] if there was nothing to draw."""
    certainty: float = 1.0
    """Of the discriminator, in [0, 1]; 1 without one."""
    log_prob: float = 0.0
    """Log-probability of the drawing under the generator; 0 of what is drawn without chance."""
    ended: bool = True
    """Whether it came to its own end."""
    rows: int = 0
    """Stroke-5 rows that ``log_prob`` is the sum over; 0 of what is drawn without chance."""
    rank: int = 0
    """Of the photo for the drawing, from 1, by a teacher; 0 if none was asked."""
    similarity: float = 0.0
    """Cosine of photo and drawing, by the teacher."""


class Sketcher(Protocol):
    """Draws photos. The same photo, seed, digest and settings give the same drawing."""

    name: str
    version: int
    """Counter of the weights."""
    digest: str
    """Of everything that decides a drawing beside photo, seed and settings."""
    config: dict[str, Any]
    """Plain values for ``pseudo.json``."""
    image_size: int
    """Side at which it wants its photos aligned, pixels."""
    generative: bool
    """Whether its drawings have a log-probability, and may lack an end."""
    judged: bool
    """Whether a discriminator says how certain a pair is."""

    def draw(self, photos_BHW3: NDArray[np.uint8], seeds: Sequence[int]) -> list[Drawn]:
        """The drawings of photos (B, S, S, 3), aligned at ``image_size``.

        Args:
            seeds: B K of them, those of a photo side by side; so many drawings are made.
        """
        ...


def row_seed(seed: int, photo_id: str, sample: int) -> int:
    """Seed of one drawing, 63 bits, from the run's seed, the photo and the drawing's number."""
    text = f"{seed}/{photo_id}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1


@dataclass(frozen=True, slots=True)
class SketcherSpec:
    """How to make a sketcher, in any process."""

    source: str
    """``contours``, ``edges``, or the RUN folder of a generator."""
    temperature: float = 0.0
    device: str = "cpu"
    threads: int = 1
    """CPU threads of its networks."""

    def make(self) -> Sketcher:
        """The sketcher.

        Raises:
            UserError: neither a known name nor a generator's run; a temperature for what draws
                without chance.
            DamagedError: a run without a whole checkpoint.
        """
        if self.source in _TRACERS:
            if self.temperature:
                raise UserError(
                    f"temperature={self.temperature:g}: {self.source} draws without chance; "
                    "leave it at 0"
                )
            return Tracer(self.source)
        if not place(self.source).is_dir():
            known = ", ".join(_TRACERS)
            raise UserError(f"{self.source}: no such run folder; name one, or {known}")
        return GeneratorSketcher(self)


# --------------------------------------------------------------------------- tracing


def _trace_edges(rgb: NDArray[np.uint8]) -> Strokes:
    return trace.trace_drawing(trace.edge_map(rgb))


_TRACERS: dict[str, Callable[[NDArray[np.uint8]], Strokes]] = {
    "contours": trace.trace_photo,
    "edges": _trace_edges,
}


class Tracer:
    """``contours``: the photo's contours, strongest first; ``edges``: all its edges, traced."""

    version = 0
    generative = False
    judged = False
    image_size = int(CANVAS)

    def __init__(self, name: str) -> None:
        self.name = name
        self.config: dict[str, Any] = {"max_points": trace.MAX_POINTS, "epsilon": trace.EPSILON}
        # Tracing has its settings in its code, so another code is another sketcher.
        code = Path(trace.__file__).read_bytes()
        text = json.dumps([name, self.config, hashlib.sha256(code).hexdigest()])
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._trace = _TRACERS[name]

    def draw(self, photos_BHW3: NDArray[np.uint8], seeds: Sequence[int]) -> list[Drawn]:
        """See :class:`Sketcher`; the seeds say how many drawings there are, all the same."""
        each = len(seeds) // len(photos_BHW3)
        return [drawn for photo in photos_BHW3 for drawn in [Drawn(self._trace(photo))] * each]


# --------------------------------------------------------------------------- the generator


class GeneratorSketcher:
    """The generator of a run, and its discriminator if it has one."""

    name = "generator"
    generative = True

    def __init__(self, spec: SketcherSpec) -> None:
        import torch

        from sbir_ray.runs import generator_training, load_discriminator, load_generator

        torch.set_num_threads(spec.threads)
        run = place(spec.source)
        trained, judge = load_generator(run), load_discriminator(run)
        self.device = torch.device(spec.device)
        self.temperature = spec.temperature
        self.version = trained.version
        self.digest = trained.digest
        self.config = {"generator": to_dict(generator_training(trained.record, run).model)}
        self.judged = judge is not None
        self.generator = trained.model.to(self.device)
        self.discriminator = None if judge is None else judge.model.to(self.device)
        if judge is not None:
            self.digest = f"{trained.digest}-{judge.digest}"
            critic = generator_training(judge.record, run).discriminator
            self.config["discriminator"] = to_dict(critic)
        self.image_size = self.generator.config.image_size
        self.decoder = self.generator.decoder()

    def draw(self, photos_BHW3: NDArray[np.uint8], seeds: Sequence[int]) -> list[Drawn]:
        """See :class:`Sketcher`. In float32 on a CPU, in bfloat16 where a GPU may."""
        import torch

        photo_B3SS = self._moved(photos_BHW3.transpose(0, 3, 1, 2))
        gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=gpu):
            drawings = self._drawings(photo_B3SS, seeds)
            certainty = self._certainty(photo_B3SS, [d.strokes for d in drawings])
        return [
            Drawn(drawing.strokes, sure, drawing.log_prob, drawing.ended, len(drawing.rows))
            for drawing, sure in zip(drawings, certainty, strict=True)
        ]

    def _drawings(self, photo_B3SS: Tensor, seeds: Sequence[int]) -> list[Drawing]:
        """As of ``Generator.draw``, with each photo's map computed once for all its drawings."""
        import torch

        from sbir_ray.models.drawing import Noise

        config, block = self.generator.config, self.decoder.block
        # One at a time on a CPU, where a convolution may round differently in a batch.
        groups = photo_B3SS.split(block if self.device.type == "cuda" else 1)
        map_BCHW = torch.cat([self.generator.encode(group) for group in groups])
        each = len(seeds) // len(photo_B3SS)
        photo_of = torch.arange(len(seeds), device=self.device) // each
        drawings: list[Drawing] = []
        for start in range(0, len(seeds), block):
            part = slice(start, start + block)
            noise = Noise.seeded(
                seeds[part], config.max_points + 1, config.mixtures, self.temperature
            )
            drawings += self.decoder.draw(map_BCHW[photo_of[part]], noise)
        return drawings

    def _certainty(self, photo_B3SS: Tensor, sketches: list[Strokes]) -> list[float]:
        import torch
        from torch.nn import functional as F

        from sbir_ray.data.raster import rasterise

        if self.discriminator is None:
            return [1.0] * len(sketches)
        size = self.discriminator.config.image_size
        if size != self.image_size:
            small = F.interpolate(photo_B3SS.float(), (size, size), mode="area")
            photo_B3SS = small.round().byte()
        # As it was trained: with drawings simplified like people's sketches.
        config = self.generator.config
        fitted = [fit(sketch, config.max_points, config.epsilon) for sketch in sketches]
        raster_BSS = self._moved(rasterise(fitted, size))
        # One pair at a time on a CPU, where a batch is no faster and may round differently.
        at_once = _GPU_BATCH if self.device.type == "cuda" else 1
        photo_of = torch.arange(len(sketches), device=self.device)
        photo_of //= len(sketches) // len(photo_B3SS)
        found: list[float] = []
        for start in range(0, len(sketches), at_once):
            part = slice(start, start + at_once)
            photos = photo_B3SS[photo_of[part]]
            found += self.discriminator.certainty(photos, raster_BSS[part]).tolist()
        return found

    def _moved(self, pixels: NDArray[np.uint8]) -> Tensor:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
