"""The journal that tells which row killed a process."""

import subprocess
import sys

from sbir_ray.stream.attempts import Attempts

WORKER = """
import os, sys
from pathlib import Path
from sbir_ray.stream.attempts import Attempts
attempts = Attempts(Path(sys.argv[1]))
for key in "abc":
    with attempts.working_on(key):
        if key == "b":
            os._exit(139)
"""


def test_the_row_at_which_a_process_ended_is_counted_and_no_other(tmp_path):
    file = tmp_path / "journals" / "000000"
    for deaths in range(3):
        attempts = Attempts(file)
        assert [attempts.deaths(key) for key in "abc"] == [0, deaths, 0]
        attempts.close()
        assert subprocess.run([sys.executable, "-c", WORKER, str(file)]).returncode == 139


def test_an_exception_is_no_death(tmp_path):
    attempts = Attempts(tmp_path / "a")
    try:
        with attempts.working_on("x"):
            raise ValueError
    except ValueError:
        pass
    attempts.close()
    assert Attempts(tmp_path / "a").deaths("x") == 0
