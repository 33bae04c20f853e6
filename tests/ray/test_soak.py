"""A short soak; the long one is a command of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_minutes_of_random_kills():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.soak", "--minutes", "2", "--seed", "1"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    assert sum(" killed, newest checkpoint " in line for line in lines) >= 1
    assert re.search(r"\d+ cached and \d+ joint runs ended well", last)
