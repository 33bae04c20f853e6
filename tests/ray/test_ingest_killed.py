"""SIGKILL at any point of an ingestion, then the same call: the store of an undisturbed run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sbir_ray.data import photos
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.photo_checks import verify
from tests.faults.corpus import encoded, scene
from tests.faults.killed_ingest import CONFIG, POINTS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """150 photos, more than one task reads, with copies and bad ones among them."""
    folder = tmp_path_factory.mktemp("killed")
    for number in range(140):
        (folder / f"{number:03d}.png").write_bytes(encoded(scene(number), "PNG"))
    for number in range(5):
        (folder / f"copy{number}.jpg").write_bytes(encoded(scene(number), "JPEG", quality=90))
        (folder / f"bad{number}.png").write_bytes(b"no photo")
    return folder


def rows(store):
    """All that a store says, but when and how fast it was made."""
    tables = ("ledger", "plan", "shards")
    return [
        *photos.read_store(store),
        *(row for name in tables for row in pq.read_table(store / f"{name}.parquet").to_pylist()),
    ]


def run(way, source, out, *points):
    command = [sys.executable, "-m", "tests.faults.killed_ingest", way, source, out, *points]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def check(source, out, points):
    whole = rows(out / "whole")
    assert len({row["photo_id"] for row in photos.read_store(out / "whole")}) == 140
    for point in points:
        store = out / point.replace(":", "-")
        assert rows(store) == whole, point
        assert not verify(store)["problems"], point
    assert sorted(os.listdir(out)) == sorted(["whole", *(p.replace(":", "-") for p in points)])


def test_a_driver_killed_at_any_of_ten_points_loses_nothing(tmp_path, source):
    run("inline", source, tmp_path)
    run("inline", source, tmp_path, *POINTS)
    check(source, tmp_path, POINTS)


def test_workers_that_are_killed_cost_nothing(tmp_path, source, cluster):
    run("inline", source, tmp_path)

    def killed_once(data, name, uri, limits):
        once = tmp_path / "flags" / name
        if name in ("020", "090", "139") and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return photos.make_row(data, name, uri, limits)

    (tmp_path / "flags").mkdir()
    ingest([source], tmp_path / "worker", CONFIG, make_row=killed_once)
    assert len(os.listdir(tmp_path / "flags")) == 3
    assert rows(tmp_path / "worker") == rows(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_driver_of_a_cluster_killed_at_any_of_ten_points_loses_nothing(tmp_path, source, point):
    run("inline", source, tmp_path)
    run("ray", source, tmp_path, point)
    check(source, tmp_path, [point])
