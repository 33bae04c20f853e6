"""From the bytes of any image file to one upright sRGB picture on white, within stated limits.

Limits are checked from the header before pixels take memory. A file that cannot be used raises
:class:`PhotoError`, whose ``reason`` is one of :data:`REASONS`.
"""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from sbir_ray.errors import UserError

Rgb = npt.NDArray[np.uint8]
"""(H, W, 3) red, green, blue."""

Reason = Literal[
    "unreadable",
    "empty",
    "too-many-bytes",
    "not-an-image",
    "too-many-pixels",
    "unsupported",
    "damaged",
    "unsupported-address",
    "private-address",
    "http-status",
    "timeout",
    "unreachable",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why a file cannot be used; no other reason occurs."""
MAY_PASS: tuple[Reason, ...] = ("unreadable", "http-status", "timeout", "unreachable")
"""Those that say nothing about the file: another attempt may find it good."""

# Only these decoders are ever tried: Pillow has others that start programs (EPS) or that nobody has
# photos in.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Modes whose neighbouring values can be averaged: shrunk as they are, before any conversion, which
# would cost a large picture memory.
_AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")
_ALPHA = ("LA", "PA", "RGBA")
# Bytes a pixel of the decoded picture takes in Pillow; modes that are not named take 4.
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# What these decoders hold besides, or instead, measured: canvases of an animation, and planes.
_FORMAT_BYTES = {"WEBP": 16, "AVIF": 10}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, kw_only=True)
class PhotoLimits:
    """What a photo may cost and how it is stored."""

    max_bytes: int = 64 * 2**20
    """Largest file."""
    max_pixels: int = 64_000_000
    """Largest picture, width times height, as the file's header states it."""
    max_memory: int = 192 * 2**20
    """Most memory that decoding may take, bytes, as computed from the header."""
    longest: int = 512
    """Longest side of the stored picture, pixels; smaller ones are not enlarged."""
    form: Literal["jpeg", "webp"] = "jpeg"
    """Format of the stored picture."""
    quality: int = 95
    """Its quality, 1 to 100."""


DEFAULT_LIMITS = PhotoLimits()


class PhotoError(UserError):
    """A file that cannot be used as a photo: ``reason`` is one of :data:`REASONS`."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(reason, text)
        self.reason: Reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


def decode(data: bytes, limits: PhotoLimits = DEFAULT_LIMITS, longest: int | None = None) -> Rgb:
    """Pixels of an image file, (H, W, 3) uint8; arguments and errors as of :func:`picture_of`."""
    return np.asarray(picture_of(data, limits, longest))


def picture_of(
    data: bytes, limits: PhotoLimits = DEFAULT_LIMITS, longest: int | None = None
) -> Image.Image:
    """The picture in an image file: first frame, upright, sRGB on white.

    Bytes, pixels and memory are checked against ``limits`` before memory is taken. The EXIF
    orientation and the colour profile are applied, 16-bit samples are scaled to 8 bits,
    transparency is laid on white.

    Args:
        longest: shrink to this longest side (JPEG files are then decoded at the lowest of the
            resolutions that they offer which is not less: several times faster, and no farther
            from the shrunk picture than the JPEG file it is stored as); ``None`` keeps the file's
            own size.

    Raises:
        PhotoError: for what is in the bytes.
    """
    check_bytes(data, limits)
    # Pillow warns about odd metadata and large pictures; what matters is checked here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = _open(data)
        width, height = picture.size
        if width * height > limits.max_pixels:
            raise PhotoError(
                "too-many-pixels",
                f"{width} x {height} is more than the limit of {limits.max_pixels} pixels",
            )
        if picture.mode in ("I", "F"):
            raise PhotoError("unsupported", "32-bit samples; save it with 8 or 16 bits")
        try:
            if longest is not None:
                picture.draft(None, _fit(picture.size, longest))
            memory = _memory(picture, width * height, longest)
            if memory > limits.max_memory:
                raise PhotoError(
                    "too-many-pixels",
                    f"{width} x {height} of this kind take {memory >> 20} MiB to decode, more than "
                    f"the limit of {limits.max_memory >> 20}",
                )
            if picture.format == "PNG":
                # Loading alone does not look at the checksums of the pixel data.
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            picture.load()
            return _to_rgb(picture, longest)
        except PhotoError:
            raise
        except Exception as error:  # a decoder may raise anything on hostile bytes
            raise PhotoError("damaged", _one_line(error)) from error


def encode(picture: Image.Image, limits: PhotoLimits = DEFAULT_LIMITS) -> bytes:
    """An RGB picture as a file of the format and quality in which photos are stored."""
    out = io.BytesIO()
    if limits.form == "webp":
        picture.save(out, "WEBP", quality=limits.quality)
    else:
        # No chroma subsampling: thin coloured parts are what a fine-grained match looks at.
        picture.save(out, "JPEG", quality=limits.quality, subsampling=0)
    return out.getvalue()


def check_bytes(data: bytes, limits: PhotoLimits) -> None:
    """Refuse an empty file and one that is too large.

    Raises:
        PhotoError: ``empty``, ``too-many-bytes``.
    """
    if not data:
        raise PhotoError("empty", "the file has no bytes")
    if len(data) > limits.max_bytes:
        raise PhotoError("too-many-bytes", f"more than the limit of {limits.max_bytes} bytes")


# --------------------------------------------------------------------------- before the pixels


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise PhotoError("not-an-image", "no known image format") from error
    except Image.DecompressionBombError as error:
        raise PhotoError("too-many-pixels", str(error)) from error
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise PhotoError("damaged", _one_line(error)) from error


def _memory(picture: Image.Image, pixels: int, longest: int | None) -> int:
    """Bytes that :func:`decode` takes at most, small buffers left out.

    Args:
        picture: not loaded yet; of the size that the decoder will give.
        pixels: width times height of the file.
    """
    each = _PIXEL_BYTES.get(picture.mode, 4)
    each = _FORMAT_BYTES.get(picture.format or "", each)
    if picture.format == "TIFF" and picture.info.get("compression", "raw") != "raw":
        each += 4  # one strip may be the whole picture
    clear = picture.mode in _ALPHA or "transparency" in picture.info
    if longest is None or max(picture.size) <= longest:
        each += 16 if clear else 7
    elif clear or picture.mode not in _AVERAGED:
        each += 8 if picture.mode not in _ALPHA else 4
    # All coefficients of a progressive JPEG are kept, at its full size.
    kept = 2 * len(picture.getbands()) if "progressive" in picture.info else 0
    return picture.width * picture.height * each + pixels * kept


# --------------------------------------------------------------------------- colours and frame


def _to_rgb(picture: Image.Image, longest: int | None) -> Image.Image:
    """Shrunk, upright, sRGB, on white; ``picture`` is loaded."""
    turn = _turn(picture)
    profile = picture.info.get("icc_profile")
    if longest is not None and max(picture.size) > longest:
        if picture.mode not in _AVERAGED or "transparency" in picture.info:
            picture = _plain(picture)
        picture = picture.resize(_fit(picture.size, longest), Image.Resampling.LANCZOS)
    if turn is not None:
        picture = picture.transpose(turn)
    picture = _plain(picture)
    if profile:
        picture = _in_srgb(picture, profile)
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _plain(picture: Image.Image) -> Image.Image:
    """In mode L, RGB, RGBA or CMYK: nothing that a palette or a tag has to explain."""
    if picture.mode.startswith("I;16"):
        # The high byte, as Pillow itself takes it from 16-bit RGB: scaled, not clipped.
        return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    if picture.mode in ("L", "RGB", "CMYK"):
        return picture
    try:
        return picture.convert("L" if picture.mode == "1" else "RGB")
    except ValueError as error:
        raise PhotoError("unsupported", f"colours of mode {picture.mode}") from error


def _in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """The colours that ``profile`` says are meant; as they are where it says nothing usable."""
    colours = picture.convert("RGB") if picture.mode == "RGBA" else picture
    transform = _transform(profile, colours.mode)
    if transform is None:
        return picture
    done = cast(Image.Image, ImageCms.applyTransform(colours, transform))
    if picture.mode == "RGBA":
        done.putalpha(picture.getchannel("A"))
    return done


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None if that changes nothing, or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "RGB" and "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        # Read after loading: TIFF files are turned by Pillow itself, which then drops the tag.
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # metadata that cannot be read says nothing about the pixels
        return None


def _fit(size: tuple[int, int], longest: int) -> tuple[int, int]:
    scale = longest / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
