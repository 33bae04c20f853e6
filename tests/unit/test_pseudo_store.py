"""The PSEUDO folder: what is read is what was written, whole, in one order, or an error."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbir_ray.data import photos
from sbir_ray.data.strokes import flatten
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.stream.pseudo_store import PSEUDO_SCHEMA, PseudoSet, iter_rows, stats
from tests.tiny import photo, sketch


def row(number, seed=0, status="kept", reason="", certainty=0.5):
    strokes = [] if status == "failed" else sketch(number, hand=seed)
    rgb = photo(number)
    return {
        "photo_id": f"{number:02d}",
        "image": photos.encode_jpeg(rgb),
        "strokes": flatten(strokes),
        "certainty": certainty,
        "log_prob": -1.0,
        "rank": 0,
        "points": sum(map(len, strokes)),
        "generator_version": 1,
        "generator_digest": "abc",
        "seed": seed,
        "round": 0,
        "kept": status == "kept",
        "status": status,
        "reason": reason,
    }


def write(folder, *parts, number=0, **header):
    place = folder / f"round-{number:04d}"
    place.mkdir(parents=True)
    for i, rows in enumerate(parts):
        pq.write_table(pa.Table.from_pylist(rows, PSEUDO_SCHEMA), place / f"part-{i}.parquet")
    rows = [row for part in parts for row in part]
    ledger = {"drawn": len(rows), "kept": 0, "filtered": {}, "failed": {}}
    for entry in rows:
        if entry["kept"]:
            ledger["kept"] += 1
        else:
            reasons = ledger[entry["status"]]
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
    values = {"schema_version": 1, "kind": "pseudo", "sketcher": "contours", "ledger": ledger}
    (folder / "pseudo.json").write_text(json.dumps({**values, **header}))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path / "pseudo",
        [row(3, certainty=0.9), row(1, seed=7), row(2, status="failed", reason="nothing-to-draw")],
        [row(1, seed=5, certainty=0.1), row(0, status="filtered", reason="min_certainty")],
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


def test_the_newest_round_counts(folder):
    write(folder, [row(9)], number=1)
    assert PseudoSet.load(folder, 32).photo_ids == ["09"]


def test_a_set_in_which_nothing_was_kept_is_empty(tmp_path):
    only = [row(0, status="filtered", reason="min_points")]
    loaded = PseudoSet.load(write(tmp_path / "p", only), 32)
    assert (loaded.photos.shape, loaded.sketches, len(loaded.photo_of)) == ((0, 3, 32, 32), [], 0)


def test_stats_are_of_the_kept_pairs(folder):
    found = stats(folder)
    assert found["ledger"]["kept"] == 3
    points = [sum(map(len, s)) for s in (sketch(1, 5), sketch(1, 7), sketch(3, 0))]
    assert found["points"]["mean"] == pytest.approx(np.mean(points))
    assert found["certainty"]["median"] == pytest.approx(0.5)
    assert found["strokes"]["most"] == 2


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
    write(tmp_path / "p", [row(0)], **header)
    with pytest.raises(error, match=message):
        PseudoSet.load(tmp_path / "p", 32)


def test_damage_is_told_by_file(folder):
    part = folder / "round-0000" / "part-1.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(DamagedError, match=r"part-1\.parquet"):
        PseudoSet.load(folder, 32)
    (folder / "pseudo.json").write_text("{")
    with pytest.raises(DamagedError, match=r"pseudo\.json"):
        PseudoSet.load(folder, 32)
