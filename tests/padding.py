"""Sequences of several lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def padded(sequences: Sequence[np.ndarray], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Stroke-5 rows, padded with junk, and their lengths."""
    length = torch.tensor([len(rows) for rows in sequences])
    points = torch.full((len(sequences), int(length.max()) + extra, 5), 7.0)
    for row, rows in zip(points, sequences, strict=True):
        row[: len(rows)] = torch.from_numpy(rows)
    return points, length
