"""SIGTERM, which ``ray job stop`` sends to the driver three seconds before it kills it.

The driver leaves a file in the run folder, which the workers see wherever they run; they save the
run after the step under way and end.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sbir_ray.places import write_bytes

FILE = "stop"
_EVERY = 0.2
"""Seconds between two looks at the file."""


@dataclass
class StopRequest:
    """Whether the run of a folder was asked to end."""

    file: Path
    _made: bool = False
    _next: float = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._made and now >= self._next:
            self._made, self._next = self.file.exists(), now + _EVERY
        return self._made


@contextmanager
def listening(file: Path) -> Iterator[None]:
    """While in the block, a first SIGTERM makes ``file`` and does nothing else; a second one ends
    this process. Outside the main thread signals are left as they are.
    """
    file.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # A thread is woken at once; a handler in Python would wait for the main thread, which may be
    # waiting within Ray.
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait() -> None:
        while data := reader.recv(64):
            if signal.SIGTERM in data:
                write_bytes(file, b"")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    asked = 0

    def handle(*_: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handle)
    woken = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        writer.close()
        thread.join()
        reader.close()
        file.unlink(missing_ok=True)
