"""Which photo goes to which split: always the photo with all its sketches, never a sketch.

Photos that show the same count as one photo here: a copy of a held-back photo is held back too.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sbir_ray.data.pairs import Split, hash_of
from sbir_ray.data.sources import Disagreement, SourcePhoto, split_named
from sbir_ray.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """How training photos are held back; what the source itself puts in val or test stays there."""

    val_every: int = 0
    """Every N-th training photo in order of name, from the first, goes to val; 0: none."""
    fold: tuple[int, int] | None = None
    """(k, n): the training photos k, k + n, k + 2n, ... in order of name go to val, k from 0. The
    n folds together hold every photo once; ``val_every=n`` is fold (0, n)."""
    val_fraction: float = 0.0
    """About this share of the training photos goes to val, by a hash of the name and the seed: a
    photo that is added later moves no other one."""
    test_fraction: float = 0.0
    """As ``val_fraction``, to test."""
    seed: int = 0
    csv: Path | None = None
    """CSV with the columns photo, split; it decides alone, and a photo that it does not name is a
    disagreement."""

    def __post_init__(self) -> None:
        if self.fold is not None and not 0 <= self.fold[0] < self.fold[1]:
            raise UserError(f"--fold {self.fold[0]}/{self.fold[1]}: write k/n with 0 <= k < n")
        if self.val_every < 0 or self.val_every == 1:
            raise UserError(f"--val-every {self.val_every}: has to be at least 2")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: has to lie in [0, 1)")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("--val-fraction and --test-fraction leave no photo to train on")
        ways = [
            self.csv is not None,
            self.fold is not None,
            bool(self.val_every),
            bool(self.val_fraction or self.test_fraction),
        ]
        if sum(ways) > 1:
            raise UserError(
                "--split-csv, --fold, --val-every and the fractions exclude each other; give one"
            )


def read_fold(text: str) -> tuple[int, int]:
    """``k/n`` as ``SplitOptions.fold``.

    Raises:
        UserError: written otherwise.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdigit() and count.isdigit()):
        raise UserError(f"--fold {text}: write it as k/n, for example 0/5")
    return int(number), int(count)


def given_splits(
    photos: Sequence[SourcePhoto], source: Sequence[Split | None], options: SplitOptions
) -> tuple[list[Split | None], list[Disagreement]]:
    """The split that the split CSV, or else the source, gives each photo, and where the CSV and the
    photos disagree.

    ``source`` is what the source says of each photo; None counts as train. In the result, None is a
    photo that the CSV does not name.

    Raises:
        UserError: the split CSV cannot be read, or a split is to be chosen that the source has.
    """
    if options.csv is not None:
        return _from_csv(photos, options.csv)
    if "val" in source and (options.val_every or options.fold or options.val_fraction):
        raise UserError("the data has a val split of its own; leave the val options out")
    if "test" in source and options.test_fraction:
        raise UserError("the data has a test split of its own; leave --test-fraction out")
    return [split or "train" for split in source], []


def hold_back(splits: Sequence[Split], units: Sequence[str], options: SplitOptions) -> list[Split]:
    """The splits with a part of train put in val or test, a unit as a whole.

    A unit is a photo, by its name, or all photos that show the same. A unit with a photo outside
    train stays as it is.
    """
    fixed = {unit for split, unit in zip(splits, units, strict=True) if split != "train"}
    free = sorted(set(units) - fixed)
    fold = (0, options.val_every) if options.val_every else options.fold
    held = set(free[fold[0] :: fold[1]] if fold is not None else ())
    chosen: dict[str, Split] = {}
    for unit in free:
        place = hash_of(options.seed, unit)
        if place < options.test_fraction:
            chosen[unit] = "test"
        elif unit in held or place < options.test_fraction + options.val_fraction:
            chosen[unit] = "val"
    return [chosen.get(unit, split) for split, unit in zip(splits, units, strict=True)]


def _from_csv(
    photos: Sequence[SourcePhoto], file: Path
) -> tuple[list[Split | None], list[Disagreement]]:
    wanted: dict[str, Split] = {}
    disagreements = []
    for number, row in read_csv(file, ("photo", "split")):
        split = split_named(row["split"])
        if split is None:
            raise UserError(f"{file}:{number}: split {row['split']!r} is not train, val or test")
        if wanted.setdefault(row["photo"], split) != split:
            both = f"{wanted[row['photo']]} and {split}"
            text = f"{file.name}:{number}: {row['photo']!r} is in {both}"
            disagreements.append(Disagreement("split-conflict", text))
    names = {photo.name for photo in photos}
    for name in sorted(wanted.keys() - names):
        text = f"{file.name}: no photo {name!r}"
        disagreements.append(Disagreement("csv-against-folder", text))
    for name in sorted(names - wanted.keys()):
        text = f"{file.name}: does not name the photo {name!r}"
        disagreements.append(Disagreement("csv-against-folder", text))
    return [wanted.get(photo.name) for photo in photos], disagreements


def read_csv(file: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with their line numbers; cells are stripped.

    Raises:
        UserError: it cannot be read, a column is missing, a cell of such a column is empty.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{file}: no column {missing[0]}; it needs {','.join(columns)}")
            rows = []
            for row in reader:
                cells = {k: v.strip() for k, v in row.items() if k and isinstance(v, str)}
                empty = [name for name in columns if not cells.get(name)]
                if empty:
                    raise UserError(f"{file}:{reader.line_num}: {empty[0]} is empty; fill it in")
                rows.append((reader.line_num, cells))
            return rows
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error})") from error
