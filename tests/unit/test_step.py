"""NaN or infinity on one rank, wherever it comes from: all ranks skip the step, nothing changes."""

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sbir_ray.config import OptimConfig
from sbir_ray.joint_config import ScheduleConfig
from sbir_ray.train import joint_task, loop
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.step import learning_rate, take_step
from sbir_ray.train.tasks import joint_jobs
from tests.tiny import joint_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
CASES = [
    # Job, step, where, what, what the message names.
    ("retrieval", 1, "embedding", NAN, "labelled"),
    ("retrieval", 1, "gradient", INF, "gradient"),
    ("generator", 1, "offset", NAN, "offset"),
    ("generator", 1, "pen", INF, "pen"),
    ("generator", 1, "kl", NAN, "kl"),
    ("discriminator", 1, "logits", NAN, "real"),
    ("joint", 1, "embedding", NAN, "labelled"),
    ("joint", 1, "logits", NAN, "d_real"),
    ("joint", 1, "gradient", NAN, "gradient of retrieval"),
    ("joint", 2, "reward", NAN, "policy, reward"),
    ("joint", 2, "offset", INF, "offset"),
    ("joint", 2, "gradient", NAN, "gradient of generator"),
]

LOW = [CASES[0], CASES[2], CASES[9]]
"""In mixed precision."""


@contextlib.contextmanager
def poisoned(task, where, value):
    """The first row of this rank, or its gradient, is ``value``."""
    f, g, d = (
        (task.f.model, task.g, task.d) if hasattr(task, "f") else (task.model, task, task.model)
    )

    def first(rows):
        mask = torch.zeros_like(rows)
        mask[0] = value
        return rows + mask

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if where == "embedding":
            real = f.embed_sketches
            patch.setattr(f, "embed_sketches", lambda x: first(real(x)), raising=False)
            both = f.forward

            def one_pass(*args):
                sketches, photos = both(*args)
                return first(sketches), photos

            patch.setattr(f, "forward", one_pass, raising=False)
        elif where == "logits":
            stack.callback(d.register_forward_hook(lambda m, i, o: first(o)).remove)
        elif where == "reward":
            real = joint_task.rewards
            patch.setattr(joint_task, "rewards", lambda *args: first(real(*args)))
        elif where == "gradient":
            for player in task.players.values():
                hook = player.parameters[0].register_hook(lambda grad: grad * value)
                stack.callback(hook.remove)
        else:
            real = g.model.nll_of_code

            def nll(*args, **more):
                terms = real(*args, **more)
                return {**terms, where: first(terms[where])}

            patch.setattr(g.model, "nll_of_code", nll, raising=False)
        yield


def photos_of(task, where, batch):
    """Photos that the message has to name, one of them at least."""
    if where == "reward":
        return batch.drawn.photo_ids[:1]
    if hasattr(batch, "pairs"):
        return batch.pairs.photo_ids[:1]
    if hasattr(batch, "labelled") and not isinstance(batch.labelled, int):
        batch = batch.labelled
    if hasattr(batch, "photo_b"):
        pairs = task.g.pairs if hasattr(task, "g") else task.pairs
        return [pairs.photo_ids[batch.photo_b[0][0]]]
    return batch.photo_ids[:1]


def state(task, optimizers):
    """All that a step may change, as bytes."""
    tensors = [
        *task.trained.state_dict().values(),
        *(
            value
            for name in sorted(optimizers)
            for values in optimizers[name].state_dict()["state"].values()
            for value in values.values()
        ),
    ]
    return [tensor.clone() for tensor in tensors]


def _worker(rank, world, port, jobs, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    ranks, tasks, found = Ranks(rank, world), {}, []
    for low, cases in ((False, CASES), (True, LOW)):
        for kind, step, where, value, _ in cases:
            if kind not in tasks:
                task = loop.build(jobs[kind], ranks, CPU)
                task.restore(0, {})
                optimizers = {k: torch.optim.AdamW(p.parameters) for k, p in task.players.items()}
                tasks[kind] = task, optimizers
            task, optimizers = tasks[kind]
            # In mixed precision as a GPU would be.
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                batch = task.batch(step)
                good = take_step(task, optimizers, batch, step, ranks)
                before = state(task, optimizers)
                with poisoned(task, where, value) if rank == 1 else contextlib.nullcontext():
                    taken = take_step(task, optimizers, batch, step, ranks)
                after = state(task, optimizers)
                again = take_step(task, optimizers, batch, step, ranks)
            found.append(
                {
                    "good": good.trouble + again.trouble,
                    "trouble": taken.trouble,
                    "unchanged": all(map(torch.equal, before, after)),
                    "moved": not all(map(torch.equal, after, state(task, optimizers))),
                    "photos": photos_of(task, where, batch),
                }
            )
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # The libraries' threads may abort a process that ends by the interpreter's way; all is written.
    os._exit(0)


def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_named(tmp_path):
    pairs = {"pairs": str(tiny_pairs(tmp_path / "pairs"))}
    photos = {"photos": str(tiny_store(tmp_path / "photos", 6))}
    schedule = ScheduleConfig(steps=4, retrieval_steps=2, generator_steps=1)
    config = joint_config(schedule=schedule)
    every = joint_jobs(str(tmp_path / "run"), config, {**pairs, **photos})
    for job in every[:-1]:
        fit(job, Ranks(), CPU, lambda _: None)
    jobs = {job.kind: job for job in every}
    Path(jobs["joint"].out).mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (2, port, jobs, tmp_path), nprocs=2)
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for case, a, b in zip(CASES + LOW, zero, one, strict=True):
        assert a["trouble"] == b["trouble"], case
        _, step, where, _, name = case
        assert a["trouble"].startswith(f"step {step}: "), case
        assert name in a["trouble"].partition(" not finite")[0], (case, a["trouble"])
        assert "not finite on rank 1 (photos " in a["trouble"], (case, a["trouble"])
        assert any(photo[:12] in a["trouble"] for photo in b["photos"]), (case, a["trouble"])
        if where != "gradient":  # of which the row cannot be told
            assert a["trouble"].partition("photos ")[2].count(",") <= 2, (case, a["trouble"])
        for found in (a, b):
            assert found["good"] == "", (case, found["good"])
            assert found["unchanged"], case
            assert found["moved"], case


def test_statistics_of_a_batch_that_is_not_finite_are_forgotten(tmp_path):
    pairs = {"pairs": str(tiny_pairs(tmp_path / "pairs"))}
    config = retrieval_config(
        model=retrieval_config().model.__class__(
            weights="none", image_size=64, grid=2, frozen_norm=False
        )
    )
    task = loop.build(Job("retrieval", str(tmp_path / "a"), config, pairs), Ranks(), CPU)
    optimizers = {"": torch.optim.AdamW(task.players[""].parameters)}
    batch = task.batch(0)
    take_step(task, optimizers, batch, 0, Ranks())
    before = state(task, optimizers)
    with poisoned(task, "embedding", NAN):
        assert take_step(task, optimizers, batch, 0, Ranks()).trouble
    assert all(map(torch.equal, before, state(task, optimizers)))


def test_the_rate_rises_and_falls_once():
    optim = OptimConfig(steps=100, lr=1e-3)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    assert rates[0] == pytest.approx(4e-5)
    assert rates[-1] < 2e-6
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate(50, 100, OptimConfig(lr=1e-3, schedule="constant")) == 1e-3
