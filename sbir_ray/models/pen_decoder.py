"""The pen generator's weights laid out for drawing: row by row, with what the rows before left.

The same modules as in training, one row of each drawing at a time. On a CPU drawings are made in
blocks of one size, filled up if need be, so that a drawing does not depend on the others.

Shapes: see ``models.pen``; n drawings of a block.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sbir_ray.data.strokes import CENTRE
from sbir_ray.models.drawing import DOWN, END, PEN_START, UP, Drawing, Noise, chosen, finished

if TYPE_CHECKING:
    from sbir_ray.models.pen import PenGenerator

_CPU_BLOCK, _GPU_BLOCK = 16, 256


class PenDecoder:
    """A pen generator's weights, as they were when this was made."""

    def __init__(self, generator: PenGenerator) -> None:
        self.generator = generator
        # A copy: the generator may be trained while this draws.
        self.net = copy.deepcopy(generator.net).float().eval().requires_grad_(False)
        self.scale = float(generator.offset_scale)
        self.device = generator.offset_scale.device
        self.on_cpu = self.device.type == "cpu"
        self.block = _CPU_BLOCK if self.on_cpu else _GPU_BLOCK

    @torch.inference_mode()
    def draw(self, code: Tensor, noise: Noise, *, attention: bool = False) -> list[Drawing]:
        """See :class:`models.generator.Decoder`."""
        count = len(code)
        if self.on_cpu and count < self.block:
            fill = torch.zeros(self.block, dtype=torch.long)
            fill[:count] = torch.arange(count)
            code, noise = code[fill], Noise(*(numbers[fill] for numbers in noise))
        with torch.autocast(self.device.type, enabled=False):
            raw_BTK, rows_BT5, look_BTN, ends = self._decode(code.float(), noise, count)
        side = round(look_BTN.shape[2] ** 0.5)
        looks = look_BTN.unflatten(2, (side, side)) if attention else None
        return finished(raw_BTK, rows_BT5, ends, self.scale, looks)

    def _decode(
        self, code: Tensor, noise: Noise, count: int
    ) -> tuple[Tensor, Tensor, Tensor, list[int | None]]:
        """Outputs, rows and looks of all, and the end rows of the first ``count``."""
        from sbir_ray.models.pen import Pen

        net, batch, steps = self.net, len(code), noise.choice_BTX.shape[1]
        noise = Noise(*(numbers.to(self.device) for numbers in noise))
        look = self.generator.look_with(net, code)
        memories, pasts = net.memories(look), net.pasts(code, batch, steps)
        raw_BTK = code.new_zeros(batch, steps, net.output.out_features)
        rows_BT5 = code.new_zeros(batch, steps, 5)
        look_BTN = code.new_zeros(batch, steps, len(net.cells_N2))
        ends: list[int | None] = [None] * count

        row_B5 = code.new_tensor(PEN_START).expand(batch, 5)
        place_B2 = code.new_full((batch, 2), CENTRE)
        start_B2 = place_B2
        ink_BG = code.new_zeros(batch, len(net.ink_I) ** 2)
        odds_B1 = code.new_ones(batch, 1)
        human_B = torch.zeros(batch, dtype=torch.long, device=self.device)
        for t in range(steps):
            age_B11 = code.new_full((batch, 1, 1), t / self.generator.config.max_points)
            pen = Pen(
                row_B5[:, None], place_B2[:, None], start_B2[:, None], ink_BG[:, None], age_B11
            )
            x_B1D, covered_B1N = net.tokens(look, pen, human_B)
            x_B1D, look_B1N = net.think(x_B1D, memories, covered_B1N, pasts, t)
            raw_BK = net.output(x_B1D)[:, 0]
            part = Noise(*(numbers[:, t] for numbers in noise))
            new_B5, odds_B1 = chosen(raw_BK, part, odds_B1)
            raw_BTK[:, t], rows_BT5[:, t], look_BTN[:, t] = raw_BK, new_B5, look_B1N[:, 0]
            for i, end in enumerate(new_B5[:count, 2 + END].tolist()):
                if end and ends[i] is None:
                    ends[i] = t
            if all(end is not None for end in ends):
                break
            moved_B2 = place_B2 + self.scale * new_B5[:, :2]
            drawn_BG = net.inked(place_B2[:, None], moved_B2[:, None], row_B5[:, None, 2 + DOWN])
            ink_BG = torch.maximum(ink_BG, drawn_BG[:, 0])
            # The point begins a stroke if the pen was lifted before it.
            start_B2 = torch.where(row_B5[:, 2 + UP, None] > 0.5, moved_B2, start_B2)
            row_B5, place_B2 = new_B5, moved_B2
        return raw_BTK[:count], rows_BT5[:count], look_BTN[:count], ends
