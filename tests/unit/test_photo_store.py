"""The photo store as it grows: added to, tried again, cut off at any write, and by one at a time.

The tasks run in this process; that Ray runs them well is tested in tests/ray."""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.errors import UserError
from sbir_ray.runlog import Ledger
from sbir_ray.stream import ingest as ingestion
from sbir_ray.stream.ingest import ingest
from tests.faults.corpus import encoded, scene
from tests.inline_tasks import inline_tasks
from tests.tiny import tiny_pairs


@pytest.fixture(autouse=True)
def without_ray() -> Iterator[None]:
    with inline_tasks():
        yield


def put(folder: Path, *numbers: int, kind: str = "PNG") -> None:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        data = encoded(scene(number), kind)
        (folder / f"{number:04d}.{kind.lower()}").write_bytes(data)


def rows(store: Path) -> list[dict[str, Any]]:
    """All that is stored and all that is said of it, without what differs from run to run."""
    return [
        *photos.read_store(store),
        *pq.read_table(store / "ledger.parquet").to_pylist(),
        *pq.read_table(store / "plan.parquet").to_pylist(),
        *pq.read_table(store / "shards.parquet").to_pylist(),
    ]


def names(store: Path) -> dict[str, str]:
    table = pq.read_table(store / "ledger.parquet").to_pylist()
    return {os.path.basename(row["uri"]): row["status"] for row in table}


def test_what_is_added_is_read_alone_and_compared_with_what_is_stored(tmp_path: Path) -> None:
    store, source = tmp_path / "store", tmp_path / "photos"
    put(source, *range(1, 8))
    (source / "bad.png").write_bytes(b"no")
    ingest([source], store, IngestConfig(shard_rows=3))
    before = {row["photo_id"]: row for row in photos.read_store(store)}
    shards = {path.name: path.read_bytes() for path in photos.shards(store)}

    put(source, *range(6, 12))
    put(source, 2, kind="BMP")
    # Read before, so not again, whatever they are now.
    (source / "0001.png").write_bytes(b"changed")
    ledger = ingest([source], store, add=True)
    assert ledger == Ledger.from_json(
        "photos",
        {
            "read": 13,
            "stored": 11,
            "duplicate": 1,
            "leaked": 0,
            "rejected": {"not-an-image": 1},
            "failed": {},
            "quarantined": 0,
        },
        "here",
    )
    after = {row["photo_id"]: row for row in photos.read_store(store)}
    assert before.items() <= after.items()
    assert len(after) == 11
    assert names(store)["0002.bmp"] == "duplicate"
    (twin,) = [r for r in pq.read_table(store / "ledger.parquet").to_pylist() if r["of"]]
    assert after[twin["of"]]["name"] == "0002"
    grown = {path.name: path.read_bytes() for path in photos.shards(store)}
    assert shards.items() <= grown.items()
    assert [pq.read_metadata(path).num_rows for path in photos.shards(store)] == [2, 2, 3, 2, 2]

    again = ingest([source], store, add=True)
    assert again == ledger
    header = photos.store_header(store)
    assert [run["read"] for run in header["runs"]] == [8, 5, 0]
    assert header["shards"]["photos"] == 11
    assert sorted(os.listdir(tmp_path)) == ["photos", "store"]


def test_what_failed_is_tried_again_and_accounted_for_in_its_place(tmp_path: Path) -> None:
    store, source = tmp_path / "store", tmp_path / "photos"
    put(source, 1, 2, 3)
    for name in ("0000.png", "0005.png", "0009.png"):
        (source / name).symlink_to("nowhere")
    (source / "bad.png").write_bytes(b"no")
    first = ingest([source], store)
    assert (first.count("stored"), first.by_reason["failed"]) == (3, {"unreadable": 3})
    before = pq.read_table(store / "ledger.parquet").to_pylist()
    for name, number in (("0005.png", 5), ("0009.png", 2)):
        (source / name).unlink()
        (source / name).write_bytes(encoded(scene(number), "PNG"))

    second = ingest([], store, retry_failed=True)
    assert (second.total, second.count("stored"), second.count("duplicate")) == (7, 4, 1)
    assert second.by_reason["failed"] == {"unreadable": 1}
    after = pq.read_table(store / "ledger.parquet").to_pylist()
    assert [row["uri"] for row in after] == [row["uri"] for row in before]
    changed = {os.path.basename(a["uri"]) for a, b in zip(after, before, strict=True) if a != b}
    assert changed == {"0005.png", "0009.png"}
    put(source, 9)
    assert ingest([], store, retry_failed=True) == second
    assert ingest([source], store, add=True).total == 7


def test_a_photo_of_a_shard_is_tried_again_alone(tmp_path: Path) -> None:
    def failing(data: bytes, name: str, uri: str, limits: photos.PhotoLimits) -> photos.PhotoRow:
        if uri.endswith(("#0.3", "#0.70")):
            raise MemoryError
        return photos.make_row(data, name, uri, limits)

    data = [encoded(scene(number), "PNG") for number in range(80)]
    pq.write_table(pa.table({"image": data}), tmp_path / "a.parquet")
    ledger = ingest([tmp_path / "a.parquet"], tmp_path / "store", make_row=failing)
    assert ledger.by_reason["failed"] == {"error-MemoryError": 2}
    asked = []

    def counting(data: bytes, name: str, uri: str, limits: photos.PhotoLimits) -> photos.PhotoRow:
        asked.append(uri.rpartition("#")[2])
        return photos.make_row(data, name, uri, limits)

    ledger = ingest([], tmp_path / "store", retry_failed=True, make_row=counting)
    assert (ledger.count("stored"), asked) == (80, ["0.3", "0.70"])


def test_what_was_excluded_stays_excluded_when_a_store_is_added_to(tmp_path: Path) -> None:
    from tests.tiny import photo

    pairs = tiny_pairs(tmp_path / "pairs", train=2, val=0, test=2, hands=1)
    put(tmp_path / "a", 1)
    ingest([tmp_path / "a"], tmp_path / "store", exclude=[pairs])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "test.png").write_bytes(encoded(photo(3), "PNG"))
    assert ingest([tmp_path / "b"], tmp_path / "store", add=True).count("leaked") == 1
    train = tiny_pairs(tmp_path / "none", train=2, val=0, test=0, hands=1)
    with pytest.raises(UserError, match="has no validation or test photos to exclude"):
        ingest([tmp_path / "a"], tmp_path / "other", exclude=[train])
    with pytest.raises(UserError, match="neither a PAIRS nor a PHOTOS folder"):
        ingest([tmp_path / "a"], tmp_path / "other", exclude=[tmp_path / "b"])


def test_other_settings_than_those_of_the_store_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a", 1)
    ingest([tmp_path / "a"], tmp_path / "store", IngestConfig(longest=64))
    with pytest.raises(UserError, match="other settings"):
        ingest([tmp_path / "a"], tmp_path / "store", IngestConfig(longest=65), add=True)
    for config in (None, IngestConfig(), IngestConfig(longest=64)):
        ingest([tmp_path / "a"], tmp_path / "store", config, add=True)
    with pytest.raises(UserError, match="exists"):
        ingest([tmp_path / "a"], tmp_path / "store")
    with pytest.raises(UserError, match="not a photo store"):
        ingest([tmp_path / "a"], tmp_path / "none", add=True)


def test_two_runs_at_once_are_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    put(tmp_path / "a", 1, 2)
    store = tmp_path / "store"
    (tmp_path / "store.partial").mkdir()
    with (tmp_path / "store.partial" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing it"):
            ingest([tmp_path / "a"], store)
    ingest([tmp_path / "a"], store)
    with (tmp_path / ".store.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing it"):
            ingest([tmp_path / "a"], store, add=True)
    # The file of a run that was killed is there, and nobody holds it.
    assert (tmp_path / ".store.lock").exists()
    assert ingest([tmp_path / "a"], store, add=True).total == 2


def test_too_many_bad_photos_end_it_with_the_reasons_and_store_nothing(tmp_path: Path) -> None:
    put(tmp_path / "a", 1, 2)
    (tmp_path / "a" / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"1 of 3 photos cannot be used \(not-an-image 1\).*first"):
        ingest([tmp_path / "a"], tmp_path / "store", IngestConfig(max_reject_rate=0.2))
    assert not (tmp_path / "store").exists()
    assert ingest([tmp_path / "a"], tmp_path / "store").count("stored") == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bad.png").write_bytes(b"no")
    with pytest.raises(UserError, match="no photo is left to store"):
        ingest([tmp_path / "b"], tmp_path / "other")


def test_a_store_and_the_photos_of_pairs_go_through_unchanged(tmp_path: Path) -> None:
    pairs = tiny_pairs(tmp_path / "pairs", train=3, val=1, test=1, hands=1)
    put(tmp_path / "a", 1, 2)
    ingest([tmp_path / "a"], tmp_path / "one")
    ledger = ingest([tmp_path / "one", pairs], tmp_path / "two")
    assert (ledger.count("stored"), ledger.count("leaked")) == (5, 2)
    before = {row["photo_id"]: row for row in photos.read_store(tmp_path / "one")}
    after = {row["photo_id"]: row for row in photos.read_store(tmp_path / "two")}
    assert before.items() <= after.items()


# --------------------------------------------------------------------------- cut off anywhere


class _Full(io.FileIO):
    """A file of a disk that takes no more than so many writes, counted over all its files."""

    left: int | None = None

    def write(self, data: Any) -> int:
        if _Full.left is not None:
            if not _Full.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _Full.left -= 1
        return super().write(data)


@contextmanager
def disk_full_after(writes: int, under: Path) -> Iterator[None]:
    """Every write under ``under`` but the first so many fails."""
    real = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        is_there = isinstance(file, str | Path) and str(file).startswith(str(under))
        if not is_there or not set(mode) & set("wa+"):
            return real(file, mode, *args, **options)
        raw = _Full(str(file), mode.replace("b", "").replace("t", ""))
        stream = io.BufferedWriter(raw, 1)
        return stream if "b" in mode else io.TextIOWrapper(stream, write_through=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        _Full.left = writes
        yield
    _Full.left = None


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_at_any_write_is_told_and_the_same_call_goes_on(tmp_path: Path) -> None:
    put(tmp_path / "a", *range(1, 6))
    put(tmp_path / "b", *range(4, 9))
    whole = tmp_path / "whole" / "store"
    whole.parent.mkdir()
    ingest([tmp_path / "a"], whole)
    first = rows(whole)
    ingest([tmp_path / "b"], whole, add=True)
    stopped = 0
    for writes in [*range(0, 36, 3), *range(36, 400, 40)]:
        store = tmp_path / str(writes) / "store"
        store.parent.mkdir()
        ended = 0
        for add, source, expected in ((False, "a", first), (True, "b", rows(whole))):
            with disk_full_after(writes, store.parent):
                said = error_of(partial(ingest, [tmp_path / source], store, add=add))
            if said:
                assert "No space left on device" in said
                assert store.exists() == add
                ended += 1
                if add:
                    assert rows(store) == first
                ingest([tmp_path / source], store, add=add)
            assert rows(store) == expected
        assert os.listdir(store.parent) == ["store"] or ended
        stopped += ended
        if not ended:
            break
    assert not ended
    assert stopped >= 10


@pytest.mark.parametrize("point", range(4))
def test_a_stop_between_any_two_steps_of_adding_loses_nothing(
    tmp_path: Path, point: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renames that put the new state in place, and the clearing up after them."""
    put(tmp_path / "a", 1, 2, 3)
    put(tmp_path / "b", 3, 4)
    whole, store = tmp_path / "whole", tmp_path / "store"
    for out in (whole, store):
        ingest([tmp_path / "a"], out)
    ingest([tmp_path / "b"], whole, add=True)
    count = 0
    real_rename, real_remove = Path.rename, ingestion.shutil.rmtree

    def stop() -> None:
        nonlocal count
        count += 1
        if count > point:
            raise KeyboardInterrupt

    def rename(self: Path, target: Path) -> Path:
        stop()
        return real_rename(self, target)

    def remove(path: Any, *args: Any, **options: Any) -> None:
        if str(path).startswith(str(store)) and (Path(path).parent / "store.json").exists():
            stop()
        real_remove(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(ingestion.shutil, "rmtree", remove)
        with pytest.raises(KeyboardInterrupt):
            ingest([tmp_path / "b"], store, add=True)
    ingest([tmp_path / "b"], store, add=True)
    assert rows(store) == rows(whole)
    assert len(json.loads((store / "store.json").read_text())["runs"]) >= 2
    left = {name for name in os.listdir(tmp_path) if name.startswith((".store", "store"))}
    assert left == {"store"}


def test_scenes_of_these_tests_are_no_duplicates() -> None:
    hashes = np.array([photos.phash(scene(number)) for number in range(80)])
    distance = photos.hash_distance(hashes[:, None], hashes[None])
    assert distance[~np.eye(80, dtype=bool)].min() > 2
