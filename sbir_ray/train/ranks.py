"""What the workers of one run do together: gather rows, add gradients, agree.

Every rank embeds its own rows, gathers those of the others, and computes the loss of the whole
batch; gradients reach only its own rows, and the sum over ranks is the gradient that one process
would have computed. So the result does not depend on the number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the workers. ``Ranks()`` is one process alone."""

    rank: int = 0
    world: int = 1

    def mine(self, count: int) -> range:
        """The rows of a batch of ``count`` that this rank holds: every ``world``-th.

        Raises:
            ValueError: ``count`` cannot be divided among the workers.
        """
        if count % self.world:
            raise ValueError(f"{count} rows cannot be divided among {self.world} workers")
        return range(self.rank, count, self.world)

    def gather(self, rows: Tensor) -> Tensor:
        """All rows of the batch in their order; gradients flow to this rank's own rows.

        Args:
            rows: (count / world, ...) of this rank, the same shape on every rank.

        Returns:
            (count, ...)
        """
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.detach().contiguous())
        parts[self.rank] = rows
        return torch.stack(parts, dim=1).flatten(0, 1)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the ranks (one collective for all)."""
        if self.world == 1:
            return
        chosen = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        start = 0
        for parameter, grad in zip(chosen, grads, strict=True):
            parameter.grad = flat[start : start + grad.numel()].view_as(grad)
            start += grad.numel()

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sum of counts by name over the ranks, whatever names each has."""
        if self.world == 1:
            return dict(counts)
        text = torch.frombuffer(bytearray(json.dumps(counts).encode()), dtype=torch.uint8)
        # On the CPU, for which workers with GPUs have gloo beside nccl.
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.full((1, int(longest)), ord(" "), dtype=torch.uint8)
        padded[0, : len(text)] = text
        every = [json.loads(bytes(row.tolist())) for row in self.gather(padded)]
        names = sorted({name for one in every for name in one})
        return {name: sum(one.get(name, 0) for one in every) for name in names}

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()
