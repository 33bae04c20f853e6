"""The PSEUDO folder: photos with the sketches drawn of them, how sure and by whom.

Drawings lie in rounds and are never changed. A round holds what was drawn anew for it; what it is
seen to hold are these and the drawings of earlier rounds by the same generator with the same
settings. Which of them become pairs is asked when they are read: the choice in force, in the
header, can be another one than that which the rows were written with.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.config import ChoiceConfig
from sbir_ray.data.photos import align, decode_stored
from sbir_ray.data.strokes import Strokes, unflatten
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import open_table, place, read_table
from sbir_ray.runlog import Ledger, write_json_atomic
from sbir_ray.stream.filters import choose, refuse_without_effect
from sbir_ray.stream.sketchers import Drawn
from sbir_ray.strict import digest, from_dict, read_kind, to_dict

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
ABSENT = "absent.parquet"
"""Inside a round: ids of photos that earlier rounds drew and its photo store does not have."""
AGAIN = "again.parquet"
"""Inside a round: ids of photos whose drawings failed by an error in an earlier round."""
CHOICE = b"choice"
"""In a file's metadata: digest of the choice that its fates are by."""

_LATER: dict[str, Any] = {
    "photo_sha256": "",
    "sample": 0,
    "rows": 0,
    "ended": True,
    "rank": 0,
    "similarity": 0.0,
    "settings_digest": "",
}
"""Columns that folders of earlier versions lack, and what they are taken for."""
_DRAWN = ("strokes", "certainty", "log_prob", "ended", "rows", "rank", "similarity")
_BEYOND = "samples"
"""Reason of drawings beyond ``ChoiceConfig.samples``."""


def read_header(folder: str | Path) -> dict[str, Any]:
    """``pseudo.json``.

    Raises:
        UserError: not a PSEUDO folder, or one of a newer version.
        DamagedError: not JSON, or a ledger that does not add up.
    """
    file = place(folder) / HEADER
    advice = "not a folder of pseudo pairs; make one with `sbir-ray sketch`"
    header = read_kind(file, "pseudo", advice, "make the folder again")
    Ledger.from_json("pseudo", header["ledger"], str(file))
    return header


def choice_of(header: dict[str, Any]) -> ChoiceConfig:
    """The choice in force; for a folder of an earlier version, the one it was drawn with."""
    if "choice" in header:
        return from_dict(ChoiceConfig, header["choice"])
    settings = header.get("settings", {})
    found = {name: settings[name] for name in ("keep", "filters") if name in settings}
    # The first versions kept all.
    return from_dict(ChoiceConfig, {"keep": "all", **found})


def rounds_of(folder: Path, header: dict[str, Any]) -> list[int]:
    """Numbers of the rounds whose drawings the newest one is seen to hold, itself the last."""
    if "rounds" not in header:  # of an earlier version, which had one
        found = sorted(folder.glob("round-[0-9][0-9][0-9][0-9]"))
        return [int(found[-1].name.removeprefix("round-"))] if found else [0]
    newest = header["rounds"][-1]
    return [entry["round"] for entry in header["rounds"] if key_of(entry) == key_of(newest)]


def key_of(entry: dict[str, Any]) -> tuple[str, str]:
    """What all drawings of a round have in common."""
    return entry["generator_digest"], entry["settings_digest"]


def round_folder(folder: Path, number: int) -> Path:
    """Where a round's drawings lie."""
    return folder / f"round-{number:04d}"


def parts_of(folder: Path) -> list[Path]:
    """The files of one round.

    Raises:
        DamagedError: the round is missing.
    """
    if not folder.is_dir():
        raise DamagedError(f"{folder}: is missing; sketch again")
    return sorted(folder.glob("part-*.parquet"))


def iter_rows(
    folder: str | Path,
    kept_only: bool = True,
    columns: Sequence[str] | None = None,
    choice: ChoiceConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the newest round, a few in memory at a time, in the order of the files.

    Args:
        kept_only: leave out those that were filtered or failed.
        columns: names out of :data:`PSEUDO_SCHEMA`; all of them by default.
        choice: which drawings become pairs, in place of the choice in force.

    Raises:
        UserError, DamagedError: as :func:`read_header`; a file is damaged, or lacks a column.
    """
    header = read_header(folder)
    if choice is not None:
        refuse_choice(choice, header, folder)
    yield from view(place(folder), header, kept_only, columns, choice)


def view(
    folder: Path,
    header: dict[str, Any],
    kept_only: bool = True,
    columns: Sequence[str] | None = None,
    choice: ChoiceConfig | None = None,
) -> Iterator[dict[str, Any]]:
    """:func:`iter_rows` by a header that need not be written yet."""
    if choice is None and "choice" in header:
        choice = choice_of(header)
    names = list(columns or PSEUDO_SCHEMA.names)
    numbers = rounds_of(folder, header)
    hidden = _hidden(folder, numbers)
    for number in numbers:
        for file in parts_of(round_folder(folder, number)):
            for row in _rows_of_file(file, [*names, "photo_id", "kept"], choice):
                if (row["kept"] or not kept_only) and row["photo_id"] not in hidden[number]:
                    yield {name: row[name] for name in names}


def _hidden(folder: Path, numbers: Sequence[int]) -> dict[int, set[str]]:
    """By round the photos that it is not seen to hold: those that are absent from the newest, and
    those that a later one drew again."""
    hidden: dict[int, set[str]] = {}
    later = ids_of(round_folder(folder, numbers[-1]) / ABSENT)
    for number in reversed(numbers):
        hidden[number] = later
        later = later | ids_of(round_folder(folder, number) / AGAIN)
    return hidden


def _rows_of_file(
    file: Path, names: Sequence[str], choice: ChoiceConfig | None
) -> Iterator[dict[str, Any]]:
    """Its rows, with their fates by ``choice``, or as they are stored without one."""
    try:
        with open_table(file) as parquet:
            stored = (parquet.schema_arrow.metadata or {}).get(CHOICE, b"").decode()
            anew = choice is not None and digest(choice) != stored
            wanted = dict.fromkeys([*names, *((*_DRAWN, "sample", "status") if anew else ())])
            there = [name for name in wanted if name in parquet.schema_arrow.names]
            lacking = wanted.keys() - set(there)
            _refuse_lacking(file, lacking, anew)
            rows = (
                {**{name: _LATER[name] for name in lacking}, **row}
                for batch in parquet.iter_batches(batch_size=64, columns=there)
                for row in batch.to_pylist()
            )
            if choice is None or not anew:
                yield from rows
                return
            for _, group in itertools.groupby(rows, lambda row: row["photo_id"]):
                yield from _chosen(list(group), choice)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{file}: cannot be read ({error}); sketch again") from error


def _refuse_lacking(file: Path, lacking: set[str], anew: bool) -> None:
    for name in sorted(lacking):
        if name not in _LATER:
            raise DamagedError(f"{file}: has no column {name}; sketch again")
        if anew and name in (*_DRAWN, "sample"):
            raise UserError(
                f"{file}: has no column {name}, which another choice of drawings needs (an earlier "
                "version wrote it); use its own choice, or sketch again"
            )


def _chosen(rows: list[dict[str, Any]], choice: ChoiceConfig) -> list[dict[str, Any]]:
    """All rows of one photo with their fates by ``choice``."""
    first = choice.samples or len(rows)
    asked = [row for row in rows if row["status"] != "failed" and row["sample"] < first]
    reasons = choose([_drawn(row) for row in asked], choice.filters, choice.keep)
    for row, reason in zip(asked, reasons, strict=True):
        row["reason"] = reason
    for row in rows:
        if row["sample"] >= first and row["status"] != "failed":
            row["reason"] = _BEYOND
        if row["status"] != "failed":
            row["kept"] = not row["reason"]
            row["status"] = "kept" if row["kept"] else "filtered"
    return rows


def _drawn(row: dict[str, Any]) -> Drawn:
    return Drawn(unflatten(row["strokes"]), **{name: row[name] for name in _DRAWN[1:]})


def ids_of(file: Path) -> set[str]:
    """The photos that a round's :data:`ABSENT` or :data:`AGAIN` names; none where it has none."""
    return set(read_table(file)["photo_id"].to_pylist()) if file.exists() else set()


def account(folder: Path, header: dict[str, Any], choice: ChoiceConfig | None = None) -> Ledger:
    """The account of all drawings of the newest round, by ``choice`` or by the one in force.

    Raises:
        UserError, DamagedError: as :func:`iter_rows`.
    """
    fates: Counter[tuple[str, str]] = Counter()
    for row in view(folder, header, False, ["status", "reason"], choice):
        fates[row["status"], row["reason"]] += 1
    ledger = Ledger("pseudo", fates.total())
    for (status, reason), count in fates.items():
        ledger.add(status, reason, count)
    return ledger


def refilter(folder: str | Path, choice: ChoiceConfig) -> Ledger:
    """Put another choice of drawings in force: nothing is drawn, and nothing is lost.

    Returns:
        The account of all drawings by it, which ``pseudo.json`` now has too.

    Raises:
        UserError: settings without effect on these drawings; as :func:`iter_rows`.
    """
    header = read_header(folder)
    refuse_choice(choice, header, folder)
    ledger = account(place(folder), header, choice)
    changed = {**header, "choice": to_dict(choice), "ledger": ledger.to_json()}
    write_json_atomic(place(folder) / HEADER, changed)
    return ledger


def refuse_choice(choice: ChoiceConfig, header: dict[str, Any], folder: str | Path) -> None:
    """Refuse filters that no drawing of the folder can fail.

    Raises:
        UserError: the setting, and what to do.
    """
    try:
        refuse_without_effect(
            choice.filters,
            header["sketcher"],
            generative=header.get("generative", True),
            judged=header.get("judged", True),
            ranked=bool(header.get("teacher_digest")),
        )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


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
    def join(cls, sets: Sequence[PseudoSet]) -> PseudoSet:
        """The pairs of several sets, of one image size; a photo's picture is its first set's."""
        where: dict[str, NDArray[np.uint8]] = {}
        for one in sets:
            for name, photo in zip(one.photo_ids, one.photos, strict=True):
                where.setdefault(name, photo)
        ids = sorted(where)
        index = {name: number for number, name in enumerate(ids)}
        return cls(
            photo_ids=ids,
            photos=np.stack([where[name] for name in ids]) if ids else sets[0].photos,
            sketches=[sketch for one in sets for sketch in one.sketches],
            photo_of=np.array(
                [index[one.photo_ids[i]] for one in sets for i in one.photo_of], np.int64
            ),
            certainty=np.concatenate([one.certainty for one in sets]),
        )

    @classmethod
    def load(
        cls,
        folder: str | Path,
        image_size: int,
        kept_only: bool = True,
        choice: ChoiceConfig | None = None,
    ) -> PseudoSet:
        """The newest round of a PSEUDO folder, photos aligned at ``image_size`` pixels.

        Failed rows have no sketch and are left out in any case. The set may be empty.

        Args:
            choice: which drawings become pairs, in place of the folder's choice.

        Raises:
            UserError, DamagedError: as :func:`iter_rows`.
        """
        columns = ["photo_id", "image", "strokes", "certainty", "seed", "status"]
        rows: list[tuple[str, int, Strokes, float]] = []
        images: dict[str, bytes] = {}
        for row in iter_rows(folder, kept_only, columns, choice):
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
