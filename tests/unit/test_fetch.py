"""Photos from web servers and object stores: limits, attempts, and never a private address."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from sbir_ray.config import WebConfig
from sbir_ray.data.photos import PhotoError, PhotoLimits
from sbir_ray.places import copy_tree, place
from sbir_ray.stream import fetch
from sbir_ray.stream.fetch import Fetcher, is_public
from sbir_ray.stream.photo_sources import list_units
from tests.faults.corpus import encoded, scene
from tests.object_store import make_bucket, object_store
from tests.tiny import tiny_pairs
from tests.tiny_store import tiny_store

PNG = encoded(scene(1), "PNG")
LIMITS = PhotoLimits(max_bytes=100_000)


class Handler(BaseHTTPRequestHandler):
    """What servers do to those who ask them."""

    asked: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        Handler.asked[self.path] += 1
        with contextlib.suppress(OSError):
            getattr(self, path.strip("/").replace("-", "_"), self.missing)()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def photo(self) -> None:
        self.answer(200, PNG, Content_Length=str(len(PNG)))

    def without_length(self) -> None:
        self.answer(200, PNG)

    def missing(self) -> None:
        self.answer(404, b"<html>")

    def hollow(self) -> None:
        self.answer(200)

    def broken(self) -> None:
        self.answer(500)

    def busy_once(self) -> None:
        if Handler.asked[self.path] == 1:
            self.answer(503, Retry_After="0")
        else:
            self.photo()

    def moved(self) -> None:
        self.answer(302, Location="/photo")

    def circle(self) -> None:
        self.answer(302, Location="/circle")

    def to_metadata(self) -> None:
        self.answer(301, Location="http://169.254.169.254/latest/meta-data")

    def to_file(self) -> None:
        self.answer(301, Location="file:///etc/passwd")

    def declared_large(self) -> None:
        self.answer(200, PNG, Content_Length="999999999")

    def endless(self) -> None:
        self.answer(200)
        while True:
            self.wfile.write(bytes(60_000))

    def torn(self) -> None:
        self.answer(200, PNG[:50], Content_Length=str(len(PNG)))

    def slow(self) -> None:
        self.answer(200, Content_Length=str(len(PNG)))
        for byte in PNG:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def slow_head(self) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 100:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def silent(self) -> None:
        time.sleep(3)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@contextlib.contextmanager
def forgotten_connections() -> Iterator[None]:
    """s3fs keeps its connections by their options, which do not name the environment's store."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def reason_of(url: str, **web: object) -> str:
    settings = {"allow_private": True, "timeout": 1.0, "retries": 0, **web}
    with pytest.raises(PhotoError) as error:
        Fetcher(WebConfig(**settings), LIMITS).read(url)
    return error.value.reason


def test_a_photo_is_read_also_by_way_of_another_address(server: str) -> None:
    fetcher = Fetcher(WebConfig(allow_private=True), LIMITS)
    for path in ("/photo", "/photo?a=ü b", "/without-length", "/moved"):
        assert fetcher.read(server + path) == PNG


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "http-status"),
        ("/broken", "http-status"),
        ("/hollow", "empty"),
        ("/circle", "http-status"),
        ("/to-file", "unsupported-address"),
        ("/declared-large", "too-many-bytes"),
        ("/endless", "too-many-bytes"),
        ("/torn", "unreachable"),
        ("/slow", "timeout"),
        ("/slow-head", "timeout"),
        ("/silent", "timeout"),
    ],
)
def test_what_stands_in_the_way_is_told_by_reason(server: str, path: str, reason: str) -> None:
    assert reason_of(server + path) == reason


def test_a_server_that_may_answer_later_is_asked_again_and_no_other(server: str) -> None:
    Handler.asked.clear()
    fetcher = Fetcher(WebConfig(allow_private=True, retries=1), LIMITS)
    assert fetcher.read(f"{server}/busy-once") == PNG
    assert reason_of(f"{server}/broken", retries=1) == "http-status"
    assert reason_of(f"{server}/missing", retries=3) == "http-status"
    assert Handler.asked == {"/busy-once": 2, "/broken": 2, "/missing": 1}
    waited: list[str] = []
    fetcher = Fetcher(WebConfig(allow_private=True), LIMITS, waited.append)
    fetcher.read(f"{server}/moved")
    assert waited == ["127.0.0.1", "127.0.0.1"]


def test_private_addresses_are_not_asked(server: str) -> None:
    Handler.asked.clear()
    port = server.rpartition(":")[2]
    hosts = ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1")
    for host in hosts:
        assert reason_of(f"http://{host}:{port}/photo", allow_private=False) == "private-address"
    assert not Handler.asked
    # Also when the way there leads over a server that may be asked.
    real = is_public
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1" or real(address))
        assert reason_of(f"{server}/to-metadata", allow_private=False) == "private-address"


def test_the_address_that_was_checked_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name whose address changes between the check and the connection gains nothing."""
    answers = [["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "10.0.0.1"]]
    asked: list[str] = []

    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in answers.pop(0)
        ]

    def connect(self: socket.socket, address: tuple[str, int]) -> None:
        asked.append(address[0])
        raise OSError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    url = "http://changing.example/a.png"
    assert reason_of(url, allow_private=False) == "unreachable"
    assert reason_of(url, allow_private=False) == "private-address"
    assert reason_of(url, allow_private=False) == "private-address"
    assert asked == ["93.184.216.34", "93.184.216.34"]


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "224.0.0.1",
        "0.0.0.0",
        "::1",
        "fe80::1%eth0",
        "fd00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
        "ff02::1",
    ],
)
def test_these_addresses_are_private(address: str) -> None:
    assert not is_public(address)


def test_these_addresses_are_public() -> None:
    assert all(map(is_public, ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"]))


def test_photos_are_listed_and_read_in_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(str(tmp_path / "log")) as environment, forgotten_connections():
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        bucket = make_bucket("photos")
        import s3fs

        system = s3fs.S3FileSystem()
        for name in ("a/1.png", "a/b/2 ü.PNG", "a/c.txt", "a/large.png"):
            system.pipe(f"{bucket}/{name}", PNG if "large" not in name else bytes(100_001))
        (tmp_path / "list.txt").write_text(f"{bucket}/a/1.png\n{bucket}/none.png\n")
        # Pages of two entries, so that there are several.
        ask = s3fs.S3FileSystem.call_s3
        monkeypatch.setattr(s3fs.S3FileSystem, "call_s3", partialmethod(ask, MaxKeys=2))
        units = [*list_units([f"{bucket}/a", f"{bucket}/a/*.png", tmp_path / "list.txt"])]
        assert [unit.file.removeprefix(bucket) for unit in units] == [
            "/a/1.png",
            "/a/b/2 ü.PNG",
            "/a/large.png",
            "/a/1.png",
            "/a/large.png",
            "/a/1.png",
            "/none.png",
        ]
        fetcher = Fetcher(WebConfig(), LIMITS)
        assert [fetcher.read(unit.file) for unit in units[:2]] == [PNG, PNG]
        assert reason_of(units[2].file) == "too-many-bytes"
        assert reason_of(units[-1].file) == "unreadable"

        copy_tree(tiny_pairs(tmp_path / "pairs"), place(f"{bucket}/made/pairs"))
        copy_tree(tiny_store(tmp_path / "store", 5, shard=2), place(f"{bucket}/made/store"))
        made = [*list_units([f"{bucket}/made"])]
        assert {unit.form for unit in made} == {"rows"}
        assert [(unit.file.removeprefix(f"{bucket}/made"), unit.rows) for unit in made] == [
            ("/pairs/photos.parquet", 14),
            ("/store/shards/part-00000.parquet", 2),
            ("/store/shards/part-00002.parquet", 2),
            ("/store/shards/part-00004.parquet", 1),
        ]
