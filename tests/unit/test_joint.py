"""The update's losses are the paper's equations, written out slowly."""

import math

import pytest
import torch

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig, RetrievalLossConfig
from sbir_ray.joint import PairRows, discriminator_losses, generator_losses, retrieval_losses


def rows(seed=0, labelled=(1, 1, 1, 0, 0), certainty=(1, 1, 1, 0.8, 0.2), extra=2):
    torch.manual_seed(seed)
    count = len(labelled)
    unit = torch.nn.functional.normalize
    return PairRows(
        sketch_BD=unit(torch.randn(count, 6, dtype=torch.float64)).requires_grad_(),
        photo_PD=unit(torch.randn(count + extra, 6, dtype=torch.float64)),
        photo_of_B=torch.arange(count),
        labelled_B=torch.tensor(labelled, dtype=torch.bool),
        certainty_B=torch.tensor(certainty, dtype=torch.float64),
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
