"""The pipeline of a live stream: batches as they are granted, their photos, drawings of them.

A Ray Data pipeline without an end, in an actor of its own with the exchange that grants its
batches. What dies is started again by Ray, and its batches are made again, the same but for newer
weights: a batch follows from its number alone. A batch that kills its process is given up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy
from ray.exceptions import RayError

from sbir_ray.stream.attempts import KILLED, LIMIT
from sbir_ray.stream.cluster import quiet_data
from sbir_ray.stream.exchange import Exchange
from sbir_ray.stream.live_photos import TicketPhoto, TicketPhotos
from sbir_ray.stream.live_rows import (
    Failed,
    LiveRow,
    decode_photos,
    encode_photos,
    encode_rows,
    ticket_seed,
)

if TYPE_CHECKING:
    from sbir_ray.stream.live import StreamSpec

PATIENCE = 2.0
"""Seconds after which a call that waits is made again."""

_STAGE_CPUS = 0.1
_READERS = 4
_CLOSING = 5.0
"""Seconds for the pipeline to end by itself."""

# Each block that travels is one row: the number of a batch, and the batch as bytes.
_BLOCK = pa.schema([("number", pa.int64()), ("rows", pa.binary())])


def _block(number: int, rows: bytes) -> pa.Table:
    return pa.table({"number": [number], "rows": [rows]}, schema=_BLOCK)


def count_batches(_: pa.Table, exchange: Any) -> Iterator[pa.Table]:
    """Task: numbers of batches, as they are granted, until the stream is closed."""
    place = 0
    while (numbers := ray.get(exchange.take.remote(place, PATIENCE))) is not None:
        for number in numbers:
            yield _block(number, b"")
        place += len(numbers)


def read_batch(block: pa.Table, spec: StreamSpec, sides: tuple[int, ...], first: int) -> pa.Table:
    """Task: the photos of a batch."""
    number = block["number"][0].as_py()
    start = first + number * spec.stream.batch_size
    store = _store(spec.photos, spec.seed, sides)
    return _block(number, encode_photos(store.read(range(start, start + spec.stream.batch_size))))


@lru_cache(maxsize=1)
def _store(folder: Path, seed: int, sides: tuple[int, ...]) -> TicketPhotos:
    return TicketPhotos(folder, seed, sides)


class DrawActor:
    """Actor: draws batches with the newest weights; a photo that cannot be drawn is a failed row.

    Args:
        references: reference to the ranker's photos, in a list; or [].
    """

    def __init__(self, spec: StreamSpec, exchange: Any, references: list[Any]) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        self.spec, self.exchange = spec, exchange
        self.sketcher = spec.make(ray.get(references[0]) if references else None)
        self.serial = 0

    def __call__(self, block: pa.Table) -> pa.Table:
        """The rows of a batch for its photos; no block when nobody waits for it."""
        number = block["number"][0].as_py()
        begun = ray.get(self.exchange.begin.remote(number, self.serial))
        if begun is None:
            return block.slice(0, 0)
        photos = decode_photos(block["rows"][0].as_buffer())
        if begun.tries > LIMIT:
            text = f"{begun.tries - 1} processes ended while they drew its batch"
            rows: list[LiveRow | Failed] = [
                Failed(photo.ticket, photo.photo_id, KILLED, text) for photo in photos
            ]
        else:
            if begun.weights:
                self._renew(begun)
            rows = self._draw(photos)
        return _block(number, encode_rows(rows, self.spec.sides))

    def _renew(self, begun: Any) -> None:
        try:
            weights = ray.get(begun.weights[0])
        except RayError:  # their learner died: another one will publish
            return
        self.sketcher.load(begun.version, weights)
        self.serial = begun.serial

    def _draw(self, photos: list[TicketPhoto]) -> list[LiveRow | Failed]:
        """All at once; one by one if that raised."""
        whole = [photo for photo in photos if not photo.fault]
        found: dict[int, LiveRow | Failed] = {
            photo.ticket: Failed(photo.ticket, photo.photo_id, "damaged-photo", photo.fault)
            for photo in photos
            if photo.fault
        }
        try:
            found |= self._drawn(whole)
        except Exception:  # whose fault it is shows when they are drawn one by one
            for photo in whole:
                try:
                    found |= self._drawn([photo])
                except Exception as error:  # any fault costs its own row alone, and is told
                    reason = f"error-{type(error).__name__}"
                    found[photo.ticket] = Failed(
                        photo.ticket, photo.photo_id, reason, one_line(error)
                    )
        return [found[photo.ticket] for photo in photos]

    def _drawn(self, photos: list[TicketPhoto]) -> dict[int, LiveRow | Failed]:
        rows = self.sketcher.draw(
            [photo.ticket for photo in photos],
            [photo.photo_id for photo in photos],
            [photo.photos for photo in photos],
            [ticket_seed(self.spec.seed, photo.ticket) for photo in photos],
        )
        empty = "nothing-to-draw"
        return {
            row.ticket: row
            if row.drawn.strokes
            else Failed(row.ticket, row.photo_id, empty, "the drawing has no stroke")
            for row in rows
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the pipeline is made of."""

    spec: StreamSpec
    read_sides: tuple[int, ...]
    references: list[Any]
    pool: ActorPoolStrategy
    cpus: float
    gpus: float
    placement: dict[str, dict[str, float]]
    """Custom resources of each actor, as ``ray.remote`` takes them."""


class StreamActor(Exchange):
    """Actor: the exchange, and the pipeline that it grants batches to."""

    def start(self, plan: Plan) -> None:
        """Begin to draw."""
        self._thread = threading.Thread(target=self._run, args=(plan,), daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Let the pipeline end, and wait for that a while."""
        self.end("the live stream was closed")
        self._thread.join(_CLOSING)

    def _run(self, plan: Plan) -> None:
        try:
            for bundle in self._dataset(plan).iter_internal_ref_bundles():
                for entry in bundle.blocks:
                    if entry.metadata.num_rows:
                        self.deliver([entry.ref])
            self.end("the live stream ended")
        except Exception as error:  # the learners have to be told, whatever it is
            self.end(f"the live stream broke down: {cause(error)}")

    def _watch(self) -> None:
        """Have drawn by others what was drawn on a node that is lost: its actors may never find
        another place, and Ray would keep their batches for them."""
        before, again = _alive(), 0
        while not self.ended.wait(PATIENCE):
            now = _alive()
            if before - now:
                # Twice: meanwhile Ray Data may have sent them another batch.
                again = 2
            if again:
                self.repeat()
                again -= 1
            before = now

    def _dataset(self, plan: Plan) -> ray.data.Dataset:
        quiet_data()
        context = DataContext.get_current()
        # Each block goes on as soon as it is there; Ray Data would gather 128 MB of them first.
        # More than a row of it does not split, and a row is a batch.
        context.target_max_block_size = 1
        # Learners may pause for as long as they like.
        context.execution_no_progress_timeout_s = -1
        exchange = ray.get_runtime_context().current_actor
        spec = plan.spec
        tables: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow"}
        return (
            ray.data.from_arrow([_block(0, b"")])
            .map_batches(
                cast(Any, count_batches),
                num_cpus=_STAGE_CPUS,
                compute=TaskPoolStrategy(size=1),
                fn_kwargs={"exchange": exchange},
                **tables,
            )
            .map_batches(
                cast(Any, read_batch),
                num_cpus=_STAGE_CPUS,
                compute=TaskPoolStrategy(size=min(_READERS, plan.pool.max_size)),
                # One byte: a demand of its own keeps Ray Data from joining the readers with the
                # stage before them or behind them.
                memory=1,
                fn_kwargs={"spec": spec, "sides": plan.read_sides, "first": self.first},
                **tables,
            )
            .map_batches(
                cast(Any, DrawActor),
                num_cpus=plan.cpus,
                num_gpus=plan.gpus,
                compute=plan.pool,
                fn_constructor_kwargs={
                    "spec": spec,
                    "exchange": exchange,
                    "references": plan.references,
                },
                **plan.placement,
                **tables,
            )
        )


def _alive() -> set[str]:
    return {node["NodeID"] for node in cast(Any, ray).nodes() if node["Alive"]}


# --------------------------------------------------------------------------- errors


def cause(error: BaseException) -> str:
    """What an error out of Ray is about, in one line."""
    if not isinstance(error, RayError):
        return one_line(error)
    # Its text has the tracebacks of the processes it came through, the first cause first, each
    # with what it is about at its end.
    first, _, _ = str(error).partition("\n\nThe above exception was the direct cause")
    return " ".join(first.strip().splitlines()[-1:])[:300]


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
