"""What joint training leaves to be looked at (:mod:`sbir_ray.joint_report` reads it).

- ``exhibits.json``: the photos that are drawn again and again;
- ``drawings.jsonl``: for each time a line with their greedy drawings, so that one sees the
  generator learn;
- ``certainty.json``: at the end, how certain the pseudo sketches are and whether they find their
  own photos (the paper's Fig. 4a);
- ``attention.json``: at the end, where the generator looks while it draws.

Shapes: N photos, S_G, S_D and S the sides of G's, D's and any pictures, T rows of a drawing, H x W
cells of the map.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sbir_ray.certainty import certainty_deciles, pick_evenly
from sbir_ray.data.photos import encode_jpeg
from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import Strokes, fit, flatten
from sbir_ray.evaluate import ranks
from sbir_ray.joint_report import ATTENTION, CERTAINTY, DRAWINGS, FULL, PHOTOS
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.drawing import GREEDY, Drawing
from sbir_ray.models.generator import Generator
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.places import append_text, write_bytes
from sbir_ray.runlog import write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION
from sbir_ray.train.job import Board

Bytes = NDArray[np.uint8]

SHOWN = 12
"""Photos that are drawn again and again."""
MOST_PAIRS = 512
"""Photos, at most, whose pseudo sketches are searched with at the end."""
LOOKED_AT = 4
"""Photos whose attention is kept."""
SIDE = 128
"""Longest side of a kept photo, pixels."""

_AT_ONCE = 64
_ACROSS = 3
"""Pairs in a row of TensorBoard's picture."""


# --------------------------------------------------------------------------- while it trains


class Exhibits:
    """The photos of a run that are drawn again and again (kept as ``exhibits.json``).

    Args:
        run: the run's folder.
        photo_ids: :data:`SHOWN` of them, or as many as there are.
        photos: uint8 (N, 3, S_G, S_G), aligned.
        photos_d: uint8 (N, 3, S_D, S_D), the same ones.
    """

    def __init__(self, run: Path, photo_ids: list[str], photos: Bytes, photos_d: Bytes) -> None:
        assert len(photo_ids) == len(photos) == len(photos_d), (len(photo_ids), len(photos))
        self.file = run / DRAWINGS
        self.photo_ids, self.photos, self.photos_d = photo_ids, photos, photos_d
        self.last = -1
        """Step of the last line."""
        record = {"photo_ids": photo_ids, "photos": [_encoded(photo) for photo in photos]}
        _write(run / PHOTOS, "exhibits", record)

    def resume(self, step: int) -> None:
        """Drop the lines of later steps than ``step``, and a line that was not finished."""
        if not self.file.exists():
            return
        whole, _, _ = self.file.read_text(encoding="utf-8").rpartition("\n")
        lines = [line for line in whole.splitlines() if json.loads(line)["step"] <= step]
        write_bytes(self.file, "".join(f"{line}\n" for line in lines).encode())
        self.last = json.loads(lines[-1])["step"] if lines else -1

    def draw(
        self,
        step: int,
        version: int,
        generator: Generator,
        discriminator: PairDiscriminator,
        board: Board | None = None,
    ) -> None:
        """Draw the photos greedily and append the line of ``step``; a step has one line at most.

        The networks and the process's random numbers are left as they are.

        Args:
            version: counter of the generator's weights.
            board: gets the photos with their drawings as one picture.
        """
        if step <= self.last:
            return
        seeds = [0] * len(self.photos)  # Not read where nothing is left to chance.
        drawings, certainty = draw_judged(
            generator, discriminator, self.photos, self.photos_d, seeds, GREEDY
        )
        line = {
            "step": step,
            "version": version,
            "photo_ids": self.photo_ids,
            "strokes": [_rounded(drawing.strokes) for drawing in drawings],
            "certainty": [round(sure, 4) for sure in certainty],
        }
        append_text(self.file, json.dumps(line) + "\n")
        self.last = step
        if board is not None:
            sketches = [drawing.strokes for drawing in drawings]
            board.add_image("drawings", _picture(self.photos, sketches), step)


def draw_judged(
    generator: Generator,
    discriminator: PairDiscriminator,
    photos: Bytes,
    photos_d: Bytes,
    seeds: Sequence[int],
    temperature: float,
    *,
    attention: bool = False,
) -> tuple[list[Drawing], list[float]]:
    """A drawing of each photo, and the discriminator's certainty of each.

    Args:
        photos: uint8 (N, 3, S_G, S_G), aligned.
        photos_d: uint8 (N, 3, S_D, S_D), the same ones.
        attention: whether the drawings tell where each row looked.
    """
    config, size = generator.config, discriminator.config.image_size
    decoder = generator.decoder()
    drawings: list[Drawing] = []
    certainty: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(photos), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            drawn = generator.draw(
                torch.from_numpy(photos[part]).to(decoder.device),
                seeds[part],
                temperature,
                attention=attention,
                decoder=decoder,
            )
            # As it is trained: with drawings simplified like people's sketches.
            fitted = [fit(d.strokes, config.max_points, config.epsilon) for d in drawn]
            sure_B = discriminator.certainty(
                torch.from_numpy(photos_d[part]).to(decoder.device),
                torch.from_numpy(rasterise(fitted, size)).to(decoder.device),
            )
            drawings += drawn
            certainty += sure_B.tolist()
    return drawings, certainty


def _picture(photos: Bytes, sketches: list[Strokes]) -> Bytes:
    """Photos and their drawings side by side, :data:`_ACROSS` pairs a row, uint8 (3, Y, X)."""
    paper_NSS = 255 - rasterise(sketches, photos.shape[-1])
    drawn_N3SS = np.broadcast_to(paper_NSS[:, None], photos.shape)
    pair_N3SX = np.concatenate([photos, drawn_N3SS], axis=3)
    blank = np.full((-len(photos) % _ACROSS, *pair_N3SX.shape[1:]), 255, np.uint8)
    pair_RC3SX = np.concatenate([pair_N3SX, blank]).reshape(-1, _ACROSS, *pair_N3SX.shape[1:])
    rows, across, _, height, width = pair_RC3SX.shape
    grid = pair_RC3SX.transpose(2, 0, 3, 1, 4).reshape(3, rows * height, across * width)
    return np.ascontiguousarray(grid)


# --------------------------------------------------------------------------- at the end


def finish(
    run: Path,
    step: int,
    version: int,
    generator: Generator,
    discriminator: PairDiscriminator,
    retrieval: RetrievalNet,
    photo_ids: Sequence[str],
    photos: Mapping[int, Bytes],
    temperature: float,
    seed: int = 0,
) -> None:
    """Write ``certainty.json`` and ``attention.json`` of the run, as it is after ``step``.

    Args:
        version: counter of the generator's weights.
        photo_ids: of the pool; the first :data:`MOST_PAIRS` are drawn, and searched.
        photos: uint8 (N, 3, S, S) by their side S, at the sides of all three networks.
        temperature: of the pseudo sketches.
        seed: of the pseudo sketches.

    Raises:
        ValueError: an embedding that is not finite.
    """
    ids = list(photo_ids[:MOST_PAIRS])
    photos_g, photos_d, photos_f = (
        photos[network.config.image_size][: len(ids)]
        for network in (generator, discriminator, retrieval)
    )
    seeds = [seed * 1_000_003 + number for number in range(len(ids))]
    drawings, certainty = draw_judged(
        generator, discriminator, photos_g, photos_d, seeds, temperature
    )
    rank_N = own_ranks(retrieval, [drawing.strokes for drawing in drawings], photos_f)
    now = {"step": step, "version": version}
    record = {
        **now,
        "temperature": temperature,
        "photo_ids": ids,
        "certainty": [round(sure, 6) for sure in certainty],
        "rank": rank_N.tolist(),
        "deciles": [dataclasses.asdict(d) for d in certainty_deciles(certainty, rank_N)],
        "examples": [
            {
                "number": number,
                "photo": _encoded(photos_g[number]),
                "strokes": _rounded(drawings[number].strokes),
            }
            for number in pick_evenly(certainty)
        ],
    }
    _write(run / CERTAINTY, "certainty", record)

    few = slice(0, LOOKED_AT)
    drawings, certainty = draw_judged(
        generator, discriminator, photos_g[few], photos_d[few], seeds[few], GREEDY, attention=True
    )
    looks = [
        {"photo_id": photo_id, "photo": _encoded(photo), "certainty": sure, **_look(drawing)}
        for photo_id, photo, drawing, sure in zip(
            ids[few], photos_g[few], drawings, certainty, strict=True
        )
    ]
    _write(run / ATTENTION, "attention", {**now, "looks": looks})


def own_ranks(retrieval: RetrievalNet, sketches: list[Strokes], photos: Bytes) -> NDArray[np.int64]:
    """(N,) rank of each sketch's own photo among ``photos``, uint8 (N, 3, S, S), in their order."""
    device = next(retrieval.parameters()).device
    raster_NSS = rasterise(sketches, photos.shape[-1])
    was_training = retrieval.training
    retrieval.eval()
    try:
        with torch.inference_mode():
            parts = [slice(i, i + _AT_ONCE) for i in range(0, len(photos), _AT_ONCE)]
            photo_ND, sketch_ND = (
                np.concatenate(
                    [embed(torch.from_numpy(rows[p]).to(device)).float().cpu() for p in parts]
                )
                for embed, rows in (
                    (retrieval.embed_photos, photos),
                    (retrieval.embed_sketches, raster_NSS),
                )
            )
    finally:
        retrieval.train(was_training)
    return ranks(sketch_ND, photo_ND, np.arange(len(photos)))


def _look(drawing: Drawing) -> dict[str, Any]:
    """A drawing and its attention (T, H, W), little-endian 16-bit numbers in base64."""
    assert drawing.attention is not None
    share_THW = drawing.attention[: sum(map(len, drawing.strokes))]
    whole = np.rint(share_THW * FULL).astype("<u2")
    return {
        "strokes": _rounded(drawing.strokes),
        "shape": list(whole.shape),
        "attention": base64.b64encode(whole.tobytes()).decode(),
    }


def _encoded(photo: Bytes) -> str:
    """A photo (3, S, S) as a JPEG of at most :data:`SIDE` pixels in base64."""
    image = Image.fromarray(np.ascontiguousarray(photo.transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return base64.b64encode(encode_jpeg(np.asarray(image))).decode()


def _rounded(strokes: Strokes) -> list[list[float]]:
    """Flattened, to a tenth of a canvas unit."""
    return [[round(value, 1) for value in stroke] for stroke in flatten(strokes)]


def _write(file: Path, kind: str, record: Mapping[str, Any]) -> None:
    write_json_atomic(file, {"schema_version": SCHEMA_VERSION, "kind": kind, **record})
