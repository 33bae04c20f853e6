"""Freed memory stays with the process that trains, which needs as much again for its next step.

glibc gives large blocks back to the system at once and gets them page by page again: up to 40% of
the time of a training step on CPUs.
"""

from __future__ import annotations

import ctypes
import os

_MMAP_THRESHOLD, _TRIM_THRESHOLD = 1 << 30, (1 << 31) - 1
"""Bytes; no tensor of a step is larger."""
_TUNABLES = "GLIBC_TUNABLES"


def keep_freed_memory() -> None:
    """Ask this process's allocator to; does nothing where that is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, _MMAP_THRESHOLD)
        mallopt(trim_threshold, _TRIM_THRESHOLD)


def worker_environment() -> dict[str, str]:
    """Variables of a process that trains in another thread than its main one, as Ray's workers do.

    Such threads have arenas of their own, of pieces of 64 MiB that go back to the system as soon as
    they are free, whatever it was asked for: so one arena for all, and huge pages, of which fewer
    have to be got. Nothing where the user has tuned glibc already.
    """
    if _TUNABLES in os.environ:
        return {}
    chosen = {
        "arena_max": 1,
        "hugetlb": 1,
        "mmap_threshold": _MMAP_THRESHOLD,
        "trim_threshold": _TRIM_THRESHOLD,
    }
    return {_TUNABLES: ":".join(f"glibc.malloc.{name}={n}" for name, n in chosen.items())}
