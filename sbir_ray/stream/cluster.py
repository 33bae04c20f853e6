"""The Ray that the stages run on: a cluster that is there, or one inside this process."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.data
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.data import DataContext
from ray.exceptions import RayError

from sbir_ray.errors import UnavailableError, UserError
from sbir_ray.stream.fit import Node, Request, shortfall

LEAST_CPUS = 4
"""Logical CPUs of an embedded Ray, at least: actors, readers and writers each hold one, and with
fewer a pool of two actors leaves Ray Data nothing to read with."""

_BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")


@contextmanager
def connect(
    address: str | None = None, num_cpus: int | None = None, request: Request | None = None
) -> Iterator[None]:
    """Ray for the length of a ``with`` block; shuts down only what it started.

    A Ray that this process already uses is taken as it is. Else ``address`` or ``RAY_ADDRESS``
    names a cluster; else a local Ray is started, quiet, with token authentication and without
    usage statistics.

    Args:
        num_cpus: logical CPUs of a local Ray; by default the machine's, at least
            :data:`LEAST_CPUS`.
        request: what will run; refused at once where it does not fit.

    Raises:
        UserError: the cluster cannot be reached, ``num_cpus`` for one that is there, or
            ``request`` does not fit: the line says what would.
    """
    if ray.is_initialized():
        if request is not None:
            ensure_request(nodes(), request)
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and num_cpus is not None:
        raise UserError(f"{address}: has its own number of CPUs; leave --num-cpus out")
    if address:
        _join(address)
    else:
        if request is not None:
            ensure_request([here(num_cpus, request.gpus > 0)], request)
        _start(num_cpus or logical_cpus())
    try:
        if address and request is not None:
            ensure_request(nodes(), request)
        yield
    finally:
        ray.shutdown()


def run_tasks(
    plan: Sequence[pa.Table], task: Callable[..., pa.Table], **settings: Any
) -> Iterator[pa.Table]:
    """What ``task(table, **settings)`` returns for the tables of ``plan``, in any order.

    Each table is a block of a Ray Data pipeline, so a task of Ray; the tables are small, and so is
    what comes back. A task may get several of them as one table.
    """
    quiet_data()
    dataset = ray.data.from_arrow(list(plan)).map_batches(
        cast(Any, task), batch_size=None, batch_format="pyarrow", fn_kwargs=settings
    )
    yield from cast(Any, dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def quiet_data() -> None:
    """Ray Data without its own progress bars and notes; ours are shown instead."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Warns about the line above.
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def nodes() -> list[Node]:
    """The nodes of the Ray that is up which are alive."""
    found = []
    for node in cast(Any, ray).nodes():
        if node["Alive"]:
            has: dict[str, float] = node["Resources"]
            custom = {name for name in has if name not in _BUILT_IN and ":" not in name}
            name = f"{node.get('NodeManagerAddress', '')} {node.get('NodeID', '')[:8]}".strip()
            cpus, gpus = has.get("CPU", 0.0), has.get("GPU", 0.0)
            found.append(Node(cpus, gpus, frozenset(custom), name))
    return found


def here(num_cpus: int | None = None, gpus: bool = False) -> Node:
    """The one node of a Ray that would be started here.

    Args:
        gpus: count them too, which takes some seconds.
    """
    count = 0
    if gpus:
        import torch

        count = torch.cuda.device_count()
    return Node(num_cpus or logical_cpus(), count, name="this machine")


def ensure_request(found: Sequence[Node], request: Request) -> None:
    """Refuse what could never be placed all at once; Ray itself would wait for ever.

    Raises:
        UnavailableError: it does not fit; the line says what would.
    """
    line = shortfall(found, request)
    if line is not None:
        raise UnavailableError(line)


def room_for_actors(
    actors: tuple[int, int],
    cpus: float,
    gpus: float,
    on: str,
    *,
    spare_cpus: float,
    spare_gpus: float = 0.0,
) -> int:
    """How many of ``--actors`` the cluster could hold.

    Args:
        actors: the least and the most that are asked for; the others as of :func:`ensure_fits`.

    Raises:
        UserError: no such range, or the least do not fit.
    """
    least, most = actors
    if not 1 <= least <= most:
        raise UserError(f"--actors {least}:{most}: the least is 1, and not more than the most")
    return ensure_fits(
        cpus,
        gpus,
        least,
        on=on,
        what="--actors",
        spare_cpus=spare_cpus,
        spare_gpus=spare_gpus,
    )


def ensure_fits(
    cpus: float,
    gpus: float = 0.0,
    count: int = 1,
    *,
    on: str = "",
    what: str = "the request",
    spare_cpus: float = 0.0,
    spare_gpus: float = 0.0,
) -> int:
    """Refuse what could never be placed; Ray itself would wait for ever.

    Args:
        cpus, gpus: of each of ``count`` processes; one process has to fit on one node.
        on: custom resource that their nodes have.
        what: who asks, by the names of its settings.
        spare_cpus, spare_gpus: that have to stay free, anywhere.

    Returns:
        How many such processes the cluster could hold.

    Raises:
        UserError: it does not fit; the message says what would.
    """
    found = nodes()
    total_cpus = sum(node.cpus for node in found)
    total_gpus = sum(node.gpus for node in found)
    room = sum(_fitting(node, cpus, gpus) for node in found if not on or on in node.custom)
    if cpus > 0:
        room = min(room, math.floor((total_cpus - spare_cpus) / cpus + 1e-6))
    if gpus > 0:
        room = min(room, math.floor((total_gpus - spare_gpus) / gpus + 1e-6))
    if count <= room:
        return sys.maxsize if room == math.inf else int(room)
    spare = f" on nodes with {on}" if on else ""
    if spare_cpus or spare_gpus:
        also = f", {spare_gpus:g} GPU" if spare_gpus else ""
        spare += f" beside {spare_cpus:g} CPU{also} for the rest"
    raise UserError(
        f"{what}: {count} x ({cpus:g} CPU, {gpus:g} GPU){spare} do not fit into {total_cpus:g} "
        f"CPU, {total_gpus:g} GPU on {len(found)} node(s); at most {max(0, int(room))} would"
    )


def logical_cpus() -> int:
    """CPUs of this machine or container, at least :data:`LEAST_CPUS`."""
    cpus = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, float(quota) / float(period))
    except (OSError, ValueError):  # no cgroup v2: nothing limits us
        pass
    return max(LEAST_CPUS, math.floor(cpus))


def _start(num_cpus: int) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Worker processes stay for the next stage: starting one costs seconds.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Else 15: Ray's own processes, and all others of the machine, would go before those that work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray Data's own pools draw an error line from Ray's core on every start, harmless by its text.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _own_token()
    with _no_stderr():
        # "local": Ray would otherwise join whatever other cluster runs on this machine.
        ray.init(
            address="local",
            num_cpus=num_cpus,
            # Nine processes more, whose address nobody would be told.
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _join(address: str) -> None:
    # Clusters ask for a token by default, but clients given an address send one only if told to,
    # and Ray's core has read its settings when it was imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    Config.initialize("")
    _, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    try:
        if port.isdigit():
            # Ray itself would try for more than ten minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{address}: no Ray cluster can be reached there ({line})") from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drops what native code says meanwhile: Ray's core names the log level set above. What goes
    wrong comes as an exception."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _own_token() -> None:
    """A token that only this user can read; the one that Ray makes can be read by all."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        file.chmod(0o600)
        return
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))


def _fitting(node: Node, cpus: float, gpus: float) -> float:
    """How many processes of ``cpus`` and ``gpus`` a node has room for."""
    room = math.inf
    for has, need in ((node.cpus, cpus), (node.gpus, gpus)):
        if need > 0:
            room = min(room, math.floor(has / need + 1e-6))
    return room
