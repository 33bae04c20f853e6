"""Photos: decoding hostile and odd files, the aligned frame, the hash, the row."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray.data import photos
from sbir_ray.data.photos import PhotoError, PhotoLimits
from sbir_ray.data.strokes import CANVAS, LONGEST


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def scene() -> np.ndarray:
    """(60, 80, 3): a red block with a blue corner on white; no two turns of it are equal."""
    rgb = np.full((60, 80, 3), 255, np.uint8)
    rgb[10:50, 20:70] = (200, 30, 60)
    rgb[10:20, 20:30] = (0, 90, 200)
    return rgb


def noise(side: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int, colour: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)


def reason_of(data: bytes, limits: PhotoLimits = photos.DEFAULT_LIMITS) -> str:
    with pytest.raises(PhotoError) as error:
        photos.decode(data, limits)
    assert error.value.reason in photos.REASONS
    return error.value.reason


# --------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP"])
def test_a_lossless_file_gives_its_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (photos.decode(encoded(Image.fromarray(scene()), kind, **options)) == scene()).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_all_orientations_of_a_scene_decode_to_the_same_pixels(kind: str, turn: int) -> None:
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[turn]
    stored = Image.fromarray(scene())
    stored = stored if turned is None else stored.transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = turn
    options: dict[str, Any] = {"exif": exif}
    if kind == "WEBP":
        options |= {"lossless": True}
    assert (photos.decode(encoded(stored, kind, **options)) == scene()).all()


def test_the_orientation_of_a_jpeg_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise().crop((0, 0, 64, 32)), "JPEG", exif=exif)
    assert photos.decode(data).shape == (64, 32, 3)


def test_unreadable_metadata_does_not_cost_the_photo() -> None:
    data = encoded(Image.fromarray(scene()), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (photos.decode(data) == scene()).all()


def test_16_bit_samples_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = (ramp >> 8).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        pixels = photos.decode(encoded(Image.fromarray(ramp), kind))
        assert (pixels == expected[..., None]).all()
    rows = b"".join(b"\0" + struct.pack(">3H", *(int(v),) * 3) for v in ramp.ravel())
    colour = png_header(1, 256, 16, 2) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (photos.decode(colour)[:, 0, 0] == expected.ravel()).all()


def test_transparency_is_laid_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert (photos.decode(encoded(half, "PNG")) == 127).all()
    assert (photos.decode(encoded(half.convert("LA"), "PNG")) == 127).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (photos.decode(encoded(palette, "PNG", transparency=1)) == 255).all()
    assert (photos.decode(encoded(palette, "PNG", transparency=0))[0, 0] == (0, 0, 255)).all()
    rgb = Image.new("RGB", (4, 4), (9, 9, 9))
    assert (photos.decode(encoded(rgb, "PNG", transparency=(9, 9, 9))) == 255).all()


def test_grey_one_bit_and_cmyk_pictures_become_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 60))
    for kind in ("JPEG", "TIFF"):
        cmyk = photos.decode(encoded(red.convert("CMYK"), kind)).astype(int)
        assert np.abs(cmyk - (200, 30, 60)).max() <= 2
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert (photos.decode(encoded(bits, "PNG")) == 255 * np.eye(8)[..., None]).all()
    assert photos.decode(encoded(red.convert("L"), "PNG")).shape == (16, 16, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    pixels = photos.decode(data).astype(int)
    assert np.abs(pixels - (255, 0, 0)).max() <= 8


def test_bytes_that_are_no_photo_have_each_their_reason() -> None:
    jpeg = encoded(noise(), "JPEG")
    flipped = bytearray(encoded(noise(), "PNG"))
    flipped[len(flipped) // 2] ^= 1
    assert reason_of(b"") == "empty"
    assert reason_of(b"<!doctype html><title>404</title>") == "not-an-image"
    assert reason_of(np.random.default_rng(1).bytes(2000)) == "not-an-image"
    # A format that Pillow would start another program for.
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not-an-image"
    assert reason_of(jpeg[: len(jpeg) // 2]) == "damaged"
    assert reason_of(bytes(flipped)) == "damaged"
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    assert reason_of(encoded(floats, "TIFF")) == "unsupported"
    assert reason_of(jpeg, PhotoLimits(max_bytes=1000)) == "too-many-bytes"
    assert reason_of(jpeg, PhotoLimits(max_pixels=39_999)) == "too-many-pixels"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG"])
def test_a_truncated_file_is_damaged(kind: str) -> None:
    data = encoded(noise(), kind)
    assert reason_of(data[: len(data) // 2]) == "damaged"


def bombs() -> list[bytes]:
    squeezed = chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")
    gif = b"GIF89a" + struct.pack("<HH", 65000, 65000) + b"\x80\0\0\0\0\0\xff\xff\xff"
    tiff = bytearray(encoded(Image.fromarray(scene()), "TIFF"))
    entries = struct.unpack_from("<I", tiff, 4)[0] + 2
    for entry in (0, 1):  # the first tags, width and height, as 32-bit numbers
        tag = struct.unpack_from("<H", tiff, entries + 12 * entry)[0]
        struct.pack_into("<HHII", tiff, entries + 12 * entry, tag, 4, 1, 60_000)
    return [
        *(png_header(side, side, 1, 0) + squeezed for side in (60_000, 9_700, 9_000)),
        gif + b",\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;",
        bytes(tiff),
    ]


def test_bombs_are_refused_from_the_header() -> None:
    assert [reason_of(bomb) for bomb in bombs()] == ["too-many-pixels"] * 5
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24)))
    assert reason_of(png_header(8, 8, 8, 2) + text + chunk(b"IEND", b"")) == "damaged"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_damage_ends_in_pixels_or_a_reason(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG"]))
    file = bytearray(encoded(Image.fromarray(scene()), kind))
    for place in data.draw(st.lists(st.integers(0, len(file) - 1), min_size=1, max_size=4)):
        file[place] = data.draw(st.integers(0, 255))
    reason, shape = "", (0, 0, 3)
    try:
        shape = photos.decode(bytes(file)).shape
    except PhotoError as error:
        reason = error.reason
    assert reason in ("", *photos.REASONS)
    assert shape[2:] == (3,)


def test_a_large_jpeg_is_shrunk_to_nearly_what_the_full_decode_gives() -> None:
    smooth = noise(8).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    small = photos.decode(data, longest=400)
    full = Image.fromarray(photos.decode(data)).resize((400, 300), Image.Resampling.LANCZOS)
    assert small.shape == (300, 400, 3)
    assert np.abs(small.astype(int) - np.asarray(full)).max() <= 6


@pytest.mark.parametrize("mode", ["1", "P", "L", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_can_be_shrunk(mode: str) -> None:
    grey = Image.new("L", (300, 100), 0)
    picture = (
        Image.fromarray(np.zeros((100, 300), np.uint16)) if mode == "I;16" else grey.convert(mode)
    )
    kind = "TIFF" if mode == "CMYK" else "PNG"
    pixels = photos.decode(encoded(picture, kind), longest=30)
    assert pixels.shape == (10, 30, 3)
    assert pixels.max() == 0


def test_files_that_cannot_be_read_are_unreadable(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    (tmp_path / "folder.jpg").mkdir()
    for name in ("loop.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(PhotoError) as error:
            photos.read_bytes(tmp_path / name)
        assert error.value.reason == "unreadable"


def test_the_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PhotoError("empty", "the file has no bytes")))
    assert (error.reason, str(error)) == ("empty", "empty: the file has no bytes")


# --------------------------------------------------------------------------- alignment


def box_of(rgb: np.ndarray) -> np.ndarray:
    """(x0, y0, x1, y1) of what is not white, pixels; a half-covered edge counts half."""
    cover = (255.0 - rgb.min(axis=2)) / 255
    columns, rows = cover.max(axis=0), cover.max(axis=1)
    x0, x1 = np.flatnonzero(columns > 0.5)[[0, -1]]
    y0, y1 = np.flatnonzero(rows > 0.5)[[0, -1]]
    return np.array([x0, y0, x1 + 1, y1 + 1])


def test_the_object_gets_exactly_the_box_of_a_canonical_sketch() -> None:
    rgb = np.full((300, 500, 3), 255, np.uint8)
    rgb[20:115, 33:223] = 0
    aligned = photos.align(rgb, 256)
    low, high = CANVAS / 2 - LONGEST / 2, CANVAS / 2 + LONGEST / 2
    # The short side is 95, from 80.5 to 175.5.
    x0, y0, x1, y1 = box_of(aligned)
    assert (x0, x1) == (low, high)
    assert (abs(y0 - 80.5), abs(y1 - 175.5)) == (0.5, 0.5)
    assert (aligned[128, 33:223] == 0).all()
    assert (aligned[128, :32] == 255).all()


@settings(deadline=None, max_examples=40)
@given(
    width=st.integers(20, 150),
    height=st.integers(20, 150),
    left=st.integers(1, 60),
    top=st.integers(1, 60),
    right=st.integers(1, 60),
    bottom=st.integers(1, 60),
    size=st.sampled_from([64, 128, 256]),
)
def test_the_box_is_centred_and_keeps_its_aspect_wherever_it_was(
    width: int, height: int, left: int, top: int, right: int, bottom: int, size: int
) -> None:
    rgb = np.full((top + height + bottom, left + width + right, 3), 255, np.uint8)
    rgb[top : top + height, left : left + width] = (10, 20, 30)
    x0, y0, x1, y1 = box_of(photos.align(rgb, size))
    longest = size * photos.CONTENT_SHARE
    assert abs(max(x1 - x0, y1 - y0) - longest) <= 1
    assert abs((x1 - x0) - longest * width / max(width, height)) <= 1.5
    assert abs((y1 - y0) - longest * height / max(width, height)) <= 1.5
    assert abs(x0 + x1 - size) <= 1
    assert abs(y0 + y1 - size) <= 1


def test_aligning_twice_changes_nothing_much() -> None:
    once = photos.align(scene(), 256)
    twice = photos.align(once, 256)
    assert np.abs(box_of(once) - box_of(twice)).max() <= 1
    assert np.abs(once.astype(int) - twice).mean() < 2


def test_a_border_of_many_colours_makes_the_whole_picture_the_object() -> None:
    rgb = np.asarray(noise(100)) // 2
    aligned = photos.align(rgb, 128)
    assert tuple(box_of(aligned)) == (16, 16, 112, 112)
    assert (aligned[:15] == 255).all()


def test_a_light_background_becomes_white() -> None:
    rgb = np.full((100, 100, 3), (230, 235, 240), np.uint8)
    rgb[30:70, 40:60] = 20
    rgb[50:60, 40:50] = (230, 235, 240)
    aligned = photos.align(rgb, 256)
    assert (aligned[:, :70] == 255).all()
    assert (aligned[140, 90] >= 250).all()


def test_an_empty_picture_and_one_pixel_align_to_something() -> None:
    for rgb in (np.full((40, 20, 3), 255, np.uint8), np.zeros((1, 1, 3), np.uint8)):
        assert photos.align(rgb, 64).shape == (64, 64, 3)


def test_compression_moves_the_box_by_less_than_two_hundredths() -> None:
    rgb = np.full((256, 256, 3), 255, np.uint8)
    rgb[61:203, 85:150] = (30, 60, 20)
    saved = photos.decode(encoded(Image.fromarray(rgb), "JPEG", quality=60))
    moved = np.abs(box_of(photos.align(rgb, 256)) - box_of(photos.align(saved, 256)))
    assert moved.max() <= 256 * 0.02


@pytest.mark.parametrize("inverted", [False, True])
def test_a_drawing_is_aligned_as_ink_whichever_way_round_it_is(inverted: bool) -> None:
    grey = np.full((200, 300), 250, np.uint8)
    grey[50:145, 60:250] = 10
    ink = photos.align_drawing(255 - grey if inverted else grey, 256)
    assert ink[128, 128] > 235
    assert ink[10, 10] == 0
    assert np.flatnonzero(ink[128] > 128)[[0, -1]].tolist() == [33, 222]


# --------------------------------------------------------------------------- rows and hashes


def test_a_row_has_the_schema_and_the_identity_of_the_file() -> None:
    data = encoded(Image.fromarray(scene()), "PNG")
    row = photos.make_row(data, name="chair", uri="file:chair.png")
    table = pa.Table.from_pylist([dict(row)], photos.PHOTO_SCHEMA)
    assert table.to_pylist() == [row]
    assert row["photo_id"] == photos.photo_id(data)
    assert (row["width"], row["height"], row["status"]) == (80, 60, "stored")
    stored = photos.decode_stored(row["image"]).astype(int)
    assert np.abs(stored - scene()).mean() < 2


def test_a_row_is_stored_at_most_so_long() -> None:
    row = photos.make_row(encoded(noise(300), "PNG"), limits=PhotoLimits(longest=64))
    assert photos.decode_stored(row["image"]).shape == (64, 64, 3)


def test_a_name_that_is_no_text_can_be_stored() -> None:
    row = photos.make_row(encoded(Image.fromarray(scene()), "PNG"), name="a\udcff")
    assert (
        pa.Table.from_pylist([dict(row)], photos.PHOTO_SCHEMA).to_pylist()[0]["name"] == "a\\udcff"
    )


def test_copies_have_near_hashes_and_other_pictures_far_ones() -> None:
    smooth = [
        np.asarray(
            Image.fromarray(
                np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
            ).resize((200, 200), Image.Resampling.BICUBIC)
        )
        for seed in range(6)
    ]
    hashes = [photos.phash(rgb) for rgb in smooth]
    for rgb, known in zip(smooth, hashes, strict=True):
        copy = Image.fromarray(rgb).resize((90, 90), Image.Resampling.LANCZOS)
        again = photos.phash(photos.decode(encoded(copy, "JPEG", quality=60)))
        assert photos.hash_distance(known, [again]).max() <= 4
    far = photos.hash_distance(np.array(hashes)[:, None], hashes)[~np.eye(6, dtype=bool)]
    assert far.min() >= 14


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None, max_examples=50)
def test_the_distance_of_hashes_counts_different_bits(a: int, b: int) -> None:
    assert photos.hash_distance(a, [b])[0] == ((a ^ b) & (2**64 - 1)).bit_count()
