"""Memory of the driver while it lists what is to be read and plans it, as photos get more.

    python -m tests.bench.bench_listing [--counts 1000 10000 100000]

Each source and count in a process of its own. Photos are links to one file, in one folder and in
folders of a thousand; names in a text file; and names that a server on the loopback interface
makes up, which answers as S3 does, a thousand at a time.
"""

from __future__ import annotations

import argparse
import http.server
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from sbir_ray.stream.photo_plan import write_plan
from sbir_ray.stream.photo_sources import list_units

KINDS = ("folder", "folders", "pattern", "list", "s3")
PAGE = 1000


def make(folder: Path, count: int) -> None:
    """The sources, but for the object store."""
    photo = folder / "photo"
    photo.write_bytes(b"x")
    with (folder / "list.txt").open("w") as listing:
        for number in range(count):
            nested = folder / "folders" / f"{number // 1000:05d}"
            if number % 1000 == 0:
                nested.mkdir(parents=True)
                (folder / "folder").mkdir(exist_ok=True)
            for place in (folder / "folder", nested):
                (place / f"{number:08d}.jpg").symlink_to(photo)
            listing.write(f"folder/{number:08d}.jpg\n")


@contextmanager
def store(count: int) -> Iterator[str]:
    """The address of a server whose bucket ``b`` has ``count`` objects in ``photos/``."""

    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = {
                name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()
            }
            size = int(asked.get("max-keys", PAGE))
            first = int(asked.get("continuation-token", 0))
            last = min(first + size, count)
            more = f"<NextContinuationToken>{last}</NextContinuationToken>" if last < count else ""
            entries = "".join(
                f"<Contents><Key>photos/{number:08d}.jpg</Key><Size>1</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for number in range(first, last)
            )
            truncated = str(bool(more)).lower()
            text = (
                '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
                f"<IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>"
            )
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *given: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def peak() -> int:
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def one(source: str, count: int) -> None:
    """List and plan one source, and print what that took."""
    before, began = peak(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        plan = write_plan(
            list_units([source]), Path(folder) / "plan.parquet", Path(folder) / "work"
        )
    assert plan.total == count
    seconds = time.monotonic() - began
    print(f"{peak()} MiB at most ({before} before), {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--source", help="One source of one count, in this process.")
    args = parser.parse_args()
    if args.source:
        one(args.source, args.counts[0])
        return
    for count in args.counts:
        with tempfile.TemporaryDirectory() as name, store(count) as address:
            folder = Path(name)
            make(folder, count)
            environment = {
                **os.environ,
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "bench",
                "AWS_SECRET_ACCESS_KEY": "bench",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            sources = ("folder", "folders", "folder/*.jpg", "list.txt")
            places = [*(str(folder / source) for source in sources), "s3://b/photos"]
            for kind, place in zip(KINDS, places, strict=True):
                print(f"{count} photos, {kind}: ", end="", flush=True)
                command = [sys.executable, "-m", "tests.bench.bench_listing", "--source", place]
                subprocess.run([*command, "--counts", str(count)], check=True, env=environment)


if __name__ == "__main__":
    main()
