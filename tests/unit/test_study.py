"""Studies: the same work once, equal numbers of updates, what is wrong said at once."""

import dataclasses
import itertools
import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbir_ray.cli import main
from sbir_ray.config import (
    BEST_OF,
    AdamConfig,
    FilterConfig,
    GeneratorTraining,
    RetrievalTraining,
)
from sbir_ray.data.pairs import hash_of
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.photos import read_store
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.joint_config import JointTraining, PolicyConfig, ScheduleConfig
from sbir_ray.places import place
from sbir_ray.runlog import Progress
from sbir_ray.stream.photo_checks import stats
from sbir_ray.strict import load, to_dict, to_toml
from sbir_ray.study import studies
from sbir_ray.study.data import Cell, part_of_pool, prepare
from sbir_ray.study.intervals import Found
from sbir_ray.study.plan import Plan, retrieval_alone, updates
from sbir_ray.study.run import Request, run_study
from sbir_ray.study.work import Draw, Measure, Train
from sbir_ray.train.job import Job
from tests.tiny import tiny_pairs
from tests.tiny_store import tiny_store

BASE = JointTraining(schedule=ScheduleConfig(steps=23, retrieval_steps=3, generator_steps=2))
PAPER = {
    f"generator.{name}" for name in ("model.kind", "optim.lr", "optim.weight_decay", "optim.steps")
}
ALL_JOINT = ["full", "no-weighting", "no-teacher", "paper-generator", "no-attention"]
ALL_JOINT += ["policy-reinforce", "policy-soft", "policy-both"]


def cells(seeds=(0,), labels=0.4, pool="pool", photos=60):
    return [Cell(labels, seed, f"pairs-{seed}", "pairs", pool, photos) for seed in seeds]


def plan_of(tmp_path, base=BASE, **changes):
    return Plan(tmp_path, base, "val", **changes)


def trainings(plan):
    return [piece for piece in plan.work.values() if isinstance(piece, Train)]


def f_updates(job):
    """Counted step by step."""
    if isinstance(job.config, RetrievalTraining):
        return job.config.optim.steps
    schedule = job.config.schedule
    turns = itertools.cycle([True] * schedule.retrieval_steps + [False] * schedule.generator_steps)
    return sum(itertools.islice(turns, schedule.steps))


# --------------------------------------------------------------------------- plans


def test_all_rows_of_an_ablation_update_f_equally_often(tmp_path):
    plan = plan_of(tmp_path)
    rows = studies.ablation(plan, cells((0, 1)))
    assert [row.name for row in rows[:3]] == ["supervised", "full", "no-weighting"]
    for row in rows:
        for name in row.found.values():
            (trained,) = (plan.work[need] for need in plan.work[name].needs)
            assert f_updates(trained.jobs[0]) == 15 == row.facts["updates"]


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 9), st.booleans())
def test_updates_are_those_of_the_turns(steps, turn_f, turn_g, warm):
    schedule = ScheduleConfig(steps=steps, retrieval_steps=turn_f, generator_steps=turn_g)
    config = JointTraining(schedule=schedule, warm_start=warm)
    before = config.retrieval.optim.steps if warm else 0
    assert updates(config) == before + f_updates(Job("joint", "", config, {}))


def test_what_is_shared_is_trained_once_for_each_seed(tmp_path):
    plan = plan_of(tmp_path)
    studies.ablation(plan, cells((0, 1)))
    names = [piece.name for piece in trainings(plan)]
    for seed in (0, 1):
        for once in ("teacher", "generator", "generator-paper", "generator-paper-unattending"):
            assert names.count(f"labels-0.4/seed-{seed}/{once}") == 1
    assert names.count("judge") == 1
    joint = [p for p in trainings(plan) if p.jobs[0].kind == "joint"]
    assert len(joint) == 2 * len(ALL_JOINT)
    teachers = {(p.jobs[0].config.seed, p.jobs[0].inputs["teacher"]) for p in joint}
    assert len(teachers) == 2
    # Nothing is trained twice by two names.
    what = [
        json.dumps([j.kind, to_dict(j.config), dict(j.inputs)])
        for p in trainings(plan)
        for j in p.jobs
    ]
    assert len(set(what)) == len(what)
    drawn = [piece for piece in plan.work.values() if isinstance(piece, Draw)]
    assert sorted({piece.name.split("/")[-1] for piece in drawn}) == [
        f"drawn-by-{by}" for by in ("contours", "edges", "generator", "generator-paper-unattending")
    ]


def test_what_is_needed_comes_first_and_is_there(tmp_path):
    plan = plan_of(tmp_path)
    studies.ablation(plan, cells((0, 1)))
    seen = set()
    for piece in plan.work.values():
        assert set(piece.needs) <= seen
        seen.add(piece.name)
        inputs = [path for job in getattr(piece, "jobs", ()) for path in job.inputs.values()]
        made = {one.run: one.name for one in trainings(plan)}
        made |= {one.out: one.name for one in plan.work.values() if isinstance(one, Draw)}
        own = {job.out for job in getattr(piece, "jobs", ())}
        for path in set(inputs) - own:
            assert path not in made or made[path] in piece.needs


def test_each_variant_differs_in_what_it_says_and_nothing_else(tmp_path):
    plan = plan_of(tmp_path)
    rows = studies.ablation(plan, cells())
    jobs = {row.name: plan.work[plan.work[row.found[0]].needs[0]].jobs[0] for row in rows}

    def differing(a, b, path=""):
        if isinstance(a, dict):
            return {d for key in a for d in differing(a[key], b[key], f"{path}.{key}")}
        return set() if a == b else {path[1:]}

    full = to_dict(jobs["full"].config)
    assert full["stream"]["sync"]
    changed = {name: differing(full, to_dict(jobs[name].config)) for name in ALL_JOINT}
    assert changed == {
        "full": set(),
        "no-weighting": {"retrieval.loss.certainty"},
        "no-teacher": {"retrieval.loss.distill"},
        "paper-generator": PAPER,
        "no-attention": {"generator.model.attend", *PAPER},
        "policy-reinforce": {"policy.kind"},
        "policy-soft": {"policy.kind"},
        "policy-both": {"policy.kind"},
    }
    assert jobs["no-attention"].inputs["generator"].endswith("generator-paper-unattending")
    alone = to_dict(retrieval_alone(plan.base))
    changed = {
        name: differing(alone, to_dict(jobs[name].config)) for name in set(jobs) - set(ALL_JOINT)
    }
    assert changed == {
        "supervised": set(),
        "negatives": {"negatives"},
        "contours": set(),
        "edges": set(),
        "no-joint": set(),
        "vanilla": {"loss.certainty", "loss.distill"},
    }
    assert jobs["negatives"].config.negatives == 32
    given = {name: sorted(set(job.inputs) - {"pairs"}) for name, job in jobs.items()}
    assert given["supervised"] == []
    assert given["negatives"] == ["negatives"]
    assert given["vanilla"] == ["pseudo"]
    assert given["no-joint"] == given["contours"] == given["edges"] == ["pseudo", "teacher"]
    assert given["full"] == ["generator", "photos", "teacher"]


def test_f_alone_learns_as_in_joint_training():
    adam = AdamConfig(lr=3e-3, weight_decay=0.2, beta1=0.7, schedule="constant", clip_norm=2.0)
    base = dataclasses.replace(BASE, seed=4, retrieval_optim=adam)
    alone = retrieval_alone(base)
    assert {k: getattr(alone.optim, k) for k in dataclasses.asdict(adam)} == dataclasses.asdict(
        adam
    )
    assert alone.optim.batch_size == base.retrieval.optim.batch_size
    assert (alone.loss, alone.augment, alone.model) == (
        base.retrieval.loss,
        base.retrieval.augment,
        base.retrieval.model,
    )
    assert alone.seed == 4


def test_two_names_for_one_training_are_one_piece_of_work(tmp_path):
    optim = retrieval_alone(BASE).optim
    same = dataclasses.replace(BASE, retrieval=dataclasses.replace(BASE.retrieval, optim=optim))
    plan = plan_of(tmp_path, same)
    rows = studies.ablation(plan, cells(), ["supervised", "contours"])
    (supervised,) = plan.work[rows[0].found[0]].needs
    (drawn, teacher) = plan.work["labels-0.4/seed-0/contours"].needs
    assert teacher == supervised
    assert drawn.endswith("drawn-by-contours")


def test_tracers_are_not_asked_for_what_only_generators_have(tmp_path):
    filters = FilterConfig(min_certainty=0.3, min_log_prob=-2.0, require_end=True, max_points=90)
    plan = plan_of(tmp_path, dataclasses.replace(BASE, filters=filters))
    studies.ablation(plan, cells(), ["no-joint", "contours"])
    drawn = {p.name.split("/")[-1]: p.config for p in plan.work.values() if isinstance(p, Draw)}
    assert drawn["drawn-by-generator"].filters == filters
    assert drawn["drawn-by-generator"].temperature == BASE.stream.temperature
    assert drawn["drawn-by-contours"].filters == FilterConfig(max_points=90)
    assert drawn["drawn-by-contours"].temperature == 0


def test_a_teacher_is_there_where_filters_ask_for_ranks(tmp_path):
    base = dataclasses.replace(BASE, filters=FilterConfig(max_rank=5))
    plan = plan_of(tmp_path, base)
    studies.ablation(plan, cells(), ["vanilla"])
    (drawn,) = (p for p in plan.work.values() if isinstance(p, Draw))
    assert drawn.teacher == plan.work["labels-0.4/seed-0/teacher"].run
    assert "labels-0.4/seed-0/teacher" in drawn.needs


def test_labels_have_all_controls_at_each_share_with_photos(tmp_path):
    plan = plan_of(tmp_path)
    found = studies.labels(plan, cells(labels=0.2) + cells(labels=1.0, pool="", photos=0))
    others = ["negatives", "edges", "contours", "contours-negatives", "paper-drawings"]
    others += ["drawings", "mixed", "full", "people", "people-mixed"]
    assert [(row.name, row.x, row.baseline) for row in found] == [
        ("supervised-0.2", 0.2, ""),
        *((f"{name}-0.2", 0.2, "supervised-0.2") for name in others),
        ("supervised-1", 1.0, ""),
    ]
    assert not any(row.drawn for row in found)
    assert "judge" not in plan.work


def test_chosen_rows_of_a_share_are_compared_with_the_one_that_is_asked_for(tmp_path):
    names = ("supervised", "negatives", "policy-reinforce", "mixed")
    found = studies.labels(plan_of(tmp_path), cells(labels=0.2), names, "negatives")
    assert [(row.name, row.baseline) for row in found] == [
        ("supervised-0.2", "negatives-0.2"),
        ("negatives-0.2", ""),
        ("mixed-0.2", "negatives-0.2"),
        ("policy-reinforce-0.2", "negatives-0.2"),
    ]


def test_drawings_and_contours_are_mixed_and_the_teacher_chooses_among_drawings(tmp_path):
    plan = plan_of(tmp_path)
    rows = {row.name: row for row in studies.labels(plan, cells(labels=0.2))}
    trained = plan.work[plan.work[rows["mixed-0.2"].found[0]].needs[0]]
    drawn, traced = (plan.work[name] for name in trained.needs[:2])
    (job,) = trained.jobs
    assert job.inputs["pseudo"] == drawn.out
    assert job.inputs["pseudo-2"] == traced.out
    assert (traced.sketcher, traced.config.samples, traced.teacher) == ("contours", 1, "")
    assert drawn.config.samples == BEST_OF
    assert drawn.teacher == job.inputs["teacher"]
    assert job.config.negatives == BASE.retrieval.optim.batch_size // 2
    # The row of drawings alone needs the same drawings.
    alone = plan.work[plan.work[rows["drawings-0.2"].found[0]].needs[0]]
    assert alone.jobs[0].inputs["pseudo"] == drawn.out


def test_numbers_of_photos_begin_with_none_of_them(tmp_path):
    plan = plan_of(tmp_path)
    several = [
        dataclasses.replace(cell, photos=count, part=count, pool=f"pool-{count}" if count else "")
        for count in (0, 10, 20)
        for cell in cells((0, 1))
    ]
    found = studies.photos(plan, several)
    assert [(row.name, row.x) for row in found] == [
        ("supervised-0", 0),
        *((f"{name}-{n}", n) for n in (10, 20) for name in ("full", "negatives", "contours")),
    ]
    assert {row.baseline for row in found[1:]} == {"supervised-0"}
    names = [piece.name for piece in trainings(plan)]
    assert sum(name.endswith("/teacher") for name in names) == 2
    assert "labels-0.4/seed-1/photos-20/full" in names


def test_drawings_are_judged_by_one_that_had_no_part_in_them(tmp_path):
    plan = plan_of(tmp_path)
    rows = studies.generation(plan, cells((0, 1)))
    assert [row.name for row in rows] == ["people", "full", "generator", "contours", "edges"]
    judge = plan.work["judge"].jobs[0]
    assert judge.inputs == {"pairs": "pairs"}
    assert judge.config.seed not in (0, 1)
    for row in rows:
        for name in row.drawn.values():
            measured = plan.work[name]
            assert measured.run == judge.out
            assert "judge" in measured.needs
    given = plan_of(tmp_path, judge="theirs")
    studies.generation(given, cells())
    assert "judge" not in given.work
    assert given.work["people/drawn"].run == "theirs"


def test_rows_are_chosen_by_name():
    every = studies.ablation_variants(BASE)
    names = [v.name for v in studies.chosen(every, ["edges", "full"])]
    assert names == ["full", "edges"]
    with pytest.raises(UserError, match="--rows suprvised: no such row; did you mean supervised"):
        studies.chosen(every, ["suprvised"])
    soft = dataclasses.replace(BASE, policy=PolicyConfig(kind="soft"))
    rewards = [v.name for v in studies.ablation_variants(soft) if "policy" in v.name]
    assert rewards == ["no-policy", "policy-reinforce", "policy-both"]


def test_what_a_study_cannot_keep_is_refused(tmp_path):
    negatives = dataclasses.replace(BASE.retrieval, negatives=4)
    with pytest.raises(UserError, match=r"retrieval\.negatives"):
        plan_of(tmp_path, dataclasses.replace(BASE, retrieval=negatives))
    plan = plan_of(tmp_path, dataclasses.replace(BASE, policy=PolicyConfig(kind="soft", samples=1)))
    with pytest.raises(UserError, match="policy-both: baseline: leave_one_out needs"):
        studies.ablation(plan, cells(), ["policy-both"])
    with pytest.raises(UserError, match="negatives: no photo is without a sketch at labels=1"):
        studies.ablation(plan, cells(labels=1.0, pool=""), ["negatives"])


# --------------------------------------------------------------------------- pools


def test_parts_of_a_pool_are_nested_and_whole(tmp_path):
    pool = tiny_store(tmp_path / "pool", 12)
    cell = Cell(0.4, 3, "labelled", "pairs", str(pool), 12)
    rows = {row["photo_id"]: row for row in read_store(pool)}
    order = sorted(rows, key=lambda photo: hash_of(3, photo))
    for count in (5, 9):
        part = part_of_pool(tmp_path / "data", cell, count)
        assert (part.photos, part.part) == (count, count)
        kept = list(read_store(part.pool))
        assert {row["photo_id"] for row in kept} == set(order[:count])
        assert all(rows[row["photo_id"]] == row for row in kept)
        assert len(PhotoSet.load(part.pool, 32).photo_ids) == count
        assert part_of_pool(tmp_path / "data", cell, count) == part
    headers = {
        (tmp_path / "data" / f"labels-0.4/seed-3/photos-{n}/photos/store.json").read_text()
        for n in (5, 9)
    }
    assert len(headers) == 2
    with pytest.raises(UserError, match=r"chose out of .*; look into that one"):
        stats(place(part.pool))
    assert part_of_pool(tmp_path / "data", cell, 0).pool == ""
    with pytest.raises(UserError, match="--counts 13: only 12 photos are without a sketch"):
        part_of_pool(tmp_path / "data", cell, 13)


# --------------------------------------------------------------------------- folds


def test_each_seed_is_measured_on_its_fold(tmp_path):
    folds = [tiny_pairs(tmp_path / f"fold-{k}", train=4, val=2, test=1) for k in range(2)]
    found = prepare(tmp_path / "data", folds, None, [1.0], [5, 6, 7], Progress)
    assert [(cell.seed, cell.fold, cell.whole) for cell in found] == [
        (5, 0, str(folds[0])),
        (6, 1, str(folds[1])),
        (7, 0, str(folds[0])),
    ]
    assert all(cell.pairs == cell.whole for cell in found)
    plan = plan_of(tmp_path)
    (row,) = studies.ablation(plan, found, ["supervised"])
    where = {seed: plan.work[name].pairs for seed, name in row.found.items()}
    assert where == {5: str(folds[0]), 6: str(folds[1]), 7: str(folds[0])}
    judging = [plan.judged(f"by-{cell.seed}", "edges", 0, cell) for cell in found]
    needs = [plan.work[name].needs for name in judging]
    assert needs == [("judge",), ("judge-of-fold-1",), ("judge",)]


def test_folds_that_share_queries_are_refused(tmp_path):
    folds = tuple(tiny_pairs(tmp_path / f"fold-{k}", train=4, val=2, test=1) for k in range(2))
    request = Request(study="labels", pairs=folds, config=BASE)
    for changes, message in (
        ({}, r"fold-1: val has a photo that .*fold-0 has there too"),
        ({"seeds": 1}, "--seeds 1: give one for each of 2 --pairs, or more"),
        ({"study": "generation"}, "study generation: give one --pairs"),
    ):
        with pytest.raises(UserError, match=message):
            run_study(
                dataclasses.replace(request, **changes), tmp_path / "study", progress=Progress
            )


# --------------------------------------------------------------------------- what is done


def test_a_training_is_done_when_all_its_runs_are(tmp_path):
    jobs = tuple(
        Job(kind, str(tmp_path / kind), GeneratorTraining(), {})
        for kind in ("generator", "discriminator")
    )
    piece = Train("g", jobs)
    assert piece.cost == 1200 + 400
    assert not piece.done
    assert piece.spent == 0
    for job, status in zip(jobs, ("done", "running"), strict=True):
        (tmp_path / job.kind).mkdir()
        record = {"schema_version": 1, "kind": job.kind, "status": status}
        (tmp_path / job.kind / "run.json").write_text(json.dumps(record))
    assert not piece.done
    lines = [json.dumps({"kind": "step", "step": step, "pad": "x" * 900}) for step in range(1, 8)]
    (tmp_path / "generator" / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "st']))
    (tmp_path / "discriminator" / "metrics.jsonl").write_text('{"kind": "step", "step": 30}\n')
    assert piece.spent == 7 + 30
    (tmp_path / "discriminator" / "run.json").write_text(json.dumps({**record, "status": "done"}))
    assert piece.done


def test_a_measurement_is_done_when_it_is_written(tmp_path):
    piece = Measure("m", "run", "pairs", "val", "", str(tmp_path / "m.json"))
    assert not piece.done
    (tmp_path / "m.json").write_text(json.dumps(Found(["a"], [3], 5).to_json()))
    assert piece.done
    assert piece.found() == Found(["a"], [3], 5)
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(DamagedError, match=r"m\.json: cannot be read"):
        piece.found()


# --------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation", "--rows", "ful"], "error: --rows ful: no such row; did you mean full?"),
        (["labels", "--against", "ful"], "error: --against ful: no such row; did you mean full?"),
        (
            ["labels", "--rows", "supervised,full", "--against", "edges"],
            "error: --against edges: is not among --rows; add it there",
        ),
        (
            ["labels", "--against", "no-joint"],
            "error: --against no-joint: is not among",
        ),
        (["ablation", "--labels", "0.2,0.4"], "error: --labels 0.2,0.4: give one"),
        (["labels", "--split", "test", "--photos", "none"], "error: none/store.json: not a photo"),
        (["photos", "--judge", "run"], "Usage: "),
        (["photos", "--counts", "-1"], "Usage: "),
        (["labels", "--labels", "0.4,2"], "Usage: "),
        (
            ["ablation", "--set", "policy.kind=soft", "--set", "policy.samples=1"],
            "error: policy-reinforce: baseline: leave_one_out needs",
        ),
        (["photos", "--set", "retrieval.negatives=2"], "error: retrieval.negatives: in a study"),
        (["generation", "--judge", "none"], "error: none: not a run folder"),
        (["generation", "--set", "policy.kinds=soft"], "error: unknown setting policy.kinds; did"),
    ],
)
def test_what_a_user_can_mend_is_told_before_anything_begins(
    monkeypatch, capsys, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    tiny_pairs(tmp_path / "pairs", train=2, val=1, test=1)
    command = ["sbir-ray", "study", *words, "--pairs", "pairs", "--out", "study"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "study").exists()


def test_a_split_without_sketches_is_refused(tmp_path):
    pairs = tiny_pairs(tmp_path / "pairs", train=4, val=0)
    request = Request(study="ablation", pairs=(pairs,), config=BASE)
    with pytest.raises(UserError, match="no sketches in val to measure with"):
        run_study(request, tmp_path / "study", progress=Progress)


def test_the_command_of_a_study_asks_for_it_again(tmp_path):
    config = dataclasses.replace(BASE, seed=3)
    request = Request(
        study="ablation",
        pairs=(tmp_path / "my pairs",),
        config=config,
        labels=(0.25,),
        rows=("full", "edges"),
        gallery=tmp_path / "more",
    )
    words = shlex.split(request.command(tmp_path))
    assert words[:3] == ["sbir-ray", "study", "ablation"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--pairs"] == str(tmp_path / "my pairs")
    assert (options["--labels"], options["--rows"], options["--seeds"]) == (
        "0.25",
        "full,edges",
        "3",
    )
    (tmp_path / "joint.toml").write_text(to_toml(config))
    assert load(JointTraining, options["--config"]) == config
