"""A soak: training, half of the time cached and half of it joint, while processes are SIGKILLed at
random.

``python -m tests.faults.soak --minutes 30 --seed 0`` prints a line for each kill, a line for each
run that came to its end, and a summary; it ends with 0 when each run trained every step once, the
accounts of the joint ones add up, and the cached ones have the weights of a run that nothing
disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sbir_ray import checkpoint
from sbir_ray.config import FilterConfig, OptimConfig, SaveConfig
from sbir_ray.errors import SbirError
from sbir_ray.joint_config import ScheduleConfig, StreamConfig
from sbir_ray.stream.cluster import connect
from sbir_ray.train.job import Job
from sbir_ray.train.launch import Actors, train
from sbir_ray.train.tasks import joint_jobs
from tests.faults.calm import assert_same_weights
from tests.faults.kit import DRAWS, TRAINS, alive, assert_ledger, assert_no_orphans
from tests.tiny import joint_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

BETWEEN = 5.0, 45.0
"""Seconds from one kill to the next: some come while what was killed before is starting again."""
PATIENCE = 900.0
"""Seconds after the last kill in which all has to be done."""
CACHED_STEPS, JOINT_STEPS = 120, 90


class Soak:
    """What is trained, and what was killed.

    Args:
        folder: empty, for all that is made.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.began = time.monotonic()
        self.end = 0.0
        """Of the kills that go on, in ``time.monotonic()``."""
        self.killed: Counter[str] = Counter()
        self.again = 0
        """Launches that gave up after several deaths without a checkpoint in between."""
        pairs = str(tiny_pairs(folder / "pairs"))
        self.cached = Job(
            "retrieval",
            str(folder / "calm"),
            retrieval_config(
                optim=OptimConfig(steps=CACHED_STEPS, batch_size=4, lr=1e-3),
                save=SaveConfig(log_every=1, checkpoint_every=5),
            ),
            {"pairs": pairs},
        )
        config = joint_config(
            schedule=ScheduleConfig(steps=JOINT_STEPS, retrieval_steps=2, generator_steps=1),
            filters=FilterConfig(min_points=1),
            stream=StreamConfig(batch_size=4, window=2, max_staleness=3, wait_limit=120.0),
        )
        photos = str(tiny_store(folder / "photos", 9))
        *before, self.joint = joint_jobs(
            str(folder / "first"), config, {"pairs": pairs, "photos": photos}
        )
        train(before, workers=0)
        train([self.cached], workers=2, cpus_per_worker=1.0)
        self.say(f"the undisturbed run has taken its {CACHED_STEPS} steps")

    def say(self, line: str) -> None:
        """A line with the time since the beginning."""
        minutes = (time.monotonic() - self.began) / 60
        print(f"{minutes:5.1f} min  {line}", file=sys.__stdout__, flush=True)

    def disturbed(self, kind: str, number: int) -> None:
        """One run, from its beginning to its end, and what has to hold then."""
        job = dataclasses.replace(
            self.cached if kind == "cached" else self.joint,
            out=str(self.folder / f"{kind}-{number}"),
        )
        run = Path(job.out)
        before = self.killed.total()
        with self.killing(run, (TRAINS,) if kind == "cached" else (TRAINS, DRAWS)):
            while True:
                try:
                    workers = 2 if kind == "cached" else 1
                    train([job], workers=workers, cpus_per_worker=1.0, actors=Actors(1, 1))
                    break
                except SbirError as error:
                    if "without getting further" not in str(error):
                        raise
                    self.again += 1
                    self.say(f"{run.name}: given up ({error}); the same call again")
        assert_no_orphans()
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if line["kind"] == "step"]
        assert steps == list(range(1, len(steps) + 1))
        if kind == "cached":
            assert len(steps) == CACHED_STEPS
            assert_same_weights(run, self.folder / "calm")
            told = "the weights of the undisturbed run"
        else:
            assert len(steps) == JOINT_STEPS
            ledger = assert_ledger(run)
            told = ", ".join(f"{k} {ledger[k]}" for k in ("drawn", "used", "stale", "in_flight"))
            told += f", filtered {ledger['filtered']}"
        self.say(f"{run.name}: done after {self.killed.total() - before} kills, with {told}")

    @contextmanager
    def killing(self, run: Path, parts: tuple[str, ...]) -> Iterator[None]:
        """While in the block, and until the end: one actor after another, at random."""
        over = threading.Event()

        def work() -> None:
            pause = self.rng.uniform(*BETWEEN)
            while not over.wait(pause) and time.monotonic() < self.end:
                found = [actor for part in parts for actor in alive(part)]
                if not found:
                    pause = 1.0
                    continue
                pause = self.rng.uniform(*BETWEEN)
                actor = self.rng.choice(found)
                step = max((entry.step for entry in checkpoint.listed(run)), default=0)
                try:
                    os.kill(actor["Pid"], signal.SIGKILL)
                except ProcessLookupError:  # it has ended meanwhile
                    continue
                what = "worker" if TRAINS in actor["ActorClassName"] else "generator"
                self.killed[what] += 1
                self.say(f"{run.name}: {what} {actor['Pid']} killed, newest checkpoint {step}")

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    # Whatever hangs, hangs no longer than this, and is shown.
    faulthandler.dump_traceback_later(60 * asked.minutes + PATIENCE, exit=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nothing,
        # What Ray has to say of each death.
        contextlib.redirect_stdout(nothing),
        connect(num_cpus=4),
    ):
        soak = Soak(Path(folder), asked.seed)
        runs: Counter[str] = Counter()
        for kind in ("cached", "joint"):
            soak.end = time.monotonic() + 30 * asked.minutes
            while time.monotonic() < soak.end:
                runs[kind] += 1
                soak.disturbed(kind, runs[kind])
        soak.say(
            f"{runs['cached']} cached and {runs['joint']} joint runs ended well: "
            f"{soak.killed['worker']} workers and {soak.killed['generator']} generators killed, "
            f"{soak.again} launches given up and repeated"
        )


if __name__ == "__main__":
    main()
