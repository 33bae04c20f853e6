"""The live stream: right rows in time, each with one fate, whoever is slow, dies or goes wrong."""

import dataclasses
import os
import pickle
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray import cloudpickle

from sbir_ray.data.strokes import canonical
from sbir_ray.errors import SbirError, UserError
from sbir_ray.joint_config import StreamConfig
from sbir_ray.runs import load_discriminator, load_generator
from sbir_ray.stream.filters import RankerSpec, reference_photos
from sbir_ray.stream.live import LiveStream, StreamSpec
from sbir_ray.stream.live_photos import TicketPhotos
from sbir_ray.stream.live_rows import LiveRow, published, ticket_seed
from sbir_ray.stream.sketchers import Drawn
from sbir_ray.train.job import Job
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import generator_jobs
from tests.faults.kit import alive
from tests.one_thread import one_thread
from tests.tiny import generator_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PHOTOS = 13
DAMAGED = 4
USED = ("used", "")


class Fake:
    """Draws a line; ``plans`` tells of which tickets otherwise."""

    sides = (32,)

    def __init__(self, plans, seconds):
        self.plans, self.seconds, self.version = plans, seconds, 0

    def load(self, version, weights):
        assert not weights["generator.x"].flags.writeable
        self.version = version

    def draw(self, tickets, photo_ids, photos, seeds):
        time.sleep(self.seconds)
        return [self._one(*row) for row in zip(tickets, photo_ids, photos, seeds, strict=True)]

    def _one(self, ticket, photo_id, photos, seed):
        plan = self.plans.get(ticket, self.plans.get("all", "draw"))
        if plan == "raise":
            raise ArithmeticError("no\nsketch")
        if plan == "die":
            os._exit(1)
        strokes = [] if plan == "nothing" else canonical([np.array([[0.0, 0], [ticket + 1, 9]])])
        return LiveRow(ticket, photo_id, photos, Drawn(strokes), (), self.version, seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeSpec(StreamSpec):
    """Leaves the number of each process that draws in the folder ``pids``."""

    pids: Path
    plans: tuple[tuple[int | str, str], ...] = ()
    seconds: float = 0.0

    def make(self, references):
        if ("all", "refuse") in self.plans and not self._is_driver():
            raise ArithmeticError("no sketcher")
        if not self._is_driver():
            (self.pids / str(os.getpid())).touch()
        return Fake(dict(self.plans), self.seconds)

    def _is_driver(self):
        return (self.pids / "driver").read_text() == str(os.getpid())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("live") / "store", PHOTOS, damaged=[DAMAGED])


@pytest.fixture
def fake(tmp_path, store, cluster):
    """Makes a spec of fake sketchers from its changes, in batches of 2 and a window of 2 steps."""
    (tmp_path / "driver").write_text(str(os.getpid()))

    def make(wait_limit=60.0, batch_size=2, **changes):
        stream = StreamConfig(batch_size=batch_size, window=2, wait_limit=wait_limit)
        spec = FakeSpec(
            photos=store,
            generator=tmp_path,
            stream=stream,
            samples=0,
            sides=(32,),
            seed=6,
            pids=tmp_path,
        )
        return dataclasses.replace(spec, **changes)

    return make


def actors():
    """Actors that are alive, of those that a stream starts."""
    return [actor["ActorClassName"] for part in ("Draw", "Stream") for actor in alive(part)]


def left_after(seconds):
    end = time.monotonic() + seconds
    while (found := actors()) and time.monotonic() < end:
        time.sleep(0.3)
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A generator with its discriminator, and a teacher, trained for a few steps."""
    root = tmp_path_factory.mktemp("runs")
    inputs = {"pairs": str(tiny_pairs(root / "pairs"))}
    jobs = generator_jobs(str(root / "g"), generator_config(), inputs)
    train([*jobs, Job("retrieval", str(root / "f"), retrieval_config(2), inputs)], workers=0)
    return root


def assert_same(row, other):
    for a, b in zip((row.drawn, *row.samples), (other.drawn, *other.samples), strict=True):
        assert (a.log_prob, a.ended) == (b.log_prob, b.ended)
        assert all(np.array_equal(x, y) for x, y in zip(a.strokes, b.strokes, strict=True))
    assert (row.drawn.certainty, row.drawn.rank) == (other.drawn.certainty, other.drawn.rank)


def test_rows_are_what_the_newest_weights_draw_of_the_right_photos(store, runs, cluster):
    generator = load_generator(runs / "g").model
    judge = load_discriminator(runs / "g").model
    spec = StreamSpec(
        photos=store,
        generator=runs / "g",
        stream=StreamConfig(batch_size=4, window=2),
        samples=2,
        sides=(32,),
        seed=6,
        ranker=RankerSpec.of_run(runs / "f"),
    )
    direct = spec.make(reference_photos(store, spec.ranker.image_size))
    rows = []
    with LiveStream(spec, rows_per_step=4, world=1, first=3) as stream:
        (shard,) = stream.shards
        shard = pickle.loads(pickle.dumps(shard))
        for number in range(24):
            if number == 4:
                with torch.no_grad():
                    generator.net.output.bias.add_(0.1)
                    judge.body[0].weight.mul_(2)
                shard.publish(7, published(generator, judge))
            row = shard.next()
            rows.append(row)
            shard.account({row.ticket: USED})
        assert shard.waited > 0
        shard.close()
        ledger = stream.ledger()
    assert left_after(20) == []

    assert ledger["used"] == 24
    assert ledger["drawn"] <= 24 + 2 + (2 + 1) * 4 + 4
    damaged = ledger["filtered"]
    photos = TicketPhotos(store, 6, (32, *direct.sides))
    tickets = sorted({row.ticket for row in rows})
    assert len(tickets) == 24
    assert tickets[0] == 3
    missing = set(range(3, tickets[-1] + 1)) - set(tickets)
    assert {p.photo_id for p in photos.read(sorted(missing))} == {f"photo{DAMAGED:02d}"}
    assert damaged == {"damaged-photo": damaged["damaged-photo"]}

    versions = [row.version for row in rows]
    assert versions[:4] == [0] * 4
    # At most the window and what lies with the learner was drawn before.
    assert versions[4 + 4 * (2 + 1) + 2 :] == [7] * (24 - 18)
    for row in rows[:2] + rows[-2:]:
        if row.version != direct.version:
            direct.load(7, published(generator, judge))
        (photo,) = photos.read([row.ticket])
        assert row.photo_id == photo.photo_id
        assert list(row.photos) == [32]
        np.testing.assert_array_equal(row.photos[32], photo.photos[32])
        assert row.seed == ticket_seed(6, row.ticket)
        assert row.drawn.rank >= 1
        with one_thread():
            drawn = direct.draw([row.ticket], [photo.photo_id], [photo.photos], [row.seed])
        assert_same(row, *drawn)


@pytest.mark.parametrize("slow", ["learner", pytest.param("generators", marks=pytest.mark.slow)])
def test_a_row_is_only_so_old_whoever_is_slow(fake, slow):
    spec = fake(seconds=0.2 if slow == "generators" else 0.0)
    staleness = []
    with LiveStream(spec, rows_per_step=4, world=1) as stream:
        (shard,) = stream.shards
        for step in range(12):
            for _ in range(4):
                row = shard.next()
                staleness.append(step - row.version)
                fate = ("stale", "") if staleness[-1] > 2 else USED
                shard.account({row.ticket: fate})
            shard.publish(step + 1, {"generator.x": torch.full((3,), float(step))})
            if slow == "learner":
                time.sleep(0.3)
            ledger = stream.ledger()
            # The window's rows, and three that the learner's thread holds ready.
            assert ledger["in_flight"] <= 2 * 4 + 3
        shard.close()
    assert min(staleness) >= 0
    # Two steps' worth in the window, the rows held ready, and a publication on its way.
    assert max(staleness) <= 4
    if slow == "learner":
        assert max(staleness) >= 1
    assert ledger["used"] + ledger["stale"] == 48
    assert ledger["stale"] == sum(age > 2 for age in staleness)


def test_every_row_has_one_fate_although_processes_die_and_photos_fail(fake, store, tmp_path):
    plans = ((9, "raise"), (13, "nothing"), (22, "die"))
    tickets = []
    with LiveStream(fake(plans=plans), rows_per_step=4, world=1) as stream:
        (shard,) = stream.shards
        for number in range(50):
            if number == 30:
                for file in tmp_path.glob("[0-9]*"):
                    # Those that died by themselves are gone.
                    if Path("/proc", file.name).exists():
                        os.kill(int(file.name), signal.SIGKILL)
            row = shard.next()
            tickets.append(row.ticket)
            shard.account({row.ticket: USED})
            if number % 10 == 0:
                stream.ledger()
        shard.close()
        ledger = stream.ledger()
    damaged = [photo.ticket for photo in TicketPhotos(store, 6, ()).read(range(80)) if photo.fault]
    given_up = {22, 23} - set(damaged)
    expected = [t for t in range(80) if t not in {9, 13, *given_up, *damaged}]
    assert sorted(tickets) == expected[:50]
    filtered = ledger["filtered"]
    assert filtered.pop("damaged-photo") in (
        n := sum(t <= tickets[-1] for t in damaged),
        n + 1,
    )
    assert filtered == {
        "error-ArithmeticError": 1,
        "nothing-to-draw": 1,
        "killed-its-process": 2,
    }
    assert ledger["used"] == 50
    # Three deaths, so four processes.
    assert len(list(tmp_path.glob("[0-9]*"))) == 4


@pytest.mark.slow
def test_a_learner_that_takes_all_and_one_that_dies_leave_the_others_enough(fake):
    with LiveStream(fake(), rows_per_step=2, world=2) as stream:
        greedy, modest = stream.shards
        kept = [modest.next().ticket]
        taken = [greedy.next().ticket for _ in range(40)]
        kept += [modest.next().ticket for _ in range(5)]
        assert len({*kept, *taken}) == 46
        modest.account(dict.fromkeys(kept, USED))
        lost = taken[:1]
        greedy.account(dict.fromkeys(taken[1:], USED))
        greedy.close()

        reborn = pickle.loads(
            pickle.dumps(stream.shards[0].__class__(greedy.actor, 0, 60.0, greedy.name))
        )
        fresh = [reborn.next().ticket for _ in range(10)]
        assert not {*kept, *taken} & set(fresh)
        ledger = stream.ledger()
        reborn.close()
        modest.close()
    assert ledger["used"] == 45
    # The row that it never told of, and at most a batch and what was ready.
    assert len(lost) <= ledger["filtered"]["lost"] <= 1 + 4
    assert Counter(ledger["filtered"]).keys() <= {"lost", "damaged-photo"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 4.0, "wait_limit": 2.0}, r"no pseudo sketch came for 2 s .*generator actors"),
        (
            {"plans": (("all", "raise"),), "batch_size": 16},
            r"the last \d+ photos could not be drawn, \d+ of them by error-ArithmeticError \(.*no",
        ),
        ({"plans": (("all", "refuse"),)}, "the live stream broke down: ArithmeticError: no sketc"),
        ({"broken": True}, "the live stream broke down: KeyError: .*image"),
    ],
)
def test_a_stream_that_runs_dry_says_why_and_leaves_nothing_behind(
    tmp_path, fake, changes, message
):
    if "broken" in changes:
        # The first photo can be read, which is looked at when the stream starts.
        store = tiny_store(tmp_path / "store", 4)
        pq.write_table(pa.table({"photo_id": ["a"]}), store / "shards" / "part-9.parquet")
        changes = {"photos": store, "batch_size": 8}
    with LiveStream(fake(**changes), rows_per_step=16, world=1) as stream:
        (shard,) = stream.shards
        for _ in range(2):
            with pytest.raises(SbirError, match=message) as caught:
                shard.next()
            assert "\n" not in str(caught.value)
        shard.close()
    assert left_after(20) == []
    # A closed stream says so, and can be closed again.
    stream.close()


def test_what_cannot_be_is_refused_at_once(fake, store, tmp_path):
    spec = StreamSpec(
        photos=store,
        generator=tmp_path / "none",
        stream=StreamConfig(),
        samples=1,
        sides=(64,),
        seed=0,
    )
    for which, options, message in (
        (spec, {}, "not a run folder"),
        (fake(), {"actors": (50, 50)}, "--actors: 50 x"),
        (fake(), {"actors": (2, 1)}, "--actors 2:1"),
        (dataclasses.replace(fake(), photos=tmp_path), {}, "not a photo store"),
    ):
        with pytest.raises(UserError, match=message):
            LiveStream(which, rows_per_step=2, world=1, **options)
    assert actors() == []
