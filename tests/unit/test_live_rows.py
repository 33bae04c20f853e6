"""Live rows: drawn as the generator draws, by weights that may be replaced; whole on arrival."""

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from sbir_ray.data import photos
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import fit
from sbir_ray.joint_config import StreamConfig
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.paper import PaperGenerator
from sbir_ray.stream.live_photos import TicketPhoto
from sbir_ray.stream.live_rows import (
    Failed,
    LiveRow,
    LiveSketcher,
    decode_photos,
    decode_rows,
    encode_photos,
    encode_rows,
    published,
    ticket_seed,
)
from sbir_ray.stream.sketchers import Drawn
from tests.tiny import generator_config, photo

STREAM = StreamConfig(temperature=0.25)
SIDES = (48, 64)
COUNT = 5


@pytest.fixture(scope="module")
def networks():
    """G of 64 pixels and D of 48."""
    config = generator_config()
    torch.manual_seed(0)
    generator = PaperGenerator(config.model)
    generator.set_offset_scale(20.0)
    with torch.no_grad():
        generator.output.bias[2] -= 3  # else an untrained one ends at its first point
    judge = PairDiscriminator(dataclasses.replace(config.discriminator, image_size=48))
    return generator.eval(), judge.eval()


@pytest.fixture
def sketcher(networks):
    return LiveSketcher(*copy.deepcopy(networks), STREAM, samples=2)


@pytest.fixture(scope="module")
def pictures():
    return [
        {side: photos.align(photo(n), side).transpose(2, 0, 1).copy() for side in SIDES}
        for n in range(COUNT)
    ]


def draw(sketcher, pictures, which=range(COUNT)):
    return sketcher.draw(
        [100 + i for i in which],
        [f"p{i}" for i in which],
        [pictures[i] for i in which],
        [ticket_seed(3, 100 + i) for i in which],
    )


def same_strokes(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same(row, other):
    assert (row.ticket, row.photo_id, row.seed) == (other.ticket, other.photo_id, other.seed)
    assert same_strokes(row.drawn.strokes, other.drawn.strokes)
    for name in ("certainty", "log_prob", "ended", "rows", "rank"):
        assert getattr(row.drawn, name) == getattr(other.drawn, name)
    for sample, twin in zip(row.samples, other.samples, strict=True):
        assert np.array_equal(sample.rows, twin.rows)
        assert same_strokes(sample.strokes, twin.strokes)
        assert (sample.log_prob, sample.ended) == (twin.log_prob, twin.ended)


def test_the_pseudo_sketch_is_the_generators_drawing_judged_as_in_training(sketcher, pictures):
    rows = draw(sketcher, pictures)
    generator, judge = sketcher.generator, sketcher.discriminator
    at = {side: torch.from_numpy(np.stack([p[side] for p in pictures])) for side in SIDES}
    drawings = generator.draw(at[64], [row.seed for row in rows], 0.25)
    fitted = [fit(d.strokes, 24, generator.config.epsilon) for d in drawings]
    with torch.no_grad():
        certainty = judge.certainty(at[48], torch.from_numpy(rasterise(fitted, 48))).tolist()
    for row, drawing, sure in zip(rows, drawings, certainty, strict=True):
        assert same_strokes(row.drawn.strokes, drawing.strokes)
        assert (row.drawn.log_prob, row.drawn.ended) == (drawing.log_prob, drawing.ended)
        assert row.drawn.rows == len(drawing.rows)
        assert row.drawn.certainty == pytest.approx(sure, abs=1e-5)
        assert row.drawn.rank == 0


def test_samples_are_of_the_model_itself_and_differ(sketcher, pictures):
    rows = draw(sketcher, pictures)
    at_64 = torch.from_numpy(np.stack([p[64] for p in pictures]))
    for row, picture in zip(rows, at_64, strict=True):
        first, second = row.samples
        assert not np.array_equal(first.rows, second.rows)
        for sample in row.samples:
            length = torch.tensor([len(sample.rows)])
            with torch.no_grad():
                log_prob = sketcher.generator.log_prob(
                    picture[None], torch.from_numpy(sample.rows)[None], length
                )
            assert sample.log_prob == pytest.approx(float(log_prob.sum()), abs=1e-3)
            assert sample.ended == (sample.rows[-1, 4] == 1)


def test_a_row_depends_on_its_photo_and_seed_alone(sketcher, pictures):
    together = draw(sketcher, pictures)
    for i in (0, 3):
        (alone,) = draw(sketcher, pictures, [i])
        assert_same(alone, together[i])
    other = sketcher.draw([0], ["p0"], pictures[:1], [ticket_seed(4, 100)])[0]
    assert other.drawn.log_prob != together[0].drawn.log_prob


def test_published_weights_make_another_sketcher_draw_the_same(networks, sketcher, pictures):
    generator, judge = copy.deepcopy(networks)
    with torch.no_grad():
        for network in (generator, judge):
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        generator.offset_scale.fill_(25.0)
    trained = LiveSketcher(generator, judge, STREAM, samples=1)
    sent = {name: tensor.numpy().copy() for name, tensor in published(generator, judge).items()}
    for array in sent.values():
        array.flags.writeable = False

    sketcher.samples = 1
    before = draw(sketcher, pictures)
    sketcher.load(7, sent)
    after = draw(sketcher, pictures)

    assert [row.version for row in before + after] == [0] * COUNT + [7] * COUNT
    for row, old, twin in zip(after, before, draw(trained, pictures), strict=True):
        assert_same(row, twin)
        assert row.drawn.certainty != old.drawn.certainty
        assert not same_strokes(row.drawn.strokes, old.drawn.strokes)
    with pytest.raises(KeyError):
        sketcher.load(8, {"generator.nothing": np.zeros(1)})


def test_only_what_training_changes_is_published(networks):
    generator, judge = copy.deepcopy(networks)
    names = set(published(generator, judge))
    assert {"generator.offset_scale", "generator.cell.weight_hh"} <= names
    assert not [name for name in names if name.startswith("generator.backbone.")]
    assert {f"discriminator.{name}" for name in judge.state_dict()} <= names
    generator.attend_map.requires_grad_(False)
    assert names - set(published(generator, judge)) == {
        "generator.attend_map.weight",
        "generator.attend_map.bias",
    }
    assert not [name for name in published(generator, None) if name.startswith("discriminator")]


def test_without_weights_a_sketcher_draws_with_what_its_networks_now_hold(sketcher, pictures):
    before = draw(sketcher, pictures)
    with torch.no_grad():
        sketcher.generator.output.bias.add_(0.5)
    sketcher.load(2, {})
    after = draw(sketcher, pictures)
    assert after[0].version == 2
    assert not same_strokes(before[0].drawn.strokes, after[0].drawn.strokes)


def test_a_ranker_sees_its_own_size_and_a_sketcher_says_what_it_needs(networks, pictures):
    class Ranker:
        image_size = 48

        def rank(self, photos_B3SS, sketches):
            assert photos_B3SS.shape == (COUNT, 3, 48, 48)
            return [1 + len(strokes) for strokes in sketches]

    generator, _ = networks
    sketcher = LiveSketcher(generator, None, STREAM, samples=0, ranker=Ranker())
    assert sketcher.sides == [48, 64]
    for row in draw(sketcher, pictures):
        assert row.drawn.rank == 1 + len(row.drawn.strokes)
        assert row.drawn.certainty == 1.0
        assert row.samples == ()
    assert LiveSketcher(generator, None, STREAM, samples=0).sides == [64]


def test_rows_arrive_as_they_were_sent(sketcher, pictures):
    rows = draw(sketcher, pictures)
    empty = LiveRow(9, "none", pictures[0], Drawn([], 0.5, -1.5, False, 3, 2), (), 4, 2**62)
    failed = Failed(11, "bad", "damaged-photo", "cannot be read")
    sent = [*rows, failed, empty]
    found = decode_rows(encode_rows(sent, [48]))
    assert found[COUNT] == failed
    for row, twin in zip(sent, found, strict=True):
        if isinstance(row, LiveRow):
            assert_same(row, twin)
            assert row.version == twin.version
            assert list(twin.photos) == [48]
            np.testing.assert_array_equal(twin.photos[48], row.photos[48])
            assert twin.photos[48].flags.writeable


def test_photos_arrive_as_they_were_sent(pictures):
    sent = [TicketPhoto(3, "a", pictures[0]), TicketPhoto(4, "b", {}, "broken")]
    whole, damaged = decode_photos(encode_photos(sent))
    assert (whole.ticket, whole.photo_id, whole.fault) == (3, "a", "")
    for side in SIDES:
        np.testing.assert_array_equal(whole.photos[side], pictures[0][side])
    assert damaged == sent[1]


def test_what_carries_rows_does_without_torch():
    code = (
        "import sys, sbir_ray.stream.live_rows, sbir_ray.stream.exchange, sbir_ray.stream.live;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
