"""What was found, as a picture: a line for each sketch, the photos behind it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sbir_ray.data.photos import decode_stored

_CELL, _MARGIN = 144, 6


def sheet_of(rows: Sequence[tuple[NDArray[np.uint8], Sequence[bytes | None]]]) -> bytes:
    """A PNG of sketches (S, S), 255 is ink, each with the stored pictures that it found."""
    across = 1 + max((len(images) for _, images in rows), default=0)
    step = _CELL + _MARGIN
    sheet = Image.new("RGB", (across * step + _MARGIN, len(rows) * step + _MARGIN), "#d8d8d8")
    for line, (raster_SS, images) in enumerate(rows):
        pictures = [255 - np.repeat(raster_SS[..., None], 3, 2)]
        pictures += [decode_stored(image) for image in images if image is not None]
        for column, rgb in enumerate(pictures):
            picture = Image.fromarray(rgb)
            picture = ImageOps.contain(picture, (_CELL, _CELL), Image.Resampling.LANCZOS)
            cell = Image.new("RGB", (_CELL, _CELL), "white")
            cell.paste(picture, ((_CELL - picture.width) // 2, (_CELL - picture.height) // 2))
            sheet.paste(cell, (_MARGIN + column * step, _MARGIN + line * step))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
