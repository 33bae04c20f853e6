"""Time of rasterise beside Pillow and OpenCV, on synthetic sketches of 48 points in 10 strokes.

    python tests/bench/bench_raster.py [--repeats 15] [--batch 256] [--points 48]

All are run in turn, one thread each, so that a busy machine slows them alike; the medians and the
median ratios within a turn are printed. Pillow and OpenCV draw hard-edged lines of the nearest
whole width, and OpenCV also anti-aliased ones. OpenCV (opencv-python) is needed by this script
alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sbir_ray.data.raster import WIDTH, rasterise
from sbir_ray.data.strokes import CANVAS, LONGEST, Strokes

STROKES = 10


def synthetic(rng: np.random.Generator, points: int) -> Strokes:
    """Smooth strokes within the canonical box, as long as those of people's product drawings."""
    strokes: Strokes = []
    for count in np.diff(np.linspace(0, points, STROKES + 1).astype(int)):
        turn = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.4, count))
        steps = np.stack([np.cos(turn), np.sin(turn)], axis=1) * rng.uniform(15, 55)
        line = rng.uniform(0, LONGEST, 2) + np.cumsum(steps, axis=0)
        folded = np.abs((line + LONGEST) % (2 * LONGEST) - LONGEST)
        strokes.append(((CANVAS - LONGEST) / 2 + folded).astype(np.float32))
    return strokes


def pillow(batch: list[Strokes], size: int) -> NDArray[np.uint8]:
    width = max(1, round(WIDTH * size / CANVAS))
    drawn = np.empty((len(batch), size, size), dtype=np.uint8)
    for place, strokes in zip(drawn, batch, strict=True):
        image = Image.new("L", (size, size))
        draw = ImageDraw.Draw(image)
        for stroke in strokes:
            draw.line((stroke * (size / CANVAS)).ravel().tolist(), fill=255, width=width)
        place[:] = np.asarray(image)
    return drawn


def opencv(batch: list[Strokes], size: int, line: int, width: int) -> NDArray[np.uint8]:
    drawn = np.zeros((len(batch), size, size), dtype=np.uint8)
    for place, strokes in zip(drawn, batch, strict=True):
        lines = [np.rint(stroke * (16 * size / CANVAS)).astype(np.int32) for stroke in strokes]
        cv2.polylines(place, lines, False, 255, width, line, 4)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--points", type=int, default=48)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    batch = [synthetic(rng, arguments.points) for _ in range(arguments.batch)]
    length = sum(float(np.hypot(*np.diff(s, axis=0).T).sum()) for b in batch for s in b)
    print(
        f"{len(batch)} sketches, {arguments.points} points and {STROKES} strokes each, mean length "
        f"{length / len(batch):.0f} canvas units; {arguments.repeats} turns"
    )
    for size in (64, 128, 256):
        whole = max(1, round(WIDTH * size / CANVAS))

        def hard(size: int = size, width: int = whole) -> object:
            return opencv(batch, size, cv2.LINE_8, width)

        def smooth(size: int = size, width: int = whole) -> object:
            return opencv(batch, size, cv2.LINE_AA, width)

        runs: dict[str, Callable[[], object]] = {
            "rasterise": lambda size=size: rasterise(batch, size),  # type: ignore[misc]
            f"Pillow {whole} px": lambda size=size: pillow(batch, size),  # type: ignore[misc]
            f"OpenCV {whole} px": hard,
            f"OpenCV {whole} px anti-aliased": smooth,
        }
        if whole == 1:
            runs["OpenCV 2 px"] = lambda size=size: opencv(  # type: ignore[misc]
                batch, size, cv2.LINE_8, 2
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(arguments.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
        ours = times["rasterise"]
        for name, theirs in times.items():
            ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
            print(
                f"{size:4} px  {name:26} {1e3 * statistics.median(theirs):7.2f} ms"
                + ("" if name == "rasterise" else f"   rasterise takes {ratio:.2f} of it")
            )


if __name__ == "__main__":
    main()
