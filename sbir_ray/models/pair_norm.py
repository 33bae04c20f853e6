"""Within-pair normalisation of embeddings, fitted to pairs when a network has been trained.

Shapes: N embeddings, M pairs, D the length of an embedding, K axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AXES = 128
"""K, at most; the others of a thousand pairs' differences say nothing that more pairs would."""
SHRINKAGE = 0.9
"""Share of the mean of all variances in each variance, the rest is what was measured: few pairs
say little about many directions."""
_LEAST = 1e-10
"""Share of all variance below which an axis is rounding."""


class PairNorm(nn.Module):
    """Within-class covariance normalisation (Hatch, Kajarekar, Stolcke 2006), a pair being a class.

    A sketch and its photo differ by what is no matter of which photo it is: the style of the hand,
    shading, what sketches leave out. With the second moment S of such differences, shrunk,

        W = (1 - a) S + a tr(S) / D I,    x -> W^(-1/2) x / |W^(-1/2) x|

    so that directions in which pairs differ count less. Only the ``axes`` with the largest variance
    are kept; until :meth:`fit`, and after :meth:`clear`, embeddings stay as they are.

    Args:
        dim: D.
        axes: K, at most D; 0 for none ever.
    """

    axes_KD: Tensor
    """Orthonormal directions, those in which pairs differ most first."""
    change_K: Tensor
    """Factor of an embedding's part along each direction, less one: in (-1, 0]."""

    def __init__(self, dim: int, axes: int = AXES) -> None:
        super().__init__()
        count = min(axes, dim)
        self.register_buffer("axes_KD", torch.zeros(count, dim))
        self.register_buffer("change_K", torch.zeros(count))

    def forward(self, embedding_ND: Tensor) -> Tensor:
        """Embeddings of length one to such (N, D)."""
        if not len(self.change_K):
            return embedding_ND
        x_ND = embedding_ND.float()
        along_NK = x_ND @ self.axes_KD.T
        return F.normalize(x_ND + (along_NK * self.change_K) @ self.axes_KD, dim=1)

    @torch.no_grad()
    def fit(self, difference_MD: Tensor) -> None:
        """From the differences of pairs' embeddings, sketch less photo; all zero change nothing.

        Raises:
            ValueError: another D, or a difference that is not finite.
        """
        if difference_MD.ndim != 2 or difference_MD.shape[1] != self.axes_KD.shape[1]:
            raise ValueError(f"differences of shape {tuple(difference_MD.shape)}")
        if not bool(torch.isfinite(difference_MD).all()):
            raise ValueError("a difference is not finite")
        self.clear()
        # In float64 on the CPU: the same axes on all machines, but for the rounding of embeddings.
        x_MD = difference_MD.double().cpu()
        # The moment's own eigenvalues, from the M x M products: D may be many thousands.
        variance_M, weight_MM = torch.linalg.eigh(x_MD @ x_MD.T / max(1, len(x_MD)))
        total = variance_M.sum()
        if not total:
            return
        top = variance_M.argsort(descending=True)[: len(self.change_K)]
        top = top[variance_M[top] > _LEAST * total]
        variance_K = variance_M[top]
        axis_KD = F.normalize(weight_MM[:, top].T @ x_MD, dim=1)
        # An axis has no sign of its own.
        largest_K1 = axis_KD.gather(1, axis_KD.abs().argmax(1, keepdim=True))
        floor = SHRINKAGE * total / x_MD.shape[1]
        self.axes_KD[: len(top)] = axis_KD * largest_K1.sign()
        # Relative to directions in which pairs do not differ: lengths do not matter.
        self.change_K[: len(top)] = (1 + (1 - SHRINKAGE) * variance_K / floor).rsqrt() - 1

    def clear(self) -> None:
        """Forget the pairs."""
        self.axes_KD.zero_()
        self.change_K.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Weights of before this normalisation are those of a network without it."""
        for name in ("axes_KD", "change_K"):
            state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
