"""What a joint run leaves to be looked at: the same photos drawn again, certainty, attention."""

import json

import numpy as np
import pytest
import torch

from sbir_ray import joint_report
from sbir_ray.certainty import certainty_deciles
from sbir_ray.data.photos import align
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import fit, unflatten
from sbir_ray.evaluate import ranks
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.paper import PaperGenerator
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.train.exhibits import Exhibits, finish
from tests.tiny import generator_config, photo, retrieval_config

COUNT = 5


def photos(size, count=COUNT):
    aligned = [align(photo(number), size).transpose(2, 0, 1) for number in range(count)]
    return np.stack(aligned)


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    config = generator_config()
    return (
        PaperGenerator(config.model),
        PairDiscriminator(config.discriminator),
        RetrievalNet(retrieval_config().model),
    )


def exhibits(run, networks, count=COUNT):
    generator, discriminator, _ = networks
    ids = [f"p{number}" for number in range(count)]
    sides = (generator.config.image_size, discriminator.config.image_size)
    return Exhibits(run, ids, *(photos(side, count) for side in sides))


def lines(run):
    return [json.loads(line) for line in (run / "drawings.jsonl").read_text().splitlines()]


class Board:
    def __init__(self):
        self.images = []

    def add_image(self, tag, img_tensor, global_step):
        self.images.append((tag, img_tensor, global_step))


def test_a_line_holds_the_greedy_drawings_and_their_certainty(tmp_path, networks):
    generator, discriminator, _ = networks
    exhibits(tmp_path, networks).draw(30, 6, generator, discriminator)
    (line,) = lines(tmp_path)
    assert (line["step"], line["version"]) == (30, 6)
    assert line["photo_ids"] == [f"p{number}" for number in range(COUNT)]
    pixels = torch.from_numpy(photos(64))
    drawings = generator.draw(pixels, [0] * COUNT)
    for rows, drawing in zip(line["strokes"], drawings, strict=True):
        for found, stroke in zip(unflatten(rows), drawing.strokes, strict=True):
            assert np.abs(found - stroke).max() < 0.051
    config = generator.config
    fitted = [fit(d.strokes, config.max_points, config.epsilon) for d in drawings]
    raster = torch.from_numpy(rasterise(fitted, 64))
    with torch.no_grad():
        expected = discriminator.certainty(pixels, raster).tolist()
    assert line["certainty"] == pytest.approx(expected, abs=1e-4)


def test_drawing_changes_nothing_that_training_depends_on(tmp_path, networks):
    generator, discriminator, retrieval = networks
    before = [p.clone() for n in networks for p in n.state_dict().values()]
    retrieval.train()
    discriminator.train()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    exhibits(tmp_path, networks).draw(0, 0, generator, discriminator, Board())
    finish(tmp_path, 1, 1, *networks, ["a", "b", "c"], {64: photos(64, 3)}, 0.25)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert retrieval.training
    assert discriminator.training
    after = [p for n in networks for p in n.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(p.grad is None for n in networks for p in n.parameters())


def test_lines_after_the_resumed_step_are_dropped(tmp_path, networks):
    generator, discriminator, _ = networks
    first = exhibits(tmp_path, networks)
    for step in (0, 10, 20):
        first.draw(step, step // 5, generator, discriminator)
    whole = lines(tmp_path)
    with (tmp_path / "drawings.jsonl").open("a") as stream:
        stream.write('{"step": 30, "ver')
    again = exhibits(tmp_path, networks)
    again.resume(15)
    assert [line["step"] for line in lines(tmp_path)] == [0, 10]
    again.draw(10, 2, generator, discriminator)
    again.draw(20, 4, generator, discriminator)
    assert lines(tmp_path) == whole


def test_there_is_nothing_to_resume_before_the_first_line(tmp_path, networks):
    generator, discriminator, _ = networks
    start = exhibits(tmp_path, networks)
    start.resume(0)
    start.draw(0, 0, generator, discriminator)
    assert [line["step"] for line in lines(tmp_path)] == [0]


def test_the_board_gets_the_photos_beside_their_drawings(tmp_path, networks):
    generator, discriminator, _ = networks
    board = Board()
    exhibits(tmp_path, networks).draw(7, 1, generator, discriminator, board)
    ((tag, picture, step),) = board.images
    assert (tag, step, picture.dtype) == ("drawings", 7, np.uint8)
    assert picture.shape == (3, 2 * 64, 3 * 2 * 64)
    pixels = photos(64)
    drawings = generator.draw(torch.from_numpy(pixels), [0] * COUNT)
    raster = 255 - rasterise([d.strokes for d in drawings], 64)
    for number in range(COUNT):
        row, column = divmod(number, 3)
        cell = picture[:, 64 * row :, 128 * column :][:, :64, :128]
        assert (cell[:, :, :64] == pixels[number]).all()
        assert (cell[:, :, 64:] == raster[number]).all()
    assert (picture[:, 64:, 256:] == 255).all()


def test_what_was_drawn_can_be_read_again(tmp_path, networks):
    generator, discriminator, _ = networks
    kept = exhibits(tmp_path, networks)
    for step in range(0, 70, 10):
        kept.draw(step, step // 10, generator, discriminator)
    found = joint_report.read_lessons(tmp_path, columns=4)
    assert found.columns == [(0, 0), (20, 2), (40, 4), (60, 6)]
    assert found.times == 7
    assert len(found.photos) == COUNT
    pixels = photos(64)
    for number, row in enumerate(found.photos):
        assert np.abs(row.photo.astype(int) - pixels[number].transpose(1, 2, 0)).mean() < 4
        assert row.certainty == [lines(tmp_path)[i]["certainty"][number] for i in (0, 2, 4, 6)]


def test_the_certainty_table_holds_the_ranks_under_the_retrieval_network(tmp_path, networks):
    generator, _, retrieval = networks
    ids, pixels = [f"p{i}" for i in range(14)], photos(64, 14)
    finish(tmp_path, 240, 48, *networks, ids, {64: pixels}, 0.5, seed=3)
    record = json.loads((tmp_path / "certainty.json").read_text())
    assert (record["step"], record["version"], record["temperature"]) == (240, 48, 0.5)
    assert record["photo_ids"] == ids
    seeds = [3 * 1_000_003 + number for number in range(14)]
    drawings = generator.draw(torch.from_numpy(pixels), seeds, 0.5)
    retrieval.eval()
    with torch.no_grad():
        raster = torch.from_numpy(rasterise([d.strokes for d in drawings], 64))
        sketch_ND = retrieval.embed_sketches(raster).numpy()
        photo_ND = retrieval.embed_photos(torch.from_numpy(pixels)).numpy()
    assert record["rank"] == ranks(sketch_ND, photo_ND, np.arange(14)).tolist()
    table = joint_report.read_certainty(tmp_path)
    assert (table.pairs, table.step, table.temperature) == (14, 240, 0.5)
    expected = certainty_deciles(record["certainty"], record["rank"])
    for found, wanted in zip(table.deciles, expected, strict=True):
        assert (found.count, found.found, found.found10) == (
            wanted.count,
            wanted.found,
            wanted.found10,
        )
        assert found.certainty == pytest.approx(wanted.certainty, abs=1e-6)
    sure = [pair.certainty for pair in table.examples]
    assert sure == sorted(record["certainty"], reverse=True)
    best = int(np.argmax(record["certainty"]))
    assert table.examples[0].rank == record["rank"][best]
    strokes = zip(table.examples[0].sketch, drawings[best].strokes, strict=True)
    assert all(np.abs(found - drawn).max() < 0.051 for found, drawn in strokes)


def test_the_attention_of_each_point_is_kept(tmp_path, networks):
    generator = networks[0]
    pixels = photos(64, 3)
    finish(tmp_path, 240, 48, *networks, ["a", "b", "c"], {64: pixels}, 0.25)
    drawings = generator.draw(torch.from_numpy(pixels), [0] * 3, attention=True)
    looks = joint_report.read_looks(tmp_path, moments=10_000)
    assert len(looks) == 3
    for look, drawing in zip(looks, drawings, strict=True):
        points = np.concatenate(drawing.strokes)
        assert len(look.moments) == len(points)
        for moment, share, point in zip(look.moments, drawing.attention, points, strict=False):
            assert moment.share == pytest.approx(share, abs=1e-5)
            assert np.abs(moment.now[-1][-1] - point).max() < 0.051


def test_no_more_pairs_are_searched_than_are_wanted(tmp_path, networks, monkeypatch):
    monkeypatch.setattr("sbir_ray.train.exhibits.MOST_PAIRS", 4)
    finish(tmp_path, 1, 1, *networks, list("abcdef"), {64: photos(64, 6)}, 0.0)
    record = json.loads((tmp_path / "certainty.json").read_text())
    assert record["photo_ids"] == list("abcd")
    assert len(record["rank"]) == len(record["certainty"]) == 4
    assert sorted(e["number"] for e in record["examples"]) == [0, 1, 2, 3]
