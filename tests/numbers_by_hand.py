"""Small tensors in float64, and plain numbers of them, for tests against slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(rows: int, dim: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def backward(value: Tensor) -> None:
    torch.autograd.backward(value.sum())


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return bool(torch.autograd.gradcheck(function, leaves))
