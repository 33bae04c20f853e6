"""Filters: each setting keeps what just meets it; ranks are as counted by hand."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sbir_ray.config import FilterConfig
from sbir_ray.data import photos
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import canonical
from sbir_ray.errors import UserError
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.stream import filters
from sbir_ray.stream.filters import (
    NOT_BEST,
    TeacherRanker,
    choose,
    filter_reason,
    reference_photos,
    refuse_rank_above_all,
    refuse_without_effect,
)
from sbir_ray.stream.sketchers import Drawn
from tests.tiny import photo, retrieval_config, sketch

LINE = canonical([np.array([[0, 0], [9, 9], [9, 0.0]], np.float32)] * 3)
DRAWN = Drawn(LINE, certainty=0.5, log_prob=-8.0, ended=False, rows=10, rank=7)
INKED = int((rasterise([LINE], 64) > 127).sum())
"""Of 4096 pixels."""


# --------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("setting", "meets", "fails"),
    [
        ("min_certainty", 0.5, 0.5001),
        ("min_log_prob", -0.8, -0.7999),
        ("require_end", False, True),
        ("min_points", 9, 10),
        ("max_points", 9, 8),
        ("min_strokes", 3, 4),
        ("max_strokes", 3, 2),
        ("min_ink", INKED / 4096, (INKED + 1) / 4096),
        ("max_ink", INKED / 4096, (INKED - 1) / 4096),
        ("max_rank", 7, 6),
    ],
)
def test_each_setting_keeps_what_just_meets_it(setting, meets, fails):
    assert filter_reason(DRAWN, FilterConfig(**{setting: meets})) == ""
    assert filter_reason(DRAWN, FilterConfig(**{setting: fails})) == setting


def test_a_drawing_is_left_out_by_the_first_setting_that_it_does_not_meet():
    names = [field.name for field in dataclasses.fields(FilterConfig)]
    failing = {
        "min_certainty": 0.9,
        "min_log_prob": -0.1,
        "require_end": True,
        "min_points": 10,
        "max_points": 8,
        "min_strokes": 4,
        "max_strokes": 2,
        "min_ink": 0.9,
        "max_ink": 0.0,
        "max_rank": 1,
    }
    assert list(failing) == names
    for start, name in enumerate(names):
        rest = {other: failing[other] for other in names[start:]}
        assert filter_reason(DRAWN, FilterConfig(**rest)) == name


def test_what_was_not_asked_for_or_does_not_exist_is_not_held_against_a_drawing():
    unasked = dataclasses.replace(DRAWN, rank=10**6)
    assert filter_reason(unasked, FilterConfig(max_rank=0)) == ""
    traced = Drawn(LINE)
    assert filter_reason(traced, FilterConfig(min_log_prob=1.0)) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"certainty": math.nan}, "min_certainty"),
        ({"log_prob": math.nan}, "min_log_prob"),
        ({"log_prob": -math.inf}, "min_log_prob"),
    ],
)
def test_what_is_not_a_number_is_never_kept(change, reason):
    assert filter_reason(dataclasses.replace(DRAWN, **change), FilterConfig()) == reason


# --------------------------------------------------------------------------- the best of several


def drawings(**changes):
    """One for each value."""
    (name, values), *rest = changes.items()
    assert not rest
    return [dataclasses.replace(DRAWN, **{name: value}) for value in values]


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [
        ("rank", (7, 2, 2, 9), 1),
        ("similarity", (0.1, -0.2, 0.3, math.nan), 2),
        ("certainty", (math.nan, 0.9, 0.5, 0.9), 1),
        ("log_prob", (-9.0, -8.0, -7.0, -8.0), 2),
        ("rows", (10, 20, 30, 5), 2),
        ("points", (0, 0, 0, 0), 0),
    ],
)
def test_the_best_drawing_is_kept_and_the_others_are_told(name, values, best):
    drawn = [DRAWN] * 4 if name == "points" else drawings(**{name: values})
    if name == "certainty":  # no number is no certainty: it does not pass the filters
        reasons = ["min_certainty", "", NOT_BEST, NOT_BEST]
    else:
        reasons = [NOT_BEST] * 4
        reasons[best] = ""
    assert choose(drawn, FilterConfig(), "best") == reasons
    expected = ["min_certainty", "", "", ""] if name == "certainty" else [""] * 4
    assert choose(drawn, FilterConfig(), "all") == expected


def test_rank_goes_before_similarity_and_that_before_certainty():
    by_rank = dataclasses.replace(DRAWN, rank=1, similarity=0.1, certainty=0.1)
    by_similarity = dataclasses.replace(DRAWN, rank=2, similarity=0.9, certainty=0.2)
    by_certainty = dataclasses.replace(DRAWN, rank=2, similarity=0.8, certainty=0.9)
    found = choose([by_certainty, by_similarity, by_rank], FilterConfig(), "best")
    assert found == [NOT_BEST, NOT_BEST, ""]
    assert choose([by_certainty, by_similarity], FilterConfig(), "best") == [NOT_BEST, ""]


def test_the_best_is_one_that_passes_the_filters():
    first, second = drawings(rank=(1, 2))
    short = dataclasses.replace(first, strokes=LINE[:1])
    settings = FilterConfig(min_points=1, min_strokes=2)
    assert choose([short, second], settings, "best") == ["min_strokes", ""]
    assert choose([short, short], settings, "best") == ["min_strokes"] * 2
    assert choose([], settings, "best") == []


# --------------------------------------------------------------------------- without effect

TRACER = {"name": "contours", "generative": False, "judged": False}
GENERATOR = {"name": "generator", "generative": True, "judged": True}


@pytest.mark.parametrize(
    ("settings", "sketcher", "message"),
    [
        ({"min_certainty": 0.5}, TRACER, r"min_certainty=0\.5: contours has no discrimin"),
        ({"min_log_prob": -2.0}, TRACER, "min_log_prob=-2: contours draws without chance"),
        ({"require_end": True}, TRACER, "require_end=true: contours always ends"),
        ({"max_rank": 20}, GENERATOR, "max_rank=20: ranks are a teacher's; give --teacher"),
    ],
)
def test_settings_without_effect_are_refused(settings, sketcher, message):
    with pytest.raises(UserError, match=message):
        refuse_without_effect(FilterConfig(**settings), **sketcher, ranked=False)


def test_ranks_go_one_beyond_the_reference_photos():
    refuse_rank_above_all(FilterConfig(max_rank=filters.REFERENCES), photos=10**6)
    refuse_rank_above_all(FilterConfig(max_rank=29), photos=30)
    for rank, photos_, last in ((30, 30, 30), (513, 10**6, 513)):
        with pytest.raises(UserError, match=f"max_rank={rank}: no rank is above {last} here"):
            refuse_rank_above_all(FilterConfig(max_rank=rank), photos=photos_)


def test_settings_with_an_effect_are_not_refused():
    whole = FilterConfig(min_certainty=0.5, min_log_prob=-2.0, require_end=True, max_rank=29)
    refuse_without_effect(whole, **GENERATOR, ranked=True)
    refuse_without_effect(FilterConfig(min_points=9, max_ink=0.5), **TRACER, ranked=False)


# --------------------------------------------------------------------------- the teacher


def aligned(*numbers):
    """(n, 3, 64, 64)"""
    rgb = [photos.align(photo(number), 64) for number in numbers]
    return np.stack(rgb).transpose(0, 3, 1, 2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RetrievalNet(retrieval_config().model).eval()


def counted_by_hand(model, reference_photos, photo_3SS, drawing):
    """The rank, one distance after the other."""

    def embed(network, picture):
        with torch.inference_mode():
            return network(torch.from_numpy(picture[None].copy()))[0].double().numpy()

    query = embed(model.embed_sketches, rasterise([drawing], 64)[0])

    def distance(picture):
        return np.linalg.norm(embed(model.embed_photos, picture) - query)

    others = [other for other in reference_photos if not np.array_equal(other, photo_3SS)]
    return 1 + sum(distance(other) <= distance(photo_3SS) for other in others)


def test_ranks_are_as_counted_by_hand_within_and_beyond_the_reference_photos(model):
    reference = aligned(*range(12))
    batch, drawings = aligned(3, 20, 7, 21), [sketch(n) for n in (3, 20, 7, 21)]
    found = TeacherRanker(model, reference).rank(batch, drawings)
    expected = [
        counted_by_hand(model, reference, picture, drawing)
        for picture, drawing in zip(batch, drawings, strict=True)
    ]
    assert found == expected
    assert len(set(found)) > 1


def test_the_photo_itself_does_not_count_however_often_it_is_there(model):
    once, twice = aligned(0, 1, 2, 3), aligned(0, 1, 2, 3, 2, 2)
    for number in range(4):
        picture, drawing = aligned(number), [sketch(number)]
        (rank,) = TeacherRanker(model, once).rank(picture, drawing)
        (again,) = TeacherRanker(model, twice).rank(picture, drawing)
        nearer = counted_by_hand(model, aligned(2), picture[0], drawing[0]) - 1
        assert again == rank + 2 * nearer
    assert TeacherRanker(model, aligned(5)).rank(aligned(5), [sketch(5)]) == [1]


def test_a_rank_does_not_depend_on_the_rest_of_its_batch(model):
    ranker = TeacherRanker(model, aligned(*range(12)))
    numbers = [3, 20, 7, 21, 5]
    together = ranker.rank(aligned(*numbers), [sketch(n) for n in numbers])
    assert together == [ranker.rank(aligned(n), [sketch(n)])[0] for n in numbers]


def test_drawings_of_one_photo_are_compared_with_it_each(model):
    ranker = TeacherRanker(model, aligned(*range(12)))
    drawn = [sketch(3), sketch(4), sketch(20), sketch(3, hand=1)]
    found = ranker.compare(aligned(3, 20), drawn)
    assert found == [
        ranker.compare(aligned(n), [one])[0] for n, one in zip((3, 3, 20, 20), drawn, strict=True)
    ]
    for n, one, (_, similarity) in zip((3, 3, 20, 20), drawn, found, strict=True):
        with torch.inference_mode():
            photo_D = model.embed_photos(torch.from_numpy(aligned(n).copy()))[0]
            sketch_D = model.embed_sketches(torch.from_numpy(rasterise([one], 64)))[0]
        assert similarity == pytest.approx(float(photo_D @ sketch_D), abs=1e-5)


def test_pixels_that_cannot_be_written_to_are_ranked_too(model):
    reference, picture = aligned(*range(4)), aligned(2)
    expected = TeacherRanker(model, reference).rank(picture, [sketch(2)])
    reference, picture = np.ascontiguousarray(reference), np.ascontiguousarray(picture)
    for pixels in (reference, picture):
        pixels.flags.writeable = False
    assert TeacherRanker(model, reference).rank(picture, [sketch(2)]) == expected


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_teacher_that_tells_no_photos_apart_ranks_each_last(model, monkeypatch, value):
    def same(pictures):
        return torch.full((len(pictures), 5), value)

    monkeypatch.setattr(model, "embed_photos", same)
    monkeypatch.setattr(model, "embed_sketches", same)
    ranker = TeacherRanker(model, aligned(*range(4)))
    assert ranker.rank(aligned(2, 9), [sketch(2), sketch(9)]) == [4, 5]


# --------------------------------------------------------------------------- reference photos


def store(folder, rows):
    """A photo store of two shards, with (photo_id, image) rows."""
    (folder / "shards").mkdir(parents=True)
    (folder / "store.json").write_text(json.dumps({"kind": "photos", "schema_version": 1}))
    for number in range(2):
        table = pa.Table.from_pylist(
            [
                {**photos.row_of_pixels(photo(0), identity), "image": image}
                for identity, image in rows[number::2]
            ],
            photos.PHOTO_SCHEMA,
        )
        pq.write_table(table, folder / "shards" / f"part-{number}.parquet")
    return folder


def jpeg(number):
    return photos.encode_jpeg(photo(number))


def test_the_reference_photos_are_the_first_by_id_as_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "REFERENCES", 3)
    folder = store(tmp_path / "s", [(f"{9 - n}", jpeg(n)) for n in range(5)])
    expected = [photos.align(photos.decode_stored(jpeg(n)), 48) for n in (4, 3, 2)]
    found = reference_photos(folder, 48)
    np.testing.assert_array_equal(found, np.stack(expected).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("damage", ["cut", "empty", "png"])
def test_damaged_photos_are_no_reference(tmp_path, damage):
    out = io.BytesIO()
    Image.fromarray(photo(1)).save(out, "PNG")
    png = bytearray(out.getvalue())
    png[60:90] = bytes(30)
    image = {"cut": jpeg(1)[:300], "empty": b"", "png": bytes(png)}[damage]
    folder = store(tmp_path / "s", [("a", jpeg(0)), ("b", image)])
    assert reference_photos(folder, 48).shape == (1, 3, 48, 48)
    only = store(tmp_path / "only", [("b", image)])
    assert reference_photos(only, 48).shape == (0, 3, 48, 48)


def test_without_a_reference_photo_every_photo_is_first(model):
    ranker = TeacherRanker(model, np.empty((0, 3, 64, 64), np.uint8))
    assert ranker.rank(aligned(1, 2), [sketch(1), sketch(2)]) == [1, 1]


def test_filters_do_without_torch_and_ray():
    code = (
        "import sys, sbir_ray.stream.filters as f; from sbir_ray.stream.sketchers import Drawn;"
        "f.filter_reason(Drawn([]), f.FilterConfig(min_ink=0.5));"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
