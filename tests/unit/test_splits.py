"""Which photo goes to which split, when the splits are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.data.pairs import Split
from sbir_ray.data.sources import SourcePhoto
from sbir_ray.data.splits import SplitOptions, given_splits, hold_back
from sbir_ray.errors import UserError


def photo(name: str) -> SourcePhoto:
    return SourcePhoto(name, name, None, lambda limits: pytest.fail("not to be loaded"))


def chosen(names: list[str], **options: object) -> dict[str, Split]:
    split = SplitOptions(**options)  # type: ignore[arg-type]
    given, found = given_splits([photo(name) for name in names], [None] * len(names), split)
    assert not found
    assert None not in given
    return dict(zip(names, hold_back(given, names, split), strict=True))  # type: ignore[arg-type]


def test_every_nth_photo_by_name_is_held_back() -> None:
    names = [f"p{n:02}" for n in range(10)]
    splits = chosen(names[::-1], val_every=5)
    assert [name for name in names if splits[name] == "val"] == ["p00", "p05"]


def test_folds_hold_every_photo_once() -> None:
    names = [f"p{n:02}" for n in range(11)]
    folds = [
        {name for name, split in chosen(names, fold=(k, 4)).items() if split == "val"}
        for k in range(4)
    ]
    assert sum(map(len, folds)) == len(set.union(*folds)) == 11
    assert folds[0] == {name for name, s in chosen(names, val_every=4).items() if s == "val"}


@settings(deadline=None, max_examples=30)
@given(
    names=st.lists(st.text(min_size=1, max_size=8), unique=True, min_size=2, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_a_photo_that_is_added_moves_no_other_one(names: list[str], seed: int) -> None:
    before = chosen(names[:-1], val_fraction=0.3, test_fraction=0.3, seed=seed)
    after = chosen(names, val_fraction=0.3, test_fraction=0.3, seed=seed)
    assert before.items() <= after.items()


def test_fractions_are_about_what_was_asked() -> None:
    names = [str(n) for n in range(2000)]
    splits = list(chosen(names, val_fraction=0.1, test_fraction=0.3).values())
    assert abs(splits.count("val") / 2000 - 0.1) < 0.03
    assert abs(splits.count("test") / 2000 - 0.3) < 0.04


def test_a_unit_is_held_back_as_a_whole_or_not_at_all() -> None:
    units = ["a", "a", "b", "c", "c", "d"]
    given: list[Split] = ["train", "train", "train", "train", "test", "train"]
    held = hold_back(given, units, SplitOptions(val_every=2))
    # c has a photo in test: it is nobody's to choose, and a check finds the leak.
    assert held == ["val", "val", "train", "train", "test", "val"]


def wrong(**options: object) -> Mapping[str, object]:
    return options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (wrong(val_every=1), "at least 2"),
        (wrong(fold=(3, 3)), "0 <= k < n"),
        (wrong(val_fraction=1.0), r"\[0, 1\)"),
        (wrong(val_fraction=0.6, test_fraction=0.6), "no photo to train on"),
        (wrong(val_every=5, val_fraction=0.1), "exclude each other"),
        (wrong(fold=(0, 2), csv=Path("x")), "exclude each other"),
    ],
)
def test_split_options_without_sense_are_refused(options: Mapping[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        SplitOptions(**options)  # type: ignore[arg-type]
