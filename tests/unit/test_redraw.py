"""Drawings as differentiable functions of the generator's weights: their values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from sbir_ray import losses
from sbir_ray.config import DiscriminatorConfig, GeneratorConfig
from sbir_ray.data import raster
from sbir_ray.data.strokes import count_points
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.drawing import Drawing
from sbir_ray.models.paper import PaperGenerator

SIZE = 64


def small(**changes: object) -> PaperGenerator:
    """A generator of a few thousand weights whose drawings vary, some of one point."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "weights": "none",
        "image_size": SIZE,
        "latent": 4,
        "hidden": 16,
        "attention": 8,
        "mixtures": 3,
        "max_points": 12,
    }
    generator = PaperGenerator(GeneratorConfig(**{**settings, **changes}))  # type: ignore[arg-type]
    # The map of a deep random network is almost 0. This one's tells photos apart.
    channels, stride = generator.backbone.channels, generator.backbone.stride
    generator.backbone.body = nn.Conv2d(3, channels, stride, stride).requires_grad_(False)
    generator.set_offset_scale(20.0)
    with torch.no_grad():
        generator.output.weight.mul_(8)
        generator.output.bias[2] = -1.5
    return generator.eval()


def photos(count: int) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=source)


def padded(drawings: list[Drawing], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Their rows, padded with junk, and their lengths."""
    length = torch.tensor([len(d.rows) for d in drawings])
    rows = torch.full((len(drawings), int(length.max()) + extra, 5), 7.0)
    for row, drawing in zip(rows, drawings, strict=True):
        row[: len(drawing.rows)] = torch.from_numpy(drawing.rows)
    return rows, length


def learnt(generator: PaperGenerator) -> dict[str, Tensor]:
    return {name: p for name, p in generator.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_redrawn_points_and_pens_are_those_of_the_drawings_strokes(temperature: float) -> None:
    generator = small()
    drawings = generator.draw(photos(40), range(40), temperature)
    points, pen = generator.redraw_of_code(generator.encode(photos(40)), *padded(drawings, 3))
    counts = [count_points(drawing.strokes) for drawing in drawings]
    for b, drawing in enumerate(drawings):
        wanted = np.concatenate(drawing.strokes)
        found = points[b].detach().numpy()
        behind = wanted[-1:].repeat(len(found) - counts[b], axis=0)
        np.testing.assert_allclose(found, np.concatenate([wanted, behind]), atol=5e-3)
        ink = [float(i + 1 < len(stroke)) for stroke in drawing.strokes for i in range(len(stroke))]
        assert pen[b].tolist() == ink + [0.0] * (len(found) - counts[b])
    if temperature == 1.0:
        assert {drawing.ended for drawing in drawings} == {True, False}
        assert min(counts) == 1
        assert max(len(drawing.strokes) for drawing in drawings) > 2


def test_the_soft_raster_has_its_ink_where_the_hard_one_has() -> None:
    generator = small()
    photo = photos(20)
    drawings = generator.draw(photo, range(20), 1.0)
    points, pen = generator.redraw_of_code(generator.encode(photo), *padded(drawings))
    soft = raster.soft_rasterise(points, pen, SIZE, 2.0).detach()
    # A dot is drawn by the hard raster alone.
    lines = [[stroke for stroke in drawing.strokes if len(stroke) > 1] for drawing in drawings]
    hard = torch.from_numpy(raster.rasterise(lines, SIZE)).float() / 255
    assert float((soft - hard).abs().mean()) < 0.03
    assert bool((soft[hard == 1] > 0.6).all())
    assert bool((soft[:, 0] < 1e-6).all())


def test_the_result_does_not_depend_on_the_padding_nor_on_the_other_drawings() -> None:
    generator = small()
    photo = photos(4)
    drawings = generator.draw(photo, range(4), 1.0)
    maps = generator.encode(photo)
    points, pen = generator.redraw_of_code(maps, *padded(drawings, extra=5))
    for b in range(4):
        part = slice(b, b + 1)
        one_points, one_pen = generator.redraw_of_code(maps[part], *padded(drawings[part]))
        count = one_points.shape[1]
        torch.testing.assert_close(points[b, :count], one_points[0], rtol=1e-4, atol=1e-3)
        assert torch.equal(pen[b, :count], one_pen[0])


# --------------------------------------------------------------------------- gradients


def outputs(generator: PaperGenerator, maps: Tensor, rows: Tensor, length: Tensor) -> Tensor:
    """The outputs (B, T, K), in the order of the batch."""
    seen: list[Tensor] = []
    handle = generator.output.register_forward_hook(lambda _, __, out: seen.append(out))
    generator.log_prob_of_code(maps, rows, length)
    handle.remove()
    return seen[0][length.sort(descending=True, stable=True).indices.argsort()]


def slow_points(raw: Tensor, at: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The canonical points of one drawing, all rows points, by the outputs ``raw``: drawn with the
    numbers and components' odds with which the outputs ``at`` drew its rows."""

    def components(out: Tensor) -> list[MultivariateNormal]:
        mix = losses.mixture(out[3:])
        sigma = mix.log_sigma.exp()
        found = []
        for k in range(len(mix.rho)):
            (x, y), rho = sigma[k], mix.rho[k]
            covariance = torch.stack([x * x, rho * x * y, rho * x * y, y * y]).view(2, 2)
            found.append(MultivariateNormal(mix.mean[k], covariance))
        return found

    offsets = []
    for out, out_at, row in zip(raw, at, rows, strict=True):
        before = components(out_at)
        log_odds = torch.stack([normal.log_prob(row[:2]) for normal in before])
        odds = (losses.mixture(out_at[3:]).log_pi + log_odds).softmax(0)
        offset = torch.zeros(2, dtype=torch.float64)
        for share, old, new in zip(odds, before, components(out), strict=True):
            number = torch.linalg.solve(old.scale_tril, row[:2] - old.mean)
            offset = offset + share * (new.mean + new.scale_tril @ number)
        offsets.append(offset)
    path = torch.stack(offsets).cumsum(0) * scale
    low, high = path.min(0).values, path.max(0).values
    return (path - (low + high) / 2) * (190 / (high - low).max()) + 128


def test_the_points_move_with_the_weights_as_draws_of_the_same_numbers_do() -> None:
    generator = small(mixtures=2).double()
    source = torch.Generator().manual_seed(1)
    maps = torch.randn(1, generator.backbone.channels, 2, 2, generator=source, dtype=torch.float64)
    rows = torch.randn(1, 4, 5, generator=source, dtype=torch.float64)
    rows[..., 2:] = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]])
    length = torch.tensor([4])
    weight = torch.randn(4, 2, generator=source, dtype=torch.float64)
    scale = float(generator.offset_scale)
    points, _ = generator.redraw_of_code(maps, rows, length)
    parameters = learnt(generator)
    (points[0] * weight).sum().backward()
    with torch.no_grad():
        at = outputs(generator, maps, rows, length)[0]

        def value() -> float:
            raw = outputs(generator, maps, rows, length)[0]
            return float((slow_points(raw, at, rows[0], scale) * weight).sum())

        assert value() == pytest.approx(float((points[0] * weight).sum().detach()))
        for index, (name, parameter) in enumerate(parameters.items()):
            source.manual_seed(index)
            way = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
            kept, step = parameter.clone(), 1e-5
            parameter.add_(step * way)
            ahead = value()
            parameter.copy_(kept - step * way)
            behind = value()
            parameter.copy_(kept)
            assert parameter.grad is not None
            slope = (ahead - behind) / (2 * step)
            assert float((parameter.grad * way).sum()) == pytest.approx(slope, rel=1e-5), name


def test_the_pens_gradient_is_that_of_the_probability_of_down() -> None:
    generator = small()
    maps = generator.encode(photos(6))
    drawings = generator.draw(photos(6), range(6), 1.0)
    rows, length = padded(drawings)
    _, pen = generator.redraw_of_code(maps, rows, length)
    weight = torch.randn(pen.shape, generator=torch.Generator().manual_seed(1))
    for row, drawing in zip(weight, drawings, strict=True):
        # The last point has no segment, whatever its pen.
        row[count_points(drawing.strokes) - 1 :] = 0
    (wanted,) = torch.autograd.grad(
        (outputs(generator, maps, rows, length)[..., :3].softmax(2)[..., 0] * weight).sum(),
        generator.output.bias,
    )
    (found,) = torch.autograd.grad((pen * weight).sum(), generator.output.bias)
    torch.testing.assert_close(found, wanted)
    assert bool((found[:3] != 0).all())
    (beyond,) = torch.autograd.grad(
        generator.redraw_of_code(maps, rows, length)[1][weight == 0].sum(), generator.output.bias
    )
    assert not beyond.any()


@pytest.mark.parametrize("points", [1, 3])
def test_points_that_all_coincide_lie_in_the_middle_with_a_finite_gradient(points: int) -> None:
    generator = small()
    rows = torch.zeros(1, points + 1, 5)
    rows[0, :points, 2] = 1
    rows[0, points, 4] = 1
    with torch.no_grad():
        # Means and standard numbers of 0: the offsets are 0 to the last bit.
        generator.output.weight.zero_()
        generator.output.bias.zero_()
    found, pen = generator.redraw_of_code(
        generator.encode(photos(1)), rows, torch.tensor([points + 1])
    )
    assert found[0].tolist() == [[128.0, 128.0]] * (points + 1)
    ink = raster.soft_rasterise(found, pen, SIZE, 2.0)
    assert bool(ink.isfinite().all())
    ink.sum().backward()
    for name, parameter in learnt(generator).items():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_what_the_discriminator_thinks_of_the_raster_reaches_all_weights() -> None:
    generator = small()
    judge = PairDiscriminator(DiscriminatorConfig(channels=8, image_size=SIZE)).eval()
    photo = photos(8)
    drawings = generator.draw(photo, range(8), 1.0)
    points, pen = generator.redraw_of_code(generator.encode(photo), *padded(drawings))
    ink = raster.soft_rasterise(points, pen, SIZE, 2.0)
    (-judge.certainty(photo, ink).mean()).backward()
    for name, parameter in learnt(generator).items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


def test_following_the_rasters_gradient_raises_the_certainty() -> None:
    """With the weights a step further the same numbers would have drawn what D trusts more."""
    generator = small()
    judge = PairDiscriminator(DiscriminatorConfig(channels=8, image_size=SIZE)).eval()
    drawings = generator.draw(photos(12), range(12), 1.0)
    chosen = [b for b, drawing in enumerate(drawings) if len(drawing.strokes[0]) > 2][:3]
    photo = photos(12)[chosen]
    maps = generator.encode(photo)
    rows, length = padded([drawings[b] for b in chosen])

    def certainty(now: Tensor, at: Tensor) -> Tensor:
        total = []
        for b in range(len(rows)):
            real = int(length[b]) - int(rows[b, length[b] - 1, 4])
            points = slow_points(
                now[b, :real].double(), at[b, :real].double(), rows[b, :real].double(), 20.0
            )
            ink = raster.soft_rasterise(points[None].float(), rows[b : b + 1, :real, 2], SIZE, 2.0)
            total.append(judge.certainty(photo[b : b + 1], ink))
        return torch.cat(total).mean()

    ink = raster.soft_rasterise(*generator.redraw_of_code(maps, rows, length), SIZE, 2.0)
    before = judge.certainty(photo, ink).mean()
    parameters = list(learnt(generator).values())
    gradients = torch.autograd.grad(before, parameters)
    with torch.no_grad():
        at = outputs(generator, maps, rows, length)
        start = float(certainty(at, at))
        assert start == pytest.approx(float(before.detach()), abs=1e-4)
        step = 1e-3 / sum(float(gradient.square().sum()) for gradient in gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(step * gradient)
        after = float(certainty(outputs(generator, maps, rows, length), at))
    assert after > start + 2e-4
