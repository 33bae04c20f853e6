"""Sketchers: who they are, that they draw the same again, and what they refuse."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sbir_ray.data import photos, trace
from sbir_ray.data.strokes import count_points
from sbir_ray.errors import UserError
from sbir_ray.stream.sketchers import SketcherSpec
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import generator_jobs
from tests.tiny import generator_config, photo, tiny_pairs


def aligned(size, count=5):
    return np.stack([photos.align(photo(number), size) for number in range(count)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A generator and its discriminator, trained for a few steps."""
    root = tmp_path_factory.mktemp("run")
    pairs = tiny_pairs(root / "pairs")
    train(generator_jobs(str(root / "g"), generator_config(), {"pairs": str(pairs)}), workers=0)
    return root / "g"


def test_contours_are_the_traced_photo():
    (drawn,) = SketcherSpec("contours").make().draw(aligned(256, 1), [0])
    expected = trace.trace_photo(aligned(256, 1)[0])
    assert all(np.array_equal(a, b) for a, b in zip(drawn.strokes, expected, strict=True))
    assert (drawn.certainty, drawn.log_prob, drawn.ended) == (1.0, 0.0, True)
    assert (drawn.rows, drawn.rank) == (0, 0)


@pytest.mark.parametrize("name", ["contours", "edges"])
def test_a_photo_without_anything_on_it_gives_no_strokes(name):
    blank = np.full((1, 256, 256, 3), 255, np.uint8)
    assert SketcherSpec(name).make().draw(blank, [0])[0].strokes == []


def test_edges_are_drawn_along_the_shape():
    sketcher = SketcherSpec("edges").make()
    (drawn,) = sketcher.draw(aligned(256, 1), [0])
    points = np.concatenate(drawn.strokes)
    assert np.ptp(points, axis=0).max() == pytest.approx(190, abs=1e-3)
    assert sketcher.digest != SketcherSpec("contours").make().digest


def test_another_tracing_code_is_another_sketcher(tmp_path, monkeypatch):
    before = SketcherSpec("contours").make().digest
    assert SketcherSpec("contours").make().digest == before
    changed = tmp_path / "trace.py"
    changed.write_bytes(Path(trace.__file__).read_bytes() + b"# other\n")
    monkeypatch.setattr(trace, "__file__", str(changed))
    assert SketcherSpec("contours").make().digest != before


def test_tracing_workers_do_without_torch():
    code = (
        "import sys, sbir_ray.stream.sketching as s; s.SketcherSpec('contours').make();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_generators_drawing_depends_on_its_photo_and_seed_alone(run):
    sketcher = SketcherSpec(str(run), temperature=1.0).make()
    pictures = aligned(sketcher.image_size)
    together = sketcher.draw(pictures, [1, 2, 3, 4, 5])
    alone = [sketcher.draw(pictures[i : i + 1], [i + 1])[0] for i in (0, 3)]
    for one, same in zip(alone, (together[0], together[3]), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.strokes, same.strokes, strict=True))
        assert (one.log_prob, one.ended) == (same.log_prob, same.ended)
        assert one.certainty == same.certainty
    other = sketcher.draw(pictures[:1], [99])[0]
    assert other.log_prob != together[0].log_prob


def test_several_drawings_of_a_photo_are_those_of_one_each(run):
    sketcher = SketcherSpec(str(run), temperature=1.0).make()
    pictures = aligned(sketcher.image_size, 3)
    seeds = list(range(12))
    found = sketcher.draw(pictures, seeds)
    alone = [sketcher.draw(pictures[seed // 4 : seed // 4 + 1], [seed])[0] for seed in seeds]
    for one, same in zip(found, alone, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.strokes, same.strokes, strict=True))
        assert (one.log_prob, one.certainty) == (same.log_prob, same.certainty)
    assert len({one.log_prob for one in found}) == 12
    traced = SketcherSpec("contours").make().draw(aligned(256, 2), range(4))
    assert [count_points(one.strokes) for one in traced[::2]] == [
        count_points(one.strokes) for one in traced[1::2]
    ]


def test_a_generators_drawing_is_judged_by_its_discriminator(run):
    sketcher = SketcherSpec(str(run)).make()
    assert sketcher.judged
    drawn = sketcher.draw(aligned(sketcher.image_size), range(5))
    certainty = [d.certainty for d in drawn]
    assert all(0 < value < 1 for value in certainty)
    assert len(set(certainty)) == 5


def test_a_generators_drawing_says_over_how_many_rows_its_log_probability_is(run):
    sketcher = SketcherSpec(str(run), temperature=1.0).make()
    pictures = aligned(sketcher.image_size)
    photo_B3SS = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())
    drawings = sketcher.generator.draw(photo_B3SS, range(5), 1.0)
    drawn = sketcher.draw(pictures, range(5))
    assert [d.rows for d in drawn] == [len(d.rows) for d in drawings]
    assert [d.log_prob for d in drawn] == [d.log_prob for d in drawings]
    assert min(d.rows for d in drawn) > 1


def test_a_generator_is_named_by_its_weights(run):
    sketcher = SketcherSpec(str(run)).make()
    config = generator_config()
    assert sketcher.version == config.optim.steps
    assert sketcher.config["generator"]["hidden"] == config.model.hidden
    assert sketcher.config["discriminator"]["channels"] == config.discriminator.channels
    assert len(sketcher.digest.split("-")) == 2


def test_a_discriminator_of_another_size_sees_the_photo_at_its_size(run):
    sketcher = SketcherSpec(str(run)).make()
    model = sketcher.discriminator
    model.config = dataclasses.replace(model.config, image_size=32)
    drawn = sketcher.draw(aligned(sketcher.image_size), range(5))
    assert all(0 < d.certainty < 1 for d in drawn)


def test_what_is_no_sketcher_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="no such run folder; name one, or contours, edges"):
        SketcherSpec(str(tmp_path / "g")).make()
    with pytest.raises(UserError, match="not a run folder"):
        SketcherSpec(str(tmp_path)).make()
    with pytest.raises(UserError, match=r"temperature=0\.5: edges draws without chance"):
        SketcherSpec("edges", temperature=0.5).make()
