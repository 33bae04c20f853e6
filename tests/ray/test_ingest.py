"""Photos in, on Ray: every one accounted for, good ones untouched by bad ones, and resumed."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.runlog import Ledger, Progress
from sbir_ray.stream.ingest import ingest
from tests.faults.corpus import TOO_LARGE, encoded, kinds, not_photos, scene
from tests.faults.decoders import failing
from tests.tiny import photo, tiny_pairs
from tests.unit.test_decoding import is_shown


def accounts(store, folder):
    """The ledger's rows by the path in ``folder``."""
    rows = pq.read_table(store / "ledger.parquet").to_pylist()
    return {os.path.relpath(row["uri"], folder): row for row in rows}


def test_each_file_of_the_corpus_has_its_fate_and_the_sums_are_equal(tmp_path, cluster):
    folder, out = tmp_path / "photos", tmp_path / "store"
    # Photos 0-3 train, 4 validation, 5 and 6 test.
    pairs = tiny_pairs(tmp_path / "pairs", train=4, val=1, test=2)
    gallery = tmp_path / "gallery"
    (tmp_path / "searched").mkdir()
    (tmp_path / "searched" / "g.png").write_bytes(encoded(scene(77, (300, 200)), "PNG"))
    ingest([tmp_path / "searched"], gallery)
    corpus = kinds()
    for kind in corpus:
        kind.write(folder)
    not_photos(folder)
    test = Image.fromarray(photo(5))
    leaked = {
        "same.png": (encoded(test, "PNG"), "near"),
        "smaller.jpg": (encoded(test.resize((100, 100)), "JPEG", quality=70), "near"),
        "turned.png": (encoded(test.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"), "mirrored"),
        "searched.png": (encoded(scene(77, (300, 200)), "PNG"), "same-file"),
        "searched.webp": (
            encoded(np.ascontiguousarray(scene(77, (300, 200))[:, ::-1]), "WEBP"),
            "mirrored",
        ),
    }
    (folder / "leaked").mkdir()
    for name, (data, _) in leaked.items():
        (folder / "leaked" / name).write_bytes(data)

    config = IngestConfig(max_bytes=TOO_LARGE)
    ledger = ingest([folder], out, config, exclude=[pairs, gallery], make_row=failing)

    fates = accounts(out, folder)
    stored = {row["uri"]: row for row in photos.read_store(out)}
    twins = {}
    for kind in corpus:
        row = fates.pop(photos.printable(kind.name))
        if kind.twins:
            twins.setdefault(kind.twins, []).append(row)
        else:
            reason = "killed-its-process" if kind.status == "quarantined" else kind.reason
            assert (row["status"], row["reason"]) == (kind.status, reason), (kind.name, row)
        if kind.scene is not None and row["status"] == "stored":
            assert is_shown(stored[row["uri"]]["image"], kind), kind.name
    for rows in twins.values():
        (kept,) = [row for row in rows if row["status"] == "stored"]
        assert {row["of"] for row in rows if row is not kept} == {kept["photo_id"]}
        assert {row["status"] for row in rows if row is not kept} == {"duplicate"}
    for name, (_, reason) in leaked.items():
        row = fates.pop(f"leaked/{name}")
        assert (row["status"], row["reason"]) == ("leaked", reason), (name, row)
    assert not fates

    assert ledger.total == len(corpus) + len(leaked)
    assert ledger.count("leaked") == len(leaked)
    assert ledger.count("quarantined") == 1
    assert ledger.count("stored") == len(stored)
    header = json.loads((out / "store.json").read_text())
    assert Ledger.from_json("photos", header["ledger"], "store.json") == ledger
    assert sum(row["photos"] for row in header["reasons"]) == ledger.total - len(stored)
    worst = header["reasons"][0]
    most = sum(kind.reason == "not-an-image" for kind in corpus)
    assert (worst["reason"], worst["photos"]) == ("not-an-image", most)
    assert len(worst["examples"]) == 3
    files = ["ledger.parquet", "plan.parquet", "shards", "shards.parquet", "store.json"]
    assert sorted(os.listdir(out)) == files


def test_what_is_kept_does_not_depend_on_the_order_of_the_sources(tmp_path, cluster):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    for number in range(6):
        rgb = photo(number)
        (tmp_path / "one" / f"{number}.png").write_bytes(encoded(rgb, "PNG"))
        Image.fromarray(rgb).save(tmp_path / "two" / f"{5 - number}.jpg", quality=90)
        (tmp_path / "two" / f"{number}.png").write_bytes(encoded(rgb, "PNG"))
    kept = []
    for order in (["one", "two"], ["two", "one"]):
        out = tmp_path / "-".join(order)
        ledger = ingest([tmp_path / name for name in order], out)
        assert (ledger.count("stored"), ledger.count("duplicate")) == (6, 12)
        kept.append({(row["photo_id"], row["uri"]) for row in photos.read_store(out)})
    assert kept[0] == kept[1]


def test_after_a_stop_only_what_is_missing_is_read(tmp_path, cluster):
    class Stopped(Progress):
        def update(self, done, total=None, note=""):
            if done:
                raise KeyboardInterrupt

    for number in range(70):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(photo(100 + number), "PNG"))
    out = tmp_path / "out" / "store"
    with pytest.raises(KeyboardInterrupt):
        ingest([str(tmp_path / "*.png")], out, progress=Stopped)
    staged = out.with_name("store.partial") / "work" / "staged" / "part-0000000.parquet"
    assert pq.read_metadata(staged).num_rows == 64
    # Photos that were read before are not read again, so they may be gone.
    for number in range(64):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    assert ingest([str(tmp_path / "*.png")], out).count("rejected") == 0
