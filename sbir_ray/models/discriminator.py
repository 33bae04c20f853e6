"""The pair discriminator D: does this sketch show this photo, and was it drawn by a person?

Shapes: B pairs, S the side of a picture, h x w patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sbir_ray.config import DiscriminatorConfig
from sbir_ray.errors import UserError


class PairDiscriminator(nn.Module):
    """PatchGAN on photo and sketch, stacked to six channels (section 3.3; pix2pix's 70 x 70).

    It normalises with GroupNorm where pix2pix has batch normalisation. Statistics of the batch
    would make a pair's certainty depend on the pairs that happen to be scored with it, and the
    gradient on the number of workers the batch is split over; those of a group belong to one pair
    and keep no state.

    Raises:
        UserError: the picture is too small for that many layers.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(6, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        side = side // 2
        for index in range(1, config.layers + 1):
            # The last of these keeps the resolution, and so does the map of logits.
            stride = 1 if index == config.layers else 2
            wider = config.channels * min(2**index, 8)
            groups = math.gcd(wider, 8)
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.GroupNorm(groups, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
            side = side // 2 if stride == 2 else side - 1
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        if side < 2:
            raise UserError(
                f"discriminator.layers: {config.layers} are too many for pictures of "
                f"{config.image_size} pixels; set fewer, or a larger discriminator.image_size"
            )
        self.body = nn.Sequential(*layers)

    def forward(self, photo_B3SS: Tensor, raster_BSS: Tensor) -> Tensor:
        """Logits (B, 1, h, w), one a patch, of pairs.

        Args:
            photo_B3SS: uint8, aligned photos.
            raster_BSS: uint8, 255 is ink; or float in [0, 1], 1 is ink, to which gradients pass.
        """
        size = self.config.image_size
        soft = raster_BSS.is_floating_point()
        assert photo_B3SS.dtype == torch.uint8, photo_B3SS.dtype
        assert soft or raster_BSS.dtype == torch.uint8, raster_BSS.dtype
        assert photo_B3SS.shape[1:] == (3, size, size), photo_B3SS.shape
        assert raster_BSS.shape[1:] == (size, size), raster_BSS.shape
        paper_BSS = 255 * (1 - raster_BSS) if soft else 255 - raster_BSS
        sketch_B3SS = paper_BSS[:, None].expand(-1, 3, -1, -1)
        pair_B6SS = torch.cat([photo_B3SS, sketch_B3SS], 1).float() / 127.5 - 1.0
        logit_B1hw: Tensor = self.body(pair_B6SS)
        return logit_B1hw

    def certainty(self, photo_B3SS: Tensor, raster_BSS: Tensor) -> Tensor:
        """One number in [0, 1] for each pair (B,): the mean of its patches' probabilities."""
        logit_B1hw: Tensor = self(photo_B3SS, raster_BSS)
        return logit_B1hw.sigmoid().mean((1, 2, 3))
