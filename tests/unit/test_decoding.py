"""The whole corpus of odd and bad files, one by one: what each ends in, and what it costs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sbir_ray.data import decoding, photos
from sbir_ray.data.photos import PhotoError, PhotoLimits
from tests.faults.corpus import TOO_LARGE, Kind, encoded, kinds, scene

LIMITS = PhotoLimits(max_bytes=TOO_LARGE)
PEAK = """
import sys
from pathlib import Path
from sbir_ray.data import photos
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        photos.make_row(photos.read_bytes(path))
    except photos.PhotoError as error:
        print(path.name, error.reason)
# Not ru_maxrss, which begins at that of the process this one was forked from.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def is_shown(image: bytes, kind: Kind) -> bool:
    """Whether a stored picture shows the scene of its file."""
    assert kind.scene is not None
    height, width = kind.scene.shape[:2]
    stored = Image.fromarray(photos.decode_stored(image))
    small = np.asarray(stored.resize((width, height), Image.Resampling.BOX))
    return bool(np.abs(small.astype(int) - kind.scene).mean() <= kind.error)


def peak(folder: Path) -> tuple[list[str], int]:
    """What a process of its own says of the files, and the most memory it had, MiB."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)], check=True, capture_output=True, text=True
    )
    *lines, kib = run.stdout.splitlines()
    return lines, int(kib) // 1024


def test_every_file_of_the_corpus_ends_in_its_state(tmp_path: Path) -> None:
    corpus = kinds()
    assert len(corpus) >= 100
    for kind in corpus:
        if kind.data is not None and kind.status in ("quarantined", "failed"):
            continue  # these need a decoder that fails
        kind.write(tmp_path)
        image, fate = b"", ("stored", "")
        try:
            data = photos.read_bytes(tmp_path / kind.name, LIMITS)
            image = photos.make_row(data, limits=LIMITS)["image"]
        except PhotoError as error:
            status = "failed" if error.reason == "unreadable" else "rejected"
            fate = (status, error.reason)
        assert fate == (kind.status, kind.reason), kind.name
        assert not image or kind.scene is None or is_shown(image, kind), kind.name


def test_no_bomb_takes_300_mb(tmp_path: Path) -> None:
    bombs = [kind for kind in kinds() if kind.name.startswith("bombs/")]
    for kind in bombs:
        kind.write(tmp_path)
    lines, mebibytes = peak(tmp_path / "bombs")
    # The one that is too large for the test's limit alone is taken for a picture here.
    assert len(lines) == len(bombs)
    assert mebibytes < 150


@pytest.mark.parametrize(
    ("mode", "kind", "side", "options"),
    [
        ("RGB", "PNG", 6_800, {"compress_level": 1}),
        ("RGBA", "PNG", 4_900, {"compress_level": 1}),
        ("RGB", "WEBP", 3_500, {}),
        ("RGB", "JPEG", 5_600, {"progressive": True}),
    ],
)
def test_the_largest_that_is_decoded_takes_less_than_300_mb(
    tmp_path: Path, mode: str, kind: str, side: int, options: dict[str, bool]
) -> None:
    (tmp_path / "large").write_bytes(encoded(Image.new(mode, (side, side)), kind, **options))
    lines, mebibytes = peak(tmp_path)
    assert lines == []
    assert mebibytes < 300


def test_the_limit_of_memory_is_that_of_the_settings() -> None:
    data = encoded(scene(1, (1000, 1000)), "PNG")
    assert photos.decode(data, longest=100).shape == (100, 100, 3)
    with pytest.raises(PhotoError, match="too-many-pixels: 1000 x 1000 of this kind take 3 MiB"):
        photos.decode(data, PhotoLimits(max_memory=2 * 2**20), longest=100)
    with pytest.raises(PhotoError, match="too-many-pixels: 20 x 1 is more than the limit of 19"):
        photos.decode(encoded(scene(3, (20, 1)), "PNG"), PhotoLimits(max_pixels=19))


@pytest.mark.parametrize("longest", [200, 256, 300, 500])
def test_a_jpeg_file_read_at_a_lower_resolution_is_hardly_another_picture(longest: int) -> None:
    grain = np.random.default_rng(0).integers(0, 60, (120, 160, 1)).repeat(5, 0).repeat(5, 1)
    rgb = np.clip(scene(1, (800, 600)).astype(int) + grain, 0, 255).astype(np.uint8)
    data = encoded(rgb, "JPEG", quality=92)
    found = photos.decode(data, longest=longest)
    size = (longest, round(longest * 3 / 4))
    whole = Image.open(io.BytesIO(data)).resize(size, Image.Resampling.LANCZOS)
    assert found.shape == (size[1], size[0], 3)
    error = found.astype(float) - np.asarray(whole, float)
    assert (error**2).mean() < 255**2 / 10**3.5  # 35 dB


def test_photos_are_stored_as_webp_of_a_quality_where_that_is_asked_for() -> None:
    data = encoded(scene(3, (300, 200)), "PNG")
    sizes = []
    for quality in (30, 90):
        limits = PhotoLimits(form="webp", quality=quality, longest=150)
        row = photos.make_row(data, limits=limits)
        assert row["image"][8:12] == b"WEBP"
        assert photos.decode_stored(row["image"]).shape == (100, 150, 3)
        sizes.append(len(row["image"]))
    assert sizes[0] < sizes[1]
    picture = Image.fromarray(scene(3))
    jpegs = [len(decoding.encode(picture, PhotoLimits(quality=q))) for q in (30, 90)]
    assert jpegs[0] < jpegs[1]
