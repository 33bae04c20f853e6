"""A CSV file that says which sketch is of which photo, against the files that are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from sbir_ray.data.pairs import Split
from sbir_ray.data.sources import (
    Disagreement,
    Found,
    Kind,
    folded,
    meant_by,
    split_named,
)
from sbir_ray.data.splits import read_csv
from sbir_ray.errors import UserError


class FileIndex:
    """Numbers of photos or sketches by everything that a cell may call them."""

    def __init__(self) -> None:
        self._exact: dict[str, set[int]] = defaultdict(set)
        self._folded: dict[str, set[int]] = defaultdict(set)

    def add(self, number: int, calls: Iterable[str]) -> None:
        for call in calls:
            self._exact[call].add(number)
            self._folded[folded(call)].add(number)

    def find(self, cell: str) -> tuple[set[int], bool]:
        """Numbers that the cell may mean, and whether only by case or Unicode form."""
        call = cell.replace("\\", "/").removeprefix("./")
        if call in self._exact:
            return self._exact[call], False
        return self._folded.get(folded(call), set()), True


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    photo: int
    split: Split | None


def pair_by_csv(table: Path, photos: FileIndex, sketches: FileIndex, found: Found) -> None:
    """Let the CSV decide about ``found``, and list where it and the files do not agree.

    Columns photo, sketch and, if wanted, split. A cell is a path within the source, a file's name
    with or without its ending, or a key within a file. What no row names is left out.

    Raises:
        UserError: the file cannot be read, or a split is none.
    """

    def disagree(kind: Kind, text: str) -> None:
        found.disagreements.append(Disagreement(kind, text))

    def resolve(index: FileIndex, what: str, cell: str, where: str) -> int | None:
        numbers, twin = index.find(cell)
        if len(numbers) != 1:
            problem = "fits several files" if numbers else "no such file"
            disagree("csv-against-folder", f"{where}: {what} {cell!r}: {problem}")
            return None
        if twin:
            disagree("twins", f"{where}: {what} {cell!r} fits the file in other case or form only")
        return next(iter(numbers))

    rows: dict[int, list[_Row]] = defaultdict(list)
    named: set[int] = set()
    for line, cells in read_csv(table, ("photo", "sketch")):
        where = f"{table.name}:{line}"
        split = split_named(cells.get("split", ""))
        if cells.get("split") and split is None:
            raise UserError(f"{where}: split {cells['split']!r} is not train, val or test")
        photo = resolve(photos, "photo", cells["photo"], where)
        sketch = resolve(sketches, "sketch", cells["sketch"], where)
        if photo is not None:
            named.add(photo)
        if photo is not None and sketch is not None:
            rows[sketch].append(_Row(where, photo, split))

    names = {photo.name for photo in found.photos}
    kept = []
    for number, item in enumerate(found.sketches):
        of = rows.get(number, [])
        owners = sorted({found.photos[row.photo].name for row in of})
        if not of:
            disagree("csv-against-folder", f"{item.origin}: the sketch is in no row")
        elif len(owners) > 1:
            disagree("sketch-of-two-photos", f"{of[-1].where}: {item.origin}: {', '.join(owners)}")
        else:
            by_name = next((name for name in meant_by(item.photo) if name in names), owners[0])
            if not item.named and by_name != owners[0]:
                text = f"{item.origin} is of {owners[0]!r}, by its name of {by_name!r}"
                disagree("csv-against-folder", f"{of[0].where}: {text}")
            splits = {row.split for row in of} | {item.split}
            if len(splits - {None}) > 1:
                places = " and ".join(sorted(str(split) for split in splits - {None}))
                disagree("split-conflict", f"{of[-1].where}: {item.origin} is in {places}")
            split = of[0].split or item.split
            kept.append(replace(item, photo=owners[0], split=split, named=True))
    for number, photo_item in enumerate(found.photos):
        if number not in named:
            disagree("csv-against-folder", f"{photo_item.uri}: the photo is in no row")
    found.photos_left_out += len(found.photos) - len(named)
    found.sketches_left_out += len(found.sketches) - len(kept)
    found.photos = [photo for number, photo in enumerate(found.photos) if number in named]
    found.sketches = kept
