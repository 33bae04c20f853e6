"""The generator's decoder against a plain loop that follows the paper's step by step.

    python tests/bench/bench_generator.py [--rounds 3]

Both draw from the same maps (8 x 8 x 512), weights (LSTM 512, attention 256, 20 mixtures) and
random numbers, on one thread, and have to draw the same, within TOLERANCE. The plain loop computes
the attention's convolution anew for every row and always makes 100 rows. The program's decoder is
timed twice: when no drawing ends before row 100, and when they end as people's drawings of chairs
do (48 points on average); the second shows what its stop is worth. Laying out the weights, done
once for any number of drawings, is timed by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sbir_ray import losses
from sbir_ray.config import GeneratorConfig
from sbir_ray.models.drawing import Drawing, Noise
from sbir_ray.models.paper import PaperGenerator
from sbir_ray.models.paper_decoder import PaperDecoder

ROWS = 100
TOLERANCE = 1e-3
"""Largest difference of a row's numbers, in standard deviations of the offsets. Each row starts
from the one before, so rounding adds up over 100 of them."""


@torch.inference_mode()
def plain(generator: PaperGenerator, map_BCHW: Tensor, noise: Noise) -> Tensor:
    """Rows (B, 100, 5), by the equations as they stand in the paper."""
    mean_BZ = generator.to_latent(map_BCHW.mean((2, 3))).chunk(2, 1)[0]
    h, c = torch.tanh(generator.to_state(mean_BZ)).chunk(2, 1)
    row_B5 = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]]).repeat(len(map_BCHW), 1)
    odds_B = torch.ones(len(map_BCHW))
    rows = []
    for t in range(ROWS):
        query_BA11 = generator.attend_state(h)[:, :, None, None]
        energy_BAHW = torch.tanh(generator.attend_map(map_BCHW) + query_BA11)
        score_BN = generator.attend_score(energy_BAHW.flatten(2).transpose(1, 2)).squeeze(2)
        attention_BN = score_BN.softmax(1)
        context_BC = (map_BCHW.flatten(2) * attention_BN[:, None]).sum(2)
        h, c = generator.cell(torch.cat([context_BC, row_B5], 1), (h, c))
        raw_BK = generator.output(h)
        odds_B = odds_B * (1 - raw_BK[:, :3].softmax(1)[:, 2])
        pen_B = (raw_BK[:, :2] + noise.choice_BTX[:, t, :2]).argmax(1)
        pen_B = pen_B.where(odds_B >= noise.end_BT[:, t], 2)
        mix = losses.mixture(raw_BK[:, 3:])
        component_B = (mix.log_pi + noise.choice_BTX[:, t, 2:]).argmax(1)
        each_B = torch.arange(len(raw_BK))
        mean_B2 = mix.mean[each_B, component_B]
        sigma_B2 = mix.log_sigma[each_B, component_B].exp()
        rho_B = mix.rho[each_B, component_B]
        x_B, y_B = noise.offset_BT2[:, t].unbind(1)
        normal_B2 = torch.stack([x_B, rho_B * x_B + (1 - rho_B**2).sqrt() * y_B], 1)
        row_B5 = torch.cat([mean_B2 + sigma_B2 * normal_B2, F.one_hot(pen_B, 3).float()], 1)
        rows.append(row_B5)
    return torch.stack(rows, 1)


def ending(noise: Noise, lengths: np.ndarray | None) -> Noise:
    """The noise with which a drawing ends after so many points, or never."""
    end_BT = torch.full_like(noise.end_BT, -1.0)
    if lengths is not None:
        for row, length in enumerate(lengths.tolist()):
            end_BT[row, length] = 2.0
    return noise._replace(end_BT=end_BT)


def compare(rows_BT5: Tensor, drawings: list[Drawing]) -> float:
    """The largest difference of the rows that belong to the drawings."""
    worst = 0.0
    for rows, drawing in zip(rows_BT5.numpy(), drawings, strict=True):
        points = len(drawing.rows) - drawing.ended
        worst = max(worst, float(np.abs(rows[:points] - drawing.rows[:points]).max()))
        assert not drawing.ended or rows[points, 4] == 1
    return worst


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Of the process, which has one thread: the time it waits for others does not count."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="the best round of each counts")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GeneratorConfig(
        backbone="vgg16",
        weights="none",
        image_size=256,
        latent=128,
        hidden=512,
        attention=256,
        mixtures=20,
        max_points=ROWS - 1,
    )
    generator = PaperGenerator(config).eval()
    with torch.no_grad():
        generator.output.weight.mul_(4)  # drawings that depend on the photo and on the row before
    laying = min(seconds(generator.decoder, 1) for _ in range(rounds))
    decoder: PaperDecoder = generator.decoder()
    print(f"laying out the weights, once: {laying * 1e3:.1f} ms")
    rng = np.random.default_rng(0)
    for batch in (1, 64):
        map_BCHW = torch.randn(batch, 512, 8, 8).relu()
        lengths = np.clip(rng.normal(48, 14, batch), 15, ROWS - 2).astype(int)
        if batch == 1:
            lengths[:] = 48
        for temperature in (0.0, 1.0):
            noise = Noise.seeded(range(batch), ROWS, config.mixtures, temperature)
            whole, short = ending(noise, None), ending(noise, lengths)

            def draw(noise: Noise, map_BCHW: Tensor = map_BCHW) -> list[Drawing]:
                drawings: list[Drawing] = []
                for start in range(0, len(map_BCHW), decoder.block):
                    part = slice(start, start + decoder.block)
                    few = Noise(*(numbers[part] for numbers in noise))
                    drawings += decoder.draw(map_BCHW[part], few)
                return drawings

            difference = compare(plain(generator, map_BCHW, whole), draw(whole))
            difference = max(difference, compare(plain(generator, map_BCHW, short), draw(short)))
            assert difference < TOLERANCE, difference
            slow, fast, stopped = [], [], []
            repeats = 10 if batch == 1 else 1
            for _ in range(rounds):
                slow.append(seconds(lambda: plain(generator, map_BCHW, short), 1))  # noqa: B023
                fast.append(seconds(lambda: draw(whole), repeats))  # noqa: B023
                stopped.append(seconds(lambda: draw(short), repeats))  # noqa: B023
            kind = "greedy" if temperature == 0 else "sampled"
            print(
                f"batch {batch:2}, {kind}: plain {min(slow) * 1e3:.1f} ms; "
                f"{ROWS} rows {min(fast) * 1e3:.1f} ms, {min(slow) / min(fast):.1f}x; "
                f"natural end {min(stopped) * 1e3:.1f} ms, {min(slow) / min(stopped):.1f}x; "
                f"largest difference {difference:.1e}"
            )


if __name__ == "__main__":
    main()
