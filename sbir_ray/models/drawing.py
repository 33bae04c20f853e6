"""What a generator draws, and the random numbers it draws with.

Shapes: B drawings, T rows of a drawing, M mixture components, K = 3 + 6 M outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbir_ray import losses
from sbir_ray.data import strokes as sketches
from sbir_ray.data.strokes import Strokes

GREEDY = 0.0
"""The temperature at which nothing is left to chance."""
DOWN, UP, END = range(3)
"""The pen states, in the order of a stroke-5 row's last three numbers."""
PEN_START = (0.0, 0.0, 0.0, 1.0, 0.0)
"""The row before the first of the pen generator: the pen is up, at the centre of the canvas."""


@dataclass(frozen=True)
class Drawing:
    """What the generator drew of one photo."""

    strokes: Strokes
    """Canonical."""
    rows: NDArray[np.float32]
    """Stroke-5 rows (n, 5) as they were drawn; the last is the end row if ``ended``."""
    log_prob: float
    """Sum over the rows of log p, offset and pen together, under the model at temperature 1: of the
    points alone where they are as many as may be, as whether they then end changes nothing."""
    ended: bool
    """Whether the generator ended it, and not the limit of points."""
    attention: NDArray[np.float32] | None = None
    """(n, H, W): where each row looked, if asked for."""


class Noise(NamedTuple):
    """All random numbers of a batch of drawings, scaled to the temperature.

    The largest of logit + temperature * Gumbel number is a sample of the softmax of logit /
    temperature, so the greedy choice is the one with noise 0. The end is drawn in another way, with
    the same odds: the drawing ends when the odds that it should have gone on so far fall below a
    number drawn evenly between 0 and 1. The greedy number is 1/2, so a greedy drawing has the
    length that half of the sampled ones would have; to end only where the end is the most likely
    state would be to end almost never, as each row's odds of it are small.
    """

    choice_BTX: Tensor
    """(B, T, 2 + M): added to the logits of pen down and up, and of the components."""
    offset_BT2: Tensor
    """(B, T, 2): standard normal numbers of the offset."""
    end_BT: Tensor
    """(B, T): the number under which the odds have to fall."""

    @classmethod
    def seeded(cls, seeds: Sequence[int], steps: int, mixtures: int, temperature: float) -> Noise:
        """Noise for each drawing from its own seed.

        Raises:
            ValueError: a temperature below 0.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature: {temperature} is less than 0")
        choice = torch.zeros(len(seeds), steps, 2 + mixtures)
        offset = torch.zeros(len(seeds), steps, 2)
        end = torch.full((len(seeds), steps), 0.5)
        if temperature > 0:
            for row, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                choice[row].exponential_(generator=generator)
                offset[row].normal_(generator=generator)
                even = torch.rand((), generator=generator)
                end[row] = torch.sigmoid(temperature * torch.logit(even))
            choice = choice.log_().mul_(-temperature)
            offset = offset.mul_(math.sqrt(temperature))
        # A drawing that would end at once gets a point.
        end[:, 0] = -1.0
        return cls(choice, offset, end)

    @classmethod
    def joined(cls, parts: Iterable[Noise]) -> Noise:
        """The noise of all drawings of ``parts``, in their order."""
        return cls(*(torch.cat(numbers) for numbers in zip(*parts, strict=True)))


def row_log_prob(raw_BTK: Tensor, rows_BT5: Tensor) -> Tensor:
    """log p of each row (B, T): the offset's (none for an end row) and the pen state's."""
    pen_BT = losses.pen_cross_entropy(raw_BTK[..., :3], rows_BT5[..., 2:].argmax(-1))
    offset_BT = losses.mixture_nll(losses.mixture(raw_BTK[..., 3:]), rows_BT5[..., :2])
    return -(pen_BT + offset_BT.where(rows_BT5[..., 4] == 0, 0.0))


def chosen(raw_BK: Tensor, noise: Noise, odds_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (B, 5) that follow from the outputs and one row of noise (B, ...), and the odds
    (B, 1) of having gone on so far."""
    logit_B3 = raw_BK[:, :3]
    mix = losses.mixture(raw_BK[:, 3:])
    pen_noise_B2, noise_BM = noise.choice_BTX.split([2, mix.log_pi.shape[1]], 1)
    odds_B1 = odds_B1 * (1 - logit_B3.softmax(1)[:, END:])
    pen_B = (logit_B3[:, :END] + pen_noise_B2).argmax(1)
    pen_B = pen_B.masked_fill(odds_B1[:, 0] < noise.end_BT, END)
    component_B1 = (mix.log_pi + noise_BM).argmax(1, keepdim=True)
    pair_B12 = component_B1[..., None].expand(-1, 1, 2)
    mean_B2 = mix.mean.gather(1, pair_B12)[:, 0]
    sigma_B2 = mix.log_sigma.gather(1, pair_B12)[:, 0].exp()
    rho_B = mix.rho.gather(1, component_B1)[:, 0]
    x_B, y_B = noise.offset_BT2.unbind(1)
    correlated_B2 = torch.stack([x_B, rho_B * x_B + (1 - rho_B.square()).sqrt() * y_B], 1)
    pen_B3 = torch.nn.functional.one_hot(pen_B, 3).to(raw_BK.dtype)
    return torch.cat([mean_B2 + sigma_B2 * correlated_B2, pen_B3], 1), odds_B1


def finished(
    raw_BTK: Tensor,
    rows_BT5: Tensor,
    ends: Sequence[int | None],
    scale: float,
    attention_BTHW: Tensor | None,
) -> list[Drawing]:
    """The drawings that a decoder's rows are.

    Args:
        raw_BTK: the outputs that the rows were drawn from, T one more than the most points.
        rows_BT5: the rows; what lies behind an end is not read.
        ends: of each, its end row, or None if it has as many points as may be.
        scale: of the offsets.
        attention_BTHW: where each row looked, if that is asked for.
    """
    raw_BTK, rows_BT5 = raw_BTK.cpu(), rows_BT5.cpu()
    limit = raw_BTK.shape[1] - 1
    drawings: list[Drawing] = []
    for drawing, end in enumerate(ends):
        count = limit if end is None else end + 1
        row_T5 = rows_BT5[drawing, :count].clone()
        if end is not None:
            row_T5[end, :2] = 0
        # Each for itself: its length then is the only thing that its rounding depends on.
        log_prob_T = row_log_prob(raw_BTK[drawing, None, :count], row_T5[None])[0, :limit]
        rows = row_T5.numpy()
        looks = None
        if attention_BTHW is not None:
            looks = attention_BTHW[drawing, :count].cpu().numpy().copy()
        drawings.append(
            Drawing(
                strokes=sketches.canonical(sketches.from_stroke5(rows, scale)),
                rows=rows,
                log_prob=math.fsum(log_prob_T.tolist()),
                ended=end is not None,
                attention=looks,
            )
        )
    return drawings
