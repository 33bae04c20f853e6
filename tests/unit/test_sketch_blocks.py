"""Blocks: whole batches across files, every photo once, and what is read of one."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from sbir_ray.data import photos
from sbir_ray.errors import UserError
from sbir_ray.stream.sketch_blocks import plan_blocks, read_photos
from tests.tiny import photo
from tests.tiny_store import tiny_store


@pytest.mark.parametrize("batch", [1, 4, 5, 32])
def test_blocks_are_whole_batches_and_cover_every_photo_once(tmp_path, batch):
    store = tiny_store(tmp_path / "store", 21, shard=6)
    blocks = plan_blocks(store, batch)
    assert all(block.rows % batch == 0 for block in blocks[:-1])
    assert [block.number for block in blocks] == list(range(len(blocks)))
    ids = [
        name
        for block in blocks
        for name in read_photos(block.to_table(), [16])["photo_id"].to_pylist()
    ]
    assert ids == [row["photo_id"] for row in photos.read_store(store)]
    runs = [run for block in blocks for run in block.runs]
    assert all(before[0] < after[0] or before[2] == after[1] for before, after in pairwise(runs))


def test_the_same_photos_in_other_files_are_drawn_in_the_same_blocks(tmp_path):
    few = tiny_store(tmp_path / "few", 20, shard=20)
    many = tiny_store(tmp_path / "many", 20, shard=3)
    sizes = [[block.rows for block in plan_blocks(store, 4)] for store in (few, many)]
    assert sizes[0] == sizes[1] == [4] * 5


def test_a_block_has_its_photos_aligned_and_named(tmp_path):
    store = tiny_store(tmp_path / "store", 9, damaged=[4], shard=4, group=3)
    found = read_photos(plan_blocks(store, 9)[0].to_table(), [16, 32]).to_pylist()
    assert [row["photo_id"] for row in found] == [f"photo{n:02d}" for n in range(9)]
    for n, row in enumerate(found):
        assert row["photo_sha256"] == hashlib.sha256(row["image"]).hexdigest()
        if n == 4:
            assert row["fault"].startswith("UnidentifiedImageError")
            assert row["aligned_16"] is None
            continue
        stored = photos.decode_stored(photos.encode_jpeg(photo(n)))
        for size in (16, 32):
            pixels = np.frombuffer(row[f"aligned_{size}"], np.uint8).reshape(size, size, 3)
            np.testing.assert_array_equal(pixels, photos.align(stored, size))


def test_a_store_without_a_photo_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no photo"):
        plan_blocks(tiny_store(tmp_path / "store", 0), 4)
