"""A PSEUDO folder for tests, written without Ray and without drawing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sbir_ray.config import ChoiceConfig
from sbir_ray.data import photos
from sbir_ray.data.strokes import count_points, flatten
from sbir_ray.runlog import Ledger
from sbir_ray.stream.pseudo_store import CHOICE, HEADER, PSEUDO_SCHEMA
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict
from tests.tiny import photo, sketch

Row = dict[str, Any]


def pseudo_row(number: int, sample: int = 0, reason: str = "", **changes: Any) -> Row:
    """A drawing of the shape ``number``, of the photo named so; without a reason it is kept."""
    status = changes.get("status", "filtered" if reason else "kept")
    strokes = [] if status == "failed" else sketch(number, hand=sample)
    row = {
        "photo_id": f"{number:02d}",
        "image": photos.encode_jpeg(photo(number)),
        "photo_sha256": f"sha{number}",
        "sample": sample,
        "strokes": flatten(strokes),
        "points": count_points(strokes),
        "certainty": 0.5,
        "log_prob": -1.0,
        "rows": 1,
        "ended": True,
        "rank": 0,
        "similarity": 0.0,
        "seed": sample,
        "generator_version": 1,
        "generator_digest": "abc",
        "settings_digest": "def",
        "round": 0,
        "kept": status == "kept",
        "status": status,
        "reason": reason,
    }
    return {**row, **changes}


def tiny_pseudo(
    folder: Path,
    *parts: Sequence[Row],
    number: int = 0,
    choice: ChoiceConfig | None = None,
    without: Sequence[str] = (),
    **header: Any,
) -> Path:
    """The rows as the files of a round.

    Args:
        number: of the round; an earlier one stays in the header.
        choice: that the rows' fates are by, and that is in force; None: a folder of an earlier
            version, in which nobody can tell.
        without: columns that are left out, as earlier versions did.
    """
    place = folder / f"round-{number:04d}"
    place.mkdir(parents=True)
    for i, rows in enumerate(parts):
        table = pa.Table.from_pylist(list(rows), PSEUDO_SCHEMA).drop_columns(list(without))
        if choice is not None:
            table = table.replace_schema_metadata({CHOICE: digest(choice)})
        pq.write_table(table, place / f"part-{i:06d}.parquet")
    rows = [row for part in parts for row in part]
    ledger = Ledger("pseudo", len(rows))
    for row in rows:
        ledger.add(row["status"], row["reason"])
    values = {
        "schema_version": SCHEMA_VERSION,
        "kind": "pseudo",
        "sketcher": "generator",
        "generator_version": 1,
        "generator_digest": "abc",
        "teacher_digest": None,
        "ledger": ledger.to_json(),
    }
    if choice is not None:
        before = json.loads((folder / HEADER).read_text())["rounds"] if number else []
        entry = {
            "round": number,
            "sketcher": "generator",
            "generator_version": 1,
            "generator_digest": "abc",
            "settings_digest": "def",
            **{k: v for k, v in header.items() if k.endswith("_digest")},
        }
        values |= {"choice": to_dict(choice), "rounds": [*before, entry]}
    (folder / HEADER).write_text(json.dumps({**values, **header}))
    return folder
