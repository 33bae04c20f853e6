"""What a step trains on: pairs stay pairs, splits stay apart, every source gives its share."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from sbir_ray.config import (
    AugmentConfig,
    ChoiceConfig,
    FilterConfig,
    RetrievalConfig,
    RetrievalLossConfig,
)
from sbir_ray.data import photos, raster, strokes
from sbir_ray.data.pairs import PairSet, hash_of, new_pairs
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.models.pair_norm import PairNorm
from sbir_ray.runs import load_retrieval
from sbir_ray.train import differences, generator_task, retrieval_task
from sbir_ray.train.job import Job, pseudo_folders, pseudo_inputs
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.retrieval_task import number_of, resized
from sbir_ray.train.tasks import build
from tests.tiny import NO_CHANGE, generator_config, photo, retrieval_config, sketch, tiny_pairs
from tests.tiny_pseudo import pseudo_row, tiny_pseudo
from tests.tiny_store import tiny_store

CPU = torch.device("cpu")
FLIPPED = dataclasses.replace(NO_CHANGE, flip=1.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return tiny_pairs(tmp_path_factory.mktemp("tiny") / "pairs")


def task_of(kind, config, **inputs):
    inputs = {name: str(path) for name, path in inputs.items()}
    return build(Job(kind, "unused", config, inputs), Ranks(), CPU)


def pseudo_folder(out, certainties, kept=True, choice=None):
    """A PSEUDO folder of the shapes from 20 on, one drawing each, with these certainties."""
    rows = [
        pseudo_row(
            20 + i,
            reason="" if kept else "min_certainty",
            photo_id=f"{i:064d}",
            certainty=certainty,
        )
        for i, certainty in enumerate(certainties)
    ]
    return tiny_pseudo(out, rows, choice=choice)


def test_photo_and_sketch_are_mirrored_together_for_retrieval(pairs):
    plain = task_of("retrieval", retrieval_config(augment=NO_CHANGE), pairs=pairs).batch(0)
    flipped = task_of("retrieval", retrieval_config(augment=FLIPPED), pairs=pairs).batch(0)
    assert torch.equal(flipped.photo_bCSS, plain.photo_bCSS.flip(-1))
    differ = (flipped.sketch_bSS.int() - plain.sketch_bSS.flip(-1).int()).abs()
    assert differ.max() <= 2
    assert torch.equal(flipped.photo_id_b, plain.photo_id_b)


def test_photo_and_sketch_are_mirrored_together_for_the_generator(pairs):
    plain = task_of("generator", generator_config(kind="paper", augment=NO_CHANGE), pairs=pairs)
    flipped = task_of("generator", generator_config(kind="paper", augment=FLIPPED), pairs=pairs)
    a, b = plain.batch(0), flipped.batch(0)
    assert [flip for _, flip in a.photo_b] == [False] * 4
    assert [flip for _, flip in b.photo_b] == [True] * 4
    for row, mirrored, length in zip(a.points_bT5, b.points_bT5, a.length_b, strict=True):
        points = int(length) - 1
        torch.testing.assert_close(mirrored[:points, 0], -row[:points, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(mirrored[:points, 1:], row[:points, 1:])
    pixels = torch.from_numpy(plain.pairs.photos[..., ::-1].copy())
    torch.testing.assert_close(plain.codes[1], plain.model.encode(pixels))


def test_the_default_augmentation_mirrors_half_of_the_generators_pairs(pairs):
    task = task_of("generator", generator_config(), pairs=pairs)
    flips = [flip for step in range(40) for _, flip in task.batch(step).photo_b]
    assert 0.35 < np.mean(flips) < 0.65


@pytest.mark.parametrize("kind", ["retrieval", "generator"])
def test_training_never_opens_the_test_split(pairs, monkeypatch, kind):
    opened = []
    load = PairSet.load.__func__

    def recording(cls, folder, split, size):
        opened.append(split)
        return load(cls, folder, split, size)

    monkeypatch.setattr(retrieval_task.PairSet, "load", classmethod(recording))
    config = retrieval_config() if kind == "retrieval" else generator_config()
    task = task_of(kind, config, pairs=pairs)
    task.batch(0)
    with torch.no_grad():
        task.evaluate()
    assert set(opened) == {"train", "val"}


def test_a_photo_that_comes_twice_in_a_batch_is_not_its_own_negative(tmp_path):
    few = tiny_pairs(tmp_path / "few", train=3)
    task = task_of("retrieval", retrieval_config(), pairs=few)
    batch = task.batch(0)
    ids = batch.photo_id_b.tolist()
    assert len(set(ids)) == 3
    assert len(ids) == 4
    rows = task._embed(task.model.eval(), batch)
    assert len(rows.photo_PD) == 3
    twice = [i for i, name in enumerate(ids) if ids.count(name) == 2]
    assert rows.photo_of_B[twice[0]] == rows.photo_of_B[twice[1]]


def test_pseudo_pairs_are_as_many_as_labelled_ones_and_carry_their_certainty(tmp_path, pairs):
    folder = pseudo_folder(tmp_path / "pseudo", [0.1, 0.2, 0.3, 0.4, 0.5])
    task = task_of("retrieval", retrieval_config(), pairs=pairs, pseudo=folder)
    batch = task.batch(3)
    assert batch.labelled == 4
    assert len(batch.photo_id_b) == 8
    assert batch.kept_b.all()
    assert batch.certainty_b[:4].tolist() == [1.0] * 4
    number = {number_of(f"{i:064d}"): i for i in range(5)}
    for name, certainty in zip(
        batch.photo_id_b[4:].tolist(), batch.certainty_b[4:].tolist(), strict=True
    ):
        assert certainty == pytest.approx(0.1 * (number[name] + 1))
    half = task_of("retrieval", retrieval_config(pseudo_share=0.5), pairs=pairs, pseudo=folder)
    assert len(half.batch(3).photo_id_b) == 6
    losses = task.losses(batch, 3)
    assert {"labelled", "pseudo", "certainty"} <= set(losses)


def test_of_a_photo_in_several_folders_one_drawing_is_taken_each_time(tmp_path, pairs):
    drawn = pseudo_folder(tmp_path / "drawn", [0.1, 0.2, 0.3, 0.4, 0.5])
    traced = pseudo_folder(tmp_path / "traced", [1.0, 1.0, 1.0])
    inputs = {**pseudo_inputs([drawn]), "pseudo-2": traced}
    assert pseudo_folders({"pairs": pairs, **pseudo_inputs([drawn, traced])}) == [drawn, traced]
    task = task_of("retrieval", retrieval_config(), pairs=pairs, **inputs)
    assert len(task.pseudo.photo_ids) == 5
    assert sorted(map(len, task.drawings_of)) == [1, 1, 2, 2, 2]
    certainties = np.concatenate([task.batch(step).certainty_b.numpy() for step in range(12)])
    assert {0.1, 1.0} <= {round(float(one), 3) for one in certainties}
    batch = task.batch(0)
    assert len(set(batch.photo_ids)) == len(batch.photo_ids)


def test_a_teacher_sees_the_pictures_at_the_size_it_was_trained_at(tmp_path, pairs):
    large = retrieval_config(steps=1, model=RetrievalConfig(weights="none", image_size=96, grid=2))
    fit(
        Job("retrieval", str(tmp_path / "large"), large, {"pairs": str(pairs)}), Ranks(), CPU, print
    )
    task = task_of("retrieval", retrieval_config(), pairs=pairs, teacher=tmp_path / "large")
    batch = task.batch(0)
    seen = []
    for module in (task.teacher, task.model):
        module.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-1]))
    assert torch.isfinite(task.losses(batch, 0)["distill"])
    assert seen == [64, 64, 96, 96]
    larger = resized(batch.photo_bCSS, 96)
    assert larger.shape == (4, 3, 96, 96)
    assert larger.dtype == torch.uint8
    for small, large in zip(batch.photo_bCSS.flatten(0, 1), larger.flatten(0, 1), strict=True):
        by_pillow = Image.fromarray(small.numpy()).resize((96, 96), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(by_pillow).astype(int) - large.numpy()).max() <= 1


def test_half_precision_is_refused_where_the_cpu_has_none(monkeypatch, pairs):
    monkeypatch.setattr(retrieval_task, "half_is_fast", lambda: False)
    with pytest.raises(UserError, match="no instructions for bfloat16"):
        task_of("retrieval", retrieval_config(cpu_bfloat16=True), pairs=pairs)


def test_a_store_without_a_kept_pseudo_pair_is_refused(tmp_path, pairs):
    folder = pseudo_folder(tmp_path / "pseudo", [0.1], kept=False)
    with pytest.raises(UserError, match="no pseudo pair was kept"):
        task_of("retrieval", retrieval_config(), pairs=pairs, pseudo=folder)


def test_other_drawings_are_chosen_without_drawing_again(tmp_path, pairs):
    sure = [0.1, 0.2, 0.3, 0.4, 0.5]
    folder = pseudo_folder(tmp_path / "pseudo", sure, choice=ChoiceConfig())
    config = retrieval_config(filters=FilterConfig(min_certainty=0.35))
    task = task_of("retrieval", config, pairs=pairs, pseudo=folder)
    assert task.pseudo.photo_ids == [f"{i:064d}" for i in (3, 4)]
    assert (
        len(task_of("retrieval", retrieval_config(), pairs=pairs, pseudo=folder).pseudo.photo_ids)
        == 5
    )
    with pytest.raises(UserError, match="filters and samples: there is no PSEUDO folder"):
        task_of("retrieval", config, pairs=pairs)


def test_a_drawing_that_came_as_a_picture_is_used_as_it_is(tmp_path):
    ink = raster.rasterise([sketch(0)], 128)[0]
    ink[60:70, 60:70] = 255  # what no stroke has
    rgb = photo(0)
    with new_pairs(tmp_path / "p", source="tiny", layout="folder") as writer:
        writer.add_photo({**photos.row_of_pixels(rgb, "0" * 64, "a", "a.png"), "split": "train"})
        writer.add_sketch(
            {
                "sketch_id": "a_1",
                "photo_id": "0" * 64,
                "split": "train",
                "strokes": strokes.flatten(sketch(0)),
                "drawing": photos.encode_png(255 - ink),
                "origin": "a.png",
            }
        )
    for augment, flip in ((NO_CHANGE, 1), (FLIPPED, -1)):
        task = task_of("retrieval", retrieval_config(augment=augment), pairs=tmp_path / "p")
        expected = task.pairs.drawings[0][:, ::flip]
        found = task.batch(0).sketch_bSS[0].numpy()
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2
        assert found[31:34, 31:34].min() > 200
        assert raster.rasterise([sketch(0)], 64)[0, 31:34, 31:34].max() == 0
    turned = AugmentConfig(flip=0, rotate=20, scale=0.1, shift=8, bend=0, stroke_dropout=0)
    task = task_of("retrieval", retrieval_config(augment=turned), pairs=tmp_path / "p")
    moved = task.batch(0).sketch_bSS[0].numpy()
    assert not np.array_equal(moved, task.pairs.drawings[0])
    assert moved.sum() == pytest.approx(task.pairs.drawings[0].sum(), rel=0.3)


def test_real_and_drawn_sketches_reach_the_discriminator_alike(tmp_path, pairs):
    from sbir_ray.train.loop import fit

    generator = Job("generator", str(tmp_path / "g"), generator_config(), {"pairs": str(pairs)})
    fit(generator, Ranks(), CPU, lambda _: None)
    task = task_of("discriminator", generator_config(), pairs=pairs, generator=tmp_path / "g")
    batch = task.batch(0)
    assert batch.real_bSS.shape == batch.drawn_bSS.shape == (4, 64, 64)
    for kind in (batch.real_bSS, batch.drawn_bSS):
        assert kind.dtype == torch.uint8
        assert (kind.flatten(1).max(1).values > 0).all()
    same = [torch.equal(a, b) for a, b in zip(batch.photo_bCSS, batch.wrong_bCSS, strict=True)]
    assert not any(same)


def test_batch_statistics_are_of_sketches_and_photos_together(pairs):
    config = retrieval_config(
        model=RetrievalConfig(weights="none", image_size=64, grid=2, frozen_norm=False)
    )
    task = task_of("retrieval", config, pairs=pairs)
    twin = task_of("retrieval", config, pairs=pairs)
    batch = task.batch(0)
    rows = task._embed(task.model.train(), batch)
    sketch_BD, photo_BD = twin.model.train()(batch.sketch_bSS, batch.photo_bCSS)
    assert torch.equal(rows.sketch_BD, sketch_BD)
    assert torch.equal(rows.photo_PD[rows.photo_of_B], photo_BD)
    for mine, other in zip(task.model.buffers(), twin.model.buffers(), strict=True):
        assert torch.equal(mine, other)


def differences_one_by_one(model, pairs, factors):
    """Sketch less photo of each pair, times its factor, each picture embedded alone."""
    rows = []
    for i, factor in enumerate(factors):
        picture = raster.rasterise([pairs.sketches[i]], 64)
        if isinstance(pairs, PairSet) and pairs.drawings[i] is not None:
            picture = pairs.drawings[i][None]
        sketch_D = model.embed_sketches(torch.from_numpy(picture))[0]
        photo = torch.from_numpy(pairs.photos[pairs.photo_of[i]])
        rows.append(factor * (sketch_D - model.embed_photos(photo[None])[0]))
    return torch.stack(rows)


def test_the_pair_norm_is_fitted_to_peoples_pairs_and_to_pseudo_pairs_by_their_certainty(
    pairs, tmp_path, monkeypatch
):
    folder = pseudo_folder(tmp_path / "pseudo", [0.25, 1.0, 0.0])
    task = task_of("retrieval", retrieval_config(), pairs=pairs, pseudo=folder)
    given = []
    monkeypatch.setattr(PairNorm, "fit", lambda _, difference_MD: given.append(difference_MD))
    task.trained.eval()
    with torch.no_grad():
        task.evaluate()
        people = differences_one_by_one(task.model, task.pairs, [1.0] * len(task.pairs.sketches))
        drawn = differences_one_by_one(task.model, task.pseudo, [0.5, 1.0, 0.0])
        torch.testing.assert_close(given[0], torch.cat([people, drawn]), atol=1e-4, rtol=1e-3)

        # Where not all are taken, people's come first.
        monkeypatch.setattr(differences, "PAIRS", len(people) + 1)
        task.evaluate()
        torch.testing.assert_close(given[1][: len(people)], people, atol=1e-4, rtol=1e-3)
        assert len(given[1]) == len(people) + 1
        monkeypatch.setattr(differences, "PAIRS", 2)
        task.evaluate()
    assert len(given[2]) == 2


def test_a_run_ends_with_its_pair_norm_and_a_teacher_has_none(pairs, tmp_path):
    runs = {}
    for name, on in (("with", True), ("without", False)):
        config = retrieval_config(1)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pair_norm=on))
        runs[name] = Job("retrieval", str(tmp_path / name), config, {"pairs": str(pairs)})
        fit(runs[name], Ranks(), CPU, lambda _: None)
    loaded = {name: load_retrieval(tmp_path / name).model for name in runs}
    assert (loaded["with"].pair_norm.change_K < 0).any()
    assert loaded["without"].pair_norm.change_K.numel() == 0
    # Training is the same with it and without.
    for name, value in loaded["without"].backbone.state_dict().items():
        assert torch.equal(value, loaded["with"].backbone.state_dict()[name]), name
    task = task_of("retrieval", retrieval_config(), pairs=pairs, teacher=tmp_path / "with")
    assert not task.teacher.pair_norm.change_K.any()


def test_embeddings_of_another_length_are_no_absolute_aim(pairs, tmp_path):
    teacher = Job("retrieval", str(tmp_path / "t"), retrieval_config(1), {"pairs": str(pairs)})
    fit(teacher, Ranks(), CPU, lambda _: None)
    loss = RetrievalLossConfig(distill="absolute")
    model = RetrievalConfig(weights="none", image_size=64, grid=1)
    config = retrieval_config(model=model, loss=loss)
    with pytest.raises(UserError, match=r"distill=absolute: .* take relational or pair"):
        task_of("retrieval", config, pairs=pairs, teacher=tmp_path / "t")
    loss = dataclasses.replace(loss, distill="pair")
    task_of("retrieval", dataclasses.replace(config, loss=loss), pairs=pairs, teacher=teacher.out)


def test_a_generator_has_steps_left_for_peoples_sketches():
    config = generator_config(steps=4)
    pen = dataclasses.replace(config.model.pen, contour_steps=4)
    with pytest.raises(ValueError, match=r"contour_steps: 4 of optim\.steps=4 leave none"):
        dataclasses.replace(config, model=dataclasses.replace(config.model, pen=pen))
    dataclasses.replace(config, model=dataclasses.replace(config.model, pen=pen, kind="paper"))


def test_only_the_chosen_photos_of_a_store_are_traced(pairs, tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "store", 9, shard=4)
    some = PhotoSet.load(store, 64, at_most=3, seed=1)
    whole = PhotoSet.load(store, 64)
    assert len(whole.photo_ids) == 9
    assert some.photo_ids == sorted(some.photo_ids)
    assert some.photo_ids == sorted(sorted(whole.photo_ids, key=lambda n: hash_of(1, n))[:3])
    for name, picture in zip(some.photo_ids, some.photos, strict=True):
        assert np.array_equal(picture, whole.photos[whole.photo_ids.index(name)])
    for count in (0, 3):
        config = generator_config()
        pen = dataclasses.replace(config.model.pen, contour_photos=count)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, pen=pen))
        task = task_of("generator", config, pairs=pairs, photos=store)
        assert len(task.photos) == len(task.pairs.photos) + count
        assert len(task.codes) == 2
    # Where there is no room for all codes, each is computed when it is needed.
    monkeypatch.setattr(generator_task, "KEPT_BYTES", 1000)
    bare = task_of("generator", config, pairs=pairs, photos=store)
    assert bare.codes == []
    batch = task.batch(0)
    assert torch.allclose(task._codes(batch.photo_b), bare._codes(batch.photo_b), atol=1e-5)


def test_a_damaged_photo_of_a_store_is_named(tmp_path):
    store = tiny_store(tmp_path / "store", 3, damaged=[1])
    with pytest.raises(DamagedError, match=r"store: photo photo01 cannot be read .*; ingest again"):
        PhotoSet.load(store, 64)
