from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig
from sbir_ray.data import strokes as sketches
from sbir_ray.data.strokes import Strokes
from sbir_ray.models.drawing import Drawing, Noise
from sbir_ray.models.paper import PaperGenerator
from tests.padding import padded

SIZE = 64


def small(seed: int = 0, **changes: object) -> PaperGenerator:
    """A generator of a few thousand weights (beside its backbone) whose drawings vary."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "kind": "paper",
        "backbone": "mobilenetv2",
        "weights": "none",
        "image_size": SIZE,
        "latent": 8,
        "hidden": 36,
        "attention": 20,
        "mixtures": 3,
        "max_points": 20,
    }
    generator = PaperGenerator(GeneratorConfig(**{**settings, **changes}))  # type: ignore[arg-type]
    # The map of a deep random network is almost 0. This one's tells photos apart.
    channels, stride = generator.backbone.channels, generator.backbone.stride
    generator.backbone.body = nn.Sequential(
        nn.Conv2d(3, channels, stride, stride), nn.BatchNorm2d(channels), nn.ReLU()
    ).requires_grad_(generator.config.train_backbone)
    with torch.no_grad():
        generator.output.weight.mul_(8)
        generator.output.bias[2] = -2.0
    return generator.eval()


def photos(count: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=source)


def people(generator: PaperGenerator, counts: Sequence[int]) -> list[np.ndarray]:
    """Rows of two-stroke sketches of so many points."""
    rng = np.random.default_rng(0)
    drawn: list[Strokes] = []
    for count in counts:
        points = rng.uniform(0, 256, (count, 2)).astype(np.float32)
        drawn.append(sketches.canonical([points[: count // 2], points[count // 2 :]]))
    generator.set_offset_scale(sketches.offset_scale(drawn))
    return [generator.rows(strokes) for strokes in drawn]


def step_by_step(generator: PaperGenerator, photo: Tensor, rows: np.ndarray) -> tuple[float, float]:
    """Mean -log p of one sketch's offsets and pen states, by the paper's equations."""
    map_BCHW = generator.encode(photo[None])
    mean_BZ = generator.to_latent(map_BCHW.mean((2, 3)))[:, : generator.config.latent]
    h, c = torch.tanh(generator.to_state(mean_BZ)).chunk(2, 1)
    before = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    offsets, pens = [], []
    for row in torch.from_numpy(rows):
        query = generator.attend_state(h)[:, :, None, None]
        energy = torch.tanh(generator.attend_map(map_BCHW) + query).flatten(2).transpose(1, 2)
        weights = generator.attend_score(energy).squeeze(2).softmax(1)
        context = (map_BCHW.flatten(2) * weights[:, None]).sum(2)
        h, c = generator.cell(torch.cat([context, before], 1), (h, c))
        raw = generator.output(h)
        pens.append(F.cross_entropy(raw[:, :3], row[None, 2:].argmax(1)))
        if row[4] == 0:
            offsets.append(losses.mixture_nll(losses.mixture(raw[:, 3:]), row[None, :2])[0])
        before = row[None]
    return float(torch.stack(offsets).mean()), float(torch.stack(pens).mean())


def same(a: Drawing, b: Drawing) -> bool:
    return a.rows.tobytes() == b.rows.tobytes() and a.log_prob == b.log_prob and a.ended == b.ended


# --------------------------------------------------------------------------- likelihood


def test_nll_is_that_of_the_papers_equations_row_by_row() -> None:
    generator = small()
    rows = people(generator, [5, 20, 9])
    points, length = padded(rows)
    photo = photos(3)
    with torch.no_grad():
        terms = generator.nll(photo, points, length)
        for i in range(3):
            offset, pen = step_by_step(generator, photo[i], rows[i])
            assert float(terms["offset"][i]) == pytest.approx(offset, rel=1e-4)
            assert float(terms["pen"][i]) == pytest.approx(pen, rel=1e-4)


def test_nll_does_not_depend_on_the_padding_nor_on_the_other_sketches() -> None:
    generator = small()
    rows = people(generator, [5, 20, 9])
    photo = photos(3)
    with torch.no_grad():
        terms = generator.nll(photo, *padded(rows, extra=30))
        for i in range(3):
            alone = generator.nll(photo[i : i + 1], *padded(rows[i : i + 1]))
            for name in ("offset", "pen", "kl"):
                assert float(terms[name][i]) == pytest.approx(float(alone[name][0]), rel=1e-5)


def test_nll_of_a_photo_is_that_of_its_map() -> None:
    generator = small()
    photo, rows = photos(2), padded(people(generator, [4, 9]))
    wanted = generator.nll(photo, *rows)
    for name, value in generator.nll_of_code(generator.encode(photo), *rows).items():
        assert torch.equal(value, wanted[name]), name


def test_every_point_is_trained_and_the_end_rows_offset_is_not() -> None:
    generator = small()
    points, length = padded(people(generator, [6]))
    points.requires_grad_()
    generator.nll(photos(1), points, length)["offset"].sum().backward()
    assert points.grad is not None
    size = points.grad[0, :, :2].abs().sum(1)
    assert bool((size[:6] > 0).all())
    assert float(size[6]) == 0


def test_the_end_row_is_trained() -> None:
    generator = small()
    points, length = padded(people(generator, [6]))
    before = generator.nll(photos(1), points, length)
    points[0, 6, 2:] = torch.tensor([1.0, 0.0, 0.0])
    after = generator.nll(photos(1), points, length)
    assert not torch.equal(before["pen"], after["pen"])
    assert torch.equal(before["offset"], after["offset"])


def test_an_outlier_has_a_finite_likelihood_and_gradient() -> None:
    generator = small()
    points, length = padded(people(generator, [6]))
    points[0, 2, 0] = 1e4
    generator.nll(photos(1), points, length)["offset"].sum().backward()
    bias = generator.output.bias.grad
    assert bias is not None
    assert bool(torch.isfinite(bias).all())
    assert float(bias[3:].abs().max()) > 0


def test_kl_pulls_also_on_a_latent_near_the_prior() -> None:
    generator = small()
    with torch.no_grad():
        generator.to_latent.weight.zero_()
        generator.to_latent.bias.fill_(1e-3)
    generator.nll(photos(1), *padded(people(generator, [4])))["kl"].sum().backward()
    grad = generator.to_latent.bias.grad
    assert grad is not None
    assert bool((grad > 0).all())


def test_the_latent_comes_from_the_average_of_the_map() -> None:
    generator = small()
    map_BCHW = torch.randn(2, generator.backbone.channels, 4, 4)
    flat = map_BCHW.mean((2, 3), keepdim=True).expand_as(map_BCHW)
    for found, wanted in zip(generator.latent(map_BCHW), generator.latent(flat), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def test_the_latents_noise_moves_the_drawing_and_its_gradient_trains_the_spread() -> None:
    generator = small()
    photo, rows = photos(1), padded(people(generator, [4]))
    mean = generator.nll(photo, *rows)
    still = generator.nll(photo, *rows, noise_BZ=torch.zeros(1, 8))
    moved = generator.nll(photo, *rows, noise_BZ=torch.ones(1, 8))
    assert torch.equal(mean["pen"], still["pen"])
    assert not torch.equal(mean["pen"], moved["pen"])
    moved["offset"].sum().backward()
    grad = generator.to_latent.bias.grad
    assert grad is not None
    assert bool((grad[8:] != 0).all())


def test_the_attentions_convolution_runs_once_a_batch() -> None:
    generator = small()
    calls: list[int] = []
    generator.attend_map.register_forward_hook(lambda *_: calls.append(1))
    generator.nll(photos(2), *padded(people(generator, [15, 5])))
    assert len(calls) == 1


def test_attention_of_each_row_sums_to_one_through_the_end() -> None:
    generator = small()
    points, length = padded(people(generator, [4, 9]))
    attention = generator.nll(photos(2), points, length, attention=True)["attention"]
    assert attention.shape == (2, 10, 4, 4)
    total = attention.sum((2, 3)).detach()
    torch.testing.assert_close(total[0, :5], torch.ones(5))
    assert float(total[0, 5:].abs().max()) == 0


def test_without_attention_every_look_is_at_the_average_in_training_and_drawing() -> None:
    generator = small(attend=False)
    photo = photos(4)
    drawings = generator.draw(photo, range(4), 1.0, attention=True)
    points, length = padded([d.rows for d in drawings])
    terms = generator.nll(photo, points, length, attention=True)
    log_prob_BT = generator.log_prob(photo, points, length)
    for b, drawing in enumerate(drawings):
        assert drawing.attention is not None
        np.testing.assert_allclose(drawing.attention, 1 / 16)
        look = terms["attention"][b, : len(drawing.rows)].detach().numpy()
        np.testing.assert_allclose(look, 1 / 16)
        assert drawing.log_prob == pytest.approx(float(log_prob_BT[b].sum().detach()), abs=2e-3)


def test_without_attention_its_weights_do_not_train_and_all_others_do() -> None:
    generator = small(attend=False).train()
    terms = generator.nll(photos(2), *padded(people(generator, [4, 9])), noise_BZ=torch.ones(2, 8))
    (terms["offset"] + terms["pen"] + terms["kl"]).mean().backward()
    for name, parameter in generator.named_parameters():
        still = name.startswith(("attend_", "backbone."))
        assert parameter.requires_grad != still, name
        assert (parameter.grad is None) == still, name


def test_log_prob_of_a_photo_is_that_of_its_map() -> None:
    generator = small()
    photo, rows = photos(2), padded(people(generator, [4, 9]))
    value = generator.log_prob_of_code(generator.encode(photo), *rows)
    assert torch.equal(value, generator.log_prob(photo, *rows))


def test_the_last_layer_alone_gets_the_gradient_that_it_has_among_all() -> None:
    generator = small()
    photo, rows = photos(2), padded(people(generator, [4, 9]))
    generator.log_prob(photo, *rows).sum().backward()
    wanted = {name: p.grad for name, p in generator.output.named_parameters()}
    generator.zero_grad(set_to_none=True)
    value = generator.log_prob(photo, *rows, last_only=True)
    value.sum().backward()
    assert torch.equal(value, generator.log_prob(photo, *rows))
    for name, parameter in generator.named_parameters():
        if name.startswith("output."):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted[name.removeprefix("output.")])
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("trained", [True, False])
def test_the_backbone_trains_if_asked_and_keeps_its_statistics(trained: bool) -> None:
    generator = small(train_backbone=trained).train()
    before = {name: value.clone() for name, value in generator.backbone.named_buffers()}
    generator.nll(photos(2), *padded(people(generator, [4, 4])))["offset"].sum().backward()
    assert all((p.grad is not None) == trained for p in generator.backbone.parameters())
    for name, value in generator.backbone.named_buffers():
        assert torch.equal(value, before[name]), name


def test_autocast_gives_float32_terms_close_to_those_without() -> None:
    generator = small()
    photo, rows = photos(2), padded(people(generator, [9, 4]))
    exact = generator.nll(photo, *rows)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = generator.nll(photo, *rows)
    for name, value in rounded.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.1)


# --------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_log_prob_of_a_drawing_is_that_of_the_training_graph(temperature: float) -> None:
    generator = small()
    photo = photos(8)
    drawings = generator.draw(photo, range(8), temperature, attention=True)
    points, length = padded([d.rows for d in drawings])
    with torch.no_grad():
        log_prob_BT = generator.log_prob(photo, points, length)
        looks = generator.nll(photo, points, length, attention=True)["attention"]
    for b, drawing in enumerate(drawings):
        assert drawing.log_prob == pytest.approx(float(log_prob_BT[b].sum()), abs=2e-3)
        assert drawing.attention is not None
        np.testing.assert_allclose(
            drawing.attention, looks[b, : len(drawing.rows)].numpy(), atol=1e-5
        )


def test_of_the_longest_drawings_the_end_is_as_likely_as_not_to_end() -> None:
    """It changes nothing of the drawing, so the policy gradient must not see it."""
    generator = small(max_points=3)
    photo = photos(1).expand(40, -1, -1, -1)
    drawings = [d for d in generator.draw(photo, range(40), 1.0) if len(d.rows) >= 3]
    longest = [d for d in drawings if sketches.count_points(d.strokes) == 3]
    assert {d.ended for d in longest} == {True, False}
    for drawing in longest:
        points, length = padded([drawing.rows[:3]])
        value = float(generator.log_prob(photo[:1], points, length).sum().detach())
        assert drawing.log_prob == pytest.approx(value, abs=2e-3)


def test_some_of_the_drawings_tested_end_and_some_do_not() -> None:
    ended = {d.ended for d in small().draw(photos(8), range(8), 1.0)}
    assert ended == {True, False}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drawing_is_the_same_bit_for_bit_whatever_the_batch(temperature: float) -> None:
    generator = small()
    photo = photos(21)
    together = generator.draw(photo, range(21), temperature)
    few: list[Drawing] = []
    for i in range(0, 21, 7):
        few += generator.draw(photo[i : i + 7], range(i, i + 7), temperature)
    for i, drawing in enumerate(together):
        assert same(drawing, few[i])
        (alone,) = generator.draw(photo[i : i + 1], [i], temperature)
        assert same(drawing, alone)


def test_the_seed_matters_when_sampled_and_not_when_greedy() -> None:
    generator = small()
    photo = photos(1)
    first, again, other = (generator.draw(photo, [seed], 1.0)[0] for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)
    assert same(generator.draw(photo, [1])[0], generator.draw(photo, [2])[0])


def test_a_decoder_keeps_the_weights_it_was_made_of() -> None:
    generator = small()
    decoder = generator.decoder()
    photo = photos(1)
    (before,) = generator.draw(photo, [0])
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if not name.startswith("backbone"):
                parameter.mul_(-1.5)
    assert same(generator.draw(photo, [0], decoder=decoder)[0], before)
    assert not same(generator.draw(photo, [0])[0], before)


def test_drawings_are_canonical_and_keep_their_aspect() -> None:
    generator = small()
    for drawing in generator.draw(photos(8), range(8), 1.0):
        points = np.concatenate(drawing.strokes)
        low, high = points.min(0), points.max(0)
        np.testing.assert_allclose((low + high) / 2, 128, atol=1e-2)
        path = drawing.rows[drawing.rows[:, 4] == 0, :2].cumsum(0)
        drawn = np.ptp(path, axis=0)
        if len(points) > 1:
            scale = 190 / drawn.max()
            np.testing.assert_allclose(high - low, drawn * scale, rtol=1e-3, atol=1e-2)


def test_rows_of_a_drawing_are_stroke_5_and_stop_at_the_limit() -> None:
    generator = small()
    for drawing in generator.draw(photos(16), range(16), 1.0):
        assert (drawing.rows[:, 2:].sum(1) == 1).all()
        assert (drawing.rows[:-1, 4] == 0).all()
        assert bool(drawing.rows[-1, 4]) == drawing.ended
        points = len(drawing.rows) - drawing.ended
        assert sketches.count_points(drawing.strokes) == points
        assert points == 20 if not drawing.ended else 1 <= points <= 20
        if drawing.ended:
            assert (drawing.rows[-1, :2] == 0).all()


def test_a_generator_that_wants_to_end_at_once_draws_one_point() -> None:
    generator = small()
    with torch.no_grad():
        generator.output.bias[2] = 1e3
    for temperature in (0.0, 1.0):
        (drawing,) = generator.draw(photos(1), [0], temperature)
        assert drawing.ended
        assert sketches.count_points(drawing.strokes) == 1


def test_samples_at_temperature_one_follow_the_model() -> None:
    generator = small(max_points=2)
    count = 2000
    photo = photos(1)
    map_BCHW = generator.encode(photo).detach().expand(count, -1, -1, -1)
    drawings = generator.decoder().draw(map_BCHW, Noise.seeded(range(count), 3, 3, 1.0))
    first = np.stack([d.rows[0] for d in drawings])
    start = torch.zeros(1, 1, 5)
    raw: dict[str, Tensor] = {}
    generator.output.register_forward_hook(lambda _, __, out: raw.update(out=out.detach()))
    generator.nll(photo, start, torch.tensor([1]))
    pen = raw["out"][0, 0, :2].softmax(0).numpy()  # the first row is never the end
    mix = losses.mixture(raw["out"][0, 0, 3:])
    share = mix.log_pi.exp()
    mean = (share[:, None] * mix.mean).sum(0)
    sigma = mix.log_sigma.exp()
    variance = (share[:, None] * (sigma**2 + mix.mean**2)).sum(0) - mean**2
    product = (share * (mix.rho * sigma[:, 0] * sigma[:, 1] + mix.mean.prod(1))).sum()
    error = 4 / np.sqrt(count)
    assert first[:, 2].mean() == pytest.approx(pen[0], abs=error / 2)
    for axis in (0, 1):
        deviation = float(variance[axis].sqrt())
        assert first[:, axis].mean() == pytest.approx(float(mean[axis]), abs=error * deviation)
        assert first[:, axis].std() == pytest.approx(deviation, rel=0.1)
    spread = float(variance.prod().sqrt())
    covariance = float(product - mean.prod())
    assert np.cov(first[:, :2].T)[0, 1] == pytest.approx(covariance, abs=2 * error * spread)


def test_a_low_temperature_draws_what_is_likely() -> None:
    generator = small()
    photo = photos(12)
    per_row = [
        np.mean([d.log_prob / len(d.rows) for d in generator.draw(photo, range(12), temperature)])
        for temperature in (0.0, 0.5, 2.0)
    ]
    assert per_row[0] > per_row[1] > per_row[2]


def test_drawings_end_as_often_as_the_model_ends_them() -> None:
    generator = small(max_points=12)
    with torch.no_grad():
        generator.output.weight.zero_()
        generator.output.bias[:3] = torch.tensor([0.9, 0.0, 0.1]).log()
    count = 2000
    map_BCHW = generator.encode(photos(1)).detach().expand(count, -1, -1, -1)
    decoder = generator.decoder()
    for temperature, spread in ((1.0, 0.0), (0.0, None)):
        noise = Noise.seeded(range(count), 13, 3, temperature)
        points = np.array([len(d.rows) - d.ended for d in decoder.draw(map_BCHW, noise)])
        if spread is None:
            assert set(points) == {6}  # 0.9 ** 7 < 1 / 2 < 0.9 ** 6
        else:
            for length in range(2, 13):
                longer = float((points >= length).mean())
                assert longer == pytest.approx(0.9**length, abs=4 * 0.5 / np.sqrt(count))


def test_a_generator_trained_on_two_pairs_learns_when_to_stop() -> None:
    generator = small(train_backbone=False, max_points=30)
    counts = [5, 12]
    turns = [np.linspace(0, 2 * np.pi, count, endpoint=False) for count in counts]
    polygons = [np.stack([np.cos(turn), np.sin(turn)], 1).astype(np.float32) for turn in turns]
    drawn = [sketches.canonical([points]) for points in polygons]
    generator.set_offset_scale(sketches.offset_scale(drawn))
    points, length = padded([generator.rows(strokes) for strokes in drawn])
    colour_23 = torch.tensor([[250, 0, 0], [0, 0, 250]], dtype=torch.uint8)
    photo = colour_23[:, :, None, None].expand(2, 3, SIZE, SIZE)
    parameters = [p for p in generator.train().parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(200):
        terms = generator.nll(photo, points, length)
        optimizer.zero_grad()
        (terms["offset"] + terms["pen"]).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    drawings = generator.eval().draw(photo, range(2))
    assert all(d.ended for d in drawings)
    assert [len(d.rows) - 1 for d in drawings] == pytest.approx(counts, abs=3)


def test_the_scale_of_the_offsets_is_stored_with_the_weights() -> None:
    generator = small()
    generator.set_offset_scale(12.5)
    other = small(seed=1)
    other.load_state_dict(generator.state_dict())
    assert float(other.offset_scale) == 12.5
    sketch = [np.array([[128, 128], [153, 128]], np.float32)]
    assert other.rows(sketch)[1, 0] == 2.0


def test_wrong_arguments_are_refused() -> None:
    generator = small()
    with pytest.raises(ValueError, match="1 seeds for 2 photos"):
        generator.draw(photos(2), [0])
    with pytest.raises(ValueError, match="temperature"):
        generator.draw(photos(1), [0], -0.1)
