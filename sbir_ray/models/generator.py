"""What every generator G can do: say how likely a sketch of a photo is, and draw one.

Shapes: B drawings (one photo each), S side of a photo, M mixture components, K = 3 + 6 M outputs
(three pen logits, then what ``losses.mixture`` reads), T rows of a drawing, Z latent numbers. A
photo's code is what its generator has to know of it; its shape is the generator's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig
from sbir_ray.data import strokes as sketches
from sbir_ray.data.strokes import Strokes
from sbir_ray.models.backbone import load_backbone
from sbir_ray.models.drawing import GREEDY, Drawing, Noise, row_log_prob


class Outputs(NamedTuple):
    """What a generator says of sketches, given the rows before each row."""

    raw_BTK: Tensor
    """Not in half precision; T the longest sketch's rows."""
    attention_BTHW: Tensor
    """Where each row looked, 0 behind the end."""
    kl_B: Tensor
    """Of the latent; 0 for a generator without one."""


class Seen(NamedTuple):
    """How the pen sees a sketch in training, where that is not how it was drawn."""

    before_BT5: Tensor
    """The rows before each row, as the pen made them: its slips are in them, and the row to learn
    leads from where the pen has slipped to where it should be."""
    frame_B23: Tensor
    """The affine map from the sketch's canvas to the photo's: rows (x', y') of [linear, offset],
    canvas units from the centre."""
    traced_B: Tensor
    """bool: traced from the photo, not drawn by a person."""


class Decoder(Protocol):
    """A generator's weights, as they were when it was made, laid out for drawing."""

    block: int
    """Drawings to make at a time."""
    on_cpu: bool
    device: torch.device

    def draw(self, code: Tensor, noise: Noise, *, attention: bool = False) -> list[Drawing]:
        """A drawing of each code, as long as its noise has rows at most.

        Args:
            code: of ``Generator.encode``.
            noise: its rows T are one more than the most points a drawing may have.
            attention: whether the drawings tell where each row looked.
        """
        ...


class Generator(nn.Module, ABC):
    """G: a photo's code, and the rows of its sketch one after the other.

    Raises:
        UserError: the backbone or its weights cannot be had.
    """

    offset_scale: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = load_backbone(config.backbone, config.weights)
        self.backbone.requires_grad_(config.train_backbone)
        self.register_buffer("offset_scale", torch.ones(()))

    # ----------------------------------------------------------------------- of each generator

    @abstractmethod
    def encode(self, photo_B3SS: Tensor) -> Tensor:
        """The code of aligned photos (uint8, RGB). It need not be computed anew while the backbone
        does not train."""

    @abstractmethod
    def outputs(
        self,
        code: Tensor,
        rows_BT5: Tensor,
        length_B: Tensor,
        *,
        noise_BZ: Tensor | None = None,
        seen: Seen | None = None,
        last_only: bool = False,
    ) -> Outputs:
        """What is said of each row, given the rows before it.

        Args:
            code: of :meth:`encode`.
            rows_BT5: the rows, padded with anything.
            length_B: int64, rows of each sketch, the end row included.
            noise_BZ: standard normal numbers that sample the latent; None takes its mean.
            seen: how the pen saw the sketch; None: as it was drawn, by a person.
            last_only: let the gradient reach the output layer alone (the paper's W_y and b_y).
        """

    @abstractmethod
    def decoder(self) -> Decoder:
        """The weights as they are now, laid out for drawing."""

    # ----------------------------------------------------------------------- sequences

    def set_offset_scale(self, scale: float) -> None:
        """Set the scale of the offsets (``strokes.offset_scale`` of the training sketches), before
        training: it is stored with the weights."""
        self.offset_scale.fill_(scale)

    def rows(self, strokes: Strokes) -> NDArray[np.float32]:
        """The stroke-5 rows (n + 1, 5) of a canonical sketch of n points, end row included.

        Raises:
            ValueError: more than ``max_points`` points.
        """
        scale = float(self.offset_scale)
        return sketches.to_stroke5(strokes, scale, self.config.max_points)

    # ----------------------------------------------------------------------- likelihood

    def nll(
        self,
        photo_B3SS: Tensor,
        points_BT5: Tensor,
        length_B: Tensor,
        *,
        noise_BZ: Tensor | None = None,
        attention: bool = False,
    ) -> dict[str, Tensor]:
        """The terms of Eq. 3 for each pair, with teacher forcing.

        Args:
            photo_B3SS: uint8, aligned photos.
            points_BT5: their sketches' :meth:`rows`, padded with anything.
            length_B: int64, rows of each sketch, the end row included.
            noise_BZ: standard normal numbers that sample the latent; None takes its mean.
            attention: whether to return where each row looked.

        Returns:
            ``offset`` (B,): mean negative log-likelihood of the points' offsets, nats a point;
            ``pen`` (B,): the same of the pen states, through the end row, nats a row; ``kl`` (B,);
            ``attention`` (B, T, H, W) if asked for, 0 behind the end.
        """
        return self.nll_of_code(
            self.encode(photo_B3SS), points_BT5, length_B, noise_BZ=noise_BZ, attention=attention
        )

    def nll_of_code(
        self,
        code: Tensor,
        points_BT5: Tensor,
        length_B: Tensor,
        *,
        noise_BZ: Tensor | None = None,
        seen: Seen | None = None,
        attention: bool = False,
    ) -> dict[str, Tensor]:
        """:meth:`nll` of photos by their codes; ``seen`` as for :meth:`outputs`."""
        found = self.outputs(code, points_BT5, length_B, noise_BZ=noise_BZ, seen=seen)
        rows_BT5 = points_BT5[:, : found.raw_BTK.shape[1]]
        offset_B, pen_B = losses.drawing_nll(
            found.raw_BTK[..., 3:], found.raw_BTK[..., :3], rows_BT5, length_B=length_B
        )
        terms = {"offset": offset_B, "pen": pen_B, "kl": found.kl_B}
        if attention:
            terms["attention"] = found.attention_BTHW
        return terms

    def log_prob(
        self,
        photo_B3SS: Tensor,
        rows_BT5: Tensor,
        length_B: Tensor,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """log p of each row (B, T) at the latent's mean, offset and pen together, 0 behind the end
        and for an end row behind ``max_points`` points.

        The sum over a drawing's rows is ``Drawing.log_prob``, with a gradient.

        Args:
            rows_BT5: the rows that were drawn; a drawing that did not end lacks its end row.
            length_B: int64, number of those rows.
            last_only: let the gradient reach the output layer alone (the paper's W_y and b_y).
        """
        return self.log_prob_of_code(
            self.encode(photo_B3SS), rows_BT5, length_B, last_only=last_only
        )

    def log_prob_of_code(
        self,
        code: Tensor,
        rows_BT5: Tensor,
        length_B: Tensor,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """:meth:`log_prob` of photos by their codes."""
        raw_BTK = self.outputs(code, rows_BT5, length_B, last_only=last_only).raw_BTK
        rows_BT5 = rows_BT5[:, : raw_BTK.shape[1]]
        count_B = length_B.clamp(max=self.config.max_points)
        real_BT = torch.arange(raw_BTK.shape[1], device=raw_BTK.device) < count_B[:, None]
        return row_log_prob(raw_BTK, rows_BT5).where(real_BT, 0.0)

    # ----------------------------------------------------------------------- drawn again

    def redraw_of_code(
        self, code: Tensor, rows_BT5: Tensor, length_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drawings as differentiable functions of the weights, for ``raster.soft_rasterise``.

        The values are those drawn. Each offset has the gradient of ``losses.redrawn``, so that of
        the means, sigmas and correlations behind it, and each pen that of the probability of down.
        The rows before each row are as they were drawn: no gradient passes through them.

        Args:
            code: the photos' codes (:meth:`encode`).
            rows_BT5: as for :meth:`log_prob`.
            length_B: as for :meth:`log_prob`.

        Returns:
            The canonical points (B, N, 2), canvas units, and the ink (B, N) of the segment from
            each to the next. Behind a drawing's last point that point is repeated without ink.
        """
        raw_BNK = self.outputs(code, rows_BT5, length_B).raw_BTK
        rows_BN5 = rows_BT5[:, : raw_BNK.shape[1]]
        real_BN = torch.arange(raw_BNK.shape[1], device=raw_BNK.device) < length_B[:, None]
        point_BN = real_BN & (rows_BN5[..., 4] == 0)
        drawn_BN2 = rows_BN5[..., :2].where(point_BN[..., None], 0.0)
        offset_BN2 = losses.redrawn(losses.mixture(raw_BNK[..., 3:]), drawn_BN2)
        path_BN2 = offset_BN2.where(point_BN[..., None], 0.0).cumsum(1) * self.offset_scale
        down_BN = raw_BNK[..., :3].softmax(2)[..., 0]
        pen_BN = rows_BN5[..., 2] + (down_BN - down_BN.detach())
        # A segment ends in a point.
        segment_BN = F.pad(point_BN[:, 1:], (0, 1))
        return _canonical(path_BN2), pen_BN.where(segment_BN, 0.0)

    # ----------------------------------------------------------------------- drawing

    def draw(
        self,
        photo_B3SS: Tensor,
        seeds: Sequence[int],
        temperature: float = GREEDY,
        *,
        attention: bool = False,
        decoder: Decoder | None = None,
    ) -> list[Drawing]:
        """A drawing of each photo; no photo's depends on the others. A latent is at its mean.

        Args:
            photo_B3SS: uint8, aligned photos.
            seeds: of each photo's random numbers; not read at temperature 0.
            temperature: 0 takes the most likely component's mean and pen state (the paper's way),
                and the median length; 1 samples the model; between, the logits of pen and component
                are divided by it, sigma is multiplied by its root, and the length is nearer to the
                median.
            attention: whether the drawings tell where each row looked.
            decoder: what :meth:`decoder` gave for these weights; laying them out anew costs some
                milliseconds a call.
        """
        if len(seeds) != len(photo_B3SS):
            raise ValueError(f"{len(seeds)} seeds for {len(photo_B3SS)} photos")
        decoder = self.decoder() if decoder is None else decoder
        steps = self.config.max_points + 1
        drawings: list[Drawing] = []
        with torch.inference_mode():
            for start in range(0, len(seeds), decoder.block):
                part = slice(start, start + decoder.block)
                noise = Noise.seeded(seeds[part], steps, self.config.mixtures, temperature)
                # A convolution may round differently in a batch, and gains nothing from it on a
                # CPU.
                groups = photo_B3SS[part].split(1 if decoder.on_cpu else decoder.block)
                code = torch.cat([self.encode(group) for group in groups])
                drawings += decoder.draw(code, noise, attention=attention)
        return drawings

    # ----------------------------------------------------------------------- parts

    def backbone_map(self, photo_B3SS: Tensor) -> Tensor:
        """The backbone's map (B, C, H, W) of aligned photos (uint8, RGB)."""
        size = self.config.image_size
        assert photo_B3SS.dtype == torch.uint8, photo_B3SS.dtype
        assert photo_B3SS.shape[1:] == (3, size, size), photo_B3SS.shape
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_backbone):
            features: Tensor = self.backbone(self.backbone.normalise(photo_B3SS))
        return features

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which the backbone's batch normalisation keeps its statistics."""
        super().train(mode)
        self.backbone.eval()
        return self


def at_least_single(values: Tensor) -> Tensor:
    """The values in float32 where autocast made them half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _canonical(path_BN2: Tensor) -> Tensor:
    """``strokes.canonical`` of each drawing's points, with a gradient."""
    low_B12, high_B12 = path_BN2.amin(1, keepdim=True), path_BN2.amax(1, keepdim=True)
    longest_B11 = (high_B12 - low_B12).amax(2, keepdim=True)
    scale_B11 = sketches.LONGEST / longest_B11.where(longest_B11 > 0, sketches.LONGEST)
    return (path_BN2 - (low_B12 + high_B12) / 2) * scale_B11 + sketches.CENTRE
