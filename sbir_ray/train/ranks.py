"""What the workers of one run do together: gather rows, add gradients, agree.

Every rank embeds its own rows, gathers those of the others, and computes the loss of the whole
batch; gradients reach only its own rows, and the sum over ranks is the gradient that one process
would have computed. So the result does not depend on the number of workers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the workers. ``Ranks()`` is one process alone."""

    rank: int = 0
    world: int = 1
    watched: list[tuple[tuple[str, ...], Tensor]] = field(
        default_factory=list, compare=False, repr=False
    )
    """Of the step under way, see :meth:`watch`."""

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

    def watch(self, photo_ids: Sequence[str], *rows: Tensor) -> None:
        """Keep what this rank's rows came to, until the step is done: should its loss or gradient
        not be finite, the photos to blame are named by it.

        Args:
            rows: (len(photo_ids), ...) each, of this rank alone.
        """
        self.watched.extend((tuple(photo_ids), one.detach()) for one in rows)

    def suspects(self) -> list[str]:
        """Photos of which a watched row is not finite, each once."""
        found: dict[str, None] = {}
        for photo_ids, rows in self.watched:
            bad = (~torch.isfinite(rows)).flatten(1).any(1) if rows.ndim > 1 else ~rows.isfinite()
            found |= {photo_ids[i]: None for i in bad.nonzero().flatten().tolist()}
        return list(found)

    def sum_gradients(
        self, parameters: Iterable[torch.nn.Parameter], told: Sequence[Tensor | float] = ()
    ) -> Tensor:
        """Replace each gradient by its sum over the ranks, in one collective.

        Args:
            told: numbers that this rank tells the others, as many on every rank.

        Returns:
            (world, 1 + len(told)): by rank the largest absolute value of its own gradient, and what
            it told; the same on all ranks.
        """
        chosen = [p for p in parameters if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        largest = torch.nn.utils.get_total_norm(grads, norm_type=math.inf)
        row = torch.stack([largest, *(torch.as_tensor(t).to(largest) for t in told)])
        if self.world == 1:
            return row[None]
        table = row.new_zeros(self.world, len(row))
        table[self.rank] = row
        flat = torch.cat([*(g.flatten() for g in grads), table.flatten()])
        dist.all_reduce(flat)
        start = 0
        for parameter, grad in zip(chosen, grads, strict=True):
            parameter.grad = flat[start : start + grad.numel()].view_as(grad)
            start += grad.numel()
        return flat[start:].view_as(table)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def share(self, text: str) -> list[str]:
        """The texts of all ranks, by rank."""
        if self.world == 1:
            return [text]
        data = torch.frombuffer(bytearray(json.dumps(text).encode()), dtype=torch.uint8)
        # On the CPU, for which workers with GPUs have gloo beside nccl.
        longest = torch.tensor(len(data))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        padded = torch.full((1, int(longest)), ord(" "), dtype=torch.uint8)
        padded[0, : len(data)] = data
        return [json.loads(bytes(row.tolist())) for row in self.gather(padded)]

    def sum_counts(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The sum of counts by name over the ranks, whatever names each has."""
        every = [json.loads(text) for text in self.share(json.dumps(counts))]
        names = sorted({name for one in every for name in one})
        return {name: sum(one.get(name, 0) for one in every) for name in names}

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            dist.barrier()
