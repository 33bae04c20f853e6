from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbir_ray.config import GeneratorConfig, PenConfig
from sbir_ray.data import strokes as sketches
from sbir_ray.data.strokes import CENTRE, Strokes
from sbir_ray.models.drawing import DOWN, PEN_START
from sbir_ray.models.generator import Seen
from sbir_ray.models.pen import CELLS, INK, PenGenerator
from sbir_ray.train.pen_rows import Traced, framed, slipped
from tests.padding import padded

SIZE = 64
STILL = PenConfig(rotate=0.0, scale=0.0, shift=0.0)


def small(seed: int = 0, **changes: object) -> PenGenerator:
    """A pen of a few thousand weights (beside its backbone) whose drawings vary."""
    torch.manual_seed(seed)
    generator = PenGenerator(
        GeneratorConfig(
            weights="none",
            image_size=SIZE,
            mixtures=3,
            max_points=20,
            pen=PenConfig(width=24, heads=3, blocks=2),
        )
    )
    # The map of a deep random network is almost 0. This one's tells photos apart.
    channels, stride = generator.backbone.channels, generator.backbone.stride
    generator.backbone.body = nn.Sequential(
        nn.Conv2d(3, channels, stride, stride), nn.BatchNorm2d(channels), nn.ReLU()
    ).requires_grad_(False)
    generator.set_offset_scale(25.0)
    with torch.no_grad():
        generator.net.output.weight.mul_(4)
        generator.net.output.bias[2] = -2.0
    return generator.eval()


def photos(count: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=source)


def people(counts: Sequence[int], seed: int = 0) -> list[Strokes]:
    """Two-stroke sketches of so many points."""
    rng = np.random.default_rng(seed)
    drawn: list[Strokes] = []
    for count in counts:
        points = rng.uniform(0, 256, (count, 2)).astype(np.float32)
        drawn.append(sketches.canonical([points[: count // 2], points[count // 2 :]]))
    return drawn


# --------------------------------------------------------------------------- likelihood


def test_nll_does_not_depend_on_the_padding_nor_on_the_other_sketches() -> None:
    generator = small()
    rows = [generator.rows(sketch) for sketch in people([5, 20, 9])]
    photo = photos(3)
    with torch.no_grad():
        terms = generator.nll(photo, *padded(rows, extra=9))
        for i in range(3):
            alone = generator.nll(photo[i : i + 1], *padded(rows[i : i + 1]))
            for name in ("offset", "pen", "kl"):
                assert float(terms[name][i]) == pytest.approx(float(alone[name][0]), rel=1e-4)


def test_a_row_is_judged_by_what_is_before_it_alone() -> None:
    generator = small()
    [rows] = [generator.rows(sketch) for sketch in people([12])]
    other = rows.copy()
    other[6:-1, :2] += 1.0
    with torch.no_grad():
        code = generator.encode(photos(1))
        length = torch.tensor([13])
        first = generator.outputs(code, torch.from_numpy(rows)[None], length).raw_BTK
        second = generator.outputs(code, torch.from_numpy(other)[None], length).raw_BTK
    torch.testing.assert_close(first[:, :7], second[:, :7])
    assert not torch.allclose(first[:, 7:], second[:, 7:], atol=1e-3)


def test_the_photo_around_the_pen_the_hand_and_the_whole_photo_matter() -> None:
    generator = small()
    points, length = padded([generator.rows(sketch) for sketch in people([12])])
    with torch.no_grad():
        codes = generator.encode(photos(2))
        shown = [generator.outputs(code[None], points, length).raw_BTK for code in codes]
        before = torch.cat([torch.tensor(PEN_START).view(1, 1, 5), points[:, :-1]], 1)
        frame = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
        hands = [
            generator.outputs(
                codes[:1], points, length, seen=Seen(before, frame, torch.tensor([traced]))
            ).raw_BTK
            for traced in (False, True)
        ]
    assert not torch.allclose(shown[0], shown[1], atol=1e-3)
    torch.testing.assert_close(hands[0], shown[0])
    assert not torch.allclose(hands[0], hands[1], atol=1e-3)


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = small().double()
    points, length = padded([generator.rows(sketch) for sketch in people([5, 8])])
    code = generator.encode(photos(2)).double()

    def loss() -> Tensor:
        return generator.log_prob_of_code(code, points.double(), length).sum()

    loss().backward()
    net, step = generator.net, 1e-6
    for weight in (net.patch.weight, net.cell.weight, net.hand.weight, net.output.weight):
        place = int(weight.grad.abs().argmax())
        with torch.no_grad():
            flat = weight.view(-1)
            flat[place] += step
            above = float(loss())
            flat[place] -= 2 * step
            below = float(loss())
            flat[place] += step
        found = float(weight.grad.flatten()[place])
        assert found == pytest.approx((above - below) / (2 * step), rel=1e-4)


def test_the_last_layer_alone_can_learn() -> None:
    generator = small()
    points, length = padded([generator.rows(sketch) for sketch in people([5])])
    generator.log_prob(photos(1), points, length, last_only=True).sum().backward()
    trained = {name for name, value in generator.named_parameters() if value.grad is not None}
    assert trained == {"net.output.weight", "net.output.bias"}


def test_attention_is_a_distribution_up_to_the_end() -> None:
    generator = small()
    points, length = padded([generator.rows(sketch) for sketch in people([5, 9])])
    with torch.no_grad():
        looks = generator.nll(photos(2), points, length, attention=True)["attention"]
    assert looks.shape == (2, 10, CELLS, CELLS)
    torch.testing.assert_close(looks.sum((2, 3))[0, :6], torch.ones(6))
    assert float(looks[0, 6:].abs().sum()) == 0


# --------------------------------------------------------------------------- what the pen knows


def test_the_pen_knows_where_it_is_where_its_stroke_began_and_its_ink() -> None:
    generator = small()
    strokes: Strokes = [
        np.array([[30, 40], [90, 40], [90, 100]], np.float32),
        np.array([[150, 200], [200, 150]], np.float32),
    ]
    rows = torch.from_numpy(generator.rows(strokes))
    before = torch.cat([torch.tensor([PEN_START]), rows[:-1]])[None]
    pen = generator._pen(before)
    points = np.concatenate(strokes)
    np.testing.assert_allclose(pen.place_BT2[0, 0], [CENTRE, CENTRE])
    np.testing.assert_allclose(pen.place_BT2[0, 1:], points, atol=1e-3)
    np.testing.assert_allclose(pen.start_BT2[0, 1:], points[[0, 0, 0, 3, 3]], atol=1e-3)
    for row in range(1, 6):
        want = slow_ink(strokes, points_drawn=row)
        np.testing.assert_allclose(pen.ink_BTG[0, row], want, atol=1e-4)


def slow_ink(strokes: Strokes, points_drawn: int) -> np.ndarray:
    """exp(-d^2 / 72) of the distance to the nearest segment among the points drawn, by cells."""
    segments, left = [], points_drawn
    for stroke in strokes:
        part = stroke[: max(0, left)]
        segments += itertools.pairwise(part)
        left -= len(stroke)
    ink = np.zeros((INK, INK))
    for row in range(INK):
        for column in range(INK):
            place = (np.array([column, row]) + 0.5) * 256 / INK
            for start, end in segments:
                along = end - start
                share = np.clip((place - start) @ along / (along @ along), 0, 1)
                far = np.linalg.norm(start + share * along - place)
                ink[row, column] = max(ink[row, column], np.exp(-(far**2) / 72))
    return ink.ravel()


def test_a_moved_sketch_in_its_frame_looks_at_the_same_places_of_the_photo() -> None:
    """Turned by a quarter with its photo, the pen sees around it what it saw before."""
    generator = small()
    code = generator.encode(photos(1))
    quarter = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]])
    with torch.no_grad():
        straight = generator.look_with(generator.net, code)
        turned = generator.look_with(generator.net, code, quarter)
    # Cell (x, y) of the turned canvas shows the photo at (y, -x) from the centre.
    local = [
        (look.memory_BND - generator.net.cell.bias).view(CELLS, CELLS, -1)
        for look in (straight, turned)
    ]
    waves = generator.net.cell.weight[:, -24:]
    places = generator.net.cells_N2
    from sbir_ray.models.pen import _waves

    where = (_waves((places - CENTRE) / CENTRE) @ waves.T).view(CELLS, CELLS, -1)
    seen = [part - where for part in local]
    for y in range(CELLS):
        for x in range(CELLS):
            torch.testing.assert_close(
                seen[1][y, x], seen[0][CELLS - 1 - x, y], atol=1e-4, rtol=1e-4
            )


def test_framed_sketches_lead_back_to_the_photo() -> None:
    config = PenConfig(rotate=20.0, scale=0.2, shift=15.0)
    [sketch] = people([9])
    moved, frame = framed(sketch, np.random.default_rng(3), config)
    assert np.abs(np.concatenate(moved) - np.concatenate(sketch)).max() > 3
    for stroke, was in zip(moved, sketch, strict=True):
        back = (stroke - CENTRE) @ frame[:, :2].T + frame[:, 2] + CENTRE
        np.testing.assert_allclose(back, was, atol=1e-3)
    same, frame = framed(sketch, np.random.default_rng(3), STILL)
    np.testing.assert_allclose(frame, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(np.concatenate(same), np.concatenate(sketch))


def test_a_slipped_pen_is_led_back_to_the_sketch() -> None:
    rows = small().rows(people([12])[0])
    slips = 0
    for seed in range(20):
        before, target = slipped(rows, 0.2, np.random.default_rng(seed))
        pen = before[:, :2].cumsum(0)
        np.testing.assert_allclose(pen[:-1] + target[:-1, :2], rows[:-1, :2].cumsum(0), atol=1e-5)
        np.testing.assert_array_equal(before[1:, 2:], rows[:-1, 2:])
        np.testing.assert_array_equal(target[:, 2:], rows[:, 2:])
        np.testing.assert_array_equal(before[0], PEN_START)
        slips += bool(np.abs(target[:-1, :2] - rows[:-1, :2]).max() > 1e-3)
    assert 10 < slips < 20
    before, target = slipped(rows, 0.0, np.random.default_rng(0))
    np.testing.assert_allclose(target, rows, atol=1e-6)


def test_photos_without_contours_are_left_out() -> None:
    blank = np.full((3, SIZE, SIZE), 255, np.uint8)
    square = blank.copy()
    square[:, 16:48, 16:48] = 0
    traced = Traced.of(np.stack([blank, square]), max_points=20, epsilon=5.0)
    assert traced.photo == [1]
    assert sketches.count_points(traced.sketches[0]) <= 20


# --------------------------------------------------------------------------- drawing


def test_a_drawings_log_probability_is_that_of_its_rows() -> None:
    generator = small()
    photo = photos(6)
    drawings = generator.draw(photo, list(range(6)), 1.0)
    assert len({len(drawing.rows) for drawing in drawings}) > 1
    points, length = padded([drawing.rows for drawing in drawings])
    with torch.no_grad():
        log_prob = generator.log_prob(photo, points, length).sum(1)
    for drawing, found in zip(drawings, log_prob.tolist(), strict=True):
        assert drawing.log_prob == pytest.approx(found, rel=1e-3)


def test_a_drawing_does_not_depend_on_the_others() -> None:
    generator = small()
    photo, seeds = photos(19), list(range(19))
    drawings = generator.draw(photo, seeds, 1.0)
    order = np.random.default_rng(0).permutation(19)
    again = generator.draw(photo[order], [seeds[i] for i in order], 1.0)
    alone = generator.draw(photo[7:8], [7], 1.0)
    for place, i in enumerate(order):
        assert again[place].rows.tobytes() == drawings[i].rows.tobytes()
        assert again[place].log_prob == drawings[i].log_prob
    assert alone[0].rows.tobytes() == drawings[7].rows.tobytes()


def test_drawing_goes_on_with_the_weights_of_its_decoder() -> None:
    generator = small()
    decoder = generator.decoder()
    first = generator.draw(photos(2), [0, 1], 1.0, decoder=decoder)
    with torch.no_grad():
        for weight in generator.net.parameters():
            weight.add_(0.05)
    same = generator.draw(photos(2), [0, 1], 1.0, decoder=decoder)
    other = generator.draw(photos(2), [0, 1], 1.0)
    assert first[0].rows.tobytes() == same[0].rows.tobytes()
    assert first[0].rows.tobytes() != other[0].rows.tobytes()


def test_sampled_drawings_have_the_models_statistics() -> None:
    """The first point's pen state and place, over many seeds."""
    generator = small()
    photo = photos(1).expand(400, -1, -1, -1)
    drawings = generator.draw(photo, list(range(400)), 1.0)
    with torch.no_grad():
        raw = generator.outputs(
            generator.encode(photo[:1]), torch.zeros(1, 1, 5), torch.tensor([1])
        ).raw_BTK[0, 0]
    down = float(raw[:2].softmax(0)[DOWN])
    found = np.mean([drawing.rows[0, 2 + DOWN] for drawing in drawings])
    assert found == pytest.approx(down, abs=4 * (down * (1 - down) / 400) ** 0.5)
    from sbir_ray.losses import mixture

    mix = mixture(raw[3:])
    mean = (mix.log_pi.exp()[:, None] * mix.mean).sum(0)
    spread = (mix.log_pi.exp()[:, None] * (mix.log_sigma.exp() ** 2 + mix.mean**2)).sum(0)
    sigma = (spread - mean**2).sqrt()
    offsets = torch.tensor(np.stack([drawing.rows[0, :2] for drawing in drawings]))
    assert torch.all((offsets.mean(0) - mean).abs() < 4 * sigma / 400**0.5)


def test_redrawn_points_are_those_drawn_and_have_a_gradient() -> None:
    generator = small()
    photo = photos(6)
    drawings = generator.draw(photo, list(range(6)), 1.0)
    points, length = padded([drawing.rows for drawing in drawings])
    path, pen = generator.redraw_of_code(generator.encode(photo), points, length)
    for drawing, found in zip(drawings, path, strict=True):
        drawn = np.concatenate(drawing.strokes)
        np.testing.assert_allclose(found[: len(drawn)].detach(), drawn, atol=0.05)
    ((path**3).sum() + pen.sum()).backward()
    assert float(generator.net.patch.weight.grad.abs().sum()) > 0
