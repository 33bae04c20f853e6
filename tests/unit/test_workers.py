"""Two workers compute what one computes, and a run that was stopped is the run that was not."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from sbir_ray import checkpoint
from sbir_ray.errors import SbirError, StoppedError, UserError
from sbir_ray.runlog import locked
from sbir_ray.train import loop, stop_request
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from tests.interrupted import interrupted
from tests.one_thread import one_thread
from tests.tiny import generator_config, retrieval_config, tiny_pairs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny_pairs(tmp_path_factory.mktemp("tiny") / "pairs")


def job_of(kind, out, pairs, **more):
    config = retrieval_config() if kind == "retrieval" else generator_config()
    return Job(kind, str(out), config, {"pairs": str(pairs), **more})


def gradients(job, ranks, step=0):
    """Losses and gradients of a step, summed over the ranks."""
    Path(job.out).mkdir(parents=True, exist_ok=True)
    with one_thread():
        task = loop.build(job, ranks, CPU)
        task.restore(0, {})
        task.trained.train()
        losses = task.losses(task.batch(step), step)
        losses["loss"].backward()
    players = task.turn(step).values()
    mine = {id(p) for player in players for p in player.parameters}
    named = [(n, p) for n, p in task.trained.named_parameters() if id(p) in mine]
    ranks.sum_gradients([p for _, p in named])
    found = {f"loss {k}": v.detach().clone() for k, v in losses.items()}
    found.update({f"gradient {n}": p.grad.clone() for n, p in named if p.grad is not None})
    return found


def _worker(rank, world, port, jobs, steps, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        for number, (job, step) in enumerate(zip(jobs, steps, strict=True)):
            found = gradients(job, Ranks(rank, world), step)
            save_file(found, out / f"{number}-{rank}.safetensors")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # The libraries' threads may abort a process that ends by the interpreter's way; all is written.
    os._exit(0)


def in_processes(jobs, out, world=2, steps=None):
    """The gradients of each job's step, the first by default, by rank."""
    out.mkdir()
    steps = steps or [0] * len(jobs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (world, port, jobs, steps, out), nprocs=world)
    return [
        [load_file(out / f"{number}-{rank}.safetensors") for rank in range(world)]
        for number in range(len(jobs))
    ]


def weights(run):
    return checkpoint.load(Path(run)).model


def test_two_workers_have_the_losses_and_gradients_of_one(tmp_path, pairs):
    generator = job_of("generator", tmp_path / "g", pairs)
    fit(generator, Ranks(), CPU, lambda _: None)
    jobs = [
        job_of("retrieval", tmp_path / "f", pairs),
        generator,
        job_of("discriminator", tmp_path / "d", pairs, generator=generator.out),
    ]
    for job, two in zip(jobs, in_processes(jobs, tmp_path / "two"), strict=True):
        one = gradients(job, Ranks())
        for rank in two:
            assert rank.keys() == one.keys()
            for key, value in one.items():
                scale = max(float(value.abs().max()), 1e-6)
                assert float((rank[key] - value).abs().max()) <= 1e-3 * scale, (job.kind, key)


@pytest.mark.parametrize("kind", ["retrieval", "generator"])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, pairs, kind):
    straight, stopped = job_of(kind, tmp_path / "a", pairs), job_of(kind, tmp_path / "b", pairs)
    fit(straight, Ranks(), CPU, lambda _: None)
    interrupted(lambda: fit(stopped, Ranks(), CPU, lambda _: None))
    said = []
    fit(stopped, Ranks(), CPU, said.append)
    assert "resumed at step 2" in said[0]
    one, two = weights(straight.out), weights(stopped.out)
    assert all(torch.equal(one[key], two[key]) for key in one)
    steps = [json.loads(x)["step"] for x in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]


def test_a_finished_run_is_not_trained_again(tmp_path, pairs):
    job = job_of("retrieval", tmp_path / "a", pairs)
    result = fit(job, Ranks(), CPU, lambda _: None)
    said = []
    assert fit(job, Ranks(), CPU, said.append) == result
    assert "finished before" in said[0]


def test_a_folder_of_another_run_is_refused(tmp_path, pairs):
    job = job_of("retrieval", tmp_path / "a", pairs)
    fit(job, Ranks(), CPU, lambda _: None)
    other = dataclasses.replace(job, config=retrieval_config(steps=6))
    with pytest.raises(UserError, match="other settings or inputs"):
        fit(other, Ranks(), CPU, lambda _: None)


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(tmp_path, pairs, monkeypatch):
    job = job_of("retrieval", tmp_path / "a", pairs)
    before = {}
    build = loop.build

    def poisoned(*args):
        task = build(*args)
        losses = task.losses
        before.update({k: v.clone() for k, v in task.trained.state_dict().items()})

        def bad(batch, step):
            return {k: v * float("nan") for k, v in losses(batch, step).items()}

        task.losses = bad
        return task

    monkeypatch.setattr(loop, "build", poisoned)
    said = []
    fit(job, Ranks(), CPU, said.append)
    assert len(said) == 4
    assert "step 0: loss, labelled not finite on rank 0 (photos " in said[0]
    after = weights(job.out)
    # The pair norm is fitted when the run is measured, whatever its steps have done.
    learnt = [key for key in before if not key.startswith("pair_norm.")]
    assert all(torch.equal(before[key], after[key]) for key in learnt)
    long = dataclasses.replace(job, out=str(tmp_path / "b"), config=retrieval_config(steps=30))
    with pytest.raises(SbirError, match="10 steps in a row were not finite"):
        fit(long, Ranks(), CPU, said.append)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path, pairs):
    with pytest.raises(UserError, match=r"optim\.batch_size: 4 rows cannot be divided among 3"):
        loop.build(job_of("retrieval", tmp_path / "a", pairs), Ranks(0, 3), CPU)


def test_a_run_that_is_asked_to_end_saves_and_goes_on_bit_for_bit(tmp_path, pairs):
    straight, stopped = (job_of("retrieval", tmp_path / name, pairs) for name in "ab")
    fit(straight, Ranks(), CPU, lambda _: None)
    with pytest.raises(StoppedError, match="stopped after step 1 of 4; the same command goes on"):
        fit(stopped, Ranks(), CPU, lambda _: None, stop=lambda: True)
    fit(stopped, Ranks(), CPU, lambda _: None)
    one, two = weights(straight.out), weights(stopped.out)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_sigterm_ends_training_after_the_step_under_way(tmp_path, pairs, monkeypatch):
    job = job_of("retrieval", tmp_path / "a", pairs)
    monkeypatch.setattr(stop_request, "_EVERY", 0.0)
    real = loop.take_step

    def struck(task, optimizers, batch, step, ranks, *, stop):
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            while not (tmp_path / "a" / "stop").exists():
                time.sleep(0.01)
        return real(task, optimizers, batch, step, ranks, stop=stop)

    monkeypatch.setattr(loop, "take_step", struck)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="after step 2 of 4"):
        train([job], workers=0)
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoint.load(Path(job.out)).step == 2
    monkeypatch.setattr(loop, "take_step", real)
    train([job], workers=0)
    assert checkpoint.load(Path(job.out)).step == 4


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, pairs):
    job = job_of("retrieval", tmp_path / "a", pairs)
    with (
        locked(tmp_path / "a"),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        train([job], workers=0)


def test_a_line_that_a_killed_process_left_half_written_is_dropped(tmp_path, pairs):
    job = job_of("retrieval", tmp_path / "a", pairs)
    interrupted(lambda: fit(job, Ranks(), CPU, lambda _: None))
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "st')
    fit(job, Ranks(), CPU, lambda _: None)
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 4]


def test_other_data_under_the_same_name_end_a_resumed_run(tmp_path):
    folder = tiny_pairs(tmp_path / "pairs")
    job = job_of("retrieval", tmp_path / "a", folder)
    interrupted(lambda: fit(job, Ranks(), CPU, lambda _: None))
    shutil.rmtree(folder)
    tiny_pairs(folder, train=7)
    with pytest.raises(UserError, match=r"step 2: was trained on other data \(labelled was \[16"):
        fit(job, Ranks(), CPU, lambda _: None)


def test_another_number_of_workers_loses_and_repeats_no_photo_of_an_epoch(tmp_path, pairs):
    job = job_of("retrieval", tmp_path / "a", pairs)
    alone = loop.build(job, Ranks(), CPU)
    two = [loop.build(job, Ranks(rank, 2), CPU) for rank in range(2)]
    four = [loop.build(job, Ranks(rank, 4), CPU) for rank in range(4)]
    # 8 photos, 4 a step: an epoch is two steps, and each group of workers begins within one.
    used = [
        photo
        for step, group in enumerate([[alone], two, four, [alone], two, two])
        for task in group
        for photo in task.batch(step).photo_ids
    ]
    for epoch in range(3):
        assert sorted(used[8 * epoch : 8 * epoch + 8]) == sorted(alone.pairs.photo_ids)
