"""Files as they turn up in large collections of photos, each with the state it has to end in.

Every good picture is another scene, so that none is taken for a duplicate unless it is meant to be.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SIDES = (96, 64)
"""Width and height of the scenes."""
CRASH = b"this file ends its decoder"
CONFUSE = b"this file confuses its decoder"
TOO_LARGE = 1 << 20
"""Bytes of the file that is too large for the limit that the test sets, and one more."""


@dataclass(frozen=True)
class Kind:
    """One file. ``scene`` is what its stored picture has to show, up to ``error`` levels on
    average; ``twins`` names the files of which exactly one is stored and the rest are duplicates.
    """

    name: str
    status: str
    reason: str = ""
    data: bytes | None = None
    make: Callable[[Path], None] | None = None
    scene: np.ndarray | None = None
    error: float = 4.0
    twins: str = ""

    def write(self, folder: Path) -> None:
        """Make the file."""
        path = folder / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.make is not None:
            self.make(path)
        else:
            assert self.data is not None
            path.write_bytes(self.data)


def scene(number: int, sides: tuple[int, int] = SIDES) -> np.ndarray:
    """(H, W, 3) soft patches of colour, far from those of any other number."""
    patches = np.random.default_rng(number).integers(20, 236, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(patches).resize(sides, Image.Resampling.BICUBIC))


def encoded(picture: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG file up to its pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)


def kinds() -> list[Kind]:
    """All files but those that need a labelled photo."""
    return [*_good(), *_turned(), *_odd_names(), *_copies(), *_damaged(), *_bombs(), *_no_files()]


# --------------------------------------------------------------------------- good ones


def _good() -> Iterator[Kind]:
    number = iter(range(1000, 2000))

    def good(name: str, data: bytes, rgb: np.ndarray, error: float = 4.0) -> Kind:
        return Kind(f"good/{name}", "stored", data=data, scene=rgb, error=error)

    def plain(name: str, kind: str, error: float = 4.0, mode: str = "RGB", **options: Any) -> Kind:
        picture = Image.fromarray(scene(next(number))).convert(mode)
        return good(
            name, encoded(picture, kind, **options), np.asarray(picture.convert("RGB")), error
        )

    yield plain("plain.jpg", "JPEG")
    yield plain("grey.jpg", "JPEG", mode="L")
    yield plain("cmyk.jpg", "JPEG", mode="CMYK")
    yield plain("progressive.jpg", "JPEG", progressive=True)
    yield plain("upper.JPG", "JPEG")
    yield plain("four-two-zero.jpeg", "JPEG", subsampling=2)
    yield plain("plain.png", "PNG")
    yield plain("grey.png", "PNG", mode="L")
    yield plain("palette.png", "PNG", mode="P")
    yield plain("one-bit.png", "PNG", mode="1", error=8.0)
    yield plain("plain.gif", "GIF", mode="P")
    yield plain("plain.webp", "WEBP", quality=90)
    yield plain("lossless.webp", "WEBP", lossless=True)
    yield plain("plain.bmp", "BMP")
    yield plain("plain.tif", "TIFF")
    yield plain("packed.tiff", "TIFF", compression="tiff_lzw")
    yield plain("jpeg-inside.tiff", "TIFF", compression="jpeg")
    yield plain("cmyk.tiff", "TIFF", mode="CMYK")
    yield plain("plain.avif", "AVIF", quality=90)
    yield plain("png-inside.jpg", "PNG")
    yield plain("webp-inside.png", "WEBP")
    yield plain("jpeg-inside.gif", "JPEG")
    yield plain("broken-metadata.png", "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    yield plain("broken-profile.jpg", "JPEG", icc_profile=b"no profile at all")

    rgb = scene(next(number))
    yield good("tail.jpg", encoded(rgb, "JPEG", quality=95) + b"\0" * 500, rgb)
    rgb = scene(next(number))
    swapped = encoded(rgb[..., ::-1], "JPEG", quality=95, subsampling=0, icc_profile=_swapped())
    yield good("colour-profile.jpg", swapped, rgb)
    rgb = scene(next(number))
    picture = Image.fromarray(rgb[..., ::-1]).convert("RGBA")
    yield good("profile-and-alpha.png", encoded(picture, "PNG", icc_profile=_swapped()), rgb)

    rgb = scene(next(number))
    for name, mode in (("alpha.png", "RGBA"), ("alpha.webp", "RGBA"), ("grey-alpha.png", "LA")):
        rgb = scene(next(number))
        if mode == "LA":
            rgb = np.repeat(rgb[..., :1], 3, axis=2)
        clear = Image.fromarray(rgb).convert(mode)
        clear.putalpha(_half_clear())
        kind = "WEBP" if name.endswith("webp") else "PNG"
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        yield good(name, encoded(clear, kind, **options), _on_white(rgb))
    rgb = scene(next(number))
    palette = Image.fromarray(rgb).quantize(255)
    indices = np.asarray(palette).copy()
    indices[:, : SIDES[0] // 2] = 255
    clear = Image.fromarray(indices, "L")
    clear = Image.frombytes("P", clear.size, clear.tobytes())
    clear.putpalette([*(palette.getpalette() or [])[: 255 * 3], 0, 0, 0])
    yield good("clear-palette.png", encoded(clear, "PNG", transparency=255), _on_white(rgb))
    clear = clear.copy()
    yield good(
        "clear.gif", encoded(_mirrored(clear), "GIF", transparency=255), _on_white(rgb)[:, ::-1]
    )

    grey = scene(next(number))[..., 0]
    deep = grey.astype(np.uint16) * 257
    yield good("grey-16-bit.png", encoded(deep, "PNG"), np.repeat(grey[..., None], 3, 2))
    grey = scene(next(number))[..., 0]
    deep = grey.astype(np.uint16) * 257
    yield good("grey-16-bit.tiff", encoded(deep, "TIFF"), np.repeat(grey[..., None], 3, 2))
    rgb = scene(next(number))
    yield good("colour-16-bit.png", _png_16(rgb), rgb)
    grey = scene(next(number), (1400, 933))[..., 0]
    small = np.asarray(Image.fromarray(grey).resize(SIDES, Image.Resampling.BOX))
    deep = grey.astype(np.uint16) * 257
    yield good("large-16-bit.png", encoded(deep, "PNG"), np.repeat(small[..., None], 3, 2))
    rgb = scene(next(number), (2400, 1600))
    small = np.asarray(Image.fromarray(rgb).resize(SIDES, Image.Resampling.BOX))
    yield good("large.jpg", encoded(rgb, "JPEG", quality=90), small)

    for name, kind in (
        ("animated.gif", "GIF"),
        ("animated.webp", "WEBP"),
        ("animated.png", "PNG"),
        ("pages.tiff", "TIFF"),
    ):
        rgb = scene(next(number))
        others = [Image.fromarray(scene(next(number))) for _ in range(2)]
        data = encoded(rgb, kind, save_all=True, append_images=others)
        yield good(name, data, rgb, 5.0)
    rgb = scene(next(number), (900, 12))
    yield Kind("good/wide.png", "stored", data=encoded(rgb, "PNG"))
    yield Kind("good/one-pixel.png", "stored", data=encoded(rgb[:1, :1], "PNG"))


def _turned() -> Iterator[Kind]:
    """One scene in the eight orientations that a camera may note."""
    rgb = scene(1)
    ways = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for turn, way in ways.items():
        picture = Image.fromarray(rgb)
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(
            picture if way is None else picture.transpose(way),
            "JPEG",
            quality=95,
            subsampling=0,
            exif=exif,
        )
        yield Kind(f"turned/{turn}.jpg", "stored", data=data, scene=rgb, twins="turned")


def _odd_names() -> Iterator[Kind]:
    names = [
        "стул.png",
        "椅子.png",
        "كرسي.png",
        "\U0001fa91.png",
        "a b%20#1?&.png",
        'it\'s "one".png',
        "two\nlines.png",
        "..png",
        "x" * 251 + ".png",
        os.fsdecode(b"no text \xff\xfe.png"),
    ]
    for number, name in enumerate(names, 3000):
        rgb = scene(number)
        yield Kind(f"names/{name}", "stored", data=encoded(rgb, "PNG"), scene=rgb)
    rgb = scene(3100)
    yield Kind("names/ein/sehr/tiefer/ort/i.png", "stored", data=encoded(rgb, "PNG"), scene=rgb)


def _copies() -> Iterator[Kind]:
    rgb = scene(2, (384, 256))
    first = encoded(rgb, "PNG")
    picture = Image.fromarray(rgb)
    again = {
        "as it is.png": first,
        "same bytes.png": first,
        "saved again.jpg": encoded(rgb, "JPEG", quality=85),
        "resized.png": encoded(picture.resize((300, 200), Image.Resampling.LANCZOS), "PNG"),
        "larger.webp": encoded(picture.resize((500, 333), Image.Resampling.LANCZOS), "WEBP"),
    }
    for name, data in again.items():
        yield Kind(f"copies/{name}", "stored", data=data, scene=rgb, twins="copies")
    # Another photo as far as training goes: it asks for another sketch.
    mirrored = np.ascontiguousarray(rgb[:, ::-1])
    yield Kind("copies/mirrored.png", "stored", data=encoded(mirrored, "PNG"), scene=mirrored)


# --------------------------------------------------------------------------- bad ones


def _damaged() -> Iterator[Kind]:
    def bad(name: str, reason: str, data: bytes, status: str = "rejected") -> Kind:
        return Kind(f"bad/{name}", status, reason, data)

    rng = np.random.default_rng(7)
    noise = rng.integers(0, 255, (64, 64, 3), np.uint8)
    yield bad("empty.jpg", "empty", b"")
    for name, data in {
        "noise.jpg": rng.bytes(3000),
        "page.png": b"<!doctype html><html><title>404</title><body>not found</body></html>",
        "answer.jpg": b'{"error": "rate limit"}',
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><path d="M0 0L9 9"/></svg>',
        "paper.jpg": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj<<>>endobj",
        "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "film.gif": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(200),
        "phone.jpg": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
        "packed.png": b"PK\x03\x04" + bytes(100),
        "._fork.jpg": b"\0\x05\x16\x07\0\x02\0\0Mac OS X" + bytes(100),
        "zeros.jpg": bytes(4000),
        "signature.png": b"\x89PNG",
        "raw.tiff": rng.bytes(400),
    }.items():
        yield bad(name, "not-an-image", data)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"):
        data = encoded(noise, kind)
        # Of half an AVIF file nothing tells that it is one.
        reason = "not-an-image" if kind == "AVIF" else "damaged"
        yield bad(f"half.{kind.lower()}", reason, data[: len(data) // 2])
    data = encoded(noise, "JPEG", progressive=True)
    yield bad("half-progressive.jpg", "damaged", data[: len(data) // 2])
    yield bad("header-only.jpg", "damaged", encoded(noise, "JPEG")[:200])
    data = bytearray(encoded(scene(5), "PNG"))
    data[60] ^= 255
    yield bad("flipped-bit.png", "damaged", bytes(data))
    yield bad("no-pixels.png", "damaged", png_header(64, 64, 8, 2) + chunk(b"IEND", b""))
    yield bad("no-size.png", "not-an-image", png_header(0, 0, 8, 2) + chunk(b"IEND", b""))
    yield bad("floats.tiff", "unsupported", encoded(np.ones((8, 8), np.float32), "TIFF"))
    yield bad("integers.tiff", "unsupported", encoded(np.ones((8, 8), np.int32), "TIFF"))
    yield bad("crash.jpg", "", CRASH, "quarantined")
    yield bad("confusing.jpg", "error-ArithmeticError", CONFUSE, "failed")


def _bombs() -> Iterator[Kind]:
    def bomb(name: str, data: bytes, reason: str = "too-many-pixels") -> Kind:
        return Kind(f"bombs/{name}", "rejected", reason, data)

    squeezed = chunk(b"IDAT", zlib.compress(bytes(2**20), 9)) + chunk(b"IEND", b"")
    for side in (60_000, 9_700, 9_000):
        yield bomb(f"one-bit-{side}.png", png_header(side, side, 1, 0) + squeezed)
    yield bomb("clear.png", png_header(7_900, 7_900, 8, 6) + squeezed)
    yield bomb("deep.png", png_header(7_900, 7_900, 16, 6) + squeezed)
    gif = b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + b"\x80\0\0\0\0\0\xff\xff\xff"
    yield bomb("canvas.gif", gif + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;")
    for side in (60_000, 7_900):
        yield bomb(f"{side}.tiff", _tiff_of_size(side))
    yield bomb("progressive.jpg", _jpeg_of_size(7_900, progressive=True))
    yield bomb("huge.jpg", _jpeg_of_size(65_000))
    yield bomb("lossless.webp", _webp_of_size(16_383))
    yield bomb("nearly.webp", _webp_of_size(7_900))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24), 9))
    yield bomb("text.png", png_header(8, 8, 8, 2) + text + chunk(b"IEND", b""), "damaged")
    yield Kind("bombs/too-large.jpg", "rejected", "too-many-bytes", make=lambda path: _sparse(path))


def _no_files() -> Iterator[Kind]:
    def unreadable(name: str, make: Callable[[Path], None]) -> Kind:
        return Kind(f"none/{name}", "failed", "unreadable", make=make)

    yield unreadable("loop.jpg", lambda path: path.symlink_to(path.name))
    yield unreadable("gone.png", lambda path: path.symlink_to("nowhere.png"))
    yield unreadable("pipe.jpg", os.mkfifo)
    yield unreadable("link to a folder.jpg", lambda path: path.symlink_to(".."))
    rgb = scene(6)
    yield Kind("none/other place/linked.PNG", "stored", data=encoded(rgb, "PNG"), scene=rgb)


def not_photos(folder: Path) -> None:
    """What lies about among photos and is not counted at all."""
    (folder / "bad").mkdir(exist_ok=True)
    (folder / "bad" / "Thumbs.db").write_bytes(bytes(100))
    (folder / "bad" / "notes.md").write_text("no photo")
    (folder / "bad" / "hollow.jpg").mkdir()
    (folder / "bad" / "circle").symlink_to("..")


# --------------------------------------------------------------------------- pieces


def _half_clear() -> Image.Image:
    """(H, W) alpha: the left half is clear."""
    alpha = np.full(SIDES[::-1], 255, np.uint8)
    alpha[:, : SIDES[0] // 2] = 0
    return Image.fromarray(alpha)


def _on_white(rgb: np.ndarray) -> np.ndarray:
    out = rgb.copy()
    out[:, : SIDES[0] // 2] = 255
    return out


def _mirrored(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def _swapped() -> bytes:
    """A colour profile in which red is blue, so that one sees whether it was applied."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = profile.replace(b"s\0R\0G\0B", b"s\0B\0G\0R").replace(b"sRGB b", b"sBGR b")
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


def _png_16(rgb: np.ndarray) -> bytes:
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in rgb)
    pixels = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return png_header(rgb.shape[1], rgb.shape[0], 16, 2) + pixels


def _tiff_of_size(side: int) -> bytes:
    tiff = bytearray(encoded(scene(8), "TIFF"))
    entries = struct.unpack_from("<I", tiff, 4)[0] + 2
    for entry in (0, 1):  # the first tags, width and height, as 32-bit numbers
        tag = struct.unpack_from("<H", tiff, entries + 12 * entry)[0]
        struct.pack_into("<HHII", tiff, entries + 12 * entry, tag, 4, 1, side)
    return bytes(tiff)


def _jpeg_of_size(side: int, progressive: bool = False) -> bytes:
    data = bytearray(encoded(scene(9), "JPEG", progressive=progressive))
    frame = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    struct.pack_into(">HH", data, frame + 5, side, side)
    return bytes(data)


def _webp_of_size(side: int) -> bytes:
    """A file of a few kilobytes whose one colour fills side x side pixels."""
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, start)
    size = (side - 1) | (side - 1) << 14
    struct.pack_into("<I", data, start, bits & ~0x0FFF_FFFF | size)
    return bytes(data)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(TOO_LARGE + 1)
