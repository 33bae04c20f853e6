"""Drawings of QuickDraw's ndjson files with what their lines say about the photo."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sbir_ray.data import formats
from sbir_ray.data.photos import printable
from sbir_ray.data.sources import Found, Reject
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class Drawing:
    """One line of a file."""

    key: str
    """Its ``key_id``, or the number of the line."""
    photo: str | None
    """Its ``photo``: a field that QuickDraw's own files do not have, the name of a photo."""
    word: str | None
    """Its ``word``: what was asked to be drawn."""
    strokes: Strokes
    origin: str


def read_drawings(path: Path, place: str, found: Found) -> Iterator[Drawing]:
    """The drawings of an ndjson file; a line that is none is added to the rejects of ``found``."""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(_lines(stream), start=1):
                if line.strip():
                    origin = f"{place}:{number}"
                    try:
                        yield _drawing(line, number, origin)
                    except UserError as error:
                        text = str(error).removeprefix(f"{origin}: ")
                        found.rejects.append(Reject("sketch", "damaged", origin, text))
    except OSError as error:
        text = f"cannot be read ({error.strerror})"
        found.rejects.append(Reject("sketch", "damaged", place, text))


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Lines, of which an overlong one is given in part and then skipped."""
    while line := stream.readline(formats.MAX_BYTES + 1):
        yield line
        while len(line) > formats.MAX_BYTES and not line.endswith(b"\n"):
            line = stream.readline(formats.MAX_BYTES + 1)


def _drawing(line: bytes, number: int, origin: str) -> Drawing:
    ((_, strokes),) = formats.read_sketches(line, "ndjson", origin)
    # Parsed once more for the fields that are about the photo: the reader above has vouched for it.
    row = json.loads(line)
    return Drawing(
        key=printable(str(row.get("key_id", number))),
        photo=_name(row.get("photo")),
        word=_name(row.get("word")),
        strokes=strokes,
        origin=origin,
    )


def _name(value: object) -> str | None:
    return printable(value) if isinstance(value, str) and value else None
