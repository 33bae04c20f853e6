"""Photos from anywhere into a photo store, each accounted for.

Two passes of Ray Data tasks. The first reads, decodes, hashes and re-encodes every photo and looks
for photos that may not train; it writes the pictures to staged files and hands back only their
accounts (name, hashes, status). From these the driver decides which photos are duplicates, and the
second pass copies the others into shards of even size. No picture passes through the driver.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sbir_ray.config import IngestConfig
from sbir_ray.data.photos import PHOTO_SCHEMA, PhotoError, PhotoLimits
from sbir_ray.errors import UserError
from sbir_ray.places import place, read_table, remove_tree, write_table
from sbir_ray.runlog import Ledger, Progress, building, versions, write_json_atomic
from sbir_ray.stream.attempts import KILLED, LIMIT, Attempts
from sbir_ray.stream.cluster import run_tasks
from sbir_ray.stream.duplicates import Forbidden, decide
from sbir_ray.stream.photo_sources import Load, Unit, list_units
from sbir_ray.strict import SCHEMA_VERSION, to_dict

LEDGER_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("uri", "photo_id", "status", "reason", "detail")]
)
"""A row of ``ledger.parquet``: one for each photo read, in the order of the sources."""

_SHARD_ROWS = 512
_ROW_GROUP = 64
_TASKS = 64
_TASK_ROWS = (64, 512)
_STAGED_SCHEMA = PHOTO_SCHEMA.append(pa.field("detail", pa.string()))
_ACCOUNT = ["uri", "photo_id", "phash", "status", "reason", "detail"]
_BAD = ("rejected", "failed")


def ingest(
    sources: Sequence[str | Path],
    out: Path,
    config: IngestConfig | None = None,
    *,
    exclude: Sequence[Path] = (),
    progress: Callable[[str], Progress] = Progress,
) -> Ledger:
    """Make a photo store of the photos in ``sources``. Needs a Ray that is up.

    A row that cannot be used is accounted for by status and reason and changes nothing for others.
    Of photos with equal bytes, or hashes within ``config.near`` bits, the one with the smallest
    photo_id (then uri) is kept, in whatever order they are found. After a kill the same call goes
    on where it was.

    Args:
        sources: folders (searched for photos and Parquet files), files, globs, PAIRS and PHOTOS
            folders, Parquet files with a column of image bytes.
        out: PHOTOS folder to write; appears when it is whole.
        exclude: PAIRS folders whose validation and test photos may not be stored. Those among the
            sources are always excluded.
        progress: makes a progress line from a title.

    Returns:
        The account of all photos, which ``store.json`` has too.

    Raises:
        UserError: a source that is not there or has no photos, an exclusion without effect, more
            than ``config.max_reject_rate`` of the photos rejected or failed, none left to store.
    """
    config = config or IngestConfig()
    units = list_units(sources)
    own = [place(s) for s in sources if (place(s) / "pairs.json").is_file()]
    kept_out = list(dict.fromkeys([*exclude, *own]))
    forbidden = Forbidden.of(kept_out, must=exclude)
    blocks = _blocks(units)
    total = sum(unit.rows for unit in units)
    request = {
        "longest": config.longest,
        "sources": _digest(repr(units)),
        "exclude": _digest("".join(sorted(p.photo_id for p in forbidden.prints))),
    }
    with building(out, request) as folder:
        with progress("ingest") as bar:
            bar.update(0, total)
            accounts = _stage(blocks, folder, config, forbidden, total, bar, out)
        fates = decide(accounts, config.near)
        ledger = Ledger("photos", total)
        for row in fates.select(["status", "reason"]).to_pylist():
            ledger.add(row["status"], row["reason"] if row["status"] in _BAD else "")
        ledger.check()
        if not ledger.count("stored"):
            raise UserError(f"{out}: no photo is left to store ({ledger}); see the sources")
        with progress("write photos") as bar:
            _write_shards(fates, folder, bar)
        write_table(fates.select(LEDGER_SCHEMA.names), folder / "ledger.parquet")
        settings = {
            **to_dict(config),
            "sources": [str(source) for source in sources],
            "exclude": [str(path) for path in kept_out],
        }
        header = {
            "schema_version": SCHEMA_VERSION,
            "kind": "photos",
            "settings": settings,
            "ledger": ledger.to_json(),
            "versions": versions(),
        }
        for name in ("staged", "attempts"):
            remove_tree(folder / name)
        write_json_atomic(folder / "store.json", header)
    return ledger


# --------------------------------------------------------------------------- first pass


def _blocks(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units in groups, one for a task; the same whatever the cluster, so that a rerun fits."""
    total = sum(unit.rows for unit in units)
    size = min(max(total // _TASKS, _TASK_ROWS[0]), _TASK_ROWS[1])
    blocks: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        if filled >= size:
            blocks.append([])
            filled = 0
        blocks[-1].append(unit)
        filled += unit.rows
    return blocks


def _stage(
    blocks: Sequence[Sequence[Unit]],
    folder: Path,
    config: IngestConfig,
    forbidden: Forbidden,
    total: int,
    bar: Progress,
    out: Path,
) -> pa.Table:
    """Read all blocks; the accounts of their photos, with ``block`` and ``row``, in order."""
    (folder / "staged").mkdir(exist_ok=True)
    # File names need not be valid text, which Arrow asks for; JSON escapes them.
    plan = [
        pa.table({"block": [number], "units": [json.dumps([dataclasses.asdict(u) for u in block])]})
        for number, block in enumerate(blocks)
    ]
    tables = []
    bad: Counter[str] = Counter()
    done, first = 0, ""
    for table in run_tasks(
        plan, stage_blocks, folder=str(folder), config=config, forbidden=forbidden
    ):
        tables.append(table)
        done += table.num_rows
        for row in table.select(["uri", "status", "reason", "detail"]).to_pylist():
            if row["status"] in _BAD:
                bad[row["reason"]] += 1
                first = first or f"{row['uri']}: {row['detail']}"
        bar.update(done, note=f"{bad.total()} rejected" if bad else "")
        if bad.total() > config.max_reject_rate * total:
            counts = ", ".join(f"{reason} {n}" for reason, n in bad.most_common())
            raise UserError(
                f"{out}: {bad.total()} of {total} photos cannot be used ({counts}), more than "
                f"max_reject_rate={config.max_reject_rate:g} allows; the first is {first}"
            )
    accounts = pa.concat_tables(tables).sort_by([("block", "ascending"), ("row", "ascending")])
    assert accounts.num_rows == total, (accounts.num_rows, total)
    return accounts


def stage_blocks(
    plan: pa.Table, folder: str, config: IngestConfig, forbidden: Forbidden
) -> pa.Table:
    """The task of the first pass: each block of ``plan`` to a staged file; returns the accounts."""
    tables = []
    for entry in plan.to_pylist():
        number: int = entry["block"]
        file = _staged(place(folder), number)
        if not _is_staged(file):
            units = [Unit(**values) for values in json.loads(entry["units"])]
            attempts = Attempts(place(folder) / "attempts" / f"{number:06d}")
            rows = list(_photo_rows(units, config, forbidden, attempts))
            attempts.close()
            _write(pa.Table.from_pylist(rows, schema=_STAGED_SCHEMA), file)
        account = read_table(file, columns=_ACCOUNT)
        count = account.num_rows
        account = account.append_column("block", pa.array(np.full(count, number, np.int64)))
        tables.append(account.append_column("row", pa.array(np.arange(count))))
    return pa.concat_tables(tables)


def _photo_rows(
    units: Sequence[Unit], config: IngestConfig, forbidden: Forbidden, attempts: Attempts
) -> Iterator[dict[str, Any]]:
    limits = PhotoLimits(longest=config.longest)
    row = 0
    for unit in units:
        for uri, name, load in unit.loaders(limits):
            key = str(row)
            row += 1
            if attempts.deaths(key) >= LIMIT:
                text = f"{attempts.deaths(key)} processes ended while they worked on it"
                yield _unusable(uri, name, "failed", KILLED, text)
                continue
            with attempts.working_on(key):
                yield _photo_row(uri, name, load, forbidden)


def _photo_row(uri: str, name: str, load: Load, forbidden: Forbidden) -> dict[str, Any]:
    try:
        found = load()
        leak = forbidden.leak_of(found)
    except PhotoError as error:
        status = "failed" if error.reason == "unreadable" else "rejected"
        return _unusable(uri, name, status, error.reason, error.text)
    except Exception as error:  # any fault costs its own row alone, and is told
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _unusable(uri, name, "failed", f"error-{type(error).__name__}", text)
    if leak is None:
        return {**found, "status": "stored", "reason": "", "detail": ""}
    reason, text = leak
    return {**found, "image": None, "status": "leaked", "reason": reason, "detail": text}


def _unusable(uri: str, name: str, status: str, reason: str, text: str) -> dict[str, Any]:
    values = {"photo_id": "", "name": name, "uri": uri, "phash": 0}
    fate = {"status": status, "reason": reason, "detail": text}
    return dict.fromkeys(_STAGED_SCHEMA.names) | values | fate


# --------------------------------------------------------------------------- second pass


def _write_shards(fates: pa.Table, folder: Path, bar: Progress) -> None:
    """Copy the photos that are stored from the staged files to shards of even size, in order."""
    # Those of a run that ended here may have been of another division.
    remove_tree(folder / "shards")
    (folder / "shards").mkdir()
    columns = fates.select(["block", "row", "status"]).to_pydict()
    rows = [
        (block, row)
        for block, row, status in zip(*columns.values(), strict=True)
        if status == "stored"
    ]
    shards = math.ceil(len(rows) / _SHARD_ROWS)
    edges = [len(rows) * i // shards for i in range(shards + 1)]
    plan = [
        pa.table(
            {
                "shard": [shard],
                "blocks": [[block for block, _ in rows[edges[shard] : edges[shard + 1]]]],
                "rows": [[row for _, row in rows[edges[shard] : edges[shard + 1]]]],
            }
        )
        for shard in range(shards)
    ]
    for table in run_tasks(plan, write_shards, folder=str(folder)):
        bar.update(bar.done + sum(table["photos"].to_pylist()), len(rows))
    assert bar.done == len(rows), (bar.done, len(rows))


def write_shards(plan: pa.Table, folder: str) -> pa.Table:
    """The task of the second pass; returns how many photos each shard got."""
    counts = []
    for entry in plan.to_pylist():
        wanted: dict[int, list[int]] = defaultdict(list)
        for block, row in zip(entry["blocks"], entry["rows"], strict=True):
            wanted[block].append(row)
        parts = [
            read_table(_staged(place(folder), block), columns=PHOTO_SCHEMA.names).take(rows)
            for block, rows in wanted.items()
        ]
        shard = pa.concat_tables(parts)
        _write(shard, place(folder) / "shards" / f"part-{entry['shard']:05d}.parquet")
        counts.append(shard.num_rows)
    return pa.table({"photos": counts})


# --------------------------------------------------------------------------- helpers


def _is_staged(file: Path) -> bool:
    """Whether a run before this one has done the block; what it could not read may be there now."""
    if not file.exists():
        return False
    fates = read_table(file, columns=["status", "reason"]).to_pylist()
    return not any(f["status"] == "failed" and f["reason"] != KILLED for f in fates)


def _staged(folder: Path, block: int) -> Path:
    return folder / "staged" / f"part-{block:06d}.parquet"


def _write(table: pa.Table, file: Path) -> None:
    # JPEG files do not get smaller, and no two of them are equal.
    write_table(table, file, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
