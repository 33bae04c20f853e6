"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbir_ray.errors import UserError
from sbir_ray.places import copy_tree, is_local, place, sync, told


def refuse_existing(target: str | Path) -> None:
    """Refuse a target that holds something already.

    Raises:
        UserError: ``target`` is a file or a folder that is not empty.
    """
    target = place(target)
    with told(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(
                f"{target}: exists already and is not empty; remove it or name another one"
            )


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well.

    When the block raises, the temporary folder is removed and ``target`` is as it was. Files are
    on the disk before the name is. For an object store it is a folder of this machine, whose files
    are sent when the block ends well, the headers last.

    Raises:
        UserError: as :func:`refuse_existing`, or the folder cannot be made.
    """
    target = place(target)
    refuse_existing(target)
    if not is_local(target):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            copy_tree(Path(folder), target)
        return
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
            sync(path)
        os.rename(work, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
