"""The model of scaling: parts that can be told by hand."""

import pytest

from tests.bench.scaling_model import Assumed, model, table

FIGURES = {
    "step_seconds": 0.8,
    "rows_per_step": 16,
    "pseudo_rows_per_step": 8,
    "gradient_bytes": 10_000_000,
    "embedding_bytes": 2048,
    "photos_per_second_per_actor": 20.0,
    "pair_seconds": 1e-8,
    "calls_per_second": 1000.0,
}


def test_one_gpu_talks_to_nobody():
    row = model(FIGURES, Assumed(gpu_times=10.0, rows_per_gpu=32), 1)
    assert row.seconds["rows"] == pytest.approx(32 * 0.05 / 10)
    assert row.seconds["gradient"] == row.seconds["gather"] == 0
    assert row.efficiency == pytest.approx(1, abs=0.001)


def test_a_gradient_crosses_the_link_twice_and_embeddings_grow_with_the_workers():
    assumed = Assumed(link_gbit=8.0, hop_microseconds=0.0, rows_per_gpu=32)
    eight, many = (model(FIGURES, assumed, gpus) for gpus in (8, 512))
    assert eight.seconds["gradient"] == pytest.approx(2 * 7 / 8 * 0.01)
    assert many.seconds["gather"] / eight.seconds["gather"] == pytest.approx(511 / 7)
    assert many.seconds["loss"] / eight.seconds["loss"] == pytest.approx(64**2)
    assert eight.bottleneck == "gradient"
    assert many.efficiency < eight.efficiency


def test_actors_draw_what_a_step_uses_and_the_exchange_is_busy_with_it():
    assumed = Assumed(gpu_times=10.0, rows_per_gpu=32, tries=1.0)
    row = model(FIGURES, assumed, 8)
    drawings = 8 * 32 / 2 / row.step
    assert row.actors - 1 < drawings / 200 <= row.actors
    assert row.exchange_share == pytest.approx(drawings / 16 * 4 / 1000)


def test_the_table_has_a_line_for_each_size():
    lines = table(FIGURES, Assumed(), (8, 64, 512)).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
