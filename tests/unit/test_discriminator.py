"""The pair discriminator: its size, its one number a pair, its independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sbir_ray import losses
from sbir_ray.certainty import certainty_deciles
from sbir_ray.config import DiscriminatorConfig
from sbir_ray.errors import UserError
from sbir_ray.models.discriminator import PairDiscriminator


def small(size: int = 64, channels: int = 8) -> PairDiscriminator:
    torch.manual_seed(0)
    return PairDiscriminator(DiscriminatorConfig(channels=channels, image_size=size))


def pairs(count: int, size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Photos of a dark box at random places, and rasters of its outline."""
    generator = torch.Generator().manual_seed(seed)
    photo = torch.full((count, 3, size, size), 255, dtype=torch.uint8)
    raster = torch.zeros(count, size, size, dtype=torch.uint8)
    for row in range(count):
        y, x = torch.randint(2, size - 26, (2,), generator=generator).tolist()
        photo[row, :, y : y + 24, x : x + 24] = 60
        raster[row, y : y + 24, x : x + 24] = 255
        raster[row, y + 2 : y + 22, x + 2 : x + 22] = 0
    return photo, raster


def test_the_papers_size_is_pix2pix_sized() -> None:
    net = PairDiscriminator(DiscriminatorConfig(channels=64, layers=3, image_size=256))
    with torch.no_grad():
        logit_B1hw = net(*pairs(1, 256))
    assert logit_B1hw.shape == (1, 1, 30, 30)
    assert sum(p.numel() for p in net.parameters()) == 2_768_705


def test_a_patch_sees_seventy_pixels_through_its_convolutions() -> None:
    field, step = 1, 1
    for layer in PairDiscriminator(DiscriminatorConfig()).body:
        if isinstance(layer, torch.nn.Conv2d):
            field += (layer.kernel_size[0] - 1) * step
            step *= layer.stride[0]
    assert field == 70


def test_certainty_is_one_number_for_each_pair_the_mean_of_its_patches() -> None:
    net = small().eval()
    photo, raster = pairs(3)
    with torch.no_grad():
        certainty, logit = net.certainty(photo, raster), net(photo, raster)
    assert certainty.shape == (3,)
    for value, patches in zip(certainty.tolist(), logit, strict=True):
        probabilities = [1 / (1 + pow(2.718281828459045, -x)) for x in patches.flatten().tolist()]
        assert value == pytest.approx(sum(probabilities) / len(probabilities), abs=1e-5)
        assert 0.0 <= value <= 1.0


@pytest.mark.parametrize("training", [True, False])
def test_a_pairs_certainty_does_not_depend_on_the_batch(training: bool) -> None:
    net = small().train(training)
    photo, raster = pairs(4)
    with torch.no_grad():
        among, alone = net.certainty(photo, raster)[2:3], net.certainty(photo[2:3], raster[2:3])
    assert torch.allclose(among, alone, atol=1e-6)


def test_two_workers_gradients_have_the_mean_of_one_workers() -> None:
    photo, raster = pairs(4)

    def gradient(rows: slice) -> Tensor:
        net = small().train()
        torch.autograd.backward(losses.patch_bce(net(photo[rows], raster[rows]), 1.0).mean())
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    both = (gradient(slice(0, 2)) + gradient(slice(2, 4))) / 2
    assert torch.allclose(both, gradient(slice(0, 4)), atol=1e-6)


def trained() -> PairDiscriminator:
    """To tell a photo's own sketch from another's, until it does: its loss leaps now and then, at
    steps that differ by processor."""
    net = small()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.999))
    mean = 1.0
    for step in range(600):
        photo, raster = pairs(16, seed=step)
        real = losses.patch_bce(net(photo, raster), 1.0)
        wrong = losses.patch_bce(net(photo, raster.roll(1, 0)), 0.0)
        optimiser.zero_grad()
        loss = (real + wrong).mean()
        torch.autograd.backward(loss)
        optimiser.step()
        mean += 0.1 * (float(loss.detach()) - mean)
        if mean < 0.1:
            break
    return net


def test_it_learns_whether_a_sketch_matches_its_photo() -> None:
    net = trained()
    photo, raster = pairs(16, seed=1000)
    with torch.no_grad():
        right, wrong = net.certainty(photo, raster), net.certainty(photo, raster.roll(1, 0))
    assert float(right.mean()) > float(wrong.mean()) + 0.5


def test_the_more_certain_a_drawing_the_more_often_it_finds_its_photo() -> None:
    net = trained()
    photo, right = pairs(200, seed=1000)
    hand = np.random.default_rng(0)
    raster = torch.stack(
        [row.roll(tuple(hand.integers(-9, 10, 2).tolist()), (0, 1)) for row in right]
    )
    with torch.no_grad():
        certainty = net.certainty(photo, raster).numpy()
    # Found where the lines lie: by the ink that a drawing shares with each photo's true outline.
    shared = raster.flatten(1).float() @ right.flatten(1).float().T
    ranks = (shared > shared.diagonal()[:, None]).sum(1).numpy() + 1
    deciles = certainty_deciles(certainty, ranks)
    found = [d.found10 for d in deciles]
    order = np.argsort(np.argsort(found, kind="stable"), kind="stable")
    assert np.corrcoef(order, np.arange(10))[0, 1] < -0.7
    assert np.mean(found[:3]) > np.mean(found[-3:]) + 0.3


def test_it_sees_both_the_photo_and_the_sketch() -> None:
    net = small().eval()
    photo, raster = pairs(2)
    with torch.no_grad():
        own = net(photo, raster)
        assert not torch.allclose(own, net(photo.flip(0), raster))
        assert not torch.allclose(own, net(photo, raster.flip(0)))


def test_a_raster_of_floats_is_judged_as_that_of_bytes_and_takes_gradients() -> None:
    net = small().eval()
    photo, raster = pairs(2)
    raster[:, ::3] = 100
    ink = (raster.float() / 255).requires_grad_()
    certainty = net.certainty(photo, ink)
    torch.testing.assert_close(certainty, net.certainty(photo, raster), rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(certainty[0], ink)
    assert grad[0].abs().max() > 0
    assert not grad[1].any()


def test_the_state_holds_parameters_alone() -> None:
    net = small()
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}


def test_pictures_too_small_for_the_layers_are_refused_with_what_to_set() -> None:
    with pytest.raises(UserError, match=r"discriminator\.layers: 4 are too many .* 32 pixels"):
        PairDiscriminator(DiscriminatorConfig(layers=4, image_size=32))
    fits = PairDiscriminator(DiscriminatorConfig(layers=3, image_size=32, channels=8))
    assert fits(*pairs(1, 32)).shape == (1, 1, 2, 2)
