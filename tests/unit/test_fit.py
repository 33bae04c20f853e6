"""What fits into a cluster, and the smallest change that would fit; every change proposed fits."""

import dataclasses

import pytest

from sbir_ray.stream.fit import Group, Node, Request, fits, request_of, sent_to, shortfall

HERE = [Node(4)]
CLUSTER = [
    Node(4),
    *[Node(8, 1, frozenset({"trainer"}))] * 2,
    *[Node(4, 1, frozenset({"drawer"}))] * 4,
]


def workers(count, cpus=1.0, gpus=0.0, on=""):
    return Group("--workers", count, cpus, gpus, on)


def actors(count, cpus=1.0, gpus=0.0, on=""):
    return Group("--actors", count, cpus, gpus, on)


@pytest.mark.parametrize(
    ("nodes", "request_", "whole"),
    [
        (HERE, request_of(workers(4)), True),
        (HERE, request_of(workers(5)), False),
        (HERE, request_of(workers(2), actors(1)), True),
        (HERE, request_of(workers(2), actors(2)), False),  # Ray Data's tasks want a part too
        (HERE, request_of(None, actors(3)), True),
        (HERE, request_of(None, actors(4)), False),
        (HERE, request_of(workers(1, gpus=1)), False),
        (HERE, request_of(workers(1), trials=4), True),
        (HERE, request_of(workers(1), actors(1), trials=2), False),
        ([Node(3), Node(3)], request_of(workers(3, cpus=2)), False),  # in no node's halves
        ([Node(3), Node(3)], request_of(workers(2, cpus=3)), True),
        (CLUSTER, request_of(workers(2, 7, 1, "trainer"), actors(8, 2, 0.5, "drawer")), True),
        (CLUSTER, request_of(workers(3, 4, 1, "trainer")), False),
        (CLUSTER, request_of(workers(6, 4, 1)), True),
        (CLUSTER, request_of(workers(2, 8, 1), actors(4, 4, 1)), True),
    ],
)
def test_all_processes_are_placed_at_once_or_refused(nodes, request_, whole):
    assert fits(nodes, request_) is whole
    assert (shortfall(nodes, request_) is None) is whole


def test_the_request_and_the_least_changes_are_told():
    line = shortfall(HERE, request_of(workers(8, 4.0), actors(2)))
    assert line == (
        "--workers 8 x (4 CPU, 0 GPU) and --actors 2 x (1 CPU, 0 GPU) and 0.5 CPU for Ray Data "
        "need 34.5 CPU, 0 GPU; there are 4 CPU, 0 GPU on 1 node(s); what would fit: "
        "8 more node(s) of 4 CPU, 0 GPU"
    )
    line = shortfall(HERE, request_of(workers(8)))
    assert line is not None
    assert line.endswith(
        "what would fit: --workers 4, or --cpus-per-worker 0.5, or 1 more node(s) of 4 CPU, 0 GPU"
    )
    line = shortfall(HERE, request_of(workers(1, gpus=1.0)))
    assert line is not None
    assert line.endswith("--workers without --gpu, or nodes of at least 1 CPU, 1 GPU")
    line = shortfall(HERE, request_of(workers(1), actors(1), trials=4))
    assert line is not None
    assert "what would fit: --trials 1, or " in line


def test_a_resource_that_no_node_has_is_named_with_those_there_are():
    line = shortfall(CLUSTER, request_of(workers(1, on="traner")))
    assert line is not None
    assert line.endswith("none has the resource traner; name one of drawer, trainer")


def test_every_change_of_a_number_that_is_proposed_fits_and_one_more_does_not():
    for count in (5, 9, 40):
        for cpus in (1.0, 2.0, 3.0):
            request = Request((workers(count, cpus), actors(2)), 0.5)
            line = shortfall(CLUSTER, request)
            if line is None:
                continue
            for part in line.split("what would fit: ")[1].split(", or "):
                if part.startswith("--workers "):
                    most = int(part.split()[1])
                    for number, whole in ((most, True), (most + 1, False)):
                        groups = (workers(number, cpus), actors(2))
                        changed = dataclasses.replace(request, groups=groups)
                        assert fits(CLUSTER, changed) is whole


def test_a_process_takes_little_of_the_resource_that_leads_it():
    assert sent_to("") == {}
    assert sent_to("drawer") == {"resources": {"drawer": 0.001}}
