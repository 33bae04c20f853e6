"""The updates of the three networks, as losses of a whole batch (Algorithm 1, Ray-free).

Shapes: B sketches, P photos (one column each; the photos of the batch first, then photos that are
negatives alone), D embedding. Losses are 0-dimensional tensors by name; ``loss`` is the one to
minimise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig, RetrievalLossConfig
from sbir_ray.joint_config import PolicyConfig


def ramp(step: int, warmup: int, length: int) -> float:
    """Factor of a term that starts at step ``warmup`` and has its full weight ``length`` later."""
    if step < warmup:
        return 0.0
    return min((step - warmup) / length, 1.0) if length else 1.0


# --------------------------------------------------------------------------- F


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
    kept_B: Tensor | None = None
    """False: a pseudo pair that was filtered out. Its sketch counts nowhere, its photo stays a
    negative. None: all are kept."""


def retrieval_losses(
    rows: PairRows,
    config: RetrievalLossConfig,
    teacher: PairRows | None = None,
    pseudo_ramp: float = 1.0,
) -> dict[str, Tensor]:
    """L = L(labelled) + pseudo_weight * omega * L(pseudo) + distill_weight * L_KD (Eq. 7).

    Each term is a mean over its own rows; 0 where all pseudo pairs were filtered out.

    Args:
        teacher: the same rows, embedded by the teacher.
        pseudo_ramp: further factor of the pseudo pairs' term.
    """
    drawn_B = ~rows.labelled_B
    some_drawn = bool(drawn_B.any())
    parts: dict[str, Tensor] = {}
    if rows.kept_B is not None:
        keep_B = rows.kept_B | rows.labelled_B
        if some_drawn:
            parts["kept"] = keep_B[drawn_B].to(rows.sketch_BD.dtype).mean()
        rows = _only(rows, keep_B)
        teacher = None if teacher is None else _only(teacher, keep_B)
    sketch_BD, photo_PD, photo_of_B = rows.sketch_BD, rows.photo_PD, rows.photo_of_B
    omega_B = losses.instance_weights(rows.certainty_B, rows.labelled_B, config.certainty)
    if config.kind == "triplet":
        row_B = losses.triplet(sketch_BD, photo_PD, photo_of_B, config.margin)
    else:
        row_B = losses.info_nce(sketch_BD, photo_PD, photo_of_B, config.temperature, omega_B)
    real = rows.labelled_B
    parts["labelled"] = row_B[real].mean()
    total = parts["labelled"]
    if some_drawn:
        pairs = (~real).sum().clamp(min=1)
        parts["pseudo"] = (omega_B * row_B)[~real].sum() / pairs
        parts["certainty"] = rows.certainty_B[~real].sum() / pairs
        total = total + pseudo_ramp * config.pseudo_weight * parts["pseudo"]
    if teacher is not None and config.distill != "none":
        parts["distill"] = losses.distillation(
            config.distill,
            (sketch_BD, photo_PD),
            (teacher.sketch_BD, teacher.photo_PD),
            photo_of_B,
        ).mean()
        total = total + config.distill_weight * parts["distill"]
    return {"loss": total, **parts}


def _only(rows: PairRows, keep_B: Tensor) -> PairRows:
    """The chosen sketches, among all photos."""
    return replace(
        rows,
        sketch_BD=rows.sketch_BD[keep_B],
        photo_of_B=rows.photo_of_B[keep_B],
        labelled_B=rows.labelled_B[keep_B],
        certainty_B=rows.certainty_B[keep_B],
        kept_B=None,
    )


@torch.no_grad()
def ema_(teacher: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the teacher's parameters and buffers towards the model's: the running average.

    Counters are copied.
    """
    pairs = zip(
        [*teacher.parameters(), *teacher.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    )
    for average, value in pairs:
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


# --------------------------------------------------------------------------- G


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


def rewards(
    sketch_BD: Tensor,
    photo_PD: Tensor,
    photo_of_B: Tensor,
    certainty_B: Tensor,
    margin: float,
    config: PolicyConfig,
) -> Tensor:
    """Reward of each drawing (B,): -lambda_r1 * its triplet loss under F + lambda_r2 * D (Eq. 8).

    The negative is every other photo in turn. The paper's one random negative has the same
    expectation, but a drawing's reward would depend on the photo that it happened to meet.

    Raises:
        ValueError: fewer than two photos.
    """
    triplet_B = losses.mean_triplet(sketch_BD, photo_PD, photo_of_B, margin)
    return losses.reward(triplet_B, certainty_B, config.retrieval_weight, config.certainty_weight)


@dataclass(frozen=True)
class PolicyRows:
    """A batch of drawings sampled from the generator, several of each photo."""

    log_prob_B: Tensor
    """Under the weights that learn, the sum over the rows; carries the gradient."""
    rows_B: Tensor
    """Number of these rows."""
    behaviour_B: Tensor
    """The same log-probability under the weights that drew."""
    reward_B: Tensor
    photo_B: Tensor
    """int64, a number for each photo."""
    greedy_B: Tensor
    """Reward of the photo's pseudo sketch; read by the baseline ``greedy`` alone."""


def policy_losses(rows: PolicyRows, config: PolicyConfig) -> dict[str, Tensor]:
    """The policy gradient's term of Eq. 9 as ``policy``, and what is worth watching."""
    reward_B = rows.reward_B.detach()
    ratio_B = losses.importance_ratio(rows.log_prob_B, rows.behaviour_B, config.max_ratio)
    advantage_B = reward_B
    if config.baseline == "greedy":
        advantage_B = reward_B - rows.greedy_B
    elif config.baseline == "leave_one_out":
        advantage_B = reward_B - losses.leave_one_out(reward_B, rows.photo_B)
    if config.normalise:
        advantage_B = losses.normalised(advantage_B)
    surrogate_B = losses.policy_surrogate(
        rows.log_prob_B, rows.rows_B, advantage_B, ratio_B, per_row=config.per_row
    )
    return {
        "policy": surrogate_B.mean(),
        "reward": reward_B.mean(),
        "reward_std": reward_B.std(unbiased=False),
        "ratio": ratio_B.mean(),
    }


def soft_losses(retrieval_B: Tensor, certainty_B: Tensor, config: PolicyConfig) -> Tensor:
    """Minus the mean reward (Eq. 8), whose gradient goes through F and D into the rasters.

    Args:
        retrieval_B: of ``losses.mean_triplet``.
    """
    reward_B = losses.reward(
        retrieval_B, certainty_B, config.retrieval_weight, config.certainty_weight
    )
    return -reward_B.mean()


def joint_generator_losses(
    vae: Mapping[str, Tensor],
    config: PolicyConfig,
    policy_ramp: float,
    policy: Mapping[str, Tensor] | None = None,
    soft: Tensor | None = None,
) -> dict[str, Tensor]:
    """L_vae + policy_ramp * (weight * policy + soft_weight * soft) (Eq. 9).

    Args:
        vae: of :func:`generator_losses`.
        policy: of :func:`policy_losses`.
        soft: of :func:`soft_losses`.
    """
    parts = dict(vae)
    total = parts.pop("loss")
    if policy is not None:
        parts.update(policy)
        total = total + policy_ramp * config.weight * parts["policy"]
    if soft is not None:
        parts["soft"] = soft
        total = total + policy_ramp * config.soft_weight * soft
    return {"loss": total, **parts}


# --------------------------------------------------------------------------- D


def discriminator_losses(
    real_B1hw: Tensor,
    drawn_B1hw: Tensor,
    wrong_B1hw: Tensor | None,
    own_B1hw: Tensor | None = None,
) -> dict[str, Tensor]:
    """L_D (Eq. 5), with two kinds of fakes that the paper lacks, so that D has to judge the match:
    real sketches on wrong photos, else the hand alone would tell; and drawings of the real
    sketches' photos, else the photo alone would.

    Args:
        real_B1hw, drawn_B1hw, wrong_B1hw, own_B1hw: patch logits of people's sketches, of drawings
            (in joint training: of unlabelled photos), of people's sketches on wrong photos, and of
            drawings of labelled photos. The fakes' term is the mean of those given.
    """
    real = losses.patch_bce(real_B1hw, target=1.0).mean()
    logits = {"drawn": drawn_B1hw, "wrong": wrong_B1hw, "own": own_B1hw}
    fakes = {
        name: losses.patch_bce(logit_B1hw, target=0.0).mean()
        for name, logit_B1hw in logits.items()
        if logit_B1hw is not None
    }
    certainty = {
        "certainty_real": torch.sigmoid(real_B1hw.detach()).mean(),
        "certainty_drawn": torch.sigmoid(drawn_B1hw.detach()).mean(),
    }
    fake = torch.stack(list(fakes.values())).mean()
    return {"loss": real + fake, "real": real, **fakes, **certainty}
