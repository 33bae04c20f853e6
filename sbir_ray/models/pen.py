"""The pen generator: it looks where its pen is, and at what it has drawn.

Before each row it sees the photo around the pen and the ink that is there already, where the stroke
began, and the whole photo through attention that knows which parts are covered; a small causal
transformer remembers the rows before. People's sketches are few, but the contours of any photo,
traced, teach it to follow what it sees: rows of both kinds train it, and it is told whose hand it
is.

Shapes: B drawings, T rows, D width, H heads, N = 8 x 8 cells of the photo, C channels of the
backbone's map, L of the photo around the pen, P places around it, G = I x I places of the ink
(I = 32), K = 3 + 6 M outputs. Positions are canvas units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbir_ray.config import GeneratorConfig
from sbir_ray.data.strokes import CANVAS, CENTRE
from sbir_ray.models.drawing import DOWN, PEN_START, UP
from sbir_ray.models.generator import Generator, Outputs, Seen, at_least_single
from sbir_ray.models.pen_decoder import PenDecoder

LOCAL = 16
"""L"""
CELLS, INK = 8, 32
"""Sides of the two rasters over the canvas."""
_WAVES = 6
_NEAR, _FAR = 10.0, 32.0
"""Half the sides of the two 5 x 5 rasters of places around the pen."""
_INK_SIGMA = 6.0


Pair = tuple[Tensor, Tensor]
"""Keys and values (B, H, rows or cells, D / H)."""


class Look(NamedTuple):
    """A photo as the pen sees it."""

    local_BLSS: Tensor
    memory_BND: Tensor
    frame_B23: Tensor | None
    """From the sketch's canvas to the photo's, or None where they are the same."""


class Pen(NamedTuple):
    """Where the pen is, what it has done; T rows of each drawing, or one."""

    row_BT5: Tensor
    """The row that brought it here."""
    place_BT2: Tensor
    start_BT2: Tensor
    """Where its stroke began."""
    ink_BTG: Tensor
    """Of the drawing so far, in [0, 1]."""
    age_BT1: Tensor
    """Rows before, as a share of the most."""


class PenNet(nn.Module):
    """All of the pen generator that is trained, but a backbone that trains."""

    near_P2: Tensor
    cells_N2: Tensor
    ink_I: Tensor

    def __init__(self, config: GeneratorConfig, channels: int) -> None:
        super().__init__()
        width = config.pen.width
        self.stem = nn.Sequential(
            nn.Conv2d(3, LOCAL, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(LOCAL, 2 * LOCAL, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * LOCAL, LOCAL, 3, padding=1),
        )
        five = torch.linspace(-1, 1, 5)
        raster_P2 = torch.cartesian_prod(five, five).flip(1)
        near_P2 = torch.cat([_NEAR * raster_P2, _FAR * raster_P2])
        self.register_buffer("near_P2", near_P2, persistent=False)
        self.register_buffer("cells_N2", _centres(CELLS), persistent=False)
        self.register_buffer("ink_I", _along(INK), persistent=False)
        waves = 4 * _WAVES
        self.patch = nn.Linear(len(near_P2) * (LOCAL + 1), width)
        self.token = nn.Linear(5 + 2 * waves + 2 + 2, width)
        self.hand = nn.Embedding(2, width)
        self.cell = nn.Linear(channels + LOCAL + waves, width)
        self.heads = config.pen.heads
        self.blocks = nn.ModuleList(
            Block(width, config.pen.heads) for _ in range(config.pen.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 3 + 6 * config.mixtures)

    def look(self, pixels_B3SS: Tensor, map_BCHW: Tensor, frame_B23: Tensor | None) -> Look:
        """The photo, normalised, and its backbone's map as the pen sees them."""
        local_BLSS = self.stem(pixels_B3SS)
        place_BN2 = self.cells_N2.expand(len(map_BCHW), -1, -1)
        features = [
            _sampled(map_BCHW, place_BN2, frame_B23),
            _sampled(F.adaptive_avg_pool2d(local_BLSS, CELLS), place_BN2, frame_B23),
            _waves((place_BN2 - CENTRE) / CENTRE),
        ]
        return Look(local_BLSS, self.cell(torch.cat(features, 2)), frame_B23)

    def tokens(self, look: Look, pen: Pen, traced_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the pen sees at each row (B, T, D), and how covered the cells are (B, T, N)."""
        batch, rows = pen.place_BT2.shape[:2]
        ink_R1GG = pen.ink_BTG.reshape(batch * rows, 1, INK, INK)
        around_BTP2 = pen.place_BT2[:, :, None] + self.near_P2
        local_BQL = _sampled(look.local_BLSS, around_BTP2.flatten(1, 2), look.frame_B23)
        inked_RP1 = _sampled(ink_R1GG, around_BTP2.flatten(0, 1), None, outside="zeros")
        seen_BTPX = torch.cat(
            [local_BQL.view(batch, rows, -1, LOCAL), inked_RP1.view(batch, rows, -1, 1)], 3
        )
        back_BT2 = pen.start_BT2 - pen.place_BT2
        known = [
            pen.row_BT5,
            _waves((pen.place_BT2 - CENTRE) / CENTRE),
            _waves(back_BT2 / CENTRE),
            pen.age_BT1,
            10 * pen.ink_BTG.mean(2, keepdim=True),
            back_BT2 / (CENTRE / 2),
        ]
        hand_B1D = self.hand(traced_B.long())[:, None]
        token_BTD = self.patch(seen_BTPX.flatten(2)) + self.token(torch.cat(known, 2)) + hand_B1D
        covered_BTN = 4 * F.avg_pool2d(ink_R1GG, INK // CELLS).view(batch, rows, -1)
        return token_BTD, covered_BTN

    def memories(self, look: Look) -> list[Pair]:
        """Each block's keys and values of the photo."""
        return [block.memory(look.memory_BND) for block in self._blocks()]

    def pasts(self, like: Tensor, batch: int, rows: int) -> list[Pair]:
        """Each block's room for the keys and values of so many rows."""
        size = (batch, self.heads, rows, self.output.in_features // self.heads)
        return [(like.new_zeros(size), like.new_zeros(size)) for _ in self.blocks]

    def think(
        self,
        x_BTD: Tensor,
        memories: list[Pair],
        covered_BTN: Tensor,
        pasts: list[Pair] | None = None,
        age: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """What the output layer reads (B, T, D), and where the last block looked (B, T, N).

        ``pasts`` and ``age`` as for :class:`Block`.
        """
        look_BTN = covered_BTN
        for place, block in enumerate(self._blocks()):
            past = None if pasts is None else pasts[place]
            x_BTD, look_BTN = block(x_BTD, memories[place], covered_BTN, past, age)
        thought_BTD: Tensor = self.norm(x_BTD)
        return thought_BTD, look_BTN

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def inked(self, from_BT2: Tensor, to_BT2: Tensor, down_BT: Tensor) -> Tensor:
        """The ink (B, T, G) of segments, where the pen was down.

        Each coordinate by itself, as long as it is that of a column or a row of places alone.
        """
        x_BT11, y_BT11 = from_BT2[..., None, None].unbind(2)
        along_x_BT11, along_y_BT11 = (to_BT2 - from_BT2)[..., None, None].unbind(2)
        rel_x_BT1I, rel_y_BTI1 = self.ink_I - x_BT11, self.ink_I[:, None] - y_BT11
        length_BT11 = (along_x_BT11.square() + along_y_BT11.square()).clamp(min=1e-6)
        dot_BTII = rel_x_BT1I * along_x_BT11 + rel_y_BTI1 * along_y_BT11
        share_BTII = (dot_BTII / length_BT11).clamp(0, 1)
        far_x_BTII = rel_x_BT1I - share_BTII * along_x_BT11
        far_y_BTII = rel_y_BTI1 - share_BTII * along_y_BT11
        far_BTII = far_x_BTII.square() + far_y_BTII.square()
        ink_BTII = torch.exp(far_BTII / (-2 * _INK_SIGMA**2)) * down_BT[..., None, None]
        return ink_BTII.flatten(2)


class Block(nn.Module):
    """Looks at the rows so far, at the photo, and thinks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.rows = nn.Linear(width, 3 * width)
        self.rows_out = nn.Linear(width, width)
        self.photo = nn.Linear(width, width)
        self.photo_in = nn.Linear(width, 2 * width)
        self.photo_out = nn.Linear(width, width)
        # Some heads begin by looking away from what is drawn already.
        self.covered_H = nn.Parameter(torch.linspace(-2, 0, heads))
        self.think = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def memory(self, memory_BND: Tensor) -> Pair:
        """Keys and values (B, H, N, D / H) of the photo."""
        key, value = self.photo_in(memory_BND).chunk(2, 2)
        # Laid out once as the product of each row needs them.
        return self._split(key).contiguous(), self._split(value).contiguous()

    def forward(
        self,
        x_BTD: Tensor,
        photo: Pair,
        covered_BTN: Tensor,
        past: Pair | None = None,
        age: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The rows (B, T, D), and where they looked (B, T, N).

        Args:
            photo: of :meth:`memory`.
            past: keys and values (B, H, most rows, D / H) of one drawing's earlier rows, ``age``
                of them; those of the one row given are written there. None: T rows from the first.
        """
        query, key, value = self.rows(self.norms[0](x_BTD)).chunk(3, 2)
        query, key, value = self._split(query), self._split(key), self._split(value)
        if past is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            past[0][:, :, age], past[1][:, :, age] = key[:, :, 0], value[:, :, 0]
            mixed = self._attend(query, past[0][:, :, : age + 1], past[1][:, :, : age + 1])[0]
        x_BTD = x_BTD + self.rows_out(self._joined(mixed))
        query = self._split(self.photo(self.norms[1](x_BTD)))
        bias_BHTN = covered_BTN[:, None] * self.covered_H[:, None, None]
        mixed, look_BHTN = self._attend(query, *photo, bias_BHTN)
        x_BTD = x_BTD + self.photo_out(self._joined(mixed))
        x_BTD = x_BTD + self.think(self.norms[2](x_BTD))
        return x_BTD, look_BHTN.mean(1)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        score = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        weights = (score if bias is None else score + bias).softmax(3)
        return weights @ value, weights

    def _split(self, x_BTD: Tensor) -> Tensor:
        split_BHTd: Tensor = x_BTD.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return split_BHTd

    def _joined(self, x_BHTd: Tensor) -> Tensor:
        return x_BHTd.transpose(1, 2).flatten(2)


class PenGenerator(Generator):
    """G that looks where its pen is.

    Raises:
        UserError: the backbone or its weights cannot be had.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.side = self.backbone.map_side(config.image_size)
        self.net = PenNet(config, self.backbone.channels)
        self.train()

    def encode(self, photo_B3SS: Tensor) -> Tensor:
        """The pixels, normalised, and the backbone's map, as one row of numbers a photo."""
        map_BCHW = self.backbone_map(photo_B3SS)
        pixels_B3SS = self.backbone.normalise(photo_B3SS)
        return torch.cat([pixels_B3SS.flatten(1), map_BCHW.flatten(1).to(pixels_B3SS.dtype)], 1)

    def look_with(self, net: PenNet, code_BX: Tensor, frame_B23: Tensor | None = None) -> Look:
        """The photos of these codes as a pen of these weights sees them."""
        size, side = self.config.image_size, self.side
        pixels_BX, map_BX = code_BX.split([3 * size**2, self.backbone.channels * side**2], 1)
        return net.look(
            pixels_BX.unflatten(1, (3, size, size)),
            map_BX.unflatten(1, (self.backbone.channels, side, side)),
            frame_B23,
        )

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
        """See :class:`Generator`; there is no latent."""
        steps = int(length_B.max())
        if seen is None:
            start_B15 = rows_BT5.new_tensor(PEN_START).expand(len(rows_BT5), 1, 5)
            before_BT5 = torch.cat([start_B15, rows_BT5[:, : steps - 1]], 1)
            frame_B23, traced_B = None, torch.zeros_like(length_B)
        else:
            before_BT5, frame_B23, traced_B = seen
            before_BT5 = before_BT5[:, :steps]
        net = self.net
        look = self.look_with(net, code, frame_B23)
        x_BTD, covered_BTN = net.tokens(look, self._pen(before_BT5), traced_B.to(code.device))
        x_BTD, look_BTN = net.think(x_BTD, net.memories(look), covered_BTN)
        raw_BTK = at_least_single(net.output(x_BTD.detach() if last_only else x_BTD))
        real_BT = torch.arange(steps, device=code.device) < length_B.to(code.device)[:, None]
        look_BTN = look_BTN.where(real_BT[..., None], 0.0)
        return Outputs(
            raw_BTK, look_BTN.unflatten(2, (CELLS, CELLS)), raw_BTK.new_zeros(len(raw_BTK))
        )

    def decoder(self) -> PenDecoder:
        """The weights as they are now, laid out for drawing."""
        return PenDecoder(self)

    @torch.no_grad()
    def _pen(self, before_BT5: Tensor) -> Pen:
        """Where the pen is after each of these rows."""
        batch, rows = before_BT5.shape[:2]
        place_BT2 = CENTRE + self.offset_scale * before_BT5[..., :2].cumsum(1)
        was_BT5 = torch.cat(
            [before_BT5.new_tensor(PEN_START).expand(batch, 1, 5), before_BT5[:, :-1]], 1
        )
        from_BT2 = torch.cat([place_BT2[:, :1], place_BT2[:, :-1]], 1)
        ink_BTG = self.net.inked(from_BT2, place_BT2, was_BT5[..., 2 + DOWN]).cummax(1).values
        number_T = torch.arange(rows, device=before_BT5.device)
        begins_BT = was_BT5[..., 2 + UP] > 0.5
        first_BT = number_T.where(begins_BT, 0).cummax(1).values
        return Pen(
            before_BT5,
            place_BT2,
            place_BT2.gather(1, first_BT[..., None].expand(-1, -1, 2)),
            ink_BTG,
            (number_T / self.config.max_points)[:, None].expand(batch, -1, 1),
        )


def _along(side: int) -> Tensor:
    """The centres (side,) of a raster over the canvas along one of its sides."""
    return (torch.arange(side) + 0.5) * (CANVAS / side)


def _centres(side: int) -> Tensor:
    """The centres (side * side, 2) of a raster over the canvas, row by row."""
    place = _along(side)
    return torch.cartesian_prod(place, place).flip(1)


def _sampled(
    map_BXHW: Tensor, place_BQ2: Tensor, frame_B23: Tensor | None, outside: str = "border"
) -> Tensor:
    """The map at these places of the canvas (B, Q, X)."""
    if frame_B23 is not None:
        linear_B22, offset_B12 = frame_B23[..., :2], frame_B23[:, None, :, 2]
        place_BQ2 = CENTRE + (place_BQ2 - CENTRE) @ linear_B22.transpose(1, 2) + offset_B12
    grid_B1Q2 = (place_BQ2 / CENTRE - 1)[:, None].to(map_BXHW.dtype)
    found = F.grid_sample(map_BXHW, grid_B1Q2, padding_mode=outside, align_corners=False)
    return found[:, :, 0].transpose(1, 2)


def _waves(place: Tensor) -> Tensor:
    """Sines and cosines (..., 4 * waves) of numbers (..., 2) in [-1, 1]."""
    steps = 2.0 ** torch.arange(_WAVES, device=place.device, dtype=place.dtype)
    angle = math.pi * place[..., None] * steps
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
