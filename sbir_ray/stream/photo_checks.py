"""Looking into a photo store: what is in it, what was said of it, and whether it is whole."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sbir_ray.data import photos
from sbir_ray.data.photos import PhotoRow
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.runlog import Ledger
from sbir_ray.stream.photo_ledger import Summary, read_ledger

_SIDES = (64, 128, 256, 512, 1024)


def accounts(store: Path, status: str = "", reason: str = "") -> Iterator[dict[str, str]]:
    """The ledger's rows, or those of a status and a reason, in order.

    Raises:
        UserError: not a photo store that was ingested. DamagedError: a file is missing.
    """
    _header(store)
    for table in read_ledger(store / "ledger.parquet"):
        for column, wanted in (("status", status), ("reason", reason)):
            if wanted:
                table = table.filter(pc.equal(table[column], wanted))
        yield from table.to_pylist()


def find_photos(store: Path, wanted: Sequence[str], count: int) -> list[PhotoRow]:
    """Photos by the beginning of their photo_id, by name or by uri; without any, ``count`` of
    them that are spread over the store in a fixed way.

    Raises:
        UserError: one that is not stored.
    """
    if not wanted:
        digest = hashlib.sha256
        return heapq.nsmallest(
            count,
            photos.read_store(store),
            key=lambda row: digest(row["photo_id"].encode()).hexdigest(),
        )
    found: dict[str, PhotoRow] = {}
    for row in photos.read_store(store):
        for text in wanted:
            if row["photo_id"].startswith(text) or text in (row["name"], row["uri"]):
                found.setdefault(text, row)
    for text in wanted:
        if text not in found:
            raise UserError(f"{store}: no photo {text}; `sbir-ray photos ls` lists them")
    return [found[text] for text in wanted]


def stats(store: Path) -> dict[str, Any]:
    """The header's account, and sizes counted from the shards' statistics.

    Raises:
        UserError: not a photo store that was ingested. DamagedError: a file is missing.
    """
    header = _header(store)
    sides: dict[str, int] = {}
    for shard in photos.shards(store):
        table = pq.read_table(shard, columns=["width", "height"])
        longest = pc.max_element_wise(table["width"], table["height"])
        low = 0
        for high in (*_SIDES, 1 << 31):
            mask = pc.and_(pc.greater(longest, low), pc.less_equal(longest, high))
            name = f"{low + 1}-{high}" if high in _SIDES else f"over {low}"
            sides[name] = sides.get(name, 0) + pc.sum(mask).as_py()
            low = high
    shards = pq.read_table(store / "shards.parquet")
    count = max(1, sum(shards["photos"].to_pylist()))
    return {
        "ledger": header["ledger"],
        "reasons": header["reasons"],
        "shards": header["shards"],
        "bytes_per_photo": round(sum(shards["image_bytes"].to_pylist()) / count),
        "longest_side": {name: number for name, number in sides.items() if number},
        "runs": header["runs"],
    }


def verify(store: Path) -> dict[str, Any]:
    """Compare all of a store with what was written down of it, and look for contradictions.

    Returns:
        Counts of files and photos, and ``problems``, a line each.

    Raises:
        UserError: not a photo store that was ingested. DamagedError: a file is missing or no table.
    """
    header = _header(store)
    problems: list[str] = []
    try:
        said = pq.read_table(store / "shards.parquet").to_pylist()
        ledger, kept = _count(store)
        plan = pq.read_table(store / "plan.parquet", columns=["photos"])["photos"]
        files = {path.name: path for path in photos.shards(store)}
        seen: set[bytes] = set()
        for row in said:
            problems += _check_shard(store, row, files.pop(row["file"], None), seen)
    except (OSError, pa.ArrowException, KeyError) as error:
        line = " ".join(str(error).split())[:200]
        raise DamagedError(f"{store}: cannot be checked ({line}); make it anew") from error
    problems += [f"shards/{name}: belongs to no run" for name in files]
    if ledger != Ledger.from_json("photos", header["ledger"], str(store / "store.json")):
        problems.append(f"ledger.parquet: says {ledger}, and store.json something else")
    if (pc.sum(plan).as_py() or 0) != ledger.total:
        problems.append("plan.parquet: has not as many photos as ledger.parquet")
    if kept != seen:
        problems.append(
            f"ledger.parquet: {len(kept - seen)} photos that it calls stored are not, "
            f"{len(seen - kept)} others are"
        )
    return {"shards": len(said), "photos": len(seen), "problems": problems}


def _header(store: Path) -> dict[str, Any]:
    header = photos.store_header(store)
    if source := header["settings"].get("part_of"):
        raise UserError(f"{store}: photos that a study chose out of {source}; look into that one")
    for name in ("ledger.parquet", "shards.parquet"):
        if not (store / name).exists():
            raise DamagedError(f"{store / name}: is missing; make the store anew")
    return header


def _count(store: Path) -> tuple[Ledger, set[bytes]]:
    """What the ledger's rows add up to, and the ids of those that are stored."""
    summary, kept = Summary(), set[bytes]()
    for table in read_ledger(store / "ledger.parquet"):
        summary.add(table)
        stored = table.filter(pc.equal(table["status"], "stored"))
        kept |= {bytes.fromhex(photo) for photo in stored["photo_id"].to_pylist()}
    return summary.ledger, kept


def _check_shard(
    store: Path, said: dict[str, Any], file: Path | None, seen: set[bytes]
) -> Iterator[str]:
    name = f"shards/{said['file']}"
    if file is None:
        yield f"{name}: is missing"
        return
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != said["sha256"]:
            yield f"{name}: was changed since it was written"
            return
    table = pq.read_table(file, columns=["photo_id"])
    if table.num_rows != said["photos"]:
        yield f"{name}: has {table.num_rows} photos, not {said['photos']}"
    for photo in table["photo_id"].to_pylist():
        digest = bytes.fromhex(photo)
        if digest in seen:
            yield f"{name}: {photo} is stored twice"
        seen.add(digest)
