"""Photos: from the bytes of any file to one aligned RGB picture, and the row that stores it.

Every photo goes one way: :func:`decode` (the policy is in :mod:`sbir_ray.data.decoding`),
:func:`make_row` (a JPEG with its identity), :func:`align` (the object in the same box as a
canonical sketch). A photo that cannot be used raises :class:`PhotoError`, whose ``reason`` is one
of :data:`REASONS`, so that rejected photos can be counted.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from sbir_ray.data.decoding import DEFAULT_LIMITS as DEFAULT_LIMITS
from sbir_ray.data.decoding import REASONS as REASONS
from sbir_ray.data.decoding import PhotoError as PhotoError
from sbir_ray.data.decoding import PhotoLimits as PhotoLimits
from sbir_ray.data.decoding import Reason as Reason
from sbir_ray.data.decoding import Rgb as Rgb
from sbir_ray.data.decoding import check_bytes as check_bytes
from sbir_ray.data.decoding import decode as decode
from sbir_ray.data.decoding import encode, picture_of
from sbir_ray.errors import UserError
from sbir_ray.places import is_local, open_table, place, read_table
from sbir_ray.strict import check_schema

Grey = npt.NDArray[np.uint8]
"""(H, W)."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
"""File name endings of photos, lower case."""

CONTENT_SHARE = 190 / 256
"""Longest side of the object's box as a share of the picture's side, as for canonical sketches."""

PHOTO_SCHEMA = pa.schema(
    [
        ("photo_id", pa.string()),
        ("name", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("image", pa.binary()),
        ("phash", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)

# A border is plain when this share of it is this near to its median colour.
_PLAIN_SHARE = 0.75
_PLAIN_LEVELS = 12
# A plain background at least this light becomes white.
_LIGHT = 200
# What differs from the background by so much, and by so large a share of the strongest differences,
# is object. The share is above the ringing that JPEG leaves around an object, which would widen its
# box by as much as 6 % of the picture's side.
_OBJECT_LEVELS = 16
_OBJECT_SHARE = 0.1


class PhotoRow(TypedDict):
    """A row of :data:`PHOTO_SCHEMA`: one stored photo."""

    photo_id: str
    name: str
    uri: str
    width: int
    height: int
    image: bytes
    phash: int
    status: str
    reason: str


# --------------------------------------------------------------------------- bytes to pixels


def read_bytes(path: str | Path, limits: PhotoLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a file, not more than ``limits.max_bytes`` of them.

    Raises:
        PhotoError: ``unreadable`` (missing, a folder, a pipe, no permission), ``empty``,
            ``too-many-bytes``.
    """
    try:
        with _opened(place(path)) as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise PhotoError("unreadable", error.strerror or type(error).__name__) from error
    check_bytes(data, limits)
    return data


def _opened(path: Path) -> IO[bytes]:
    if not is_local(path):
        return path.open("rb")
    # A pipe that nobody writes to would be waited for.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(handle, "rb")  # noqa: SIM115  # the caller closes it
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise PhotoError("unreadable", "not a regular file")
    return file


def decode_grey(data: bytes, limits: PhotoLimits = DEFAULT_LIMITS) -> Grey:
    """Pixels of a scanned or rastered drawing, (H, W) uint8, at most ``limits.longest`` long.

    Raises:
        PhotoError: as :func:`decode`.
    """
    rgb = decode(data, limits, longest=limits.longest)
    return np.asarray(Image.fromarray(rgb).convert("L"))


def encode_jpeg(rgb: Rgb) -> bytes:
    """JPEG bytes of ``rgb`` (H, W, 3) at the quality in which photos are stored by default."""
    return encode(Image.fromarray(rgb))


def encode_png(grey: Grey) -> bytes:
    """PNG bytes of a grey picture (H, W)."""
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    return out.getvalue()


def decode_stored(image: bytes) -> npt.NDArray[np.uint8]:
    """Pixels of a stored photo (H, W, 3), or of bytes that :func:`encode_png` (H, W) made."""
    with Image.open(io.BytesIO(image), formats=("JPEG", "PNG", "WEBP")) as picture:
        return np.array(picture)


# --------------------------------------------------------------------------- the row


def photo_id(data: bytes) -> str:
    """Identity of a photo: hex sha256 of its file's bytes."""
    return hashlib.sha256(data).hexdigest()


def make_row(
    data: bytes, name: str = "", uri: str = "", limits: PhotoLimits = DEFAULT_LIMITS
) -> PhotoRow:
    """The row that stores a photo file, status ``stored``.

    Raises:
        PhotoError: as :func:`decode`.
    """
    picture = picture_of(data, limits, longest=limits.longest)
    return _row(picture, photo_id(data), name, uri, limits)


def row_of_pixels(
    rgb: Rgb,
    identity: str,
    name: str = "",
    uri: str = "",
    limits: PhotoLimits = DEFAULT_LIMITS,
) -> PhotoRow:
    """The row of a picture that is already decoded, under the given ``photo_id``."""
    return _row(Image.fromarray(rgb), identity, name, uri, limits)


def _row(picture: Image.Image, identity: str, name: str, uri: str, limits: PhotoLimits) -> PhotoRow:
    return PhotoRow(
        photo_id=identity,
        name=printable(name),
        uri=printable(uri),
        width=picture.width,
        height=picture.height,
        image=encode(picture, limits),
        phash=_phash(picture),
        status="stored",
        reason="",
    )


def printable(name: str) -> str:
    """A file name as text that can be stored: bytes that are no UTF-8 are written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def phash(rgb: Rgb) -> int:
    """64-bit perceptual hash, as a signed integer: near pictures differ in few bits.

    Signs of the 8 x 8 lowest frequencies of the discrete cosine transform of a 32 x 32 grey
    miniature, against their median. A mirrored copy has another hash.
    """
    return _phash(Image.fromarray(rgb))


def _phash(picture: Image.Image) -> int:
    small = picture.convert("L").resize((32, 32), Image.Resampling.BOX)
    low = _COSINES @ np.asarray(small, np.float64) @ _COSINES.T
    # Rounded, so that the last bits of the sums do not decide on flat pictures.
    low = np.round(low, 3)
    bits = (low > np.median(low)).ravel()
    return int(np.packbits(bits).view(">i8")[0])


def hash_distance(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Number of different bits of perceptual hashes, broadcast over both arguments."""
    bits = np.asarray(a, np.int64) ^ np.asarray(b, np.int64)
    return np.asarray(_POPCOUNT[np.ascontiguousarray(bits)[..., None].view(np.uint8)].sum(-1))


def read_store(folder: str | Path) -> Iterator[PhotoRow]:
    """The photos of a PHOTOS folder, shard by shard, one at a time.

    Raises:
        UserError: the folder is not a photo store of a known version.
    """
    store_header(folder)
    for shard in shards(folder):
        yield from read_rows(shard)


def store_header(folder: str | Path) -> dict[str, Any]:
    """``store.json`` of a PHOTOS folder.

    Raises:
        UserError: the folder is not a photo store of a known version.
    """
    marker = place(folder) / "store.json"
    try:
        header = json.loads(marker.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{marker}: not a photo store; make one with ingest") from error
    if not isinstance(header, dict) or header.get("kind") != "photos":
        raise UserError(f"{marker}: not a photo store; make one with ingest")
    check_schema(header.get("schema_version"), str(marker))
    return header


def shards(folder: str | Path) -> list[Path]:
    """The Parquet files of a PHOTOS folder, in order."""
    return sorted((place(folder) / "shards").glob("part-*.parquet"))


def chosen_rows(
    folder: str | Path, at_most: int, key: Callable[[str], Any], columns: Sequence[str]
) -> pa.Table:
    """The rows of a PHOTOS folder whose ids have the smallest keys, in the order of their ids.

    Ids are read first, and then a file at a time, so the store may be of any size.

    Raises:
        UserError: as :func:`read_store`.
    """
    store_header(folder)
    places = (
        (key(name), name, file, row)
        for file in shards(folder)
        for row, name in enumerate(read_table(file, columns=["photo_id"])[0].to_pylist())
    )
    rows_of: dict[Path, list[int]] = defaultdict(list)
    for _, _, file, row in heapq.nsmallest(at_most, places):
        rows_of[file].append(row)
    found = [read_table(file, columns=columns).take(rows) for file, rows in sorted(rows_of.items())]
    if not found:
        return pa.schema([PHOTO_SCHEMA.field(name) for name in columns]).empty_table()
    return pa.concat_tables(found).sort_by("photo_id")


def read_rows(file: str | Path) -> Iterator[PhotoRow]:
    """The photo rows of one Parquet file, one at a time."""
    with open_table(place(file)) as parquet:
        for batch in parquet.iter_batches(batch_size=64, columns=PHOTO_SCHEMA.names):
            yield from batch.to_pylist()


# --------------------------------------------------------------------------- alignment


def align(rgb: Rgb, size: int) -> Rgb:
    """The photo in the frame of a canonical sketch, (size, size, 3) uint8.

    The object's box is centred and its longest side becomes exactly 190/256 of ``size``, aspect
    kept, white around it: where a canonical sketch's bounding box lies. On a plain background the
    box is that of everything that differs from the background, and a light background becomes
    white; otherwise the whole picture is the object.
    """
    background = _plain_background(rgb)
    box = None if background is None else _content_box(_difference(rgb, background))
    if background is None or box is None:
        return _place(Image.fromarray(rgb), (0, 0, rgb.shape[1], rgb.shape[0]), size, 255)
    if background.min() < 255 and background.min() >= _LIGHT:
        whitened = rgb.astype(np.float32) * (255.0 / background)
        rgb = np.minimum(np.round(whitened), 255).astype(np.uint8)
    return _place(Image.fromarray(rgb), box, size, 255)


def align_drawing(grey: Grey, size: int) -> Grey:
    """A rastered drawing in the frame of a canonical sketch, (size, size) uint8, 255 = ink.

    ``grey`` (H, W) may be dark on light or light on dark: the paper is the median of the border.
    """
    paper = float(np.median(_border(grey)))
    contrast = np.abs(grey.astype(np.float32) - paper) * (255 / max(paper, 255 - paper))
    ink = np.asarray(np.round(contrast), np.uint8)
    box = _content_box(ink) or (0, 0, grey.shape[1], grey.shape[0])
    return _place(Image.fromarray(ink), box, size, 0)


def _place(picture: Image.Image, box: tuple[int, int, int, int], size: int, fill: int) -> Rgb:
    """The part ``box`` (x0, y0, x1, y1) of the picture, resampled once into its exact place."""
    crop = picture.crop(box)
    shrink = max(crop.size) / (4 * size)
    if shrink > 1:
        # Only to bound the canvas below; the exact place is computed from the crop's new size.
        crop = crop.resize(_fit(crop.size, 4 * size), Image.Resampling.BOX)
    width, height = crop.size
    side = max(width, height) / CONTENT_SHARE
    canvas_side = math.ceil(side) + 2
    left, top = (canvas_side - width) // 2, (canvas_side - height) // 2
    colour = (fill,) * 3 if picture.mode == "RGB" else fill
    canvas = Image.new(picture.mode, (canvas_side, canvas_side), colour)
    canvas.paste(crop, (left, top))
    x, y = left + width / 2 - side / 2, top + height / 2 - side / 2
    frame = (x, y, x + side, y + side)
    # Bicubic: what Lanczos leaves around an edge would be seen on the white beyond it.
    return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC, box=frame))


def _plain_background(rgb: Rgb) -> npt.NDArray[np.uint8] | None:
    """Colour (3,) of the background, or None when the border is not of one colour."""
    border = _border(rgb)
    colour = np.median(border, axis=0).astype(np.uint8)
    near = (_difference(border, colour) <= _PLAIN_LEVELS).mean()
    return colour if near >= _PLAIN_SHARE else None


def _border(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The pixels of a frame around the picture, (n,) or (n, 3)."""
    height, width = pixels.shape[:2]
    depth = max(1, min(height, width) // 64)
    parts = (pixels[:depth], pixels[-depth:], pixels[:, :depth], pixels[:, -depth:])
    return np.concatenate([part.reshape(-1, *pixels.shape[2:]) for part in parts])


def _difference(rgb: npt.NDArray[np.uint8], colour: npt.NDArray[np.uint8]) -> Grey:
    """Largest difference over the channels, without leaving uint8."""
    return np.asarray((np.maximum(rgb, colour) - np.minimum(rgb, colour)).max(axis=-1))


def _content_box(difference: Grey) -> tuple[int, int, int, int] | None:
    """(x0, y0, x1, y1) of what differs; a row or column with one such pixel alone is noise."""
    strong = difference[difference > _OBJECT_LEVELS]
    if not len(strong):
        return None
    ink = difference > max(_OBJECT_LEVELS, _OBJECT_SHARE * np.percentile(strong, 90))
    rows = np.flatnonzero(ink.sum(axis=1) >= 2)
    columns = np.flatnonzero(ink.sum(axis=0) >= 2)
    if not len(rows) or not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --------------------------------------------------------------------------- helpers


def _fit(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


_COSINES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
_POPCOUNT = np.array([value.bit_count() for value in range(256)], np.int64)
