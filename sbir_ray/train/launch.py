"""Ray Train runs jobs one after another in one group of workers.

What a run has reached is on storage and nowhere else: a worker group that Ray starts again after a
death, and the same command repeated, both go on from the newest checkpoint of the run folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbir_ray import checkpoint
from sbir_ray.doctor import ready
from sbir_ray.errors import SbirError, by_name
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import append_text, arrow_file_system, place, remove_tree
from sbir_ray.runlog import Progress, locked
from sbir_ray.runs import read_run
from sbir_ray.stream.cluster import logical_cpus
from sbir_ray.stream.fit import Group, request_of, sent_to
from sbir_ray.train.job import Job
from sbir_ray.train.memory import worker_environment
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.stop_request import FILE, StopRequest, listening

if TYPE_CHECKING:
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchTrainer

    from sbir_ray.stream.live import Shard

MESSAGES = "messages.log"
_POLL = 0.5
_RETRIES = 2
"""Times in a row that a worker group is started again by Ray."""


@dataclass(frozen=True)
class Actors:
    """The processes that draw while joint training goes on."""

    least: int = 1
    most: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    """Of each; a GPU may be shared."""
    on: str = ""
    """Custom resource of the nodes that draw; any by default."""


def train(
    jobs: Sequence[Job],
    *,
    workers: int = 1,
    gpu: bool = False,
    cpus_per_worker: float | None = None,
    address: str | None = None,
    actors: Actors | None = None,
    worker_resource: str = "",
    progress: Callable[[str], Progress] | None = None,
) -> list[dict[str, Any]]:
    """Train ``jobs`` one after another on ``workers`` Ray Train workers, each to its run folder.

    Args:
        workers: processes that share each batch; 0: this process, without Ray unless drawings come
            from actors.
        cpus_per_worker: also the threads of each; None: this machine's CPUs divided among the
            workers when Ray is started here, 1 on a cluster that is there.
        address: the Ray cluster, see :func:`sbir_ray.stream.cluster.connect`.
        worker_resource: custom resource of the nodes that train; any by default.
        actors: who draws for joint training that is not ``stream.sync``.
        progress: makes a progress line from a title, one for each job.

    Returns:
        The last evaluation of each job.

    Raises:
        SbirError: what a worker found wrong, in its words; or the workers died again and again.
        StoppedError: SIGTERM came; the runs were saved.
        UserError: another process trains one of them, so many workers do not fit, or the doctor
            found what else has to be changed first.
    """
    if not jobs:
        return []
    with contextlib.ExitStack() as stack:
        for job in jobs:
            stack.enter_context(locked(place(job.out)))
        follow = None if progress is None else _following(jobs, progress)
        with follow or contextlib.nullcontext():
            return _train(
                jobs, workers, gpu, cpus_per_worker, address, actors or Actors(), worker_resource
            )


def _train(
    jobs: Sequence[Job],
    workers: int,
    gpu: bool,
    cpus_per_worker: float | None,
    address: str | None,
    actors: Actors,
    worker_resource: str,
) -> list[dict[str, Any]]:
    request = place(jobs[0].out).resolve() / FILE
    # What draws for a job starts from the runs of the jobs before it.
    alone, streamed = list(jobs), []
    if isinstance(jobs[-1].config, JointTraining) and not jobs[-1].config.stream.sync:
        alone, streamed = list(jobs[:-1]), [jobs[-1]]
    if workers == 0 and not streamed:
        with listening(request):
            return _run(alone, gpu, Ranks(), StopRequest(request))
    here = not (address or os.environ.get("RAY_ADDRESS"))
    share = len(os.sched_getaffinity(0)) // max(workers, 1) if here else 1
    if here and streamed:
        # Ray's own CPUs are at least so many, also where the machine's are fewer.
        left = logical_cpus() - actors.least * actors.cpus - 1
        share = min(share, int(left // max(workers, 1)))
    cpus = cpus_per_worker or float(max(1, share))
    group = _Group(workers, gpu, cpus, worker_resource, StopRequest(request))
    asked = Group("--workers", workers, cpus, float(gpu), worker_resource)
    draw = Group("--actors", actors.least, actors.cpus, actors.gpus, actors.on)
    # Ray takes SIGTERM for itself when it starts.
    with (
        ready(request_of(asked, draw if streamed else None), [place(jobs[0].out)], address),
        listening(request),
    ):
        results = group.run(alone) if alone else []
        for job in streamed:
            results += _run_streamed(job, group, actors)
        return results


def _run_streamed(job: Job, group: _Group, actors: Actors) -> list[dict[str, Any]]:
    """Joint training with actors that draw meanwhile."""
    from sbir_ray.stream.filters import RankerSpec
    from sbir_ray.stream.live import LiveStream, StreamSpec

    config = job.config
    assert isinstance(config, JointTraining)
    run = place(job.out)
    if (run / "run.json").exists() and read_run(run)["status"] == "done":
        return group.run([job])
    device = "cuda" if actors.gpus else "cpu"
    threads = max(1, int(actors.cpus))
    ranker = None
    if config.filters.max_rank:
        ranker = RankerSpec.of_run(place(job.inputs["teacher"]), device, threads)
    pseudo = round(config.retrieval.pseudo_share * config.retrieval.optim.batch_size)
    spec = StreamSpec(
        photos=place(job.inputs["photos"]),
        generator=place(job.inputs["generator"]),
        stream=config.stream,
        samples=config.policy.samples if config.policy.kind != "none" else 0,
        sides=(
            config.retrieval.model.image_size,
            config.generator.model.image_size,
            config.generator.discriminator.image_size,
        ),
        seed=config.seed,
        ranker=ranker,
        device=device,
        threads=threads,
    )
    with LiveStream(
        spec,
        rows_per_step=max(pseudo, config.policy.batch_size),
        world=max(1, group.workers),
        first=_drawn_before(run),
        beside=(group.workers * group.cpus, float(group.workers * group.gpu)),
        actors=(actors.least, actors.most),
        cpus_per_actor=actors.cpus,
        gpus_per_actor=actors.gpus,
        actor_resource=actors.on,
    ) as stream:
        return group.run([job], stream.shards)


def _drawn_before(run: Path) -> int:
    """Photos that earlier processes of this run have drawn, used or not."""
    file = run / "ledger.json"
    return int(json.loads(file.read_bytes())["drawn"]) if file.exists() else 0


@dataclass(frozen=True)
class _Group:
    """The processes that train."""

    workers: int
    gpu: bool
    cpus: float
    on: str
    stop: StopRequest

    def run(self, jobs: Sequence[Job], shards: Sequence[Shard] = ()) -> list[dict[str, Any]]:
        """The last evaluation of each job."""
        if self.workers == 0:
            return _run(jobs, self.gpu, Ranks(), self.stop, shards)
        return _with_ray(jobs, self, shards)


def _with_ray(jobs: Sequence[Job], group: _Group, shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Workers of Ray Train, started again as long as they get further before they die."""
    from ray.train import TrainingFailedError

    from sbir_ray.train.groups import give_back_of_the_dead

    storage = place(jobs[0].out).resolve() / "ray"
    vain = 0
    while True:
        # Of a driver that was killed, too.
        remove_tree(storage)
        before = _reached(jobs)
        try:
            answer = _trainer(jobs, group, shards, storage).fit().return_value
            break
        except TrainingFailedError as error:
            vain = vain + 1 if _reached(jobs) == before else 0
            if vain > (_RETRIES if _died_at_its_start(error) else 0):
                raise SbirError(
                    f"{jobs[0].out}: the workers died {_RETRIES + 1} times without getting "
                    f"further; see their logs ({_why(error)})"
                ) from error
        finally:
            give_back_of_the_dead()
            remove_tree(storage)
    if "error" in answer:
        raise by_name(answer["kind"])(answer["error"])
    results: list[dict[str, Any]] = answer["results"]
    return results


def _died_at_its_start(error: TrainingFailedError) -> bool:
    """Whether a worker was lost just when it was given its work, which Ray does not try again."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    return isinstance(error, ControllerError) and isinstance(
        error.controller_failure, RayActorError
    )


def _why(error: TrainingFailedError) -> str:
    """In one line: the ranks that failed, and how."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    told = [f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())]
    return " ".join("; ".join(told or [str(error)]).split())[:300]


def _reached(jobs: Sequence[Job]) -> list[Any]:
    """What would differ if a run had got further."""
    found: list[Any] = []
    for job in jobs:
        run = place(job.out)
        status = read_run(run)["status"] if (run / "run.json").exists() else ""
        found.append((status, [entry.step for entry in checkpoint.listed(run)]))
    return found


def _trainer(
    jobs: Sequence[Job], group: _Group, shards: Sequence[Shard], storage: Path
) -> TorchTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from sbir_ray.train.groups import GivesBack

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ctrl-C stays what it is: Ray's handler ends with 0, outlives the run, and keeps the
            run's controller, a process of some hundred MB, with it."""

    system, folder = arrow_file_system(storage)
    gpu = group.gpu
    patience = math.ceil(2 * max((shard.wait_limit for shard in shards), default=0.0))
    resources = {"CPU": group.cpus, **({"GPU": 1.0} if gpu else {})}
    resources |= sent_to(group.on).get("resources", {})
    settings = {
        "jobs": list(jobs),
        "gpu": gpu,
        "threads": math.ceil(group.cpus),
        "shards": list(shards),
        "stop": group.stop,
    }
    return Trainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=group.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=max(600, patience)
        ),
        # A name used twice would make Ray go on with its own idea of the old run.
        run_config=RunConfig(
            name=uuid.uuid4().hex,
            storage_path=folder,
            storage_filesystem=system,
            callbacks=[GivesBack()],
            worker_runtime_env={"env_vars": {} if gpu else worker_environment()},
            failure_config=FailureConfig(
                max_failures=_RETRIES,
                controller_failure_limit=_RETRIES + 1,
                max_preemption_failures=_RETRIES,
            ),
        ),
    )


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train worker runs; errors that the user has to see are handed back, since Ray
    would repeat them and bury the line in a traceback."""
    import ray.train
    import torch

    context = ray.train.get_context()
    torch.set_num_threads(settings["threads"])
    try:
        ranks = Ranks(context.get_world_rank(), context.get_world_size())
        results = _run(
            settings["jobs"], settings["gpu"], ranks, settings["stop"], settings["shards"]
        )
        return {"results": results}
    except SbirError as error:
        return {"error": str(error), "kind": type(error).__name__}


def _run(
    jobs: Sequence[Job], gpu: bool, ranks: Ranks, stop: StopRequest, shards: Sequence[Shard] = ()
) -> list[dict[str, Any]]:
    import torch

    from sbir_ray.train.loop import fit

    device = torch.device("cuda" if gpu else "cpu")
    results = []
    for job in jobs:

        def say(line: str, job: Job = job) -> None:
            if ranks.rank == 0:
                append_text(place(job.out) / MESSAGES, line + "\n")

        live = shards[ranks.rank] if shards else None
        results.append(fit(job, ranks, device, say, live, stop))
    return results


@contextlib.contextmanager
def _following(jobs: Sequence[Job], progress: Callable[[str], Progress]) -> Iterator[None]:
    """Show, meanwhile, the lines that rank 0 writes to the run folders, wherever it runs."""
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(jobs, progress, stop), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _follow(
    jobs: Sequence[Job], progress: Callable[[str], Progress], stop: threading.Event
) -> None:
    for job in jobs:
        run = place(job.out)
        title = f"train {job.kind} {run.name}"
        seen = {name: _size(run / name) for name in ("metrics.jsonl", MESSAGES)}
        with progress(title) as bar:
            finished = False
            while not finished:
                finished = stop.wait(_POLL)
                for line in _fresh(run / MESSAGES, seen):
                    bar.say(line)
                for line in _fresh(run / "metrics.jsonl", seen):
                    entry = json.loads(line)
                    bar.update(entry["step"], entry["steps"], _summary(entry))
                    finished |= entry["step"] == entry["steps"] and entry["kind"] == "step"
        if stop.is_set():
            return


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _fresh(file: Path, seen: dict[str, int]) -> list[str]:
    """Whole lines appended to ``file`` since the last call."""
    if not file.exists():
        return []
    if _size(file) < seen[file.name]:  # the log was cut back to the resumed step
        seen[file.name] = _size(file)
    with file.open("rb") as stream:
        stream.seek(seen[file.name])
        data = stream.read()
    whole = data[: data.rfind(b"\n") + 1]
    seen[file.name] += len(whole)
    return whole.decode().splitlines()


def _summary(entry: dict[str, Any]) -> str:
    hidden = {"kind", "step", "steps", "seconds", "steps_per_second"}
    shown = {
        k: v for k, v in entry.items() if k not in hidden and not k.startswith("gradient_norm")
    }
    if entry["kind"] == "evaluation":
        shown = {k: v for k, v in shown.items() if k in ("acc@1", "acc@10", "offset", "pen")}
    return " ".join(f"{k} {v}" if isinstance(v, int) else f"{k} {v:.3f}" for k, v in shown.items())
