"""The losses of drawings and of D against slow loops, their gradients, and their corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sbir_ray import losses
from tests.numbers_by_hand import backward, gradcheck, normal

# --------------------------------------------------------------------------- drawings


def slow_mixture_nll(raw: Tensor, offset: Tensor) -> float:
    count = len(raw) // 6
    pi, mx, my, sx, sy, r = (raw[i * count : (i + 1) * count].tolist() for i in range(6))
    whole = sum(math.exp(x) for x in pi)
    floor = math.log(losses.SIGMA_FLOOR)
    density = 0.0
    for j in range(count):
        sigma_x = math.exp(floor + math.log1p(math.exp(sx[j] - floor)))
        sigma_y = math.exp(floor + math.log1p(math.exp(sy[j] - floor)))
        rho = losses.RHO_LIMIT * math.tanh(r[j])
        x, y = (float(offset[0]) - mx[j]) / sigma_x, (float(offset[1]) - my[j]) / sigma_y
        z = x * x + y * y - 2 * rho * x * y
        area = 2 * math.pi * sigma_x * sigma_y * math.sqrt(1 - rho * rho)
        density += math.exp(pi[j]) / whole * math.exp(-z / 2 / (1 - rho * rho)) / area
    return -math.log(density)


def test_mixture_nll_equals_the_loop() -> None:
    raw, offset = normal(3, 2, 24), normal(3, 2, 2, seed=1)
    value = losses.mixture_nll(losses.mixture(raw), offset)
    for i in range(3):
        for t in range(2):
            assert float(value[i, t]) == pytest.approx(slow_mixture_nll(raw[i, t], offset[i, t]))


def test_mixture_nll_of_the_standard_normal_is_log_two_pi() -> None:
    mix = losses.Mixture(
        log_pi=torch.zeros(1),
        mean=torch.zeros(1, 2),
        log_sigma=torch.zeros(1, 2),
        rho=torch.zeros(1),
    )
    assert float(losses.mixture_nll(mix, torch.zeros(2))) == pytest.approx(math.log(2 * math.pi))


def test_mixture_nll_gradient_is_right() -> None:
    offset = normal(2, 2, seed=1)
    assert gradcheck(lambda raw: losses.mixture_nll(losses.mixture(raw), offset), normal(2, 18))


@pytest.mark.parametrize("far", [30.0, 1e4])
def test_an_outlier_still_pulls_the_means(far: float) -> None:
    """With +1e-6 inside the log its gradient would be exactly 0 (flaw 7)."""
    raw = torch.zeros(12, requires_grad=True)
    backward(losses.mixture_nll(losses.mixture(raw), torch.tensor([far, 0.0])))
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert (raw.grad[2:4] < -1).all()


@pytest.mark.parametrize("extreme", [-100.0, 100.0])
def test_extreme_correlations_and_widths_stay_finite(extreme: float) -> None:
    raw = torch.zeros(1, 12)
    raw[:, 6:] = extreme
    raw.requires_grad_()
    value = losses.mixture_nll(losses.mixture(raw), torch.tensor([[0.5, -0.5]]))
    backward(value)
    assert value.isfinite().all()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_sigma_keeps_above_its_floor_and_rho_within_its_limit() -> None:
    mix = losses.mixture(torch.linspace(-50, 50, 60))
    assert float(mix.log_sigma.exp().min()) >= losses.SIGMA_FLOOR * 0.999
    assert float(mix.rho.abs().max()) == pytest.approx(losses.RHO_LIMIT)


def slow_redrawn(raw: Tensor, offset: Tensor, at: Tensor) -> list[float]:
    """What ``raw`` draws with the numbers and the odds with which ``at`` drew ``offset``."""
    count = len(raw) // 6
    floor = math.log(losses.SIGMA_FLOOR)

    def component(table: Tensor, k: int) -> tuple[float, ...]:
        pi, mx, my, sx, sy, r = (float(table[i * count + k]) for i in range(6))
        sigma_x, sigma_y = (math.exp(floor + math.log1p(math.exp(s - floor))) for s in (sx, sy))
        return pi, mx, my, sigma_x, sigma_y, losses.RHO_LIMIT * math.tanh(r)

    weights, moved = [], []
    for k in range(count):
        pi, mx, my, sigma_x, sigma_y, rho = component(at, k)
        x = (float(offset[0]) - mx) / sigma_x
        y = ((float(offset[1]) - my) / sigma_y - rho * x) / math.sqrt(1 - rho * rho)
        area = sigma_x * sigma_y * math.sqrt(1 - rho * rho)
        weights.append(math.exp(pi - (x * x + y * y) / 2) / area)
        _, mx, my, sigma_x, sigma_y, rho = component(raw, k)
        correlated = rho * x + math.sqrt(1 - rho * rho) * y
        moved.append((mx + sigma_x * x, my + sigma_y * correlated))
    return [
        sum(w * m[axis] for w, m in zip(weights, moved, strict=True)) / sum(weights)
        for axis in (0, 1)
    ]


def test_redrawn_offsets_are_those_that_were_drawn() -> None:
    raw, offset = normal(4, 3, 18), 3 * normal(4, 3, 2, seed=1)
    assert torch.allclose(losses.redrawn(losses.mixture(raw), offset), offset)


def test_redrawn_offsets_move_as_draws_of_the_same_numbers_do() -> None:
    raw, offset = normal(18), normal(2, seed=1)
    jacobian = torch.autograd.functional.jacobian(
        lambda raw: losses.redrawn(losses.mixture(raw), offset), raw
    )
    step = 1e-6
    for i in range(18):
        there, back = raw.clone(), raw.clone()
        there[i] += step
        back[i] -= step
        ahead, behind = slow_redrawn(there, offset, raw), slow_redrawn(back, offset, raw)
        for axis in (0, 1):
            slope = (ahead[axis] - behind[axis]) / (2 * step)
            assert float(jacobian[axis, i]) == pytest.approx(slope, abs=1e-7)
    assert bool((jacobian[:, :3] == 0).all())  # the odds are held fixed


def test_an_outlier_is_redrawn_with_a_finite_gradient() -> None:
    raw = torch.zeros(12, requires_grad=True)
    value = losses.redrawn(losses.mixture(raw), torch.tensor([1e4, 0.0]))
    backward(value)
    assert value.tolist() == pytest.approx([1e4, 0.0])
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def drawing(lengths: list[int], total: int, seed: int = 0) -> Tensor:
    """Stroke-5 rows: points, one end row each, and rubbish behind it."""
    rows = normal(len(lengths), total, 5, seed=seed)
    for row, length in zip(rows, lengths, strict=True):
        row[:length, 2:] = 0.0
        row[: length - 1, 2] = 1.0
        row[length - 1] = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    return rows


def test_drawing_nll_equals_the_loop_over_the_real_rows() -> None:
    lengths = [3, 6]
    rows, raw, logit = drawing(lengths, 6), normal(2, 6, 12, seed=1), normal(2, 6, 3, seed=2)
    offset, pen = losses.drawing_nll(raw, logit, rows, torch.tensor(lengths))
    for b, length in enumerate(lengths):
        points = [slow_mixture_nll(raw[b, t], rows[b, t, :2]) for t in range(length - 1)]
        pens = []
        for t in range(length):
            state = rows[b, t, 2:].tolist().index(1.0)
            weights = [math.exp(x) for x in logit[b, t].tolist()]
            pens.append(-math.log(weights[state] / sum(weights)))
        assert float(offset[b]) == pytest.approx(sum(points) / len(points))
        assert float(pen[b]) == pytest.approx(sum(pens) / len(pens))


def test_the_end_of_a_drawing_is_learnt() -> None:
    """Its logit gets a gradient on the end row, and none behind it (flaw 1)."""
    logit = torch.zeros(1, 5, 3, requires_grad=True)
    _, pen = losses.drawing_nll(
        torch.zeros(1, 5, 12), logit, drawing([3], 5).float(), torch.tensor([3])
    )
    backward(pen)
    assert logit.grad is not None
    assert float(logit.grad[0, 2, 2]) == pytest.approx((1 / 3 - 1) / 3)
    assert not logit.grad[0, 3:].any()


def test_padding_changes_neither_value_nor_gradient() -> None:
    """The mean is over the drawing's own rows (flaw 8)."""
    rows, raw, logit = drawing([3], 8), normal(1, 8, 12, seed=1), normal(1, 8, 3, seed=2)
    rows[:, 3:] = math.nan
    rows[:, 3:, 2:] = 0.0
    short = losses.drawing_nll(raw[:, :3], logit[:, :3], rows[:, :3], torch.tensor([3]))
    padded = losses.drawing_nll(raw, logit, rows, torch.tensor([3]))
    assert [float(x) for x in short] == pytest.approx([float(x) for x in padded])


def test_drawing_nll_gradient_is_right() -> None:
    rows, length = drawing([2, 4], 4), torch.tensor([2, 4])

    def function(raw: Tensor, logit: Tensor) -> Tensor:
        return torch.stack(losses.drawing_nll(raw, logit, rows, length))

    assert gradcheck(function, normal(2, 4, 12, seed=1), normal(2, 4, 3, seed=2))


def test_kl_divergence_equals_that_of_torch() -> None:
    mean, log_var = normal(3, 8), normal(3, 8, seed=1)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(posterior, prior).mean(1)
    assert torch.allclose(losses.kl_divergence(mean, log_var), expected)


def test_kl_divergence_acts_however_small_it_is() -> None:
    """A tolerance of 0.2 would cut the gradient off here (flaw 9)."""
    mean = torch.full((1, 4), 0.1, requires_grad=True)
    value = losses.kl_divergence(mean, torch.zeros(1, 4))
    backward(value)
    assert value.tolist() == pytest.approx([0.005])
    assert mean.grad is not None
    assert mean.grad.tolist() == [pytest.approx([0.025] * 4)]


def test_kl_divergence_gradient_is_right() -> None:
    assert gradcheck(losses.kl_divergence, normal(2, 3), normal(2, 3, seed=1))


# --------------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_patch_bce_equals_the_loop(target: float) -> None:
    logit = normal(2, 1, 2, 3)
    expected = []
    for pair in logit:
        terms = [1 / (1 + math.exp(-x)) for x in pair.flatten().tolist()]
        expected.append(-sum(math.log(d if target else 1 - d) for d in terms) / len(terms))
    assert losses.patch_bce(logit, target).tolist() == pytest.approx(expected)


def test_patch_bce_keeps_its_gradient_where_the_discriminator_is_sure_and_wrong() -> None:
    logit = torch.full((1, 1, 2, 2), -200.0, requires_grad=True)
    value = losses.patch_bce(logit, 1.0)
    backward(value)
    assert value.tolist() == [200.0]
    assert logit.grad is not None
    assert logit.grad.flatten().tolist() == [-0.25] * 4


def test_patch_bce_gradient_is_right() -> None:
    assert gradcheck(lambda logit: losses.patch_bce(logit, 1.0), normal(2, 1, 2, 2))
