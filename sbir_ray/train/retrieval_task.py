"""F on labelled pairs, pseudo pairs and photos without sketches (Eq. 7).

Shapes: B rows of the whole batch, b rows of this rank, S the image's side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sbir_ray.config import FilterConfig, RetrievalTraining
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.errors import UserError
from sbir_ray.evaluate import evaluate_retrieval
from sbir_ray.joint import PairRows, retrieval_losses
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.places import place
from sbir_ray.runs import load_retrieval
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.train import batch_rows
from sbir_ray.train.differences import fit_pair_norm
from sbir_ray.train.job import Job, OnePlayer, Player, divisible, held_out, pseudo_folders
from sbir_ray.train.position import Stream, group, identity, rng_of
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.thresholds import choice_for


@dataclass(frozen=True)
class RetrievalBatch:
    """This rank's rows: labelled pairs, then pseudo pairs; and photos that are negatives alone."""

    photo_bCSS: Tensor
    sketch_bSS: Tensor
    extra_nCSS: Tensor
    photo_ids: list[str]
    photo_id_b: Tensor
    """The same as int64, see :func:`number_of`; the same photo may come twice."""
    extra_id_n: Tensor
    certainty_b: Tensor
    kept_b: Tensor
    """False for a pseudo pair that was filtered out: only its photo counts."""
    labelled: int
    """Number of labelled pairs, which come first."""


@dataclass(frozen=True)
class PseudoRow:
    """A pseudo pair as a row of a batch, made ready."""

    photo_CSS: NDArray[np.uint8]
    sketch_SS: NDArray[np.uint8]
    photo_id: str
    certainty: float
    kept: bool = True


class RetrievalTask(OnePlayer):
    """F on labelled pairs, and beside them pseudo pairs, a teacher, photos as negatives (Eq. 7)."""

    def __init__(self, job: Job, ranks: Ranks, device: torch.device) -> None:
        assert isinstance(job.config, RetrievalTraining)
        self.config, self.ranks, self.device = job.config, ranks, device
        self.optim = job.config.optim
        size = job.config.model.image_size
        self.pairs = PairSet.load(place(job.inputs["pairs"]), "train", size)
        self.held_out = held_out(place(job.inputs["pairs"]), size)
        divisible("optim.batch_size", self.optim.batch_size, ranks)
        self.stream = Stream(len(self.pairs.drawn_photos), self.config.seed, "labelled")
        self.pseudo: PseudoSet | None = None
        if folders := pseudo_folders(job.inputs):
            self.pseudo = PseudoSet.join([_pseudo_pairs(f, self.config) for f in folders])
            self.pseudo_count = round(self.config.pseudo_share * self.optim.batch_size)
            divisible("pseudo_share x optim.batch_size", self.pseudo_count, ranks)
            self.drawings_of = group(self.pseudo.photo_of, len(self.pseudo.photo_ids))
            self.pseudo_stream = Stream(len(self.drawings_of), self.config.seed, "pseudo")
        elif self.config.samples or self.config.filters != FilterConfig():
            raise UserError("filters and samples: there is no PSEUDO folder; leave them out")
        self.negatives: PhotoSet | None = None
        if "negatives" in job.inputs and self.config.negatives:
            self.negatives = PhotoSet.load(place(job.inputs["negatives"]), size)
            divisible("negatives", self.config.negatives, ranks)
            self.extra_stream = Stream(len(self.negatives.photo_ids), self.config.seed, "negatives")
        if ranks.world > 1 and not self.config.model.frozen_norm:
            raise UserError(
                "model.frozen_norm=false: batch statistics need the whole batch in one process; "
                "use one worker, or leave it true"
            )
        torch.manual_seed(self.config.seed)
        self.model = RetrievalNet(self.config.model).to(device)
        self.trained: nn.Module = self.model
        self.steps = self.optim.steps
        self.players: Mapping[str, Player] = {"": Player(self.model, self.optim)}
        self.teacher: RetrievalNet | None = None
        if self.config.cpu_bfloat16 and device.type == "cpu" and not half_is_fast():
            raise UserError(
                "cpu_bfloat16=true: this CPU has no instructions for bfloat16, it would be many "
                "times slower; leave it false"
            )
        if "teacher" in job.inputs and self.config.loss.distill != "none":
            self.teacher = load_retrieval(place(job.inputs["teacher"])).model.to(device)
            # Distances are compared with those of a network in training.
            self.teacher.pair_norm.clear()
            if self.config.loss.distill == "absolute" and self.teacher.dim != self.model.dim:
                raise UserError(
                    f"loss.distill=absolute: the teacher's embeddings have {self.teacher.dim} "
                    f"numbers, this network's {self.model.dim}; take relational or pair"
                )

    def batch(self, step: int) -> RetrievalBatch:
        """See :class:`Task`."""
        return self.batch_with(step, self._cached(step) if self.pseudo is not None else [])

    def batch_with(self, step: int, pseudo: Sequence[PseudoRow]) -> RetrievalBatch:
        """This rank's labelled rows of ``step`` and its negatives, and the given pseudo pairs."""
        seed, augment = self.config.seed, self.config.augment
        photos: list[NDArray[np.uint8]] = []
        sketches: list[NDArray[np.uint8]] = []
        rows = self.labelled_rows(step)
        ids = [self.pairs.photo_ids[self.pairs.photo_of[row.sketch]] for row in rows]
        batch_rows.draw(self.pairs, rows, augment, photos, sketches)
        photos += [row.photo_CSS for row in pseudo]
        sketches += [row.sketch_SS for row in pseudo]
        ids += [row.photo_id for row in pseudo]
        size = self.config.model.image_size
        extra = np.zeros((0, 3, size, size), np.uint8)
        extra_ids: list[str] = []
        if self.negatives is not None:
            items = self.extra_stream.batch(step, self.config.negatives)
            flips = []
            for i in self.ranks.mine(len(items)):
                epoch, photo = items[i]
                flip = rng_of(seed, "negative", epoch, photo).random() < augment.flip
                flips.append(batch_rows.mirrored(self.negatives.photos[photo], flip))
                extra_ids.append(self.negatives.photo_ids[photo])
            extra = np.stack(flips)
        return RetrievalBatch(
            photo_bCSS=torch.from_numpy(np.stack(photos)),
            sketch_bSS=torch.from_numpy(np.stack(sketches)),
            extra_nCSS=torch.from_numpy(extra),
            photo_ids=ids,
            photo_id_b=torch.tensor([number_of(name) for name in ids]),
            extra_id_n=torch.tensor([number_of(name) for name in extra_ids], dtype=torch.int64),
            certainty_b=torch.tensor([1.0] * len(rows) + [row.certainty for row in pseudo]),
            kept_b=torch.tensor([True] * len(rows) + [row.kept for row in pseudo]),
            labelled=len(rows),
        )

    def labelled_rows(self, step: int) -> list[batch_rows.Row]:
        """This rank's labelled pairs of ``step``: a photo, and one of its sketches."""
        items = self.stream.batch(step, self.optim.batch_size)
        rows = []
        for i in self.ranks.mine(len(items)):
            epoch, item = items[i]
            choices = self.pairs.sketches_of[self.pairs.drawn_photos[item]]
            choice = rng_of(self.config.seed, "sketch", epoch, item).integers(len(choices))
            keys = (self.config.seed, "row", epoch, item)
            rows.append(batch_rows.Row(int(choices[choice]), keys))
        return rows

    def _cached(self, step: int) -> list[PseudoRow]:
        """This rank's pseudo pairs of ``step`` from the store."""
        assert self.pseudo is not None
        items = self.pseudo_stream.batch(step, self.pseudo_count)
        rows = []
        for i in self.ranks.mine(len(items)):
            epoch, photo = items[i]
            drawings = self.drawings_of[photo]
            choice = rng_of(self.config.seed, "drawing", epoch, photo).integers(len(drawings))
            keys = (self.config.seed, "pseudo", epoch, photo)
            rows.append(batch_rows.Row(drawings[choice], keys))
        photos: list[NDArray[np.uint8]] = []
        sketches: list[NDArray[np.uint8]] = []
        batch_rows.draw(self.pseudo, rows, self.config.augment, photos, sketches)
        return [
            PseudoRow(
                photo,
                sketch,
                self.pseudo.photo_ids[self.pseudo.photo_of[row.sketch]],
                float(self.pseudo.certainty[row.sketch]),
            )
            for row, photo, sketch in zip(rows, photos, sketches, strict=True)
        ]

    def losses(
        self, batch: RetrievalBatch, step: int, pseudo_ramp: float = 1.0
    ) -> dict[str, Tensor]:
        """The terms of Eq. 7 on the whole batch; gradients reach this rank's rows."""
        rows = self._embed(self.model, batch)
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self._embed(self.teacher.eval(), batch)
        return retrieval_losses(rows, self.config.loss, teacher, pseudo_ramp=pseudo_ramp)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the validation split (empty when it has none), with the pair norm fitted."""
        if self.config.model.pair_norm:
            fit_pair_norm(self.model, self.pairs, self.pseudo, self.device, self.config.seed)
        if self.held_out is None:
            return {}
        metrics = evaluate_retrieval(self.model, self.held_out, self.device).metrics.to_json()
        return {k: v for k, v in metrics.items() if isinstance(v, (int, float))}

    def data(self) -> dict[str, Any]:
        """See :class:`OnePlayer`."""
        found = {"labelled": identity(self.pairs.sketch_ids)}
        if self.pseudo is not None:
            pairs = zip(self.pseudo.photo_of, self.pseudo.certainty, strict=True)
            found["pseudo"] = identity(f"{self.pseudo.photo_ids[i]} {c}" for i, c in pairs)
        if self.negatives is not None:
            found["negatives"] = identity(self.negatives.photo_ids)
        return found

    def _embed(self, model: RetrievalNet, batch: RetrievalBatch) -> PairRows:
        half = self.device.type == "cuda" or self.config.cpu_bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            images = torch.cat([batch.photo_bCSS, batch.extra_nCSS]).to(self.device)
            size = model.config.image_size
            images = resized(images, size)
            rasters = resized(batch.sketch_bSS.to(self.device), size)
            if model.config.frozen_norm:
                sketches, photos = model.embed_sketches(rasters), model.embed_photos(images)
            else:
                sketches, photos = model(rasters, images)
        own = len(batch.photo_bCSS)
        self.ranks.watch(batch.photo_ids, photos[:own], sketches, batch.certainty_b)
        gather = self._gatherer(batch.labelled)
        ids = torch.cat(
            [gather(batch.photo_id_b), self.ranks.gather(batch.extra_id_n.to(self.device))]
        )
        columns, place_N = one_column_each(ids)
        photo_PD = torch.cat(
            [gather(photos[:own].float()), self.ranks.gather(photos[own:].float())]
        )
        labelled_b = torch.arange(own) < batch.labelled
        return PairRows(
            sketch_BD=gather(sketches.float()),
            photo_PD=photo_PD[columns],
            photo_of_B=place_N[: own * self.ranks.world],
            labelled_B=gather(labelled_b).to(self.device),
            certainty_B=gather(batch.certainty_b).to(self.device),
            kept_B=gather(batch.kept_b).to(self.device),
        )

    def _gatherer(self, labelled: int) -> Callable[[Tensor], Tensor]:
        """Labelled and pseudo rows are divided among ranks separately, so gathered separately."""

        def gather(rows: Tensor) -> Tensor:
            parts = [rows[:labelled], rows[labelled:]]
            moved = [self.ranks.gather(part.to(self.device)) for part in parts]
            return torch.cat(moved)

        return gather


def _pseudo_pairs(folder: str, config: RetrievalTraining) -> PseudoSet:
    path = place(folder)
    found = PseudoSet.load(path, config.model.image_size, choice=choice_for(path, config))
    if not found.photo_ids:
        raise UserError(f"{folder}: no pseudo pair was kept; see its ledger, and filters")
    return found


def resized(picture_NSS: Tensor, size: int) -> Tensor:
    """Pictures (N, ..., size, size), uint8, for a teacher that was trained at another size."""
    if picture_NSS.shape[-1] == size:
        return picture_NSS
    flat_N1SS = picture_NSS.flatten(0, -3)[:, None].float()
    scaled_N1SS = F.interpolate(flat_N1SS, (size, size), mode="bilinear", antialias=True)
    return scaled_N1SS.round().to(torch.uint8).view(*picture_NSS.shape[:-2], size, size)


def one_column_each(id_N: Tensor) -> tuple[Tensor, Tensor]:
    """A photo that comes twice must not be its own negative: the photos' first rows (P,), and the
    place of each row's photo among them (N,)."""
    _, first = np.unique(id_N.cpu().numpy(), return_index=True)
    columns = torch.from_numpy(np.sort(first)).to(id_N.device)
    return columns, (id_N[:, None] == id_N[columns]).int().argmax(1)


def half_is_fast() -> bool:
    """Whether this CPU computes bfloat16 by itself."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags


def number_of(photo_id: str) -> int:
    """A photo's id as 63 bits, which workers can exchange."""
    return int.from_bytes(hashlib.sha256(photo_id.encode()).digest()[:8], "big") >> 1
