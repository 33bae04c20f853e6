"""One training run: step, check, save, resume; the same with one process and with many."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbir_ray import checkpoint
from sbir_ray.errors import SbirError, StoppedError, UserError, by_name
from sbir_ray.places import append_text, is_local, place, write_bytes
from sbir_ray.runlog import versions, write_json_atomic
from sbir_ray.runs import read_run
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict
from sbir_ray.train.job import Board, Job, Task
from sbir_ray.train.memory import keep_freed_memory
from sbir_ray.train.position import rng_of
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.step import take_step
from sbir_ray.train.tasks import build

if TYPE_CHECKING:
    from sbir_ray.stream.live import Shard

MAX_SKIPPED = 10
"""Steps in a row whose loss or gradient is not finite before the run fails."""


def fit(
    job: Job,
    ranks: Ranks,
    device: torch.device,
    say: Callable[[str], None],
    live: Shard | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train ``job`` to its last step, from its newest checkpoint if it has one.

    Args:
        say: takes one line for the user.
        live: where this rank of joint training gets drawings that actors make; None: it draws.
        stop: asked before each step whether to end after it; the answer of rank 0 counts.

    Returns:
        The last evaluation, as in ``run.json``.

    Raises:
        SbirError: the loss or the gradient was not finite for :data:`MAX_SKIPPED` steps in a row.
        UserError: the run folder holds another configuration's run, or its data have changed.
        StoppedError: ``stop`` said so, and the run was saved.
    """
    config = job.config
    run = place(job.out)
    record = _open_run(job, run, ranks)
    if record.get("status") == "done":
        say(f"{run}: finished before, nothing to do")
        return dict(record["result"])
    if device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    identity = str(record["digest"])
    with _shared(ranks):
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
        begin = job.inputs.get("begin", "")
        start = _restore(run, identity, begin, task, optimizers, say)
    with contextlib.ExitStack() as stack:
        log = None
        if ranks.rank == 0:
            log = stack.enter_context(contextlib.closing(_Log(run, start, task.steps)))
        course = _Course(job, identity, task, optimizers, ranks, log, say, stop)
        course.steps(start)
        result = course.measure(task.steps)
        task.finish()
    course.save(task.steps, _score(result))
    if ranks.rank == 0:
        write_json_atomic(run / "run.json", {**record, "status": "done", "result": result})
    ranks.wait()
    return result


@dataclass(frozen=True)
class _Course:
    """A run under way on this rank."""

    job: Job
    identity: str
    task: Task
    optimizers: Mapping[str, torch.optim.Optimizer]
    ranks: Ranks
    log: _Log | None
    say: Callable[[str], None]
    stop: Callable[[], bool]

    def steps(self, start: int) -> None:
        """The steps from ``start`` on: rows, losses, gradients of all ranks, one update."""
        task, ranks, save, log = self.task, self.ranks, self.job.config.save, self.log
        skipped, due, measure, stopping = 0, False, False, False
        # Rows are made one step ahead, where they do not depend on what the step before changes.
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Any] | None = None
            for step in range(start, task.steps):
                began = time.monotonic()
                # Rows may fail on one rank alone.
                with _shared(ranks):
                    batch = task.batch(step) if ahead is None else ahead.result()
                waited = time.monotonic() - began
                more = step + 1 < task.steps and task.ahead(step + 1)
                ahead = pool.submit(task.batch, step + 1) if more else None
                # What is random in a network is a function of the step too.
                torch.manual_seed(
                    int(rng_of(self.job.config.seed, step, ranks.rank).integers(2**62))
                )
                asked = ranks.rank == 0 and self.stop()
                taken = take_step(task, self.optimizers, batch, step, ranks, stop=asked)
                skipped = skipped + 1 if taken.trouble else 0
                if taken.trouble:
                    self.say(taken.trouble)
                if skipped == MAX_SKIPPED:
                    raise SbirError(
                        f"{self.job.out}: {skipped} steps in a row were not finite; {taken.trouble}"
                    )
                done = step + 1
                board = None if log is None else log.board
                more_values = task.done(step, board, updated=not taken.trouble)
                if log is not None:
                    log.add({**taken.values, **more_values}, waited)
                    if done % save.log_every == 0 or done == task.steps:
                        log.write_steps(done)
                due |= done % save.checkpoint_every == 0
                measure |= bool(save.evaluate_every) and done % save.evaluate_every == 0
                stopping |= taken.stop
                if done == task.steps or not task.resumable(done):
                    continue
                score = _score(self.measure(done)) if measure else ()
                if due or stopping or (measure and self._is_best(score)):
                    self.save(done, score)
                    due = False
                measure = False
                if stopping:
                    raise StoppedError(
                        f"{self.job.out}: stopped after step {done} of {task.steps}; the same "
                        "command goes on from there"
                    )

    def save(self, step: int, score: Sequence[float] = ()) -> None:
        """A checkpoint, by rank 0; all ranks call it."""
        state = {"world": self.ranks.world, **self.task.state()}
        with _shared(self.ranks):
            if self.ranks.rank:
                return
            optim = {
                f"{name}.{key}" if name else key: value
                for name, optimizer in self.optimizers.items()
                for key, value in checkpoint.optim_tensors(optimizer).items()
            }
            checkpoint.save(
                place(self.job.out),
                step,
                self.task.trained.state_dict(),
                optim,
                state,
                self.job.config.save.keep,
                identity=self.identity,
                score=score,
            )

    def measure(self, step: int) -> dict[str, Any]:
        """Numbers of the validation split, on rank 0; all ranks call it."""
        result: dict[str, Any] = {}
        with _shared(self.ranks):
            if self.log is not None:
                self.task.trained.eval()
                with torch.no_grad():
                    result = self.task.evaluate()
                if result:
                    self.log.write("evaluation", step, result)
        return result

    def _is_best(self, score: Sequence[float]) -> bool:
        """Whether rank 0 measured the best score of the run so far; the same on all ranks."""
        better = False
        if score:
            before = [entry.score for entry in checkpoint.listed(place(self.job.out))]
            better = tuple(score) > max(before, default=())
        return any(self.ranks.sum_counts({"better": int(better)}).values())


@contextlib.contextmanager
def _shared(ranks: Ranks) -> Iterator[None]:
    """An error of one rank ends all, by that rank's name; else the others would wait for it until
    their collective gives up."""
    if ranks.world == 1:
        yield
        return
    error: SbirError | None = None
    try:
        yield
    except SbirError as found:
        error = found
    mine = [] if error is None else [type(error).__name__, str(error)]
    told = [json.loads(text) for text in ranks.share(json.dumps(mine))]
    if error is not None:
        raise error
    for rank, found_there in enumerate(told):
        if found_there:
            kind, text = found_there
            raise by_name(kind)(f"rank {rank}: {text}")


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
    identity: str,
    begin: str,
    task: Task,
    optimizers: Mapping[str, torch.optim.Optimizer],
    say: Callable[[str], None],
) -> int:
    found = checkpoint.load(run, say, identity=identity)
    if found is None and begin:
        found = checkpoint.load(place(begin), say)
        if found is None:
            raise UserError(f"{begin}: has no checkpoint to begin with; let its training go on")
        if found.step >= task.steps:
            raise UserError(
                f"{begin}: is at step {found.step}, and optim.steps={task.steps}, which counts its "
                "steps too, leaves nothing to train; set more"
            )
    if found is None:
        task.restore(0, {})
        return 0
    try:
        task.trained.load_state_dict(found.model)
        for name, optimizer in optimizers.items():
            start = f"{name}." if name else ""
            mine = {k.removeprefix(start): v for k, v in found.optim.items() if k.startswith(start)}
            checkpoint.restore_optim(optimizer, mine)
    except (RuntimeError, ValueError) as error:
        raise SbirError(f"{found.path}: does not fit the network of this run ({error})") from error
    task.restore(found.step, found.state)
    say(f"{run}: resumed at step {found.step}")
    return found.step


def _score(result: Mapping[str, float]) -> tuple[float, ...]:
    """What makes a checkpoint the best: accuracy on the validation split, else likelihood."""
    if "acc@1" in result:
        numbers = [result["acc@1"], result["mAP"]]
    elif "offset" in result:
        numbers = [-(result["offset"] + result["pen"])]
    else:
        return ()
    return tuple(map(float, numbers)) if all(map(math.isfinite, numbers)) else ()


def _stays(entry: Mapping[str, Any], start: int) -> bool:
    """Whether a line stays in the log of a run that goes on at ``start``: the last evaluation is
    made again."""
    last = entry["kind"] == "evaluation" and entry["step"] == entry["steps"]
    return bool(entry["step"] <= start and not last)


class _Log:
    """``metrics.jsonl`` of a run, and on a disk TensorBoard events; lines after a resumed step are
    dropped, and one that a killed process left half written."""

    def __init__(self, run: Path, start: int, steps: int) -> None:
        from tensorboardX import SummaryWriter

        self.file = run / "metrics.jsonl"
        kept = []
        if self.file.exists():
            whole, _, _ = self.file.read_text().rpartition("\n")
            kept = [line for line in whole.splitlines() if _stays(json.loads(line), start)]
        write_bytes(self.file, "".join(f"{line}\n" for line in kept).encode())
        self.board: Board | None = None
        if is_local(run):
            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start)
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
        append_text(self.file, json.dumps(line) + "\n")
        if self.board is not None:
            for key, value in plain.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
