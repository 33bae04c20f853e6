"""The policy gradient: its parts by hand, and the whole against the exact expected reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig
from sbir_ray.joint import PolicyRows, policy_losses
from sbir_ray.joint_config import PolicyConfig
from sbir_ray.models.paper import PaperGenerator

BASELINES = ("none", "greedy", "leave_one_out")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def backward(value: Tensor) -> None:
    torch.autograd.backward(value.sum())


# --------------------------------------------------------------------------- parts


def test_reward_falls_with_the_retrieval_loss_and_rises_with_the_certainty() -> None:
    value = losses.reward(torch.tensor([0.5, 0.0]), torch.tensor([0.2, 0.8]), 1.0, 2.0)
    assert value.tolist() == pytest.approx([-0.1, 1.6])


def test_leave_one_out_is_the_mean_of_the_photos_other_drawings() -> None:
    reward, photo = [1.0, 2.0, 6.0, 3.0, 5.0, 4.0], [7, 2, 7, 2, 7, 9]
    expected = []
    for b, own in enumerate(photo):
        others = [r for c, r in enumerate(reward) if photo[c] == own and c != b]
        expected.append(sum(others) / len(others) if others else 0.0)
    assert expected == [5.5, 3.0, 3.0, 2.0, 3.5, 0.0]
    value = losses.leave_one_out(torch.tensor(reward), torch.tensor(photo))
    assert value.tolist() == pytest.approx(expected)


def test_normalised_advantages_have_a_root_mean_square_of_one_and_keep_their_signs() -> None:
    advantage = torch.tensor([0.3, -0.1, 0.02])
    value = losses.normalised(advantage)
    assert float(value.square().mean()) == pytest.approx(1.0)
    assert torch.allclose(value / value[0], advantage / advantage[0])


@pytest.mark.parametrize("same", [0.0, 0.5, 1e-12])
def test_advantages_that_are_all_alike_stay_small(same: float) -> None:
    value = losses.normalised(torch.full((4,), same))
    assert value.isfinite().all()
    assert float(value.abs().max()) <= 1.0


def test_importance_ratio_is_that_of_the_probabilities_up_to_its_limit() -> None:
    learner = torch.tensor([-3.0, -2.0, -4.0, -300.0], requires_grad=True)
    behaviour = torch.tensor([-3.5, -4.0, -3.0, -300.0])
    value = losses.importance_ratio(learner, behaviour, 2.0)
    expected = [min(math.exp(a - b), 2.0) for a, b in [(-3, -3.5), (-2, -4), (-4, -3), (0, 0)]]
    assert value.tolist() == pytest.approx(expected)
    assert not value.requires_grad


@pytest.mark.parametrize("apart", [-1e4, 1e4])
def test_importance_ratio_neither_overflows_nor_becomes_nan(apart: float) -> None:
    value = losses.importance_ratio(torch.tensor([-1e3 + apart]), torch.tensor([-1e3]), 3.0)
    assert value.tolist() == pytest.approx([3.0 if apart > 0 else 0.0])


def test_importance_ratio_with_limit_0_is_1() -> None:
    value = losses.importance_ratio(normal(3), normal(3, seed=1), 0)
    assert value.tolist() == [1.0] * 3


@pytest.mark.parametrize("per_row", [True, False])
def test_policy_surrogate_equals_the_loop(per_row: bool) -> None:
    log_prob, rows = normal(3), [4, 1, 2]
    advantage, ratio = normal(3, seed=1), normal(3, seed=2).exp()
    value = losses.policy_surrogate(log_prob, torch.tensor(rows), advantage, ratio, per_row=per_row)
    for b, count in enumerate(rows):
        share = float(log_prob[b]) / (count if per_row else 1)
        assert float(value[b]) == pytest.approx(-float(ratio[b]) * float(advantage[b]) * share)


def test_policy_surrogate_reaches_the_log_probabilities_alone() -> None:
    log_prob, advantage, ratio = (normal(2, seed=i).requires_grad_() for i in range(3))
    backward(
        losses.policy_surrogate(log_prob, torch.tensor([3, 2]), advantage, ratio, per_row=True)
    )
    assert log_prob.grad is not None
    expected = -(ratio * advantage / torch.tensor([3, 2])).detach()
    assert torch.allclose(log_prob.grad, expected)
    assert advantage.grad is None
    assert ratio.grad is None


def policy_rows(seed: int = 0) -> PolicyRows:
    torch.manual_seed(seed)
    return PolicyRows(
        log_prob_B=(-10 * torch.rand(6, dtype=torch.float64)).requires_grad_(),
        rows_B=torch.tensor([3, 5, 2, 4, 7, 1]),
        behaviour_B=-10 * torch.rand(6, dtype=torch.float64),
        reward_B=torch.rand(6, dtype=torch.float64),
        photo_B=torch.tensor([0, 0, 1, 1, 1, 0]),
        greedy_B=torch.rand(6, dtype=torch.float64),
    )


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
def test_equation_9_by_hand(baseline: str, normalise: bool, per_row: bool) -> None:
    config = PolicyConfig(baseline=baseline, normalise=normalise, per_row=per_row, max_ratio=1.5)
    batch = policy_rows()
    found = policy_losses(batch, config)
    log_prob, behaviour = batch.log_prob_B.detach().tolist(), batch.behaviour_B.tolist()
    reward, photo = batch.reward_B.tolist(), batch.photo_B.tolist()
    advantages = []
    for b in range(6):
        others = [reward[c] for c in range(6) if photo[c] == photo[b] and c != b]
        compared = {
            "none": 0.0,
            "greedy": float(batch.greedy_B[b]),
            "leave_one_out": sum(others) / 2,
        }
        advantages.append(reward[b] - compared[baseline])
    if normalise:
        size = math.sqrt(sum(a * a for a in advantages) / 6)
        advantages = [a / size for a in advantages]
    ratios = [min(math.exp(p - q), 1.5) for p, q in zip(log_prob, behaviour, strict=True)]
    factors = [
        -ratio * a / (int(n) if per_row else 1) / 6
        for ratio, a, n in zip(ratios, advantages, batch.rows_B, strict=True)
    ]
    expected = sum(f * p for f, p in zip(factors, log_prob, strict=True))
    assert float(found["policy"].detach()) == pytest.approx(expected)
    assert float(found["ratio"]) == pytest.approx(sum(ratios) / 6)
    mean = sum(reward) / 6
    assert float(found["reward"]) == pytest.approx(mean)
    spread = math.sqrt(sum((r - mean) ** 2 for r in reward) / 6)
    assert float(found["reward_std"]) == pytest.approx(spread)
    found["policy"].backward()
    assert batch.log_prob_B.grad.tolist() == pytest.approx(factors)


def test_a_single_drawing_has_a_finite_policy_loss() -> None:
    one = PolicyRows(
        log_prob_B=torch.tensor([-2.0], requires_grad=True),
        rows_B=torch.tensor([3]),
        behaviour_B=torch.tensor([-2.0]),
        reward_B=torch.tensor([0.4]),
        photo_B=torch.tensor([0]),
        greedy_B=torch.tensor([0.4]),
    )
    for baseline in BASELINES:
        found = policy_losses(one, PolicyConfig(baseline=baseline))
        assert all(bool(value.isfinite()) for value in found.values())


# --------------------------------------------------------------------------- exact expectation


class Outcomes(NamedTuple):
    """Every drawing that can come out, its offsets at quadrature nodes."""

    rows_ST5: Tensor
    length_S: Tensor
    chance_S: Tensor
    """Sums to 1."""


def tiny(seed: int = 0, mixtures: int = 1) -> PaperGenerator:
    """A generator in float64 whose pen and offsets depend on what it drew, with narrow offsets."""
    torch.manual_seed(seed)
    config = GeneratorConfig(
        weights="none", image_size=64, latent=2, hidden=4, attention=3, mixtures=mixtures
    )
    generator = PaperGenerator(config).double()
    with torch.no_grad():
        generator.output.weight.mul_(3)
        generator.output.bias[3 + 3 * mixtures : 3 + 5 * mixtures] = -3.5
    return generator


def learnt(generator: PaperGenerator) -> dict[str, Tensor]:
    return {name: p for name, p in generator.named_parameters() if p.requires_grad}


def photo_map(generator: PaperGenerator) -> Tensor:
    return normal(1, generator.backbone.channels, 2, 2, seed=7)


def next_output(generator: PaperGenerator, map_1CHW: Tensor, prefix_St5: Tensor) -> Tensor:
    """The outputs (S, K) that follow the rows drawn so far."""
    seen: list[Tensor] = []
    handle = generator.output.register_forward_hook(lambda _, __, out: seen.append(out))
    count, steps = prefix_St5.shape[:2]
    rows = torch.cat([prefix_St5, prefix_St5.new_zeros(count, 1, 5)], 1)
    generator.log_prob_of_code(
        map_1CHW.expand(count, -1, -1, -1), rows, torch.full((count,), steps + 1)
    )
    handle.remove()
    return seen[0][:, -1]


@torch.no_grad()
def outcomes(
    generator: PaperGenerator, map_1CHW: Tensor, limit: int = 2, nodes: int = 3
) -> Outcomes:
    """All drawings of at most ``limit`` rows, by Gauss-Hermite quadrature of the offsets."""
    x, weight = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weight = weight / weight.sum()
    node_Q2 = torch.cartesian_prod(x, x)
    weight_Q = torch.cartesian_prod(weight, weight).prod(1)
    prefix, chance = torch.zeros(1, 0, 5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    whole: list[tuple[Tensor, Tensor]] = []
    for _ in range(limit):
        raw = next_output(generator, map_1CHW, prefix)
        pen = raw[:, :3].softmax(1)
        end = torch.tensor([0.0, 0, 0, 0, 1], dtype=torch.float64).expand(len(prefix), 1, 5)
        whole.append((torch.cat([prefix, end], 1), chance * pen[:, 2]))
        mix = losses.mixture(raw[:, 3:])
        sigma, rho = mix.log_sigma[:, 0].exp(), mix.rho
        y = rho * node_Q2[:, 0] + (1 - rho.square()).sqrt() * node_Q2[:, 1]
        standard = torch.stack([node_Q2[:, 0].expand_as(y), y], 2)
        offset = mix.mean[:, :1] + sigma[:, None] * standard
        grown = []
        for state in (0, 1):
            row = torch.zeros(*offset.shape[:2], 1, 5, dtype=torch.float64)
            row[:, :, 0, :2] = offset
            row[:, :, 0, 2 + state] = 1
            before = prefix[:, None].expand(-1, len(node_Q2), -1, -1)
            part = chance[:, None] * pen[:, state, None] * weight_Q
            grown.append((torch.cat([before, row], 2).flatten(0, 1), part.flatten()))
        prefix, chance = (torch.cat(part) for part in zip(*grown, strict=True))
    whole.append((prefix, chance))
    length = torch.cat([torch.full((len(rows),), rows.shape[1]) for rows, _ in whole])
    padded = [torch.nn.functional.pad(rows, (0, 0, 0, limit - rows.shape[1])) for rows, _ in whole]
    return Outcomes(torch.cat(padded), length, torch.cat([part for _, part in whole]))


def reward_of(found: Outcomes) -> Tensor:
    """Some smooth function of all that was drawn (S,)."""
    x, y = found.rows_ST5[..., :2].sum(1).unbind(1)
    pens = found.rows_ST5[..., 2:].sum(1) @ torch.tensor([0.2, -0.5, 0.7], dtype=torch.float64)
    turns = (found.rows_ST5[:, 0, 0] * found.rows_ST5[:, 1, 3]).tanh()
    return 1 + x.sin() + 0.5 * (0.7 * y).cos() + pens + turns


def log_prob(generator: PaperGenerator, map_1CHW: Tensor, found: Outcomes) -> Tensor:
    maps = map_1CHW.expand(len(found.length_S), -1, -1, -1)
    return generator.log_prob_of_code(maps, found.rows_ST5, found.length_S).sum(1)


@contextmanager
def moved(parameter: Tensor, by: Tensor) -> Iterator[None]:
    with torch.no_grad():
        before = parameter.clone()
        parameter.add_(by)
        yield
        parameter.copy_(before)


def check_gradients(
    parameters: dict[str, Tensor], loss: Tensor, value: Callable[[], Tensor], rel: float = 1e-4
) -> None:
    """The loss's gradient along some direction of each parameter is the slope of ``value``."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    slopes = {}
    for index, (name, parameter) in enumerate(parameters.items()):
        way, step = normal(*parameter.shape, seed=index), 1e-4
        with moved(parameter, step * way):
            ahead = value()
        with moved(parameter, -step * way):
            behind = value()
        gradient = found[index]
        slopes[name] = float((ahead - behind) / (2 * step))
        along = 0.0 if gradient is None else float((gradient * way).sum())
        assert along == pytest.approx(slopes[name], rel=rel, abs=rel / 100), name
    assert sum(abs(slope) > 1e-4 for slope in slopes.values()) > 5


def policy_loss(
    log_prob_S: Tensor, found: Outcomes, config: PolicyConfig, behaviour_S: Tensor
) -> Tensor:
    """The exact expectation of ``policy_losses`` over all drawings (over all pairs of them where
    each is compared with the other).

    The loss is a mean and linear in the rewards, so these carry the chances.
    """
    chance_S, reward_S = found.chance_S, reward_of(found)
    count = len(chance_S)
    every = torch.arange(count)

    def loss(chosen: Tensor, weight: Tensor, photo: Tensor) -> Tensor:
        weight = weight * len(chosen)
        rows = PolicyRows(
            log_prob_B=log_prob_S[chosen],
            rows_B=found.length_S[chosen],
            behaviour_B=behaviour_S[chosen],
            reward_B=weight * reward_S[chosen],
            photo_B=photo,
            greedy_B=weight * 1.3,
        )
        return policy_losses(rows, config)["policy"]

    if config.baseline != "leave_one_out":
        return loss(every, chance_S, every)
    total = torch.zeros((), dtype=torch.float64)
    for first in range(count):
        pair = torch.cat([torch.full((count,), first), every])
        weight = (chance_S[first] * chance_S).repeat(2) / 2
        total = total + loss(pair, weight, every.repeat(2))
    return total


def config_of(baseline: str, *, per_row: bool = False, max_ratio: float = 0.0) -> PolicyConfig:
    return PolicyConfig(
        baseline=baseline,  # type: ignore[arg-type]
        normalise=False,
        per_row=per_row,
        max_ratio=max_ratio,
    )


def test_the_outcomes_are_all_there_are() -> None:
    generator = tiny()
    map_1CHW = photo_map(generator)
    for limit in (1, 2, 3):
        found = outcomes(generator, map_1CHW, limit, nodes=2)
        assert float(found.chance_S.sum()) == pytest.approx(1.0)
        assert len(found.chance_S) == sum(8**row for row in range(limit)) + 8**limit


def test_log_prob_is_that_of_the_enumeration() -> None:
    """Of two drawings that differ in their pens alone, where one offset has one density."""
    generator = tiny()
    map_1CHW = photo_map(generator)
    found = outcomes(generator, map_1CHW, limit=1, nodes=1)
    with torch.no_grad():
        value = log_prob(generator, map_1CHW, found)
    down, up = 1, 2
    odds = float(value[down] - value[up])
    assert odds == pytest.approx(math.log(float(found.chance_S[down] / found.chance_S[up])))


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_surrogates_gradient_is_that_of_the_exact_expected_reward(baseline: str) -> None:
    generator = tiny()
    map_1CHW = photo_map(generator)
    found = outcomes(generator, map_1CHW)
    log_prob_S = log_prob(generator, map_1CHW, found)
    loss = policy_loss(log_prob_S, found, config_of(baseline), log_prob_S)

    def value() -> Tensor:
        now = outcomes(generator, map_1CHW)
        return -(now.chance_S * reward_of(now)).sum()

    check_gradients(learnt(generator), loss, value)


def test_per_row_the_gradient_is_that_of_the_expected_reward_per_row() -> None:
    generator = tiny()
    map_1CHW = photo_map(generator)
    found = outcomes(generator, map_1CHW)
    log_prob_S = log_prob(generator, map_1CHW, found)
    loss = policy_loss(log_prob_S, found, config_of("none", per_row=True), log_prob_S)

    def value() -> Tensor:
        now = outcomes(generator, map_1CHW)
        return -(now.chance_S * reward_of(now) / now.length_S).sum()

    check_gradients(learnt(generator), loss, value)


@pytest.mark.parametrize("baseline", BASELINES)
def test_with_the_ratio_old_drawings_give_the_gradient_of_new_ones(baseline: str) -> None:
    generator = tiny()
    map_1CHW = photo_map(generator)
    found = outcomes(generator, map_1CHW)
    with torch.no_grad():
        behaviour_S = log_prob(generator, map_1CHW, found)
        for index, parameter in enumerate(learnt(generator).values()):
            parameter.add_(0.003 * normal(*parameter.shape, seed=100 + index))
    log_prob_S = log_prob(generator, map_1CHW, found)
    apart = (log_prob_S - behaviour_S).detach()
    assert float(apart.max() - apart.min()) > 0.1
    loss = policy_loss(log_prob_S, found, config_of(baseline, max_ratio=1e6), behaviour_S)

    def value() -> Tensor:
        now = outcomes(generator, map_1CHW)
        return -(now.chance_S * reward_of(now)).sum()

    check_gradients(learnt(generator), loss, value, rel=1e-3)


def test_without_the_ratio_old_drawings_give_another_gradient() -> None:
    generator = tiny()
    map_1CHW = photo_map(generator)
    found = outcomes(generator, map_1CHW)
    with torch.no_grad():
        behaviour_S = log_prob(generator, map_1CHW, found)
        generator.output.bias[:3] += torch.tensor([0.3, -0.2, 0.1])
    log_prob_S = log_prob(generator, map_1CHW, found)
    gradients = [
        torch.autograd.grad(
            policy_loss(log_prob_S, found, config_of("none", max_ratio=limit), behaviour_S),
            generator.output.bias,
            retain_graph=True,
        )[0]
        for limit in (1e6, 0.0)
    ]
    assert not torch.allclose(*gradients, rtol=0.05)


def test_the_gradient_of_log_prob_is_right() -> None:
    generator = tiny(mixtures=2)
    maps = normal(3, generator.backbone.channels, 2, 2, seed=7)
    rows = normal(3, 4, 5, seed=8)
    pens = torch.tensor([[0, 1, 2, 0], [1, 0, 0, 1], [0, 2, 0, 0]])
    rows[..., 2:] = torch.nn.functional.one_hot(pens, 3)
    length = torch.tensor([3, 4, 2])

    def value() -> Tensor:
        return (generator.log_prob_of_code(maps, rows, length) * normal(3, 4, seed=9)).sum()

    check_gradients(learnt(generator), value(), value)
