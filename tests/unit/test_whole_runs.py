"""Whole runs of two processes: what one process would have trained, whatever happens between."""

import dataclasses
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sbir_ray import checkpoint
from sbir_ray.config import OptimConfig, RetrievalLossConfig, SaveConfig
from sbir_ray.errors import SbirError, StoppedError
from sbir_ray.train import loop
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.tasks import joint_jobs
from tests.faults.calm import free_port
from tests.tiny import joint_config, retrieval_config, tiny_pairs
from tests.tiny_pseudo import pseudo_row, tiny_pseudo
from tests.tiny_store import tiny_store

CPU = torch.device("cpu")
STEPS, STOPPED, KILLED = 12, 5, 9
LABELLED, PSEUDO = 8, 12
"""Photos, of which a step uses 4 each: no run is stopped at the end of an epoch of both."""


def quiet(_):
    return None


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A cached job and a joint one, with all that they need."""
    folder = tmp_path_factory.mktemp("whole")
    pairs = str(tiny_pairs(folder / "pairs", train=LABELLED))
    drawn = [pseudo_row(number) for number in range(20, 20 + PSEUDO)]
    config = retrieval_config(
        optim=OptimConfig(steps=STEPS, batch_size=4, lr=1e-3),
        loss=RetrievalLossConfig(distill="none"),
        save=SaveConfig(log_every=1, checkpoint_every=4),
    )
    inputs = {"pairs": pairs, "pseudo": str(tiny_pseudo(folder / "pseudo", drawn))}
    joint = {"pairs": pairs, "photos": str(tiny_store(folder / "photos", 6))}
    *before, together = joint_jobs(str(folder / "joint"), joint_config(), joint)
    for job in before:
        fit(job, Ranks(), CPU, quiet)
    return {"cached": Job("retrieval", str(folder / "cached"), config, inputs), "joint": together}


# --------------------------------------------------------------------------- in each process


@dataclasses.dataclass
class Lives:
    """The rows that this process has trained on: ``[life, step, photo ids]``."""

    taken: list = dataclasses.field(default_factory=list)
    life: int = 0

    def begin(self, killed_before=None):
        """Count the steps of another life, which ends before the given step is taken."""
        self.life += 1
        real, life = loop.take_step, self.life

        def counted(task, optimizers, batch, step, ranks, **more):
            if step == killed_before:
                raise KeyboardInterrupt
            taken = real(task, optimizers, batch, step, ranks, **more)
            self.taken.append([life, step, batch.photo_ids])
            return taken

        patch = pytest.MonkeyPatch()
        patch.setattr(loop, "take_step", counted)
        return patch


def _change_the_number_of_workers(ranks, job):
    """Two workers, asked to end; one, killed; two to the end."""
    lives = Lives()
    patch = lives.begin()
    with pytest.raises(StoppedError):
        fit(job, ranks, CPU, quiet, stop=lambda: bool(lives.taken) and lives.taken[-1][1] == 3)
    patch.undo()
    lives.life += 1
    if ranks.rank == 0:
        lives.life -= 1
        patch = lives.begin(killed_before=KILLED)
        with pytest.raises(KeyboardInterrupt):
            fit(job, Ranks(), CPU, quiet)
        patch.undo()
    ranks.wait()
    patch = lives.begin()
    result = fit(job, ranks, CPU, quiet)
    patch.undo()
    return lives.taken, result


def _fail_alone(ranks, job, where):
    """The message that each rank ends with when rank 1 alone cannot make its rows, or begin."""
    build = loop.build

    def odd(*args):
        if ranks.rank == 1 and where == "build":
            raise loop.UserError("no room here")
        task = build(*args)
        batch = task.batch

        def bad(step):
            if ranks.rank == 1 and step == 1:
                raise loop.UserError("its photo cannot be read")
            return batch(step)

        task.batch = bad
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build", odd)
        try:
            fit(job, ranks, CPU, quiet)
        except SbirError as error:
            return [type(error).__name__, str(error)]
    return []


def _worker(rank, world, port, jobs, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    ranks = Ranks(rank, world)

    def at(name, folder):
        return dataclasses.replace(jobs[name], out=str(out / folder))

    taken, result = _change_the_number_of_workers(ranks, at("cached", "changed"))
    fit(at("joint", "together"), ranks, CPU, quiet)
    failed = [_fail_alone(ranks, at("cached", where), where) for where in ("build", "rows")]
    record = {"taken": taken, "result": result, "failed": failed}
    (out / f"{rank}.json").write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()
    # The libraries' threads may abort a process that ends by the interpreter's way; all is written.
    os._exit(0)


@pytest.fixture(scope="module")
def two(jobs, tmp_path_factory):
    """The folder in which two processes have trained, and what each has to tell."""
    out = tmp_path_factory.mktemp("two")
    mp.spawn(_worker, (2, free_port(), jobs, out), nprocs=2)
    return out, [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


# --------------------------------------------------------------------------- tests


def apart(one, two, start):
    """How far two runs ended from each other, as a share of how far the first one came."""
    a, b = (checkpoint.load(Path(run)).model for run in (one, two))
    assert a.keys() == b.keys()
    # Axes of nearly equal variance are turned by any rounding; what they do is not.
    learnt = [name for name in a if "pair_norm" not in name]
    names = [name for name in learnt if a[name].is_floating_point()]
    gone = sum(float((a[n] - start[n]).square().sum()) for n in names)
    between = sum(float((a[n] - b[n]).square().sum()) for n in names)
    assert gone > 0
    return (between / gone) ** 0.5


def begun(job):
    Path(job.out).mkdir(parents=True, exist_ok=True)
    task = loop.build(job, Ranks(), CPU)
    return task, {k: v.clone() for k, v in task.trained.state_dict().items()}


def test_a_run_resumed_with_other_numbers_of_workers_loses_and_repeats_nothing(jobs, two, tmp_path):
    out, told = two
    final = defaultdict(list)
    last = {}
    for life, step, ids in sorted(entry for one in told for entry in one["taken"]):
        if last.get(step) != life:  # steps after the last checkpoint are taken again
            final[step], last[step] = [], life
        final[step] += ids
    lives = [last[step] for step in range(STEPS)]
    assert lives == [1] * STOPPED + [2] * (8 - STOPPED) + [3] * (STEPS - 8)
    calm = dataclasses.replace(jobs["cached"], out=str(tmp_path / "calm"))
    task, start = begun(calm)
    known = set(task.pairs.photo_ids)
    for step in range(STEPS):
        assert sorted(final[step]) == sorted(task.batch(step).photo_ids), step
    rows = [name for step in range(STEPS) for name in final[step]]
    labelled = [name for name in rows if name in known]
    pseudo = [name for name in rows if name not in known]
    for rows, size in ((labelled, LABELLED), (pseudo, PSEUDO)):
        assert len(rows) == 4 * STEPS
        for epoch in range(len(rows) // size):
            assert len(set(rows[epoch * size : (epoch + 1) * size])) == size
    result = fit(calm, Ranks(), CPU, quiet)
    assert told[0]["result"].keys() == result.keys()
    assert all(abs(value) < float("inf") for value in told[0]["result"].values())
    found = checkpoint.load(out / "changed")
    assert (found.step, found.state["world"]) == (STEPS, 2)
    lines = [json.loads(x) for x in (out / "changed" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["kind"] == "step"] == list(range(1, STEPS + 1))
    # Adam makes much of rounding where a gradient is almost 0.
    assert apart(calm.out, out / "changed", start) < 0.2


def test_two_workers_train_the_joint_run_of_one(jobs, two, tmp_path):
    together, alone_at = two[0] / "together", tmp_path / "alone"
    alone = dataclasses.replace(jobs["joint"], out=str(alone_at))
    _, start = begun(alone)
    fit(alone, Ranks(), CPU, quiet)
    one, both = (json.loads((run / "ledger.json").read_text()) for run in (alone_at, together))
    assert both == one
    assert apart(alone_at, together, start) < 0.05


def test_an_error_of_one_rank_ends_all_of_them_by_its_name(two):
    _, (zero, one) = two
    assert zero["failed"] == [
        ["UserError", "rank 1: no room here"],
        ["UserError", "rank 1: its photo cannot be read"],
    ]
    assert one["failed"] == [
        ["UserError", "no room here"],
        ["UserError", "its photo cannot be read"],
    ]
