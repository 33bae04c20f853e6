"""``sbir-ray photos``: look into a photo store."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import click

from sbir_ray.cli_options import FOLDER, show, with_json
from sbir_ray.errors import DamagedError

STORE = click.argument("store", metavar="PHOTOS", type=FOLDER)


@click.group()
def photos() -> None:
    """Photo stores: list, look at, count and check what `sbir-ray ingest` made."""


@photos.command("ls")
@STORE
@click.option("--status", help="Only photos in this state: stored, duplicate, leaked, ...")
@click.option("--reason", help="Only photos that are in it for this reason.")
@click.option("--limit", type=click.IntRange(0), default=0, help="At most so many; 0: all.")
@with_json
def list_photos(
    store: Path, status: str | None, reason: str | None, limit: int, as_json: bool
) -> None:
    """List what was read, a line each: state, reason, where from, and why.

    With --json, a JSON object a line, of each row of the ledger.

    Example: sbir-ray photos ls photos --status rejected --limit 20
    """
    from sbir_ray.stream.photo_checks import accounts

    for row in islice(accounts(store, status or "", reason or ""), limit or None):
        if as_json:
            click.echo(json.dumps(row))
        else:
            why = row["detail"] or (f"of {row['of']}" if row["of"] else row["photo_id"])
            click.echo("\t".join([row["status"], row["reason"] or "-", row["uri"], why]))


@photos.command("show")
@STORE
@click.argument("wanted", metavar="[PHOTO]...", nargs=-1)
@click.option(
    "--count", type=click.IntRange(1), default=48, show_default=True, help="Without PHOTO."
)
@click.option("--out", type=click.Path(path_type=Path), default="sheet.png", show_default=True)
@with_json
def show_photos(store: Path, wanted: tuple[str, ...], count: int, out: Path, as_json: bool) -> None:
    """Write photos to one PNG, a contact sheet, and say what they are.

    PHOTO: the beginning of a photo_id, a name or a uri; without one, some of the whole store.

    Example: sbir-ray photos show photos --count 24 --out sheet.png
    """
    from sbir_ray.data.contact_sheet import contact_sheet
    from sbir_ray.places import write_bytes
    from sbir_ray.stream.photo_checks import find_photos

    rows = find_photos(store, wanted, count)
    write_bytes(out, contact_sheet(rows))
    names = ("photo_id", "name", "uri", "width", "height")
    found: list[dict[str, Any]] = [{name: dict(row)[name] for name in names} for row in rows]
    lines = [f"{r['photo_id'][:16]}  {r['width']} x {r['height']}  {r['uri']}" for r in found]
    show({"sheet": str(out), "photos": found}, as_json, "\n".join([*lines, f"{out}: written"]))


@photos.command("stats")
@STORE
@with_json
def show_stats(store: Path, as_json: bool) -> None:
    """Count a store: states, top reasons with examples, sizes, and the rate of each run.

    Example: sbir-ray photos stats photos
    """
    from sbir_ray.runlog import Ledger
    from sbir_ray.stream.photo_checks import stats

    found = stats(store)
    shards = found["shards"]
    lines = [
        str(Ledger.from_json("photos", found["ledger"], str(store / "store.json"))),
        f"{shards['files']:,} shards, {shards['bytes']:,} bytes; a photo has "
        f"{found['bytes_per_photo']:,}",
        "longest side: " + ", ".join(f"{name}: {n:,}" for name, n in found["longest_side"].items()),
    ]
    for row in found["reasons"]:
        lines.append(f"{row['status']} {row['reason']}: {row['photos']:,}")
        lines += [f"    {e['uri']}  {e['detail']}" for e in row["examples"]]
    for number, run in enumerate(found["runs"]):
        what = "failed ones again" if run["retry_failed"] else ", ".join(run["sources"])
        lines.append(
            f"run {number}: {run['read']:,} read in {run['seconds']:.1f} s, "
            f"{run['photos_per_second']:.1f}/s: {what}"
        )
    show(found, as_json, "\n".join(lines))


@photos.command("verify")
@STORE
@with_json
def verify_store(store: Path, as_json: bool) -> None:
    """Check a store: every file against its hash, the ledger against what is there.

    Ends with exit code 3 when something is wrong.

    Example: sbir-ray photos verify photos
    """
    from sbir_ray.stream.photo_checks import verify

    found = verify(store)
    text = f"{found['photos']:,} photos in {found['shards']:,} shards: as they were written"
    show(found, as_json, "\n".join(found["problems"]) or text)
    if found["problems"]:
        raise DamagedError(f"{store}: {len(found['problems'])} problems, see above; make it anew")
