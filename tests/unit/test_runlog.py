from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.errors import DamagedError, UserError
from sbir_ray.runlog import Ledger, Progress, building, duration, versions, write_json_atomic

REASONS = st.dictionaries(st.sampled_from(["truncated", "too-small", "bomb"]), st.integers(0, 9))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_ledger_that_misses_a_row_does_not_pass_its_check() -> None:
    ledger = Ledger("photos", total=3)
    ledger.add("stored", count=2)
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.check()
    ledger.add("rejected", "truncated")
    ledger.check()


def test_a_ledger_that_counts_a_row_twice_is_not_written() -> None:
    ledger = Ledger("pseudo", total=1)
    ledger.add("kept")
    ledger.add("filtered", "min_points")
    with pytest.raises(AssertionError):
        ledger.to_json()


def test_a_rejection_without_a_reason_is_a_fault_of_the_program() -> None:
    with pytest.raises(AssertionError):
        Ledger("photos", 1).add("rejected")


@settings(deadline=None, max_examples=30)
@given(stored=st.integers(0, 99), rejected=REASONS, failed=REASONS)
def test_a_ledger_survives_json(
    stored: int, rejected: dict[str, int], failed: dict[str, int]
) -> None:
    ledger = Ledger("photos", stored + sum(rejected.values()) + sum(failed.values()))
    ledger.add("stored", count=stored)
    for fate, reasons in (("rejected", rejected), ("failed", failed)):
        for reason, count in reasons.items():
            ledger.add(fate, reason, count)
    assert Ledger.from_json("photos", json.loads(json.dumps(ledger.to_json())), "x") == ledger


@pytest.mark.parametrize(
    "change", [{"drawn": 4}, {"kept": 3}, {"lost": 1}, {"filtered": {"require_end": 2}}]
)
def test_a_changed_ledger_is_refused_by_file_name(change: dict[str, object]) -> None:
    values = {"drawn": 3, "kept": 2, "filtered": {"require_end": 1}, "failed": {}, **change}
    with pytest.raises(DamagedError, match=r"^pseudo\.json: "):
        Ledger.from_json("pseudo", values, "pseudo.json")


def test_a_ledger_reads_as_one_line_with_the_commonest_reason_first() -> None:
    ledger = Ledger("photos", 1203)
    ledger.add("stored", count=1200)
    ledger.add("rejected", "bomb")
    ledger.add("rejected", "truncated", 2)
    assert str(ledger) == "1,203 read: 1,200 stored, 3 rejected (truncated 2, bomb 1)"


def test_progress_off_a_terminal_is_a_plain_line_every_few_seconds_with_rate_and_time_left() -> (
    None
):
    clock, file = Clock(), io.StringIO()
    with Progress("ingest", 100, "photos", file=file, every=5.0, clock=clock) as progress:
        clock.now = 4.0  # the workers start: no part of the rate
        progress.advance(20)
        for _ in range(3):
            clock.now += 2.0
            progress.advance(10, note="3 rejected")
        progress.say("a line of its own")
    assert file.getvalue().splitlines() == [
        "ingest: 30 of 100 photos, 5.0/s, 14 s left, 3 rejected",
        "a line of its own",
        "ingest: 50 of 100 photos, 5.0/s, 10 s left, 3 rejected",
    ]


def test_progress_on_a_terminal_is_one_line_that_ends_at_the_total() -> None:
    file = Tty()
    with Progress("train", file=file) as progress:
        progress.update(1, 2, "loss 0.5")
        progress.say("resumed [at] step 1")
        progress.update(2, 2, "loss 0.4")
    shown = file.getvalue()
    assert "resumed [at] step 1" in shown
    assert re.search(r"train.*2 of 2.*loss 0\.4", shown.splitlines()[-2] + shown.splitlines()[-1])


def test_durations_are_short() -> None:
    assert [duration(s) for s in (8.4, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 5 min"]


def test_a_json_file_keeps_its_old_content_when_the_new_one_cannot_be_written(
    tmp_path: Path,
) -> None:
    file = tmp_path / "store.json"
    write_json_atomic(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["store.json"]


def test_a_folder_appears_under_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with building(out, {"n": 1}) as partial:
        (partial / "part").write_text("x")
        assert not out.exists()
    assert [f.name for f in out.iterdir()] == ["part"]
    assert [f.name for f in tmp_path.iterdir()] == ["store"]


def test_the_same_request_goes_on_in_the_folder_that_an_error_left(tmp_path: Path) -> None:
    out = tmp_path / "store"

    def attempt(request: dict[str, int], fail: bool) -> None:
        with building(out, request) as partial:
            seen.append(sorted(f.name for f in partial.glob("part-*")))
            (partial / f"part-{len(seen)}").touch()
            if fail:
                raise RuntimeError

    seen: list[list[str]] = []
    for request in ({"n": 1}, {"n": 1}, {"n": 2}):
        with pytest.raises(RuntimeError):
            attempt(request, fail=True)
    assert seen == [[], ["part-1"], []]
    attempt({"n": 2}, fail=False)
    assert sorted(f.name for f in out.iterdir()) == ["part-3", "part-4"]


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"), building(tmp_path, {}):
        pass


def test_two_runs_cannot_make_the_same_folder(tmp_path: Path) -> None:
    out = tmp_path / "store"
    # A lock belongs to an open file, so a second one in this process is refused like a process's.
    with building(out, {}), pytest.raises(UserError, match="another run"), building(out, {}):
        pass
    assert out.is_dir()


def test_versions_name_what_decides_the_numbers() -> None:
    assert {"sbir_ray", "python", "numpy", "torch", "ray"} <= set(versions())
