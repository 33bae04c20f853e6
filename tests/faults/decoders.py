"""Decoders that fail as no file can make the real one fail on purpose."""

from __future__ import annotations

import os

from sbir_ray.data import photos
from sbir_ray.data.photos import PhotoLimits, PhotoRow
from tests.faults.corpus import CONFUSE, CRASH


def failing(data: bytes, name: str, uri: str, limits: PhotoLimits) -> PhotoRow:
    """As ``photos.make_row``, but one file ends its process and one is not understood."""
    if data == CRASH:
        os._exit(139)
    if data == CONFUSE:
        raise ArithmeticError("no\nnumber")
    return photos.make_row(data, name, uri, limits)
