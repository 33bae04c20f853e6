"""A sweep's judgement: what wins, what is told of the knobs, what is suggested next."""

import json
import math

import numpy as np
import pytest
from markupsafe import escape
from scipy.stats import spearmanr

from sbir_ray.config import RetrievalTraining
from sbir_ray.errors import DamagedError, SbirError, UnavailableError, UserError, by_name
from sbir_ray.study.intervals import Found
from sbir_ray.tuning.judgement import common_step, intervals, knob_effects, spearman
from sbir_ray.tuning.page import headline, render, summary
from sbir_ray.tuning.records import FAILURE, FOUND, METRICS, SPEED, Trial, Trials, best, checked
from sbir_ray.tuning.request import Request, check
from sbir_ray.tuning.search import Random, Search, Tpe, is_left
from sbir_ray.tuning.space import Knob, Space, read_space
from sbir_ray.tuning.trial import REFUSED, telling
from tests.tiny import tiny_pairs
from tests.tiny_pseudo import pseudo_row, tiny_pseudo

KNOBS = (
    Knob(name="loss.temperature", low=0.03, high=0.3, scale="log"),
    Knob(name="filters.min_points", low=4, high=24, whole=True),
    Knob(name="loss.certainty", choices=("raw", "none")),
)
DEFAULTS = {"loss.temperature": 0.07, "filters.min_points": 4, "loss.certainty": "raw"}
SPACE = Space(name="mine", trains="semi", knobs=KNOBS)


def evaluation(step, value, m_ap=0.5):
    return {"step": step, **dict.fromkeys(METRICS, value), "mAP": m_ap, SPEED: 2.0}


def trial(number, value, status="done", knobs=None, m_ap=0.5, steps=(4, 8)):
    found = [evaluation(step, value * step / steps[-1], m_ap) for step in steps]
    return Trial(number, knobs or {}, status, found)


def test_the_best_is_finished_finite_and_the_first_of_equals():
    nan = trial(1, math.nan)
    trials = [trial(0, 0.5), nan, trial(2, 0.9, "stopped"), trial(3, 0.6), trial(4, 0.6)]
    assert best(trials, "acc@1") is trials[3]
    trials.append(trial(5, 0.6, m_ap=0.7))
    assert best(trials, "acc@1") is trials[5]
    trials.append(trial(6, math.inf))
    trials.append(trial(7, 0.9, m_ap=math.nan))
    assert best(trials, "acc@1") is trials[5]
    assert best([nan, Trial(1, {}, "failed"), Trial(2, {}, "done")], "acc@1") is None


def test_an_accuracy_that_is_no_number_is_an_error_of_its_trial():
    line = {"kind": "evaluation", **evaluation(8, 0.25), "mean_rank": 3.0}
    assert checked(line, "run") == evaluation(8, 0.25)
    for odd in (math.nan, math.inf, None):
        with pytest.raises(SbirError, match=r"run: acc@1 at step 8 is .*, no number"):
            checked({**line, "acc@1": odd}, "run")


def test_trials_are_their_files(tmp_path):
    trials = Trials(tmp_path, "acc@1")
    trials.add(2, {"loss.temperature": 0.1, "loss.certainty": "none"})
    trials[2].evaluations.append(evaluation(4, 0.5))
    trials[2].failures.append("out of memory")
    trials.keep(2)
    trials.add(0, {})
    again = Trials(tmp_path, "acc@1")
    assert [one.number for one in again] == [0, 2]
    assert again[2] == trials[2]
    assert again[2].last_step == 4
    (tmp_path / "002" / "trial.json").write_text('{"number": 2')
    with pytest.raises(DamagedError, match=r"002/trial.json: cannot be read.*remove its folder"):
        Trials(tmp_path, "acc@1")


def test_what_is_left_to_do():
    assert is_left(Trial(0, {}), retries=0)
    assert not is_left(trial(0, 0.5), retries=9)
    assert not is_left(trial(0, 0.5, "stopped"), retries=9)
    failed = Trial(0, {}, "failed", failures=["a", "b"])
    assert not is_left(failed, retries=1)
    assert is_left(failed, retries=2)
    outages = Trial(0, {}, "failed", failures=["a", *3 * ["for now: the store does not answer"]])
    assert is_left(outages, retries=1)
    assert not is_left(outages, retries=0)
    assert not is_left(Trial(0, {}, "refused", failures=["a"]), retries=2)


def test_the_default_comes_first_then_what_was_begun_then_new_ones(tmp_path):
    trials = Trials(tmp_path, "acc@1")
    trials.add(2, {"loss.temperature": 0.1})
    search = Search(SPACE, trials, [0, 2, 3], DEFAULTS, 7, "random")
    assert search.suggest("a") == {"trial": {"number": 0, "knobs": {}}}
    assert search.suggest("b") == {"trial": {"number": 2, "knobs": {"loss.temperature": 0.1}}}
    third = search.suggest("c")["trial"]
    assert set(third["knobs"]) == set(DEFAULTS)
    assert search.suggest("d") == "FINISHED"
    # As a function of seed and number: what a killed process would have drawn.
    assert third["knobs"] == Random(KNOBS, 7).next(3)
    assert Trials(tmp_path, "acc@1")[3].knobs == third["knobs"]


def test_tpe_goes_where_trials_were_good(tmp_path):
    trials = Trials(tmp_path, "acc@1")
    rng = np.random.default_rng(0)
    for number in range(1, 21):
        knobs = {knob.name: knob.draw(rng) for knob in KNOBS}
        good = 1 - KNOBS[0].place(knobs["loss.temperature"])
        trials.found[number] = trial(number, good, knobs=knobs)
    trials.found[0] = trial(0, 0.1)
    # What did not come to an end, or is no number, is no guide.
    trials.found[40] = Trial(40, {"loss.temperature": 0.3}, "failed", [evaluation(4, 1.0)])
    trials.found[41] = trial(41, math.nan, knobs={"loss.temperature": 0.3})
    draw = Tpe(KNOBS, 0, trials, DEFAULTS)
    drawn = [draw.next(number) for number in range(50, 56)]
    assert all(knob.holds(one[knob.name]) for one in drawn for knob in KNOBS)
    assert np.mean([KNOBS[0].place(one["loss.temperature"]) for one in drawn]) < 0.3
    assert drawn[0] == Tpe(KNOBS, 0, trials, DEFAULTS).next(50)
    assert drawn[0] != drawn[1]


def test_correlations_are_those_of_scipy_and_say_when_they_do_not_know():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, (3, 12)).astype(float), rng.normal(size=(3, 12))
    by_scipy = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    assert spearman(x, y) == pytest.approx(by_scipy)
    trials = []
    for number in range(1, 13):
        knobs = {
            "loss.temperature": 0.03 + 0.02 * number,
            "filters.min_points": int(rng.integers(4, 24)),
            "loss.certainty": "raw",
        }
        # Stopped trials count at the step that all have reached.
        odd = number % 2
        steps = (4, 8) if odd else (4,)
        trials.append(
            Trial(
                number,
                knobs,
                "done" if odd else "stopped",
                [evaluation(step, 0.9 - 0.01 * number) for step in steps],
            )
        )
    trials.append(Trial(13, {}, "failed"))
    assert common_step(trials) == 4
    found = knob_effects(KNOBS, trials, DEFAULTS, "acc@1")
    assert (found["step"], found["trials"]) == (4, 12)
    by_name = {one["name"]: one for one in found["knobs"]}
    assert found["knobs"][0]["name"] == "loss.temperature"
    assert by_name["loss.temperature"]["correlation"] == pytest.approx(-1)
    low, high = by_name["filters.min_points"]["ci95"]
    assert low < 0 < high
    assert by_name["loss.certainty"]["correlation"] is None  # it did not vary
    few = knob_effects(KNOBS, trials[:4], DEFAULTS, "acc@1")
    assert {one["correlation"] for one in few["knobs"]} == {None}


def test_a_population_is_told_by_the_knobs_that_its_networks_had():
    trials = []
    for number in range(6):
        one = trial(number, 0.1 * number, knobs={"loss.temperature": 0.1 + 0.01 * number})
        one.changes = [{"step": 4, "knobs": {"loss.temperature": 0.05}, "came_from": 5}]
        trials.append(one)
    found = knob_effects(KNOBS, trials, DEFAULTS, "acc@1")
    assert found["step"] == 4  # the last one before knobs change hands
    assert trials[0].last_knobs == {"loss.temperature": 0.05}
    assert trial(0, 0.5, knobs={"a": 1}).last_knobs == {"a": 1}


def test_what_another_try_may_mend_is_a_failure_and_what_none_does_is_refused(
    tmp_path, monkeypatch
):
    told = []
    monkeypatch.setattr("ray.tune.report", told.append)
    with telling(tmp_path / "000"):
        raise UserError("no pseudo pair was kept")
    assert told == [{"step": 0, REFUSED: "no pseudo pair was kept"}]
    assert not (tmp_path / "000" / FAILURE).exists()
    for error, start in (
        (UnavailableError("the store does not answer"), "for now: "),
        (SbirError("a worker died"), ""),
    ):
        with pytest.raises(type(error)), telling(tmp_path / "001"):
            raise error
        assert (tmp_path / "001" / FAILURE).read_text() == f"{start}{error}\n"
    assert len(told) == 1
    # As it comes back from another process.
    assert by_name("UnavailableError") is UnavailableError


def values(tmp_path, confirmed):
    trials = Trials(tmp_path, "acc@1")
    rng = np.random.default_rng(2)
    for number in range(7):
        knobs = {knob.name: knob.draw(rng) for knob in KNOBS} if number else {}
        trials.found[number] = trial(number, (number + 4) / 20, knobs=knobs)
        trials.place(number).mkdir(parents=True)
        ranks = [1] * (number + 4) + [11] * (16 - number)
        found = Found([f"p{i}" for i in range(20)], ranks, 20)
        (trials.place(number) / FOUND).write_text(json.dumps(found.to_json()))
    trials.found[7] = trial(7, 0.9, "stopped", {"loss.certainty": "none"}, steps=(4,))
    trials.found[8] = Trial(8, {}, "refused", failures=["<b>no pair</b> was kept"])
    (tmp_path / "out").mkdir()
    return {
        "space": "mine",
        "metric": "acc@1",
        "steps": 8,
        "seed": 0,
        "defaults": DEFAULTS,
        "default": 0,
        "trials": [{**one.to_json(), **intervals(trials, one)} for one in trials],
        "best": {
            "number": 6,
            "knobs": trials[6].knobs,
            "config": "out/best.toml",
            "phases": [{"end": 8, "knobs": trials[6].knobs}],
        },
        "effects": knob_effects(KNOBS, list(trials), DEFAULTS, "acc@1"),
        "confirmed": {"caution": "It is optimistic.", "method": "Bootstrap.", **confirmed},
        "command": "sbir-ray tune mine.toml",
        "report": "out/report.html",
        "request": {"space": SPACE.to_json(), "pairs": ["chairs", "12ab"], "photos": None},
        "versions": {"python": "3.11"},
    }


def rerun(mean, low, high):
    one = {"mean": 0.4, "ci95": [0.3, 0.5], "by_seed": {"1": 0.4, "2": 0.4}}
    gain = {"mean": mean, "ci95": [low, high]}
    names = ("acc@1", "acc@5", "acc@10")
    return {
        "status": "done",
        "seeds": [1, 2],
        "best": dict.fromkeys(names, one),
        "default": dict.fromkeys(names, one),
        "difference": dict.fromkeys(names, gain),
    }


def test_the_page_says_what_was_found_whatever_it_is(tmp_path):
    found = values(tmp_path, rerun(0.031, 0.01, 0.05))
    page = render(found)
    text = headline(found)
    assert text.startswith("Trial 6 reaches 50.0% acc@1 on validation, the default 20.0%. With 2 ")
    assert "+3.1 points (95% interval +1.0 to +5.0): better." in text
    assert escape(text) in page
    assert "It is optimistic." in page
    assert page.count("<polyline") == 8  # all but the one that was never measured
    assert page.count('class="best"') == 1
    assert page.count("<figure><h3>") == len(KNOBS)
    assert "&lt;b&gt;no pair&lt;/b&gt;" in page
    assert "<b>no pair" not in page
    assert "stopped: others were better here" in page
    assert "+0.0" not in page
    assert "trial 8 refused: <b>no pair</b> was kept" in summary(found)
    worse = {**found, "confirmed": {**found["confirmed"], **rerun(-0.02, -0.03, -0.01)}}
    assert "−2.0 points (95% interval −3.0 to −1.0): worse." in headline(worse)
    unsure = {**found, "confirmed": {**found["confirmed"], **rerun(0.02, -0.03, 0.05)}}
    assert "not distinguishable from it." in headline(unsure)
    assert "<td>0.50</td>" in page
    found["trials"][6]["evaluations"][-1][SPEED] = 0.8
    assert headline(found).endswith("better. A step of it takes 2.5 times as long.")
    found["trials"][6]["changes"] = [{"step": 4, "knobs": {"loss.temperature": 0.0471}}]
    assert "0.0471" in render(found)
    del found["trials"][0]["evaluations"][-1][SPEED]  # of an older sweep
    assert headline(found).endswith("better.")


def test_the_page_without_a_rerun(tmp_path):
    found = values(tmp_path, {"status": "skipped"})
    assert "not confirmed by other seeds" in headline(found)
    assert "best by luck too" in render(found)
    found["confirmed"] = {
        **found["confirmed"],
        "status": "failed",
        "reasons": {"default/seed-1": "no memory"},
    }
    assert "default/seed-1: no memory" in render(found)
    found["best"] = {**found["best"], "number": 0, "knobs": {}}
    found["confirmed"]["status"] = "default"
    assert headline(found).startswith("No trial beat the default: 20.0%")
    assert "nothing to train again" in render(found)


@pytest.mark.parametrize(
    ("knob", "range_", "told"),
    [
        ("filters.min_certainty", [0.0, 0.6], "contours has no discriminator"),
        ("filters.max_rank", [1, 50], "ranks are a teacher's"),
    ],
)
def test_a_threshold_on_what_nobody_judged_is_refused_before_any_trial(
    tmp_path, knob, range_, told
):
    file = tmp_path / "space.toml"
    file.write_text(f'trains = "semi"\n[knob."{knob}"]\nrange = {range_}\n')
    pseudo = tiny_pseudo(
        tmp_path / "drawn", [pseudo_row(1)], sketcher="contours", generative=False, judged=False
    )
    request = Request(
        space=read_space(file),
        file=file,
        pairs=tiny_pairs(tmp_path / "pairs", val=2),
        pseudo=pseudo,
        config=RetrievalTraining(),
    )
    with pytest.raises(UserError, match=rf"^space: .*{knob}=.*{told}.*; or take the knob out"):
        check(request)
