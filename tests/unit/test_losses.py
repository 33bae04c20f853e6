"""Each loss against a slow loop over plain numbers, its gradient, and its corner cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbir_ray import losses
from tests.numbers_by_hand import backward, distance, dot, gradcheck, unit

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
