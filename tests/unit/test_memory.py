"""Page faults are counted, not timed: what is kept is not asked for again."""

import os
import platform
import subprocess
import sys

import pytest

from sbir_ray.train.memory import worker_environment

ROUNDS = """
import resource, sys, threading
import torch
from sbir_ray.train.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    def step():
        kept = [torch.ones(n) for n in (12_000_000, 4_000_000, 3_000_000, 1_000_000)]
        return sum(float(one[-1]) for one in kept)
    for _ in range(3):
        step()
    before = faults()
    for _ in range(10):
        step()
    print((faults() - before) / 10)

if "keep" in sys.argv:
    keep_freed_memory()
thread = threading.Thread(target=work)
thread.start() if "thread" in sys.argv else work()
"""


def faults(*words, **environment):
    """Page faults a step of 80 MB, which are some 20,000 pages."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    clean |= environment
    ran = subprocess.run(
        [sys.executable, "-c", ROUNDS, *words],
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_in_the_main_thread_and_in_others():
    assert faults("main") > 5_000
    assert faults("keep", "main") < 2_000
    assert faults("keep", "thread") > 5_000
    assert faults("keep", "thread", **worker_environment()) < 2_000


def test_the_users_own_choice_of_glibcs_settings_stands(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    assert worker_environment() == {}
