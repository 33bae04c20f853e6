"""The index: what lies in it, what it is brought up to date by, and what is found in it."""

import errno
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.data.photos import align, decode_stored, read_store
from sbir_ray.errors import DamagedError, UnavailableError, UserError
from sbir_ray.places import place
from sbir_ray.runlog import locked
from sbir_ray.runs import load_retrieval
from sbir_ray.stream import index_store
from sbir_ray.stream.index_store import HEADER, Index, embeddings, part_schema, write_part
from sbir_ray.stream.indexing import index
from tests.tiny_index import inline, tiny_retrieval
from tests.tiny_store import tiny_store

__all__ = ["inline"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_retrieval(tmp_path_factory.mktemp("index") / "run")


def part(rows, dim=3, start=0):
    """A table of photos ``start``, ``start`` + 1, ... with these embeddings."""
    ids = [f"{number:04d}" for number in range(start, start + len(rows))]
    flat = pa.array(np.asarray(rows, np.float32).ravel(), pa.float32())
    columns = [ids, [f"photo {n}" for n in ids], [f"/{n}" for n in ids], [n.encode() for n in ids]]
    arrays = [pa.array(c, f.type) for c, f in zip(columns, part_schema(dim), strict=False)]
    return pa.Table.from_arrays(
        [*arrays, pa.FixedSizeListArray.from_arrays(flat, dim)], schema=part_schema(dim)
    )


def folder_of(path, parts, **changes):
    """An INDEX folder of tables, without photos."""
    path.mkdir(exist_ok=True)
    entries, start = [], 0
    for number, rows in enumerate(parts):
        write_part(part(rows, start=start), path / f"part-{number}.arrow")
        entries.append({"file": f"part-{number}.arrow", "rows": len(rows)})
        start += len(rows)
    header = {"schema_version": 1, "kind": "index", "weights": "w", "run": "r", "dim": 3}
    (path / HEADER).write_text(json.dumps({**header, "parts": entries, **changes}))
    return path


def contents(out):
    """By photo what the index holds."""
    found = Index.open(out)
    return {
        row["photo_id"]: (row["name"], row["uri"], row["image"], tuple(row["embedding"]))
        for table in found.parts
        for row in table.to_pylist()
    }


def without(store, *names):
    """The store without some photos."""
    for file in (store / "shards").iterdir():
        table = parquet.read_table(file)
        keep = [name not in names for name in table["photo_id"].to_pylist()]
        parquet.write_table(table.filter(pa.array(keep)), file, row_group_size=4)


# --------------------------------------------------------------------------- search


@given(
    st.lists(st.lists(st.tuples(*[st.sampled_from([-1, 0, 0.5, 1])] * 3), max_size=5), max_size=4),
    st.tuples(*[st.sampled_from([-1, 0.5, 1])] * 3),
    st.integers(1, 12),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_is_found_is_what_sorting_finds(tmp_path_factory, rows, query, top, small):
    out = folder_of(tmp_path_factory.mktemp("index"), [r for r in rows if r])
    query_D = np.array(query, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_store, "_IN_MEMORY", 1 << 20 if small else 0)
        found = Index.open(out)
        hits = found.search(query_D, top)
        flat = [np.float32(row) for part in rows for row in part]
        score = [float(row @ query_D) for row in flat]
        order = sorted(range(len(flat)), key=lambda i: (-score[i], i))[:top]
        assert [hit.photo_id for hit in hits] == [f"{i:04d}" for i in order]
        assert [hit.similarity for hit in hits] == [score[i] for i in order]
        assert len(found) == len(flat)
        for i, own in enumerate(score):
            assert found.rank(query_D, f"{i:04d}") == sum(s >= own for s in score)


def test_a_photo_is_reached_by_its_id(tmp_path):
    found = Index.open(folder_of(tmp_path / "i", [np.eye(3), np.eye(3)[:2]]))
    assert found.photo_ids == [f"{i:04d}" for i in range(5)]
    assert found.image("0004") == b"0004"
    (hit,) = found.search(np.float32([0, 1, 0]), 1)
    assert hit == ("0001", "photo 0001", "/0001", 1.0)
    for unknown in ("5", "", "../index.json", "0004\0"):
        assert found.image(unknown) is None
        assert found.rank(np.float32([1, 0, 0]), unknown) is None


def test_an_open_index_stays_when_the_folder_is_made_anew(tmp_path):
    out = folder_of(tmp_path / "i", [np.eye(3)])
    found = Index.open(out)
    (out / "part-0.arrow").unlink()
    folder_of(out, [np.eye(3)[:1]])
    assert found.search(np.float32([0, 0, 1]), 1)[0].photo_id == "0002"
    assert found.image("0002") == b"0002"
    assert len(Index.open(out)) == 1


def test_embeddings_are_not_copied(tmp_path):
    write_part(part(np.eye(3)), tmp_path / "part.arrow")
    table = index_store.read_part(tmp_path / "part.arrow", 3)
    (buffer,) = [b for b in table["embedding"].chunk(0).buffers() if b and b.size >= 36]
    assert embeddings(table).ctypes.data == buffer.address


def test_what_is_no_index_is_told(tmp_path):
    with pytest.raises(UserError, match="none: not an index; make one with `sbir-ray index`"):
        Index.open(tmp_path / "none")
    out = folder_of(tmp_path / "i", [np.eye(3)])
    (out / HEADER).write_text('{"kind": "pseudo", "schema_version": 1}')
    with pytest.raises(UserError, match="not an index"):
        Index.open(out)
    folder_of(out, [np.eye(3)], schema_version=99)
    with pytest.raises(UserError, match=r"index\.json.*newer"):
        Index.open(out)
    (out / HEADER).write_text('{"kind": "index", "schema_version": 1, "dim": 3, "run": "r"}')
    with pytest.raises(DamagedError, match=r"index\.json: says no parts; index the photos again"):
        Index.open(out)
    (out / HEADER).write_text("{")
    with pytest.raises(DamagedError, match=r"index\.json: not a JSON file"):
        Index.open(out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "part-0.arrow: cannot be read"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "part-0.arrow: cannot be read"),
        (lambda file: file.write_bytes(b""), "part-0.arrow: cannot be read"),
        (lambda file: write_part(part(np.eye(4), 4), file), "part-0.arrow: has other columns"),
        (
            lambda file: write_part(part(np.eye(3)[:2]), file),
            "part-0.arrow: has 2 rows in place of 3",
        ),
    ],
)
def test_a_damaged_part_is_named(tmp_path, damage, message):
    out = folder_of(tmp_path / "i", [np.eye(3)])
    damage(out / "part-0.arrow")
    with pytest.raises(DamagedError, match=f"{message}.*index the photos again"):
        Index.open(out)


# --------------------------------------------------------------------------- making it


def test_every_photo_is_embedded_as_the_network_does(tmp_path, run, inline):
    store = tiny_store(tmp_path / "store", 11, damaged=[3])
    found = index(store, tmp_path / "i", run)
    assert str(found.ledger) == "11 read: 10 indexed, 1 failed (damaged-photo 1)"
    assert found[1:] == (10, 0, 0)
    model = load_retrieval(run).model
    held = contents(tmp_path / "i")
    rows = {row["photo_id"]: row for row in read_store(store)}
    assert set(held) == set(rows) - {"photo03"}
    for name, (*texts, image, embedding) in held.items():
        row = rows[name]
        assert [*texts, image] == [row["name"], row["uri"], row["image"]]
        rgb = align(decode_stored(row["image"]), 64).transpose(2, 0, 1)
        with torch.inference_mode():
            expected = model.embed_photos(torch.from_numpy(rgb.copy())[None])[0].numpy()
        np.testing.assert_array_equal(np.float32(embedding), expected)
    header = json.loads((tmp_path / "i" / HEADER).read_text())
    assert header["weights"] == load_retrieval(run).digest
    assert header["run"] == str(run)
    assert header["ledger"] == {"read": 11, "indexed": 10, "failed": {"damaged-photo": 1}}


def test_only_what_changed_in_the_store_is_embedded(tmp_path, run, inline):
    out = tmp_path / "i"
    store = tiny_store(tmp_path / "few", 9)
    index(store, out, run)
    before = contents(out)
    shutil.rmtree(store)
    tiny_store(store, 14)
    without(store, "photo00", "photo05")
    inline.embedded.clear()
    found = index(store, out, run)
    assert found[1:] == (5, 7, 2)
    assert sorted(inline.embedded) == [f"photo{n:02d}" for n in range(9, 14)]
    held = contents(out)
    assert set(held) == {f"photo{n:02d}" for n in range(14)} - {"photo00", "photo05"}
    assert all(held[name] == before[name] for name in set(held) & set(before))
    fresh = tmp_path / "fresh"
    index(store, fresh, run)
    assert contents(fresh) == held
    # Nothing else: no embedding, the same files.
    inline.embedded.clear()
    files = {f.name: f.stat().st_mtime_ns for f in out.glob("part-*")}
    assert index(store, out, run)[1:] == (0, 12, 0)
    assert not inline.embedded
    assert {f.name: f.stat().st_mtime_ns for f in out.glob("part-*")} == files
    listed = {entry["file"] for entry in json.loads((out / HEADER).read_text())["parts"]}
    assert set(files) == listed


def test_damaged_photos_are_tried_again(tmp_path, run, inline):
    out, store = tmp_path / "i", tiny_store(tmp_path / "store", 5, damaged=[1])
    index(store, out, run)
    shutil.rmtree(store)
    tiny_store(store, 5)
    assert index(store, out, run)[1:] == (1, 4, 0)
    assert len(contents(out)) == 5


def test_after_a_kill_no_photo_is_embedded_twice(tmp_path, run, inline):
    out, store = tmp_path / "i", tiny_store(tmp_path / "store", 6)
    index(store, out, run)
    shutil.rmtree(store)
    tiny_store(store, 22)
    without(store, "photo02")
    before = contents(out)
    for parts in (2, 1):
        inline.killed_after = parts
        with pytest.raises(KeyboardInterrupt):
            index(store, out, run)
        assert contents(out) == before  # whoever searches it sees what it was
    inline.killed_after = None
    found = index(store, out, run)
    assert found.ledger.count("indexed") == 21
    assert sorted(inline.embedded) == [f"photo{n:02d}" for n in range(22)]
    fresh = tmp_path / "fresh"
    index(store, fresh, run)
    assert contents(fresh) == contents(out)


def test_other_weights_embed_all_again(tmp_path, run, inline):
    out, store = tmp_path / "i", tiny_store(tmp_path / "store", 6)
    index(store, out, run)
    other = tiny_retrieval(tmp_path / "other", seed=1)
    before = contents(out)
    found = index(store, out, other)
    assert found[1:] == (6, 0, 0)
    held = contents(out)
    assert set(held) == set(before)
    assert all(held[name][-1] != before[name][-1] for name in held)
    assert len(list(out.glob("part-*"))) == len(json.loads((out / HEADER).read_text())["parts"])


def test_a_damaged_part_is_made_again(tmp_path, run, inline):
    out, store = tmp_path / "i", tiny_store(tmp_path / "store", 9)
    index(store, out, run)
    before = contents(out)
    first = sorted(out.glob("part-*"))[0]
    first.write_bytes(first.read_bytes()[:99])
    index(store, out, run)
    assert contents(out) == before
    (out / HEADER).write_text("{")
    inline.embedded.clear()
    index(store, out, run)
    assert contents(out) == before
    assert not inline.embedded


def test_what_cannot_be_an_index_is_refused(tmp_path, run, inline):
    store = tiny_store(tmp_path / "store", 3)
    with pytest.raises(UserError, match=r"store: holds something else \(.*choose another folder"):
        index(store, store, run)
    with pytest.raises(UserError, match="s3://bucket/i: an index is mapped into memory"):
        index(store, place("s3://bucket/i"), run)
    with pytest.raises(UserError, match="--actors 2:1: the least is 1"):
        index(store, tmp_path / "i", run, actors=(2, 1))
    with pytest.raises(UserError, match="not a photo store"):
        index(tmp_path, tmp_path / "i", run)
    with locked(tmp_path / "i"), pytest.raises(UnavailableError, match="another process"):
        index(store, tmp_path / "i", run)
    empty = tiny_store(tmp_path / "empty", 0)
    with pytest.raises(UserError, match="empty: holds no photo"):
        index(empty, tmp_path / "i", run)


def test_a_full_disk_is_told_and_leaves_the_index_as_it_was(tmp_path, run, inline, monkeypatch):
    out, store = tmp_path / "i", tiny_store(tmp_path / "store", 3)
    index(store, out, run)
    before = contents(out)
    shutil.rmtree(store)
    tiny_store(store, 9)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"i: cannot be written \(No space left on device\)"):
            index(store, out, run)
    assert contents(out) == before
    assert len(index(store, out, run).ledger.by_reason["indexed"]) == 1
    assert len(contents(out)) == 9
