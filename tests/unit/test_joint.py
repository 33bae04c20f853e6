"""The update's losses are the paper's equations, written out slowly."""

import math

import pytest
import torch

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig, RetrievalLossConfig
from sbir_ray.joint import (
    PairRows,
    discriminator_losses,
    ema_,
    generator_losses,
    joint_generator_losses,
    ramp,
    retrieval_losses,
    rewards,
    soft_losses,
)
from sbir_ray.joint_config import PolicyConfig


def rows(seed=0, labelled=(1, 1, 1, 0, 0), certainty=(1, 1, 1, 0.8, 0.2), extra=2, kept=None):
    torch.manual_seed(seed)
    count = len(labelled)
    unit = torch.nn.functional.normalize
    return PairRows(
        sketch_BD=unit(torch.randn(count, 6, dtype=torch.float64)).requires_grad_(),
        photo_PD=unit(torch.randn(count + extra, 6, dtype=torch.float64)),
        photo_of_B=torch.arange(count),
        labelled_B=torch.tensor(labelled, dtype=torch.bool),
        certainty_B=torch.tensor(certainty, dtype=torch.float64),
        kept_B=None if kept is None else torch.tensor(kept, dtype=torch.bool),
    )


def test_equation_7_by_hand_with_triplets():
    config = RetrievalLossConfig(
        kind="triplet", certainty="raw", distill="pair", distill_weight=0.1, pseudo_weight=0.5
    )
    student, teacher = rows(0), rows(1)
    found = retrieval_losses(student, config, teacher)

    def distance(a, b):
        return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))

    trip, kept = [], []
    for i in range(5):
        near = distance(student.sketch_BD[i].detach(), student.photo_PD[i])
        far = distance(student.sketch_BD[i].detach(), student.photo_PD[i + 1])
        trip.append(max(0.0, 0.3 + near - far))
        theirs = distance(teacher.sketch_BD[i].detach(), teacher.photo_PD[i])
        kept.append(abs(theirs - near))
    labelled = sum(trip[:3]) / 3
    pseudo = (0.8 * trip[3] + 0.2 * trip[4]) / 2
    expected = labelled + 0.5 * pseudo + 0.1 * sum(kept) / 5
    assert float(found["loss"].detach()) == pytest.approx(expected)
    assert float(found["certainty"]) == pytest.approx(0.5)


def test_without_pseudo_pairs_and_teacher_the_loss_is_the_labelled_one():
    student = rows(labelled=(1, 1, 1), certainty=(1, 1, 1), extra=0)
    found = retrieval_losses(student, RetrievalLossConfig())
    value = losses.info_nce(
        student.sketch_BD, student.photo_PD, student.photo_of_B, 0.07, torch.ones(3)
    )
    assert set(found) == {"loss", "labelled"}
    torch.testing.assert_close(found["loss"], value.mean())


def test_a_pseudo_pair_of_certainty_zero_teaches_nothing():
    student = rows(certainty=(1, 1, 1, 0.5, 0.0))
    retrieval_losses(student, RetrievalLossConfig(certainty="raw", distill="none"))[
        "loss"
    ].backward()
    assert student.sketch_BD.grad[3].abs().max() > 0
    assert student.sketch_BD.grad[4].abs().max() == 0


def test_normalised_certainty_keeps_the_share_of_the_pseudo_pairs():
    def pseudo(certainty, kind):
        config = RetrievalLossConfig(kind="triplet", certainty=kind, distill="none")
        return retrieval_losses(rows(certainty=certainty), config)["pseudo"]

    low, high = (1, 1, 1, 0.08, 0.02), (1, 1, 1, 0.8, 0.2)
    torch.testing.assert_close(pseudo(low, "normalised"), pseudo(high, "normalised"))
    torch.testing.assert_close(10 * pseudo(low, "raw"), pseudo(high, "raw"))


def test_more_photos_as_negatives_raise_the_loss():
    few, many = (
        retrieval_losses(rows(extra=extra), RetrievalLossConfig(distill="none"))["labelled"]
        for extra in (0, 8)
    )
    assert many > few


def test_a_teacher_that_is_the_student_pulls_nowhere():
    student = rows()
    for kind in ("pair", "absolute", "relational"):
        config = RetrievalLossConfig(distill=kind)
        found = retrieval_losses(student, config, student)["distill"]
        assert float(found.detach()) == pytest.approx(0)


@pytest.mark.parametrize("kind", ["infonce", "triplet"])
@pytest.mark.parametrize("distill", ["pair", "relational", "absolute", "none"])
def test_a_pair_that_was_filtered_out_leaves_its_photo_as_a_negative_alone(kind, distill):
    config = RetrievalLossConfig(kind=kind, certainty="normalised", distill=distill)
    many, teacher = rows(kept=(1, 1, 1, 0, 1)), rows(1)
    found = retrieval_losses(many, config, teacher)
    chosen = [0, 1, 2, 4]

    def without(full):
        return PairRows(
            sketch_BD=full.sketch_BD.detach()[chosen].requires_grad_(),
            photo_PD=full.photo_PD,
            photo_of_B=full.photo_of_B[chosen],
            labelled_B=full.labelled_B[chosen],
            certainty_B=full.certainty_B[chosen],
        )

    few = without(many)
    expected = retrieval_losses(few, config, without(teacher))
    assert float(found.pop("kept")) == 0.5
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    found["loss"].backward()
    expected["loss"].backward()
    torch.testing.assert_close(many.sketch_BD.grad[chosen], few.sketch_BD.grad)
    assert not many.sketch_BD.grad[3].any()


@pytest.mark.parametrize("certainty", ["raw", "normalised"])
def test_a_batch_without_any_kept_pseudo_pair_has_all_terms_and_a_finite_gradient(certainty):
    student = rows(kept=(1, 1, 1, 0, 0))
    found = retrieval_losses(student, RetrievalLossConfig(certainty=certainty), rows(1))
    assert set(found) == {"loss", "labelled", "pseudo", "certainty", "kept", "distill"}
    assert [float(found[name].detach()) for name in ("pseudo", "certainty", "kept")] == [0, 0, 0]
    found["loss"].backward()
    assert student.sketch_BD.grad.isfinite().all()
    assert student.sketch_BD.grad[:3].any()
    assert not student.sketch_BD.grad[3:].any()


def test_labelled_pairs_are_never_filtered_out():
    found = retrieval_losses(rows(kept=(0, 0, 0, 1, 1)), RetrievalLossConfig())
    expected = retrieval_losses(rows(), RetrievalLossConfig())
    torch.testing.assert_close(found["loss"], expected["loss"])


def test_the_ramp_multiplies_the_pseudo_pairs_term_alone():
    config = RetrievalLossConfig(pseudo_weight=0.5)
    none, some, whole = (
        retrieval_losses(rows(), config, rows(1), pseudo_ramp=share) for share in (0.0, 0.4, 1.0)
    )
    for name in ("labelled", "pseudo", "distill"):
        torch.testing.assert_close(none[name], whole[name])
    for found, share in ((none, 0.0), (some, 0.4), (whole, 1.0)):
        expected = whole["labelled"] + 0.5 * share * whole["pseudo"] + 0.1 * whole["distill"]
        torch.testing.assert_close(found["loss"], expected)


def test_ramp_is_zero_then_linear_then_one():
    assert [ramp(step, 2, 4) for step in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [ramp(step, 2, 0) for step in range(4)] == [0, 0, 1, 1]
    assert ramp(0, 0, 0) == 1


def test_the_running_average_of_a_network():
    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))

    teacher, model = network(0), network(1)
    model(torch.randn(5, 2))
    tensors = list(teacher.state_dict().values())
    expected = {
        name: 0.9 * old + 0.1 * new if old.is_floating_point() else new.clone()
        for (name, old), new in zip(
            teacher.state_dict().items(), model.state_dict().values(), strict=True
        )
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema_(teacher, model, 0.9)
    for (name, value), same in zip(teacher.state_dict().items(), tensors, strict=True):
        torch.testing.assert_close(value, expected[name])
        assert value.data_ptr() == same.data_ptr()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert int(teacher[1].num_batches_tracked) == 1


def test_equation_8_by_hand_with_every_other_photo_as_the_negative():
    student = rows(extra=1)
    config = PolicyConfig(retrieval_weight=0.7, certainty_weight=2.0)
    certainty = torch.rand(5, dtype=torch.float64)
    found = rewards(student.sketch_BD, student.photo_PD, student.photo_of_B, certainty, 0.3, config)
    for b in range(5):
        away = [float((student.sketch_BD[b].detach() - p).norm()) for p in student.photo_PD]
        losses_b = [max(0.0, 0.3 + away[b] - away[p]) for p in range(6) if p != b]
        expected = 2.0 * float(certainty[b]) - 0.7 * sum(losses_b) / 5
        assert float(found[b].detach()) == pytest.approx(expected)


def test_the_reward_has_the_expectation_of_the_papers_single_negative():
    student = rows(extra=1)
    config = PolicyConfig()
    batch = (student.sketch_BD.detach(), student.photo_PD, student.photo_of_B)
    found = rewards(*batch, torch.zeros(5), 0.3, config)
    single = [
        losses.triplet(*batch, 0.3, (student.photo_of_B + shift) % 6) for shift in range(1, 6)
    ]
    torch.testing.assert_close(found, -torch.stack(single).mean(0))


def test_the_soft_loss_is_minus_the_mean_reward_with_its_gradient():
    config = PolicyConfig(retrieval_weight=0.7, certainty_weight=2.0)
    retrieval = torch.tensor([0.5, 0.1], requires_grad=True)
    certainty = torch.tensor([0.2, 0.9], requires_grad=True)
    found = soft_losses(retrieval, certainty, config)
    assert float(found.detach()) == pytest.approx(0.35 * 0.6 - 1.1)
    found.backward()
    assert retrieval.grad.tolist() == pytest.approx([0.35, 0.35])
    assert certainty.grad.tolist() == pytest.approx([-1.0, -1.0])


def test_the_generators_loss_is_the_sum_of_its_weighted_parts():
    vae = {name: torch.tensor(v) for name, v in (("loss", 3.0), ("offset", 2.0), ("pen", 1.0))}
    policy = {"policy": torch.tensor(-0.5), "reward": torch.tensor(0.7)}
    config = PolicyConfig(weight=10.0, soft_weight=2.0)
    soft = torch.tensor(0.25)
    both = joint_generator_losses(vae, config, 0.5, policy, soft)
    assert float(both["loss"]) == pytest.approx(3 + 0.5 * (10 * -0.5 + 2 * 0.25))
    assert set(both) == {"loss", "offset", "pen", "policy", "reward", "soft"}
    assert float(joint_generator_losses(vae, config, 0.5, policy)["loss"]) == pytest.approx(0.5)
    assert float(joint_generator_losses(vae, config, 0.5, soft=soft)["loss"]) == pytest.approx(3.25)
    alone = joint_generator_losses(vae, config, 1.0)
    assert {name: float(value) for name, value in alone.items()} == {
        "loss": 3.0,
        "offset": 2.0,
        "pen": 1.0,
    }


def test_equation_3_with_a_rising_weight_of_the_divergence():
    terms = {
        k: torch.tensor(v)
        for k, v in {"offset": [1.0, 3.0], "pen": [0.5, 0.5], "kl": [4.0, 0.0]}.items()
    }
    config = GeneratorConfig(kl_weight=2.0, kl_start=0.25, kl_decay=0.5)
    first, later = generator_losses(terms, config, 0), generator_losses(terms, config, 1)
    assert float(first["loss"]) == pytest.approx(2 + 0.5 + 2 * 0.25 * 2)
    assert float(later["loss"]) == pytest.approx(2 + 0.5 + 2 * (1 - 0.75 * 0.5) * 2)


def test_equation_5_with_and_without_wrong_photos():
    real, drawn, wrong = (torch.full((2, 1, 3, 3), x) for x in (2.0, -1.0, 0.5))
    sigmoid = torch.sigmoid(torch.tensor([2.0, -1.0, 0.5]))
    plain = discriminator_losses(real, drawn, None)
    expected = -math.log(sigmoid[0]) - math.log(1 - sigmoid[1])
    assert float(plain["loss"]) == pytest.approx(expected, rel=1e-5)
    aware = discriminator_losses(real, drawn, wrong)
    expected = -math.log(sigmoid[0]) - 0.5 * (math.log(1 - sigmoid[1]) + math.log(1 - sigmoid[2]))
    assert float(aware["loss"]) == pytest.approx(expected, rel=1e-5)


def test_equation_5_with_drawings_of_the_labelled_photos_as_a_further_fake():
    real, drawn, wrong, own = (torch.full((2, 1, 3, 3), x) for x in (2.0, -1.0, 0.5, 1.5))
    terms = [-math.log(1 - 1 / (1 + math.exp(-x))) for x in (-1.0, 0.5, 1.5)]
    real_term = math.log(1 + math.exp(-2))
    found = discriminator_losses(real, drawn, wrong, own)
    assert float(found["loss"]) == pytest.approx(real_term + sum(terms) / 3, rel=1e-5)
    assert float(found["own"]) == pytest.approx(terms[2], rel=1e-5)
    plain = discriminator_losses(real, drawn, None, own)
    assert float(plain["loss"]) == pytest.approx(real_term + (terms[0] + terms[2]) / 2, rel=1e-5)
    assert "wrong" not in plain
