"""The losses: pure functions that give one value for each pair, drawing or picture.

Shapes: B sketches (one pair each), P photos, N = B + P, D the length of an embedding, T rows of a
drawing, M mixtures, Z latent numbers, h x w patches.

``photo_of_B`` says which row of ``photo_PD`` each sketch was drawn of. A photo has one row, however
many sketches point to it; one that no sketch points to is a negative alone. A photo is never a
negative of its own sketches, nor are these of each other.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_FLOOR = 0.01
"""Least standard deviation of a mixture's component, in standard deviations of the offsets."""
RHO_LIMIT = 0.999
"""Largest correlation of a component's x and y."""


# --------------------------------------------------------------------------- retrieval


def info_nce(
    sketch_BD: Tensor,
    photo_PD: Tensor,
    photo_of_B: Tensor,
    temperature: float,
    weight_B: Tensor,
) -> Tensor:
    """Symmetric InfoNCE of each pair (B,), not yet weighted.

    Half of it is the cross-entropy of finding the photo among all photos, half that of finding the
    sketch among itself and the sketches of other photos. In the latter a sketch counts as often as
    its weight says, so that a doubtful one is also a faint negative, and one of weight 0 leaves the
    other pairs' values as they would be without it.

    Args:
        sketch_BD: embeddings of length one.
        photo_PD: embeddings of length one; may hold more photos than have sketches.
        photo_of_B: int64, the row of each sketch's photo.
        temperature: divisor of the cosines.
        weight_B: at least 0, of :func:`instance_weights`; passes no gradient on.
    """
    cosine_BP = sketch_BD @ photo_PD.T / temperature
    to_photo_B = F.cross_entropy(cosine_BP, photo_of_B, reduction="none")

    cosine_BB = photo_PD[photo_of_B] @ sketch_BD.T / temperature
    same_BB = photo_of_B[:, None] == photo_of_B
    # A factor on exp(x) is a term in x; -inf is no candidate.
    other_BB = (cosine_BB + weight_B.detach().log()).masked_fill(same_BB, -math.inf)
    own_B = cosine_BB.diagonal()
    to_sketch_B = torch.cat([own_B[:, None], other_BB], 1).logsumexp(1) - own_B
    return (to_photo_B + to_sketch_B) / 2


def triplet(
    sketch_BD: Tensor,
    photo_PD: Tensor,
    photo_of_B: Tensor,
    margin: float,
    negative_B: Tensor | None = None,
) -> Tensor:
    """Triplet loss of each pair (B,), with plain L2 distances (Eq. 4).

    Args:
        margin: by how much another photo has to be farther.
        negative_B: int64, the row of that other photo; None for the row after the pair's own, which
            is a random one where the batch is in random order.

    Raises:
        ValueError: a negative is the pair's own photo.
    """
    if negative_B is None:
        negative_B = (photo_of_B + 1) % len(photo_PD)
    if bool((negative_B == photo_of_B).any()):
        raise ValueError("a triplet's negative is the pair's own photo; give two photos or more")
    near_B = _distance(sketch_BD, photo_PD[photo_of_B])
    far_B = _distance(sketch_BD, photo_PD[negative_B])
    return (margin + near_B - far_B).clamp(min=0)


def mean_triplet(sketch_BD: Tensor, photo_PD: Tensor, photo_of_B: Tensor, margin: float) -> Tensor:
    """Mean of each pair's :func:`triplet` losses (B,) with every other photo as the negative.

    What the loss of a random negative is on average, without its chance.

    Raises:
        ValueError: fewer than two photos.
    """
    others = len(photo_PD) - 1
    if others < 1:
        raise ValueError("a triplet needs two photos or more")
    distance_BP = _distances(sketch_BD, photo_PD)
    near_B1 = distance_BP.gather(1, photo_of_B[:, None])
    loss_BP = (margin + near_B1 - distance_BP).clamp(min=0)
    return loss_BP.scatter(1, photo_of_B[:, None], 0.0).sum(1) / others


def instance_weights(
    certainty_B: Tensor, labelled_B: Tensor, kind: Literal["raw", "normalised", "none"]
) -> Tensor:
    """Weight of each pair, omega of Eq. 7 (B,), without gradient: 1 for labelled pairs.

    Args:
        certainty_B: D's scores in [0, 1]; those of labelled pairs are not read.
        labelled_B: bool, False for pseudo pairs.
        kind: ``raw`` takes a pseudo pair's certainty as it is (the paper); ``normalised`` divides
            it by its mean over the pseudo pairs, so that they keep their share as D learns to doubt
            them all; ``none`` takes 1.
    """
    omega_B = torch.ones_like(certainty_B) if kind == "none" else certainty_B.detach()
    if kind == "normalised":
        total = omega_B.masked_fill(labelled_B, 0.0).sum()
        # Where D is sure that all are bad, none counts.
        omega_B = torch.where(total > 0, omega_B * (~labelled_B).sum() / total, 0.0)
    return omega_B.masked_fill(labelled_B, 1.0)


# --------------------------------------------------------------------------- distillation


def distillation(
    kind: Literal["pair", "relational", "absolute"],
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    photo_of_B: Tensor,
) -> Tensor:
    """How far the student's distances are from the teacher's, for each pair (B,).

    Args:
        kind: ``pair`` compares the distance of the pair's sketch and photo, |d_T - d| (Eq. 6);
            ``relational`` the distances of its sketch, and of its photo, to all other N - 1
            embeddings, as the mean of |d_T - d|; ``absolute`` the embeddings themselves, as the
            mean of the two L2 distances.
        student: embeddings of the sketches (B, D) and photos (P, D).
        teacher: the same rows by the teacher (their D may differ unless ``absolute``); no gradient
            reaches it.
    """
    sketch_BD, photo_PD = student
    teacher_sketch_BD, teacher_photo_PD = (part.detach() for part in teacher)
    if kind == "pair":
        wanted_B = _distance(teacher_sketch_BD, teacher_photo_PD[photo_of_B])
        return (wanted_B - _distance(sketch_BD, photo_PD[photo_of_B])).abs()
    if kind == "absolute":
        sketch_B = _distance(teacher_sketch_BD, sketch_BD)
        photo_P = _distance(teacher_photo_PD, photo_PD)
        return (sketch_B + photo_P[photo_of_B]) / 2
    batch_ND = torch.cat([sketch_BD, photo_PD])
    wanted_ND = torch.cat([teacher_sketch_BD, teacher_photo_PD])
    off_NN = _distances(wanted_ND, wanted_ND) - _distances(batch_ND, batch_ND)
    off_N = off_NN.abs().sum(1) / (len(batch_ND) - 1)
    return (off_N[: len(sketch_BD)] + off_N[len(sketch_BD) + photo_of_B]) / 2


# --------------------------------------------------------------------------- drawings


class Mixture(NamedTuple):
    """A mixture of M Gaussians over an offset, of any leading shape."""

    log_pi: Tensor
    """(..., M) log of the components' shares."""
    mean: Tensor
    """(..., M, 2)"""
    log_sigma: Tensor
    """(..., M, 2)"""
    rho: Tensor
    """(..., M) correlation of x and y."""


def mixture(raw: Tensor) -> Mixture:
    """The mixture that a network's last layer (..., 6 M) stands for (Eq. 1).

    The order is pi, mean x, mean y, sigma x, sigma y, rho, M of each. Sigma is kept above
    ``SIGMA_FLOOR`` and rho within ``RHO_LIMIT`` by smooth functions: a clamp would cut the gradient
    off just where the mixture has to be pulled back.
    """
    pi, mean_x, mean_y, sigma_x, sigma_y, rho = raw.chunk(6, -1)
    # log(SIGMA_FLOOR + exp(x)) without the exponential.
    floor = math.log(SIGMA_FLOOR)
    log_sigma = floor + F.softplus(torch.stack([sigma_x, sigma_y], -1) - floor)
    return Mixture(
        log_pi=pi.log_softmax(-1),
        mean=torch.stack([mean_x, mean_y], -1),
        log_sigma=log_sigma,
        rho=RHO_LIMIT * rho.tanh(),
    )


def mixture_nll(mix: Mixture, offset: Tensor) -> Tensor:
    """-log p of offsets (..., 2) in log space, in nats (...); its gradient is finite and not zero.

    However far an offset lies from all components: nothing is added to the density.
    """
    return -_log_components(mix, offset).logsumexp(-1)


def redrawn(mix: Mixture, offset: Tensor) -> Tensor:
    """The offsets (..., 2) that were drawn, as differentiable functions of the mixture.

    Each component would have drawn the offset from some standard normal numbers; with these held
    fixed its draw moves with its mean, sigma and rho. The offset is the mean of the components'
    draws, each weighted by the odds that it was the one, held fixed too. The value is ``offset``
    but for rounding.
    """
    with torch.no_grad():
        odds = _log_components(mix, offset).softmax(-1)
        x, z_y = ((offset.unsqueeze(-2) - mix.mean) * (-mix.log_sigma).exp()).unbind(-1)
        y = (z_y - mix.rho * x) / (1 - mix.rho.square()).sqrt()
    correlated = torch.stack([x, mix.rho * x + (1 - mix.rho.square()).sqrt() * y], -1)
    drawn = mix.mean + mix.log_sigma.exp() * correlated
    return (odds.unsqueeze(-1) * drawn).sum(-2)


def pen_cross_entropy(logit_BT3: Tensor, pen_BT: Tensor) -> Tensor:
    """-log p of the pen states (B, T), in nats.

    Args:
        pen_BT: int64, 0 down, 1 up, 2 end.
    """
    return F.cross_entropy(logit_BT3.transpose(1, 2), pen_BT, reduction="none")


def drawing_nll(
    raw_BTK: Tensor, logit_BT3: Tensor, rows_BT5: Tensor, length_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean -log p of each drawing's offsets (B,) and of its pen states (B,): L_R of Eq. 3.

    The offsets count on the drawing's points; the pen on its points and the end row after them, so
    that the end is learnt. Rows behind the end count nowhere, and neither do they in the means.

    Args:
        raw_BTK: the mixture layer's output for each row, K = 6 M.
        logit_BT3: the pen layer's.
        rows_BT5: stroke-5 rows (dx, dy, down, up, end), padded with anything.
        length_B: int64, rows of each drawing with its end row, 2 or more.
    """
    offset_B = masked_mean(mixture_nll(mixture(raw_BTK), rows_BT5[..., :2]), length_B - 1)
    pen_BT = pen_cross_entropy(logit_BT3, rows_BT5[..., 2:].argmax(-1))
    return offset_B, masked_mean(pen_BT, length_B)


def masked_mean(value_BT: Tensor, count_B: Tensor) -> Tensor:
    """Mean of the first ``count_B`` values of each row (B,)."""
    real_BT = torch.arange(value_BT.shape[1], device=value_BT.device) < count_B[:, None]
    return value_BT.where(real_BT, 0.0).sum(1) / count_B


def kl_divergence(mean_BZ: Tensor, log_var_BZ: Tensor) -> Tensor:
    """KL divergence from N(0, I) of each drawing's latent, in nats a dimension (B,): L_kl of Eq. 3.

    The mean over the dimensions keeps its size comparable to the mean over the points. It has no
    tolerance below which it would stop to act.
    """
    return (mean_BZ.square() + log_var_BZ.exp() - 1 - log_var_BZ).mean(1) / 2


# --------------------------------------------------------------------------- discriminator


def patch_bce(logit_B1hw: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of each pair, in nats, mean over its patches (B,): a term of Eq. 5.

    Args:
        target: 1 for a real pair, -log D; 0 for a fake one, -log(1 - D).
    """
    goal_B1hw = torch.full_like(logit_B1hw, target)
    bce_B1hw = F.binary_cross_entropy_with_logits(logit_B1hw, goal_B1hw, reduction="none")
    return bce_B1hw.flatten(1).mean(1)


# --------------------------------------------------------------------------- policy gradient


def reward(
    retrieval_B: Tensor, certainty_B: Tensor, retrieval_weight: float, certainty_weight: float
) -> Tensor:
    """Reward of each drawing (B,): -lambda_r1 * its retrieval loss + lambda_r2 * D (Eq. 8)."""
    return certainty_weight * certainty_B - retrieval_weight * retrieval_B


def leave_one_out(reward_B: Tensor, photo_B: Tensor) -> Tensor:
    """Baseline of each drawing (B,): the mean reward of its photo's other drawings, 0 without any.

    It does not depend on the drawing itself, so the gradient stays unbiased.

    Args:
        photo_B: int64, a number for each photo.
    """
    same_BB = (photo_B[:, None] == photo_B).to(reward_B.dtype)
    same_BB.fill_diagonal_(0)
    return same_BB @ reward_B / same_BB.sum(1).clamp(min=1)


def normalised(advantage_B: Tensor) -> Tensor:
    """The advantages (B,) divided by their root mean square: the standard deviation about 0.

    Not about their mean: where they are all alike, as with no baseline, that is next to nothing,
    and dividing by it would make their size arbitrary. Not centred: what an advantage is compared
    with is the baseline's choice.
    """
    return advantage_B / advantage_B.square().mean().sqrt().clamp(min=1e-6)


def importance_ratio(log_prob_B: Tensor, behaviour_B: Tensor, max_ratio: float) -> Tensor:
    """Weight (B,), without gradient, of drawings that older weights made: min(p / q, max_ratio).

    Args:
        log_prob_B: log p of each drawing under the weights that learn.
        behaviour_B: log q, under those that drew it.
        max_ratio: limit that keeps one drawing from outweighing all others; 0: no correction, 1.
    """
    if max_ratio == 0:
        return torch.ones_like(log_prob_B)
    log_ratio_B = log_prob_B.detach() - behaviour_B.detach()
    return log_ratio_B.clamp(max=math.log(max_ratio)).exp()


def policy_surrogate(
    log_prob_B: Tensor, rows_B: Tensor, advantage_B: Tensor, ratio_B: Tensor, *, per_row: bool
) -> Tensor:
    """What to minimise to raise the expected reward, for each drawing (B,) (Eq. 9).

    Its gradient is -ratio * advantage times that of the drawing's log-probability.

    Args:
        log_prob_B: sum over the rows that were drawn, offset and pen together.
        rows_B: number of these rows.
        advantage_B: reward less baseline.
        ratio_B: of :func:`importance_ratio`.
        per_row: take the mean over the rows, so that long drawings do not outweigh short ones;
            this is no longer the gradient of the expected reward, but of reward per row.
    """
    if per_row:
        log_prob_B = log_prob_B / rows_B
    return -(ratio_B * advantage_B).detach() * log_prob_B


# --------------------------------------------------------------------------- parts


def _log_components(mix: Mixture, offset: Tensor) -> Tensor:
    """log(pi * density) of offsets (..., 2) for each component (..., M)."""
    z = (offset.unsqueeze(-2) - mix.mean) * (-mix.log_sigma).exp()
    z_x, z_y = z.unbind(-1)
    # (z_x^2 - 2 rho z_x z_y + z_y^2) / (1 - rho^2) as a sum of squares, which rounding cannot make
    # negative.
    rest = 1 - mix.rho.square()
    square = z_x.square() + (z_y - mix.rho * z_x).square() / rest
    log_density = -square / 2 - mix.log_sigma.sum(-1) - rest.log() / 2 - math.log(2 * math.pi)
    return mix.log_pi + log_density


def _distance(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """L2 distance of rows (B,), with gradient 0 where they are equal."""
    distance_B: Tensor = torch.linalg.vector_norm(a_BD - b_BD, dim=1)
    return distance_B


def _distances(a_AD: Tensor, b_BD: Tensor) -> Tensor:
    """L2 distances of all rows (A, B), with gradient 0 where they are equal.

    Not by way of the dot products: their rounding makes near rows look apart.
    """
    distance_AB: Tensor = torch.cdist(a_AD, b_BD, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_AB
