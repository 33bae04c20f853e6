"""The retrieval network F: photos and sketches to vectors of length one, through shared weights.

Shapes: B sketches, P photos, N pictures of either kind, S the side of a picture, C channels and
H x W cells of the backbone's map, D the length of an embedding.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sbir_ray.config import RetrievalConfig
from sbir_ray.errors import UserError
from sbir_ray.models.backbone import load_backbone
from sbir_ray.models.pair_norm import AXES, PairNorm


class SpatialAttention(nn.Module):
    """Global average of F' + F' * softmax(conv(F')) over the map's cells (paper, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)

    def forward(self, map_NCHW: Tensor) -> Tensor:
        score_N1HW = self.score(map_NCHW)
        attention_N1HW = score_N1HW.flatten(1).softmax(1).view_as(score_N1HW)
        pooled_NC: Tensor = (map_NCHW + map_NCHW * attention_N1HW).mean((2, 3))
        return pooled_NC


class GridPool(nn.Module):
    """Averages over a ``grid`` x ``grid`` raster, concatenated: keeps where things are."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, map_NCHW: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(map_NCHW, self.grid).flatten(1)


class RetrievalNet(nn.Module):
    """F of the paper: one network for photos and sketches, so that their distances mean something.

    Raises:
        UserError: the backbone or its weights cannot be had, or the map has fewer cells than the
            grid.
    """

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = load_backbone(config.backbone, config.weights)
        side = self.backbone.map_side(config.image_size)
        channels = self.backbone.channels
        self.pool: nn.Module
        if config.pool == "grid":
            if side < config.grid:
                raise UserError(
                    f"model.grid: {config.grid} is more than the {side} x {side} cells of "
                    f"{config.backbone}'s map at {config.image_size} pixels; set model.grid to "
                    f"{side} or a larger model.image_size"
                )
            self.pool = GridPool(config.grid)
            pooled = channels * config.grid**2
        else:
            self.pool = SpatialAttention(channels)
            pooled = channels
        self.project = nn.Linear(pooled, config.dim, bias=False) if config.dim else nn.Identity()
        self.dim = config.dim or pooled
        """D, the length of an embedding."""
        self.pair_norm = PairNorm(self.dim, AXES if config.pair_norm else 0)
        """Fitted when the network is measured; training goes on without it."""

    def embed_photos(self, photo_P3SS: Tensor) -> Tensor:
        """Embeddings (P, D), of length one, of aligned photos (uint8, RGB)."""
        assert photo_P3SS.dtype == torch.uint8, photo_P3SS.dtype
        return self._embed(photo_P3SS)

    def embed_sketches(self, raster_BSS: Tensor) -> Tensor:
        """Embeddings (B, D), of length one, of raster sketches.

        Args:
            raster_BSS: uint8, 255 is ink; or float in [0, 1], 1 is ink, to which gradients pass.
        """
        return self._embed(_black_on_white(raster_BSS))

    def forward(self, raster_BSS: Tensor, photo_P3SS: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of sketches (B, D) and photos (P, D) in one pass.

        For batch normalisation that is not frozen: a batch of one kind alone would give it
        statistics that are met in training only.
        """
        assert photo_P3SS.dtype == torch.uint8, photo_P3SS.dtype
        both = torch.cat([_black_on_white(raster_BSS), photo_P3SS])
        embedding_ND = self._embed(both)
        return embedding_ND[: len(raster_BSS)], embedding_ND[len(raster_BSS) :]

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which frozen batch normalisation still uses the stored statistics.

        What the pairs' differences were is forgotten: the weights are about to change.
        """
        super().train(mode)
        if mode:
            self.pair_norm.clear()
        if self.config.frozen_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _embed(self, picture_N3SS: Tensor) -> Tensor:
        size = self.config.image_size
        assert picture_N3SS.shape[1:] == (3, size, size), picture_N3SS.shape
        map_NCHW = self.backbone(self.backbone.normalise(picture_N3SS))
        embedding_ND = F.normalize(self.project(self.pool(map_NCHW)), dim=1)
        return embedding_ND if self.training else self.pair_norm(embedding_ND)


def _black_on_white(raster_BSS: Tensor) -> Tensor:
    """The sketch as a photo (B, 3, S, S) of it would be, in [0, 255]."""
    assert raster_BSS.ndim == 3, raster_BSS.shape
    assert raster_BSS.dtype == torch.uint8 or raster_BSS.is_floating_point(), raster_BSS.dtype
    paper_BSS = 255 * (1 - raster_BSS) if raster_BSS.is_floating_point() else 255 - raster_BSS
    return paper_BSS[:, None].expand(-1, 3, -1, -1)
