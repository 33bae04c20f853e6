"""Rounds of a PSEUDO folder while they are made: who may write, what is drawn already, the end.

A round is listed in the header when it is whole. One that is not listed was interrupted: the same
request goes on in it; where only the photo store has changed since, what it holds is kept and
counted as drawn before; else it is removed. Drawings that failed by an error in a listed round are
drawn once more by the next, which then stands for them.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sbir_ray.errors import UserError
from sbir_ray.places import is_local, read_table, remove_tree, write_table
from sbir_ray.runlog import write_json_atomic
from sbir_ray.stream.filters import reference_rows
from sbir_ray.stream.pseudo_store import (
    ABSENT,
    AGAIN,
    HEADER,
    ids_of,
    key_of,
    parts_of,
    read_header,
    round_folder,
    rounds_of,
)
from sbir_ray.stream.sketch_blocks import numbers_of, photo_ids, shards_of

ATTEMPTS, REFERENCE = "attempts", "reference.parquet"
"""Inside a round: the actors' journals while it is made; the photos the teacher ranks among."""
ERROR = "error-"
"""How the reason of a drawing begins that failed by an error, which may be gone next time."""
TRIES = 2
"""Rounds in which a photo is drawn, at most, as long as its drawings fail by errors."""
_LOCK, _REQUEST = ".lock", "request.json"


# --------------------------------------------------------------------------- who may write


def read_shard(text: str) -> tuple[int, int]:
    """``i/n`` as a shard.

    Raises:
        UserError: written otherwise.
    """
    part, slash, of = text.partition("/")
    if not (slash and part.isdigit() and of.isdigit()):
        raise UserError(f"--shard {text}: write it as i/n, for example 0/4")
    return int(part), int(of)


class Writer:
    """Holds a PSEUDO folder: alone, or beside the other shards of the same round."""

    def __init__(
        self, out: Path, shard: tuple[int, int], lock: IO[str] | None, turn: IO[str] | None
    ) -> None:
        self.out, self.shard, self._lock, self._turn = out, shard, lock, turn
        self.alone = True
        """Whether no other process writes: it may remove what it finds unfinished."""
        if lock is None or turn is None:
            return
        # One at a time comes in: only where nobody is does it come in alone.
        fcntl.flock(turn, fcntl.LOCK_EX)
        _, of = shard
        self.alone = _locked(lock, fcntl.LOCK_EX)
        if self.alone:
            lock.truncate(0)
            lock.write(str(of))
            lock.flush()
        else:
            beside = of > 1 and _locked(lock, fcntl.LOCK_SH)
            lock.seek(0)
            if not beside or lock.read() != str(of):
                raise UserError(f"{out}: another run is writing it; wait for it or stop it")
        if of == 1:
            fcntl.flock(turn, fcntl.LOCK_UN)

    def share(self) -> None:
        """Let the other shards in, once the round has begun: they wait for it."""
        if self._lock is None or self._turn is None or self.shard[1] == 1:
            return
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        self.alone = False
        fcntl.flock(self._turn, fcntl.LOCK_UN)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """One shard at a time looks whether the round is whole."""
        if self.shard[1] == 1:
            yield
            return
        with (self.out / f"{_LOCK}-end").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def writing(out: Path, shard: tuple[int, int]) -> Iterator[Writer]:
    """The right to write a PSEUDO folder, which is made if it is not there.

    An object store has no locks: nothing keeps another run out of one, and shards have no place
    there.

    Args:
        shard: which of how many jobs, from 0; (0, 1) for all the work.

    Raises:
        UserError: another run writes it, or the folder holds something else.
    """
    part, of = shard
    if not 0 <= part < of:
        raise UserError(f"--shard {part}/{of}: write it as i/n, from 0/{of} to {of - 1}/{of}")
    if out.exists() and not (out / HEADER).exists():
        others = [e.name for e in out.iterdir() if not e.name.startswith((".", "round-"))]
        if others:
            raise UserError(f"{out}: holds something else ({others[0]}); choose another folder")
    if not is_local(out):
        if of > 1:
            raise UserError(f"{out}: --shard needs a folder that all jobs can lock; give a path")
        yield Writer(out, shard, None, None)
        return
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / f"{_LOCK}-{part}-{of}").open("w") as mine,
        (out / f"{_LOCK}-turn").open("w") as turn,
        (out / _LOCK).open("a+") as lock,
    ):
        if of > 1 and not _locked(mine, fcntl.LOCK_EX):
            raise UserError(f"{out}: another run is writing shard {part}/{of}")
        yield Writer(out, shard, lock, turn)


def _locked(lock: IO[str], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Round:
    """A round that is being made."""

    out: Path
    number: int
    request: dict[str, Any]
    """What its drawings depend on; it becomes the header's entry."""
    before: list[dict[str, Any]]
    """Entries of the rounds before it."""
    absent: list[str]
    """Ids of photos drawn by earlier rounds that the store does not have."""
    again: list[str]
    """Ids of photos whose drawings failed by an error in earlier rounds; they are drawn again."""
    drawn: NDArray[np.uint64] | None
    """``numbers_of`` the other photos that earlier rounds drew; None if there are none."""
    begun: bool
    """Whether it goes on where it was interrupted."""

    @property
    def folder(self) -> Path:
        """Where its drawings lie."""
        return round_folder(self.out, self.number)

    @property
    def entry(self) -> dict[str, Any]:
        """What the header says of it."""
        return {"round": self.number, **self.request}

    @property
    def changes(self) -> bool:
        """Whether it is seen to hold other photos, or drawings of others, than the one before."""
        if self.begun or not self.before or key_of(self.before[-1]) != key_of(self.request):
            return True
        last = round_folder(self.out, self.before[-1]["round"])
        listed = len(_listed(self.out))
        return set(self.absent) != ids_of(last / ABSENT) or listed != len(self.before)

    def begin(self, reference: pa.Table | None) -> None:
        """Make its folder; nothing when it is there."""
        if self.begun:
            return
        remove_tree(self.folder)
        self.folder.mkdir()
        if reference is not None:
            write_table(reference, self.folder / REFERENCE)
        for name, ids in ((ABSENT, self.absent), (AGAIN, self.again)):
            if ids:
                write_table(pa.table({"photo_id": ids}), self.folder / name)
        write_json_atomic(self.folder / _REQUEST, self.request)

    def finish(self, header: dict[str, Any]) -> None:
        """List it: from now on it is the newest."""
        write_json_atomic(self.out / HEADER, {**header, "rounds": [*self.before, self.entry]})
        tidy(self.out)


def tidy(out: Path) -> None:
    """Remove what the making of rounds leaves, and what was half written when a process ended."""
    for entry in _listed(out):
        folder = round_folder(out, entry["round"])
        remove_tree(folder / ATTEMPTS)
        if is_local(out):
            for file in (*folder.glob(".*"), *out.glob(f".{HEADER}.*")):
                file.unlink()


def open_round(writer: Writer, request: dict[str, Any], photos: Path) -> Round:
    """The round that ``request`` asks for: the interrupted one, or a new one.

    Args:
        request: ``generator_digest``, ``settings_digest``, and what else its blocks depend on.

    Raises:
        UserError: another shard makes a round that was asked for in another way.
    """
    out = writer.out
    listed = _listed(out)
    last = listed[-1]["round"] if listed else -1
    pending = [number for number in _numbers(out) if number > last]
    requests = {number: _request(round_folder(out, number)) for number in pending}
    resumes = bool(pending) and requests[pending[-1]] == request
    if pending and not resumes and not writer.alone:
        raise UserError(
            f"{out}: another shard is drawing other photos or with other settings; wait for it"
        )
    kept: list[dict[str, Any]] = []
    if any(found is None or key_of(found) != key_of(request) for found in requests.values()):
        for number in pending:
            remove_tree(round_folder(out, number))
        pending = []
    else:
        for number in pending[:-1] if resumes else pending:
            drop_erred(round_folder(out, number))
            kept.append({"round": number, **(requests[number] or {})})
    number = pending[-1] if resumes else max([last, *pending]) + 1
    same = [entry for entry in listed if key_of(entry) == key_of(request)]
    names, again = _drawn(out, [entry["round"] for entry in [*same, *kept]])
    drawn = numbers_of(names) if same or kept else None
    absent: list[str] = []
    if drawn is not None:
        there = numbers_of(photo_ids(shards_of(photos)))
        known = [*names, *again]
        absent = sorted(itertools.compress(known, ~np.isin(numbers_of(known), there)))
        again = sorted({*again} - {*absent})
    return Round(out, number, request, [*listed, *kept], absent, again, drawn, resumes)


def forget_old(out: Path) -> list[int]:
    """Remove the rounds that the newest one does not use; their numbers.

    Raises:
        UserError, DamagedError: as ``read_header``.
    """
    header = read_header(out)
    used = rounds_of(out, header)
    old = [entry["round"] for entry in header.get("rounds", []) if entry["round"] not in used]
    if old:
        left = [entry for entry in header["rounds"] if entry["round"] in used]
        write_json_atomic(out / HEADER, {**header, "rounds": left})
    for number in old:
        remove_tree(round_folder(out, number))
    return old


def reference_of(out: Path, photos: Path) -> pa.Table:
    """The photos that teachers rank among in this folder: once chosen they stay the same, so that
    the ranks of all rounds can be compared."""
    for number in reversed(_numbers(out)):
        file = round_folder(out, number) / REFERENCE
        if file.exists():
            return read_table(file)
    return reference_rows(photos)


def drop_erred(folder: Path) -> list[Path]:
    """The files of a round, less those with drawings that failed by an error, which are removed."""
    left = []
    for file in parts_of(folder):
        reasons = read_table(file, columns=["reason"])["reason"].unique().to_pylist()
        if any(reason.startswith(ERROR) for reason in reasons):
            file.unlink()
        else:
            left.append(file)
    return left


def _listed(out: Path) -> list[dict[str, Any]]:
    """The header's entries of rounds."""
    if not (out / HEADER).exists():
        return []
    header = read_header(out)
    if "rounds" in header:
        return list(header["rounds"])
    # Of an earlier version: its drawings are like no others.
    return [
        {
            "round": number,
            "sketcher": header["sketcher"],
            "generator_version": header.get("generator_version", 0),
            "generator_digest": header.get("generator_digest", ""),
            "settings_digest": "",
        }
        for number in _numbers(out)
    ]


def _numbers(out: Path) -> list[int]:
    """Of the rounds that have a folder, whole or not."""
    found = out.glob("round-[0-9][0-9][0-9][0-9]")
    return sorted(int(folder.name.removeprefix("round-")) for folder in found)


def _request(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / _REQUEST).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _drawn(out: Path, numbers: Sequence[int]) -> tuple[list[str], list[str]]:
    """Ids of the photos that rounds have drawn, and of those to be drawn again."""
    names: dict[str, None] = {}
    errors: Counter[str] = Counter()
    for number in numbers:
        for file in parts_of(round_folder(out, number)):
            table = read_table(file, columns=["photo_id", "reason"])
            erred = table.filter(pc.starts_with(table["reason"], ERROR))["photo_id"].unique()
            errors.update(erred.to_pylist())
            for name in erred.to_pylist():
                names.pop(name, None)
            mended = pc.invert(pc.is_in(table["photo_id"], erred))
            names |= dict.fromkeys(table.filter(mended)["photo_id"].to_pylist())
    again = [name for name in errors if name not in names and errors[name] < TRIES]
    names |= dict.fromkeys(name for name in errors if errors[name] >= TRIES)
    return list(names), again
