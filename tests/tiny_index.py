"""Indexes for tests, made without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sbir_ray.config import RetrievalConfig
from sbir_ray.stream import cluster, indexing
from sbir_ray.stream.sketch_blocks import read_photos
from sbir_ray.train.job import Job
from sbir_ray.train.loop import fit
from sbir_ray.train.ranks import Ranks
from tests.tiny import retrieval_config, tiny_pairs


def tiny_retrieval(folder: Path, seed: int = 0) -> Path:
    """The RUN of a retrieval network that was trained for two steps; by pre-trained weights, since
    to random ones all photos look alike."""
    model = RetrievalConfig(image_size=64, grid=2)
    pairs = {"pairs": str(tiny_pairs(folder.with_name(f"{folder.name}-pairs")))}
    job = Job("retrieval", str(folder), retrieval_config(2, seed=seed, model=model), pairs)
    fit(job, Ranks(), torch.device("cpu"), lambda _: None)
    return folder


class Inline:
    """The pipeline's parts one after the other; ``parts`` after which it ends by an error."""

    def __init__(self, killed_after: int | None = None) -> None:
        self.killed_after = killed_after
        self.embedded: list[str] = []
        """Photos that were embedded, by their ids."""

    def __call__(self, plan, image_size, embedder, writer, pool, each):
        actor = indexing.Embedder(**embedder)
        for number, block in enumerate(plan):
            if number == self.killed_after:
                raise KeyboardInterrupt
            photos = read_photos(block.to_table(), [image_size], indexing._COLUMNS)
            found = actor(photos)
            self.embedded += found["photo_id"].to_pylist()
            yield from indexing.write_embedded(found, **writer).to_pylist()


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Inline:
    """Indexing without Ray."""
    pipeline = Inline()
    monkeypatch.setattr(indexing, "_pipeline", pipeline)
    monkeypatch.setattr(cluster, "ensure_fits", lambda *_, **__: 2)
    monkeypatch.setattr(indexing, "quiet_data", lambda: None)
    monkeypatch.setattr(indexing, "_BATCH", 4)
    return pipeline


def make(store: Path, out: Path, run: Path) -> Path:
    """The index of a store, made without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "_pipeline", Inline())
        patch.setattr(cluster, "ensure_fits", lambda *_, **__: 2)
        patch.setattr(indexing, "quiet_data", lambda: None)
        indexing.index(store, out, run)
    return out
