"""The updates of the three networks, as losses of a whole batch (Algorithm 1, Ray-free).

Shapes: B sketches, P photos (one column each; the photos of the batch first, then photos that are
negatives alone), D embedding. Every function returns 0-dimensional tensors by name; ``loss`` is the
one to minimise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig, RetrievalLossConfig


@dataclass(frozen=True)
class PairRows:
    """A batch of embedded pairs, labelled and pseudo."""

    sketch_BD: Tensor
    photo_PD: Tensor
    photo_of_B: Tensor
    """Column of each sketch's own photo."""
    labelled_B: Tensor
    """True: drawn by a person; False: by a generator."""
    certainty_B: Tensor
    """1 for labelled pairs, D's score for pseudo pairs (omega of Eq. 7)."""


def retrieval_losses(
    rows: PairRows, config: RetrievalLossConfig, teacher: PairRows | None = None
) -> dict[str, Tensor]:
    """L = L(labelled) + pseudo_weight * omega * L(pseudo) + distill_weight * L_KD (Eq. 7).

    Each term is a mean over its own rows.
    """
    sketch_BD, photo_PD, photo_of_B = rows.sketch_BD, rows.photo_PD, rows.photo_of_B
    omega_B = losses.instance_weights(rows.certainty_B, rows.labelled_B, config.certainty)
    if config.kind == "triplet":
        row_B = losses.triplet(sketch_BD, photo_PD, photo_of_B, config.margin)
    else:
        row_B = losses.info_nce(sketch_BD, photo_PD, photo_of_B, config.temperature, omega_B)
    real = rows.labelled_B
    parts = {"labelled": row_B[real].mean()}
    total = parts["labelled"]
    if not bool(real.all()):
        parts["pseudo"] = (omega_B * row_B)[~real].mean()
        parts["certainty"] = rows.certainty_B[~real].mean()
        total = total + config.pseudo_weight * parts["pseudo"]
    if teacher is not None and config.distill != "none":
        parts["distill"] = losses.distillation(
            config.distill,
            (sketch_BD, photo_PD),
            (teacher.sketch_BD, teacher.photo_PD),
            photo_of_B,
        ).mean()
        total = total + config.distill_weight * parts["distill"]
    return {"loss": total, **parts}


def generator_losses(
    terms: Mapping[str, Tensor], config: GeneratorConfig, step: int
) -> dict[str, Tensor]:
    """L_vae = L_R + omega_kl * L_kl (Eq. 3), the mean over the batch.

    Args:
        terms: ``offset``, ``pen``, ``kl``, each (B,), means over the real points of a sketch.
    """
    parts = {name: terms[name].mean() for name in ("offset", "pen", "kl")}
    rising = 1 - (1 - config.kl_start) * config.kl_decay**step
    return {
        "loss": parts["offset"] + parts["pen"] + config.kl_weight * rising * parts["kl"],
        **parts,
    }


def discriminator_losses(
    real_B1hw: Tensor, drawn_B1hw: Tensor, wrong_B1hw: Tensor | None
) -> dict[str, Tensor]:
    """L_D (Eq. 5), and a third term that the paper lacks: real sketches on wrong photos are fakes,
    so that D has to judge the match and not the hand.

    Args:
        real_B1hw, drawn_B1hw, wrong_B1hw: patch logits of the three kinds of pairs.
    """
    parts = {
        "real": losses.patch_bce(real_B1hw, target=1.0).mean(),
        "drawn": losses.patch_bce(drawn_B1hw, target=0.0).mean(),
    }
    fake = parts["drawn"]
    if wrong_B1hw is not None:
        parts["wrong"] = losses.patch_bce(wrong_B1hw, target=0.0).mean()
        fake = 0.5 * (parts["drawn"] + parts["wrong"])
    certainty = {
        "certainty_real": torch.sigmoid(real_B1hw.detach()).mean(),
        "certainty_drawn": torch.sigmoid(drawn_B1hw.detach()).mean(),
    }
    return {"loss": parts["real"] + fake, **parts, **certainty}
