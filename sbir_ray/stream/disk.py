"""Disks that take nothing more."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbir_ray.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def disk_told(out: Path) -> Iterator[None]:
    """A disk that takes nothing more as an error that says so, in whatever process it was met.

    Raises:
        UserError: the disk of ``out`` is full, or cannot be written.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _FULL:
                raise UserError(
                    f"{out}: cannot be written ({cause.strerror}); make room and repeat the "
                    "command, which goes on from there"
                ) from error
            # Ray keeps a worker's error as the cause of its own.
            cause = getattr(cause, "cause", None) or cause.__cause__ or cause.__context__
        raise
