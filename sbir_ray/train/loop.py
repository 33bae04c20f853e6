"""One training run: step, check, save, resume; the same with one process and with many."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbir_ray import checkpoint
from sbir_ray.config import SCHEMA_VERSION, OptimConfig, digest, to_dict
from sbir_ray.errors import SbirError, UserError
from sbir_ray.runlog import versions, write_json_atomic
from sbir_ray.runs import read_run
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.tasks import Job, Task, build

MAX_SKIPPED = 10
"""Steps in a row whose loss or gradient is not finite before the run fails."""


def learning_rate(step: int, optim: OptimConfig) -> float:
    """The rate of ``step``: ``constant``, or ``one_cycle``: a cosine up over the first 30% of the
    steps from lr / 25, and a cosine down to almost 0."""
    if optim.schedule == "constant":
        return optim.lr
    peak = max(1.0, 0.3 * optim.steps)
    if step < peak:
        low, high, part = optim.lr / 25, optim.lr, step / peak
    else:
        low, high, part = optim.lr / 1e4, optim.lr, 1 - (step - peak) / max(1.0, optim.steps - peak)
    return low + (high - low) * 0.5 * (1 - math.cos(math.pi * part))


def fit(job: Job, ranks: Ranks, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Train ``job`` to its last step, from its newest checkpoint if it has one.

    Args:
        say: takes one line for the user.

    Returns:
        The last evaluation, as in ``run.json``.

    Raises:
        SbirError: the loss or the gradient was not finite for :data:`MAX_SKIPPED` steps in a row.
        UserError: the run folder holds another configuration's run.
    """
    config = job.config
    run = Path(job.out)
    record = _open_run(job, run, ranks)
    if record.get("status") == "done":
        say(f"{run}: finished before, nothing to do")
        return dict(record["result"])
    if device.type == "cpu":
        _keep_memory()
    torch.manual_seed(config.seed)
    task = build(job, ranks, device)
    optim = task.optim
    parameters = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=(optim.beta1, 0.999), weight_decay=optim.weight_decay
    )
    start = _restore(run, task, optimizer, say)
    with contextlib.ExitStack() as stack:
        log = None
        if ranks.rank == 0:
            log = stack.enter_context(contextlib.closing(_Log(run, start, optim.steps)))
        _steps(job, task, optimizer, start, ranks, log, say)
        result = _evaluate(task, optim.steps, log)
    _save(run, task, optimizer, optim.steps, ranks, config.save.keep)
    if ranks.rank == 0:
        write_json_atomic(run / "run.json", {**record, "status": "done", "result": result})
    ranks.wait()
    return result


def _steps(
    job: Job,
    task: Task,
    optimizer: torch.optim.Optimizer,
    start: int,
    ranks: Ranks,
    log: _Log | None,
    say: Callable[[str], None],
) -> None:
    """The steps from ``start`` on: rows, losses, gradients of all ranks, one update."""
    config, optim, run = job.config, task.optim, Path(job.out)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    skipped = 0
    # Rows are made one step ahead: they depend on the step's number alone.
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(task.batch, start)
        for step in range(start, optim.steps):
            batch = ahead.result()
            if step + 1 < optim.steps:
                ahead = pool.submit(task.batch, step + 1)
            task.trained.train()
            losses = task.losses(batch, step)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            ranks.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
            # The summed gradient is the same on all ranks, so they all decide alike.
            if bool(torch.isfinite(norm)):
                skipped = 0
                rate = learning_rate(step, optim)
                for parameter_group in optimizer.param_groups:
                    parameter_group["lr"] = rate
                optimizer.step()
            else:
                skipped += 1
                reason = _not_finite(losses, step, ranks)
                say(reason)
                if skipped == MAX_SKIPPED:
                    raise SbirError(f"{run}: {skipped} steps in a row were not finite; {reason}")
            done = step + 1
            values = {**losses, "gradient_norm": norm}
            if log is not None and (done % config.save.log_every == 0 or done == optim.steps):
                log.write("step", done, values)
            every = config.save.evaluate_every
            if every and done % every == 0 and done < optim.steps:
                _evaluate(task, done, log)
            if done % config.save.checkpoint_every == 0 and done < optim.steps:
                _save(run, task, optimizer, done, ranks, config.save.keep)


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
    run: Path, task: Task, optimizer: torch.optim.Optimizer, say: Callable[[str], None]
) -> int:
    found = checkpoint.load(run, say)
    if found is None:
        return 0
    try:
        task.trained.load_state_dict(found.model)
    except RuntimeError as error:
        raise SbirError(f"{found.path}: does not fit the network of this run ({error})") from error
    checkpoint.restore_optim(optimizer, found.optim)
    say(f"{run}: resumed at step {found.step}")
    return found.step


def _save(
    run: Path,
    task: Task,
    optimizer: torch.optim.Optimizer,
    step: int,
    ranks: Ranks,
    keep: int,
) -> None:
    if ranks.rank == 0:
        state = {"world": ranks.world, **task.state()}
        optim = checkpoint.optim_tensors(optimizer)
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
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start)
        self.start, self.steps, self.began = start, steps, time.monotonic()

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        plain = {k: float(v.detach() if isinstance(v, Tensor) else v) for k, v in values.items()}
        seconds = time.monotonic() - self.began
        line = {
            "kind": kind,
            "step": step,
            "steps": self.steps,
            "seconds": round(seconds, 2),
            "steps_per_second": round((step - self.start) / max(seconds, 1e-9), 3),
            **{k: round(v, 6) for k, v in plain.items()},
        }
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        for key, value in plain.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)
        self.board.flush()

    def close(self) -> None:
        self.board.close()
