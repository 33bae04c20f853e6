from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.spatial import cKDTree

from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import LONGEST, Strokes, canonical, count_points, resample
from sbir_ray.data.trace import MAX_POINTS, edge_map, trace_drawing, trace_photo

NEAR = 1.0
"""Largest symmetric mean distance of traced strokes from the true ones, canvas units."""


def stroke(*points: tuple[float, float]) -> NDArray[np.float32]:
    return np.array(points, dtype=np.float32)


def circle(x: float, y: float, radius: float) -> NDArray[np.float32]:
    turn = np.linspace(0, 2 * np.pi, 60)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1).astype(np.float32)


CHAIR = canonical(
    [
        stroke((80, 40), (84, 120), (170, 124), (176, 42), (80, 40)),
        stroke((84, 120), (60, 160), (180, 170), (170, 124)),
        stroke((62, 160), (60, 228)),
        stroke((178, 170), (180, 232)),
        stroke((100, 164), (102, 210), (140, 212), (142, 168)),
        circle(128, 80, 22),
    ]
)


def distances(one: Strokes, two: Strokes) -> tuple[float, float]:
    """Symmetric mean distance, and the largest distance, canvas units."""
    first, second = (np.concatenate(resample(s, 1.0)) for s in (one, two))
    there = np.asarray(cKDTree(second).query(first)[0])
    back = np.asarray(cKDTree(first).query(second)[0])
    return float(there.mean() + back.mean()) / 2, float(max(there.max(), back.max()))


def ink(strokes: Strokes, size: int = 256, width: float = 2.5) -> NDArray[np.uint8]:
    raster: NDArray[np.uint8] = rasterise([strokes], size, width)[0]
    return raster


@pytest.mark.parametrize(("size", "width"), [(256, 2.5), (400, 2.5), (1100, 2.0), (200, 6.0)])
def test_traced_strokes_lie_on_the_drawn_ones(size: int, width: float) -> None:
    traced = trace_drawing(255 - ink(CHAIR, size, width))
    mean, largest = distances(CHAIR, traced)
    assert mean < NEAR
    assert largest < width + 3
    assert 4 <= len(traced) <= len(CHAIR) + 2
    assert count_points(traced) < 100


def test_light_ink_on_dark_paper_gives_the_same_strokes() -> None:
    mean, _ = distances(trace_drawing(ink(CHAIR)), trace_drawing(255 - ink(CHAIR)))
    assert mean < 0.2


def crossing(angle: float, turn: float) -> Strokes:
    lines = []
    for direction in np.radians([turn, turn + angle]):
        reach = 100 * np.array([np.cos(direction), np.sin(direction)])
        lines.append(np.array([128 - reach, 128 + reach], dtype=np.float32))
    return lines


@given(angle=st.floats(60, 90), turn=st.floats(0, 180))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_lines_go_straight_on_at_a_crossing(angle: float, turn: float) -> None:
    traced = trace_drawing(255 - ink(crossing(angle, turn)))
    assert len(traced) == 2
    for line in traced:
        chord = np.hypot(*(line[-1] - line[0]))
        length = np.hypot(*np.diff(line, axis=0).T).sum()
        assert length < 1.02 * chord


def test_most_lines_go_straight_on_at_a_crossing_of_a_small_angle() -> None:
    traced = [
        len(trace_drawing(255 - ink(crossing(angle, turn))))
        for angle in (25, 35, 45, 55)
        for turn in range(0, 180, 10)
    ]
    assert np.mean(np.array(traced) == 2) > 0.85


def test_the_rungs_of_a_ladder_stay() -> None:
    rails = [stroke((x, 40), (x, 220)) for x in (120, 130)]
    rungs = [stroke((120, y), (130, y)) for y in (70, 110, 150, 190)]
    traced = trace_drawing(255 - ink([*rails, *rungs]))
    assert len(traced) == 6
    assert distances(canonical([*rails, *rungs]), traced)[1] < 4


def test_a_circle_is_one_closed_stroke() -> None:
    (traced,) = trace_drawing(255 - ink([circle(128, 128, 80)]))
    assert (traced[0] == traced[-1]).all()
    np.testing.assert_allclose(np.hypot(*(traced - 128).T), LONGEST / 2, atol=1.5)


def test_a_small_gap_is_closed_and_a_large_one_stays() -> None:
    small = [stroke((30, 100), (120, 110)), stroke((125, 110.5), (220, 120))]
    large = [stroke((30, 100), (100, 107)), stroke((140, 112), (220, 120))]
    assert [len(trace_drawing(255 - ink(s))) for s in (small, large)] == [1, 2]


def test_specks_are_left_out() -> None:
    image = 255 - ink(CHAIR)
    image[10, 10] = image[240:242, 30:32] = image[20, 200:203] = 0
    assert distances(CHAIR, trace_drawing(image))[1] < 5


@pytest.mark.parametrize("value", [0, 128, 255])
def test_there_is_nothing_to_draw_of_a_blank_image(value: int) -> None:
    assert trace_drawing(np.full((80, 60), value, np.uint8)) == []
    photo = np.full((80, 60, 3), value, np.uint8)
    assert trace_photo(photo) == []
    assert not edge_map(photo).any()


def table(paper: tuple[int, int, int], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """A photo of a table top on two legs, and its outline in the same place."""
    image = Image.new("RGB", (240, 200), paper)
    draw = ImageDraw.Draw(image)
    for box in ((20, 40, 219, 79), (40, 79, 63, 179), (180, 79, 203, 179)):
        draw.rectangle(box, fill=colour)
    return np.asarray(image)


OUTLINE = canonical(
    [
        stroke(
            *[(20, 40), (220, 40), (220, 80), (204, 80), (204, 180), (180, 180), (180, 80)],
            *[(64, 80), (64, 180), (40, 180), (40, 80), (20, 80), (20, 40)],
        )
    ]
)


@pytest.mark.parametrize(
    ("paper", "colour"),
    [
        ((255, 255, 255), (60, 40, 30)),
        ((255, 255, 255), (238, 240, 238)),  # white on white
        ((200, 50, 50), (54, 124, 50)),  # of the same brightness
        ((20, 20, 20), (200, 210, 190)),
    ],
)
def test_a_photo_is_drawn_as_its_outline(
    paper: tuple[int, int, int], colour: tuple[int, int, int]
) -> None:
    traced = trace_photo(table(paper, colour))
    mean, largest = distances(OUTLINE, traced)
    assert mean < NEAR
    assert largest < 5
    assert len(traced) == 1


def test_a_large_photo_is_drawn_like_a_small_one() -> None:
    small = table((255, 255, 255), (60, 40, 30))
    large = small.repeat(5, axis=0).repeat(5, axis=1)
    assert distances(trace_photo(small), trace_photo(large))[0] < NEAR


def test_edges_are_ink_on_the_outline_alone() -> None:
    edges = edge_map(table((255, 255, 255), (60, 40, 30)))
    assert set(np.unique(edges)) == {0, 255}
    assert edges.shape == (200, 240)
    assert edges[:35].sum() == edges[45:75, 30:210].sum() == 0
    assert distances(OUTLINE, trace_drawing(edges))[0] < NEAR


def test_faint_texture_gives_way_to_the_outline() -> None:
    rng = np.random.default_rng(0)
    photo = table((255, 255, 255), (60, 40, 30)).astype(int)
    noise = np.kron(rng.integers(-40, 41, (100, 120)), np.ones((2, 2), int))[..., None]
    noisy = np.where(photo < 200, photo + noise, photo).clip(0, 255).astype(np.uint8)
    assert (edge_map(noisy) > 0).sum() > (edge_map(photo.astype(np.uint8)) > 0).sum()
    assert distances(OUTLINE, trace_photo(noisy))[0] < 2 * NEAR


def test_long_strong_contours_come_first_and_the_points_are_limited() -> None:
    rng = np.random.default_rng(1)
    photo = table((255, 255, 255), (60, 40, 30)).copy()
    photo[45:75, 30:210] = rng.integers(0, 256, (30, 180, 3))
    full, short = trace_photo(photo), trace_photo(photo, max_points=20)
    assert count_points(short) <= 20 < count_points(full) <= MAX_POINTS
    assert distances(OUTLINE, [full[0]])[0] < 3 * NEAR


@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.floats(0.02, 0.98),
)
@settings(deadline=None, max_examples=40)
def test_any_image_gives_the_same_canonical_sketch_twice_or_none(
    seed: int, height: int, width: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    grey = np.where(rng.random((height, width)) < share, 255, 0).astype(np.uint8)
    rgb = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    for first, second in (
        (trace_drawing(grey), trace_drawing(grey.copy())),
        (trace_photo(rgb), trace_photo(rgb.copy())),
    ):
        assert len(first) == len(second)
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one, two)
        if first:
            points = np.concatenate(first)
            assert points.dtype == np.float32
            assert len(points) <= MAX_POINTS
            assert np.ptp(points, axis=0).max() == pytest.approx(LONGEST, abs=1e-3)
