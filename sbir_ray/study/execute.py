"""The work of a study, as much at a time as there is room for, each piece in a Ray task.

What is done is what lies on the disk: the same call again does the rest. A piece that fails takes
with it those that need it, and nothing else.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from sbir_ray.errors import SbirError
from sbir_ray.runlog import Progress
from sbir_ray.study.work import Draw, Work

_POLL = 1.0
"""Seconds between looks at the logs of running trainings."""


def execute(
    work: Sequence[Work],
    *,
    parallel: int,
    cpus: float = 1.0,
    gpu: bool = False,
    failures: Path,
    progress: Callable[[str], Progress],
) -> dict[str, str]:
    """Do what is not done. Needs a Ray that is up.

    Args:
        work: each after all that it needs.
        parallel: pieces at a time.
        cpus: of each; also its threads.
        gpu: one for each.
        failures: folder for the tracebacks.
        progress: makes a progress line from a title.

    Returns:
        What failed, with the reason in one line.
    """
    waiting = {piece.name: piece for piece in work if not piece.done}
    failed: dict[str, str] = {}
    with (
        progress("study") as bar,
        _Tasks(parallel, cpus, gpu) as tasks,
        _Drawings(gpu) as drawings,
    ):
        line = _Line(bar, waiting)
        line.show(tasks.running, failed)
        while waiting or tasks.running or drawings.running:
            ended = _hopeless(waiting, failed)
            running = [*tasks.running, *drawings.running]
            open_ = set(waiting) | {piece.name for piece in running}
            for piece in [p for p in waiting.values() if not open_.intersection(p.needs)]:
                place = drawings if isinstance(piece, Draw) else tasks
                if place.room:
                    place.start(waiting.pop(piece.name))
            ended += tasks.wait(_POLL) if tasks.running else ()
            ended += drawings.wait(0 if tasks.running else _POLL)
            for piece, reason, trace in ended:
                if reason:
                    failed[piece.name] = reason
                    bar.say(f"{piece.name}: failed: {reason}")
                if trace:
                    _keep(failures / f"{piece.name}.log", trace)
                line.done += piece.cost
                line.pieces += 1
            line.show(tasks.running, failed)
    return failed


class Ended(NamedTuple):
    """A piece that needs no more waiting for."""

    piece: Work
    reason: str
    """Why it failed, in one line, or ""."""
    trace: str
    """Where, or ""."""


def _hopeless(waiting: dict[str, Work], failed: dict[str, str]) -> list[Ended]:
    """Take out what needs something that failed, which then failed too; the reason is that of what
    failed first. What needs a piece comes behind it, so whole chains are taken out at once."""
    ended = []
    for piece in list(waiting.values()):
        broken = next((name for name in piece.needs if name in failed), None)
        if broken is not None:
            reason = failed[broken]
            reason = reason if reason.startswith("in ") else f"in {broken}: {reason}"
            failed[piece.name] = reason
            ended.append(Ended(piece, reason, ""))
            del waiting[piece.name]
    return ended


def _attempt(piece: Work, gpu: bool) -> tuple[str, str]:
    """Do a piece; the reason why it failed, or "", and where."""
    try:
        piece.perform(gpu)
    except SbirError as error:
        return str(error), ""
    except Exception as error:  # one run's fault is not the study's
        return " ".join(f"{type(error).__name__}: {error}".split())[:300], traceback.format_exc()
    return "", ""


def _perform(piece: Work, threads: int, gpu: bool) -> tuple[str, str]:
    """The task."""
    import torch

    torch.set_num_threads(threads)
    return _attempt(piece, gpu)


class _Tasks:
    """Pieces that run, each in a task; ended with the block, whatever happens."""

    def __init__(self, parallel: int, cpus: float, gpu: bool) -> None:
        import ray

        self.parallel, self.threads, self.gpu = parallel, max(1, math.floor(cpus)), gpu
        # A process that dies is tried again, and goes on from the run's checkpoint.
        self.task: Any = ray.remote(num_cpus=cpus, num_gpus=float(gpu), max_retries=2)(_perform)
        self.pieces: dict[Any, Work] = {}

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for ref in self.pieces:
            ray.cancel(ref, force=True)
        if self.pieces:
            ray.wait(list(self.pieces), num_returns=len(self.pieces), timeout=30)

    @property
    def running(self) -> list[Work]:
        """Those that have not ended."""
        return list(self.pieces.values())

    @property
    def room(self) -> bool:
        """Whether another may start."""
        return len(self.pieces) < self.parallel

    def start(self, piece: Work) -> None:
        """Have it done."""
        self.pieces[self.task.remote(piece, self.threads, self.gpu)] = piece

    def wait(self, seconds: float) -> Iterator[Ended]:
        """Those that end meanwhile."""
        import ray
        from ray.exceptions import RayError

        ended, _ = ray.wait(list(self.pieces), timeout=seconds)
        for ref in ended:
            try:
                reason, trace = ray.get(ref)
            except RayError as error:
                reason, trace = f"its process ended ({type(error).__name__})", str(error)
            yield Ended(self.pieces.pop(ref), reason, trace)


class _Drawings:
    """A drawing at a time, by actors of its own, while the tasks go on."""

    def __init__(self, gpu: bool) -> None:
        self.gpu = gpu
        self.thread = ThreadPoolExecutor(1, "drawings")
        self.pieces: dict[Future[tuple[str, str]], Work] = {}

    def __enter__(self) -> _Drawings:
        return self

    def __exit__(self, *_: object) -> None:
        # Its folder is locked until it ends.
        self.thread.shutdown(wait=True, cancel_futures=True)

    @property
    def running(self) -> list[Work]:
        """The one that has not ended."""
        return list(self.pieces.values())

    @property
    def room(self) -> bool:
        """Whether another may start."""
        return not self.pieces

    def start(self, piece: Work) -> None:
        """Have it drawn."""
        self.pieces[self.thread.submit(_attempt, piece, self.gpu)] = piece

    def wait(self, seconds: float) -> Iterator[Ended]:
        """Those that end meanwhile."""
        for done in wait(list(self.pieces), timeout=seconds).done:
            yield Ended(self.pieces.pop(done), *done.result())


class _Line:
    """How far the study is, by the cost of its pieces."""

    def __init__(self, bar: Progress, waiting: Mapping[str, Work]) -> None:
        self.bar = bar
        self.total = sum(piece.cost for piece in waiting.values())
        self.done, self.pieces, self.count = 0, 0, len(waiting)
        self.shown = 0

    def show(self, running: Sequence[Work], failed: Mapping[str, str]) -> None:
        """Say it."""
        done = self.done + sum(min(piece.spent, piece.cost) for piece in running)
        note = f"{self.pieces} of {self.count} pieces"
        note += f", {len(failed)} failed" if failed else ""
        # A run that goes on has first logged steps that it takes again.
        self.shown = max(self.shown, done)
        self.bar.update(self.shown, self.total, note)


def _keep(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
