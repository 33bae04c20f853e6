"""The real command as a process that can be ended, with all that it started known by a mark."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MARK = "SBIR_RAY_TEST_MARK"
"""Environment variable that a driver's processes inherit, those of its Ray too."""

_COMMAND = """
import signal
from sbir_ray.cli import main
# Processes in the background are started to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def marked(mark: str) -> list[int]:
    """Numbers of the processes with this mark that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def until(ready: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it does not hold after so many seconds.
    """
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.01)


@dataclass(frozen=True)
class Driver:
    """A driver that runs."""

    process: subprocess.Popen[bytes]
    mark: str
    said: Path
    """What it wrote to standard output and error."""

    def until(self, ready: Callable[[], bool], seconds: float = 240.0) -> None:
        """Wait for a condition while it runs."""
        until(lambda: self.process.poll() is not None or ready(), seconds, self.said.read_text())
        assert self.process.poll() is None, self.said.read_text()

    def end(self, number: signal.Signals, seconds: float = 120.0) -> int:
        """Its exit code after a signal."""
        self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = 240.0) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def assert_no_processes(self, seconds: float = 180.0) -> None:
        """Nothing of it is left, some time after it ended: agents of a Ray whose driver was killed
        go on for a minute, in which they try to say so."""
        until(lambda: not marked(self.mark), seconds, f"processes {marked(self.mark)} to end")


@contextmanager
def driving(*words: object, folder: Path, address: str = "") -> Iterator[Driver]:
    """``sbir-ray WORDS`` in a process of its own.

    Args:
        folder: for what it says.
        address: of a Ray cluster; "" lets it start a Ray of its own.
    """
    mark = uuid.uuid4().hex
    said = folder / f"{mark}.txt"
    # Short, since Ray makes sockets in it.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    (temporary / "ray").mkdir()
    # A cluster that somebody has started on this machine, who is gone: not ours to join.
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    ray = {"RAY_ADDRESS": address} if address else {"RAY_TMPDIR": str(temporary)}
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with said.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *map(str, words)],
            cwd=Path(__file__).parents[2],
            env={**others, **ray, _MARK: mark, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"},
            stdout=stream,
            stderr=stream,
        )
    try:
        yield Driver(process, mark, said)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)
