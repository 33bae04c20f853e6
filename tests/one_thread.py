"""Two processes compute alike only with as many threads each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch while in the block, as workers and actors have. With more, sums are
    rounded otherwise: drawings differ by a hair, their rasters by a grey, gradients by a fifth."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
