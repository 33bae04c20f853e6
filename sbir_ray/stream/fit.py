"""Whether a request fits into a cluster, and the smallest change that would make it fit.

Arithmetic alone: what the nodes have comes from :func:`sbir_ray.stream.cluster.nodes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SPARE_SKETCH, SPARE_LIVE = 1.0, 0.5
"""CPUs that Ray Data's tasks need beside actors that draw a store, and beside those that draw while
training goes on."""
SHARE = 0.001
"""Of a node type's custom resource, what a process takes that is sent there: up to 1000 fit."""
_EPSILON = 1e-6
_MORE = 32
"""Nodes more than which are not proposed."""


@dataclass(frozen=True)
class Node:
    """What a node lends, all of it, whoever uses it now."""

    cpus: float
    gpus: float = 0.0
    custom: frozenset[str] = frozenset()
    """Names of its custom resources."""
    name: str = ""


@dataclass(frozen=True)
class Group:
    """Processes that are alike; each has to fit on one node."""

    what: str
    """The option that asks for them: ``--workers``, ``--actors``."""
    count: int
    cpus: float
    gpus: float = 0.0
    on: str = ""
    """Custom resource that their nodes have; any node by default."""

    @property
    def each(self) -> str:
        """The option that says how large one is."""
        return f"--cpus-per-{self.what.removeprefix('--').removesuffix('s')}"

    def __str__(self) -> str:
        where = f" on nodes with {self.on}" if self.on else ""
        return f"{self.what} {self.count} x ({self.cpus:g} CPU, {self.gpus:g} GPU){where}"


@dataclass(frozen=True)
class Request:
    """All that runs at the same time."""

    groups: tuple[Group, ...]
    spare_cpus: float = 0.0
    """For what runs beside each, on any nodes."""
    trials: int = 1
    """How often the groups run beside one another."""
    spare_for: str = "Ray Data"
    beside: str = "--trials"
    """The option that says ``trials``."""

    @property
    def cpus(self) -> float:
        """CPUs of all processes together."""
        alone = self.spare_cpus + sum(group.count * group.cpus for group in self.groups)
        return self.trials * alone

    @property
    def gpus(self) -> float:
        """GPUs of all processes together."""
        return self.trials * sum(group.count * group.gpus for group in self.groups)

    def __str__(self) -> str:
        parts = [*map(str, self.groups)]
        if self.spare_cpus:
            parts.append(f"{self.spare_cpus:g} CPU for {self.spare_for}")
        times = f"{self.beside} {self.trials} x " if self.trials > 1 else ""
        return times + " and ".join(parts)


def sent_to(on: str) -> dict[str, dict[str, float]]:
    """What an actor of Ray is given besides CPUs and GPUs to be placed where ``on`` is."""
    return {"resources": {on: SHARE}} if on else {}


def request_of(workers: Group | None, actors: Group | None = None, trials: int = 1) -> Request:
    """The request of training, of drawing, or of both at once."""
    groups = tuple(group for group in (workers, actors) if group is not None and group.count)
    alone = SPARE_SKETCH if workers is None else SPARE_LIVE
    spare = 0.0 if actors is None else alone
    return Request(groups, spare, trials)


def fits(nodes: Sequence[Node], request: Request) -> bool:
    """Whether all processes can be placed, the largest first, each where least is left."""
    left = [_Left(node.cpus, node.gpus, node.custom) for node in nodes]
    groups = sorted(request.groups, key=lambda g: (bool(g.on), g.gpus, g.cpus), reverse=True)
    for group in groups:
        for _ in range(request.trials * group.count):
            able = [place for place in left if place.holds(group)]
            if not able:
                return False
            # CPU processes keep off the GPU nodes while there is room elsewhere.
            best = min(able, key=lambda place: (place.gpus, place.cpus))
            best.cpus -= group.cpus
            best.gpus -= group.gpus
    return sum(place.cpus for place in left) >= request.trials * request.spare_cpus - _EPSILON


@dataclass
class _Left:
    cpus: float
    gpus: float
    custom: frozenset[str]

    def holds(self, group: Group) -> bool:
        enough = self.cpus >= group.cpus - _EPSILON and self.gpus >= group.gpus - _EPSILON
        return enough and (not group.on or group.on in self.custom)


def shortfall(nodes: Sequence[Node], request: Request) -> str | None:
    """One line: what is asked for, what there is, and the smallest changes that fit; None if it
    fits as it is."""
    if fits(nodes, request):
        return None
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    changes = list(_changes(nodes, request))
    line = (
        f"{request} need {request.cpus:g} CPU, {request.gpus:g} GPU; there are {cpus:g} CPU, "
        f"{gpus:g} GPU on {len(nodes)} node(s)"
    )
    names = {name for node in nodes for name in node.custom}
    lost = sorted({group.on for group in request.groups if group.on} - names)
    if lost:
        return f"{line}, and none has the resource {', '.join(lost)}; name one of {_listed(names)}"
    return f"{line}; what would fit: {', or '.join([*changes, _more(nodes, request)])}"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "those that `ray start --resources` gives"


def _changes(nodes: Sequence[Node], request: Request) -> Iterator[str]:
    """Changes of one option that make it fit, the least of each."""
    for trials in range(request.trials - 1, 0, -1):
        if fits(nodes, dataclasses.replace(request, trials=trials)):
            yield f"{request.beside} {trials}"
            break
    for group in request.groups:

        def fit(changed: Group, group: Group = group) -> bool:
            groups = tuple(changed if other is group else other for other in request.groups)
            return fits(nodes, dataclasses.replace(request, groups=groups))

        low, high = 0, group.count - 1
        while low < high:
            middle = (low + high + 1) // 2
            whole = fit(dataclasses.replace(group, count=middle))
            low, high = (middle, high) if whole else (low, middle - 1)
        if low and fit(dataclasses.replace(group, count=low)):
            yield f"{group.what} {low}"
        for cpus in (*range(math.ceil(group.cpus) - 1, 0, -1), 0.5):
            if cpus < group.cpus and fit(dataclasses.replace(group, cpus=cpus)):
                yield f"{group.each} {cpus:g}"
                break
        if group.gpus and fit(dataclasses.replace(group, gpus=0.0)):
            yield f"{group.what} without {'--gpu' if group.gpus == 1 else '--gpus-per-actor'}"


def _more(nodes: Sequence[Node], request: Request) -> str:
    """How many more nodes like one of those there are would do, or how large one has to be."""
    kinds = {(node.gpus, node.cpus, node.custom): node for node in nodes if node.cpus}
    for _, kind in sorted(kinds.items(), key=lambda item: item[0][:2]):
        for count in range(1, _MORE + 1):
            if fits([*nodes, *[kind] * count], request):
                return f"{count} more node(s) of {kind.cpus:g} CPU, {kind.gpus:g} GPU"
    largest = max(request.groups, key=lambda group: (group.gpus, group.cpus))
    one = dataclasses.replace(largest, count=1)
    if any(fits([kind], Request((one,))) for kind in kinds.values()):
        return f"more than {_MORE} more nodes"
    return f"nodes of at least {largest.cpus:g} CPU, {largest.gpus:g} GPU"
