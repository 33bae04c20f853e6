from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.config import AugmentConfig
from sbir_ray.data import strokes as sk
from sbir_ray.errors import UserError

STILL = AugmentConfig(rotate=0.0, scale=0.0, shift=0.0, bend=0.0, stroke_dropout=0.0)

coordinates = st.floats(-1000, 1000, width=32)
points = st.tuples(coordinates, coordinates)
sketches = st.lists(
    st.lists(points, min_size=1, max_size=12).map(lambda p: np.array(p, dtype=np.float32)),
    min_size=1,
    max_size=6,
)


def stroke(*xy: tuple[float, float]) -> np.ndarray:
    return np.array(xy, dtype=np.float32)


def scribble(seed: int, strokes: int = 10, length: int = 10) -> sk.Strokes:
    rng = np.random.default_rng(seed)
    walk = rng.normal(0, 6, (strokes, length, 2)).cumsum(axis=1) + rng.uniform(40, 200, (1, 2))
    return sk.canonical([line.astype(np.float32) for line in walk])


def same(a: sk.Strokes, b: sk.Strokes, tolerance: float) -> bool:
    return [len(s) for s in a] == [len(s) for s in b] and all(
        np.abs(p - q).max() <= tolerance for p, q in zip(a, b, strict=True)
    )


def to_segment(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Slow and plain: the least distance to 2,001 points of the segment."""
    t = np.linspace(0, 1, 2001)[:, None]
    return np.hypot(*np.moveaxis(points[:, None] - (a + t * (b - a))[None], 2, 0)).min(axis=1)


# ------------------------------------------------------------------ canonical form


@given(sketches)
@settings(deadline=None, max_examples=60)
def test_canonical_is_centred_with_its_longest_side_at_190_and_idempotent(
    sketch: sk.Strokes,
) -> None:
    once = sk.canonical(sketch)
    low, high = np.concatenate(once).min(axis=0), np.concatenate(once).max(axis=0)
    np.testing.assert_allclose((low + high) / 2, 128, atol=1e-3)
    if np.ptp(np.concatenate(sketch), axis=0).max() > 0:
        assert (high - low).max() == pytest.approx(190, abs=1e-3)
    assert same(sk.canonical(once), once, 1e-3)


def test_canonical_keeps_the_aspect_where_scaling_each_axis_would_not() -> None:
    """Flaw 5: the released code scales x and y apart, to [30, 225] each."""
    sketch = [stroke((10, 10), (50, 10)), stroke((50, 20), (10, 20))]
    low, high = (
        np.concatenate(sk.canonical(sketch)).min(0),
        np.concatenate(sk.canonical(sketch)).max(0),
    )
    np.testing.assert_allclose(high - low, [190, 47.5], rtol=1e-6)


@pytest.mark.parametrize(
    "sketch",
    [
        [stroke((3, 7))],
        [stroke((3, 7), (3, 7))],
        [stroke((3, 7)), stroke((3, 7), (3, 7))],
        [stroke((0, 5), (10, 5), (4, 5))],
        [stroke((5, 0), (5, 10))],
        [stroke((0, 0), (1e-38, 0))],
        [stroke((-1e6, -1e6), (1e6, 1e6))],
    ],
    ids=["point", "dot", "dots", "horizontal", "vertical", "minute", "huge"],
)
@pytest.mark.filterwarnings("error")
def test_a_degenerate_sketch_has_a_finite_result_everywhere(sketch: sk.Strokes) -> None:
    """Flaw 5: the released code divides by zero where all points share an x or a y."""
    sketch = sk.canonical(sk.check(sketch, "test"))
    rng = np.random.default_rng(0)
    scale = sk.offset_scale([sketch])
    assert scale > 0
    for form in (
        sketch,
        sk.simplify(sketch, 3.0),
        sk.fit(sketch, 2, 3.0),
        sk.resample(sketch, 5.0),
        sk.mirror(sketch),
        sk.deform(sketch, rng, AugmentConfig()),
        sk.from_stroke3(sk.to_stroke3(sketch)),
        sk.from_stroke5(sk.to_stroke5(sketch, scale, 100), scale),
    ):
        assert form
        assert all(len(s) > 0 and np.isfinite(s).all() for s in form)
    if np.ptp(np.concatenate(sketch), axis=0).max() == 0:
        np.testing.assert_array_equal(np.concatenate(sketch), 128)


@pytest.mark.parametrize("empty", [[], [[]], [np.zeros((0, 2))]])
def test_a_sketch_without_points_is_refused_by_name(empty: sk.Strokes) -> None:
    with pytest.raises(UserError, match=r"^a\.svg: the sketch has no points"):
        sk.check(empty, "a.svg")
    with pytest.raises(UserError, match="no points"):
        sk.canonical([])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([[(0, math.nan)]], "within"),
        ([[(0, math.inf)]], "within"),
        ([[(0, 1e308)]], "within"),
        ([[(0, 1.1e6)]], "within"),
        ([[(0, 10**400)]], "not a list of"),
        ([[(0, None)]], "within"),
        ([[(0, {})]], "not a list of"),
        ([[(0, 1, 2)]], "shape"),
        ([[(0, 1), (2,)]], "not a list of"),
        ([7], "shape"),
        ([[(0, 1)]] * (sk.MAX_STROKES + 1), "strokes"),
        ([np.zeros((sk.MAX_POINTS, 2)), [(0, 0)]], "points"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_value_or_a_number_over_the_limit_is_refused_and_the_limit_named(
    bad: list[object], says: str
) -> None:
    with pytest.raises(UserError, match=rf"^here: .*{says}"):
        sk.check(bad, "here")


def test_check_leaves_out_strokes_without_points_and_gives_float32() -> None:
    checked = sk.check([[], [(1, 2), (3, 4)], np.zeros((0, 2))], "here")
    assert [s.dtype for s in checked] == [np.float32]
    np.testing.assert_array_equal(checked[0], [[1, 2], [3, 4]])


# ------------------------------------------------------------------ simplification


def test_rdp_keeps_the_corners_of_a_square_and_nothing_else() -> None:
    side = np.linspace(0, 100, 11)
    zero = np.zeros_like(side)
    square = np.concatenate(
        [
            np.stack([side, zero], 1),
            np.stack([zero + 100, side], 1),
            np.stack([side[::-1], zero + 100], 1),
            np.stack([zero, side[::-1]], 1),
        ]
    )
    corners = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]
    np.testing.assert_array_equal(sk.rdp(square, 1.0), corners)


@given(st.integers(0, 10_000), st.floats(0.1, 40))
@settings(deadline=None, max_examples=25)
def test_rdp_keeps_the_ends_and_every_point_within_epsilon(seed: int, epsilon: float) -> None:
    line = np.random.default_rng(seed).normal(0, 20, (30, 2)).cumsum(axis=0).astype(np.float32)
    thin = sk.rdp(line, epsilon)
    np.testing.assert_array_equal(thin[[0, -1]], line[[0, -1]])
    distance = np.min([to_segment(line, a, b) for a, b in pairwise(thin)], axis=0)
    assert distance.max() <= epsilon + 0.1


def test_rdp_keeps_a_stroke_that_runs_past_its_end_and_back() -> None:
    """The distance to the chord's line, not to the chord, would lose the far end."""
    line = stroke((0, 0), (50, 0), (10, 0))
    np.testing.assert_array_equal(sk.rdp(line, 3.0), line)


def test_rdp_takes_a_long_straight_stroke_without_recursion() -> None:
    line = np.stack([np.arange(20_000), np.arange(20_000)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(sk.rdp(line, 0.5), line[[0, -1]])


@pytest.mark.parametrize("max_points", [2, 20, 80])
def test_a_long_sketch_is_simplified_until_it_fits_and_not_dropped(max_points: int) -> None:
    """Flaw 11: the released code drops sketches over 80 points from training and test."""
    sketch = scribble(1, strokes=12, length=40)
    assert sk.count_points(sk.simplify(sketch, 3.0)) > max_points
    short = sk.fit(sketch, max_points, 3.0)
    assert 2 <= sk.count_points(short) <= max_points


def test_fit_raises_the_tolerance_no_more_than_needed() -> None:
    sketch = scribble(2, strokes=6, length=60)
    assert sk.count_points(sk.fit(sketch, 100, 0.5)) > 75


def test_fit_leaves_a_sketch_that_fits_at_the_given_tolerance() -> None:
    sketch = [stroke((0, 0), (1, 1)), stroke((50, 50), (200, 60), (80, 190))]
    assert same(sk.fit(sketch, 5, 3.0), sketch, 0)


def test_fit_gives_up_tiny_strokes_before_the_form_of_the_large_one() -> None:
    turns = np.linspace(0, 2 * math.pi, 40)
    circle = np.stack([128 + 95 * np.cos(turns), 128 + 95 * np.sin(turns)], 1).astype(np.float32)
    freckles = [stroke((100 + i, 128), (101 + i, 129)) for i in range(20)]
    short = sk.fit([circle, *freckles], 20, 3.0)
    assert len(short) == 1
    assert len(short[0]) >= 8


def test_resample_places_points_evenly_and_keeps_the_ends() -> None:
    line = stroke((0, 0), (30, 0), (30, 70))
    even = sk.resample([line], 10.0)[0]
    assert len(even) == 11
    np.testing.assert_array_equal(even[[0, -1]], line[[0, -1]])
    np.testing.assert_allclose(np.hypot(*np.diff(even, axis=0).T), 10, atol=1e-4)


# ------------------------------------------------------------------ sequences


@given(sketches, st.floats(0.5, 50))
@settings(deadline=None, max_examples=60)
def test_stroke5_and_stroke3_give_every_point_back(sketch: sk.Strokes, scale: float) -> None:
    sketch = sk.canonical(sketch)
    rows = sk.to_stroke5(sketch, scale, 1000)
    assert same(sk.from_stroke5(rows, scale), sketch, 2e-3)
    assert same(sk.from_stroke3(sk.to_stroke3(sketch)), sketch, 2e-3)


def test_the_first_and_the_last_real_point_are_kept_in_stroke5() -> None:
    """Flaw 3: the released code drops the first point and labels the last one as the end."""
    sketch = [stroke((33, 40), (60, 70)), stroke((90, 95), (223, 100))]
    rows = sk.to_stroke5(sketch, 2.0, 4)
    expected = [
        [-47.5, -44.0, 1, 0, 0],
        [13.5, 15.0, 0, 1, 0],
        [15.0, 12.5, 1, 0, 0],
        [66.5, 2.5, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(rows, expected)
    assert rows.dtype == np.float32


def test_from_stroke5_stops_at_the_first_end_and_needs_none() -> None:
    rows = sk.to_stroke5([stroke((128, 128), (130, 128))], 1.0, 10)
    padded = np.concatenate([rows, [[9, 9, 1, 0, 0]], np.tile(rows[-1:], (5, 1))])
    assert same(sk.from_stroke5(padded, 1.0), [stroke((128, 128), (130, 128))], 0)
    assert same(sk.from_stroke5(rows[:-1], 1.0), [stroke((128, 128), (130, 128))], 0)
    assert sk.from_stroke5(rows[-1:], 1.0) == []
    never_lifted = np.array([[1, 0, 1, 0, 0], [1, 0, 1, 0, 0]])
    assert same(sk.from_stroke5(never_lifted, 1.0), [stroke((129, 128), (130, 128))], 0)


def test_a_sketch_longer_than_max_points_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="fit"):
        sk.to_stroke5([stroke((0, 0), (1, 1), (2, 2))], 1.0, 2)


def test_offset_scale_is_the_standard_deviation_of_all_offsets_of_the_rows() -> None:
    sketches = [scribble(seed) for seed in range(3)]
    rows = [sk.to_stroke5(s, 1.0, 1000)[:-1, :2] for s in sketches]
    expected = float(np.concatenate(rows).astype(np.float64).std())
    assert sk.offset_scale(iter(sketches)) == pytest.approx(expected, rel=1e-5)
    assert sk.offset_scale([[stroke((128, 128))]]) == 1.0
    with pytest.raises(UserError, match="no training sketches"):
        sk.offset_scale([])


def test_flatten_and_unflatten_are_inverse_bit_for_bit() -> None:
    sketch = scribble(3)
    rows = sk.flatten(sketch)
    assert rows[0][:4] == [*sketch[0][0].tolist(), *sketch[0][1].tolist()]
    assert same(sk.unflatten(rows), sketch, 0)


# ------------------------------------------------------------------ deformation


def test_deform_without_any_change_gives_the_sketch_back_exactly() -> None:
    sketch = scribble(4)
    assert same(sk.deform(sketch, np.random.default_rng(0), STILL), sketch, 0)


def test_deform_depends_on_the_generator_alone_and_leaves_its_input() -> None:
    sketch = scribble(5)
    before = [s.copy() for s in sketch]
    config = AugmentConfig(bend=4.0)
    first = sk.deform(sketch, np.random.default_rng(1), config)
    assert same(first, sk.deform(sketch, np.random.default_rng(1), config), 0)
    assert not same(first, sk.deform(sketch, np.random.default_rng(2), config), 1)
    assert same(sketch, before, 0)


def test_stroke_dropout_never_leaves_out_all_strokes() -> None:
    config = AugmentConfig(stroke_dropout=0.95)
    counts = [
        len(sk.deform(scribble(6, strokes=3), np.random.default_rng(seed), config))
        for seed in range(40)
    ]
    assert min(counts) == 1
    assert max(counts) < 3


def test_rotation_turns_about_the_centre_and_keeps_lengths() -> None:
    sketch = [stroke((128, 128), (228, 128))]
    config = AugmentConfig(rotate=90.0, scale=0.0, shift=0.0, bend=0.0, stroke_dropout=0.0)
    turned = [sk.deform(sketch, np.random.default_rng(seed), config)[0] for seed in range(20)]
    np.testing.assert_array_equal([t[0] for t in turned], 128)
    arms = np.array([t[1] - t[0] for t in turned])
    np.testing.assert_allclose(np.hypot(*arms.T), 100, rtol=1e-5)
    assert np.ptp(np.arctan2(arms[:, 1], arms[:, 0])) > 1


def test_scale_and_shift_stay_within_their_bounds_per_axis() -> None:
    square = [stroke((28, 28), (228, 28), (228, 228), (28, 228))]
    config = AugmentConfig(rotate=0.0, scale=0.1, shift=4.0, bend=0.0, stroke_dropout=0.0)
    boxes = []
    for seed in range(60):
        line = sk.deform(square, np.random.default_rng(seed), config)[0]
        boxes.append([*np.ptp(line, axis=0), *line.mean(axis=0)])
    sides, middles = np.array(boxes)[:, :2], np.array(boxes)[:, 2:]
    assert 180 - 1e-3 <= sides.min() < 184
    assert 216 < sides.max() <= 220 + 1e-3
    assert np.abs(sides[:, 0] - sides[:, 1]).max() > 10
    assert 3.5 < np.abs(middles - 128).max() <= 4 + 1e-3


def test_bend_is_smooth_and_has_the_standard_deviation_asked_for() -> None:
    line = np.stack([np.linspace(33, 223, 191), np.full(191, 128.0)], axis=1).astype(np.float32)
    config = AugmentConfig(rotate=0.0, scale=0.0, shift=0.0, bend=3.0, stroke_dropout=0.0)
    moves = np.stack(
        [sk.deform([line], np.random.default_rng(seed), config)[0] - line for seed in range(300)]
    )
    assert moves.std() == pytest.approx(3.0, rel=0.1)
    assert np.abs(np.diff(moves, axis=1)).max() < 1.0  # neighbours, a canvas unit apart
    assert np.ptp(moves, axis=1).mean() > 2.0


def test_mirror_flips_about_the_middle_and_twice_is_nothing() -> None:
    assert same(sk.mirror([stroke((0, 5), (100, 7))]), [stroke((256, 5), (156, 7))], 0)
    assert same(sk.mirror(sk.mirror(scribble(7))), scribble(7), 1e-4)
