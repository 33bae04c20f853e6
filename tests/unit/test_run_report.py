"""The report of a training run, from the files in its folder."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray import joint_report, plots, run_report
from sbir_ray.config import GeneratorTraining
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.strokes import unflatten
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.evaluate import Metrics, paired_difference, summarise
from sbir_ray.report import headline, render
from sbir_ray.strict import to_dict
from tests.joint_run import LEDGER, POOL, leave_exhibits, log_steps, make_joint_run, write
from tests.tiny import tiny_pairs
from tests.tiny_pseudo import pseudo_row, tiny_pseudo


def metrics(share: float = 0.4, gallery: int = 30) -> Metrics:
    rank = np.where(np.arange(60) < share * 60, 1, np.arange(60) % (gallery - 1) + 2)
    return summarise(rank, np.arange(60) // 2, gallery)


def make_run(run: Path) -> None:
    run.mkdir()
    record = {
        "schema_version": 1,
        "kind": "retrieval",
        "config": {"seed": 3, "optim": {"lr": 0.1}},
        "digest": "0123456789ab",
        "versions": {"torch": "2"},
        "inputs": {"pairs": "pairs"},
        "status": "done",
    }
    write(run / "run.json", record)
    lines = [
        {"kind": "step", "step": 1, "steps": 2, "loss": 2.0, "seconds": 0.1},
        {"kind": "step", "step": 2, "steps": 2, "loss": 1.0, "pair_loss": 0.5, "seconds": 0.2},
        {"kind": "evaluation", "step": 2, "steps": 2, "acc@1": 0.25, "mean_rank": 4.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, share in (("test", 0.3), ("val", 0.5)):
        values = {"metrics": metrics(share).to_json(), "per_query": []}
        write(run / f"evaluation-{split}.json", values)


def evaluation(ranks: list[int], split: str = "test", mirror: bool = False) -> dict[str, Any]:
    """Of two sketches a photo."""
    rows = [
        {"sketch_id": f"s{i}", "photo": f"p{i // 2}", "rank": rank, "top": []}
        for i, rank in enumerate(ranks)
    ]
    photo_of = [i // 2 for i in range(len(ranks))]
    return {
        "split": split,
        "pairs": "/nowhere",
        "gallery": None,
        "mirror": mirror,
        "metrics": summarise(np.array(ranks), photo_of, 30).to_json(),
        "per_query": rows,
    }


# --------------------------------------------------------------------------- a retrieval network


def test_the_report_of_a_run_has_its_evaluations_curves_and_settings(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    data = run_report.from_run(tmp_path / "run")
    assert [(r.name, r.metrics) for r in data.results] == [
        ("test", metrics(0.3)),
        ("val", metrics(0.5)),
    ]
    assert [(c.name, list(c.steps), list(c.values)) for c in data.curves] == [
        ("loss", [1, 2], [2.0, 1.0]),
        ("pair_loss", [2], [0.5]),
        ("acc@1", [2], [0.25]),
    ]
    page = render(data)
    for text in ("optim.lr = 0.1", "0123456789ab", "test: 30.0% of 60 sketches"):
        assert text in page


def test_a_retrieval_run_that_was_not_evaluated_has_no_report_yet(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    for file in (tmp_path / "run").glob("evaluation-*"):
        file.unlink()
    with pytest.raises(UserError, match="sbir-ray evaluate"):
        run_report.from_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.json"):
        run_report.from_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation-test.json", "{"),
        ("evaluation-test.json", '{"metrics": {"acc@1": 1}}'),
        ("evaluation-test.json", "[]"),
        ("metrics.jsonl", '{"kind": "step", "st'),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str, text: str) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(DamagedError, match=name):
        run_report.from_run(tmp_path / "run")


# --------------------------------------------------------------------------- G and D


def test_pairs_of_several_folders_are_shown_together_and_counted_each_by_itself(tmp_path):
    drawn = tiny_pseudo(tmp_path / "a", [pseudo_row(0), pseudo_row(1, reason="rank")])
    traced = tiny_pseudo(tmp_path / "b", [pseudo_row(1), pseudo_row(2)], sketcher="contours")
    empty = tiny_pseudo(tmp_path / "c", [pseudo_row(3, reason="rank")])
    fields = run_report.pseudo_sections({drawn: None, traced: None, empty: None}, 64, None)
    assert fields["pseudo"].total == 3
    assert fields["pseudo"].sketcher == "generator and contours"
    assert [(title, ledger.count("kept")) for title, ledger in fields["ledgers"]] == [
        ("Pseudo pairs of a", 1),
        ("Pseudo pairs of b", 2),
        ("Pseudo pairs of c", 0),
    ]
    nothing = run_report.pseudo_sections({empty: None}, 64, None)
    assert (nothing["pseudo"].total, nothing["pseudo"].examples) == (0, [])


def test_a_generator_s_report_shows_how_it_and_its_discriminator_learnt(tmp_path: Path) -> None:
    record = {
        "schema_version": 1,
        "kind": "generator",
        "config": to_dict(GeneratorTraining()),
        "digest": "0123456789ab",
        "inputs": {"pairs": "pairs"},
        "status": "done",
    }
    logs = {
        "g": [
            {"kind": "step", "step": 10, "steps": 20, "loss": 4.0, "offset": 3.0, "pen": 0.9},
            {"kind": "step", "step": 20, "steps": 20, "loss": 3.5, "offset": 2.0, "pen": 0.7},
            {"kind": "evaluation", "step": 20, "steps": 20, "offset": 2.25, "pen": 0.75},
        ],
        "g/discriminator": [
            {"kind": "step", "step": 5, "steps": 5, "real": 0.5, "wrong": 0.25, "loss": 1.0},
            {"kind": "step", "step": 5, "steps": 5, "drawn": 0.125, "certainty_real": 0.75},
        ],
    }
    for name, lines in logs.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "run.json", record)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    data = run_report.run_report(tmp_path / "g")
    assert [(c.panel, c.name, list(c.values)) for c in data.curves] == [
        ("Generator: loss", "loss", [4.0, 3.5]),
        ("Generator: negative log-likelihood, nats a point", "offsets", [3.0, 2.0]),
        ("Generator: negative log-likelihood, nats a point", "pen states", [0.9, 0.7]),
        ("Generator: the same in validation", "offsets", [2.25]),
        ("Generator: the same in validation", "pen states", [0.75]),
        ("Discriminator: loss", "people's sketches", [0.5]),
        ("Discriminator: loss", "drawings", [0.125]),
        ("Discriminator: loss", "wrong photos", [0.25]),
        ("Discriminator: certainty", "people's sketches", [0.75]),
    ]
    page = render(data)
    assert re.findall(r'<section id="(\w+)"', page) == ["curves", "again"]
    assert "Step 20 of 20: in validation 2.25 nats a point for the offsets and 0.75" in page


# --------------------------------------------------------------------------- joint training


def test_a_joint_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    page = render(run_report.run_report(run))
    assert "No step has been logged yet." in page
    assert re.findall(r'<section id="(\w+)"', page) == ["again"]


def test_an_unfinished_joint_run_shows_what_is_there(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    log_steps(run, 12)
    assert "Step 12 of 240; nothing was evaluated." in render(run_report.run_report(run))
    log_steps(run, 40)
    data = run_report.run_report(run)
    page = render(data)
    assert "Step 40 of 240: 8.0% of the validation sketches found their photo first" in page
    assert re.findall(r'<section id="(\w+)"', page) == ["curves", "stream", "again"]
    assert data.results == []


def test_the_curves_of_a_joint_run_are_those_of_its_log(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    lines = log_steps(run, 40)
    data = run_report.run_report(run)
    curves = {(c.panel, c.name): c for c in [*data.curves, *data.stream_curves]}
    for key, place in {
        "pseudo": ("Retrieval: loss", "pseudo pairs"),
        "reward": ("Generator: reward", "mean"),
        "d_wrong": ("Discriminator: loss", "wrong photos"),
        "certainty_drawn": ("Discriminator: certainty", "drawings"),
        "d_own": ("Discriminator: loss", "drawings of labelled photos"),
        "g_offset": ("Generator: the same in validation", "offsets"),
        "kept": ("Pseudo pairs that passed the filters, %", "kept"),
        "acc@5": ("Validation accuracy, %", "acc@5"),
        "wait_share": ("Share of the time spent waiting for rows, %", "waiting"),
        "sketches_per_second": ("Rates, a second", "drawings"),
    }.items():
        curve = curves.pop(place)
        rows = [line for line in lines if key in line]
        assert list(curve.steps) == [row["step"] for row in rows]
        assert list(curve.values) == [row[key] for row in rows]
        assert curve.percent == (key in ("acc@5", "wait_share", "kept"))
    shown = {key for lines in run_report.PANELS["joint"] for key in lines[2]}
    shown |= {key for lines in run_report.STREAM_PANELS for key in lines[2]}
    position = {"kind", "step", "steps", "seconds", "turn", "version", "g_kl"}
    assert {key for line in lines for key in line} - position == shown


def test_the_page_of_a_joint_run_has_the_numbers_of_its_files(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    log_steps(run, 240)
    leave_exhibits(run)
    write(run / "evaluation-test.json", evaluation([1, 2, 1, 1]))
    page = render(run_report.run_report(run))
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["accuracy", "curves", "lessons", "looks", "pseudo", "stream", "again"]
    assert re.findall(r'href="#(\w+)"', page)[: len(sections)] == sections
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    text = re.sub(r"<[^>]*>", " ", page.replace("\u202f", ""))
    text = re.sub(r"\s+", " ", text)

    for expected in (
        "drawn 1000 100.0 stale 41 4.1 filtered 120 12.0 max_rank 97 min_points 23 "
        "in flight 22 2.2 used 817 81.7",
        "0 611 61.1 1 289 28.9 2 59 5.9 5 or more 41 4.1",
    ):
        assert expected in text

    table = json.loads((run / "certainty.json").read_text())
    for number, d in enumerate(table["deciles"], start=1):
        tag = {1: " most", 10: " least"}.get(number, "")
        assert (
            f"{number}{tag} {d['count']} {d['certainty']:.2f} {d['low']:.2f} to {d['high']:.2f} "
            f"{100 * d['found']:.1f} {100 * d['found10']:.1f} {d['median_rank']:.1f}"
        ) in text
    assert f"24 of {POOL} pseudo pairs, drawn by the generator of step 240" in text
    best = int(np.argmax(table["certainty"]))
    assert f"{table['certainty'][best]:.2f} rank {table['rank'][best]}" in text

    assert "The same 12 photos" in text
    assert "They were drawn 8 times" in text
    shown = [json.loads(line) for line in (run / "drawings.jsonl").read_text().splitlines()]
    for i in (0, 2, 4, 5, 7):
        assert f"step {30 * i} version {6 * i}" in text
        drawing = plots.sketch_path(unflatten(shown[i]["strokes"][3]))
        assert f'aria-label="Drawing of photo 4 at step {30 * i}"><path d="{drawing}"/>' in page
    rows = re.findall(r'<p class="under">(\d\.\d\d)</p>', page)
    assert rows[:5] == [f"{shown[i]['certainty'][0]:.2f}" for i in (0, 2, 4, 5, 7)]
    assert len(rows) == 12 * 5


def test_a_joint_run_is_compared_with_its_teacher_on_the_same_queries(tmp_path: Path) -> None:
    teacher = tmp_path / "supervised"
    teacher.mkdir()
    run = make_joint_run(tmp_path / "run", teacher=str(teacher))
    ours, theirs = [1, 1, 4, 1, 1, 2], [2, 1, 5, 3, 1, 2]
    write(run / "evaluation-test.json", evaluation(ours))
    write(run / "evaluation-val.json", evaluation(ours, "val", mirror=True))
    write(teacher / "evaluation-test.json", evaluation(theirs))
    write(teacher / "evaluation-val.json", evaluation(theirs, "val"))
    data = run_report.run_report(run)
    assert [r.name for r in data.results] == ["supervised, test", "joint, test", "joint, val"]
    gain = paired_difference(np.array(ours), np.array(theirs), [0, 0, 1, 1, 2, 2])
    assert [r.difference for r in data.results] == [None, gain, None]
    assert headline(data).startswith("Joint training changed acc@1 by +33.3 points")


def test_a_joint_run_shows_its_queries_while_its_pairs_are_there(tmp_path: Path) -> None:
    pairs = PairSet.load(tiny_pairs(tmp_path / "pairs"), "test", 32)
    run = make_joint_run(tmp_path / "run")
    found = evaluation([1, 2, 1, 1, 3, 1, 4, 1])
    found["pairs"] = str(tmp_path / "pairs")
    ids = list(pairs.photo_ids)
    found["per_query"] = [
        {"sketch_id": name, "photo": ids[of], "rank": rank, "top": ids}
        for name, of, rank in zip(
            pairs.sketch_ids, pairs.photo_of, (1, 2, 1, 1, 3, 1, 4, 1), strict=True
        )
    ]
    write(run / "evaluation-test.json", found)
    grid = run_report.run_report(run).queries
    assert grid is not None
    assert (grid.queries, grid.found) == (8, 5)
    assert [q.rank for q in grid.examples] == [1, 1, 1, 1, 1, 2, 3, 4]
    assert grid.examples[0].photo.shape == (128, 128, 3)
    (tmp_path / "pairs").rename(tmp_path / "moved")
    assert run_report.run_report(run).queries is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ledger.json", json.dumps({**LEDGER, "used": 816})),
        ("ledger.json", '{"schema_version": 1, "drawn": 3}'),
        ("certainty.json", '{"schema_version": 1, "certainty": [0.5]}'),
        ("certainty.json", "[]"),
        ("attention.json", '{"schema_version": 1, "looks": [{"photo": "AAAA"}]}'),
        ("drawings.jsonl", '{"step": 1}\n'),
        ("drawings.jsonl", '{"step": 1, "vers'),
        ("exhibits.json", "{"),
    ],
)
def test_a_damaged_exhibit_is_named(tmp_path: Path, name: str, text: str) -> None:
    run = make_joint_run(tmp_path / "run")
    leave_exhibits(run)
    (run / name).write_text(text)
    with pytest.raises(DamagedError, match=re.escape(name)):
        run_report.run_report(run)


def test_a_newer_exhibit_is_refused(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    write(run / "certainty.json", {"schema_version": 99})
    with pytest.raises(UserError, match="newer"):
        run_report.run_report(run)


def test_the_way_to_used_has_bars_that_meet() -> None:
    account = joint_report.StreamAccount(
        drawn=200,
        stale=20,
        filtered={"a": 10, "b": 30},
        in_flight=40,
        used=100,
        staleness={},
        max_staleness=4,
    )
    found = [(s.name, s.number, s.start, s.share) for s in account.stages]
    assert found == [
        ("drawn", 200, 0.0, 1.0),
        ("stale", 20, 0.9, 0.1),
        ("filtered", 40, 0.7, 0.2),
        ("in flight", 40, 0.5, 0.2),
        ("used", 100, 0.0, 0.5),
    ]
    assert account.stages[2].reasons == [("b", 30), ("a", 10)]
    nothing = dataclasses.replace(
        account, drawn=0, stale=0, filtered={}, in_flight=0, used=0
    ).stages
    assert {stage.share for stage in nothing} == {0.0}


# --------------------------------------------------------------------------- parts of a drawing


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 8))
def test_a_drawing_is_cut_at_the_ends_of_its_strokes(lengths: list[int], count: int) -> None:
    strokes = [np.zeros((n, 2), np.float32) for n in lengths]
    cuts = joint_report.parts(strokes, count)
    ends = {0, *np.cumsum(lengths).tolist()}
    assert cuts == sorted(set(cuts))
    assert (cuts[0], cuts[-1]) == (0, sum(lengths))
    assert len(cuts) - 1 == min(count, sum(lengths))
    if len(lengths) >= count:
        assert set(cuts) <= ends
    else:
        assert ends <= set(cuts)


def test_small_strokes_stay_together_and_long_ones_are_cut() -> None:
    def cut(lengths: list[int], count: int) -> list[int]:
        return joint_report.parts([np.zeros((n, 2), np.float32) for n in lengths], count)

    assert cut([10, 2, 3, 10], 3) == [0, 10, 15, 25]
    assert cut([10, 4], 3) == [0, 5, 10, 14]


def test_the_moments_of_a_look_draw_the_whole_and_average_their_points(tmp_path: Path) -> None:
    run = make_joint_run(tmp_path / "run")
    leave_exhibits(run)
    record = json.loads((run / "attention.json").read_text())["looks"][0]
    strokes = unflatten(record["strokes"])
    (look, *_) = joint_report.read_looks(run, moments=3)
    (whole, *_) = joint_report.read_looks(run, moments=1)
    assert [s.tolist() for s in whole.moments[0].now] == [s.tolist() for s in strokes]
    assert whole.moments[0].before == []
    cuts = joint_report.parts(strokes, 3)
    sizes = np.diff(cuts)
    mean = sum(m.share * n for m, n in zip(look.moments, sizes, strict=True)) / cuts[-1]
    assert mean == pytest.approx(whole.moments[0].share)
    assert mean.sum() == pytest.approx(1, abs=1e-3)
    for moment, first in zip(look.moments, cuts, strict=False):
        assert sum(map(len, moment.before)) == first
    # A part that begins within a stroke has the line that leads to it.
    inner = next(i for i, c in enumerate(cuts[1:-1], 1) if c != len(strokes[0]))
    assert (look.moments[inner].now[0][0] == look.moments[inner].before[-1][-1]).all()


def test_a_look_is_tinted_where_it_is_strongest() -> None:
    share = np.zeros((4, 4))
    share[0, 3] = 1.0
    rgb = np.full((64, 64, 3), 200, np.uint8)
    seen = decoded(plots.look_uri(rgb, share))
    top_right, rest = seen[:8, -8:].mean((0, 1)), seen[40:, :24].mean((0, 1))
    assert top_right[0] - top_right[2] > 100
    assert np.ptp(rest) < 6
    assert (rest > 200).all()


def test_an_even_look_tints_the_photo_faintly_and_everywhere_alike() -> None:
    rgb = np.full((64, 64, 3), 200, np.uint8)
    even = decoded(plots.look_uri(rgb, np.full((4, 4), 1 / 16)))
    assert 10 < (even[..., 0] - even[..., 2]).mean() < 50
    assert even.reshape(-1, 3).std(axis=0).max() < 3


def decoded(uri: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(picture.convert("RGB")).astype(float)
