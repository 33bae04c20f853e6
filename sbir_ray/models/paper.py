"""The paper's generator: a photo's map, a variational start, an LSTM that attends (section 3.1).

Shapes: B drawings (one photo each), S side of a photo, C channels and N = H x W cells of the
backbone's map, Z latent numbers, U units of the LSTM, A of the attention, M mixture components,
K = 3 + 6 M outputs (three pen logits, then what ``losses.mixture`` reads), T rows of a drawing.

The row before the first is the start token (0, 0, 1, 0, 0). Each row is drawn after a look at the
whole map: the look is guided by the LSTM's state, and the row just drawn goes back in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig
from sbir_ray.models.generator import Generator, Outputs, Seen, at_least_single
from sbir_ray.models.paper_decoder import PaperDecoder


class PaperGenerator(Generator):
    """G of the paper.

    Raises:
        UserError: the backbone or its weights cannot be had.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        channels = self.backbone.channels
        self.to_latent = nn.Linear(channels, 2 * config.latent)
        self.to_state = nn.Linear(config.latent, 2 * config.hidden)
        self.attend_map = nn.Conv2d(channels, config.attention, 3, padding=1)
        self.attend_state = nn.Linear(config.hidden, config.attention)
        # A bias would add the same to all cells, which the softmax does not see.
        self.attend_score = nn.Linear(config.attention, 1, bias=False)
        self.cell = nn.LSTMCell(channels + 5, config.hidden)
        if not config.attend:
            # Scores that are all 0 and stay so: every look is at the map's average.
            nn.init.zeros_(self.attend_score.weight)
            for part in (self.attend_map, self.attend_state, self.attend_score):
                part.requires_grad_(False)
        self.output = nn.Linear(config.hidden, 3 + 6 * config.mixtures)
        self.train()

    def encode(self, photo_B3SS: Tensor) -> Tensor:
        """The backbone's map (B, C, H, W) of aligned photos (uint8, RGB)."""
        return self.backbone_map(photo_B3SS)

    def decoder(self) -> PaperDecoder:
        """The weights as they are now, laid out for drawing."""
        return PaperDecoder(self)

    def latent(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, Z) of the latent, from the map's average."""
        both_BZ = at_least_single(self.to_latent(map_BCHW.mean((2, 3))))
        mean_BZ, log_var_BZ = both_BZ.chunk(2, 1)
        return mean_BZ, log_var_BZ

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
        """See :class:`Generator`."""
        assert seen is None, "this generator sees sketches as they were drawn"
        mean_BZ, log_var_BZ = self.latent(code)
        latent_BZ = mean_BZ
        if noise_BZ is not None:
            latent_BZ = mean_BZ + (0.5 * log_var_BZ).exp() * noise_BZ
        raw_BTK, attention_BTN = self._unroll(
            code, latent_BZ, rows_BT5, length_B, last_only=last_only
        )
        return Outputs(
            raw_BTK,
            attention_BTN.unflatten(2, code.shape[2:]),
            losses.kl_divergence(mean_BZ, log_var_BZ),
        )

    def _unroll(
        self,
        map_BCHW: Tensor,
        latent_BZ: Tensor,
        points_BT5: Tensor,
        length_B: Tensor,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, T, K) and attention (B, T, N), not in half precision, given the rows; T the
        longest's. ``last_only``: the gradient stops before the output layer.

        Rows behind a drawing's end are not computed: the drawings are sorted by length, and the
        batch gets shorter as they end. What depends on the state alone, or not at all on it, is
        computed for all rows at once.
        """
        channels, hidden = map_BCHW.shape[1], self.config.hidden
        length_B, order_B = length_B.cpu().sort(descending=True, stable=True)
        steps = int(length_B[0])
        order_B = order_B.to(map_BCHW.device)
        map_BCHW, latent_BZ = map_BCHW[order_B], latent_BZ[order_B]

        cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
        keys_BNA = self.attend_map(map_BCHW).flatten(2).transpose(1, 2)
        weight_context, weight_point = self.cell.weight_ih.split([channels, 5], dim=1)
        start_B15 = points_BT5.new_tensor([0.0, 0.0, 1.0, 0.0, 0.0]).expand(len(points_BT5), 1, 5)
        before_BT5 = torch.cat([start_B15, points_BT5[:, : steps - 1]], 1)[order_B]
        from_points_BTG = F.linear(before_BT5, weight_point, self.cell.bias_ih + self.cell.bias_hh)
        weight_state = torch.cat([self.cell.weight_hh, self.attend_state.weight])

        state_B2U = at_least_single(torch.tanh(self.to_state(latent_BZ)))
        full = state_B2U.dtype
        h, c = state_B2U.chunk(2, 1)
        running_T = (length_B > torch.arange(steps)[:, None]).sum(1).tolist()
        states, attentions = [], []
        # Unbound and not indexed: the gradient of each index would be as large as the whole.
        for from_point_BG, running in zip(from_points_BTG.unbind(1), running_T, strict=True):
            if running < len(h):
                keys_BNA, cells_BNC = keys_BNA[:running], cells_BNC[:running]
                h, c = h[:running], c[:running]
            from_state = F.linear(h, weight_state)
            from_state_BG, query_BA = from_state.split([4 * hidden, self.config.attention], 1)
            query_BA = query_BA + self.attend_state.bias
            # tanh(x) = 2 sigmoid(2 x) - 1, which is several times as fast on a CPU.
            score_BNA = torch.sigmoid(2 * (keys_BNA + query_BA[:, None]))
            attention_BN = F.linear(score_BNA, 2 * self.attend_score.weight).to(full).softmax(1)
            attention_BN = attention_BN.squeeze(2)
            context_BC = (attention_BN[:, None] @ cells_BNC).squeeze(1)
            gates_BG = F.linear(context_BC, weight_context) + from_state_BG
            gates_BG = (gates_BG + from_point_BG[:running]).to(full)
            i, f, g, o = gates_BG.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
            attentions.append(attention_BN)
        # pad_packed_sequence puts both back into the order of the batch.
        inverse_B = order_B.argsort()
        state_BTU = _padded(states, running_T)
        raw_BTK = self.output(state_BTU.detach() if last_only else state_BTU).to(full)
        return raw_BTK[inverse_B], _padded(attentions, running_T)[inverse_B]


def _padded(steps: Sequence[Tensor], running_T: Sequence[int]) -> Tensor:
    """(B, T, ...) of the steps of a batch that gets shorter, 0 behind the ends."""
    packed = nn.utils.rnn.PackedSequence(torch.cat(list(steps)), torch.tensor(running_T))
    padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    return padded
