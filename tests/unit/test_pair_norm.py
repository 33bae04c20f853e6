"""The pair norm: what it computes, when it is fitted, and when it is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sbir_ray.config import RetrievalConfig
from sbir_ray.models.pair_norm import SHRINKAGE, PairNorm
from sbir_ray.models.retrieval import RetrievalNet


def unit(count: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def test_it_is_the_shrunk_moment_to_the_power_of_minus_a_half() -> None:
    x_ND, difference_MD = unit(7, 12, 0), 0.3 * unit(40, 12, 1) * torch.linspace(0.1, 2, 12)
    norm = PairNorm(12)
    norm.fit(difference_MD)

    d = difference_MD.double().numpy()
    moment_DD = d.T @ d / len(d)
    shrunk_DD = (1 - SHRINKAGE) * moment_DD + SHRINKAGE * np.trace(moment_DD) / 12 * np.eye(12)
    values, vectors = np.linalg.eigh(shrunk_DD)
    expected = x_ND.double().numpy() @ (vectors / np.sqrt(values)) @ vectors.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)

    np.testing.assert_allclose(norm(x_ND).numpy(), expected, atol=1e-6)


def test_few_axes_keep_those_in_which_pairs_differ_most() -> None:
    difference_MD = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    difference_MD *= torch.tensor([0.1, 3.0, 0.1, 0.1, 1.0, 0.1])
    norm = PairNorm(6, axes=2)
    norm.fit(difference_MD)
    assert norm.axes_KD.abs().argmax(1).tolist() == [1, 4]
    assert norm.axes_KD.gather(1, norm.axes_KD.abs().argmax(1, keepdim=True)).min() > 0
    assert -1 < float(norm.change_K[0]) < float(norm.change_K[1]) < 0


def test_what_sketches_always_differ_in_stops_to_decide() -> None:
    """Each hand moves a sketch far along four axes, along which photos hardly differ."""
    generator = torch.Generator().manual_seed(0)

    def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        photo_ND = torch.randn(count, 256, generator=generator)
        hand_ND = torch.zeros(count, 256)
        hand_ND[:, :4] = 60 * torch.randn(count, 4, generator=generator)
        noise_ND = 3 * torch.randn(count, 256, generator=generator)
        sketch_ND = photo_ND + hand_ND + noise_ND
        return torch.nn.functional.normalize(sketch_ND, dim=1), torch.nn.functional.normalize(
            photo_ND, dim=1
        )

    def found(sketch_ND: torch.Tensor, photo_ND: torch.Tensor) -> float:
        own = torch.arange(len(photo_ND))
        return float(((sketch_ND @ photo_ND.T).argmax(1) == own).float().mean())

    norm = PairNorm(256)
    sketch_ND, photo_ND = pairs(200)
    norm.fit(sketch_ND - photo_ND)
    sketch_ND, photo_ND = pairs(100)
    plain, fitted = found(sketch_ND, photo_ND), found(norm(sketch_ND), norm(photo_ND))
    assert fitted > plain + 0.2


def test_without_pairs_embeddings_stay_as_they_are() -> None:
    x_ND = unit(5, 8, 0)
    norm = PairNorm(8)
    for _ in range(2):
        torch.testing.assert_close(norm(x_ND), x_ND)
        norm.fit(unit(9, 8, 1))
        assert not torch.allclose(norm(x_ND), x_ND, atol=1e-3)
        norm.fit(torch.zeros(3, 8))
    assert PairNorm(8, axes=0)(x_ND) is x_ND


def test_differences_of_one_direction_give_one_axis() -> None:
    hand_D = unit(1, 8, 2)
    norm = PairNorm(8)
    norm.fit(torch.linspace(-1, 2, 20)[:, None] * hand_D)
    torch.testing.assert_close(norm.axes_KD[0].abs(), hand_D[0].abs())
    assert norm.change_K.nonzero().flatten().tolist() == [0]
    assert not norm.axes_KD[1:].any()
    assert torch.isfinite(norm(unit(3, 8, 3))).all()


def test_it_refuses_what_it_cannot_be_fitted_to() -> None:
    norm = PairNorm(8)
    with pytest.raises(ValueError, match="shape"):
        norm.fit(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="finite"):
        norm.fit(torch.full((3, 8), torch.nan))


def test_training_forgets_it_and_measuring_uses_it() -> None:
    torch.manual_seed(0)
    net = RetrievalNet(RetrievalConfig(weights="none", grid=2, image_size=64)).eval()
    photo = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        plain = net.embed_photos(photo)
        net.pair_norm.fit(plain - plain.roll(1, 0))
        fitted = net.embed_photos(photo)
        assert not torch.allclose(plain, fitted, atol=1e-3)
        net.train()
        torch.testing.assert_close(net.embed_photos(photo), plain)
        net.eval()
        torch.testing.assert_close(net.embed_photos(photo), plain)


def test_weights_of_before_are_loaded_as_a_network_without_it() -> None:
    config = RetrievalConfig(weights="none", grid=2, image_size=64)
    net = RetrievalNet(config)
    old = {k: v for k, v in net.state_dict().items() if not k.startswith("pair_norm")}
    other = RetrievalNet(config)
    other.pair_norm.fit(unit(4, other.dim, 0))
    other.load_state_dict(old)
    assert not other.pair_norm.change_K.any()
    off = RetrievalNet(RetrievalConfig(weights="none", grid=2, image_size=64, pair_norm=False))
    assert off.pair_norm.axes_KD.numel() == 0
