"""Tickets: every photo once an epoch, in an order that the seed alone decides."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from sbir_ray.data import photos
from sbir_ray.errors import UserError
from sbir_ray.stream import live_photos
from sbir_ray.stream.live_photos import TicketPhotos
from tests.tiny import photo
from tests.tiny_store import tiny_store

COUNT = 37


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("photos") / "store", COUNT, damaged=[5])


def names(store, tickets, seed=0):
    return [found.photo_id for found in TicketPhotos(store, seed, ()).read(tickets)]


def test_every_epoch_has_every_photo_once_in_another_order(store):
    first, second = names(store, range(COUNT)), names(store, range(COUNT, 2 * COUNT))
    assert sorted(first) == sorted(second) == [f"photo{number:02d}" for number in range(COUNT)]
    assert first != second
    assert first != sorted(first)


def test_the_order_follows_from_the_seed_and_not_from_what_was_read_before(store):
    whole = names(store, range(3 * COUNT), seed=4)
    assert names(store, range(50, 90), seed=4) == whole[50:90]
    reader = TicketPhotos(store, 4, ())
    backwards = [reader.read([ticket])[0].photo_id for ticket in reversed(range(3 * COUNT))]
    assert backwards[::-1] == whole
    assert names(store, range(3 * COUNT), seed=5) != whole


def test_photos_come_aligned_at_each_side_and_a_damaged_one_says_so(store):
    for found in TicketPhotos(store, 1, (32, 64)).read(range(COUNT)):
        number = int(found.photo_id.removeprefix("photo"))
        if number == 5:
            assert found.photos == {}
            assert "Error" in found.fault
            continue
        rgb = photos.decode_stored(photos.encode_jpeg(photo(number)))
        assert found.fault == ""
        assert list(found.photos) == [32, 64]
        for side, pixels in found.photos.items():
            np.testing.assert_array_equal(pixels, photos.align(rgb, side).transpose(2, 0, 1))


def test_memory_holds_a_few_groups_and_each_is_read_once_an_epoch(store, monkeypatch):
    monkeypatch.setattr(live_photos, "GROUPS", 3)
    reads = []
    read = pq.ParquetFile.read_row_group

    def counted(file, group, **options):
        reads.append(group)
        return read(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    reader = TicketPhotos(store, 2, ())
    found = reader.read(range(COUNT))
    assert len({each.photo_id for each in found}) == COUNT
    assert len(reader._cache) == 3
    assert len(reads) == 4 + 4 + 2  # groups of four photos in files of 16, 16 and 5


def test_what_is_no_store_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a photo store"):
        TicketPhotos(tmp_path, 0, ())
    with pytest.raises(UserError, match="holds no photo"):
        TicketPhotos(tiny_store(tmp_path / "empty", 0), 0, ())
