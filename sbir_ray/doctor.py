"""Before anything starts: what a cluster lacks for a request, node by node, and what to change.

The resources are arithmetic (:mod:`sbir_ray.stream.fit`); the rest is seen by a small task that is
sent to each node: storage as it is seen from there, versions, GPUs, shared memory and disk.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbir_ray.errors import SbirError, UserError
from sbir_ray.places import is_local, place, remove_tree, told, write_bytes
from sbir_ray.runlog import other_versions, versions
from sbir_ray.stream.fit import Node, Request, shortfall

COMPARED = ("python", "ray", "torch", "sbir_ray")
"""What has to be of the same version on every node."""
LEAST_DISK = 5 << 30
"""Free bytes of a node's disk: Ray spills objects to it, and stops where it is 95% full."""
PATIENCE = 60.0
"""Seconds for a node to answer."""


@dataclass(frozen=True)
class Finding:
    """What one check found; ``fix`` says what to do where it is not ``ok``."""

    check: str
    ok: bool
    text: str
    fix: str = ""
    stops: bool = True
    """Whether nothing should start before it is mended."""

    def line(self) -> str:
        """``ok       storage: ...`` or ``problem  storage: ...; what to do``."""
        end = f"; {self.fix}" if self.fix and not self.ok else ""
        return f"{'ok' if self.ok else 'problem':<8} {self.check}: {self.text}{end}"


@contextmanager
def ready(request: Request, storage: Sequence[Path], address: str | None = None) -> Iterator[None]:
    """Ray for the length of a ``with`` block, as by :func:`sbir_ray.stream.cluster.connect`, once
    nothing is found that would stop ``request``; what may only slow it is told.

    A Ray that this process already uses was looked at before, but for whether ``request`` fits.

    Raises:
        UserError: all that has to be changed, in one line; or as ``connect``.
    """
    import ray

    from sbir_ray.stream.cluster import connect

    known = ray.is_initialized()
    with connect(address, request=request):
        if not known:
            joined = bool(address or os.environ.get("RAY_ADDRESS"))
            bad = [found for found in examine(request, storage, joined) if not found.ok]
            for finding in bad:
                if not finding.stops:
                    print(finding.line(), file=sys.stderr)
            if stops := [finding for finding in bad if finding.stops]:
                raise UserError("; and ".join(f"{f.check}: {f.text}; {f.fix}" for f in stops))
        yield


def examine(request: Request, storage: Sequence[Path] = (), by_node: bool = True) -> list[Finding]:
    """All checks of the Ray that is up.

    Args:
        request: what is to run.
        storage: places that every node has to read and write, the same for all.
        by_node: send a task to each node; else this process looks, which is on the only one.
    """
    from sbir_ray.stream.cluster import nodes

    found = nodes()
    findings = [check_resources(found, request)]
    with _Tokens(storage) as tokens:
        findings += [finding for finding in tokens.findings if not finding.ok]
        told_by = ask_nodes(tokens.written) if by_node else look_here(tokens.written)
        findings += check_storage(told_by, tokens.written)
    findings.append(check_versions(told_by))
    findings.append(check_gpus(told_by, found, request))
    findings += check_room(told_by)
    return findings


def check_resources(found: Sequence[Node], request: Request) -> Finding:
    """Whether the request fits."""
    line = shortfall(found, request)
    cpus, gpus = sum(node.cpus for node in found), sum(node.gpus for node in found)
    whole = f"{request} fit into {cpus:g} CPU, {gpus:g} GPU on {len(found)} node(s)"
    return Finding("resources", line is None, line or whole)


# --------------------------------------------------------------------------- what a node sees


def look(tokens: Mapping[str, str]) -> dict[str, Any]:
    """Task on one node: what it sees.

    Args:
        tokens: by place, the name of a file there, whose text is that name; each node leaves one
            with its own name beside it.
    """
    import torch

    report: dict[str, Any] = {"host": socket.gethostname(), "versions": versions(), "storage": {}}
    for text, name in tokens.items():
        report["storage"][text] = _seen(text, name)
    gpus = torch.cuda.device_count()
    report["gpus"] = gpus
    report["gpu_fault"] = _gpu_fault() if gpus else ""
    report["shm"] = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    report["disk"] = shutil.disk_usage(os.environ.get("RAY_TMPDIR", "/tmp")).free
    return report


def _seen(text: str, name: str) -> str:
    """What is wrong with a place as seen from here, or nothing."""
    folder = place(text)
    try:
        with told(folder):
            if not (folder / name).exists() or (folder / name).read_text() != name:
                return "is not the same place there"
            own = folder / f"{name}-{uuid.uuid4().hex}"
            write_bytes(own, name.encode())
            own.unlink()
    except (OSError, SbirError) as error:
        return f"cannot be written there ({' '.join(str(error).split())[:200]})"
    return ""


def _gpu_fault() -> str:
    import torch

    try:
        for number in range(torch.cuda.device_count()):
            one = torch.ones(2, device=f"cuda:{number}")
            assert float(one @ one) == 2.0
    except Exception as error:  # a build without the GPU's kernels, a driver that is too old
        return " ".join(str(error).split())[:200]
    return ""


def ask_nodes(tokens: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The report of :func:`look` from each live node by name; ``{"fault": ...}`` where none came.
    Nodes also tell ``object_store``, bytes, and ``has_gpus``, as Ray counts them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    alive = [node for node in ray.nodes() if node["Alive"]]
    asked = {
        node["NodeID"]: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(dict(tokens))
        for node in alive
    }
    limit = time.monotonic() + PATIENCE
    reports: dict[str, dict[str, Any]] = {}
    for node in alive:
        try:
            patience = max(1.0, limit - time.monotonic())
            report = ray.get(asked[node["NodeID"]], timeout=patience)
        except Exception as error:  # whatever it is, it is this node's, and told
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            report = {"fault": lines[-1][:200] if lines else type(error).__name__}
        reports[f"{node['NodeManagerAddress']} {node['NodeID'][:8]}"] = report | _counted(node)
    return reports


def look_here(tokens: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The same from a Ray that this process has started, without a task."""
    import ray

    (node,) = ray.nodes()
    return {"this machine": look(tokens) | _counted(node)}


def _counted(node: Mapping[str, Any]) -> dict[str, float]:
    """What Ray counts of a node."""
    has = node["Resources"]
    return {"object_store": has.get("object_store_memory", 0.0), "has_gpus": has.get("GPU", 0.0)}


# --------------------------------------------------------------------------- what follows from it

Reports = Mapping[str, Mapping[str, Any]]


def check_storage(reports: Reports, tokens: Mapping[str, str]) -> list[Finding]:
    """For each place, whether all nodes read and write the same one."""
    findings = []
    for text in tokens:
        bad = {
            name: report["storage"][text]
            for name, report in reports.items()
            if report.get("storage", {}).get(text)
        }
        fix = "name storage that all nodes share: s3://, gs://, or a folder mounted on each"
        listed = "; ".join(f"{name}: {fault}" for name, fault in sorted(bad.items()))
        seen = (
            f"{text} is read and written from {len(reports) - len(bad)} of {len(reports)} node(s)"
        )
        findings.append(Finding("storage", not bad, f"{seen} ({listed})" if bad else seen, fix))
    return findings


def check_versions(reports: Reports) -> Finding:
    """Whether each node answered, with the versions of this process."""
    own = versions()
    bad = []
    for name, report in sorted(reports.items()):
        if "fault" in report:
            bad.append(f"{name}: {report['fault']}")
            continue
        bad += [f"{name}: {odd}" for odd in other_versions(report["versions"], COMPARED)]
    same = ", ".join(f"{what} {own[what]}" for what in COMPARED)
    fix = "install the same versions on all nodes, or use one image for all"
    return Finding("versions", not bad, "; ".join(bad) or f"{same} on all nodes", fix)


def check_gpus(reports: Reports, found: Sequence[Node], request: Request) -> Finding:
    """Whether PyTorch can use the GPUs that Ray counts, if the request has any."""
    if not request.gpus:
        total = sum(node.gpus for node in found)
        return Finding("gpus", True, f"none asked for; the cluster has {total:g}")
    bad = [
        f"{name}: Ray counts {report['has_gpus']:g}, PyTorch "
        + (f"cannot use them ({report['gpu_fault']})" if report["gpus"] else "sees none")
        for name, report in sorted(reports.items())
        if "fault" not in report
        and report["has_gpus"]
        and (report["gpu_fault"] or not report["gpus"])
    ]
    usable = sum(report["has_gpus"] for report in reports.values() if "fault" not in report)
    fix = "install a build of PyTorch for their driver, as pytorch.org lists them"
    none = [] if usable else ["no node has a GPU"]
    if not usable:
        fix = "leave out --gpu and --gpus-per-actor, or add nodes with GPUs"
    return Finding(
        "gpus", not (bad or none), "; ".join(bad or none) or f"PyTorch uses {usable:g}", fix
    )


def check_room(reports: Reports) -> list[Finding]:
    """Whether shared memory holds Ray's object store, and disks have room to spill."""
    seen = {name: report for name, report in sorted(reports.items()) if "fault" not in report}
    small = [
        f"{name}: {_gib(report['shm'])} for an object store of {_gib(report['object_store'])}"
        for name, report in seen.items()
        if 0 < report["shm"] < report["object_store"]
    ]
    full = [
        f"{name}: {_gib(report['disk'])} free"
        for name, report in seen.items()
        if report["disk"] < LEAST_DISK
    ]
    least_shm = min((report["shm"] for report in seen.values()), default=0)
    least_disk = min((report["disk"] for report in seen.values()), default=0)
    return [
        Finding(
            "/dev/shm",
            not small,
            "; ".join(small) or f"{_gib(least_shm)} at least",
            "give containers more (docker --shm-size, or a memory emptyDir on /dev/shm), or start "
            "Ray with a smaller --object-store-memory",
            stops=False,  # Ray takes the disk instead, which is slow
        ),
        Finding(
            "disk",
            not full,
            "; ".join(full) or f"{_gib(least_disk)} free at least",
            f"free {_gib(LEAST_DISK)} there, or start Ray with another --temp-dir",
            stops=False,  # small work never spills
        ),
    ]


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


# --------------------------------------------------------------------------- storage, as from here


class _Tokens:
    """A file in each place for the nodes to find; removed with the block."""

    def __init__(self, storage: Sequence[Path]) -> None:
        self.places = [folder.absolute() for folder in storage]
        self.written: dict[str, str] = {}
        self.findings: list[Finding] = []

    def __enter__(self) -> _Tokens:
        for folder in self.places:
            name = f".doctor-{uuid.uuid4().hex}"
            try:
                write_bytes(folder / name, name.encode())
                self.written[str(folder)] = name
            except (OSError, SbirError) as error:
                text = " ".join(str(error).split())[:300]
                self.findings.append(Finding("storage", False, f"from here: {text}"))
        return self

    def __exit__(self, *_: object) -> None:
        for text, name in self.written.items():
            folder = place(text)
            (folder / name).unlink()
            if is_local(folder) and not any(folder.iterdir()):
                remove_tree(folder)
