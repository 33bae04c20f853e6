"""The retrieval network: what an embedding is, and what trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sbir_ray.config import RetrievalConfig
from sbir_ray.errors import UserError
from sbir_ray.models.retrieval import GridPool, RetrievalNet, SpatialAttention


def small(
    *, pool: str = "grid", grid: int = 2, dim: int = 0, frozen_norm: bool = True
) -> RetrievalNet:
    torch.manual_seed(0)
    config = RetrievalConfig(
        weights="none",
        pool=pool,  # type: ignore[arg-type]
        grid=grid,
        dim=dim,
        image_size=64,
        frozen_norm=frozen_norm,
    )
    return RetrievalNet(config)


def pictures(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    photo = torch.randint(0, 256, (count, 3, 64, 64), generator=generator, dtype=torch.uint8)
    raster = torch.zeros(count, 64, 64, dtype=torch.uint8)
    for row in range(count):
        raster[row, 8 * row + 4 : 8 * row + 8, 10:50] = 255
    return photo, raster


@pytest.mark.parametrize(
    ("pool", "grid", "dim", "length"),
    [("grid", 2, 0, 4 * 96), ("grid", 4, 0, 16 * 96), ("grid", 2, 32, 32), ("attention", 4, 0, 96)],
)
def test_embeddings_have_length_one_and_the_declared_size(
    pool: str, grid: int, dim: int, length: int
) -> None:
    net = small(pool=pool, grid=grid, dim=dim).eval()
    photo, raster = pictures(3)
    with torch.no_grad():
        for embedding in (net.embed_photos(photo), net.embed_sketches(raster)):
            assert embedding.shape == (3, length)
            assert embedding.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert net.dim == length


def test_a_sketch_is_embedded_as_the_photo_of_its_black_lines_on_white() -> None:
    net = small().eval()
    raster = pictures(2)[1]
    photo = torch.where(raster == 255, 0, 255).to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        assert torch.equal(net.embed_sketches(raster), net.embed_photos(photo))


def test_a_raster_of_floats_is_embedded_as_that_of_bytes_and_takes_gradients() -> None:
    net = small().eval()
    source = torch.Generator().manual_seed(0)
    raster = torch.randint(0, 256, (2, 64, 64), generator=source, dtype=torch.uint8)
    ink = (raster.float() / 255).requires_grad_()
    found = net.embed_sketches(ink)
    torch.testing.assert_close(found, net.embed_sketches(raster), rtol=1e-4, atol=1e-5)
    (grad,) = torch.autograd.grad(found[0, 0], ink)
    assert grad[0].abs().max() > 0
    assert not grad[1].any()


def test_one_pass_gives_the_same_as_two() -> None:
    net = small().train()
    photo, raster = pictures(3)
    sketch_BD, photo_PD = net(raster[:2], photo)
    assert torch.allclose(sketch_BD, net.embed_sketches(raster[:2]), atol=1e-5)
    assert torch.allclose(photo_PD, net.embed_photos(photo), atol=1e-5)


def test_frozen_norm_keeps_the_statistics_and_trains_the_rest() -> None:
    net = small(frozen_norm=True).train()
    before = {name: value.clone() for name, value in net.named_buffers()}
    photo, raster = pictures(3)
    sketch_BD, photo_PD = net(raster, photo)
    torch.autograd.backward((sketch_BD - photo_PD).square().sum())
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert net.training
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_frozen_norm_makes_an_embedding_independent_of_its_batch_in_training() -> None:
    net = small(frozen_norm=True).train()
    photo, _ = pictures(3)
    with torch.no_grad():
        alone, among = net.embed_photos(photo[:1]), net.embed_photos(photo)[:1]
    assert torch.allclose(alone, among, atol=1e-5)


def test_norm_that_is_not_frozen_follows_the_batch() -> None:
    net = small(frozen_norm=False).train()
    before = net.state_dict()["backbone.body.0.1.running_mean"].clone()
    net(*reversed(pictures(2)))
    assert not torch.equal(net.state_dict()["backbone.body.0.1.running_mean"], before)


def test_grid_pool_averages_the_cells_of_each_place() -> None:
    map_NCHW = torch.arange(32.0).view(1, 2, 4, 4)
    expected = [
        float(map_NCHW[0, c, y : y + 2, x : x + 2].mean())
        for c in (0, 1)
        for y in (0, 2)
        for x in (0, 2)
    ]
    assert GridPool(2)(map_NCHW).flatten().tolist() == expected


def test_spatial_attention_equals_the_papers_formula_cell_by_cell() -> None:
    torch.manual_seed(0)
    pool, map_NCHW = SpatialAttention(3), torch.randn(2, 3, 2, 4)
    weight, bias = pool.score.weight.flatten(), pool.score.bias
    assert bias is not None
    for n in range(2):
        cells = [map_NCHW[n, :, y, x] for y in range(2) for x in range(4)]
        score = torch.stack([(weight * cell).sum() + bias[0] for cell in cells])
        share = score.exp() / score.exp().sum()
        expected = sum(cell * (1 + a) for cell, a in zip(cells, share, strict=True)) / len(cells)
        assert torch.allclose(pool(map_NCHW)[n], torch.as_tensor(expected), atol=1e-6)


def test_the_state_restores_the_embeddings() -> None:
    net, other = small(dim=8).eval(), small(dim=8).eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(net.state_dict())
    photo, _ = pictures(2)
    with torch.no_grad():
        assert torch.equal(net.embed_photos(photo), other.embed_photos(photo))


def test_a_grid_finer_than_the_map_is_refused_with_what_to_set() -> None:
    with pytest.raises(UserError, match=r"model\.grid: 5 is more than the 4 x 4 cells"):
        small(grid=5)


def test_pictures_of_another_size_are_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        small().embed_photos(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_pictures_of_another_type_are_a_programming_error() -> None:
    with pytest.raises(AssertionError):
        small().embed_photos(torch.zeros(1, 3, 64, 64))
    with pytest.raises(AssertionError):
        small().embed_sketches(torch.zeros(1, 64, 64, dtype=torch.int64))


def test_with_packaged_weights_a_drawn_shape_finds_its_filled_twin() -> None:
    """Without any training: what the ImageNet weights are for."""
    net = RetrievalNet(RetrievalConfig()).eval()
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    y, x = rows - 64, columns - 64
    inside = [
        x.square() + y.square() < 45**2,
        (x.abs() < 45) & (y.abs() < 45),
        (x.abs() < 15) & (y.abs() < 50),
        (y.abs() < 15) & (x.abs() < 50),
        (y > -45) & (y < 45) & (2 * x.abs() < y + 45),
    ]
    photos, rasters = [], []
    for shape in inside:
        filled = torch.where(shape, 90, 255).to(torch.uint8)
        photos.append(filled.expand(3, -1, -1))
        grown = nn.functional.max_pool2d(shape[None].float(), 3, 1, 1)[0]
        shrunk = -nn.functional.max_pool2d(-shape[None].float(), 3, 1, 1)[0]
        rasters.append(((grown - shrunk) * 255).to(torch.uint8))
    with torch.no_grad():
        cosine = net.embed_sketches(torch.stack(rasters)) @ net.embed_photos(torch.stack(photos)).T
    assert cosine.argmax(1).tolist() == [0, 1, 2, 3, 4]
