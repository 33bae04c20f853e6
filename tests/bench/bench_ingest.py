"""What ingestion costs, against doing the same by hand, against img2dataset, and as it grows.

    python -m tests.bench.bench_ingest loop    [--photos 2000] [--cores 2] [--rounds 3]
    python -m tests.bench.bench_ingest web     [--photos 2000] [--cores 2]
    python -m tests.bench.bench_ingest grow    [--counts 1000 10000 100000] [--cores 2]
    python -m tests.bench.bench_ingest near    [--hashes 1000000] [--bits 2]

``loop``: photos a second against a pool of as many plain processes that decode, shrink and encode
the same files with Pillow, and write them; rounds in turn. The rate is that between the first and
the last tenth, so that the start of processes counts for none. Goal: at least 0.95.

``web``: seconds from the command to the end, against img2dataset with the same output size, in a
virtual environment that the bench makes (``pip install img2dataset``), both over a server on the
loopback interface. Goal: less. Both counted with their start; both are given every core.

``grow``: photos a second and the most memory of the driver and of any worker, for more and more
photos; a photo is a small scene with its number in it, so that few are alike.

``near``: seconds and memory of finding the near ones among random hashes.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.server
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sbir_ray.config import IngestConfig, WebConfig
from sbir_ray.runlog import Progress
from sbir_ray.stream.cluster import connect
from sbir_ray.stream.duplicates import RECORD, find_duplicates
from sbir_ray.stream.ingest import ingest

LONGEST = 256
QUALITY = 95


# --------------------------------------------------------------------------- photos


def photo(number: int, side: int) -> bytes:
    """A JPEG file of coarse and fine patches, of the size that a camera's photo has per pixel."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
    pixels = np.asarray(coarse.resize((side, side * 3 // 4), Image.Resampling.BICUBIC))
    fine = rng.integers(-12, 13, (pixels.shape[0] // 2, pixels.shape[1] // 2, 1))
    fine = fine.repeat(2, 0).repeat(2, 1)
    rgb = pixels.astype(np.int16)
    rgb[: fine.shape[0], : fine.shape[1]] += fine.astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_photos(folder: Path, count: int, side: int) -> Path:
    """``count`` files in folders of a thousand."""
    for number in range(count):
        place = folder / f"{number // 1000:04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07d}.jpg").write_bytes(photo(number, side))
    return folder


# --------------------------------------------------------------------------- the loop by hand


def by_hand(out: str, file: str) -> float:
    """Decode, shrink, encode and write one file; when that was done."""
    with Image.open(file) as picture:
        picture.draft(None, (LONGEST, LONGEST))
        rgb = picture.convert("RGB")
        scale = LONGEST / max(rgb.size)
        size = (round(rgb.width * scale), round(rgb.height * scale))
        small = rgb.resize(size, Image.Resampling.LANCZOS)
    small.save(Path(out) / Path(file).name, "JPEG", quality=QUALITY, subsampling=0)
    return time.monotonic()


def steady(times: list[float]) -> float:
    """Photos a second between the first tenth and the last."""
    times = sorted(times)
    low, high = len(times) // 10, len(times) * 9 // 10
    return (high - low) / (times[high] - times[low])


class Watched(Progress):
    """Notes when photos were done, in the first pass."""

    marks: list[tuple[float, int]]

    def __init__(self, label: str) -> None:
        super().__init__(label, unit="photos")
        if label == "ingest":
            Watched.marks = []

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        super().update(done, total, note)
        if self.label == "ingest":
            Watched.marks.append((time.monotonic(), done))


def watched_rate(count: int) -> float:
    """As :func:`steady`, of the blocks that came back."""
    marks = [mark for mark in Watched.marks if count * 0.1 <= mark[1] <= count * 0.9]
    (began, first), (ended, last) = marks[0], marks[-1]
    return (last - first) / (ended - began)


def bench_loop(args: argparse.Namespace, folder: Path) -> None:
    """Photos a second, ours over theirs."""
    source = write_photos(folder / "photos", args.photos, args.side)
    files = sorted(map(str, source.rglob("*.jpg")))
    ratios = []
    with connect(num_cpus=args.cores):
        for number in range(args.rounds + 1):
            out = folder / f"hand{number}"
            out.mkdir()
            with multiprocessing.get_context("spawn").Pool(args.cores) as pool:
                hand = steady(pool.map(partial(by_hand, str(out)), files, chunksize=8))
            config = IngestConfig(longest=LONGEST, quality=QUALITY)
            began = time.monotonic()
            ingest([source], folder / f"store{number}", config, progress=Watched)
            whole = args.photos / (time.monotonic() - began)
            ours = watched_rate(args.photos)
            if number:  # the first round starts the workers
                ratios.append(ours / hand)
                print(
                    f"round {number}: {hand:.1f}/s by hand, {ours:.1f}/s steady, "
                    f"{whole:.1f}/s with all passes and start, ratio {ours / hand:.3f}",
                    flush=True,
                )
    print(f"ratio {statistics.median(ratios):.3f}, the middle one of {len(ratios)}; goal 0.95")


# --------------------------------------------------------------------------- img2dataset


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The files of ``folder`` on the loopback interface, by a process of their own."""
    command = [sys.executable, "-m", "tests.bench.bench_ingest", "serve", "--folder", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


def serve(folder: str) -> None:
    """Print the port and answer until terminated."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *given: object) -> None:
            pass

    class Patient(http.server.ThreadingHTTPServer):
        # With the default of 5, either side loses photos to connections that are reset.
        request_queue_size = 1024

    handler = partial(Quiet, directory=folder)
    with Patient(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def bench_web(args: argparse.Namespace, folder: Path) -> None:
    """Seconds of both over the same addresses."""
    source = write_photos(folder / "photos", args.photos, args.side)
    home = folder / "venv"
    venv.create(home, with_pip=True)
    subprocess.run([str(home / "bin" / "pip"), "install", "-q", "img2dataset"], check=True)
    with served(source) as address:
        names = sorted(source.rglob("*.jpg"))
        addresses = [f"{address}/{name.relative_to(source)}" for name in names]
        (folder / "list.txt").write_text("\n".join(addresses) + "\n")
        began = time.monotonic()
        theirs = [str(home / "bin" / "img2dataset"), "--url_list", str(folder / "list.txt")]
        theirs += ["--output_folder", str(folder / "theirs"), "--output_format", "parquet"]
        theirs += ["--image_size", str(LONGEST), "--resize_mode", "keep_ratio_largest"]
        theirs += ["--resize_only_if_bigger", "True", "--encode_quality", str(QUALITY)]
        theirs += ["--processes_count", str(args.cores), "--thread_count", "32"]
        theirs += ["--number_sample_per_shard", "256", "--enable_wandb", "False"]
        subprocess.run(theirs, check=True, stdout=subprocess.DEVNULL)
        other = time.monotonic() - began
        stats = [json.loads(f.read_text()) for f in (folder / "theirs").glob("*_stats.json")]
        began = time.monotonic()
        web = WebConfig(allow_private=True, per_host=0, threads=32)
        config = IngestConfig(longest=LONGEST, quality=QUALITY, web=web)
        with connect(num_cpus=args.cores):
            ledger = ingest([folder / "list.txt"], folder / "ours", config)
        ours = time.monotonic() - began
    print(f"img2dataset: {other:.1f} s, {sum(s['successes'] for s in stats)} photos")
    print(f"ingest: {ours:.1f} s, {ledger}")
    print(f"ratio {other / ours:.3f}; goal above 1")


# --------------------------------------------------------------------------- growth


@dataclasses.dataclass
class Peak:
    """Most memory of a process so far, KiB."""

    all: int = 0
    own: int = 0
    """Neither files nor memory that Ray's processes share, both of which the system may drop or
    which is there once for all. Looked at twice a second."""

    def add(self, process: str) -> None:
        status = Path(f"/proc/{process}/status").read_text()
        kib = {line.split(":")[0]: line.split() for line in status.splitlines()}
        self.all = max(self.all, int(kib["VmHWM"][1]))
        self.own = max(self.own, int(kib["RssAnon"][1]))


def look(seen: dict[str, Peak]) -> None:
    """This process and each Ray worker of this machine."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(b"ray::"):
                    seen.setdefault(entry.name, Peak()).add(entry.name)
            except (OSError, KeyError):  # it has ended
                continue
    seen.setdefault("self", Peak()).add("self")


def bench_grow(args: argparse.Namespace, folder: Path) -> None:
    """Each count in a process of its own, whose memory says something."""
    for count in args.counts:
        command = [sys.executable, "-m", "tests.bench.bench_ingest", "one", "--photos", str(count)]
        command += ["--cores", str(args.cores), "--side", "192", "--folder", str(folder)]
        subprocess.run(command, check=True)


def bench_one(args: argparse.Namespace, folder: Path) -> None:
    """One size of ``grow``."""
    source = write_photos(folder / f"photos{args.photos}", args.photos, args.side)
    seen: dict[str, Peak] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            look(seen)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with connect(num_cpus=args.cores):
        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.monotonic()
        ledger = ingest([source], folder / f"store{args.photos}", IngestConfig(longest=LONGEST))
        seconds = time.monotonic() - began
        done.set()
        watcher.join()
    driver = seen.pop("self")
    print(
        f"{args.photos} photos: {args.photos / seconds:.1f}/s in all; driver {driver.all >> 10} "
        f"MiB at most ({before} before), {driver.own >> 10} its own; a worker "
        f"{max(one.all for one in seen.values()) >> 10} at most, "
        f"{max(one.own for one in seen.values()) >> 10} its own; {ledger}",
        flush=True,
    )


def bench_near(args: argparse.Namespace, folder: Path) -> None:
    """Seconds for random hashes, every hundredth of which has a near one."""
    rng = np.random.default_rng(0)
    records = np.zeros(args.hashes, RECORD)
    records["id"] = np.frombuffer(rng.bytes(32 * args.hashes), "S32")
    records["phash"] = rng.integers(-(2**63), 2**63 - 1, args.hashes)
    records["phash"][1::100] = records["phash"][::100][: len(records[1::100])] ^ 1
    records["row"] = np.arange(args.hashes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    began = time.monotonic()
    fates = find_duplicates([records], args.hashes, args.bits, folder / "near")
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{args.hashes} hashes, {args.bits} bits: {seconds:.1f} s, {int((fates.fate > 0).sum())} "
        f"near ones, {after - before} MiB more than before"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["loop", "web", "grow", "one", "near", "serve"])
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--side", type=int, default=1024, help="Longest side of a photo.")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="Where to work; by default a temporary folder.")
    args = parser.parse_args()
    if args.what == "serve":
        serve(args.folder)
        return
    benches: dict[str, Callable[[argparse.Namespace, Path], None]] = {
        "loop": bench_loop,
        "web": bench_web,
        "grow": bench_grow,
        "one": bench_one,
        "near": bench_near,
    }
    with tempfile.TemporaryDirectory() as folder:
        benches[args.what](args, Path(args.folder or folder))


if __name__ == "__main__":
    main()
