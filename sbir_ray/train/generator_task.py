"""G on labelled pairs (Eq. 3) and traced contours, and D on G's drawings (Eq. 5).

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
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError
from sbir_ray.joint import discriminator_losses, generator_losses
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.generator import Generator, Seen
from sbir_ray.models.generators import make_generator
from sbir_ray.places import place
from sbir_ray.runs import load_generator
from sbir_ray.train import batch_rows
from sbir_ray.train.job import Job, OnePlayer, Player, divisible, held_out
from sbir_ray.train.pen_rows import Traced, framed, slipped
from sbir_ray.train.position import Stream, identity, rng_of
from sbir_ray.train.ranks import Ranks

KEPT_BYTES = 1 << 30
"""Bytes of codes up to which those of all photos are computed once and kept."""


@dataclass(frozen=True)
class GeneratorBatch:
    """This rank's photos and their sketches as padded stroke-5 rows."""

    photo_b: list[tuple[int, bool]]
    """Number of each photo, and whether it is mirrored."""
    points_bT5: Tensor
    length_b: Tensor
    noise_bZ: Tensor | None
    """Of the latent, if there is one."""
    seen: Seen | None
    """How the pen sees the sketches, if it has a pen."""


class GeneratorTask(OnePlayer):
    """G by Eq. 3 on labelled pairs; the pen generator on traced contours as well.

    The job's input ``photos`` names photos without sketches that are traced too.

    Args:
        model: a generator to go on with, which knows contours already; None makes a new one.
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
        self.photos, self.photo_ids = self.pairs.photos, list(self.pairs.photo_ids)
        self.traced: Traced | None = None
        self.contour_steps = 0 if model is not None else sizes.pen.contour_steps
        if sizes.kind == "pen" and (self.contour_steps or sizes.pen.contour_share):
            self._trace(job.inputs.get("photos"))
        torch.manual_seed(self.config.seed)
        if model is None:
            model = make_generator(sizes)
            model.set_offset_scale(strokes.offset_scale(self.sketches))
        self.model = model.to(device)
        self.trained: nn.Module = self.model
        self.steps = self.optim.steps
        self.players: Mapping[str, Player] = {"": Player(self.model, self.optim)}
        self.codes: list[Tensor] = []
        if not sizes.train_backbone:
            # A backbone that does not train gives the same codes in every epoch.
            each = self._encode(self.photos[:1]).nbytes
            if 2 * len(self.photos) * each <= KEPT_BYTES:
                self.codes = [self._encode(self.photos[..., ::way]) for way in (1, -1)]

    def _trace(self, folder: str | None) -> None:
        """Trace the training photos and, up to a limit, those without sketches."""
        sizes = self.config.model
        if folder is not None and sizes.pen.contour_photos:
            more = PhotoSet.load(
                place(folder),
                sizes.image_size,
                at_most=sizes.pen.contour_photos,
                seed=self.config.seed,
            )
            self.photos = np.concatenate([self.photos, more.photos])
            self.photo_ids += more.photo_ids
        self.traced = Traced.of(self.photos, sizes.max_points, sizes.epsilon)
        if not self.traced.sketches:
            raise UserError(
                "generator: no photo has a contour to trace; set pen.contour_steps=0 "
                "and pen.contour_share=0, or kind=paper"
            )
        self.traced_stream = Stream(len(self.traced.sketches), self.config.seed, "contours")

    def batch(self, step: int) -> GeneratorBatch:
        """This rank's rows of ``step``."""
        items = self._items(step)
        photos: list[tuple[int, bool]] = []
        befores, sequences, noise, frames, traced_b = [], [], [], [], []
        sizes, scale = self.config.model, float(self.model.offset_scale)
        for i in self.ranks.mine(len(items)):
            traced, epoch, number = items[i]
            rng = rng_of(self.config.seed, "contour" if traced else "row", epoch, number)
            flip = rng.random() < self.config.augment.flip
            source = self.traced if traced else None
            sketch = self.sketches[number] if source is None else source.sketches[number]
            photo = self.pairs.photo_of[number] if source is None else source.photo[number]
            photos.append((int(photo), flip))
            drawn = strokes.mirror(sketch) if flip else sketch
            if sizes.kind == "paper":
                sequences.append(self.model.rows(drawn))
                noise.append(rng.standard_normal(sizes.latent, np.float32))
                continue
            drawn, frame = framed(drawn, rng, sizes.pen)
            before, rows = slipped(self.model.rows(drawn), sizes.pen.slip / scale, rng)
            befores.append(before)
            sequences.append(rows)
            frames.append(frame)
            traced_b.append(traced)
        points, lengths = batch_rows.padded(sequences)
        if sizes.kind == "paper":
            latent = torch.from_numpy(np.stack(noise))
            return GeneratorBatch(photos, points, lengths, latent, None)
        seen = Seen(
            batch_rows.padded(befores)[0],
            torch.from_numpy(np.stack(frames)),
            torch.tensor(traced_b),
        )
        return GeneratorBatch(photos, points, lengths, None, seen)

    def _items(self, step: int) -> list[tuple[bool, int, int]]:
        """Of each row of ``step``: whether it is traced, the epoch, and which sketch it is."""
        count, pen = self.optim.batch_size, self.config.model.pen
        if self.traced is None:
            return [(False, *item) for item in self.stream.batch(step, count)]
        if step < self.contour_steps:
            return [(True, *item) for item in self.traced_stream.batch(step, count)]
        later, traced = step - self.contour_steps, round(pen.contour_share * count)
        people = self.stream.batch(later, count - traced)
        # Behind those of the first steps.
        skipped = self.contour_steps * count
        contours = [self.traced_stream.at(skipped + later * traced + i) for i in range(traced)]
        return [*((False, *item) for item in people), *((True, *item) for item in contours)]

    def losses(self, batch: GeneratorBatch, step: int) -> dict[str, Tensor]:
        """The terms of Eq. 3 on the whole batch; gradients reach this rank's rows."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            terms = self.model.nll_of_code(
                self._codes(batch.photo_b),
                batch.points_bT5.to(self.device),
                batch.length_b.to(self.device),
                noise_BZ=None if batch.noise_bZ is None else batch.noise_bZ.to(self.device),
                seen=None if batch.seen is None else Seen(*(t.to(self.device) for t in batch.seen)),
            )
        names = ("offset", "pen", "kl")
        self.ranks.watch(
            [self.photo_ids[photo] for photo, _ in batch.photo_b],
            *(terms[name] for name in names),
        )
        gathered = {name: self.ranks.gather(terms[name]) for name in names}
        return generator_losses(gathered, self.config.model, step)

    def _codes(self, photo_b: Sequence[tuple[int, bool]]) -> Tensor:
        if self.codes:
            return torch.stack([self.codes[flip][photo] for photo, flip in photo_b])
        pixels = np.stack(
            [batch_rows.mirrored(self.photos[photo], flip) for photo, flip in photo_b]
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

    def data(self) -> dict[str, Any]:
        """See :class:`OnePlayer`."""
        data = {"sketches": identity(self.pairs.sketch_ids)}
        if self.traced is not None:
            data["contours"] = identity([self.photo_ids[photo] for photo in self.traced.photo])
        return data


@dataclass(frozen=True)
class DiscriminatorBatch:
    """Real rows, drawn rows and wrong rows of this rank."""

    photo_ids: list[str]
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
        photos, wrongs, ids = [], [], []
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
            ids.append(self.pairs.photo_ids[photo])
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
            ids,
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
            wrong = self._logits(batch, batch.wrong_bCSS.to(self.device), real)
        return discriminator_losses(
            self._logits(batch, photo, real), self._logits(batch, photo, drawn), wrong
        )

    def _logits(self, batch: DiscriminatorBatch, photo: Tensor, sketch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(photo, sketch)
        self.ranks.watch(batch.photo_ids, logits)
        return self.ranks.gather(logits.float())

    def evaluate(self) -> dict[str, float]:
        """Nothing: D is judged by how its certainty orders the pseudo pairs."""
        return {}

    def data(self) -> dict[str, Any]:
        """See :class:`OnePlayer`."""
        return {"sketches": identity(self.pairs.sketch_ids)}
