"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbir_ray.errors import UserError


def refuse_existing(target: str | Path) -> None:
    """Refuse a target that holds something already.

    Raises:
        UserError: ``target`` is a file or a folder that is not empty.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already and is not empty; remove it or name another one")


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well.

    When the block raises, the temporary folder is removed and ``target`` is as it was. Files are
    on the disk before the name is.

    Raises:
        UserError: as :func:`refuse_existing`, or the folder cannot be made.
    """
    target = Path(target)
    refuse_existing(target)
    work = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); name another one") from error
    try:
        yield work
        for path in [*work.rglob("*"), work]:
            _sync(path)
        os.rename(work, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
