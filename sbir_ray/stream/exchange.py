"""Where the generators and the learners meet: who may draw, who gets what, what became of it.

The photos of a live stream are drawn in batches of so many tickets, batch number n those from
n * batch on. A batch goes from hand to hand: granted to the source, drawn by a generator, given to
a learner that asks, opened and finished by it. The number of batches between the first and the last
of these is limited (the window): so the learners' demand reaches the source, and a drawing can be
only so old. Ray's own limits count bytes, and would let thousands of rows wait.

Plain Python with threads, run as an actor by :mod:`sbir_ray.stream.live`. Calls that wait come back
after their ``patience`` with nothing, to be made again.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sbir_ray.runlog import Ledger

Fate = tuple[str, str]
"""What became of a row: ``used``, ``filtered`` or ``stale``; and the reason if it was filtered."""
LOST: Fate = ("filtered", "lost")
"""Of a row whose learner died before it said."""


class Begun(NamedTuple):
    """What a generator is told at the start of a batch."""

    tries: int
    """How often the batch was begun, this time included."""
    serial: int
    """Number of the newest publication."""
    version: int
    weights: list[Any]
    """Reference to the newest weights, or [] if the generator has them, or there are none yet."""


class Given(NamedTuple):
    """What a learner gets that asks for a batch."""

    batch: list[Any]
    """Reference to the batch, or [] if there is none yet."""
    trouble: str
    """Why there will be none any more."""


class Exchange:
    """The account of a live stream.

    References to Ray's objects come in lists: Ray would replace a bare one by its object.

    Args:
        window: batches that may be under way or with the learners at once.
        batch: rows of each.
        first: ticket of the first row.
    """

    def __init__(self, window: int, batch: int, first: int = 0) -> None:
        self.window, self.batch, self.first = window, batch, first
        self._changed = threading.Condition()
        self._closed = ""
        self.ended = threading.Event()
        self._granted = 0
        self._order: list[int] = []
        """Numbers of batches as they were granted; those granted again are here again."""
        self._unfinished: set[int] = set()
        self._unopened: set[int] = set()
        self._begun: Counter[int] = Counter()
        self._ready: deque[list[Any]] = deque()
        # By rank: which of its processes counts, what it was given and not yet opened, what it has.
        self._sessions: Counter[int] = Counter()
        self._on_the_way: Counter[int] = Counter()
        self._held: dict[int, int] = {}
        self._lost = 0
        self._in_flight: dict[int, int] = {}
        """Rank by ticket; -1 before a learner has it."""
        self._fates: Counter[Fate] = Counter()
        self._serial, self._version = 0, 0
        self._weights: list[Any] = []

    # ----------------------------------------------------------------------- the source

    def take(self, place: int, patience: float) -> list[int] | None:
        """Wait for the numbers of batches to draw, from the ``place``-th that was granted on.

        A source that was started again asks from the first on, and gets the same numbers.

        Returns:
            [] if none is granted yet, None when the stream is closed.
        """
        with self._changed:
            self._wait(lambda: place < len(self._order) or self._room(), patience)
            if self._closed:
                return None
            if place == len(self._order) and self._room():
                number = self._granted
                self._granted += 1
                self._order.append(number)
                self._unfinished.add(number)
                self._unopened.add(number)
                self._in_flight |= dict.fromkeys(self._tickets(number), -1)
            return self._order[place:]

    def repeat(self) -> None:
        """Grant again all that no learner has: a node is lost, and who knows what was there. What
        comes twice is opened once."""
        with self._changed:
            self._order += sorted(self._unopened)
            self._begun.clear()  # it was not they that ended their processes
            self._changed.notify_all()

    def _room(self) -> bool:
        # What died on the way to a learner is never finished.
        return len(self._unfinished) - self._lost < self.window

    # ----------------------------------------------------------------------- the generators

    def begin(self, number: int, serial: int) -> Begun | None:
        """What a generator that has publication ``serial`` needs to know before it draws a batch;
        None when a learner has it already, or the stream is closed."""
        with self._changed:
            if self._closed or number not in self._unopened:
                return None
            self._begun[number] += 1
            news = serial != self._serial
            return Begun(
                self._begun[number], self._serial, self._version, self._weights if news else []
            )

    def deliver(self, batch: list[Any]) -> None:
        """A batch is drawn: keep its reference for the learner that asks first."""
        with self._changed:
            self._ready.append(batch)
            self._changed.notify_all()

    # ----------------------------------------------------------------------- the learners

    def attach(self, rank: int) -> int:
        """A learner's process begins to ask as ``rank``; what an earlier one had is lost.

        Returns:
            The number of its session.
        """
        with self._changed:
            self._sessions[rank] += 1
            self._lost += self._on_the_way.pop(rank, 0)
            self._finish(rank)
            mine = [ticket for ticket, holder in self._in_flight.items() if holder == rank]
            self._settle(dict.fromkeys(mine, LOST))
            self._changed.notify_all()
            return self._sessions[rank]

    def give(self, rank: int, session: int, patience: float) -> Given:
        """Wait for the next batch. The learner has no row left of the one it had."""
        with self._changed:
            self._finish(rank)
            self._wait(lambda: bool(self._ready), patience)
            if self._closed:
                return Given([], self._closed)
            if not self._ready or session != self._sessions[rank]:
                return Given([], "")
            self._on_the_way[rank] += 1
            return Given(self._ready.popleft(), "")

    def opened(self, rank: int, session: int, number: int) -> bool:
        """A learner has a batch.

        Returns:
            Whether it is the first to have it: a generator's death may bring a batch twice.
        """
        with self._changed:
            if session != self._sessions[rank]:
                return False
            self._on_the_way[rank] -= 1
            if number not in self._unopened:
                return False
            self._unopened.remove(number)
            self._begun.pop(number, None)
            self._held[rank] = number
            self._in_flight |= dict.fromkeys(self._tickets(number), rank)
            return True

    def account(self, fates: Mapping[int, Fate]) -> None:
        """What became of rows, by ticket. A row has one fate: the first that was told."""
        with self._changed:
            self._settle(fates)

    def publish(self, version: int, weights: list[Any]) -> None:
        """Newer weights, by reference, of this version."""
        with self._changed:
            self._serial += 1
            self._version, self._weights = version, weights

    # ----------------------------------------------------------------------- the account

    def ledger(self) -> dict[str, Any]:
        """The ledger of kind ``live``, checked: drawn = used + filtered + stale + in flight."""
        with self._changed:
            found = Ledger("live", self._granted * self.batch)
            for (fate, reason), count in self._fates.items():
                found.add(fate, reason, count)
            found.add("in_flight", count=len(self._in_flight))
            return found.to_json()

    def end(self, trouble: str) -> None:
        """No batch is drawn any more; the learners are told why."""
        with self._changed:
            self._closed = self._closed or trouble
            self.ended.set()
            self._changed.notify_all()

    def _tickets(self, number: int) -> range:
        start = self.first + number * self.batch
        return range(start, start + self.batch)

    def _finish(self, rank: int) -> None:
        number = self._held.pop(rank, None)
        if number is not None:
            self._unfinished.discard(number)
            self._changed.notify_all()

    def _settle(self, fates: Mapping[int, Fate]) -> None:
        for ticket, fate in fates.items():
            if self._in_flight.pop(ticket, None) is not None:
                self._fates[fate] += 1

    def _wait(self, ready: Callable[[], bool], patience: float) -> None:
        self._changed.wait_for(lambda: bool(self._closed) or ready(), patience)
