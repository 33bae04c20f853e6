"""A training that nothing disturbs, without Ray, to compare with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sbir_ray import checkpoint
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks


def _worker(rank: int, world: int, port: int, job: Job) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    fit(job, Ranks(rank, world), torch.device("cpu"), lambda _: None)
    dist.destroy_process_group()
    # The libraries' threads may abort a process that ends by the interpreter's way; all is written.
    os._exit(0)


def free_port() -> int:
    """A port of this machine that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train_undisturbed(job: Job, world: int = 2) -> None:
    """Train a job with so many processes."""
    mp.spawn(_worker, (world, free_port(), job), nprocs=world)


def assert_same_weights(one: Path, two: Path) -> None:
    """Two runs ended at the same step, with the same bits in their networks and optimisers."""
    a, b = (checkpoint.load(run) for run in (one, two))
    assert a is not None
    assert b is not None
    assert a.step == b.step
    for first, second in ((a.model, b.model), (a.optim, b.optim)):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
