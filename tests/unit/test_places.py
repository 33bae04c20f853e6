"""Places: the same calls on local folders, in memory and in an S3 store, and what is wrong told."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from sbir_ray import places
from sbir_ray.data.atomic import new_folder
from sbir_ray.data.pairs import PairSet
from sbir_ray.errors import UserError
from sbir_ray.places import place
from sbir_ray.runlog import building, write_json_atomic
from tests.object_store import make_bucket, object_store
from tests.tiny import tiny_pairs


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with object_store(str(tmp_path_factory.mktemp("store") / "log")) as environment:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            yield make_bucket("places")
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path, bucket):
    kinds = {"local": str(tmp_path), "memory": "memory://", "s3": f"{bucket}/"}
    return place(f"{kinds[request.param]}/{tmp_path.name}")


def test_a_place_keeps_its_text_and_travels():
    for text in ("a/b", "/a/b", "s3://bucket/a/b", "memory://bucket/a"):
        found = place(text)
        assert str(place(str(found))) == str(found)
        assert pickle.loads(pickle.dumps(found)) == found
    assert type(place("a/b")) is type(Path())
    assert place("file:///a/b") == Path("/a/b")
    assert str(place("s3://bucket/a/") / "b") == "s3://bucket/a/b"
    assert place("s3://bucket/a").name == "a"
    assert [places.is_local(place(text)) for text in ("a", "s3://a/b")] == [True, False]


def test_files_are_written_read_appended_to_and_removed(folder):
    file = folder / "deep" / "words.txt"
    places.write_bytes(file, b"one\n")
    places.append_text(file, "two\n")
    places.append_text(folder / "deep" / "new.txt", "first\n")
    assert file.read_bytes() == b"one\ntwo\n"
    places.write_bytes(file, b"short")
    assert file.read_text() == "short"
    assert sorted(path.name for path in (folder / "deep").iterdir()) == ["new.txt", "words.txt"]
    places.remove_tree(folder / "deep")
    places.remove_tree(folder / "deep")
    assert not file.exists()


def test_tables_are_read_whole_in_part_and_by_group(folder):
    table = pa.table({"a": list(range(10)), "b": ["x"] * 10})
    file = folder / "part-0.parquet"
    places.write_table(table, file, row_group_size=4)
    assert places.read_table(file) == table
    assert places.read_table(file, columns=["b"]) == table.select(["b"])
    with places.open_table(file) as parquet:
        assert parquet.read_row_group(1, columns=["a"])["a"].to_pylist() == [4, 5, 6, 7]
    assert [path.name for path in folder.glob("part-*.parquet")] == ["part-0.parquet"]


def test_a_folder_that_fails_leaves_nothing_and_one_that_exists_is_refused(folder):
    def half() -> None:
        with new_folder(folder / "out") as work:
            (work / "first").write_text("1")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        half()
    assert not (folder / "out").exists()
    with new_folder(folder / "out") as work:
        (work / "inner").mkdir()
        (work / "inner" / "second").write_text("2")
    assert (folder / "out" / "inner" / "second").read_text() == "2"
    with pytest.raises(UserError, match="exists already and is not empty"):
        new_folder(folder / "out").__enter__()


def test_a_folder_in_the_making_goes_on_for_the_same_request_alone(folder):
    out, request = folder / "store", {"seed": 1}

    def stopped() -> None:
        with building(out, request) as work:
            write_json_atomic(work / "half.json", {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with building(out, request) as work:
        assert (work / "half.json").exists()
        write_json_atomic(work / "store.json", {"whole": True})
    assert sorted(path.name for path in out.iterdir()) == ["half.json", "store.json"]
    with pytest.raises(UserError, match="exists; choose another"):
        building(out, request).__enter__()
    out = folder / "other"
    with pytest.raises(KeyboardInterrupt):
        stopped()
    with building(out, {"seed": 2}) as work:
        assert not (work / "half.json").exists()


def test_pairs_are_written_to_and_read_from_a_bucket(bucket, tmp_path):
    there = PairSet.load(tiny_pairs(place(f"{bucket}/pairs")), "train", 32)
    here = PairSet.load(tiny_pairs(tmp_path / "pairs"), "train", 32)
    assert there.sketch_ids == here.sketch_ids
    assert (there.photos == here.photos).all()


WRITER = """
import sys
from sbir_ray.places import place, write_bytes
data = bytes(8 << 20)
print("ready", flush=True)
while True:
    write_bytes(place(sys.argv[1]), data)
"""


def test_a_killed_writer_leaves_a_whole_file(folder):
    if str(folder).startswith("memory"):
        folder = place(f"/tmp/{os.getpid()}-{folder.name}")  # memory has one process alone
    file = folder / "weights"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while not file.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(file.read_bytes()) == 8 << 20
    places.remove_tree(folder)


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("s3://", {}, "names no bucket"),
        ("ftp9://a/b", {}, "not known; use s3://"),
        ("s3://nobody/x", {}, "no such bucket"),
        ("s3://places/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer"),
        ("s3://places/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_uri_and_no_secret(
    bucket, monkeypatch, tmp_path, text, changes, words
):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name, value in changes.items():
        monkeypatch.delenv(name) if not value else monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        places.write_bytes(place(text), b"x")
    line = str(caught.value)
    assert words in line
    assert line.startswith(text)
    assert "\n" not in line
    assert "tests" not in line  # the secret
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_place_without_permission_is_told(bucket):
    denied = pytest.raises(UserError, match="s3://places/x: access is denied")
    with denied, places.told(place("s3://places/x")):
        raise PermissionError("Access Denied: key AKIA")


def test_a_reach_into_a_bucket_that_is_not_there_is_told_before_work_begins(bucket):
    places.reach(place(f"{bucket}/not/yet/made"))
    with pytest.raises(UserError, match="no such bucket"):
        places.reach(place("s3://nobody/x"))
