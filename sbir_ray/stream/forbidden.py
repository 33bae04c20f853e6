"""Photos that may not train: found among others by their content, also when they are mirrored."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.data import leaks, pairs, photos
from sbir_ray.data.photos import PhotoRow
from sbir_ray.errors import UserError
from sbir_ray.places import (
    is_local,
    open_table,
    place,
    read_table,
    remove_tree,
    write_bytes,
    write_table,
)
from sbir_ray.stream.cluster import run_tasks

LEAK_BITS = 2
"""Largest distance of perceptual hashes at which a photo is that of an excluded one, in any colour;
other copies are found as :mod:`sbir_ray.data.leaks` finds them."""

_SHAPE = (2, 16, 16, 3)
_PRINT = pa.schema(
    [
        ("photo_id", pa.string()),
        ("name", pa.string()),
        ("phash", pa.int64()),
        ("mirrored", pa.int64()),
        ("miniatures", pa.binary(int(np.prod(_SHAPE)))),
    ]
)
_FEW = 4
"""Files that are looked at here; for more, tasks are worth their start."""


@dataclass(frozen=True)
class Forbidden:
    """Photos that may not train."""

    prints: pa.Table
    """photo_id and name of each."""
    hashes: NDArray[np.int64]
    """(2, N): as they are, and mirrored."""
    miniatures: NDArray[np.uint8]
    """(N, 2, 16, 16, 3)."""

    @classmethod
    @functools.lru_cache(maxsize=1)
    def load(cls, folder: str, session: str) -> Forbidden:
        """What :func:`forbid` has written; on this machine, the miniatures stay on disk.

        Args:
            session: name of the run; for another one the folder is read anew.
        """
        here = place(folder)
        prints = read_table(here / "prints.parquet", ["photo_id", "name"])
        count = prints.num_rows
        hashes = np.frombuffer((here / "hashes").read_bytes(), np.int64).reshape(2, count)
        shape = (count, *_SHAPE)
        if count and is_local(here):
            small: NDArray[np.uint8] = np.memmap(here / "miniatures", np.uint8, "r", shape=shape)
        else:
            small = np.frombuffer((here / "miniatures").read_bytes(), np.uint8).reshape(shape)
        return cls(prints, hashes, small)

    def leak_of(self, row: PhotoRow) -> tuple[str, str] | None:
        """(reason, text) when the photo is one of these, whatever its name; else None."""
        if not self.prints.num_rows:
            return None
        distance = np.bitwise_count(self.hashes ^ np.int64(row["phash"]))
        close = np.argwhere(distance <= leaks.NEAR_BITS)
        order = np.argsort(distance[close[:, 0], close[:, 1]], kind="stable")
        mine: leaks.Print | None = None
        for turned, index in close[order].tolist():
            other = self._print(index, bool(turned))
            copy = "nearly the same as" if not turned else "nearly a mirrored copy of"
            if row["photo_id"] == other.photo_id:
                return "same-file", f"the same file as {other.name!r}"
            mine = mine or leaks.print_of(row)
            if (
                distance[turned, index] <= LEAK_BITS
                or leaks.difference(mine, other) <= leaks.NEAR_SHARE
            ):
                return "mirrored" if turned else "near", f"{copy} {other.name!r}"
        return None

    def _print(self, index: int, turned: bool) -> leaks.Print:
        small = np.asarray(self.miniatures[index])
        return leaks.Print(
            self.prints["photo_id"][index].as_py(),
            self.prints["name"][index].as_py(),
            int(self.hashes[int(turned), index]),
            small[:, :, ::-1] if turned else small,
        )


def forbid(folders: Sequence[Path], out: Path, must: Sequence[Path] = ()) -> int:
    """Write what :class:`Forbidden` reads: of PAIRS folders the validation and test photos, of
    PHOTOS folders all.

    Args:
        out: folder to make; nothing is done when it is there.
        must: those of the folders that have to have some.

    Returns:
        How many there are.

    Raises:
        UserError, DamagedError: a folder that is neither, or a damaged one.
    """
    done = out / "prints.parquet"
    if not done.exists():
        remove_tree(out)
        plan = [_plan(folder, out, number) for number, folder in enumerate(folders)]
        tables = [pa.table(row) for rows in plan for row in rows]
        few = len(tables) <= _FEW
        for _ in map(print_photos, tables) if few else run_tasks(tables, print_photos):
            pass
        counts = _gather([place(row["out"][0]) for rows in plan for row in rows], out)
        for folder, rows in zip(folders, plan, strict=True):
            if not sum(next(counts) for _ in rows) and folder in must:
                raise UserError(
                    f"{folder}: has no validation or test photos to exclude; leave it out"
                )
        for _ in counts:
            pass
    with open_table(done) as prints:
        return int(prints.metadata.num_rows)


def _plan(folder: Path, work: Path, number: int) -> list[dict[str, list[str]]]:
    """Rows of the plan: a file of photos each, and where their prints go."""
    if (folder / "pairs.json").is_file():
        pairs.read_header(folder)
        files, kind = [folder], "pairs"
    elif (folder / "store.json").is_file():
        photos.store_header(folder)
        files, kind = photos.shards(folder), "photos"
    else:
        raise UserError(f"{folder}: neither a PAIRS nor a PHOTOS folder; nothing to exclude by")
    return [
        {"file": [str(file)], "kind": [kind], "out": [str(work / f"{number:03d}-{i:06d}.part")]}
        for i, file in enumerate(files)
    ]


def print_photos(plan: pa.Table) -> pa.Table:
    """The task: the prints of the photos of each file to a file."""
    for entry in plan.to_pylist():
        file = place(entry["file"])
        rows: Iterator[Any] = (
            pairs.iter_photos(file, {"val", "test"})
            if entry["kind"] == "pairs"
            else photos.read_rows(file)
        )
        found = [_print_row(row) for row in rows]
        write_table(pa.Table.from_pylist(found, schema=_PRINT), place(entry["out"]))
    return plan.select(["out"])


def _print_row(row: PhotoRow) -> dict[str, Any]:
    look = leaks.print_of(row)
    rgb = photos.decode_stored(row["image"])
    return {
        "photo_id": look.photo_id,
        "name": look.name or row["uri"],
        "phash": look.phash,
        "mirrored": photos.phash(np.ascontiguousarray(rgb[:, ::-1])),
        "miniatures": look.miniatures.tobytes(),
    }


def _gather(files: Sequence[Path], out: Path) -> Iterator[int]:
    """Bring the prints together; how many there are in each file."""
    out.mkdir(parents=True, exist_ok=True)
    prints, hashes = [_PRINT.empty_table().select(["photo_id", "name"])], [np.zeros((2, 0), "i8")]
    with (out / "miniatures").open("wb") as stream:
        for file in files:
            table = read_table(file)
            prints.append(table.select(["photo_id", "name"]))
            hashes.append(np.stack([table["phash"].to_numpy(), table["mirrored"].to_numpy()]))
            for small in table["miniatures"]:
                stream.write(small.as_buffer())
            file.unlink()
            yield table.num_rows
    write_bytes(out / "hashes", np.concatenate(hashes, axis=1).tobytes())
    write_table(pa.concat_tables(prints), out / "prints.parquet")
