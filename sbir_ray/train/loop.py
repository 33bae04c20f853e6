"""One training run: step, check, save, resume; the same with one process and with many."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbir_ray import checkpoint
from sbir_ray.config import AdamConfig
from sbir_ray.errors import SbirError, UserError
from sbir_ray.places import place
from sbir_ray.runlog import versions, write_json_atomic
from sbir_ray.runs import read_run
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict
from sbir_ray.train.job import Board, Job, Task
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.tasks import build

if TYPE_CHECKING:
    from sbir_ray.stream.live import Shard

MAX_SKIPPED = 10
"""Steps in a row whose loss or gradient is not finite before the run fails."""


def learning_rate(step: int, steps: int, adam: AdamConfig) -> float:
    """The rate of ``step`` of ``steps``: ``constant``, or ``one_cycle``: a cosine up over the first
    30% of the steps from lr / 25, and a cosine down to almost 0."""
    if adam.schedule == "constant":
        return adam.lr
    peak = max(1.0, 0.3 * steps)
    if step < peak:
        low, high, part = adam.lr / 25, adam.lr, step / peak
    else:
        low, high, part = adam.lr / 1e4, adam.lr, 1 - (step - peak) / max(1.0, steps - peak)
    return low + (high - low) * 0.5 * (1 - math.cos(math.pi * part))


def fit(
    job: Job,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
    live: Shard | None = None,
) -> dict[str, Any]:
    """Train ``job`` to its last step, from its newest checkpoint if it has one.

    Args:
        say: takes one line for the user.
        live: where this rank of joint training gets drawings that actors make; None: it draws.

    Returns:
        The last evaluation, as in ``run.json``.

    Raises:
        SbirError: the loss or the gradient was not finite for :data:`MAX_SKIPPED` steps in a row.
        UserError: the run folder holds another configuration's run.
    """
    config = job.config
    run = place(job.out)
    record = _open_run(job, run, ranks)
    if record.get("status") == "done":
        say(f"{run}: finished before, nothing to do")
        return dict(record["result"])
    if device.type == "cpu":
        _keep_memory()
    torch.manual_seed(config.seed)
    task = build(job, ranks, device, live)
    optimizers = {
        name: torch.optim.AdamW(
            player.parameters,
            lr=player.adam.lr,
            betas=(player.adam.beta1, 0.999),
            weight_decay=player.adam.weight_decay,
        )
        for name, player in task.players.items()
    }
    start = _restore(run, job.inputs.get("begin", ""), task, optimizers, say)
    with contextlib.ExitStack() as stack:
        log = None
        if ranks.rank == 0:
            log = stack.enter_context(contextlib.closing(_Log(run, start, task.steps)))
        _steps(job, task, optimizers, start, ranks, log, say, live is not None)
        result = _evaluate(task, task.steps, log)
        task.finish()
    _save(run, task, optimizers, task.steps, ranks, config.save.keep)
    if ranks.rank == 0:
        write_json_atomic(run / "run.json", {**record, "status": "done", "result": result})
    ranks.wait()
    return result


def _steps(
    job: Job,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    start: int,
    ranks: Ranks,
    log: _Log | None,
    say: Callable[[str], None],
    live: bool,
) -> None:
    """The steps from ``start`` on: rows, losses, gradients of all ranks, one update."""
    save, run = job.config.save, place(job.out)
    skipped, due = 0, False
    board = None if log is None else log.board
    # Rows are made one step ahead, where they do not depend on what the step before them changes.
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Any] | None = None
        for step in range(start, task.steps):
            began = time.monotonic()
            with _shared(ranks, live):
                batch = task.batch(step) if ahead is None else ahead.result()
            waited = time.monotonic() - began
            more = step + 1 < task.steps and task.ahead(step + 1)
            ahead = pool.submit(task.batch, step + 1) if more else None
            task.trained.train()
            losses = task.losses(batch, step)
            values = dict(losses)
            for optimizer in optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            turn = task.turn(step)
            for name, player in turn.items():
                ranks.sum_gradients(player.parameters)
                norm = torch.nn.utils.clip_grad_norm_(player.parameters, player.adam.clip_norm)
                values["_".join(["gradient_norm", name]).rstrip("_")] = norm
            # The summed gradients are the same on all ranks, so they all decide alike.
            norms = [value for key, value in values.items() if key.startswith("gradient_norm")]
            if all(bool(torch.isfinite(norm)) for norm in norms):
                skipped = 0
                for name, player in turn.items():
                    for group in optimizers[name].param_groups:
                        group["lr"] = learning_rate(step, task.steps, player.adam)
                    optimizers[name].step()
            else:
                skipped += 1
                reason = _not_finite(losses, step, ranks)
                say(reason)
                if skipped == MAX_SKIPPED:
                    raise SbirError(f"{run}: {skipped} steps in a row were not finite; {reason}")
            done = step + 1
            more_values = task.done(step, board)
            if log is not None:
                log.add({**values, **more_values}, waited)
                if done % save.log_every == 0 or done == task.steps:
                    log.write_steps(done)
            every = save.evaluate_every
            if every and done % every == 0 and done < task.steps:
                _evaluate(task, done, log)
            due |= done % save.checkpoint_every == 0
            if due and task.resumable(done) and done < task.steps:
                _save(run, task, optimizers, done, ranks, save.keep)
                due = False


@contextlib.contextmanager
def _shared(ranks: Ranks, live: bool) -> Iterator[None]:
    """An error of one rank, which waits for its own drawings, ends all; else the others would wait
    for that rank until their collective gives up.

    Args:
        live: False: what one rank meets, all meet.
    """
    if not live or ranks.world == 1:
        yield
        return
    error = ""
    try:
        yield
    except SbirError as found:
        error = str(found)
    told = ranks.sum_counts({error: 1} if error else {})
    if told:
        raise SbirError(next(iter(told)))


def _keep_memory() -> None:
    """Let the C library keep the memory of one step's activations for the next step.

    glibc gives large blocks back to the system at once and gets them page by page again: up to 40%
    of the time of a training step on CPUs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def _open_run(job: Job, run: Path, ranks: Ranks) -> dict[str, Any]:
    """``run.json``, made on the first start and compared on every later one."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "kind": job.kind,
        "config": to_dict(job.config),
        "digest": digest({"config": to_dict(job.config), "kind": job.kind, "inputs": job.inputs}),
        "inputs": job.inputs,
        "versions": versions(),
        "status": "running",
    }
    ranks.wait()
    if (run / "run.json").exists():
        found = read_run(run)
        if found["digest"] != record["digest"]:
            raise UserError(
                f"{run}: holds a run of other settings or inputs (digest {found['digest']}, now "
                f"{record['digest']}); choose another --out, or repeat its settings to resume it"
            )
        record = found
    ranks.wait()
    if ranks.rank == 0 and not (run / "run.json").exists():
        run.mkdir(parents=True, exist_ok=True)
        write_json_atomic(run / "run.json", record)
    return record


def _restore(
    run: Path,
    begin: str,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    say: Callable[[str], None],
) -> int:
    found = checkpoint.load(run, say)
    if found is None and begin:
        found = checkpoint.load(place(begin), say)
        if found is None:
            raise UserError(f"{begin}: has no checkpoint to begin with; let its training go on")
    if found is None:
        task.restore(0, {})
        return 0
    try:
        task.trained.load_state_dict(found.model)
    except RuntimeError as error:
        raise SbirError(f"{found.path}: does not fit the network of this run ({error})") from error
    for name, optimizer in optimizers.items():
        start = f"{name}." if name else ""
        mine = {k.removeprefix(start): v for k, v in found.optim.items() if k.startswith(start)}
        checkpoint.restore_optim(optimizer, mine)
    task.restore(found.step, found.state)
    say(f"{run}: resumed at step {found.step}")
    return found.step


def _save(
    run: Path,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    step: int,
    ranks: Ranks,
    keep: int,
) -> None:
    state = {"world": ranks.world, **task.state()}
    if ranks.rank == 0:
        optim = {
            f"{name}.{key}" if name else key: value
            for name, optimizer in optimizers.items()
            for key, value in checkpoint.optim_tensors(optimizer).items()
        }
        checkpoint.save(run, step, task.trained.state_dict(), optim, state, keep)
    ranks.wait()


def _evaluate(task: Task, step: int, log: _Log | None) -> dict[str, Any]:
    if log is None:
        return {}
    task.trained.eval()
    with torch.no_grad():
        result = task.evaluate()
    if result:
        log.write("evaluation", step, result)
    return result


def _not_finite(losses: dict[str, Tensor], step: int, ranks: Ranks) -> str:
    odd = [k for k, v in losses.items() if not bool(torch.isfinite(v).all())] or ["gradient"]
    return f"step {step}, rank {ranks.rank}: {', '.join(odd)} not finite, step skipped"


class _Log:
    """``metrics.jsonl`` and TensorBoard events of a run; lines after a resumed step are dropped."""

    def __init__(self, run: Path, start: int, steps: int) -> None:
        from tensorboardX import SummaryWriter

        self.file = run / "metrics.jsonl"
        kept = []
        if self.file.exists():
            lines = [json.loads(line) for line in self.file.read_text().splitlines()]
            kept = [json.dumps(line) for line in lines if line["step"] <= start]
        self.file.write_text("".join(f"{line}\n" for line in kept))
        self.board: Board = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.start, self.steps, self.began = start, steps, time.monotonic()
        self.sums: dict[str, list[Any]] = {}
        self.waited, self.since = 0.0, self.began

    def add(self, values: Mapping[str, Any], waited: float) -> None:
        """The numbers of one step, which waited so many seconds for its rows."""
        for key, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums.setdefault(key, []).append(value)
        self.waited += waited

    def write_steps(self, step: int) -> None:
        """A line with the means over the steps since the last one; of counts the last value."""
        now = time.monotonic()
        means = {
            key: values[-1]
            if isinstance(values[-1], int)
            else sum(map(float, values)) / len(values)
            for key, values in self.sums.items()
        }
        share = self.waited / max(now - self.since, 1e-9)
        self.write("step", step, {**means, "wait_share": share})
        self.sums, self.waited, self.since = {}, 0.0, now

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        plain = {k: v if isinstance(v, int) else round(float(v), 6) for k, v in values.items()}
        seconds = time.monotonic() - self.began
        line = {
            "kind": kind,
            "step": step,
            "steps": self.steps,
            "seconds": round(seconds, 2),
            "steps_per_second": round((step - self.start) / max(seconds, 1e-9), 3),
            **plain,
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        for key, value in plain.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.board.close()
