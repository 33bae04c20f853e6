"""What a run says and leaves behind: counted ledgers, progress, whole files, versions. No Ray."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

import sbir_ray
from sbir_ray.errors import DamagedError, UnavailableError, UserError
from sbir_ray.places import is_local, remove_tree, sync, told, write_bytes

# --------------------------------------------------------------------------- ledgers

Kind = Literal["photos", "pseudo", "live", "index"]

_TOTAL: dict[Kind, str] = {"photos": "read", "pseudo": "drawn", "live": "drawn", "index": "read"}
_FATES: dict[Kind, tuple[str, ...]] = {
    "photos": ("stored", "duplicate", "leaked", "rejected", "failed", "quarantined"),
    "pseudo": ("kept", "filtered", "failed"),
    "live": ("used", "filtered", "stale", "in_flight"),
    "index": ("indexed", "failed"),
}
_WITH_REASONS = ("rejected", "filtered", "failed")


class Ledger:
    """The counted account of photos or of pseudo pairs by fate.

    ``photos``: read = stored + duplicate + leaked + rejected (by reason) + failed (by reason) +
    quarantined;
    ``pseudo``: drawn = kept + filtered (by reason) + failed (by reason); ``live``: drawn = used +
    filtered (by reason) + stale + in flight; ``index``: read = indexed + failed (by reason). The
    total is given where the work is planned and the fates where it comes back, so that the sum can
    fail.
    """

    def __init__(self, kind: Kind, total: int = 0) -> None:
        self.kind = kind
        self.total = total
        self.by_reason: dict[str, Counter[str]] = {fate: Counter() for fate in _FATES[kind]}

    def add(self, fate: str, reason: str = "", count: int = 1) -> None:
        """Account for ``count`` rows; ``reason`` for the fates that have reasons."""
        assert bool(reason) == (fate in _WITH_REASONS), (fate, reason)
        self.by_reason[fate][reason] += count

    def count(self, fate: str) -> int:
        """Rows of one fate, over all reasons."""
        return self.by_reason[fate].total()

    @property
    def accounted(self) -> int:
        """Rows of any fate."""
        return sum(self.count(fate) for fate in self.by_reason)

    def check(self) -> None:
        """Assert that every row has one fate."""
        assert self.total == self.accounted, f"the ledger does not add up: {self}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, checked: the total, and each fate as a number or as numbers by reason."""
        self.check()
        values: dict[str, Any] = {_TOTAL[self.kind]: self.total}
        for fate, reasons in self.by_reason.items():
            values[fate] = (
                dict(sorted(reasons.items())) if fate in _WITH_REASONS else reasons.total()
            )
        return values

    @classmethod
    def from_json(cls, kind: Kind, values: Mapping[str, Any], where: str) -> Ledger:
        """The reverse of :meth:`to_json`; ``where`` names the file.

        Raises:
            DamagedError: a fate is missing, unknown, or the sum does not hold.
        """
        names = {_TOTAL[kind], *_FATES[kind]}
        if kind == "photos":
            # Ledgers from before photos were quarantined do not tell of it.
            values = {"quarantined": 0, **values}
        if set(values) != names:
            odd = sorted(names ^ set(values))
            raise DamagedError(f"{where}: not a ledger of {kind} ({', '.join(odd)})")
        ledger = cls(kind, int(values[_TOTAL[kind]]))
        for fate in ledger.by_reason:
            counts = values[fate] if fate in _WITH_REASONS else {"": values[fate]}
            for reason, count in counts.items():
                ledger.add(fate, reason, int(count))
        if ledger.total != ledger.accounted:
            raise DamagedError(f"{where}: its ledger does not add up ({ledger})")
        return ledger

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ledger):
            return NotImplemented
        mine = {fate: +reasons for fate, reasons in self.by_reason.items()}
        theirs = {fate: +reasons for fate, reasons in other.by_reason.items()}
        return (self.kind, self.total, mine) == (other.kind, other.total, theirs)

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """``12 read: 9 stored, 1 duplicate, 2 rejected (truncated 2)``."""
        parts = []
        for fate, reasons in self.by_reason.items():
            if reasons.total() == 0 and fate != _FATES[self.kind][0]:
                continue
            detail = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common() if reason)
            parts.append(f"{reasons.total():,} {fate}" + (f" ({detail})" if detail else ""))
        return f"{self.total:,} {_TOTAL[self.kind]}: " + ", ".join(parts)


# --------------------------------------------------------------------------- progress


class Progress:
    """How far the work is: one updating line on a terminal, else a plain line every few seconds.

    Args:
        label: what is done ("ingest").
        total: how many there are, if that is known yet; ``unit``: what is counted ("photos").
        file: where to write, standard error by default; ``every``: seconds between plain lines.
        clock: seconds; a parameter for tests.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "",
        *,
        file: TextIO | None = None,
        every: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.every, self.clock = every, clock
        self.file = file if file is not None else sys.stderr
        self.done = 0
        self.note = ""
        self._rich: RichProgress | None = None
        # The rate is that since the first rows came: before them the workers were starting.
        self._first: tuple[float, int] | None = None
        self._shown = clock()
        self._printed = -1

    def __enter__(self) -> Self:
        console = Console(file=self.file)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._rich = RichProgress(*columns, console=console)
            self._rich.add_task(self.label, total=self.total, line="")
            self._rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self.done != self._printed and self._first is not None:
            self._print()

    def advance(self, count: int = 1, note: str = "") -> None:
        """``count`` more are done."""
        self.update(self.done + count, note=note)

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """``done`` are done, of ``total`` if that is news; ``note`` is shown behind."""
        now = self.clock()
        self.done, self.note = done, note
        if total is not None:
            self.total = total
        if self._first is None and done:
            self._first = (now, done)
        if self._rich is not None:
            task = self._rich.task_ids[0]
            self._rich.update(task, completed=done, total=self.total, line=self._line())
        elif now - self._shown >= self.every:
            self._print()

    def say(self, line: str) -> None:
        """A line of its own, above the updating one."""
        if self._rich is not None:
            self._rich.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.file, flush=True)

    @property
    def rate(self) -> float:
        """Units a second since the first ones were done; 0 until that can be told."""
        if self._first is None:
            return 0.0
        began, before = self._first
        seconds = self.clock() - began
        return (self.done - before) / seconds if seconds > 0 else 0.0

    def _print(self) -> None:
        print(f"{self.label}: {self._line()}", file=self.file, flush=True)
        self._shown, self._printed = self.clock(), self.done

    def _line(self) -> str:
        """``50 of 100 photos, 5.0/s, 10 s left, 3 rejected``."""
        of = f" of {self.total:,}" if self.total is not None else ""
        unit = f" {self.unit}" if self.unit else ""
        parts = [f"{self.done:,}{of}{unit}"]
        if rate := self.rate:
            parts.append(f"{rate:.1f}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


# --------------------------------------------------------------------------- whole files

_LOCK = "lock"
_REQUEST = "request.json"


def write_json_atomic(path: Path, obj: Any) -> None:
    """``obj`` as JSON under ``path``: the whole file or the one that was there before.

    Raises:
        ValueError: a number that JSON does not have (NaN, infinity).
    """
    write_bytes(path, (json.dumps(obj, indent=1, allow_nan=False) + "\n").encode())


@contextmanager
def building(out: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when the block ends without an error.

    After an error or a kill the folder stays as ``<out>.partial`` with its ``request.json``. The
    next call with the same request gets it as it is, to go on; with another one, an empty one.

    Args:
        request: plain JSON values of everything that the content depends on.

    Raises:
        UserError: ``out`` exists, or another process is making it.
    """
    if not is_local(out):
        with _building_there(out, request):
            yield out
        return
    partial = out.with_name(f"{out.name}.partial")
    _refuse_existing(out)
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another run is writing it; wait for it or stop it") from error
        _refuse_existing(out)
        if not _same_request(partial / _REQUEST, request):
            _empty(partial)
            write_json_atomic(partial / _REQUEST, request)
        yield partial
        (partial / _REQUEST).unlink()
        (partial / _LOCK).unlink()
        partial.rename(out)
        sync(out.parent)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """``folder`` for this process alone; the lock ends with the process, however it ends. An object
    store has no locks: there nothing is refused.

    Raises:
        UnavailableError: another process has it.
    """
    if not is_local(folder):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnavailableError(
                f"{folder}: another process is writing it; wait for it or stop it"
            ) from error
        yield


@contextmanager
def _building_there(out: Path, request: Mapping[str, Any]) -> Iterator[None]:
    """:func:`building` in an object store, which cannot rename: in ``out`` itself, which is being
    made while it has a ``request.json``. Its header is written last, so nobody reads it before."""
    with told(out):
        if not (out / _REQUEST).exists():
            _refuse_existing(out)
        elif not _same_request(out / _REQUEST, request):
            remove_tree(out)
    write_json_atomic(out / _REQUEST, request)
    yield
    with told(out):
        (out / _REQUEST).unlink()


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out}: exists; choose another folder or remove it")


def _empty(partial: Path) -> None:
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _same_request(file: Path, request: Mapping[str, Any]) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(found == json.loads(json.dumps(request)))


# --------------------------------------------------------------------------- versions


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, by name; a package that is missing is left out."""
    found = {"sbir_ray": sbir_ray.__version__, "python": platform.python_version()}
    for name in ("numpy", "torch", "ray", "pyarrow", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def other_versions(theirs: Mapping[str, str], names: Sequence[str] = ()) -> list[str]:
    """What of ``theirs`` is another version than here, as ``torch 2.9.0, here 2.10.0``.

    Python's patch releases, and builds of one release (+cpu, +cu128), are the same.

    Args:
        names: what to compare; all that is here by default.
    """
    own = versions()

    def same(name: str) -> bool:
        a, b = theirs.get(name, ""), own.get(name, "")
        if name == "python":
            return a.split(".")[:2] == b.split(".")[:2]
        return a.partition("+")[0] == b.partition("+")[0]

    return [
        f"{name} {theirs.get(name, 'missing')}, here {own.get(name, 'missing')}"
        for name in names or own
        if not same(name)
    ]
