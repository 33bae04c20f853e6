"""The generator G: draws a photo stroke by stroke (paper, section 3.1).

Shapes: B drawings (one photo each), S side of a photo, C channels and N = H x W cells of the
backbone's map, Z latent numbers, U units of the LSTM, A of the attention, M mixture components,
K = 3 + 6 M outputs (three pen logits, then what ``losses.mixture`` reads), T rows of a drawing.

The row before the first is the start token (0, 0, 1, 0, 0). Each row is drawn after a look at the
whole map: the look is guided by the LSTM's state, and the row just drawn goes back in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

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
from sbir_ray.models.decoder import Decoder, Drawing, Noise, row_log_prob

GREEDY = 0.0
"""The temperature at which nothing is left to chance."""


class Generator(nn.Module):
    """G of the paper: a photo's map, a variational start, an LSTM that attends, mixtures out.

    Raises:
        UserError: the backbone or its weights cannot be had.
    """

    offset_scale: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = load_backbone(config.backbone, config.weights)
        self.backbone.requires_grad_(config.train_backbone)
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
        self.register_buffer("offset_scale", torch.ones(()))
        self.train()

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
        return self.nll_of_map(
            self.encode(photo_B3SS), points_BT5, length_B, noise_BZ=noise_BZ, attention=attention
        )

    def nll_of_map(
        self,
        map_BCHW: Tensor,
        points_BT5: Tensor,
        length_B: Tensor,
        *,
        noise_BZ: Tensor | None = None,
        attention: bool = False,
    ) -> dict[str, Tensor]:
        """:meth:`nll` of photos by their maps (:meth:`encode`), which need not be computed anew
        while the backbone does not train."""
        mean_BZ, log_var_BZ = self.latent(map_BCHW)
        latent_BZ = mean_BZ
        if noise_BZ is not None:
            latent_BZ = mean_BZ + (0.5 * log_var_BZ).exp() * noise_BZ
        raw_BTK, attention_BTN = self._unroll(map_BCHW, latent_BZ, points_BT5, length_B)
        rows_BT5 = points_BT5[:, : raw_BTK.shape[1]]
        offset_B, pen_B = losses.drawing_nll(
            raw_BTK[..., 3:], raw_BTK[..., :3], rows_BT5, length_B=length_B
        )
        terms = {
            "offset": offset_B,
            "pen": pen_B,
            "kl": losses.kl_divergence(mean_BZ, log_var_BZ),
        }
        if attention:
            terms["attention"] = attention_BTN.unflatten(2, map_BCHW.shape[2:])
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
        return self.log_prob_of_map(
            self.encode(photo_B3SS), rows_BT5, length_B, last_only=last_only
        )

    def log_prob_of_map(
        self,
        map_BCHW: Tensor,
        rows_BT5: Tensor,
        length_B: Tensor,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """:meth:`log_prob` of photos by their maps."""
        latent_BZ, _ = self.latent(map_BCHW)
        raw_BTK, _ = self._unroll(map_BCHW, latent_BZ, rows_BT5, length_B, last_only=last_only)
        rows_BT5 = rows_BT5[:, : raw_BTK.shape[1]]
        count_B = length_B.clamp(max=self.config.max_points)
        real_BT = torch.arange(raw_BTK.shape[1], device=raw_BTK.device) < count_B[:, None]
        return row_log_prob(raw_BTK, rows_BT5).where(real_BT, 0.0)

    # ----------------------------------------------------------------------- drawn again

    def redraw_of_map(
        self, map_BCHW: Tensor, rows_BT5: Tensor, length_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Drawings as differentiable functions of the weights, for ``raster.soft_rasterise``.

        The values are those drawn. Each offset has the gradient of ``losses.redrawn``, so that of
        the means, sigmas and correlations behind it, and each pen that of the probability of down.
        The rows are the LSTM's inputs as they were drawn: no gradient passes through them.

        Args:
            map_BCHW: the photos' maps (:meth:`encode`).
            rows_BT5: as for :meth:`log_prob`.
            length_B: as for :meth:`log_prob`.

        Returns:
            The canonical points (B, N, 2), canvas units, and the ink (B, N) of the segment from
            each to the next. Behind a drawing's last point that point is repeated without ink.
        """
        raw_BNK, _ = self._unroll(map_BCHW, self.latent(map_BCHW)[0], rows_BT5, length_B)
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
        """A drawing of each photo, at the latent's mean; no photo's depends on the others.

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
                map_BCHW = torch.cat([self.encode(group) for group in groups])
                drawings += decoder.draw(map_BCHW, noise, attention=attention)
        return drawings

    def decoder(self) -> Decoder:
        """The weights as they are now, laid out for drawing."""
        return Decoder(self)

    # ----------------------------------------------------------------------- parts

    def encode(self, photo_B3SS: Tensor) -> Tensor:
        """The backbone's map (B, C, H, W) of aligned photos (uint8, RGB)."""
        size = self.config.image_size
        assert photo_B3SS.dtype == torch.uint8, photo_B3SS.dtype
        assert photo_B3SS.shape[1:] == (3, size, size), photo_B3SS.shape
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_backbone):
            features: Tensor = self.backbone(self.backbone.normalise(photo_B3SS))
        return features

    def latent(self, map_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, Z) of the latent, from the map's average."""
        both_BZ = _at_least_single(self.to_latent(map_BCHW.mean((2, 3))))
        mean_BZ, log_var_BZ = both_BZ.chunk(2, 1)
        return mean_BZ, log_var_BZ

    def train(self, mode: bool = True) -> Self:
        """Training mode, in which the backbone's batch normalisation keeps its statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

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

        state_B2U = _at_least_single(torch.tanh(self.to_state(latent_BZ)))
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


def _at_least_single(values: Tensor) -> Tensor:
    """The values in float32 where autocast made them half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _canonical(path_BN2: Tensor) -> Tensor:
    """``strokes.canonical`` of each drawing's points, with a gradient."""
    low_B12, high_B12 = path_BN2.amin(1, keepdim=True), path_BN2.amax(1, keepdim=True)
    longest_B11 = (high_B12 - low_B12).amax(2, keepdim=True)
    scale_B11 = sketches.LONGEST / longest_B11.where(longest_B11 > 0, sketches.LONGEST)
    return (path_BN2 - (low_B12 + high_B12) / 2) * scale_B11 + sketches.CENTRE
