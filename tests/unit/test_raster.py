from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbir_ray.data.raster import TOLERANCE, rasterise, rasterise_reference, soft_rasterise
from sbir_ray.data.strokes import Strokes


def sketch(rng: np.random.Generator, strokes: int, low: float, high: float) -> Strokes:
    return [
        rng.uniform(low, high, (rng.integers(1, 7), 2)).astype(np.float32) for _ in range(strokes)
    ]


def difference(batch: list[Strokes], size: int, **options: object) -> int:
    drawn = rasterise(batch, size, **options).astype(int)  # type: ignore[arg-type]
    expected = rasterise_reference(batch, size, **options)  # type: ignore[arg-type]
    return int(np.abs(drawn - expected).max(initial=0))


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([17, 64, 128]),
    width=st.sampled_from([0.5, 2.5, 9.0]),
)
@settings(deadline=None, max_examples=20)
def test_equals_the_reference_inside_and_across_the_border(
    seed: int, size: int, width: float
) -> None:
    rng = np.random.default_rng(seed)
    batch = [sketch(rng, 3, 40, 216), sketch(rng, 2, -300, 600), [], sketch(rng, 2, -20, 20)]
    assert difference(batch, size, width=width) <= TOLERANCE


@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(0, 20))
@settings(deadline=None, max_examples=15)
def test_partial_drawings_equal_the_reference_and_the_cut_sketch(seed: int, limit: int) -> None:
    rng = np.random.default_rng(seed)
    batch = [sketch(rng, 4, 10, 246) for _ in range(3)]
    assert difference(batch, 48, points=limit) <= TOLERANCE
    limits = [limit, 0, 10_000]
    partial = rasterise(batch, 48, points=limits)
    cut: Strokes = []
    for stroke in batch[0]:
        left = limit - sum(map(len, cut))
        cut += [stroke[:left]] if left > 0 else []
    np.testing.assert_array_equal(partial, rasterise([cut, [], batch[2]], 48))


def test_steps_of_small_integers_equal_the_reference() -> None:
    """Axis-parallel, diagonal, repeated and reversed segments, where ties are frequent."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.integers(-2, 3, (400, 2)) * 8, axis=0) % 256
    batch: list[Strokes] = [[s.astype(np.float32)] for s in np.split(walk, 40)]
    assert difference(batch, 64) <= TOLERANCE


@pytest.mark.parametrize("size", [64, 256])
def test_ink_reaches_all_four_borders_and_the_corners(size: int) -> None:
    frame = np.array([[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]], dtype=np.float32)
    drawn = rasterise([[frame]], size)[0]
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert edge.min() > 0
    assert difference([[frame]], size) <= TOLERANCE


def test_points_outside_the_canvas_are_cut_off_and_do_not_touch_the_neighbours() -> None:
    far = np.array([[128, 128], [1e6, -1e6]], dtype=np.float32)
    outside = np.array([[-50, -50], [-40, 300], [300, 301]], dtype=np.float32)
    dots = [np.array([[x, y]], dtype=np.float32) for x in (-9, 265) for y in (-9, 128, 265)]
    drawn = rasterise([[], [outside, *dots], [far], []], 64)
    assert [image.any() for image in drawn] == [False, False, True, False]
    assert drawn[2, :32, 32:].sum(dtype=int) >= drawn[2].sum(dtype=int) * 0.95


def test_a_stroke_of_one_point_is_a_dot() -> None:
    drawn = rasterise([[np.array([[64, 192]], dtype=np.float32)]], 128, width=8)[0]
    ys, xs = np.nonzero(drawn)
    assert (xs.mean() + 0.5, ys.mean() + 0.5) == (32, 96)
    assert np.ptp(xs) == np.ptp(ys) == 3
    assert drawn.sum() / 255 == pytest.approx(np.pi * 2**2, rel=0.1)


def test_a_line_is_as_dark_in_every_direction() -> None:
    angles = np.linspace(0, np.pi, 24, endpoint=False)
    ends = 80 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    batch: list[Strokes] = [[np.array([128 - e, 128 + e], dtype=np.float32)] for e in ends]
    ink = rasterise(batch, 64).sum(axis=(1, 2), dtype=int) / 255
    assert ink.max() / ink.min() < 1.15  # 1.41 for lines of pixels


def test_nothing_to_draw_gives_blank_rasters() -> None:
    assert rasterise([], 32).shape == (0, 32, 32)
    assert not rasterise([[], []], 32).any()
    assert not rasterise([[np.full((3, 2), 99, np.float32)]], 32, points=0).any()


@pytest.mark.parametrize("points", [-1, [3], [1, 2, 3], [1, -2]])
def test_points_that_do_not_fit_the_batch_are_refused(points: int | list[int]) -> None:
    with pytest.raises(ValueError, match="points"):
        rasterise([[], [np.zeros((2, 2), np.float32)]], 32, points=points)


def test_soft_raster_has_exact_gradients() -> None:
    torch.manual_seed(0)
    points = (torch.rand(2, 4, 2, dtype=torch.float64) * 256).requires_grad_()
    pen = (torch.rand(2, 4, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: soft_rasterise(p, q, 6, 60.0), (points, pen))


def test_soft_raster_agrees_with_the_raster_and_leaves_out_lifted_segments() -> None:
    strokes = [
        np.array([[40, 60], [200, 80], [120, 210]], dtype=np.float32),
        np.array([[60, 220], [60, 120]], dtype=np.float32),
    ]
    points = torch.from_numpy(np.concatenate(strokes))[None]
    pen = torch.tensor([[1.0, 1, 0, 1, 0]])
    soft = soft_rasterise(points, pen, 64, 4.0)[0].numpy()
    hard = rasterise([strokes], 64, width=8)[0]
    assert soft[hard == 255].min() > 0.8
    assert soft[rasterise([strokes], 64, width=32)[0] == 0].max() < 0.01
    assert not soft_rasterise(points, torch.zeros_like(pen), 64, 4.0).any()


def test_soft_raster_can_be_fitted_by_descent() -> None:
    target = soft_rasterise(
        torch.tensor([[[50.0, 60], [200, 190]]]), torch.ones(1, 2), 32, 12.0
    ).detach()
    points = torch.tensor([[[70.0, 50], [180, 210]]], requires_grad=True)
    optimiser = torch.optim.Adam([points], lr=3.0)
    for _ in range(60):
        optimiser.zero_grad()
        loss = (soft_rasterise(points, torch.ones(1, 2), 32, 12.0) - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    expected = torch.tensor([[[50.0, 60], [200, 190]]])
    assert (points.detach() - expected).abs().max() < 4
