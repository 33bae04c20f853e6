"""Whatever is killed while photos are drawn: the same command again gives the same rows."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from ray import cloudpickle

from sbir_ray.config import SketchConfig
from sbir_ray.errors import UserError
from sbir_ray.stream.pseudo_store import account, iter_rows, read_header
from sbir_ray.stream.sketching import sketch
from tests import fake_sketcher
from tests.fake_sketcher import FakeSpec, aligned
from tests.pseudo_rows import drawn, rows_of
from tests.tiny_store import tiny_store

# Workers cannot import it.
cloudpickle.register_pickle_by_value(fake_sketcher)

CONFIG = SketchConfig(samples=2, temperature=1.0, batch_size=4)


def test_a_killed_actor_changes_no_row(tmp_path, cluster):
    store = tiny_store(tmp_path / "store", 12)
    ledger = sketch(store, tmp_path / "calm", FakeSpec(), CONFIG, actors=(1, 1))
    plans = tuple((aligned(n), f"kill {tmp_path / f'killed{n}'}") for n in (2, 7, 11))
    disturbed = sketch(store, tmp_path / "out", FakeSpec(plans=plans), CONFIG, actors=(1, 1))
    assert all((tmp_path / f"killed{n}").exists() for n in (2, 7, 11))
    assert disturbed == ledger
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "calm")


@pytest.mark.parametrize(
    "files", [1, *(pytest.param(files, marks=pytest.mark.slow) for files in (0, 2, 3, 4, 5))]
)
def test_a_killed_driver_goes_on_and_no_row_is_lost_or_twice(tmp_path, cluster, files):
    store, out = tiny_store(tmp_path / "store", 24), tmp_path / "out"
    ledger = sketch(store, tmp_path / "calm", FakeSpec(), CONFIG)
    slow = FakeSpec(seconds=0.1)
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.drive_sketch", str(store), str(out), str(slow.seconds)],
        env={**os.environ, "RAY_ADDRESS": cluster.get_runtime_context().gcs_address},
    )
    try:
        end = time.monotonic() + 120
        begun = out / "round-0000" / "request.json"
        while not begun.exists() or len(list(begun.parent.glob("part-*"))) < files:
            assert driver.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(UserError, match="out: another run is writing it"):
            sketch(store, out, slow, CONFIG)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert not (out / "pseudo.json").exists()
    assert 4 * files <= len(drawn(out)[0]) < 24
    assert sketch(store, out, slow, CONFIG) == ledger
    assert rows_of(out) == rows_of(tmp_path / "calm")
    assert account(out, read_header(out)) == ledger
    assert sum(1 for _ in iter_rows(out, kept_only=False)) == 48
    assert json.loads((out / "pseudo.json").read_text())["ledger"] == ledger.to_json()
