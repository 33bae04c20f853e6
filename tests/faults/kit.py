"""What has to hold after a fault, and processes to kill."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import ray
from ray.util import placement_group_table

TRAINS, DRAWS = "RayTrainWorker", "Draw"
"""Parts of the class names of the actors that train and of those that draw."""


def assert_ledger(run: Path) -> dict[str, Any]:
    """The account of a joint run adds up; it is handed back."""
    ledger: dict[str, Any] = json.loads((run / "ledger.json").read_text())
    told = ledger["used"] + ledger["stale"] + sum(ledger["filtered"].values())
    assert ledger["drawn"] == told + ledger["in_flight"], ledger
    return ledger


def assert_no_orphans(seconds: float = 30.0) -> None:
    """No placement group is left soon after the work ended, and no actor but the detached ones,
    which Ray makes for itself; this program makes none."""
    end = time.monotonic() + seconds
    while (left := _left()) and time.monotonic() < end:
        time.sleep(0.3)
    assert left == [], left


def _left() -> list[str]:
    groups = placement_group_table().values()
    return [
        *(a["ActorClassName"] for a in alive("") if not a["IsDetached"]),
        *(
            f"{g['placement_group_id']} {g['state']} {list(g['bundles'].values())}"
            for g in groups
            if g["state"] != "REMOVED"
        ),
    ]


def alive(part: str, state: Any = None) -> list[dict[str, Any]]:
    """Actors that are alive with ``part`` in their class names, from Ray's own records: a Ray that
    this program starts has no dashboard to ask.

    Args:
        state: the records of a cluster that this process has started but not joined.
    """
    state = state or cast(Any, ray)._private.state.state
    every = state.actor_table(None, None, "ALIVE").values()
    return [actor for actor in every if part in actor["ActorClassName"]]


@contextmanager
def killing(*plans: tuple[Callable[[], bool], str]) -> Iterator[list[int]]:
    """While in the block, SIGKILL one process after another: for each plan, as soon as its
    condition holds, an actor of that part of a class name.

    Yields:
        The numbers of the processes killed so far.
    """
    killed: list[int] = []
    over = threading.Event()

    def run() -> None:
        for ready, part in plans:
            while not over.wait(0.1):
                if ready() and (found := [a["Pid"] for a in alive(part) if a["Pid"] not in killed]):
                    os.kill(found[0], signal.SIGKILL)
                    killed.append(found[0])
                    break

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def forked(work: Callable[[], int]) -> int:
    """The state in which a process of its own ends that does ``work``: its number, 1 after an
    exception, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status = work()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
