"""Photos in: every one accounted for, good ones untouched by bad ones, duplicates and leaks out."""

import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.errors import UserError
from sbir_ray.runlog import Ledger, Progress
from sbir_ray.stream.duplicates import duplicates
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.photo_sources import list_units
from tests.tiny import photo, tiny_pairs


def png(rgb, **options):
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG", **options)
    return out.getvalue()


def accounts(store):
    table = pq.read_table(store / "ledger.parquet").to_pylist()
    return {os.path.basename(row["uri"]): row for row in table}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Photos 0-3 train, 4 validation, 5 and 6 test."""
    return tiny_pairs(tmp_path_factory.mktemp("pairs") / "pairs", train=4, val=1, test=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good photos 10-15 in two folders, and everything that can be wrong with a file."""
    root = tmp_path_factory.mktemp("photos")
    (root / "a" / "b").mkdir(parents=True)
    for number in range(10, 16):
        place = root / "a" if number % 2 else root / "a" / "b"
        (place / f"{number}.png").write_bytes(png(photo(number)))
    good = png(photo(20))
    jpeg = photos.encode_jpeg(photo(21))
    (root / "empty.jpg").write_bytes(b"")
    (root / "noise.jpg").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 900, "u1")))
    (root / "page.png").write_bytes(b"<html><body>not found</body></html>")
    (root / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (root / "crc.png").write_bytes(good[:60] + bytes([good[60] ^ 255]) + good[61:])
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "folder.jpg").mkdir()
    (root / "bomb.png").write_bytes(png(np.zeros((9000, 9000), bool)))
    (root / "notes.txt").write_text("no photo: not counted")
    return root


def test_each_photo_has_one_fate_and_bad_ones_do_not_touch_good_ones(
    tmp_path, folder, pairs, cluster
):
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "copy of 10.png").write_bytes(png(photo(10)))
    Image.fromarray(photo(11)).save(extra / "11 saved again.jpg", quality=80)
    test_photo = photo(5)
    (extra / "another name.png").write_bytes(png(test_photo))
    Image.fromarray(photo(4)).resize((200, 200)).save(extra / "resized.jpg", quality=70)
    table = pa.table(
        {"image": [{"bytes": png(photo(16)), "path": "x"}, {"bytes": None, "path": ""}]}
    )
    pq.write_table(table, extra / "hub.parquet")
    out = tmp_path / "store"

    ledger = ingest([folder, extra, pairs], out, exclude=[pairs])

    fates = accounts(out)
    reasons = {
        "empty.jpg": "empty",
        "noise.jpg": "not-an-image",
        "page.png": "not-an-image",
        "cut.jpg": "damaged",
        "crc.png": "damaged",
        "bomb.png": "too-many-pixels",
        "hub.parquet#0.1": "empty",
    }
    assert {n: (fates[n]["status"], fates[n]["reason"]) for n in reasons} == {
        n: ("rejected", reason) for n, reason in reasons.items()
    }
    for name in ("loop.jpg", "gone.png"):
        assert (fates[name]["status"], fates[name]["reason"]) == ("failed", "unreadable")
    for name in ("another name.png", "resized.jpg", "shape04.png", "shape05.png", "shape06.png"):
        assert fates[name]["status"] == "leaked", fates[name]
    good = {f"{n}.png" for n in range(10, 16)} | {"hub.parquet#0.0"}
    good |= {f"shape{n:02d}.png" for n in range(4)}
    twins = {"10.png", "copy of 10.png"}, {"11.png", "11 saved again.jpg"}
    for pair in twins:
        assert sorted(fates[name]["status"] for name in pair) == ["duplicate", "stored"]
    for name in good - set().union(*twins):
        assert fates[name]["status"] == "stored", fates[name]
    assert "notes.txt" not in fates

    assert ledger.total == len(fates) == 27
    assert ledger.count("stored") == len(good) == 11
    assert ledger.count("leaked") == 5
    header = json.loads((out / "store.json").read_text())
    assert Ledger.from_json("photos", header["ledger"], "store.json") == ledger

    stored = {row["uri"]: row for row in photos.read_store(out)}
    assert len(stored) == 11
    assert set(stored) == {row["uri"] for row in fates.values() if row["status"] == "stored"}
    row = next(row for uri, row in stored.items() if uri.endswith("/12.png"))
    assert row == photos.make_row(png(photo(12)), "12", row["uri"])
    train = next(row for uri, row in stored.items() if uri.endswith("shape00.png"))
    assert train["photo_id"] == photos.photo_id(photo(0).tobytes())
    assert sorted(os.listdir(out)) == ["ledger.parquet", "shards", "store.json"]


def test_what_is_kept_does_not_depend_on_the_order_of_the_sources(tmp_path, cluster):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for number in range(6):
        rgb = photo(number)
        (tmp_path / "one" / f"{number}.png").write_bytes(png(rgb))
        Image.fromarray(rgb).save(tmp_path / "two" / f"{5 - number}.jpg", quality=90)
        (tmp_path / "two" / f"{number}.png").write_bytes(png(rgb))
    kept = []
    for order in (["one", "two"], ["two", "one"]):
        out = tmp_path / "-".join(order)
        ledger = ingest([tmp_path / name for name in order], out)
        assert (ledger.count("stored"), ledger.count("duplicate")) == (6, 12)
        kept.append({(row["photo_id"], row["uri"]) for row in photos.read_store(out)})
    assert kept[0] == kept[1]


def test_too_many_bad_photos_end_it_with_the_reasons_and_store_nothing(tmp_path, folder, cluster):
    with pytest.raises(UserError, match=r"(?s)8 of 14 photos cannot be used \(.*damaged 2.*first"):
        ingest([folder], tmp_path / "store", IngestConfig(max_reject_rate=0.5))
    assert not (tmp_path / "store").exists()


def test_a_photo_store_goes_through_unchanged_and_its_test_photos_are_found_by_content(
    tmp_path, pairs, cluster
):
    once, twice = tmp_path / "once", tmp_path / "twice"
    source = tmp_path / "photos"
    source.mkdir()
    for number in (1, 5, 9):
        (source / f"{number}.png").write_bytes(png(photo(number)))
    ingest([str(source / "*.png")], once)
    ledger = ingest([once], twice, exclude=[pairs])
    assert (ledger.count("stored"), ledger.count("leaked")) == (2, 1)
    before = {row["photo_id"]: row for row in photos.read_store(once)}
    assert all(before[row["photo_id"]] == row for row in photos.read_store(twice))


def test_an_exclusion_without_effect_is_refused(tmp_path, folder):
    train = tiny_pairs(tmp_path / "pairs", train=2, val=0, test=0, hands=1)
    with pytest.raises(UserError, match="has no validation or test photos to exclude"):
        ingest([folder], tmp_path / "store", exclude=[train])


def test_after_a_stop_only_what_is_missing_is_read(tmp_path, folder, cluster):
    class Stopped(Progress):
        def update(self, done, total=None, note=""):
            if done:
                raise KeyboardInterrupt

    for number in range(70):
        out = png(photo(100 + number))
        (tmp_path / f"{number:02d}.png").write_bytes(out)
    out = tmp_path / "out" / "store"
    with pytest.raises(KeyboardInterrupt):
        ingest([str(tmp_path / "*.png")], out, progress=Stopped)
    staged = out.with_name("store.partial") / "staged" / "part-000000.parquet"
    assert pq.read_metadata(staged).num_rows == 64
    # Photos that were read before are not read again, so they may be gone.
    for number in range(64):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    assert ingest([str(tmp_path / "*.png")], out).count("rejected") == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("nothing-*.png", "no file matches it"),
        ("hollow", "has no photos"),
        ("table.parquet", "none of its columns is image"),
        ("text.parquet", "not a readable Parquet file"),
    ],
)
def test_a_source_without_photos_is_named(tmp_path, source, message):
    (tmp_path / "hollow").mkdir()
    pq.write_table(pa.table({"label": ["a"]}), tmp_path / "table.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(UserError, match=message):
        list_units([tmp_path / source])


def test_a_file_that_two_sources_name_is_read_once(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    units = list_units([tmp_path, tmp_path / "a.png", str(tmp_path / "*.png")])
    assert [unit.file for unit in units] == [str(tmp_path / "a.png")]


@settings(deadline=None, max_examples=60)
@given(
    hashes=st.lists(st.integers(0, 2**10 - 1), max_size=30),
    near=st.integers(0, 4),
    sign=st.sampled_from([0, -(2**63)]),
)
def test_duplicates_are_those_of_comparing_all_pairs(hashes, near, sign):
    spread = [value * 0x0040_1004_0100_4010 % 2**63 + sign for value in hashes]
    ids = [str(value) for value in spread]
    slow = []
    for index, value in enumerate(spread):
        kept = [i for i in range(index) if slow[i] is None]
        close = [i for i in kept if photos.hash_distance([spread[i]], value)[0] <= near]
        slow.append(min(close, default=None))
    assert duplicates(ids, spread, near) == slow
