"""The PSEUDO folder: what is read is what was written, whole, in one order, or an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbir_ray.config import ChoiceConfig, FilterConfig
from sbir_ray.data import photos
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.stream.pseudo_store import ABSENT, PseudoSet, iter_rows, read_header, refilter
from tests.tiny import photo, sketch
from tests.tiny_pseudo import pseudo_row, tiny_pseudo

LATER = ["photo_sha256", "sample", "rows", "ended", "rank", "similarity", "settings_digest"]


@pytest.fixture
def folder(tmp_path):
    failed = pseudo_row(2, status="failed", reason="nothing-to-draw")
    return tiny_pseudo(
        tmp_path / "pseudo",
        [pseudo_row(3, certainty=0.9), pseudo_row(1, sample=7), failed],
        [pseudo_row(1, sample=5, certainty=0.1), pseudo_row(0, reason="min_certainty")],
    )


def test_pairs_come_in_order_of_photo_and_seed_whatever_the_files(folder):
    loaded = PseudoSet.load(folder, 64)
    assert loaded.photo_ids == ["01", "03"]
    assert loaded.photo_of.tolist() == [0, 0, 1]
    np.testing.assert_allclose(loaded.certainty, [0.1, 0.5, 0.9])
    for found, expected in zip(
        loaded.sketches, [sketch(1, 5), sketch(1, 7), sketch(3, 0)], strict=True
    ):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_photos_are_aligned_as_everywhere(folder):
    loaded = PseudoSet.load(folder, 64)
    stored = photos.decode_stored(photos.encode_jpeg(photo(3)))
    np.testing.assert_array_equal(loaded.photos[1].transpose(1, 2, 0), photos.align(stored, 64))


def test_filtered_pairs_are_there_when_asked_for_and_failed_rows_never(folder):
    assert PseudoSet.load(folder, 32, kept_only=False).photo_ids == ["00", "01", "03"]
    assert len(list(iter_rows(folder, kept_only=False))) == 5


def test_a_set_in_which_nothing_was_kept_is_empty(tmp_path):
    only = [pseudo_row(0, reason="min_points")]
    loaded = PseudoSet.load(tiny_pseudo(tmp_path / "p", only), 32)
    assert (loaded.photos.shape, loaded.sketches, len(loaded.photo_of)) == ((0, 3, 32, 32), [], 0)


# --------------------------------------------------------------------------- rounds


def ids(folder, **how):
    return [row["photo_id"] for row in iter_rows(folder, **how)]


def test_the_newest_round_holds_what_earlier_ones_drew_in_the_same_way(tmp_path):
    choice, folder = ChoiceConfig(), tmp_path / "p"
    tiny_pseudo(folder, [pseudo_row(0)], choice=choice)
    tiny_pseudo(folder, [pseudo_row(1)], choice=choice, number=1, generator_digest="other")
    assert ids(folder) == ["01"]
    tiny_pseudo(folder, [pseudo_row(2)], choice=choice, number=2)
    assert ids(folder) == ["00", "02"]
    tiny_pseudo(folder, [pseudo_row(3)], choice=choice, number=3, settings_digest="other")
    assert ids(folder) == ["03"]


def test_photos_that_the_store_has_no_more_are_not_in_the_newest_round(tmp_path):
    choice, folder = ChoiceConfig(), tmp_path / "p"
    tiny_pseudo(folder, [pseudo_row(0), pseudo_row(1)], choice=choice)
    tiny_pseudo(folder, [pseudo_row(2)], choice=choice, number=1)
    pq.write_table(pa.table({"photo_id": ["01"]}), folder / "round-0001" / ABSENT)
    assert ids(folder, kept_only=False) == ["00", "02"]


# --------------------------------------------------------------------------- another choice


@pytest.fixture
def several(tmp_path):
    """Two photos with three drawings each, and one that failed."""
    values = [(0.2, 5), (0.9, 3), (0.6, 1), (0.4, 2), (0.8, 2), (0.1, 9)]
    rows = [
        pseudo_row(i // 3, i % 3, certainty=sure, rank=rank, similarity=-rank / 10)
        for i, (sure, rank) in enumerate(values)
    ]
    failed = [pseudo_row(2, k, status="failed", reason="nothing-to-draw") for k in range(3)]
    choice = ChoiceConfig(keep="all")
    return tiny_pseudo(tmp_path / "p", rows, failed, choice=choice, teacher_digest="t")


@pytest.mark.parametrize(
    ("choice", "kept", "reasons"),
    [
        ({"keep": "all"}, [0, 1, 2, 3, 4, 5], {}),
        ({}, [2, 4], {"not-best": 4}),
        ({"filters": {"min_certainty": 0.7}}, [1, 4], {"min_certainty": 4}),
        ({"filters": {"max_rank": 2}}, [2, 4], {"max_rank": 3, "not-best": 1}),
        ({"filters": {"max_rank": 2}, "keep": "all"}, [2, 3, 4], {"max_rank": 3}),
        ({"samples": 2}, [1, 4], {"samples": 2, "not-best": 2}),
        ({"samples": 1, "keep": "all"}, [0, 3], {"samples": 4}),
    ],
)
def test_another_choice_is_made_of_what_is_stored(several, choice, kept, reasons):
    made = ChoiceConfig(**{**choice, "filters": FilterConfig(**choice.get("filters", {}))})
    files = {file: file.read_bytes() for file in several.rglob("part-*")}

    def places(**how):
        rows = iter_rows(several, **how)
        return [3 * int(row["photo_id"]) + row["sample"] for row in rows]

    before = places()
    assert before == [0, 1, 2, 3, 4, 5]
    # Of equal ranks the more similar one; here they are equal as well, so the more certain.
    assert places(choice=made) == kept
    assert len(PseudoSet.load(several, 32, choice=made).sketches) == len(kept)
    assert places() == before

    ledger = refilter(several, made)
    assert places() == kept
    assert ledger.by_reason["filtered"] == reasons
    assert ledger.by_reason["failed"] == {"nothing-to-draw": 3}
    assert read_header(several)["ledger"] == ledger.to_json()
    assert {file: file.read_bytes() for file in several.rglob("part-*")} == files
    refilter(several, ChoiceConfig(keep="all"))
    assert places() == before


def test_a_choice_without_effect_is_refused(tmp_path):
    rows, choice = [pseudo_row(0)], ChoiceConfig()
    folder = tiny_pseudo(tmp_path / "p", rows, choice=choice, generative=False, judged=False)
    for name, value in (("max_rank", 3), ("min_certainty", 0.5), ("require_end", True)):
        made = ChoiceConfig(filters=FilterConfig(**{name: value}))
        with pytest.raises(UserError, match=rf"p: filters\.{name}="):
            refilter(folder, made)
        with pytest.raises(UserError, match=rf"p: filters\.{name}="):
            PseudoSet.load(folder, 32, choice=made)


def test_folders_of_earlier_versions_are_read_and_say_what_they_lack(tmp_path):
    rows = [pseudo_row(0), pseudo_row(1, reason="min_points")]
    folder = tiny_pseudo(tmp_path / "p", rows, without=LATER)
    assert PseudoSet.load(folder, 32).photo_ids == ["00"]
    (row,) = iter_rows(folder)
    assert (row["rank"], row["sample"], row["similarity"], row["ended"]) == (0, 0, 0.0, True)
    with pytest.raises(UserError, match=r"part-000000\.parquet: has no column ended, which anoth"):
        refilter(folder, ChoiceConfig())
    spoilt = tiny_pseudo(tmp_path / "q", rows, without=["certainty"])
    with pytest.raises(DamagedError, match="has no column certainty; sketch again"):
        PseudoSet.load(spoilt, 32)


# --------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("header", "error", "message"),
    [
        ({"kind": "photos"}, UserError, "not a folder of pseudo pairs"),
        ({"schema_version": 99}, UserError, "schema_version 99 is newer"),
        (
            {"ledger": {"drawn": 9, "kept": 1, "filtered": {}, "failed": {}}},
            DamagedError,
            "does not add up",
        ),
    ],
)
def test_what_is_no_whole_folder_of_this_version_is_refused(tmp_path, header, error, message):
    tiny_pseudo(tmp_path / "p", [pseudo_row(0)], **header)
    with pytest.raises(error, match=message):
        PseudoSet.load(tmp_path / "p", 32)


def test_damage_is_told_by_file(folder):
    part = folder / "round-0000" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"part-000001\.parquet"):
        PseudoSet.load(folder, 32)
    (folder / "pseudo.json").write_text("{")
    with pytest.raises(DamagedError, match=r"pseudo\.json"):
        PseudoSet.load(folder, 32)


def test_a_round_that_is_gone_is_named(tmp_path):
    choice, folder = ChoiceConfig(), tmp_path / "p"
    tiny_pseudo(folder, [pseudo_row(0)], choice=choice)
    values = json.loads((folder / "pseudo.json").read_text())
    values["rounds"].append({**values["rounds"][0], "round": 1})
    (folder / "pseudo.json").write_text(json.dumps(values))
    with pytest.raises(DamagedError, match="round-0001: is missing"):
        PseudoSet.load(folder, 32)
