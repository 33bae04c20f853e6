"""The PSEUDO folder: photos with the sketches drawn of them, how sure and by whom."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.data.photos import align, decode_stored
from sbir_ray.data.strokes import Strokes, unflatten
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import open_table, place
from sbir_ray.runlog import Ledger
from sbir_ray.strict import check_schema

PSEUDO_SCHEMA = pa.schema(
    [
        ("photo_id", pa.string()),
        ("image", pa.binary()),
        ("photo_sha256", pa.string()),
        ("sample", pa.int32()),
        ("strokes", pa.list_(pa.list_(pa.float32()))),
        ("points", pa.int32()),
        ("certainty", pa.float32()),
        ("log_prob", pa.float32()),
        ("rows", pa.int32()),
        ("ended", pa.bool_()),
        ("rank", pa.int32()),
        ("similarity", pa.float32()),
        ("seed", pa.int64()),
        ("generator_version", pa.int32()),
        ("generator_digest", pa.string()),
        ("settings_digest", pa.string()),
        ("round", pa.int32()),
        ("kept", pa.bool_()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""A drawing of a photo, the ``sample``-th from 0. ``image`` is the photo's stored picture, so that
training needs nothing else, and ``photo_sha256`` its digest; ``status`` is its fate: kept, filtered
or failed; ``rank`` and ``similarity`` are 0 when no teacher was asked, ``rows`` when there is no
log-probability. All drawings of a photo lie in one file, in the order of their samples."""

HEADER = "pseudo.json"


def read_header(folder: str | Path) -> dict[str, Any]:
    """``pseudo.json``.

    Raises:
        UserError: not a PSEUDO folder, or one of a newer version.
        DamagedError: not JSON, or a ledger that does not add up.
    """
    file = place(folder) / HEADER
    advice = "not a folder of pseudo pairs; make one with `sbir-ray sketch`"
    try:
        header = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{folder}: {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: not a JSON file; make the folder again") from error
    if not isinstance(header, dict) or header.get("kind") != "pseudo":
        raise UserError(f"{folder}: {advice}")
    check_schema(header.get("schema_version"), str(file))
    Ledger.from_json("pseudo", header["ledger"], str(file))
    return header


def iter_rows(
    folder: str | Path, kept_only: bool = True, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the newest round, a few in memory at a time, in the order of the files.

    Args:
        kept_only: leave out those that were filtered or failed.
        columns: names out of :data:`PSEUDO_SCHEMA`; all of them by default.

    Raises:
        UserError, DamagedError: as :func:`read_header`, or a file is damaged.
    """
    read_header(folder)
    names = columns or PSEUDO_SCHEMA.names
    for file in _parts(place(folder)):
        try:
            with open_table(file) as parquet:
                for batch in parquet.iter_batches(
                    batch_size=64, columns=list(dict.fromkeys([*names, "kept"]))
                ):
                    for row in batch.to_pylist():
                        if row["kept"] or not kept_only:
                            yield {name: row[name] for name in names}
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(f"{file}: cannot be read ({error}); sketch again") from error


@dataclass(frozen=True)
class PseudoSet:
    """Pseudo pairs in memory: N photos, M sketches of them, in order of photo_id and seed."""

    photo_ids: list[str]
    photos: NDArray[np.uint8]
    """(N, 3, S, S) RGB, aligned."""
    sketches: list[Strokes]
    """M sketches, canonical."""
    photo_of: NDArray[np.int64]
    """(M,) index of each sketch's photo."""
    certainty: NDArray[np.float32]
    """(M,) in [0, 1]."""

    @classmethod
    def load(cls, folder: str | Path, image_size: int, kept_only: bool = True) -> PseudoSet:
        """The newest round of a PSEUDO folder, photos aligned at ``image_size`` pixels.

        Failed rows have no sketch and are left out in any case. The set may be empty.

        Raises:
            UserError, DamagedError: as :func:`iter_rows`.
        """
        columns = ["photo_id", "image", "strokes", "certainty", "seed", "status"]
        rows: list[tuple[str, int, Strokes, float]] = []
        images: dict[str, bytes] = {}
        for row in iter_rows(folder, kept_only, columns):
            if row["status"] != "failed":
                sketch = unflatten(row["strokes"])
                rows.append((row["photo_id"], row["seed"], sketch, row["certainty"]))
                images.setdefault(row["photo_id"], row["image"])
        rows.sort(key=lambda row: row[:2])
        ids = sorted(images)
        index = {name: number for number, name in enumerate(ids)}
        pixels = np.empty((len(ids), 3, image_size, image_size), np.uint8)

        def fill(number: int) -> None:
            rgb = align(decode_stored(images[ids[number]]), image_size)
            pixels[number] = rgb.transpose(2, 0, 1)

        # Decoding lets other threads run meanwhile.
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(len(ids))))
        return cls(
            photo_ids=ids,
            photos=pixels,
            sketches=[sketch for _, _, sketch, _ in rows],
            photo_of=np.array([index[name] for name, *_ in rows], np.int64),
            certainty=np.array([certainty for *_, certainty in rows], np.float32),
        )


def stats(folder: str | Path) -> dict[str, Any]:
    """What a PSEUDO folder holds: its ledger, and the spread of the kept pairs.

    Returns:
        ``ledger``, and for ``points``, ``strokes`` and ``certainty`` the ``mean``, ``least``,
        ``median`` and ``most`` over the kept pairs (no such entries when none was kept).

    Raises:
        UserError, DamagedError: as :func:`iter_rows`.
    """
    header = read_header(folder)
    rows = list(iter_rows(folder, columns=["points", "strokes", "certainty"]))
    found: dict[str, Any] = {"sketcher": header["sketcher"], "ledger": header["ledger"]}
    if rows:
        found["points"] = _spread([row["points"] for row in rows])
        found["strokes"] = _spread([len(row["strokes"]) for row in rows])
        found["certainty"] = _spread([row["certainty"] for row in rows])
    return found


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "least": float(np.min(values)),
        "median": float(np.median(values)),
        "most": float(np.max(values)),
    }


def _parts(folder: Path) -> list[Path]:
    rounds = sorted(folder.glob("round-[0-9][0-9][0-9][0-9]"))
    if not rounds:
        raise DamagedError(f"{folder}: its rounds are missing; sketch again")
    return sorted(rounds[-1].glob("part-*.parquet"))
