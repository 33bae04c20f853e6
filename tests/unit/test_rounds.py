"""Rounds of pseudo pairs: only what changes is drawn, jobs share one, one run at a time."""

import errno
import itertools
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from sbir_ray.config import FilterConfig, SketchConfig
from sbir_ray.errors import UserError
from sbir_ray.runlog import write_json_atomic
from sbir_ray.stream import cluster, sketching
from sbir_ray.stream.pseudo_rounds import forget_old, read_shard, writing
from sbir_ray.stream.pseudo_store import iter_rows, read_header
from sbir_ray.stream.sketch_actor import SketchActor, write_rows
from sbir_ray.stream.sketch_blocks import read_photos
from sbir_ray.stream.sketching import sketch
from tests.fake_sketcher import SIDE, FakeSpec, aligned
from tests.pseudo_rows import drawn, rows_of
from tests.tiny_store import tiny_store

CONFIG = SketchConfig(samples=2, temperature=1.0, batch_size=4)


class Here:
    """The pipeline's parts one after the other, without Ray."""

    def __init__(self, plan, this, spec, author, ranker, config, actors):
        self.plan, self.config, self.folder = plan, config, str(this.folder)
        known = {"settings_digest": this.request["settings_digest"], "round_number": this.number}
        self.actor = SketchActor(spec, config, self.folder, ranker, **known)

    def iter_batches(self, **_):
        for block in self.plan:
            photos = self.actor(read_photos(block.to_table(), [SIDE]))
            yield write_rows(photos, self.folder, self.config.choice)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(sketching, "_pipeline", Here)
    monkeypatch.setattr(cluster, "ensure_fits", lambda *_, **__: 2)
    monkeypatch.setattr(sketching, "quiet_data", lambda: None)


def test_a_round_draws_only_what_changes(tmp_path, here):
    out, few = tmp_path / "out", tiny_store(tmp_path / "few", 9)
    more = tiny_store(tmp_path / "more", 14, shard=5)
    first = sketch(few, out, FakeSpec(), CONFIG)
    assert first.total == 18
    before = rows_of(out)

    # Nothing, and nothing.
    assert sketch(few, out, FakeSpec(), CONFIG) == first
    strict = SketchConfig(
        samples=2, temperature=1.0, batch_size=4, filters=FilterConfig(min_certainty=0.6)
    )
    filtered = sketch(few, out, FakeSpec(), strict)
    assert filtered.by_reason["filtered"]["min_certainty"] > 0
    assert len(read_header(out)["rounds"]) == 1
    assert sketch(few, out, FakeSpec(), CONFIG) == first

    # New photos alone, then all again by another generator, then none by the first one.
    names = [{f"photo{n:02d}" for n in range(*part)} for part in ((9,), (9, 14), (14,))]
    ledger = sketch(more, out, FakeSpec(), CONFIG)
    assert drawn(out) == names[:2]
    assert ledger.total == 28
    everything = rows_of(out)
    assert len(everything) == 28
    assert {key: everything[key] for key in before} == before
    other = FakeSpec(version=4, digest="beef")
    sketch(more, out, other, CONFIG)
    assert drawn(out) == names
    assert {row["generator_version"] for row in rows_of(out).values()} == {4}
    again = sketch(more, out, FakeSpec(), CONFIG)
    assert drawn(out) == [*names, set()]
    assert (again, rows_of(out)) == (ledger, everything)

    # Photos that the store has no more; and a folder drawn at once has the same rows.
    assert sketch(few, out, FakeSpec(), CONFIG) == first
    assert rows_of(out) == before
    sketch(more, tmp_path / "once", FakeSpec(), CONFIG)
    alone = rows_of(tmp_path / "once", without=["round"])
    assert {k: {**v, "round": 0} for k, v in alone.items()} == {
        k: {**v, "round": 0} for k, v in everything.items()
    }


def test_what_failed_by_an_error_is_drawn_once_more_by_the_same_call(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 9)
    broken = FakeSpec(plans=((aligned(2), "raise"), (aligned(7), "raise"), (aligned(4), "nothing")))
    first = sketch(store, out, broken, CONFIG)
    assert first.by_reason["failed"] == {"error-ArithmeticError": 4, "nothing-to-draw": 2}

    # What keeps failing is left alone after that; what has no strokes has none the next time.
    again = FakeSpec(plans=((aligned(7), "raise"), (aligned(4), "nothing")))
    second = sketch(store, out, again, CONFIG)
    assert second.total == first.total == 18
    assert second.by_reason["failed"] == {"error-ArithmeticError": 2, "nothing-to-draw": 2}
    everything = {f"photo{n:02d}" for n in range(9)}
    assert drawn(out) == [everything, {"photo02", "photo07"}]
    assert len(rows_of(out)) == 18
    assert sketch(store, out, FakeSpec(), CONFIG) == second
    assert len(drawn(out)) == 2

    # Photos that failed and that the store has no more are not seen.
    gone = tmp_path / "gone"
    sketch(store, gone, FakeSpec(plans=((aligned(7), "raise"),)), CONFIG)
    few = tiny_store(tmp_path / "seven", 7)
    assert sketch(few, gone, FakeSpec(), CONFIG).total == 14
    assert len(rows_of(gone)) == 14
    assert sketch(store, gone, FakeSpec(), CONFIG).by_reason.get("failed", {}) == {}
    assert len(rows_of(gone)) == 18

    # As if nothing had failed; and another store hides and shows what was drawn again too.
    sketch(store, tmp_path / "once", again, CONFIG)
    plain = ["round"]
    assert rows_of(out, plain) == rows_of(tmp_path / "once", plain)
    sketch(tiny_store(tmp_path / "few", 3), out, FakeSpec(), CONFIG)
    assert {name for name, _ in rows_of(out)} == {"photo00", "photo01", "photo02"}
    assert sketch(store, out, FakeSpec(), CONFIG) == second


def test_other_settings_are_drawn_again_and_named_in_each_row(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 5)
    digests = set()
    for config in (CONFIG, SketchConfig(seed=1), SketchConfig(temperature=0.5)):
        sketch(store, out, FakeSpec(), config)
        digests |= {row["settings_digest"] for row in rows_of(out).values()}
    assert len(digests) == 3
    assert [len(names) for names in drawn(out)] == [5, 5, 5]


def test_jobs_share_a_round_and_the_last_one_lists_it(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 18)
    alone = sketch(store, tmp_path / "alone", FakeSpec(), CONFIG)
    parts = [sketch(store, out, FakeSpec(), CONFIG, shard=(part, 3)) for part in (2, 0)]
    assert not (out / "pseudo.json").exists()
    assert sum(part.total for part in parts) < 36
    with pytest.raises(UserError, match="--shard 3/3: write it as i/n, from 0/3 to 2/3"):
        sketch(store, out, FakeSpec(), CONFIG, shard=(3, 3))
    assert sketch(store, out, FakeSpec(), CONFIG, shard=(1, 3)) == alone
    assert rows_of(out) == rows_of(tmp_path / "alone")
    assert sketch(store, out, FakeSpec(), CONFIG, shard=(2, 3)) == alone


def test_photos_drawn_before_a_kill_are_kept_when_the_store_has_grown(tmp_path, here):
    out, few = tmp_path / "out", tiny_store(tmp_path / "few", 12)
    sketch(few, out, FakeSpec(), CONFIG, shard=(0, 2))
    half = drawn(out)[0]
    assert 0 < len(half) < 12
    more = tiny_store(tmp_path / "more", 16)
    ledger = sketch(more, out, FakeSpec(), CONFIG)
    assert drawn(out) == [half, {f"photo{n:02d}" for n in range(16)} - half]
    assert ledger.total == len(rows_of(out)) == 32
    # What another generator left unfinished is of no use.
    sketch(few, out, FakeSpec(digest="left"), CONFIG, shard=(0, 2))
    sketch(more, out, FakeSpec(digest="beef"), CONFIG)
    assert [len(names) for names in drawn(out)] == [len(half), 16 - len(half), 16]


def killed_at(point, work):
    """Do ``work`` in a process that is killed when it is about to flush, rename or remove for the
    ``point``-th time; whether it came so far."""
    child = os.fork()
    if not child:
        left = itertools.count(point, -1)

        def counted(do):
            def maybe(*args, **named):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return do(*args, **named)

            return maybe

        for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree")):
            setattr(module, name, counted(getattr(module, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_killed_anywhere_the_same_call_ends_with_the_same_rows(tmp_path, here):
    few, more = tiny_store(tmp_path / "few", 3), tiny_store(tmp_path / "more", 11)

    def second(out):
        return sketch(more, out, FakeSpec(), CONFIG)

    sketch(few, tmp_path / "before", FakeSpec(), CONFIG)
    shutil.copytree(tmp_path / "before", tmp_path / "calm")
    ledger = second(tmp_path / "calm")
    expected = rows_of(tmp_path / "calm")
    files = {file.relative_to(tmp_path / "calm") for file in (tmp_path / "calm").rglob("*")}
    for point in range(100):
        out = tmp_path / f"out{point}"
        shutil.copytree(tmp_path / "before", out)
        if not killed_at(point, partial(second, out)):
            break
        assert second(out) == ledger
        assert rows_of(out) == expected
        assert len(list(iter_rows(out, kept_only=False))) == 22
        assert {file.relative_to(out) for file in out.rglob("*")} == files
    assert point > 10


def test_a_disk_that_is_full_at_any_write_is_told_and_the_folder_still_loads(
    tmp_path, here, monkeypatch
):
    few, more = tiny_store(tmp_path / "few", 3), tiny_store(tmp_path / "more", 11)
    sketch(few, tmp_path / "before", FakeSpec(), CONFIG)
    before, sync = rows_of(tmp_path / "before"), os.fsync
    errors: list[str] = []
    for point in range(100):
        out = tmp_path / f"out{point}"
        shutil.copytree(tmp_path / "before", out)
        left = itertools.count(point, -1)

        def full(handle, left=left):
            if next(left) == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        try:
            sketch(more, out, FakeSpec(), CONFIG)
        except UserError as error:
            errors.append(str(error))
        if len(errors) == point:
            break
        listed = len(read_header(out)["rounds"])
        assert rows_of(out) == before if listed == 1 else len(rows_of(out)) == 22
        assert "cannot be written (No space left on device); make room" in errors[-1]
    assert len(errors) > 5


def test_a_run_that_another_one_would_disturb_is_refused(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 5)
    with writing(out, (0, 1)):
        for shard in ((0, 1), (0, 2)):
            with pytest.raises(UserError, match="out: another run is writing it"):
                sketch(store, out, FakeSpec(), CONFIG, shard=shard)
    with writing(out, (0, 2)) as first:
        first.share()
        with writing(out, (1, 2)) as second:
            assert not second.alone
        for shard in ((0, 1), (1, 3)):
            with pytest.raises(UserError, match="another run is writing it"), writing(out, shard):
                pass
        with pytest.raises(UserError, match="is writing shard 0/2"), writing(out, (0, 2)):
            pass
    with writing(out, (1, 3)) as later:
        assert later.alone


@pytest.mark.parametrize("begins", [True, False])
def test_a_shard_waits_until_the_first_has_begun_or_ended(tmp_path, begins):
    alone, here, go = [], threading.Event(), threading.Event()

    def second():
        with writing(tmp_path / "out", (1, 2)) as writer:
            alone.append(writer.alone)
            here.set()
            go.wait(30)

    thread = threading.Thread(target=second)
    try:
        with writing(tmp_path / "out", (0, 2)) as first:
            thread.start()
            assert not here.wait(0.3)
            if begins:
                first.share()
                assert here.wait(30)
        assert here.wait(30)
    finally:
        go.set()
        thread.join()
    assert alone == [not begins]


def test_shards_that_start_at_once_make_one_round(tmp_path, here):
    store = tiny_store(tmp_path / "store", 22, shard=5)
    sketch(store, tmp_path / "alone", FakeSpec(), CONFIG)
    out = tmp_path / "out"

    def draw(part):
        sketch(store, out, FakeSpec(), CONFIG, shard=(part, 3))

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(draw, range(3)))
    assert [entry["round"] for entry in read_header(out)["rounds"]] == [0]
    assert rows_of(out) == rows_of(tmp_path / "alone")


def test_a_shard_does_not_remove_what_another_one_draws(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 18)
    with writing(out, (0, 2)) as first:
        (out / "round-0000").mkdir()
        request = {"generator_digest": "other", "settings_digest": "other"}
        write_json_atomic(out / "round-0000" / "request.json", request)
        first.share()
        with pytest.raises(UserError, match="another shard is drawing other photos"):
            sketch(store, out, FakeSpec(), CONFIG, shard=(1, 2))
    sketch(store, out, FakeSpec(), CONFIG, shard=(1, 2))
    assert len(list((out / "round-0000").glob("part-*"))) > 0


def test_a_folder_that_holds_something_else_is_refused(tmp_path, here):
    store = tiny_store(tmp_path / "store", 5)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"store: holds something else \(.*choose another folder"):
        sketch(store, store, FakeSpec(), CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


def test_rounds_that_are_not_used_can_be_removed(tmp_path, here):
    out, store = tmp_path / "out", tiny_store(tmp_path / "store", 5)
    sketch(store, out, FakeSpec(), CONFIG)
    sketch(store, out, FakeSpec(digest="beef"), CONFIG)
    rows = rows_of(out)
    assert forget_old(out) == [0]
    assert not (out / "round-0000").exists()
    assert rows_of(out) == rows
    assert forget_old(out) == []
    sketch(store, out, FakeSpec(), CONFIG)
    assert [entry["round"] for entry in read_header(out)["rounds"]] == [1, 2]


def test_how_a_shard_is_written():
    assert read_shard("0/4") == (0, 4)
    for text in ("1", "a/b", "1/", "-1/3"):
        with pytest.raises(UserError, match="write it as i/n"):
            read_shard(text)
