"""The generator's weights laid out for drawing: the one way in which drawings are made.

The same mathematics as ``Generator.nll``, a row at a time, with less work a row:

- the attention's convolution and the photo's way into the LSTM are computed once a photo, so that a
  look at the map is a weighted sum over the cells of what each would add to the gates; the row
  drawn before has five cells of its own, with its five numbers as weights;
- everything that reads the LSTM's state (its gates, the attention's query, the output of the row
  just finished) is one matrix product;
- sigmoid(x) is 1 / (1 + exp(-x)) and tanh(x) is 1 - 2 / (1 + exp(2 x)), with their factors folded
  into the weights; the attention's exp(a + b) is exp(a) exp(b), the first computed once a photo;
- drawings that have ended leave the batch.

On a CPU a drawing does not depend on the others in its batch, bit for bit: every operation used
here rounds a row in the same way however many rows there are. (PyTorch's sigmoid, for one, does
not: the last few numbers of a tensor take another path. On a GPU the last bits may differ.)

Shapes: B photos, n drawings still running, N = H x W cells, X = N + 5 with the five of the row
before, C channels, G = 4 U gates of U units, A units of the attention, M components, K = 3 + 6 M
outputs, T rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sbir_ray import losses
from sbir_ray.models.drawing import DOWN, END, Drawing, Noise, finished

if TYPE_CHECKING:
    from sbir_ray.models.paper import PaperGenerator

_CPU_BLOCK, _GPU_BLOCK = 16, 256
_STEEP = 40.0
"""Limit of twice each term of the attention's tanh(a + b), so that exp() of it is finite. tanh() is
1 or -1 from 9 on, so it acts only where two terms above 20 would cancel."""
_QUANTUM = 4
"""The matrix product is always of a multiple of so many rows: it takes as long for four as for one,
and each new number of rows costs the library a compilation."""


class PaperDecoder:
    """The paper's generator's weights, as they were when this was made, laid out for drawing."""

    @torch.no_grad()
    def __init__(self, generator: PaperGenerator) -> None:
        config, cell = generator.config, generator.cell
        self.mixtures = config.mixtures
        self.max_points = config.max_points
        self.hidden = config.hidden
        self.attention = config.attention
        self.scale = float(generator.offset_scale)
        channels = generator.backbone.channels
        self.device = cell.weight_hh.device
        self.on_cpu = self.device.type == "cpu"
        self.block = _CPU_BLOCK if self.on_cpu else _GPU_BLOCK
        """Drawings to make at a time. On a CPU as many as stay in its cache."""

        # The gates come out as what exp() takes: -x for sigmoid(x), 2 x for tanh(x).
        to_gates = torch.full((4 * config.hidden, 1), -1.0, device=self.device)
        to_gates[2 * config.hidden : 3 * config.hidden] = 2.0
        weight_cells, weight_point = (cell.weight_ih * to_gates).split([channels, 5], 1)
        query, keys, latent = generator.attend_state, generator.attend_map, generator.to_latent
        assert keys.bias is not None
        self._latent = _Linear(latent.weight[: config.latent], latent.bias[: config.latent])
        self._start = _Linear(generator.to_state.weight, generator.to_state.bias)
        self._keys = _Linear(
            2 * keys.weight.permute(0, 2, 3, 1).flatten(1), 2 * (keys.bias + query.bias)
        )
        self._cells = _Linear(weight_cells, None)
        self._point_5G = weight_point.T.contiguous()
        self._score_A = -2 * generator.attend_score.weight[0]
        # A number in a tensor spares its conversion at every row.
        self._one, self._two, self._sigma_floor, self._rho_limit = torch.tensor(
            [1.0, 2.0, losses.SIGMA_FLOOR, losses.RHO_LIMIT], device=self.device
        ).unbind()
        self._columns_5 = torch.arange(5, device=self.device) * config.mixtures
        self._parts = [4 * config.hidden, config.attention, 3 + 6 * config.mixtures]
        bias_gates = (cell.bias_ih + cell.bias_hh) * to_gates[:, 0]
        self._state = _Linear(
            torch.cat([cell.weight_hh * to_gates, 2 * query.weight, generator.output.weight]),
            torch.cat([bias_gates, torch.zeros_like(query.bias), generator.output.bias]),
        )

    @torch.inference_mode()
    def draw(self, map_BCHW: Tensor, noise: Noise, *, attention: bool = False) -> list[Drawing]:
        """A drawing of each map, as long as its noise has rows at most.

        Args:
            map_BCHW: of ``Generator.encode``.
            noise: its rows T are one more than the most points a drawing may have.
            attention: whether the drawings tell where each row looked.
        """
        with torch.autocast(self.device.type, enabled=False):
            raw_BTK, looks_BTX, ends = self._decode(map_BCHW.float(), noise)
        looks_BTHW = None
        if attention:
            looks_BTHW = looks_BTX[:, :-1, :-5].unflatten(2, map_BCHW.shape[2:])
        return finished(raw_BTK, looks_BTX[:, 1:, -5:], ends, self.scale, looks_BTHW)

    def _decode(self, map_BCHW: Tensor, noise: Noise) -> tuple[Tensor, Tensor, list[int | None]]:
        """Outputs (B, T, K), looks (B, T + 1, X) with the row drawn before, and the end rows."""
        batch, steps = noise.choice_BTX.shape[:2]
        cells = map_BCHW[0, 0].numel()
        noise = Noise(*(numbers.to(self.device).transpose(0, 1) for numbers in noise))
        raw_BTK = torch.zeros(batch, steps, 3 + 6 * self.mixtures, device=self.device)
        looks_BTX = torch.zeros(batch, steps + 1, cells + 5, device=self.device)
        looks_BTX[:, 0, cells + 2 + DOWN] = 1.0  # the start token
        ends: list[int | None] = [None] * batch

        state = self._begin(map_BCHW)
        running = list(range(batch))
        done = 0
        while running and done < steps:
            index = torch.tensor(running, device=self.device)
            raw_TnK = raw_BTK.new_empty(steps - done, len(running), raw_BTK.shape[2])
            looks_TnX = looks_BTX.new_zeros(steps - done + 1, len(running), cells + 5)
            looks_TnX[0] = looks_BTX[index, done]
            part = Noise(*(numbers[done:, index] for numbers in noise))
            found, count = self._run(state, part, raw_TnK, looks_TnX)
            raw_BTK[index, done : done + count] = raw_TnK[:count].transpose(0, 1)
            looks_BTX[index, done : done + count + 1] = looks_TnX[: count + 1].transpose(0, 1)
            for row, end in found.items():
                ends[running[row]] = done + end
            done += count
            left = [row for row in range(len(running)) if row not in found]
            state = _State(*(tensor[left] for tensor in state))
            running = [running[row] for row in left]
        return raw_BTK, looks_BTX, ends

    def _begin(self, map_BCHW: Tensor) -> _State:
        batch, cells = len(map_BCHW), map_BCHW[0, 0].numel()
        key_BNA = map_BCHW.new_empty(batch, cells, self.attention)
        value_BXG = map_BCHW.new_empty(batch, cells + 5, 4 * self.hidden)
        value_BXG[:, cells:] = self._point_5G
        # On a CPU a photo at a time: the patches of many would not stay in its cache.
        for start in range(0, batch, 1 if self.on_cpu else batch):
            part = slice(start, start + 1 if self.on_cpu else batch)
            map_bHWC = F.pad(map_BCHW[part].permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
            patch_bHWC33 = map_bHWC.unfold(1, 3, 1).unfold(2, 3, 1)
            patch_bHWP = patch_bHWC33.permute(0, 1, 2, 4, 5, 3).flatten(3)
            key_BNA[part] = self._keys(patch_bHWP.flatten(1, 2)).clamp_(-_STEEP, _STEEP).exp_()
            value_BXG[part, :cells] = self._cells(map_bHWC[:, 1:-1, 1:-1].flatten(1, 2))
        latent_BZ = self._latent(map_BCHW.mean((2, 3)))
        h, c = torch.tanh(self._start(latent_BZ)).chunk(2, 1)
        return _State(key_BNA, value_BXG, h, c.contiguous(), torch.ones_like(h[:, :1]))

    def _run(
        self, state: _State, noise: Noise, raw_TnK: Tensor, looks_TnX: Tensor
    ) -> tuple[dict[int, int], int]:
        """Draw rows, until so many drawings have ended that the batch can shrink.

        Writes the outputs, the looks and the rows drawn, and moves ``state`` on.

        Returns:
            The end row of each drawing that has ended, by its place, and the number of rows drawn.
        """
        count, cells = state.keys_BNA.shape[:2]
        key_nNA, value_nXG, c_nU = state.keys_BNA, state.values_BXG, state.c_BU
        full_P1U = c_nU.new_zeros(_padded(count), 1, self.hidden)
        h_nU = full_P1U[:count, 0]
        h_nU.copy_(state.h_BU)
        score_nNA = torch.empty_like(key_nNA)
        score_LA = score_nNA.flatten(0, 1)
        energy_nN = c_nU.new_empty(count, cells)
        energy_L = energy_nN.flatten()
        gate_n1G = c_nU.new_empty(count, 1, 4 * self.hidden)
        i, f, g, o = gate_n1G[:, 0].chunk(4, 1)
        squashed_nU = torch.empty_like(c_nU)

        ended: dict[int, int] = {}
        from_gates_n1G, query_n1A, _ = self._state(full_P1U)[:count].split(self._parts, 2)
        # The views of all rows are made at once: at batch 1 a view costs as much as a sum.
        steps = zip(
            looks_TnX.unbind(),
            looks_TnX[:, :, :cells].unbind(),
            looks_TnX[1:, :, cells:].unbind(),
            raw_TnK.unbind(),
            noise.choice_BTX.unbind(),
            noise.offset_BT2.unbind(),
            noise.end_BT[..., None].unbind(),
            strict=False,
        )
        for t, (look_nX, attention_nN, row_n5, raw_nK, *numbers) in enumerate(steps):
            query_n1A = query_n1A.clamp(-_STEEP, _STEEP).exp_()
            torch.mul(key_nNA, query_n1A, out=score_nNA).add_(self._one).reciprocal_()
            torch.mv(score_LA, self._score_A, out=energy_L)
            torch.softmax(energy_nN, 1, out=attention_nN)
            torch.baddbmm(from_gates_n1G, look_nX[:, None], value_nXG, out=gate_n1G)
            gate_n1G.exp_().add_(self._one).reciprocal_()
            # tanh = 1 - 2 g
            c_nU.mul_(f).add_(i).addcmul_(i, g, value=-2)
            torch.mul(c_nU, self._two, out=squashed_nU).exp_().add_(self._one).reciprocal_()
            torch.addcmul(o, o, squashed_nU, value=-2, out=h_nU)

            from_gates_n1G, query_n1A, raw_n1K = self._state(full_P1U)[:count].split(self._parts, 2)
            raw_nK.copy_(raw_n1K[:, 0])
            pen_n1 = self._choose(raw_nK, Noise(*numbers), state.odds_B1, row_n5)
            for row, (pen,) in enumerate(pen_n1.tolist()):
                if pen == END and row not in ended:
                    ended[row] = t
            left = count - len(ended)
            if left == 0 or _padded(left) < _padded(count):
                state.h_BU.copy_(h_nU)
                return ended, t + 1
        return ended, len(raw_TnK)

    def _choose(self, raw_nK: Tensor, noise: Noise, odds_n1: Tensor, row_n5: Tensor) -> Tensor:
        """Write the rows (n, 5) that follow from the outputs and one row of noise (n, ...).

        Moves the odds of having gone on so far, too.

        Returns:
            The pen states (n, 1).
        """
        pen_n3, component_nM, table_nL = raw_nK.split([3, self.mixtures, 5 * self.mixtures], 1)
        noise_n2, noise_nM = noise.choice_BTX.split([2, self.mixtures], 1)
        odds_n1.mul_(self._one - pen_n3.softmax(1)[:, END:])
        pen_n1: Tensor = (pen_n3[:, :END] + noise_n2).argmax(1, keepdim=True)
        pen_n1.masked_fill_(odds_n1 < noise.end_BT, END)
        component_n1 = (component_nM + noise_nM).argmax(1, keepdim=True)
        # Of the component: mean x, mean y, sigma x, sigma y, rho, as ``losses.mixture`` has them.
        place_n5 = component_n1 + self._columns_5
        mean_n2, sigma_n2, rho_n1 = table_nL.gather(1, place_n5).split([2, 2, 1], 1)
        # exp(floor + softplus(s - floor)) = exp(floor) + exp(s)
        sigma_n2 = sigma_n2.exp() + self._sigma_floor
        rho_n1 = rho_n1.tanh() * self._rho_limit
        x_n1, y_n1 = noise.offset_BT2.split(1, 1)
        rest_n1 = torch.addcmul(self._one, rho_n1, rho_n1, value=-1).sqrt_()
        correlated_n2 = torch.cat([x_n1, (y_n1 * rest_n1).addcmul_(x_n1, rho_n1)], 1)
        row_n2, pen_row_n3 = row_n5.split([2, 3], 1)
        torch.addcmul(mean_n2, sigma_n2, correlated_n2, out=row_n2)
        pen_row_n3.scatter_(1, pen_n1, 1.0)
        return pen_n1


class _State(NamedTuple):
    """What the rows still to draw depend on."""

    keys_BNA: Tensor
    """exp() of what the attention knows of each cell, doubled."""
    values_BXG: Tensor
    """What each cell, and each of the five numbers of the row before, adds to the gates."""
    h_BU: Tensor
    c_BU: Tensor
    odds_B1: Tensor
    """Of having gone on so far."""


class _Linear:
    """x W^T + b for rows x (n, in); on a CPU each row's result does not depend on n.

    oneDNN, which PyTorch's convolutions use on a CPU, is faster here than the library behind its
    matrix products, once the weights are laid out for it, and adds up every row in the same order.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # Copies: the generator may be trained on while this draws.
        self.bias = None if bias is None else bias.detach().float().clone()
        self.weight = weight.detach().float().clone(memory_format=torch.contiguous_format)
        self.packed = self.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _CPU_BLOCK)

    def __call__(self, rows: Tensor) -> Tensor:
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                rows, self.weight, self.bias, "none", [], ""
            )
            return out
        return F.linear(rows, self.weight, self.bias)


def _padded(count: int) -> int:
    return -(-count // _QUANTUM) * _QUANTUM
