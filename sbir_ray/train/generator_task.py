"""G on labelled pairs (Eq. 3), and D on its drawings of them (Eq. 5).

Shapes: B rows of the whole batch, b rows of this rank, S the image's side, T points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbir_ray.config import GeneratorTraining, OptimConfig
from sbir_ray.data import raster, strokes
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError
from sbir_ray.joint import discriminator_losses, generator_losses
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.generator import Generator
from sbir_ray.models.generators import make_generator
from sbir_ray.places import place
from sbir_ray.runs import load_generator
from sbir_ray.train import batch_rows
from sbir_ray.train.job import Job, OnePlayer, Player, divisible, held_out
from sbir_ray.train.position import Stream, rng_of
from sbir_ray.train.ranks import Ranks


@dataclass(frozen=True)
class GeneratorBatch:
    """This rank's photos and their sketches as padded stroke-5 rows."""

    photo_b: list[tuple[int, bool]]
    """Number of each photo, and whether it is mirrored."""
    points_bT5: Tensor
    length_b: Tensor
    noise_bZ: Tensor
    """Of the latent."""


class GeneratorTask(OnePlayer):
    """G by Eq. 3 on labelled pairs.

    Args:
        model: a generator to go on with; None makes a new one.
    """

    def __init__(
        self, job: Job, ranks: Ranks, device: torch.device, model: Generator | None = None
    ) -> None:
        assert isinstance(job.config, GeneratorTraining)
        self.config, self.ranks, self.device = job.config, ranks, device
        self.optim = job.config.optim
        sizes = job.config.model
        self.pairs = PairSet.load(place(job.inputs["pairs"]), "train", sizes.image_size)
        self.held_out = held_out(place(job.inputs["pairs"]), sizes.image_size)
        divisible("optim.batch_size", self.optim.batch_size, ranks)
        self.sketches = [
            strokes.fit(s, sizes.max_points, sizes.epsilon) for s in self.pairs.sketches
        ]
        self.stream = Stream(len(self.sketches), self.config.seed, "sketches")
        torch.manual_seed(self.config.seed)
        if model is None:
            model = make_generator(sizes)
            model.set_offset_scale(strokes.offset_scale(self.sketches))
        self.model = model.to(device)
        self.trained: nn.Module = self.model
        self.steps = self.optim.steps
        self.players: Mapping[str, Player] = {"": Player(self.model, self.optim)}
        self.maps: list[Tensor] = []
        if not sizes.train_backbone:
            # A backbone that does not train gives the same maps in every epoch.
            self.maps = [self._encode(self.pairs.photos[..., ::way]) for way in (1, -1)]

    def batch(self, step: int) -> GeneratorBatch:
        """This rank's rows of ``step``."""
        items = self.stream.batch(step, self.optim.batch_size)
        photos: list[tuple[int, bool]] = []
        sequences, noise = [], []
        for i in self.ranks.mine(len(items)):
            epoch, sketch = items[i]
            rng = rng_of(self.config.seed, "row", epoch, sketch)
            flip = rng.random() < self.config.augment.flip
            photos.append((int(self.pairs.photo_of[sketch]), flip))
            drawn = strokes.mirror(self.sketches[sketch]) if flip else self.sketches[sketch]
            sequences.append(self.model.rows(drawn))
            noise.append(rng.standard_normal(self.config.model.latent, np.float32))
        points, lengths = batch_rows.padded(sequences)
        return GeneratorBatch(photos, points, lengths, torch.from_numpy(np.stack(noise)))

    def losses(self, batch: GeneratorBatch, step: int) -> dict[str, Tensor]:
        """The terms of Eq. 3 on the whole batch; gradients reach this rank's rows."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            terms = self.model.nll_of_code(
                self._maps(batch.photo_b),
                batch.points_bT5.to(self.device),
                batch.length_b.to(self.device),
                noise_BZ=batch.noise_bZ.to(self.device),
            )
        gathered = {name: self.ranks.gather(terms[name]) for name in ("offset", "pen", "kl")}
        return generator_losses(gathered, self.config.model, step)

    def _maps(self, photo_b: Sequence[tuple[int, bool]]) -> Tensor:
        if self.maps:
            return torch.stack([self.maps[flip][photo] for photo, flip in photo_b])
        pixels = np.stack(
            [batch_rows.mirrored(self.pairs.photos[photo], flip) for photo, flip in photo_b]
        )
        return self.model.encode(torch.from_numpy(pixels).to(self.device))

    def _encode(self, photos: NDArray[np.uint8], batch: int = 32) -> Tensor:
        with torch.no_grad():
            parts = [
                self.model.encode(torch.from_numpy(photos[i : i + batch].copy()).to(self.device))
                for i in range(0, len(photos), batch)
            ]
        return torch.cat(parts)

    def evaluate(self) -> dict[str, float]:
        """Mean negative log-likelihood per point on the validation split."""
        if self.held_out is None:
            return {}
        model = self.config.model
        sums: dict[str, float] = {}
        count = len(self.held_out.sketches)
        for start in range(0, count, 64):
            chosen = range(start, min(start + 64, count))
            fitted = [
                strokes.fit(self.held_out.sketches[i], model.max_points, model.epsilon)
                for i in chosen
            ]
            points, lengths = batch_rows.padded([self.model.rows(s) for s in fitted])
            photos = self.held_out.photos[[self.held_out.photo_of[i] for i in chosen]]
            terms = self.model.nll(
                torch.from_numpy(photos).to(self.device),
                points.to(self.device),
                lengths.to(self.device),
            )
            for name in ("offset", "pen", "kl"):
                sums[name] = sums.get(name, 0.0) + float(terms[name].sum()) / count
        return sums

    def state(self) -> dict[str, Any]:
        """What identifies the data position, beside the step."""
        return {"sketches": self.stream.size}


@dataclass(frozen=True)
class DiscriminatorBatch:
    """Real rows, drawn rows and wrong rows of this rank."""

    photo_bCSS: Tensor
    real_bSS: Tensor
    drawn_bSS: Tensor
    wrong_bCSS: Tensor
    """Other photos than the real sketches'."""


class DiscriminatorTask(OnePlayer):
    """D on labelled pairs against the generator's drawings of the same photos (Eq. 5), and against
    the same sketches on wrong photos. The generator does not change meanwhile."""

    def __init__(self, job: Job, ranks: Ranks, device: torch.device) -> None:
        assert isinstance(job.config, GeneratorTraining)
        self.config, self.ranks, self.device = job.config, ranks, device
        d = job.config.discriminator
        self.optim = OptimConfig(
            steps=d.steps,
            batch_size=d.batch_size,
            lr=d.lr,
            weight_decay=0.0,
            beta1=0.5,
            schedule="constant",
        )
        divisible("discriminator.batch_size", d.batch_size, ranks)
        self.pairs = PairSet.load(place(job.inputs["pairs"]), "train", d.image_size)
        if len(self.pairs.photo_ids) < 2:
            raise UserError(f"{job.inputs['pairs']}: the discriminator needs at least two photos")
        generator = load_generator(place(job.inputs["generator"])).model.to(device)
        self.drawings = self._drawings(
            generator,
            PairSet.load(place(job.inputs["pairs"]), "train", generator.config.image_size),
        )
        self.stream = Stream(len(self.pairs.sketches), self.config.seed, "real")
        torch.manual_seed(self.config.seed)
        self.model = PairDiscriminator(d).to(device)
        self.trained: nn.Module = self.model
        self.steps = self.optim.steps
        self.players: Mapping[str, Player] = {"": Player(self.model, self.optim)}

    def _drawings(self, generator: Generator, pairs: PairSet) -> list[Strokes]:
        """One drawing of each labelled photo, made by all ranks alike."""
        drawings: list[Strokes] = []
        generator.eval()
        for start in range(0, len(pairs.photo_ids), 64):
            photos = torch.from_numpy(pairs.photos[start : start + 64]).to(self.device)
            seeds = [self.config.seed * 1_000_003 + start + i for i in range(len(photos))]
            drawings += [d.strokes for d in generator.draw(photos, seeds)]
        return drawings

    def batch(self, step: int) -> DiscriminatorBatch:
        """This rank's rows of ``step``; real and drawn sketches are augmented alike."""
        d, augment = self.config.discriminator, self.config.augment
        items = self.stream.batch(step, d.batch_size)
        photos, wrongs = [], []
        real: list[Strokes] = []
        drawn: list[Strokes] = []
        for i in self.ranks.mine(len(items)):
            epoch, sketch = items[i]
            photo = self.pairs.photo_of[sketch]
            rng = rng_of(self.config.seed, "row", epoch, sketch)
            other = (photo + 1 + int(rng.integers(len(self.pairs.photo_ids) - 1))) % len(
                self.pairs.photo_ids
            )
            flip = rng.random() < augment.flip
            photos.append(batch_rows.mirrored(self.pairs.photos[photo], flip))
            wrongs.append(batch_rows.mirrored(self.pairs.photos[other], flip))
            for source, into in (
                (self.pairs.sketches[sketch], real),
                (self.drawings[photo], drawn),
            ):
                # The same simplification for both, so that the number of points tells nothing.
                fitted = strokes.fit(
                    source, self.config.model.max_points, self.config.model.epsilon
                )
                into.append(batch_rows.augmented(fitted, flip, augment, rng))
        return DiscriminatorBatch(
            torch.from_numpy(np.stack(photos)),
            torch.from_numpy(raster.rasterise(real, d.image_size)),
            torch.from_numpy(raster.rasterise(drawn, d.image_size)),
            torch.from_numpy(np.stack(wrongs)),
        )

    def losses(self, batch: DiscriminatorBatch, step: int) -> dict[str, Tensor]:
        """The terms of Eq. 5 on the whole batch; gradients reach this rank's rows."""
        photo, real = batch.photo_bCSS.to(self.device), batch.real_bSS.to(self.device)
        drawn = batch.drawn_bSS.to(self.device)
        wrong = None
        if not self.config.discriminator.plain:
            wrong = self._logits(batch.wrong_bCSS.to(self.device), real)
        return discriminator_losses(self._logits(photo, real), self._logits(photo, drawn), wrong)

    def _logits(self, photo: Tensor, sketch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(photo, sketch)
        return self.ranks.gather(logits.float())

    def evaluate(self) -> dict[str, float]:
        """Nothing: D is judged by how its certainty orders the pseudo pairs."""
        return {}

    def state(self) -> dict[str, Any]:
        """What identifies the data position, beside the step."""
        return {"sketches": self.stream.size}
