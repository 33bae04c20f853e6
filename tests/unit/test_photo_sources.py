"""What sources name: folders, globs, lists, Parquet files, tar shards, each photo once."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbir_ray.config import WebConfig
from sbir_ray.data.photos import DEFAULT_LIMITS, PhotoError
from sbir_ray.errors import UserError
from sbir_ray.stream import photo_sources
from sbir_ray.stream.fetch import Fetcher
from sbir_ray.stream.photo_plan import block_units, write_plan
from sbir_ray.stream.photo_sources import list_units, on_disk_sorted
from sbir_ray.stream.units import SLICE, Unit
from tests.faults.corpus import encoded, scene

FETCHER = Fetcher(WebConfig(), DEFAULT_LIMITS)
PNG = encoded(scene(1), "PNG")


def read(units: list[Unit]) -> dict[str, bytes | str]:
    """By uri the bytes, or the reason why there are none."""
    found: dict[str, bytes | str] = {}
    for unit in units:
        items = list(unit.items(FETCHER))
        assert len(items) == unit.rows
        for item in items:
            try:
                data = item.fetch()
                assert isinstance(data, bytes)
                found[item.uri] = data
            except PhotoError as error:
                found[item.uri] = error.reason
    return found


def tar_of(path: Path, members: dict[str, bytes], kind: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_of_a_tar_shard_the_photos_are_read_in_runs(tmp_path: Path, kind: int) -> None:
    members: dict[str, bytes] = {}
    for number in range(150):
        members[f"{number:05d}.jpg"] = b"photo %d" % number
        members[f"{number:05d}.json"] = b"{}"
    members["a/" + "long name " * (9 if kind == tarfile.USTAR_FORMAT else 20) + ".PNG"] = b"long"
    tar_of(tmp_path / "0.tar", members, kind)
    units = list(list_units([tmp_path]))
    assert [unit.rows for unit in units] == [SLICE, SLICE, 151 - 2 * SLICE]
    wanted = {
        f"{tmp_path}/0.tar#{name}": data for name, data in members.items() if ".json" not in name
    }
    assert read(units) == wanted
    one = units[1].only(5)
    assert read([one]) == {f"{tmp_path}/0.tar#{SLICE + 5:05d}.jpg": b"photo %d" % (SLICE + 5)}
    assert Unit.from_json(one.to_json()) == one


def test_of_a_torn_tar_shard_what_is_whole_is_read_and_the_rest_told(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", {f"{n}.jpg": bytes(3000) for n in range(4)})
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data[: len(data) // 2])
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    found = read(list(list_units([tmp_path])))
    assert [value for value in found.values() if isinstance(value, bytes)] == [bytes(3000)] * 2
    assert set(found.values()) == {bytes(3000), "damaged"}
    with pytest.raises(UserError, match=r"1\.tar: not a readable tar file"):
        list(list_units([tmp_path / "1.tar"]))


def test_lists_name_photos_and_shards_by_path_or_address(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(PNG)
    (tmp_path / "c.png").write_bytes(PNG)
    pq.write_table(pa.table({"jpg": [PNG, PNG]}), tmp_path / "bytes.parquet")
    tar_of(tmp_path / "s.tar", {"t.png": PNG})
    entries = ["a b.png", str(tmp_path / "c.png"), f"file://{tmp_path}/c.png"]
    entries += ["bytes.parquet", "s.tar", "https://a.example/b.jpg?x=1", "gone.tar"]
    (tmp_path / "list.txt").write_text("# a comment\n" + "\n".join(entries) + "\n\n")
    (tmp_path / "list.csv").write_text(
        "label,url\n" + "".join(f'chair,"{entry}"\n' for entry in entries), encoding="utf-8-sig"
    )
    pq.write_table(pa.table({"url": [*entries, None]}), tmp_path / "addresses.parquet")
    wanted = list(list_units([tmp_path / "list.txt"]))
    assert [(unit.file.rpartition("/")[2], unit.form) for unit in wanted] == [
        ("a b.png", "file"),
        ("c.png", "file"),
        ("c.png", "file"),
        ("bytes.parquet", "bytes"),
        ("s.tar", "tar"),
        ("b.jpg?x=1", "file"),
        ("gone.tar", "broken"),
    ]
    for other in ("list.csv", "addresses.parquet"):
        assert list(list_units([tmp_path / other])) == wanted
    plan = write_plan(wanted, tmp_path / "plan.parquet", tmp_path)
    assert (plan.total, plan.web, len(list(plan.units()))) == (7, True, 6)
    (item,) = wanted[5].items(FETCHER)
    assert (item.name, item.far) == ("b", True)
    found = read([unit for unit in wanted if not unit.file.startswith("http")])
    assert sorted(map(str, found.values())) == sorted(map(str, [PNG] * 5 + ["damaged"]))


def test_a_list_without_addresses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("label,size\na,1\n")
    with pytest.raises(UserError, match=r"none of its columns is uri, url.*it has label, size"):
        list(list_units([tmp_path / "list.csv"]))
    (tmp_path / "empty.txt").write_text("\n# none\n")
    with pytest.raises(UserError, match="has no photos"):
        list(list_units([tmp_path / "empty.txt"]))
    for address in ("sftp://host/a.png", "s3://bucket/a::http://host/b"):
        with pytest.raises(UserError, match="is not read"):
            list(list_units([address]))


def test_an_address_of_a_kind_that_is_not_read_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("sftp://host/a.png\nhttps://a.example/../b\nnone.png")
    units = list(list_units([tmp_path / "list.txt"]))
    found = read([unit for unit in units if not unit.file.startswith("http")])
    assert list(found.values()) == ["unsupported-address", "unreadable"]


def test_names_are_sorted_also_when_they_do_not_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"{n % 97:03d}\n{os.fsdecode(bytes([200 + n % 50]))}{n}" for n in range(500)]
    for size in (7, 500, 1000):
        monkeypatch.setattr(photo_sources, "_NAMES_IN_MEMORY", size)
        assert list(on_disk_sorted(iter(names))) == sorted(names)


def test_a_plan_has_each_photo_once_and_none_that_is_known(tmp_path: Path) -> None:
    units = [Unit(f"/{n % 700}.png", "file") for n in range(1000)]
    units += [Unit("/a.parquet", "bytes", "jpg", g, 0, 60) for g in (0, 1, 0)]
    (tmp_path / "one").mkdir()
    plan = write_plan(units, tmp_path / "one" / "plan.parquet", tmp_path / "one")
    expected = list(dict.fromkeys(units))
    assert list(plan.units()) == expected
    assert plan.total == 700 + 120
    assert plan.photos.max() <= 64 + 60
    blocks = [unit for b in range(plan.blocks) for unit in block_units(plan.file, b)]
    assert blocks == expected
    (tmp_path / "two").mkdir()
    rest = write_plan(
        reversed(units), tmp_path / "two" / "plan.parquet", tmp_path / "two", known=units[:650]
    )
    assert sorted(rest.units(), key=str) == sorted(expected[650:], key=str)
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["plan.parquet"]
