"""People's hidden sketches in place of drawings: what a sketcher could bring at best."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sbir_ray.config import SketchConfig
from sbir_ray.data.atomic import new_folder
from sbir_ray.data.pairs import SketchRow, iter_sketches
from sbir_ray.data.photos import read_store
from sbir_ray.data.strokes import count_points, unflatten
from sbir_ray.errors import UserError
from sbir_ray.places import write_table
from sbir_ray.runlog import Ledger, versions, write_json_atomic
from sbir_ray.stream.filters import choose
from sbir_ray.stream.pseudo_store import CHOICE, HEADER, PSEUDO_SCHEMA, round_folder
from sbir_ray.stream.sketchers import Drawn
from sbir_ray.strict import SCHEMA_VERSION, digest, to_dict

PEOPLE = "people"
"""In the place of a sketcher: the sketches that people drew."""


def people_drew(photos: Path, pairs: Path, out: Path, config: SketchConfig) -> Ledger:
    """Write the photos of a pool that people drew as a PSEUDO folder, each with all its sketches.

    Args:
        photos: PHOTOS folder of the pool.
        pairs: PAIRS folder with the hidden sketches among its training pairs.
        out: PSEUDO folder, which appears whole.
        config: ``filters`` and ``keep`` are asked as of drawings.

    Returns:
        The account of the sketches.

    Raises:
        UserError: nobody drew a photo of the pool.
    """
    sketches: dict[str, list[SketchRow]] = defaultdict(list)
    for sketch in sorted(iter_sketches(pairs, {"train"}), key=lambda row: row["sketch_id"]):
        sketches[sketch["photo_id"]].append(sketch)
    rows = [
        row
        for photo in read_store(photos)
        for row in _rows(photo["photo_id"], photo["image"], sketches[photo["photo_id"]], config)
    ]
    if not rows:
        raise UserError(f"{photos}: {pairs} has no sketch of any of its photos")
    ledger = Ledger("pseudo", len(rows))
    for row in rows:
        ledger.add(row["status"], row["reason"])
    ledger.check()
    drawn = [(row["photo_id"], row["strokes"]) for row in rows]
    author = hashlib.sha256(repr(drawn).encode()).hexdigest()[:12]
    known = {"generator_version": 0, "generator_digest": author, "settings_digest": ""}
    table = pa.Table.from_pylist([{**row, **known} for row in rows], schema=PSEUDO_SCHEMA)
    header = {
        "schema_version": SCHEMA_VERSION,
        "kind": "pseudo",
        "sketcher": PEOPLE,
        "generator_config": {},
        "generative": False,
        "judged": False,
        "teacher_digest": None,
        "seed": config.seed,
        "settings": to_dict(config),
        "choice": to_dict(config.choice),
        "photos": str(photos),
        "versions": versions(),
        "ledger": ledger.to_json(),
        "rounds": [{"round": 0, "sketcher": PEOPLE, **known}],
    }
    with new_folder(out) as folder:
        target = round_folder(folder, 0)
        target.mkdir()
        write_table(
            table.replace_schema_metadata({CHOICE: digest(config.choice)}),
            target / "part-000000.parquet",
            compression="zstd",
        )
        write_json_atomic(folder / HEADER, {**header, **known})
    return ledger


def _rows(
    photo_id: str, image: bytes, sketches: Sequence[SketchRow], config: SketchConfig
) -> list[dict[str, Any]]:
    """All sketches of one photo with their fates."""
    drawn = [Drawn(unflatten(sketch["strokes"])) for sketch in sketches]
    reasons = choose(drawn, config.filters, config.keep)
    return [
        {
            "photo_id": photo_id,
            "image": image,
            "photo_sha256": hashlib.sha256(image).hexdigest(),
            "sample": sample,
            "strokes": sketch["strokes"],
            "points": count_points(one.strokes),
            "certainty": one.certainty,
            "log_prob": one.log_prob,
            "rows": one.rows,
            "ended": one.ended,
            "rank": one.rank,
            "similarity": one.similarity,
            "seed": sample,
            "round": 0,
            "kept": not reason,
            "status": "filtered" if reason else "kept",
            "reason": reason,
        }
        for sample, (sketch, one, reason) in enumerate(zip(sketches, drawn, reasons, strict=True))
    ]
