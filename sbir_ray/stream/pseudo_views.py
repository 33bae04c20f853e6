"""What a PSEUDO folder holds: its rounds, its numbers, a sheet of its pairs, other formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from sbir_ray.certainty import pick_evenly
from sbir_ray.data.atomic import new_folder, refuse_existing
from sbir_ray.data.formats import Item, write_sketches
from sbir_ray.data.photos import align, decode_stored
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import unflatten
from sbir_ray.data.svg import svg_text
from sbir_ray.errors import UserError
from sbir_ray.places import count_rows, place, read_table
from sbir_ray.stream.pseudo_store import iter_rows, parts_of, read_header, round_folder, rounds_of

Format = Literal["svg", "png", "ndjson", "npz"]

_TEXT = 14
"""Height of the line under a pair, pixels."""
_COLUMNS = 6
_SHEET = 500
"""Most pairs of a sheet."""


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The rounds in the order in which they were made: the header's entries, with ``drawings``,
    the number of their own, and ``used``, whether the newest round is seen to hold them.

    Raises:
        UserError, DamagedError: as ``read_header``, or a round is missing.
    """
    folder = place(folder)
    header = read_header(folder)
    used = rounds_of(folder, header)
    entries = header.get("rounds") or [{**header, "round": number} for number in used]
    names = ("round", "sketcher", "generator_version", "generator_digest", "settings_digest")
    return [
        {
            **{name: entry.get(name, "") for name in names},
            "drawings": sum(map(count_rows, parts_of(round_folder(folder, entry["round"])))),
            "used": entry["round"] in used,
        }
        for entry in entries
    ]


def stats(folder: Path) -> dict[str, Any]:
    """The account of the newest round and the spread of its numbers, and what each round drew.

    Returns:
        ``ledger``, ``choice`` (which is in force), ``photos``, ``pairs``; for ``points``,
        ``strokes`` and ``certainty`` of the pairs the ``mean``, ``least``, ``median`` and ``most``
        (not there when there is no pair); ``deciles`` of the drawings by certainty, the most
        certain first; ``rounds``, as of :func:`rounds`, with the mean certainty of each.

    Raises:
        UserError, DamagedError: as ``iter_rows``.
    """
    folder = place(folder)
    header = read_header(folder)
    columns = ["photo_id", "points", "strokes", "certainty", "rank", "similarity", "status"]
    photos: set[int] = set()
    drawn: list[tuple[float, bool, int, float, int, int]] = []
    for row in iter_rows(folder, kept_only=False, columns=columns):
        photos.add(hash(row["photo_id"]))
        if row["status"] != "failed":
            numbers = row["certainty"], row["status"] == "kept", row["rank"], row["similarity"]
            drawn.append((*numbers, row["points"], len(row["strokes"])))
    values = np.array(drawn, np.float64).reshape(-1, 6)
    kept = values[values[:, 1] == 1]
    found: dict[str, Any] = {
        "sketcher": header["sketcher"],
        "ledger": header["ledger"],
        "choice": header.get("choice"),
        "photos": len(photos),
        "pairs": len(kept),
    }
    if len(kept):
        for name, column in (("points", 4), ("strokes", 5), ("certainty", 0)):
            found[name] = _spread(kept[:, column])
    found["deciles"] = _deciles(values)
    found["rounds"] = rounds(folder)
    for entry in found["rounds"]:
        entry["certainty"] = _mean_certainty(round_folder(folder, entry["round"]))
    return found


def _spread(values: Any) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "least": float(np.min(values)),
        "median": float(np.median(values)),
        "most": float(np.max(values)),
    }


def _deciles(values: Any) -> list[dict[str, float]]:
    """Of rows (certainty, kept, rank, similarity, ...); ranks only where a teacher gave them."""
    order = np.argsort(-values[:, 0], kind="stable")
    found = []
    for part in np.array_split(values[order], min(10, len(values)) or 1):
        if len(part):
            tenth = {
                "low": float(part[:, 0].min()),
                "high": float(part[:, 0].max()),
                "drawings": len(part),
                "kept": float(part[:, 1].mean()),
            }
            if part[:, 2].any():
                tenth["median_rank"] = float(np.median(part[:, 2]))
                tenth["similarity"] = float(part[:, 3].mean())
            found.append(tenth)
    return found


def _mean_certainty(folder: Path) -> float | None:
    """Of the drawings that a round made; None without any."""
    total, count = 0.0, 0
    for file in parts_of(folder):
        table = read_table(file, columns=["certainty", "points"])
        certain = table["certainty"].to_numpy()[table["points"].to_numpy() > 0]
        total, count = total + float(certain.sum()), count + len(certain)
    return total / count if count else None


# --------------------------------------------------------------------------- a sheet


def write_sheet(
    folder: Path, out: Path, *, count: int = 24, side: int = 128, kept_only: bool = True
) -> int:
    """A PNG of pairs, evenly spaced over the order by certainty, the most certain first: each photo
    beside its sketch, and under them the certainty, the rank if a teacher gave one, and the reason
    of a drawing that is not kept.

    Args:
        side: of each picture, pixels.
        kept_only: False: of all drawings.

    Returns:
        The number of pairs shown.

    Raises:
        UserError: there is nothing to show; as ``iter_rows``.
    """
    if not 1 <= count <= _SHEET:
        raise UserError(f"--count {count}: from 1 to {_SHEET}")
    columns = ["certainty", "status"]
    certainty = [
        -1.0 if row["status"] == "failed" else row["certainty"]
        for row in iter_rows(folder, kept_only, columns)
    ]
    drawn = np.flatnonzero(np.array(certainty) >= 0)
    if not len(drawn):
        raise UserError(f"{folder}: holds no drawing to show; see `sbir-ray pseudo stats`")
    places = [int(drawn[i]) for i in pick_evenly(np.array(certainty)[drawn], count)]
    chosen = {
        number: row
        for number, row in enumerate(iter_rows(folder, kept_only))
        if number in set(places)
    }
    across = min(_COLUMNS, len(places))
    down = -(-len(places) // across)
    width, height = 2 * side + 8, side + _TEXT + 8
    sheet = Image.new("RGB", (across * width, down * height), "white")
    pen = ImageDraw.Draw(sheet)
    for n, number in enumerate(places):
        x, y = n % across * width, n // across * height
        row = chosen[number]
        ink = 255 - rasterise([unflatten(row["strokes"])], side)[0]
        sheet.paste(Image.fromarray(align(decode_stored(row["image"]), side)), (x, y))
        sheet.paste(Image.fromarray(ink), (x + side, y))
        pen.text((x + 4, y + side + 1), _told(row), fill="black")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, "PNG")
    return len(places)


def _told(row: dict[str, Any]) -> str:
    rank = f"  rank {row['rank']}" if row["rank"] else ""
    return f"{row['certainty']:.2f}{rank}  {row['reason']}".rstrip()


# --------------------------------------------------------------------------- other formats


def export(folder: Path, out: Path, kind: Format, side: int = 256) -> int:
    """The sketches of the pairs in another format, each named ``<photo_id>_<sample>``.

    Args:
        out: file of QuickDraw ndjson or of stroke-3 arrays (npz); folder of SVG or PNG files.
        kind: of these.
        side: of PNG pictures, pixels; black on white.

    Returns:
        The number of sketches.

    Raises:
        UserError: ``out`` exists, there is no pair; as ``iter_rows``.
    """
    refuse_existing(out)
    if next(iter_rows(folder, columns=["photo_id"]), None) is None:
        raise UserError(f"{folder}: holds no pair; see `sbir-ray pseudo stats`")
    if kind in ("ndjson", "npz"):
        out.parent.mkdir(parents=True, exist_ok=True)
        whole = out.with_name(f".{out.name}.partial")
        count = write_sketches(whole, _items(folder), kind)
        whole.replace(out)
        return count
    count = 0
    with new_folder(out) as work:
        for name, strokes in _items(folder):
            file = work / f"{name}.{kind}"
            if kind == "svg":
                file.write_text(svg_text(strokes), encoding="utf-8")
            else:
                Image.fromarray(255 - rasterise([strokes], side)[0]).save(file, "PNG")
            count += 1
    return count


def _items(folder: Path) -> Iterator[Item]:
    for row in iter_rows(folder, columns=["photo_id", "sample", "strokes"]):
        yield f"{row['photo_id']}_{row['sample']}", unflatten(row["strokes"])
