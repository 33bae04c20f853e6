"""``sbir-ray photos``: what it says of a store, and that it finds every change of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sbir_ray.cli import cli
from sbir_ray.config import IngestConfig
from sbir_ray.data import photos
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.stream.ingest import ingest
from sbir_ray.stream.photo_checks import verify
from tests.faults.corpus import encoded, scene
from tests.inline_tasks import inline_tasks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "a").mkdir()
    for number in range(7):
        (folder / "a" / f"{number}.png").write_bytes(encoded(scene(number, (300, 200)), "PNG"))
    (folder / "a" / "copy.png").write_bytes(encoded(scene(3, (300, 200)), "PNG"))
    (folder / "a" / "bad.png").write_bytes(b"no")
    with inline_tasks():
        ingest([folder / "a"], folder / "store", IngestConfig(shard_rows=4))
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["photos", *map(str, words)])


def test_ls_lists_the_ledger(store: Path) -> None:
    lines = run("ls", store).stdout.splitlines()
    assert len(lines) == 9
    assert {line.split("\t")[0] for line in lines} == {"stored", "duplicate", "rejected"}
    (line,) = run("ls", store, "--status", "rejected").stdout.splitlines()
    assert line.split("\t")[1] == "not-an-image"
    assert line.split("\t")[2].endswith("bad.png")
    found = run("ls", store, "--status", "stored", "--json", "--limit", 3).stdout.splitlines()
    assert [json.loads(line)["status"] for line in found] == ["stored"] * 3


def test_show_writes_a_contact_sheet_of_those_asked_for(store: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    rows = {row["name"]: row for row in photos.read_store(store)}
    result = run("show", store, "2", rows["5"]["photo_id"][:9], "--out", sheet, "--json")
    assert [row["name"] for row in json.loads(result.stdout)["photos"]] == ["2", "5"]
    with Image.open(sheet) as file:
        picture = file.convert("RGB")
    assert picture.size == (306, 172)
    middle = scene(2, (300, 200))[100, 150].astype(int)
    assert abs(sum(picture.getpixel((78, 78))) - middle.sum()) < 30
    assert run("show", store, "--out", sheet, "--count", 5).exit_code == 0
    with Image.open(sheet) as file:
        assert file.size == (756, 172)
    assert isinstance(run("show", store, "none", "--out", sheet).exception, UserError)


def test_stats_count_sizes_and_reasons(store: Path) -> None:
    found = json.loads(run("stats", store, "--json").stdout)
    assert found["longest_side"] == {"257-512": 7}
    assert found["shards"]["files"] == 2
    assert [(row["reason"], row["photos"]) for row in found["reasons"]] == [
        ("same-file", 1),
        ("not-an-image", 1),
    ]
    text = run("stats", store).stdout
    assert "9 read: 7 stored, 1 duplicate, 1 rejected (not-an-image 1)" in text
    assert "bad.png  no known image format" in text


def test_verify_finds_a_whole_store_whole(store: Path) -> None:
    result = run("verify", store)
    assert (result.exit_code, "7 photos in 2 shards" in result.stdout) == (0, True)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("flip", "part-00000.parquet: was changed"),
        ("lose", "part-00001.parquet: is missing"),
        ("more", "part-00009.parquet: belongs to no run"),
        ("ledger", "ledger.parquet: says"),
        ("header", "ledger.parquet: says"),
    ],
)
def test_verify_finds_what_is_not_as_it_was_written(store: Path, change: str, problem: str) -> None:
    first, second = photos.shards(store)
    if change == "flip":
        data = bytearray(first.read_bytes())
        data[len(data) // 2] ^= 1
        first.write_bytes(data)
    elif change == "lose":
        second.unlink()
    elif change == "more":
        shutil.copy(first, first.with_name("part-00009.parquet"))
    elif change == "ledger":
        table = pq.read_table(store / "ledger.parquet")
        pq.write_table(table.slice(1), store / "ledger.parquet")
    else:
        text = (store / "store.json").read_text().replace('"duplicate": 1', '"duplicate": 0')
        (store / "store.json").write_text(text.replace('"read": 9', '"read": 8', 1))
    assert any(problem in line for line in verify(store)["problems"])
    result = run("verify", store)
    assert isinstance(result.exception, DamagedError)


def test_verify_says_so_when_a_table_is_none(store: Path) -> None:
    (store / "shards.parquet").write_bytes(b"no table")
    with pytest.raises(DamagedError, match="cannot be checked"):
        verify(store)


@pytest.mark.parametrize("command", ["ls", "stats", "verify"])
def test_a_store_without_its_account_is_refused_in_a_line(store: Path, command: str) -> None:
    (store / "ledger.parquet").unlink()
    error = run(command, store).exception
    assert isinstance(error, DamagedError)
    assert str(error) == f"{store}/ledger.parquet: is missing; make the store anew"


def test_ingest_wants_sources_or_none_with_retry_failed() -> None:
    for words in (["--out", "x"], ["a", "--retry-failed", "--out", "x"]):
        result = CliRunner().invoke(cli, ["ingest", *words])
        assert "give SRC, or --retry-failed" in str(result.exception)
