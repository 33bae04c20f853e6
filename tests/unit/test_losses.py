"""Each loss against a slow loop over plain numbers, its gradient, and its corner cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbir_ray import losses


def unit(rows: int, dim: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def backward(value: Tensor) -> None:
    torch.autograd.backward(value.sum())


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> bool:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return bool(torch.autograd.gradcheck(function, leaves))


# --------------------------------------------------------------------------- InfoNCE

PHOTO_OF = torch.tensor([0, 2, 2, 1, 0])  # two photos have two sketches; photo 3 has none
WEIGHT = torch.tensor([1.0, 1.0, 0.25, 0.0, 1.7], dtype=torch.float64)


def slow_info_nce(
    sketch: Tensor, photo: Tensor, photo_of: Tensor, temperature: float, weight: Tensor
) -> list[float]:
    values = []
    for b, p in enumerate(photo_of.tolist()):
        own = math.exp(dot(sketch[b], photo[p]) / temperature)
        photos = own
        for q in range(len(photo)):
            if q != p:
                photos += math.exp(dot(sketch[b], photo[q]) / temperature)
        sketches = own
        for c, q in enumerate(photo_of.tolist()):
            if q != p:
                sketches += float(weight[c]) * math.exp(dot(photo[p], sketch[c]) / temperature)
        values.append(-(math.log(own / photos) + math.log(own / sketches)) / 2)
    return values


def test_info_nce_equals_the_loop_with_shared_photos_weights_and_extra_photos() -> None:
    sketch, photo = unit(5), unit(4, seed=1)
    expected = slow_info_nce(sketch, photo, PHOTO_OF, 0.2, WEIGHT)
    assert losses.info_nce(sketch, photo, PHOTO_OF, 0.2, WEIGHT).tolist() == pytest.approx(expected)


def test_info_nce_gradient_is_right_where_weights_are_zero() -> None:
    def function(sketch: Tensor, photo: Tensor) -> Tensor:
        return losses.info_nce(sketch, photo, PHOTO_OF, 0.5, WEIGHT)

    assert gradcheck(function, unit(5), unit(4, seed=1))


def test_info_nce_of_orthogonal_pairs_is_a_known_number() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    value = losses.info_nce(eye, eye, torch.arange(3), 1.0, torch.ones(3))
    assert value.tolist() == pytest.approx([math.log(1 + 2 / math.e)] * 3)


def test_info_nce_of_a_single_pair_is_zero_with_zero_gradient() -> None:
    sketch, photo = unit(1).requires_grad_(), unit(1, seed=1).requires_grad_()
    value = losses.info_nce(sketch, photo, torch.tensor([0]), 0.07, torch.ones(1))
    backward(value)
    assert value.tolist() == pytest.approx([0.0])
    assert sketch.grad is not None
    assert sketch.grad.abs().max() < 1e-9


def test_sketches_of_one_photo_are_never_each_others_negatives() -> None:
    sketch, photo = unit(3).requires_grad_(), unit(1, seed=1).requires_grad_()
    value = losses.info_nce(sketch, photo, torch.zeros(3, dtype=torch.int64), 0.07, torch.ones(3))
    backward(value)
    assert value.tolist() == pytest.approx([0.0] * 3)
    assert sketch.grad is not None
    assert sketch.grad.abs().max() < 1e-9


def test_a_row_of_weight_zero_leaves_the_other_rows_as_without_it() -> None:
    sketch, photo = unit(5), unit(4, seed=1)
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    with_it = losses.info_nce(sketch, photo, PHOTO_OF, 0.07, weight)[:4]
    without = losses.info_nce(sketch[:4], photo, PHOTO_OF[:4], 0.07, weight[:4])
    assert torch.allclose(with_it, without)


def test_weights_all_zero_leave_only_the_photos_as_negatives() -> None:
    sketch, photo = unit(5).requires_grad_(), unit(4, seed=1)
    value = losses.info_nce(sketch, photo, PHOTO_OF, 0.1, torch.zeros(5))
    backward(value)
    expected = slow_info_nce(sketch.detach(), photo, PHOTO_OF, 0.1, torch.zeros(5))
    assert value.tolist() == pytest.approx(expected)
    assert sketch.grad is not None
    assert sketch.grad.isfinite().all()


def test_a_weight_of_two_counts_as_two_sketches() -> None:
    sketch, photo = unit(2), unit(2, seed=1)
    twice = torch.cat([sketch, sketch[1:]])
    heavy = losses.info_nce(sketch, photo, torch.tensor([0, 1]), 0.1, torch.tensor([1.0, 2.0]))
    double = losses.info_nce(twice, photo, torch.tensor([0, 1, 1]), 0.1, torch.ones(3))
    assert float(heavy[0]) == pytest.approx(float(double[0]))


def test_info_nce_passes_no_gradient_to_the_weights() -> None:
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    sketch = unit(5).requires_grad_()
    backward(losses.info_nce(sketch, unit(4, seed=1), PHOTO_OF, 0.1, weight))
    assert weight.grad is None


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(5)), st.permutations(range(4)))
def test_info_nce_does_not_depend_on_the_order_in_which_workers_are_gathered(
    rows: list[int], columns: list[int]
) -> None:
    sketch, photo = unit(5), unit(4, seed=1)
    value = losses.info_nce(sketch, photo, PHOTO_OF, 0.1, WEIGHT)
    place = torch.tensor([columns.index(p) for p in PHOTO_OF.tolist()])
    moved = losses.info_nce(sketch[rows], photo[columns], place[rows], 0.1, WEIGHT[rows])
    assert torch.allclose(moved, value[rows])


def test_two_workers_gradients_add_up_to_that_of_one() -> None:
    """Each worker has the gathered batch, of which only its own rows carry a gradient."""
    sketch, photo, photo_of = unit(6), unit(6, seed=1), torch.arange(6)
    whole = sketch.clone().requires_grad_()
    backward(losses.info_nce(whole, photo, photo_of, 0.1, torch.ones(6)).mean())
    parts = []
    for own in (slice(0, 3), slice(3, 6)):
        local = sketch[own].clone().requires_grad_()
        gathered = torch.cat([local if own.start == at else sketch[at : at + 3] for at in (0, 3)])
        backward(losses.info_nce(gathered, photo, photo_of, 0.1, torch.ones(6)).mean())
        parts.append(local.grad)
    assert whole.grad is not None
    assert torch.allclose(torch.cat([p for p in parts if p is not None]), whole.grad)


def test_info_nce_is_finite_where_the_exponentials_overflow() -> None:
    sketch = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    value = losses.info_nce(sketch, -sketch, torch.arange(2), 0.01, torch.ones(2))
    assert value.tolist() == pytest.approx([200.0, 200.0])


# --------------------------------------------------------------------------- triplet


def test_triplet_equals_the_loop_with_plain_distances() -> None:
    sketch, photo = unit(5), unit(4, seed=1)
    negative = torch.tensor([1, 0, 3, 3, 2])
    expected = []
    for b in range(5):
        near = distance(sketch[b], photo[int(PHOTO_OF[b])])
        far = distance(sketch[b], photo[int(negative[b])])
        expected.append(max(0.0, 0.3 + near - far))
    value = losses.triplet(sketch, photo, PHOTO_OF, 0.3, negative)
    assert value.tolist() == pytest.approx(expected)
    assert 0.0 in expected
    assert max(expected) > 0.0


def test_triplet_gradient_is_right() -> None:
    def function(sketch: Tensor, photo: Tensor) -> Tensor:
        return losses.triplet(sketch, photo, PHOTO_OF, 0.3)

    assert gradcheck(function, unit(5), unit(4, seed=1))


def test_triplet_gradient_is_finite_where_sketch_and_photo_coincide() -> None:
    sketch = unit(2).requires_grad_()
    backward(losses.triplet(sketch, sketch.detach(), torch.arange(2), 3.0))
    assert sketch.grad is not None
    assert sketch.grad.isfinite().all()


def test_triplet_refuses_the_pairs_own_photo_as_negative() -> None:
    with pytest.raises(ValueError, match="own photo"):
        losses.triplet(unit(2), unit(2), torch.tensor([0, 1]), 0.3, torch.tensor([1, 1]))


def test_triplet_refuses_a_batch_of_one_photo() -> None:
    with pytest.raises(ValueError, match="two photos"):
        losses.triplet(unit(2), unit(1), torch.tensor([0, 0]), 0.3)


def test_mean_triplet_is_the_mean_over_every_other_photo() -> None:
    sketch, photo = unit(5), unit(4, seed=1)
    expected = []
    for b, own in enumerate(PHOTO_OF.tolist()):
        near = distance(sketch[b], photo[own])
        far = [distance(sketch[b], photo[other]) for other in range(4) if other != own]
        expected.append(sum(max(0.0, 0.3 + near - away) for away in far) / 3)
    value = losses.mean_triplet(sketch, photo, PHOTO_OF, 0.3)
    assert value.tolist() == pytest.approx(expected)
    assert min(expected) < 0.1 < max(expected)


def test_mean_triplet_gradient_is_right_and_finite_where_sketch_and_photo_coincide() -> None:
    def function(sketch: Tensor, photo: Tensor) -> Tensor:
        return losses.mean_triplet(sketch, photo, PHOTO_OF, 0.3)

    assert gradcheck(function, unit(5), unit(4, seed=1))
    sketch = unit(3).requires_grad_()
    backward(losses.mean_triplet(sketch, sketch.detach(), torch.arange(3), 3.0))
    assert sketch.grad is not None
    assert sketch.grad.isfinite().all()


def test_mean_triplet_refuses_a_single_photo() -> None:
    with pytest.raises(ValueError, match="two photos"):
        losses.mean_triplet(unit(2), unit(1), torch.tensor([0, 0]), 0.3)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6).flatmap(lambda p: st.tuples(st.just(p), st.lists(st.integers(0, p - 1)))))
def test_the_negative_that_triplet_chooses_is_always_another_photo(
    drawn: tuple[int, list[int]],
) -> None:
    photos, photo_of = drawn
    # Every sketch is at its photo, all photos are one apart: any other choice would cost 0.5.
    eye = torch.eye(photos, dtype=torch.float64) / math.sqrt(2)
    value = losses.triplet(eye[photo_of], eye, torch.tensor(photo_of, dtype=torch.int64), 0.5)
    assert value.tolist() == [0.0] * len(photo_of)


# --------------------------------------------------------------------------- weights

CERTAINTY = torch.tensor([0.9, 0.2, 0.6, 0.1])
LABELLED = torch.tensor([True, False, False, False])


def test_raw_weights_are_the_certainty_and_one_for_labelled_pairs() -> None:
    value = losses.instance_weights(CERTAINTY, LABELLED, "raw")
    assert value.tolist() == pytest.approx([1.0, 0.2, 0.6, 0.1])


def test_normalised_weights_have_mean_one_over_the_pseudo_pairs() -> None:
    value = losses.instance_weights(CERTAINTY, LABELLED, "normalised")
    assert value.tolist() == pytest.approx([1.0, 2 / 3, 2.0, 1 / 3])


def test_weights_of_kind_none_are_one() -> None:
    assert losses.instance_weights(CERTAINTY, LABELLED, "none").tolist() == [1.0] * 4


def test_normalised_weights_are_zero_where_every_certainty_is() -> None:
    value = losses.instance_weights(
        torch.zeros(3), torch.tensor([True, False, False]), "normalised"
    )
    assert value.tolist() == [1.0, 0.0, 0.0]


def test_normalised_weights_of_labelled_pairs_alone_are_one() -> None:
    value = losses.instance_weights(torch.ones(2), torch.tensor([True, True]), "normalised")
    assert value.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["raw", "normalised", "none"])
def test_weights_carry_no_gradient(kind: str) -> None:
    certainty = CERTAINTY.clone().requires_grad_()
    assert not losses.instance_weights(certainty, LABELLED, kind).requires_grad  # type: ignore[arg-type]


# --------------------------------------------------------------------------- distillation


def slow_distillation(
    kind: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> list[float]:
    (s, p), (ts, tp) = student, teacher
    everything, teachers = [*s, *p], [*ts, *tp]
    values = []
    for b, of in enumerate(PHOTO_OF.tolist()):
        if kind == "pair":
            values.append(abs(distance(ts[b], tp[of]) - distance(s[b], p[of])))
        elif kind == "absolute":
            values.append((distance(ts[b], s[b]) + distance(tp[of], p[of])) / 2)
        else:
            total = 0.0
            for row in (b, len(s) + of):
                for other in range(len(everything)):
                    wanted = distance(teachers[row], teachers[other])
                    total += abs(wanted - distance(everything[row], everything[other]))
            values.append(total / 2 / (len(everything) - 1))
    return values


@pytest.mark.parametrize("kind", ["pair", "absolute", "relational"])
def test_distillation_equals_the_loop(kind: str) -> None:
    student, teacher = (unit(5), unit(4, seed=1)), (unit(5, seed=2), unit(4, seed=3))
    value = losses.distillation(kind, student, teacher, PHOTO_OF)  # type: ignore[arg-type]
    assert value.tolist() == pytest.approx(slow_distillation(kind, student, teacher))


@pytest.mark.parametrize("kind", ["pair", "absolute", "relational"])
def test_distillation_gradient_is_right(kind: str) -> None:
    teacher = (unit(5, seed=2), unit(4, seed=3))

    def function(sketch: Tensor, photo: Tensor) -> Tensor:
        return losses.distillation(kind, (sketch, photo), teacher, PHOTO_OF)  # type: ignore[arg-type]

    assert gradcheck(function, unit(5), unit(4, seed=1))


@pytest.mark.parametrize("kind", ["pair", "absolute", "relational"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_a_finite_gradient(kind: str) -> None:
    sketch, photo = unit(5).requires_grad_(), unit(4, seed=1).requires_grad_()
    value = losses.distillation(kind, (sketch, photo), (sketch, photo), PHOTO_OF)  # type: ignore[arg-type]
    backward(value)
    assert value.tolist() == pytest.approx([0.0] * 5, abs=1e-12)
    assert sketch.grad is not None
    assert sketch.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["pair", "absolute", "relational"])
def test_distillation_does_not_reach_the_teacher(kind: str) -> None:
    teacher = (unit(5, seed=2).requires_grad_(), unit(4, seed=3).requires_grad_())
    student = (unit(5).requires_grad_(), unit(4, seed=1))
    backward(losses.distillation(kind, student, teacher, PHOTO_OF))  # type: ignore[arg-type]
    assert teacher[0].grad is None
    assert teacher[1].grad is None


def test_relational_distillation_sees_a_change_that_the_pairs_own_distance_hides() -> None:
    """Both embeddings of a pair moved alike: Eq. 6 is blind to it."""
    sketch, photo = unit(2), unit(2, seed=1)
    moved = (sketch * torch.tensor([[-1.0], [1.0]]), photo * torch.tensor([[-1.0], [1.0]]))
    own = torch.arange(2)
    assert losses.distillation("pair", moved, (sketch, photo), own)[0] < 1e-12
    assert losses.distillation("relational", moved, (sketch, photo), own)[0] > 0.1


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
