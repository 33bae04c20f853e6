"""What can be trained: the retrieval network, the generator, the discriminator.

A task turns a step's number into this rank's rows and the rows into losses. It knows nothing of
Ray, checkpoints or schedules.

Shapes: B rows of the whole batch, b = B / world rows of this rank, S the image's side, T points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sbir_ray import config as settings
from sbir_ray.config import OptimConfig
from sbir_ray.data import raster, strokes
from sbir_ray.data.pairs import PairSet, read_header
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError
from sbir_ray.evaluate import evaluate_retrieval
from sbir_ray.joint import PairRows, discriminator_losses, generator_losses, retrieval_losses
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.generator import Generator
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.runs import DISCRIMINATOR, load_generator, load_retrieval
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.train import batch_rows
from sbir_ray.train.position import Stream, group, rng_of
from sbir_ray.train.ranks import Ranks

Config = settings.RetrievalTraining | settings.GeneratorTraining
KINDS = ("retrieval", "generator", "discriminator")


@dataclass(frozen=True)
class Job:
    """One run to train: what, where to, from what. Plain values, so that it travels."""

    kind: str
    out: str
    config: Config
    inputs: Mapping[str, str]
    """``pairs``; for the retrieval network also ``pseudo``, ``teacher``, ``negatives`` (folders,
    each may be absent); for the discriminator ``generator`` (a run)."""


class Task(Protocol):
    """What :func:`sbir_ray.train.loop.fit` needs to know of a task."""

    trained: nn.Module
    optim: OptimConfig

    def batch(self, step: int) -> Any: ...

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]: ...

    def evaluate(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...


def build(job: Job, ranks: Ranks, device: torch.device) -> Task:
    """The task of a job, with its data loaded.

    Raises:
        UserError: data or a setting that the user has to change.
    """
    if job.kind == "retrieval":
        return RetrievalTask(job, ranks, device)
    if job.kind == "generator":
        return GeneratorTask(job, ranks, device)
    if job.kind == "discriminator":
        return DiscriminatorTask(job, ranks, device)
    raise ValueError(f"{job.kind} is not one of {', '.join(KINDS)}")


def generator_jobs(
    out: str, config: settings.GeneratorTraining, inputs: Mapping[str, str]
) -> list[Job]:
    """The generator, then the discriminator on its drawings, in a folder inside the run."""
    jobs = [Job("generator", out, config, inputs)]
    if config.discriminator.steps:
        critic = str(Path(out) / DISCRIMINATOR)
        jobs.append(Job("discriminator", critic, config, {**inputs, "generator": out}))
    return jobs


@dataclass(frozen=True)
class RetrievalBatch:
    """Rows of the retrieval step; lists cover the whole batch, tensors this rank's rows."""

    photo_bCSS: Tensor
    sketch_bSS: Tensor
    extra_nCSS: Tensor
    photo_ids: list[str]
    extra_ids: list[str]
    labelled_B: Tensor
    certainty_B: Tensor


class RetrievalTask:
    """F on labelled pairs, and beside them pseudo pairs, a teacher, photos as negatives (Eq. 7)."""

    def __init__(self, job: Job, ranks: Ranks, device: torch.device) -> None:
        assert isinstance(job.config, settings.RetrievalTraining)
        self.config, self.ranks, self.device = job.config, ranks, device
        self.optim = job.config.optim
        size = job.config.model.image_size
        self.pairs = PairSet.load(Path(job.inputs["pairs"]), "train", size)
        self.held_out = _held_out(Path(job.inputs["pairs"]), size)
        _divisible("optim.batch_size", self.optim.batch_size, ranks)
        self.stream = Stream(len(self.pairs.drawn_photos), self.config.seed, "labelled")
        self.pseudo: PseudoSet | None = None
        if "pseudo" in job.inputs:
            self.pseudo = PseudoSet.load(Path(job.inputs["pseudo"]), size)
            if not self.pseudo.photo_ids:
                raise UserError(f"{job.inputs['pseudo']}: no pseudo pair was kept; see its ledger")
            self.pseudo_count = round(self.config.pseudo_share * self.optim.batch_size)
            _divisible("pseudo_share x optim.batch_size", self.pseudo_count, ranks)
            self.drawings_of = group(self.pseudo.photo_of, len(self.pseudo.photo_ids))
            self.pseudo_stream = Stream(len(self.drawings_of), self.config.seed, "pseudo")
        self.negatives: PhotoSet | None = None
        if "negatives" in job.inputs and self.config.negatives:
            self.negatives = PhotoSet.load(Path(job.inputs["negatives"]), size)
            _divisible("negatives", self.config.negatives, ranks)
            self.extra_stream = Stream(len(self.negatives.photo_ids), self.config.seed, "negatives")
        if ranks.world > 1 and not self.config.model.frozen_norm:
            raise UserError(
                "model.frozen_norm=false: batch statistics need the whole batch in one process; "
                "use one worker, or leave it true"
            )
        torch.manual_seed(self.config.seed)
        self.model = RetrievalNet(self.config.model).to(device)
        self.trained: nn.Module = self.model
        self.teacher: RetrievalNet | None = None
        if "teacher" in job.inputs and self.config.loss.distill != "none":
            self.teacher = load_retrieval(Path(job.inputs["teacher"])).model.to(device)
            if self.teacher.config.image_size != size:
                raise UserError(
                    f"{job.inputs['teacher']}: its image_size is "
                    f"{self.teacher.config.image_size}; set model.image_size to it"
                )

    def batch(self, step: int) -> RetrievalBatch:
        """This rank's rows of ``step``."""
        seed, augment = self.config.seed, self.config.augment
        photos: list[NDArray[np.uint8]] = []
        sketches: list[NDArray[np.uint8]] = []
        rows = []
        for epoch, item in self.stream.batch(step, self.optim.batch_size):
            choices = self.pairs.sketches_of[self.pairs.drawn_photos[item]]
            choice = rng_of(seed, "sketch", epoch, item).integers(len(choices))
            rows.append(batch_rows.Row(int(choices[choice]), (seed, "row", epoch, item)))
        ids = [self.pairs.photo_ids[self.pairs.photo_of[row.sketch]] for row in rows]
        certainty = [1.0] * len(rows)
        mine = [rows[i] for i in self.ranks.mine(len(rows))]
        batch_rows.draw(self.pairs, mine, augment, photos, sketches)
        labelled = [True] * len(rows)
        if self.pseudo is not None:
            rows = []
            for epoch, photo in self.pseudo_stream.batch(step, self.pseudo_count):
                drawings = self.drawings_of[photo]
                choice = rng_of(seed, "drawing", epoch, photo).integers(len(drawings))
                rows.append(batch_rows.Row(drawings[choice], (seed, "pseudo", epoch, photo)))
            ids += [self.pseudo.photo_ids[self.pseudo.photo_of[row.sketch]] for row in rows]
            certainty += [float(self.pseudo.certainty[row.sketch]) for row in rows]
            labelled += [False] * len(rows)
            mine = [rows[i] for i in self.ranks.mine(len(rows))]
            batch_rows.draw(self.pseudo, mine, augment, photos, sketches)
        size = self.config.model.image_size
        extra = np.zeros((0, 3, size, size), np.uint8)
        extra_ids: list[str] = []
        if self.negatives is not None:
            items = self.extra_stream.batch(step, self.config.negatives)
            extra_ids = [self.negatives.photo_ids[photo] for _, photo in items]
            flips = []
            for i in self.ranks.mine(len(items)):
                epoch, photo = items[i]
                flip = rng_of(seed, "negative", epoch, photo).random() < augment.flip
                flips.append(batch_rows.mirrored(self.negatives.photos[photo], flip))
            extra = np.stack(flips)
        return RetrievalBatch(
            photo_bCSS=torch.from_numpy(np.stack(photos)),
            sketch_bSS=torch.from_numpy(np.stack(sketches)),
            extra_nCSS=torch.from_numpy(extra),
            photo_ids=ids,
            extra_ids=extra_ids,
            labelled_B=torch.tensor(labelled),
            certainty_B=torch.tensor(certainty),
        )

    def losses(self, batch: RetrievalBatch, step: int) -> dict[str, Tensor]:
        """The terms of Eq. 7 on the whole batch; gradients reach this rank's rows."""
        rows = self._embed(self.model, batch)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self._embed(self.teacher.eval(), batch)
        return retrieval_losses(rows, self.config.loss, teacher)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the validation split (empty when it has none)."""
        if self.held_out is None:
            return {}
        metrics = evaluate_retrieval(self.model, self.held_out, self.device).metrics.to_json()
        return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}

    def state(self) -> dict[str, Any]:
        """What identifies the data position, beside the step."""
        return {"labelled": self.stream.size}

    def _embed(self, model: RetrievalNet, batch: RetrievalBatch) -> PairRows:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            images = torch.cat([batch.photo_bCSS, batch.extra_nCSS]).to(self.device)
            photos = model.embed_photos(images)
            sketches = model.embed_sketches(batch.sketch_bSS.to(self.device))
        own = len(batch.photo_bCSS)
        blocks = [
            self._gather_blocks(part, batch) for part in (photos[:own].float(), sketches.float())
        ]
        extra = self.ranks.gather(photos[own:].float())
        ids = batch.photo_ids + batch.extra_ids
        # One column a photo: a photo that came twice must not be its own negative.
        first = {name: i for i, name in reversed(list(enumerate(ids)))}
        columns = sorted(first.values())
        place = {ids[column]: i for i, column in enumerate(columns)}
        photo_of = [place[name] for name in batch.photo_ids]
        return PairRows(
            sketch_BD=blocks[1],
            photo_PD=torch.cat([blocks[0], extra])[columns],
            photo_of_B=torch.tensor(photo_of, device=self.device),
            labelled_B=batch.labelled_B.to(self.device),
            certainty_B=batch.certainty_B.to(self.device),
        )

    def _gather_blocks(self, rows: Tensor, batch: RetrievalBatch) -> Tensor:
        """Labelled and pseudo rows are divided among ranks separately, so gathered separately."""
        own = int(batch.labelled_B.sum()) // self.ranks.world
        return torch.cat([self.ranks.gather(rows[:own]), self.ranks.gather(rows[own:])])


@dataclass(frozen=True)
class GeneratorBatch:
    """This rank's photos and their sketches as padded stroke-5 rows."""

    photo_b: list[tuple[int, bool]]
    """Number of each photo, and whether it is mirrored."""
    points_bT5: Tensor
    length_b: Tensor
    noise_bZ: Tensor
    """Of the latent."""


class GeneratorTask:
    """G by Eq. 3 on labelled pairs."""

    def __init__(self, job: Job, ranks: Ranks, device: torch.device) -> None:
        assert isinstance(job.config, settings.GeneratorTraining)
        self.config, self.ranks, self.device = job.config, ranks, device
        self.optim = job.config.optim
        model = job.config.model
        self.pairs = PairSet.load(Path(job.inputs["pairs"]), "train", model.image_size)
        self.held_out = _held_out(Path(job.inputs["pairs"]), model.image_size)
        _divisible("optim.batch_size", self.optim.batch_size, ranks)
        self.sketches = [
            strokes.fit(s, model.max_points, model.epsilon) for s in self.pairs.sketches
        ]
        self.stream = Stream(len(self.sketches), self.config.seed, "sketches")
        torch.manual_seed(self.config.seed)
        self.model = Generator(model).to(device)
        self.model.set_offset_scale(strokes.offset_scale(self.sketches))
        self.trained: nn.Module = self.model
        self.maps: list[Tensor] = []
        if not model.train_backbone:
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
            terms = self.model.nll_of_map(
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


class DiscriminatorTask:
    """D on labelled pairs against the generator's drawings of the same photos (Eq. 5), and against
    the same sketches on wrong photos. The generator does not change meanwhile."""

    def __init__(self, job: Job, ranks: Ranks, device: torch.device) -> None:
        assert isinstance(job.config, settings.GeneratorTraining)
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
        _divisible("discriminator.batch_size", d.batch_size, ranks)
        self.pairs = PairSet.load(Path(job.inputs["pairs"]), "train", d.image_size)
        if len(self.pairs.photo_ids) < 2:
            raise UserError(f"{job.inputs['pairs']}: the discriminator needs at least two photos")
        generator = load_generator(Path(job.inputs["generator"])).model.to(device)
        self.drawings = self._drawings(
            generator, PairSet.load(Path(job.inputs["pairs"]), "train", generator.config.image_size)
        )
        self.stream = Stream(len(self.pairs.sketches), self.config.seed, "real")
        torch.manual_seed(self.config.seed)
        self.model = PairDiscriminator(d).to(device)
        self.trained: nn.Module = self.model

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


def _held_out(folder: Path, size: int) -> PairSet | None:
    """The validation split, when there is one with sketches."""
    if not read_header(folder)["splits"]["val"]["sketches"]:
        return None
    return PairSet.load(folder, "val", size)


def _divisible(name: str, count: int, ranks: Ranks) -> None:
    if count < 1 or count % ranks.world:
        raise UserError(
            f"{name}: {count} rows cannot be divided among {ranks.world} workers; "
            f"choose a multiple of {ranks.world}"
        )
