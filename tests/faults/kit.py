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
from typing import Any

import ray
from ray.util.state import list_actors, list_placement_groups

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
    address = ray.get_runtime_context().gcs_address
    groups = list_placement_groups(address, limit=1000, detail=True)
    return [
        *(a.class_name for a in alive("") if not a.is_detached),
        *(
            f"{g.placement_group_id} {g.state} {[b['unit_resources'] for b in g.bundles]}"
            for g in groups
            if g.state != "REMOVED"
        ),
    ]


def alive(part: str, address: str = "") -> list[Any]:
    """Actors that are alive with ``part`` in their class names.

    Args:
        address: of a Ray cluster; that of this process by default.
    """
    address = address or ray.get_runtime_context().gcs_address
    every = list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000, detail=True)
    return [actor for actor in every if part in actor.class_name]


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
                if ready() and (found := [a.pid for a in alive(part) if a.pid not in killed]):
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
