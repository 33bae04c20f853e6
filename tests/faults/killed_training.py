"""Trainings by the real command that are killed by SIGKILL and run again, each in a process of its
own.

``python -m tests.faults.killed_training OUT POINT... -- train retrieval ...`` trains ``OUT/whole``
undisturbed, and for each point ``OUT/POINT`` with the driver killed there and the same command
again. What the points are is said by :func:`_arm`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorboardX
import torchvision

from sbir_ray import checkpoint, cli
from sbir_ray.train import launch, loop
from sbir_ray.train.ranks import Ranks
from tests.faults.kit import forked

LOADED = launch, tensorboardX, torchvision
"""Once, before the processes part."""


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(holder: Any, name: str, call: int, do: Callable[..., Any]) -> None:
    """``do`` instead of the ``call``-th call of a function, from 1."""
    real, left = getattr(holder, name), call

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal left
        left -= 1
        return real(*args, **more) if left else do(*args, **more)

    setattr(holder, name, counted)


def _arm(point: str) -> None:
    """Have this process end at a point of its training, which saves at every second step."""
    save, write, append = checkpoint.save, checkpoint.write_bytes, loop.append_text

    def half_a_file(file: Path, data: bytes) -> None:
        write(file, data[: len(data) // 2])
        _die()

    def half_a_line(file: Path, text: str) -> None:
        append(file, text[: len(text) // 2])
        _die()

    def saved(*args: Any, **more: Any) -> None:
        save(*args, **more)
        _die()

    if point == "mid-step":  # the gradients of step 4 are there, its update is not
        _at(Ranks, "sum_gradients", 4, _die)
    elif point == "mid-checkpoint":  # half of the weights of step 4, which come first of four files
        _at(checkpoint, "write_bytes", 5, half_a_file)
    elif point == "before-rename":  # all of the checkpoint of step 4, under its temporary name
        _at(checkpoint, "_remove", 2, _die)
    elif point == "before-log":  # step 4 is saved, the line of step 5 is not written
        _at(checkpoint, "save", 2, saved)
    elif point == "mid-log":  # half a line of step 5
        _at(loop, "append_text", 5, half_a_line)
    else:  # the last step is saved, and run.json does not say yet that all is done
        assert point == "before-done", point
        _at(loop, "write_json_atomic", 2, _die)


def _run(words: Sequence[str], out: Path, point: str = "") -> int:
    """The state in which a process of its own ends that runs the command."""

    def work() -> int:
        if point:
            _arm(point)
        sys.argv = ["sbir-ray", *words, "--out", str(out)]
        cli.main()
        return 0

    return forked(work)


def main() -> None:
    split = sys.argv.index("--")
    (out, *points), words = sys.argv[1:split], sys.argv[split + 1 :]
    ends = {"whole": [_run(words, Path(out) / "whole")]}
    for point in points:
        run = Path(out) / point
        ends[point] = [_run(words, run, point), _run(words, run)]
    Path(out, "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
