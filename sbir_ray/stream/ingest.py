"""Photos from anywhere into a photo store, each accounted for.

The driver lists what is to be read as a file (:mod:`~sbir_ray.stream.photo_plan`). Tasks of Ray
Data read, decode, hash and re-encode it block by block into staged files
(:mod:`~sbir_ray.stream.staging`); from their accounts the driver finds the duplicates
(:mod:`~sbir_ray.stream.duplicates`), and more tasks copy what is left into shards of even size
(:mod:`~sbir_ray.stream.photo_shards`). No picture passes through the driver, and nothing that
grows with the number of photos is kept in memory.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import itertools
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.errors import UserError
from sbir_ray.places import is_local, place, read_table, remove_tree
from sbir_ray.runlog import Ledger, Progress, building, versions, write_json_atomic
from sbir_ray.stream.cluster import run_tasks
from sbir_ray.stream.disk import disk_told
from sbir_ray.stream.duplicates import NEAR, RECORD, SAME, Fates, find_duplicates
from sbir_ray.stream.fetch import is_web, open_place
from sbir_ray.stream.forbidden import forbid
from sbir_ray.stream.photo_ledger import (
    AGAIN,
    LEDGER_SCHEMA,
    Summary,
    read_ledger,
    replaced,
    write_ledger,
)
from sbir_ray.stream.photo_plan import Plan, write_plan
from sbir_ray.stream.photo_shards import write_shards
from sbir_ray.stream.photo_sources import list_units
from sbir_ray.stream.staging import ACCOUNT, BAD, Pace, Staging, stage_blocks
from sbir_ray.stream.tables import join_tables
from sbir_ray.stream.units import MakeRow, Unit
from sbir_ray.strict import SCHEMA_VERSION, from_dict, to_dict

_WAVE = 4096
_BATCH = 65_536


@dataclass(frozen=True)
class Task:
    """What is asked for."""

    out: Path
    config: IngestConfig
    sources: list[str]
    exclude: list[Path]
    must: list[Path]
    add_to: Path | None
    """The store as it is, if it is added to or its failures are tried again."""
    retry: bool
    make_row: MakeRow
    progress: Callable[[str], Progress]


def ingest(
    sources: Sequence[str | Path],
    out: Path,
    config: IngestConfig | None = None,
    *,
    exclude: Sequence[Path] = (),
    add: bool = False,
    retry_failed: bool = False,
    make_row: MakeRow = photos.make_row,
    progress: Callable[[str], Progress] = Progress,
) -> Ledger:
    """Make a photo store of the photos in ``sources``, or add to one. Needs a Ray that is up.

    A row that cannot be used is accounted for by status and reason and changes nothing for others.
    What is kept of photos with equal bytes, or hashes within ``config.near`` bits, does not depend
    on the order in which they are found (:mod:`~sbir_ray.stream.duplicates`). After a kill the
    same call goes on where it was.

    Args:
        sources: as :func:`~sbir_ray.stream.photo_sources.list_units` takes them.
        out: PHOTOS folder on storage that all nodes share; appears, or changes, when all is done.
        exclude: PAIRS folders whose validation and test photos may not be stored, and PHOTOS
            folders none of whose photos may. Those PAIRS among the sources are always excluded,
            and so is what was excluded before when a store is added to.
        add: ``out`` is a store; what it has not read yet is added, with its own settings.
        retry_failed: ``out`` is a store; its photos that failed or were quarantined are read again.
        make_row: decodes and re-encodes a file; a parameter for tests.
        progress: makes a progress line from a title.

    Returns:
        The account of all photos of the store, which ``store.json`` has too.

    Raises:
        UserError: a source that is not there or has no photos, an exclusion without effect, more
            than ``config.max_reject_rate`` of the photos rejected or failed, none left to store,
            no space left, or another run at work on the store.
    """
    if (add or retry_failed) and not is_local(out):
        raise UserError(
            f"{out}: in an object store a photo store cannot change at once, so nothing is added "
            "to it; make a new one of it and the new photos"
        )
    texts = [_absolute(source) for source in sources]
    places = [open_place(text) for text in texts if not is_web(text)]
    own = [path for path in places if (path / "pairs.json").is_file()]
    must = [place(_absolute(path)) for path in exclude]
    kept_out = list(dict.fromkeys([*must, *own]))
    settings = config or IngestConfig()
    make = functools.partial(
        Task, sources=texts, retry=retry_failed, make_row=make_row, progress=progress, must=must
    )
    with disk_told(out):
        if not (add or retry_failed):
            task = make(out=out, config=settings, exclude=kept_out, add_to=None)
            with building(out, _request(task)) as folder:
                return _run(task, folder)
        return _change(out, settings, config, kept_out, make)


def _change(
    out: Path,
    settings: IngestConfig,
    config: IngestConfig | None,
    exclude: list[Path],
    make: Callable[..., Task],
) -> Ledger:
    """Make the next state of a store beside it, and put it in its place."""
    old, after = out.with_name(f"{out.name}.old"), out.with_name(f"{out.name}.next")
    with _one_at_a_time(out):
        # A kill between the renames below.
        if not out.exists() and old.exists():
            (after if after.exists() else old).rename(out)
        shutil.rmtree(old, ignore_errors=True)
        header = photos.store_header(out)
        if "runs" not in header:
            raise UserError(f"{out}: made by another command or version; make a new store")
        shutil.rmtree(after, ignore_errors=True)
        had = from_dict(IngestConfig, header["settings"]["ingest"])
        if config is not None and settings not in (had, IngestConfig()):
            raise UserError(
                f"{out}: was made with other settings than these; leave them out: what is added "
                "is stored as the rest is"
            )
        before = [place(path) for path in header["settings"]["exclude"]]
        exclude = list(dict.fromkeys([*before, *exclude]))
        task = make(out=out, config=had, exclude=exclude, add_to=out)
        with building(after, _request(task)) as folder:
            ledger = _run(task, folder)
        out.rename(old)
        after.rename(out)
        shutil.rmtree(old, ignore_errors=True)
        return ledger


def _request(task: Task) -> dict[str, Any]:
    """Everything that the content depends on, so that only the same call goes on."""
    store = task.add_to and hashlib.sha256((task.add_to / "store.json").read_bytes()).hexdigest()
    settings = to_dict(task.config)
    settings.pop("web")
    settings.pop("max_reject_rate")
    return {
        "settings": settings,
        "sources": task.sources,
        "exclude": [str(path) for path in task.exclude],
        "store": store,
        "retry": task.retry,
    }


def _run(task: Task, folder: Path) -> Ledger:
    """All passes. What they need is in ``folder/work``, of which a killed run has left some."""
    work = folder / "work"
    if not (folder / "store.json").exists():
        began = time.monotonic()
        forbid(task.exclude, work / "exclude", must=task.must)
        with _scratch(work) as scratch:
            plan = _plan(task, work / "plan.parquet", scratch)
            staging = Staging(
                str(work), task.config, uuid.uuid4().hex, task.make_row, _pace(task.config, plan)
            )
            with task.progress("ingest") as bar:
                bar.update(0, plan.total)
                _stage(task, plan, staging, bar)
            seconds = time.monotonic() - began
            fates = _decide(task, plan, staging, scratch)
            summary = _write_accounts(task, plan, staging, fates, folder)
            _write_shards(task, plan, staging, fates, folder)
            _write_header(task, folder, summary, plan, seconds)
    remove_tree(work)
    header = photos.store_header(folder)
    return Ledger.from_json("photos", header["ledger"], str(task.out))


# --------------------------------------------------------------------------- what is read


def _plan(task: Task, file: Path, scratch: Path) -> Plan:
    """The plan of this run; that of a killed run stays, whatever the sources have got since."""
    if file.exists():
        return Plan.load(file)
    if task.retry:
        assert task.add_to is not None
        return write_plan(_failed_units(task.add_to), file, scratch)
    known = Plan.load(task.add_to / "plan.parquet").units() if task.add_to else iter(())
    return write_plan(list_units(task.sources), file, scratch, known)


def _failed_units(store: Path) -> Iterator[Unit]:
    """The photos of a store that may be there now, one by one."""
    states = (
        status
        for table in read_ledger(store / "ledger.parquet")
        for status in table["status"].to_pylist()
    )
    for unit in Plan.load(store / "plan.parquet").units():
        for number in range(unit.rows):
            if next(states) in AGAIN:
                yield unit.only(number)


def _pace(config: IngestConfig, plan: Plan) -> Any:
    if not plan.web or not config.web.per_host:
        return None
    return ray.remote(Pace).options(num_cpus=0).remote(config.web.per_host)


def _stage(task: Task, plan: Plan, staging: Staging, bar: Progress) -> None:
    """The first pass; refuses when too much cannot be used."""
    bad: Counter[str] = Counter()
    done, first = 0, ""
    for start in range(0, plan.blocks, _WAVE):
        wave = range(start, min(start + _WAVE, plan.blocks))
        tables = [pa.table({"block": [block]}) for block in wave]
        for table in run_tasks(tables, stage_blocks, staging=staging):
            for row in table.to_pylist():
                done += row["photos"]
                if row["status"] in BAD:
                    bad[row["reason"]] += row["photos"]
                    first = first or f"{row['uri']}: {row['detail']}"
            bar.update(done, note=f"{bad.total()} rejected" if bad else "")
            if bad.total() > task.config.max_reject_rate * plan.total:
                counts = ", ".join(f"{reason} {n}" for reason, n in bad.most_common())
                raise UserError(
                    f"{task.out}: {bad.total()} of {plan.total} photos cannot be used ({counts}), "
                    f"more than max_reject_rate={task.config.max_reject_rate:g} allows; the first "
                    f"is {first}; allow more to go on, or remove {Path(staging.folder).parent} to "
                    "read them again"
                )
    assert done == plan.total, (done, plan.total)


def _staged(plan: Plan, staging: Staging, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, some columns) of each block, in order."""
    row = 0
    for block in range(plan.blocks):
        table = read_table(staging.staged(block), columns=columns)
        yield row, table
        row += table.num_rows


# --------------------------------------------------------------------------- what is kept


def _decide(task: Task, plan: Plan, staging: Staging, scratch: Path) -> Fates:
    stored = 0
    if task.add_to:
        stored = sum(pq.read_metadata(f).num_rows for f in photos.shards(task.add_to))
    records = itertools.chain(
        _stored_records(task.add_to) if task.add_to else (), _new_records(plan, staging)
    )
    near = task.config.near
    return find_duplicates(_gathered(records), plan.total, near, scratch / "duplicates", stored)


def _new_records(plan: Plan, staging: Staging) -> Iterator[NDArray[Any]]:
    for row, table in _staged(plan, staging, ["uri", "photo_id", "phash", "status"]):
        fit = np.flatnonzero(_texts(table["status"]) == "stored")
        yield _records(table.take(fit), row + fit)


def _stored_records(store: Path) -> Iterator[NDArray[Any]]:
    row = -1
    for shard in photos.shards(store):
        table = pq.read_table(shard, columns=["uri", "photo_id", "phash"])
        yield _records(table, row - np.arange(table.num_rows))
        row -= table.num_rows


def _records(table: pa.Table, rows: NDArray[np.int64]) -> NDArray[Any]:
    records = np.zeros(table.num_rows, RECORD)
    records["id"] = [_key(text) for text in table["photo_id"].to_pylist()]
    records["uri"] = [
        hashlib.blake2b(text.encode(), digest_size=16).digest() for text in table["uri"].to_pylist()
    ]
    records["phash"], records["row"] = table["phash"].to_numpy(), rows
    return records


def _key(photo_id: str) -> bytes:
    """A sha256 as it is; stores that others wrote may have ids of another kind."""
    if len(photo_id) == 64 and set(photo_id) <= set("0123456789abcdef"):
        return bytes.fromhex(photo_id)
    return hashlib.sha256(photo_id.encode()).digest()


def _gathered(records: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """The same in larger arrays."""
    waiting: list[NDArray[Any]] = []
    for chunk in records:
        waiting.append(chunk)
        if sum(map(len, waiting)) >= _BATCH:
            yield np.concatenate(waiting)
            waiting = []
    yield np.concatenate([np.zeros(0, RECORD), *waiting])


def _accounts(plan: Plan, staging: Staging, fates: Fates) -> Iterator[pa.Table]:
    """The ledger of this run, in order."""
    reasons = {SAME: "same-file", NEAR: "near"}
    columns = [name for name in ACCOUNT if name != "phash"]
    for start, table in _staged(plan, staging, columns):
        rows = start + np.arange(table.num_rows)
        fate = np.asarray(fates.fate[rows])
        again = np.flatnonzero(fate)
        values = {name: table[name].to_pylist() for name in columns}
        of = [""] * table.num_rows
        for number, photo in zip(again.tolist(), fates.of(rows[again]), strict=True):
            values["status"][number] = "duplicate"
            values["reason"][number] = reasons[int(fate[number])]
            of[number] = photo
        yield pa.table({**values, "of": of}, schema=LEDGER_SCHEMA)


def _write_accounts(
    task: Task, plan: Plan, staging: Staging, fates: Fates, folder: Path
) -> Summary:
    """``ledger.parquet``, and ``plan.parquet``, which says of each of its rows what was read."""
    accounts = _accounts(plan, staging, fates)
    plans, before = [plan.file], 0
    old: Iterator[pa.Table] = iter(())
    if task.add_to:
        old = read_ledger(task.add_to / "ledger.parquet")
        before = pq.read_metadata(task.add_to / "ledger.parquet").num_rows
        plans.insert(0, task.add_to / "plan.parquet")
    if task.retry:
        summary = write_ledger(replaced(old, accounts), folder / "ledger.parquet")
        plans.pop()
    else:
        summary = write_ledger(itertools.chain(old, accounts), folder / "ledger.parquet")
    total = before if task.retry else before + plan.total
    assert summary.ledger.total == total, (summary.ledger, total)
    if not summary.ledger.count("stored"):
        raise UserError(
            f"{task.out}: no photo is left to store ({summary.ledger}); see the sources"
        )
    join_tables(plans, folder / "plan.parquet")
    return summary


def _write_shards(task: Task, plan: Plan, staging: Staging, fates: Fates, folder: Path) -> None:
    """The second pass; the shards of the store that is added to stay as they are."""
    # Those of a run that ended here may have been of another division.
    remove_tree(folder / "shards")
    (folder / "shards").mkdir()
    before: list[pa.Table] = []
    if task.add_to:
        for shard in photos.shards(task.add_to):
            _link(shard, folder / "shards" / shard.name)
        before = [pq.read_table(task.add_to / "shards.parquet")]
    count = sum(len(found) for _, found in _stored(plan, staging, fates))
    places = (
        (block, row) for block, found in _stored(plan, staging, fates) for row in found.tolist()
    )
    with task.progress("write photos") as bar:
        write_shards(places, count, staging, folder, before, bar)


def _stored(plan: Plan, staging: Staging, fates: Fates) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(block, rows of it that are stored), in order."""
    for block, (start, table) in enumerate(_staged(plan, staging, ["status"])):
        fit = _texts(table["status"]) == "stored"
        yield block, np.flatnonzero(fit & (fates.fate[start : start + len(fit)] == 0))


# --------------------------------------------------------------------------- the store


def _write_header(task: Task, folder: Path, summary: Summary, plan: Plan, seconds: float) -> None:
    runs: list[dict[str, Any]] = []
    if task.add_to:
        runs = photos.store_header(task.add_to)["runs"]
    shards = read_table(folder / "shards.parquet", columns=["photos", "bytes"])
    run = {
        "sources": task.sources,
        "retry_failed": task.retry,
        "read": plan.total,
        "seconds": round(seconds, 3),
        "photos_per_second": round(plan.total / seconds, 2),
        "versions": versions(),
    }
    header = {
        "schema_version": SCHEMA_VERSION,
        "kind": "photos",
        "settings": {
            "ingest": to_dict(task.config),
            "exclude": [str(path) for path in task.exclude],
        },
        "ledger": summary.ledger.to_json(),
        "reasons": summary.reasons(),
        "shards": {
            "files": shards.num_rows,
            "photos": sum(shards["photos"].to_pylist()),
            "bytes": sum(shards["bytes"].to_pylist()),
        },
        "runs": [*runs, run],
        "versions": versions(),
    }
    write_json_atomic(folder / "store.json", header)


# --------------------------------------------------------------------------- helpers


@contextmanager
def _one_at_a_time(out: Path) -> Iterator[None]:
    """Refuse a second run on ``out``; a run that was killed holds nothing."""
    lock = out.with_name(f".{out.name}.lock")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is writing it; wait for it or stop it") from error
        yield
        lock.unlink()


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    """An empty folder of this machine, beside the rest where that is on it."""
    if not is_local(work):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    scratch = work / "scratch"
    remove_tree(scratch)
    scratch.mkdir(parents=True)
    yield scratch


def _absolute(source: str | Path) -> str:
    return str(source) if "://" in str(source) else os.path.abspath(source)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the storage has no such links
        shutil.copy2(source, target)


def _texts(column: pa.ChunkedArray) -> NDArray[np.str_]:
    return np.array(column.to_pylist(), np.str_)
