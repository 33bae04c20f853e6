"""The live stream: generators draw unlabelled photos while learners train on what they drew.

The driver starts a :class:`LiveStream`, which is one actor and what that actor starts, and gives
each learner its :class:`Shard`. A batch goes to the learner that asks first: one that is slow, or
that has to turn most of its rows away, takes nothing from the others, as an even split would.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sbir_ray.errors import SbirError
from sbir_ray.joint_config import StreamConfig
from sbir_ray.stream.cluster import room_for_actors
from sbir_ray.stream.exchange import Fate
from sbir_ray.stream.filters import RankerSpec, reference_photos
from sbir_ray.stream.fit import SPARE_LIVE, sent_to
from sbir_ray.stream.live_photos import TicketPhotos
from sbir_ray.stream.live_pipeline import PATIENCE, Plan, StreamActor, cause, one_line
from sbir_ray.stream.live_rows import Failed, LiveRow, LiveSketcher, decode_rows

if TYPE_CHECKING:
    from torch import Tensor

_MAX_FAILED = 64
"""Rows that may fail one after another before it is not the photos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """What a live stream draws, and how: plain values, so that it travels."""

    photos: Path
    """PHOTOS folder."""
    generator: Path
    """RUN folder whose generator, and discriminator if it has one, draw until newer weights are
    published."""
    stream: StreamConfig
    samples: int
    """Drawings of each photo for the policy gradient."""
    sides: tuple[int, ...]
    """Sides of the photos that the learners need, pixels."""
    seed: int
    ranker: RankerSpec | None = None
    """Ranks each photo among others of the store for its drawing."""
    device: str = "cpu"
    threads: int = 1
    """CPU threads of a generator."""

    def make(self, references: NDArray[np.uint8] | None) -> LiveSketcher:
        """What draws, with the weights of the run.

        Args:
            references: (R, 3, S, S) photos for the ranker, if there is one.

        Raises:
            UserError: not the run of a generator.
            DamagedError: a run without a whole checkpoint.
        """
        from sbir_ray.runs import load_discriminator, load_generator

        generator = load_generator(self.generator).model.to(self.device)
        judge = load_discriminator(self.generator)
        ranker = None
        if self.ranker is not None:
            assert references is not None
            ranker = self.ranker.make(references)
        discriminator = None if judge is None else judge.model.to(self.device)
        return LiveSketcher(generator, discriminator, self.stream, self.samples, ranker)


# --------------------------------------------------------------------------- the stream


class LiveStream:
    """A live stream, for the length of a ``with`` block. Needs a Ray that is up.

    Args:
        rows_per_step: rows that all learners together use in a step.
        world: learners.
        first: ticket to begin with; those before it were drawn by an earlier stream.
        actors: least and most generators.
        cpus_per_actor, gpus_per_actor: of each; a GPU may be shared.
        actor_resource: custom resource of the nodes that draw; any by default.
        beside: CPUs and GPUs that have to stay free for the learners.

    Raises:
        UserError: the store or the run cannot be used, the actors do not fit into the cluster.
        DamagedError: a run without a whole checkpoint.
    """

    def __init__(
        self,
        spec: StreamSpec,
        *,
        rows_per_step: int,
        world: int,
        first: int = 0,
        actors: tuple[int, int] = (1, 1),
        cpus_per_actor: float = 1.0,
        gpus_per_actor: float = 0.0,
        actor_resource: str = "",
        beside: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        least, most = actors
        room = room_for_actors(
            actors,
            cpus_per_actor,
            gpus_per_actor,
            actor_resource,
            spare_cpus=SPARE_LIVE + beside[0],
            spare_gpus=beside[1],
        )
        # Actors run in other folders.
        spec = dataclasses.replace(
            spec, photos=spec.photos.absolute(), generator=spec.generator.absolute()
        )
        references = None
        if spec.ranker is not None:
            references = reference_photos(spec.photos, spec.ranker.image_size)
        # Here too, so that what is wrong is said at once. The driver need not have a GPU.
        author = _on_cpu(spec).make(references)
        sides = tuple(sorted({*spec.sides, *author.sides}))
        TicketPhotos(spec.photos, spec.seed, sides)
        batch = spec.stream.batch_size
        # With a batch for each learner and one on its way, none waits for rows that another has.
        window = max(world + 1, math.ceil(spec.stream.window * rows_per_step / batch))
        plan = Plan(
            spec=spec,
            read_sides=sides,
            references=[] if references is None else [ray.put(references)],
            # All at once: Ray Data would add them one by one, each after some seconds.
            pool=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                initial_size=min(most, room),
                max_tasks_in_flight_per_actor=2,
            ),
            cpus=cpus_per_actor,
            gpus=gpus_per_actor,
            placement=sent_to(actor_resource),
        )
        # Calls that wait take a thread each: the source's, and one of each learner's process, of
        # which an earlier one's may wait on for a moment after its death.
        # On the driver's node: losing a node that draws may not end the run.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._actor: Any = (
            ray.remote(StreamActor)
            .options(num_cpus=0, max_concurrency=16 + 2 * world, scheduling_strategy=here)
            .remote(window, batch, first)
        )
        ray.get(self._actor.start.remote(plan))
        name = uuid.uuid4().hex
        self.shards = [
            Shard(self._actor, rank, spec.stream.wait_limit, name) for rank in range(world)
        ]
        """The learners' ends, by rank; they travel."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ledger(self) -> dict[str, Any]:
        """The account so far, of kind ``live``."""
        found: dict[str, Any] = ray.get(self._actor.ledger.remote())
        return found

    def close(self) -> None:
        """End all processes of the stream."""
        try:
            ray.get(self._actor.close.remote())
        except RayError:  # it is dead already
            return
        # What it has not ended by itself dies with it, its owner.
        ray.kill(self._actor)


# --------------------------------------------------------------------------- the learners


class Shard:
    """A learner's end of a live stream. It travels until it is first used.

    Args:
        actor: the :class:`StreamActor`.
        wait_limit: seconds that :meth:`next` waits.
        name: of the stream, another for each.
    """

    def __init__(self, actor: Any, rank: int, wait_limit: float, name: str) -> None:
        self.actor, self.rank, self.wait_limit, self.name = actor, rank, wait_limit, name
        self.waited = 0.0
        """Seconds that the learner has waited for rows."""
        self._reader: _Reader | None = None
        self._publisher: ThreadPoolExecutor | None = None
        self._publishing: Future[None] | None = None

    def next(self) -> LiveRow:
        """The next row.

        Raises:
            SbirError: none came for ``wait_limit`` seconds, or none will come.
        """
        if self._reader is None:
            self._reader = _Reader(self.actor, self.rank)
        began = time.monotonic()
        try:
            item = self._reader.rows.get(timeout=self.wait_limit)
        except queue.Empty:
            raise SbirError(
                f"no pseudo sketch came for {self.wait_limit:g} s (stream.wait_limit): check the "
                "generator actors, whether they fit beside the workers, and their logs"
            ) from None
        finally:
            self.waited += time.monotonic() - began
        if isinstance(item, SbirError):
            self._reader.rows.put(item)
            raise item
        return item

    def account(self, fates: Mapping[int, Fate]) -> None:
        """Say what became of rows, by ticket: ``("used", "")``, ``("filtered", reason)`` or
        ``("stale", "")``. Each row needs one fate; a second one does not count.

        Raises:
            SbirError: the stream is gone.
        """
        # Waited for, so that a ledger that is asked for after it has them.
        _answer(self.actor.account.remote(dict(fates)))

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        """Give the generators newer weights (:func:`live_rows.published`).

        Copies them and returns; they are sent in the background, one publication after another.

        Raises:
            SbirError: the publication before this one failed.
        """
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if self._publisher is None:
            self._publisher = ThreadPoolExecutor(1)
        if self._publishing is not None:
            self._publishing.result()
        self._publishing = self._publisher.submit(self._send, version, copied)

    def ledger(self) -> dict[str, Any]:
        """The account of the whole stream so far, of kind ``live``."""
        found: dict[str, Any] = _answer(self.actor.ledger.remote())
        return found

    def close(self) -> None:
        """Ask for no more rows, and finish what is being published."""
        if self._reader is not None:
            self._reader.close()
        if self._publisher is not None:
            self._publisher.shutdown()

    def _send(self, version: int, weights: dict[str, Tensor]) -> None:
        # As arrays, which need not be copied out of the object store to be read.
        reference = ray.put({name: tensor.numpy() for name, tensor in weights.items()})
        _answer(self.actor.publish.remote(version, [reference]))


class _Reader:
    """A thread that fetches batches and takes them apart, a batch at a time."""

    def __init__(self, actor: Any, rank: int) -> None:
        self.actor, self.rank = actor, rank
        # So few that the next batch is asked for when the learner is at the last rows of this one.
        self.rows: queue.Queue[LiveRow | SbirError] = queue.Queue(maxsize=2)
        self._stopped = threading.Event()
        self._failed: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            session = _answer(self.actor.attach.remote(self.rank))
            while not self._stopped.is_set():
                given = _answer(self.actor.give.remote(self.rank, session, PATIENCE))
                if given.trouble:
                    raise SbirError(given.trouble)
                if given.batch:
                    self._take_apart(_answer(given.batch[0]), session)
        except SbirError as error:
            self._put(error)
        except Exception as error:  # has to reach the learner, whatever it is
            self._put(SbirError(f"the live stream cannot be read: {one_line(error)}"))

    def _take_apart(self, block: pa.Table, session: int) -> None:
        number = block["number"][0].as_py()
        if not _answer(self.actor.opened.remote(self.rank, session, number)):
            return
        failed: dict[int, Fate] = {}
        rows = decode_rows(block["rows"][0].as_buffer())
        for row in rows:
            if isinstance(row, Failed):
                failed[row.ticket] = ("filtered", row.reason)
                self._failed[f"{row.reason} ({row.detail})"] += 1
        if failed:
            _answer(self.actor.account.remote(failed))
        if len(failed) < len(rows):
            self._failed.clear()
        elif self._failed.total() >= _MAX_FAILED:
            text, count = self._failed.most_common(1)[0]
            raise SbirError(
                f"the last {self._failed.total()} photos could not be drawn, {count} of them by "
                f"{text}"
            )
        for row in rows:
            if isinstance(row, LiveRow):
                self._put(row)

    def _put(self, item: LiveRow | SbirError) -> None:
        while not self._stopped.is_set():
            try:
                self.rows.put(item, timeout=PATIENCE / 4)
                return
            except queue.Full:
                continue


# --------------------------------------------------------------------------- helpers


def _answer(reference: Any) -> Any:
    """The answer of the stream's actor."""
    try:
        return ray.get(reference)
    except RayError as error:
        raise SbirError(f"the live stream broke down: {cause(error)}") from error


def _on_cpu(spec: StreamSpec) -> StreamSpec:
    ranker = None if spec.ranker is None else dataclasses.replace(spec.ranker, device="cpu")
    return dataclasses.replace(spec, device="cpu", ranker=ranker)
