"""One update: losses, the gradients of all ranks, and the check that all of it is finite.

A step that is not finite anywhere changes nothing: no weight, no optimiser state, no running
statistic. The ranks decide on numbers that they have exchanged, so they skip it together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbir_ray.config import AdamConfig
from sbir_ray.train.job import Task
from sbir_ray.train.ranks import Ranks

_SHOWN = 16
"""Photos, at most, that a message names."""


@dataclass(frozen=True)
class Taken:
    """What became of a step; the same on all ranks."""

    values: dict[str, Any]
    """Its losses and gradient norms."""
    trouble: str
    """Why it was skipped; "" when it was not."""
    stop: bool
    """Whether rank 0 was asked to end the run."""


def take_step(
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    batch: Any,
    step: int,
    ranks: Ranks,
    *,
    stop: bool = False,
) -> Taken:
    """Update the networks whose turn it is, on this rank's rows of ``step``.

    Args:
        stop: whether this rank was asked to end the run; that of rank 0 counts.
    """
    task.trained.train()
    before = _statistics(task.trained)
    ranks.watched.clear()
    losses = task.losses(batch, step)
    values: dict[str, Any] = dict(losses)
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    turn = task.turn(step)
    parameters = [p for player in turn.values() for p in player.parameters]
    table = ranks.sum_gradients(parameters, (losses["loss"].detach(), float(stop)))
    norms = {
        name: torch.nn.utils.clip_grad_norm_(player.parameters, player.adam.clip_norm)
        for name, player in turn.items()
    }
    values |= {"_".join(["gradient_norm", name]).rstrip("_"): n for name, n in norms.items()}
    # The same numbers on all ranks, which therefore all decide alike.
    finite = torch.stack([torch.isfinite(n) for n in [*norms.values(), *table.flatten()]])
    trouble = ""
    if bool(finite.all()):
        for name, player in turn.items():
            for group in optimizers[name].param_groups:
                group["lr"] = learning_rate(step, task.steps, player.adam)
            optimizers[name].step()
    else:
        trouble = _trouble(losses, norms, table[:, 0], step, ranks)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
    return Taken(values, trouble, bool(table[0, 2]))


def learning_rate(step: int, steps: int, adam: AdamConfig) -> float:
    """The rate of ``step`` of ``steps``: ``constant``, or ``one_cycle``: a cosine up over the first
    30% of the steps from lr / 25, and a cosine down to almost 0."""
    if adam.schedule == "constant":
        return adam.lr
    peak = max(1.0, 0.3 * steps)
    if step < peak:
        low, high, part = adam.lr / 25, adam.lr, step / peak
    else:
        low, high, part = adam.lr / 1e4, adam.lr, 1 - (step - peak) / max(1.0, steps - peak)
    return low + (high - low) * 0.5 * (1 - math.cos(math.pi * part))


def _statistics(trained: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The running statistics that a forward pass changes, each with a copy."""
    learning = [m for m in trained.modules() if isinstance(m, _BatchNorm) and m.training]
    return [(buffer, buffer.clone()) for module in learning for buffer in module.buffers()]


def _trouble(
    losses: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    largest_r: Tensor,
    step: int,
    ranks: Ranks,
) -> str:
    """One line: the step, what is not finite, on which ranks, of which photos.

    To blame are the ranks with rows that are not finite; else those whose gradient is not.
    """
    names = [name for name, value in losses.items() if not bool(torch.isfinite(value).all())]
    if not names:
        odd = [name for name, norm in norms.items() if not bool(torch.isfinite(norm))]
        names = [f"gradient of {name}" if name else "gradient" for name in odd or norms]
    mine = ranks.suspects()
    told = ranks.share(json.dumps([mine, sorted({i for ids, _ in ranks.watched for i in ids})]))
    rows = [json.loads(text) for text in told]
    guilty = [rank for rank, (bad, _) in enumerate(rows) if bad]
    which = 0
    if not guilty:
        guilty = [r for r, value in enumerate(largest_r.tolist()) if not math.isfinite(value)]
        guilty, which = guilty or list(range(ranks.world)), 1
    photos = [photo for rank in guilty for photo in rows[rank][which]]
    return (
        f"step {step}: {', '.join(names)} not finite on rank {_listed(map(str, guilty))} "
        f"(photos {_listed([photo[:12] for photo in photos])}); step skipped, nothing changed"
    )


def _listed(names: Any) -> str:
    every: Sequence[str] = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
