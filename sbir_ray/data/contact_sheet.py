"""Many photos on one picture, to look at."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from sbir_ray.data import photos
from sbir_ray.data.photos import PhotoRow

_CELL = 144
_LINE = 16
_MARGIN = 6


def contact_sheet(rows: Sequence[PhotoRow], columns: int = 8) -> bytes:
    """A PNG of the photos in rows of ``columns``, each above the beginning of its photo_id."""
    across = min(columns, max(1, len(rows)))
    width, height = _CELL + _MARGIN, _CELL + _LINE + _MARGIN
    lines = math.ceil(len(rows) / across)
    sheet = Image.new("RGB", (across * width + _MARGIN, lines * height + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left, top = _MARGIN + number % across * width, _MARGIN + number // across * height
        picture = Image.fromarray(photos.decode_stored(row["image"]))
        picture.thumbnail((_CELL, _CELL), Image.Resampling.LANCZOS)
        place = left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2
        sheet.paste(picture, place)
        pen.text((left, top + _CELL + 2), row["photo_id"][:16], fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
