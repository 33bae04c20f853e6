"""The journal that tells which row killed a process."""

import subprocess
import sys

from sbir_ray.places import place
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


def test_in_an_object_store_rows_are_noted_once_a_process_has_ended_at_the_block(tmp_path):
    file = place(f"memory://{tmp_path.name}/000000")
    left_open = []
    for deaths in (0, 0, 1, 2):
        attempts = Attempts(file)
        assert [attempts.deaths(key) for key in "abc"] == [0, deaths, 0]
        with attempts.working_on("a"):
            pass
        left_open.append(attempts.working_on("b"))
        left_open[-1].__enter__()  # and the process ends
    assert len(list(file.iterdir())) == 4
