"""The index by real actors: the same as by one process, whoever embeds what."""

import json

import pyarrow.parquet as parquet

from sbir_ray.stream import indexing
from sbir_ray.stream.index_store import HEADER, Index
from sbir_ray.stream.indexing import index
from tests.tiny_index import Inline, tiny_retrieval
from tests.tiny_store import tiny_store


def contents(out):
    found = Index.open(out)
    return {row["photo_id"]: row for table in found.parts for row in table.to_pylist()}


def test_actors_make_the_index_that_one_process_makes(tmp_path, cluster, monkeypatch):
    run = tiny_retrieval(tmp_path / "run")
    store = tiny_store(tmp_path / "store", 22, damaged=[5])
    monkeypatch.setattr(indexing, "_BATCH", 4)
    found = index(store, tmp_path / "index", run, actors=(1, 2), cpus_per_actor=0.5)
    assert str(found.ledger) == "22 read: 21 indexed, 1 failed (damaged-photo 1)"
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "_pipeline", Inline())
        index(store, tmp_path / "alone", run)
    assert contents(tmp_path / "index") == contents(tmp_path / "alone")
    parts = json.loads((tmp_path / "index" / HEADER).read_text())["parts"]
    assert len(parts) > 1

    # Photos that the store has no more.
    for file in (store / "shards").iterdir():
        parquet.write_table(parquet.read_table(file).slice(3), file, row_group_size=4)
    found = index(store, tmp_path / "index", run)
    assert (found.new, found.removed) == (0, 6)
    assert len(Index.open(tmp_path / "index")) == 15
