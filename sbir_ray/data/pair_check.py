"""Is a PAIRS folder what it says, and does a photo of one split hide in another?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbir_ray.data import strokes as sketch_form
from sbir_ray.data.leaks import Leak, Print, find_leaks, near_pairs, print_of
from sbir_ray.data.pairs import SPLITS, Split, iter_photos, iter_sketches, read_header
from sbir_ray.errors import UserError

_LISTED = 20
_SLACK = 0.01
"""Largest distance of a canonical sketch's box from where it belongs, canvas units."""


@dataclass(slots=True)
class CheckReport:
    """What :func:`check_pairs` saw."""

    splits: dict[Split, dict[str, int]]
    """Photos, sketches and photos without a sketch, by split."""
    points: dict[str, float] = field(default_factory=dict)
    """Smallest, median, mean and largest number of points of a sketch."""
    strokes_median: float = 0.0
    drawings: int = 0
    """Sketches that were rasters."""
    problems: list[str] = field(default_factory=list)
    """Ids and strokes that are not as they have to be."""
    leaks: list[Leak] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No problem and no leak."""
        return not self.problems and not self.leaks

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        lines = []
        for split, counts in self.splits.items():
            if counts["photos"]:
                bare = counts["photos without sketch"]
                tail = f" ({bare} photos without sketch)" if bare else ""
                lines.append(
                    f"{split}: {counts['photos']} photos, {counts['sketches']} sketches{tail}"
                )
        if self.points:
            numbers = ", ".join(f"{name} {value:.0f}" for name, value in self.points.items())
            lines.append(f"points a sketch: {numbers}; strokes, median {self.strokes_median:.0f}")
        if self.drawings:
            lines.append(f"traced from rasters: {self.drawings} sketches")
        for title, items in (("problem", self.problems), ("leak", self.leaks)):
            lines += [f"{title}: {item}" for item in items[:_LISTED]]
            if len(items) > _LISTED:
                lines.append(f"{title}: ... and {len(items) - _LISTED} more")
        if self.ok:
            lines.append("ids agree, and no photo is in two splits")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "ok": self.ok,
            "splits": self.splits,
            "points": self.points,
            "strokes_median": self.strokes_median,
            "drawings": self.drawings,
            "problems": self.problems,
            "leaks": [str(leak) for leak in self.leaks],
        }


def check_pairs(folder: str | Path) -> CheckReport:
    """Count a PAIRS folder and compare its ids, strokes and the photos of its splits.

    Raises:
        UserError: not a PAIRS folder.
        DamagedError: a table cannot be read.
    """
    header = read_header(folder)
    names = ("photos", "sketches", "photos without sketch")
    report = CheckReport({split: dict.fromkeys(names, 0) for split in SPLITS})
    prints: list[Print] = []
    splits: list[Split] = []
    owners: Counter[tuple[str, Split]] = Counter()
    for photo in iter_photos(folder):
        report.splits[photo["split"]]["photos"] += 1
        owners[photo["photo_id"], photo["split"]] += 1
        prints.append(print_of(photo))
        splits.append(photo["split"])
    twice = [photo_id for (photo_id, _), number in owners.items() if number > 1]
    report.problems += [f"photo {photo_id} is there more than once" for photo_id in twice]
    drawn = _check_sketches(folder, owners, report)
    for owner in owners.keys() - drawn:
        report.splits[owner[1]]["photos without sketch"] += 1
    for split, stated in header["splits"].items():
        for what, number in stated.items():
            if report.splits[split][what] != number:
                found = report.splits[split][what]
                report.problems.append(f"pairs.json states {number} {what} in {split}, not {found}")
    report.leaks = find_leaks(prints, splits, near_pairs(prints))
    return report


def _check_sketches(
    folder: str | Path, owners: Counter[tuple[str, Split]], report: CheckReport
) -> set[tuple[str, Split]]:
    """Look at every sketch; the photos (id, split) that have one."""
    seen: set[str] = set()
    drawn: set[tuple[str, Split]] = set()
    points, strokes_count = [], []
    for row in iter_sketches(folder):
        name, owner = row["sketch_id"], (row["photo_id"], row["split"])
        report.splits[row["split"]]["sketches"] += 1
        report.drawings += row["drawing"] is not None
        if name in seen:
            report.problems.append(f"sketch {name} is there twice")
        seen.add(name)
        if owner not in owners:
            report.problems.append(f"sketch {name}: its photo is not in {row['split']}")
        drawn.add(owner)
        strokes = sketch_form.unflatten(row["strokes"])
        try:
            sketch_form.check(strokes, f"sketch {name}")
        except UserError as error:
            report.problems.append(str(error))
            continue
        points.append(sketch_form.count_points(strokes))
        strokes_count.append(len(strokes))
        if not _is_canonical(strokes):
            report.problems.append(f"sketch {name}: is not canonical")
    if points:
        report.points = {
            "least": float(np.min(points)),
            "median": float(np.median(points)),
            "mean": float(np.mean(points)),
            "most": float(np.max(points)),
        }
        report.strokes_median = float(np.median(strokes_count))
    return drawn


def _is_canonical(strokes: sketch_form.Strokes) -> bool:
    both = np.concatenate(strokes)
    low, high = both.min(axis=0), both.max(axis=0)
    centred = np.abs((low + high) / 2 - sketch_form.CANVAS / 2).max() <= _SLACK
    return bool(centred and abs((high - low).max() - sketch_form.LONGEST) <= _SLACK)
