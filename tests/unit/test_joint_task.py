"""Joint training: turns, who draws, what is counted, and that it can be repeated bit for bit."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sbir_ray import checkpoint
from sbir_ray.config import FilterConfig, RetrievalLossConfig
from sbir_ray.errors import SbirError, UserError
from sbir_ray.joint import policy_losses
from sbir_ray.joint_config import JointTraining, PolicyConfig, ScheduleConfig, StreamConfig
from sbir_ray.runs import load_discriminator, load_generator, load_retrieval
from sbir_ray.stream.live_rows import LiveRow
from sbir_ray.stream.sketchers import Drawn
from sbir_ray.train.joint_rows import DrawnRows, Sides, some_photos
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.tasks import build, joint_jobs
from tests.interrupted import interrupted
from tests.tiny import generator_config, joint_config, retrieval_config, tiny_pairs
from tests.tiny_store import tiny_store
from tests.unit.test_workers import gradients, in_processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs, photos, and the runs that joint training starts from."""
    folder = tmp_path_factory.mktemp("joint")
    inputs = {
        "pairs": str(tiny_pairs(folder / "pairs")),
        "photos": str(tiny_store(folder / "photos", 6)),
    }
    for job in joint_jobs(str(folder / "run"), joint_config(), inputs)[:-1]:
        fit(job, Ranks(), CPU, lambda _: None)
    runs = {"teacher": "supervised", "generator": "generator"}
    return {**inputs, **{name: str(folder / "run" / place) for name, place in runs.items()}}


def job_of(out, world, **changes):
    return joint_jobs(str(out), joint_config(**changes), world)[-1]


def weights(run):
    return checkpoint.load(Path(run)).model


def test_what_it_starts_from_is_trained_first_and_only_if_it_is_missing(world):
    bare = {name: world[name] for name in ("pairs", "photos")}
    jobs = joint_jobs("out", joint_config(seed=3), bare)
    assert [job.kind for job in jobs] == ["retrieval", "generator", "discriminator", "joint"]
    assert [job.config.seed for job in jobs] == [3, 3, 3, 3]
    assert jobs[-1].inputs["teacher"] == jobs[0].out == "out/supervised"
    assert jobs[-1].inputs["generator"] == jobs[1].out == "out/generator"
    assert [job.kind for job in joint_jobs("out", joint_config(), world)] == ["joint"]


def test_networks_of_named_runs_are_taken_and_contradictions_are_refused(world):
    (job,) = joint_jobs("out", JointTraining(), world)
    assert job.config.retrieval.model == retrieval_config().model
    assert job.config.generator.model == generator_config().model
    # How G learns may differ from how it was trained before.
    heavy = dataclasses.replace(generator_config().model, kl_weight=3.0)
    asked = joint_config(generator=dataclasses.replace(generator_config(), model=heavy))
    (job,) = joint_jobs("out", asked, world)
    assert job.config.generator.model == heavy
    other = dataclasses.replace(
        joint_config(),
        retrieval=retrieval_config(model=dataclasses.replace(retrieval_config().model, grid=1)),
    )
    with pytest.raises(UserError, match=r"other settings than retrieval\.model"):
        joint_jobs("out", other, world)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": StreamConfig(sync=True, window=5)}, r"stream\.window: no actors draw"),
        ({"ema_decay": 0.5}, "ema_decay: has no effect without teacher=ema"),
        (
            {
                "teacher": "ema",
                "retrieval": retrieval_config(loss=RetrievalLossConfig(distill="none")),
            },
            "teacher=ema: nothing is distilled",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(world, changes, message):
    with pytest.raises(UserError, match=message):
        joint_jobs("out", joint_config(**changes), world)


def test_joint_training_without_a_discriminator_is_refused_before_anything_is_trained(world):
    plain = generator_config()
    none = dataclasses.replace(
        plain, discriminator=dataclasses.replace(plain.discriminator, steps=0)
    )
    bare = {name: world[name] for name in ("pairs", "photos")}
    with pytest.raises(UserError, match=r"generator\.discriminator\.steps=0"):
        joint_jobs("out", joint_config(generator=none), bare)


def test_photos_serve_as_further_negatives_if_asked(world, tmp_path):
    job = job_of(tmp_path / "a", world, retrieval=retrieval_config(negatives=3))
    task = build(job, Ranks(), CPU)
    assert len(task.batch(0).pairs.extra_nCSS) == 3


def test_rewards_and_ratios_are_what_a_loop_over_the_drawings_finds(world, tmp_path):
    policy = PolicyConfig(kind="reinforce", baseline="greedy", batch_size=2, retrieval_weight=0.7)
    schedule = ScheduleConfig(steps=2, retrieval_steps=1, generator_steps=1)
    job = job_of(tmp_path / "a", world, policy=policy, schedule=schedule)
    Path(job.out).mkdir()
    task = build(job, Ranks(), CPU)
    task.restore(0, {})
    drawn = task.batch(1).drawn
    task.f.model.eval()
    maps = task.g.model.encode(drawn.photo_g)
    rows = task._policy_rows(drawn, maps, task._columns(drawn))
    with torch.no_grad():
        photo_RD = task.f.model.embed_photos(drawn.photo_f)

        def reward(sketch_f, sketch_d, row):
            sketch = task.f.model.embed_sketches(sketch_f[None])[0]
            near = (sketch - photo_RD[row]).norm()
            others = [i for i in range(4) if drawn.photo_id_R[i] != drawn.photo_id_R[row]]
            far = {int(drawn.photo_id_R[i]): (sketch - photo_RD[i]).norm() for i in others}
            triplet = torch.stack([(0.3 + near - d).clamp(min=0) for d in far.values()]).mean()
            certainty = task.d.certainty(drawn.photo_d[row][None], sketch_d[None])[0]
            return float(certainty - 0.7 * triplet)

        for b, row in enumerate(drawn.row_of_b.tolist()):
            expected = reward(drawn.sketch_f[b], drawn.sketch_d[b], row)
            assert float(rows.reward_B[b]) == pytest.approx(expected, abs=1e-5)
            greedy = reward(drawn.pseudo_f[row], drawn.pseudo_d[row], row)
            assert float(rows.greedy_B[b]) == pytest.approx(greedy, abs=1e-5)
    # Nothing was learnt since they were drawn, by actors or not.
    assert (rows.log_prob_B - rows.behaviour_B).abs().max() < 1e-3
    assert policy_losses(rows, policy)["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_the_critic_sees_each_photo_with_its_own_sketch_its_drawing_and_a_wrong_photo(
    world, tmp_path
):
    job = job_of(tmp_path / "a", world)
    task = build(job, Ranks(), CPU)
    rows = task.batch(0).critic
    numbers = [int(task.labelled.d.photo_of[row.sketch]) for row in task.f.labelled_rows(0)]
    for i, number in enumerate(numbers):
        own = torch.from_numpy(task.labelled.d.photos[number].copy())
        flip = not torch.equal(rows.photo_bCSS[i], own)
        assert torch.equal(rows.photo_bCSS[i], own.flip(-1) if flip else own)
        wrong = rows.wrong_bCSS[i].flip(-1) if flip else rows.wrong_bCSS[i]
        found = [
            k for k, p in enumerate(task.labelled.d.photos) if np.array_equal(p, wrong.numpy())
        ]
        assert found
        assert number not in found
    for rasters in (rows.real_bSS, rows.own_bSS, rows.drawn_uSS):
        assert rasters.dtype == torch.uint8
    assert len(rows.photo_uCSS) == len(rows.drawn_uSS) == 4


def test_a_damaged_photo_does_not_keep_a_run_from_its_end(world, tmp_path):
    folder = tiny_store(tmp_path / "photos", 6, damaged=[2])
    ids, photos = some_photos(folder, Sides(64, 64, 32))
    assert len(ids) == 5
    assert {side: len(p) for side, p in photos.items()} == {32: 5, 64: 5}


def test_turns_follow_the_schedule_and_versions_count_them(world, tmp_path):
    schedule = ScheduleConfig(steps=12, retrieval_steps=3, generator_steps=2)
    task = build(job_of(tmp_path / "a", world, schedule=schedule), Ranks(), CPU)
    turns = ["".join(name[0] for name in task.turn(step)) for step in range(7)]
    assert turns == ["rd", "rd", "rd", "g", "g", "rd", "rd"]
    assert [task.version(step) for step in range(11)] == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert [step for step in range(1, 13) if task.resumable(step)] == [3, 5, 8, 10, 12]
    alone = ScheduleConfig(steps=4, retrieval_steps=2, generator_steps=0)
    task = build(job_of(tmp_path / "b", world, schedule=alone), Ranks(), CPU)
    assert all("generator" not in task.turn(step) for step in range(4))
    assert [task.version(step) for step in range(5)] == [0, 0, 1, 1, 2]


def test_a_turn_changes_its_own_networks_alone(world, tmp_path):
    job = job_of(
        tmp_path / "a",
        world,
        schedule=ScheduleConfig(steps=4, retrieval_steps=2, generator_steps=2),
    )
    Path(job.out).mkdir()
    task = build(job, Ranks(), CPU)
    task.restore(0, {})
    for step, moved in ((0, {"retrieval", "discriminator"}), (2, {"generator"})):
        task.trained.zero_grad(set_to_none=True)
        task.losses(task.batch(step), step)["loss"].backward()
        with_gradient = {
            name
            for name, player in task.players.items()
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters)
        }
        assert with_gradient == moved


@pytest.mark.parametrize("kind", ["reinforce", "soft", "both", "none"])
def test_every_policy_trains_and_its_terms_are_logged(world, tmp_path, kind):
    policy = PolicyConfig(kind=kind, batch_size=2)
    job = job_of(tmp_path / "a", world, policy=policy)
    fit(job, Ranks(), CPU, lambda _: None)
    lines = [json.loads(x) for x in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    turn = next(line for line in lines if line.get("turn") == 1)
    assert {"offset", "pen", "kl"} <= set(turn)
    assert ("policy" in turn) == ("reward" in turn) == (kind in ("reinforce", "both"))
    assert ("soft" in turn) == (kind in ("soft", "both"))
    before, after = weights(world["generator"]), weights(tmp_path / "a")
    assert not torch.equal(before["net.output.weight"], after["generator.net.output.weight"])


def test_the_same_run_twice_is_the_same_bit_for_bit_and_a_stopped_one_too(world, tmp_path):
    straight = job_of(tmp_path / "a", world)
    again = dataclasses.replace(straight, out=str(tmp_path / "b"))
    stopped = dataclasses.replace(straight, out=str(tmp_path / "c"))
    fit(straight, Ranks(), CPU, lambda _: None)
    fit(again, Ranks(), CPU, lambda _: None)
    interrupted(lambda: fit(stopped, Ranks(), CPU, lambda _: None))
    said = []
    fit(stopped, Ranks(), CPU, said.append)
    assert "resumed at step 2" in said[0]
    one = weights(straight.out)
    for other in (again, stopped):
        two = weights(other.out)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
        for name in ("ledger.json", "drawings.jsonl", "certainty.json"):
            found = (Path(other.out) / name).read_text()
            assert found == (Path(straight.out) / name).read_text()


def test_two_workers_have_the_losses_and_gradients_of_one(world, tmp_path):
    policy = PolicyConfig(kind="both", baseline="greedy", batch_size=2)
    loss = RetrievalLossConfig(distill="relational")
    jobs = [
        # The first step of each turn.
        job_of(tmp_path / "f", world, retrieval=retrieval_config(loss=loss), teacher="ema"),
        job_of(
            tmp_path / "g",
            world,
            policy=policy,
            schedule=ScheduleConfig(steps=2, retrieval_steps=1, generator_steps=1),
        ),
    ]
    for step, job, two in zip(
        (0, 1), jobs, in_processes(jobs, tmp_path / "two", steps=(0, 1)), strict=True
    ):
        one = gradients(job, Ranks(), step)
        for rank in two:
            assert rank.keys() == one.keys()
            for key, value in one.items():
                off = float((rank[key] - value).norm())
                assert off <= 1e-4 * max(float(value.norm()), 1e-6), (step, key)


def test_the_run_serves_as_the_run_of_each_of_its_networks(world, tmp_path):
    job = job_of(tmp_path / "a", world, teacher="ema")
    fit(job, Ranks(), CPU, lambda _: None)
    saved = weights(job.out)
    assert any(name.startswith("teacher.") for name in saved)
    for name, trained in (
        ("retrieval", load_retrieval(tmp_path / "a")),
        ("generator", load_generator(tmp_path / "a")),
        ("discriminator", load_discriminator(tmp_path / "a")),
    ):
        for key, value in trained.model.state_dict().items():
            assert torch.equal(value, saved[f"{name}.{key}"])
    assert not torch.equal(
        saved["teacher.backbone.body.0.0.weight"], saved["retrieval.backbone.body.0.0.weight"]
    )


def test_a_warm_start_goes_on_from_the_teacher(world, tmp_path):
    task = build(job_of(tmp_path / "a", world, warm_start=True), Ranks(), CPU)
    teacher = load_retrieval(Path(world["teacher"])).model.state_dict()
    found = task.f.model.state_dict()
    norm = [key for key in teacher if key.startswith("pair_norm.")]
    assert norm
    assert all(torch.equal(found[key], teacher[key]) for key in teacher.keys() - norm)
    assert teacher["pair_norm.change_K"].any()
    assert not found["pair_norm.change_K"].any()


def test_a_step_that_was_skipped_does_not_move_the_averaged_teacher(world, tmp_path):
    task = build(job_of(tmp_path / "a", world, teacher="ema"), Ranks(), CPU)
    before = [value.clone() for value in task.f.teacher.state_dict().values()]
    with torch.no_grad():
        for parameter in task.f.model.parameters():
            parameter.add_(1.0)

    def same():
        after = task.f.teacher.state_dict().values()
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    task.done(0, None, updated=False)
    assert same()
    task.done(0, None, updated=True)
    assert not same()


# --------------------------------------------------------------------------- fates


class Scripted:
    """Rows by a list of (certainty, version), one after another."""

    name = ""

    def __init__(self, script):
        self.script = list(script)
        self.told_fates = {}
        self.handed = 0

    def rows(self, kind, step, attempt, slots, count):
        found = []
        for _ in slots:
            certainty, version = self.script.pop(0)
            strokes = [np.array([[40, 40], [200, 200], [40, 200], [200, 40]], np.float32)]
            drawn = Drawn(strokes, certainty)
            found.append(LiveRow(self.handed, "x", {}, drawn, (), version, self.handed))
            self.handed += 1
        return found

    def account(self, fates):
        self.told_fates |= fates

    def told(self):
        return None


class Streamed(Scripted):
    """A stream that keeps its own account."""

    def __init__(self, script, name):
        super().__init__(script)
        self.name = name

    def told(self):
        return Counter({"used": self.handed - 1, "in_flight": 1})


def rows_of(script, tries=3, staleness=1):
    config = joint_config(stream=StreamConfig(max_tries=tries, max_staleness=staleness))
    source = Scripted(script)
    return DrawnRows(source, config, Ranks()), source


def test_every_row_has_one_fate_and_they_add_up(tmp_path):
    rows, source = rows_of([(0.9, 5), (0.1, 5), (0.8, 2), (0.2, 5), (0.7, 4), (0.9, 4)])
    taken = rows.take(0, 5, "pseudo", 3, FilterConfig(min_certainty=0.5))
    assert [(row.drawn.certainty, kept) for row, kept in taken] == [
        (0.9, True),
        (0.9, True),
        (0.7, True),
    ]
    assert Counter(source.told_fates.values()) == {
        ("used", ""): 3,
        ("filtered", "min_certainty"): 2,
        ("stale", ""): 1,
    }
    rows.write(tmp_path, rows.state())
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["drawn"] == source.handed == 6
    assert ledger["drawn"] == ledger["used"] + ledger["stale"] + sum(ledger["filtered"].values())
    assert sum(ledger["staleness"].values()) == 6


def test_after_so_many_tries_a_filtered_row_stays_and_is_no_pair():
    rows, source = rows_of([(0.1, 0)] * 4, tries=2)
    taken = rows.take(0, 0, "pseudo", 2, FilterConfig(min_certainty=0.5))
    assert [kept for _, kept in taken] == [False, False]
    assert source.handed == 4


def test_a_stale_row_is_never_taken():
    rows, _ = rows_of([(0.9, 0)] * 7 + [(0.9, 9)], tries=2)
    ((row, kept),) = rows.take(0, 9, "pseudo", 1, None)
    assert (row.version, kept) == (9, True)
    assert rows.state()["fates"]["stale"] == 7


def test_drawings_that_stay_too_old_end_the_run_with_the_setting():
    rows, _ = rows_of([(0.9, 0)] * 200)
    with pytest.raises(SbirError, match=r"stream\.max_staleness"):
        rows.take(0, 9, "pseudo", 1, None)


def test_counts_go_on_after_a_restart_and_what_was_in_flight_is_lost():
    rows, _ = rows_of([(0.9, 0)] * 2)
    rows.restore({"fates": {"used": 5, "in_flight": 2}, "lags": {"0": 5}})
    rows.take(0, 0, "pseudo", 2, None)
    state = rows.state()
    assert dict(state["fates"]) == {"used": 7, "filtered lost": 2}
    assert state["lags"]["0"] == 7


def test_all_late_rows_are_in_the_last_bin():
    rows, _ = rows_of([(0.9, 9), (0.9, 7), (0.9, 6), (0.9, 0), (0.9, 9), (0.9, 9), (0.9, 9)])
    rows.take(0, 9, "pseudo", 4, None)
    state = rows.state()
    assert dict(state["lags"]) == {"0": 4, "2": 3}
    assert dict(state["fates"]) == {"used": 4, "stale": 3}


def test_a_version_that_a_dead_process_published_is_stale():
    rows, _ = rows_of([(0.9, 7), (0.9, 5)])
    ((row, _),) = rows.take(0, 5, "pseudo", 1, None)
    assert row.version == 5
    assert rows.state()["fates"]["stale"] == 1


@pytest.mark.parametrize(("name", "used", "lost"), [("same", 3, 0), ("other", 6, 1)])
def test_a_stream_that_outlives_a_learner_is_not_counted_twice(name, used, lost):
    config = joint_config(stream=StreamConfig())
    source = Streamed([(0.9, 0)] * 4, "same")
    first = DrawnRows(source, config, Ranks())
    first.take(0, 0, "pseudo", 4, None)
    again = source if name == "same" else Streamed([(0.9, 0)] * 4, name)
    second = DrawnRows(again, config, Ranks())
    second.restore(first.state())
    if name == "other":
        second.take(0, 0, "pseudo", 4, None)
    fates = second.state()["fates"]
    assert (fates["used"], fates["filtered lost"], fates["in_flight"]) == (used, lost, 1)


def test_sides_are_named_once():
    assert Sides(64, 128, 64).all == [64, 128]
