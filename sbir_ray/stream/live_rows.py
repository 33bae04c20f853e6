"""Drawings for joint training while it goes on: who makes them, and the form in which they travel.

Shapes: B photos, S the side of a picture, n the rows of a drawing. No Ray; torch is loaded by what
draws alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sbir_ray.data.raster import rasterise
from sbir_ray.data.strokes import Strokes, fit
from sbir_ray.joint_config import StreamConfig
from sbir_ray.stream.live_photos import TicketPhoto, seed_of
from sbir_ray.stream.sketchers import Drawn

if TYPE_CHECKING:
    from torch import Tensor

    from sbir_ray.models.discriminator import PairDiscriminator
    from sbir_ray.models.drawing import Drawing
    from sbir_ray.models.generator import Generator
    from sbir_ray.stream.filters import TeacherRanker

Photos = dict[int, NDArray[np.uint8]]
"""A photo (3, S, S), aligned, by side S."""


KEPT_BYTES = 256 << 20
"""Bytes of photos' maps, at most, that are kept by what draws them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A drawing at temperature 1, for the policy gradient."""

    rows: NDArray[np.float32]
    """(n, 5) stroke-5 rows as they were drawn."""
    strokes: Strokes
    """Canonical."""
    log_prob: float
    """Sum over the rows, under the weights that drew it."""
    ended: bool


@dataclass(frozen=True, slots=True)
class LiveRow:
    """An unlabelled photo with what the generator drew of it."""

    ticket: int
    """Number of the draw from the store."""
    photo_id: str
    photos: Photos
    drawn: Drawn
    """The pseudo sketch."""
    samples: tuple[Sample, ...]
    version: int
    """Of the generator that drew."""
    seed: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A photo of which there is no drawing."""

    ticket: int
    photo_id: str
    reason: str
    detail: str


# --------------------------------------------------------------------------- drawing


class LiveSketcher:
    """Draws photos with a generator whose weights are replaced now and then.

    Args:
        generator: in any mode; it may be trained on between calls, see :meth:`load`.
        discriminator: None: all pairs have certainty 1.
        samples: drawings at temperature 1 of each photo, beside the pseudo sketch.
        ranker: None: rank 0.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: PairDiscriminator | None,
        stream: StreamConfig,
        samples: int,
        ranker: TeacherRanker | None = None,
    ) -> None:
        self.generator = generator
        self.discriminator = discriminator
        self.temperature = stream.temperature
        self.samples = samples
        self.ranker = ranker
        self.device = generator.offset_scale.device
        self.version = 0
        self._known: dict[str, Tensor] = {}
        # A row is drawn by one version: learners load the next while they draw rows ahead.
        self._busy = threading.Lock()
        self.decoder = generator.decoder()

    @property
    def sides(self) -> list[int]:
        """At which it wants its photos, pixels."""
        found = {self.generator.config.image_size}
        if self.discriminator is not None:
            found.add(self.discriminator.config.image_size)
        if self.ranker is not None:
            found.add(self.ranker.image_size)
        return sorted(found)

    def load(self, version: int, weights: Mapping[str, Tensor | NDArray[Any]]) -> None:
        """Take over weights by the names of :func:`published`, and lay them out for drawing.

        With {} the networks draw with what they now hold.

        Raises:
            KeyError: an unknown name.
        """
        import torch

        own = _named(self.generator, self.discriminator)
        with self._busy, torch.no_grad():
            for name, value in weights.items():
                # Arrays out of Ray's object store are read-only, of which torch would warn.
                tensor = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
                own[name].copy_(tensor)
            self.decoder = self.generator.decoder()
            self.version = version

    def draw(
        self,
        tickets: Sequence[int],
        photo_ids: Sequence[str],
        photos: Sequence[Photos],
        seeds: Sequence[int],
        samples: int | None = None,
        judged: bool = True,
    ) -> list[LiveRow]:
        """A row of each photo, whose drawings depend on the weights, the photo and its seed alone.

        In float32 on a CPU, in bfloat16 where a GPU may.

        Args:
            photos: at :attr:`sides` at least.
            samples: another number of them than usual.
            judged: False leaves certainty and rank out.
        """
        with self._busy:
            return self._draw(tickets, photo_ids, photos, seeds, samples, judged)

    def _draw(
        self,
        tickets: Sequence[int],
        photo_ids: Sequence[str],
        photos: Sequence[Photos],
        seeds: Sequence[int],
        samples: int | None,
        judged: bool,
    ) -> list[LiveRow]:
        import torch

        gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=gpu):
            map_BCHW = self._maps(photo_ids, photos)
            count = self.samples if samples is None else samples
            pseudo, *sampled = self._drawings(map_BCHW, seeds, count)
            certainty = self._certainty(photos, pseudo) if judged else [1.0] * len(pseudo)
        rank = self._rank(photos, pseudo) if judged else [0] * len(pseudo)
        return [
            LiveRow(
                ticket=tickets[i],
                photo_id=photo_ids[i],
                photos=photos[i],
                drawn=Drawn(d.strokes, certainty[i], d.log_prob, d.ended, len(d.rows), rank[i]),
                samples=tuple(
                    Sample(s[i].rows, s[i].strokes, s[i].log_prob, s[i].ended) for s in sampled
                ),
                version=self.version,
                seed=seeds[i],
            )
            for i, d in enumerate(pseudo)
        ]

    def _maps(self, photo_ids: Sequence[str], photos: Sequence[Photos]) -> Tensor:
        """The backbone's maps; kept for when a photo comes again, unless the backbone trains."""
        import torch

        side = self.generator.config.image_size
        known = {} if self.generator.config.train_backbone else self._known
        new = [i for i, name in enumerate(photo_ids) if name not in known]
        if new:
            # One at a time on a CPU, where a convolution may round differently in a batch.
            at_once = self.decoder.block if self.device.type == "cuda" else 1
            groups = self._stacked([photos[i] for i in new], side).split(at_once)
            # In full precision, as the learners compute the log-probabilities of the drawings.
            with torch.autocast(self.device.type, enabled=False):
                maps = torch.cat([self.generator.encode(group) for group in groups])
            for i, map_CHW in zip(new, maps, strict=True):
                known[photo_ids[i]] = map_CHW
        found = torch.stack([known[name] for name in photo_ids])
        size = found[0].nbytes
        while len(known) > max(1, KEPT_BYTES // size):
            del known[next(iter(known))]
        return found

    def _drawings(
        self, map_BCHW: Tensor, seeds: Sequence[int], samples: int
    ) -> list[list[Drawing]]:
        """The pseudo sketches of the photos, then so many times a sample of each.

        All together, as a decoder's block costs the same however few drawings fill it.
        """
        import torch

        from sbir_ray.models.drawing import Noise

        config, block = self.generator.config, self.decoder.block
        sampled = [[seed_of(seed, "sample", k) for seed in seeds] for k in range(samples)]
        passes = [(seeds, self.temperature), *((own, 1.0) for own in sampled)]
        noise = Noise.joined(
            Noise.seeded(own, config.max_points + 1, config.mixtures, temperature)
            for own, temperature in passes
        )
        photo_of_B = torch.arange(len(seeds), device=self.device).repeat(len(passes))
        drawings: list[Drawing] = []
        for start in range(0, len(photo_of_B), block):
            part = slice(start, start + block)
            own = Noise(*(numbers[part] for numbers in noise))
            drawings += self.decoder.draw(map_BCHW[photo_of_B[part]], own)
        return [drawings[i : i + len(seeds)] for i in range(0, len(drawings), len(seeds))]

    def _certainty(self, photos: Sequence[Photos], drawings: Sequence[Drawing]) -> list[float]:
        import torch

        if self.discriminator is None:
            return [1.0] * len(drawings)
        config, side = self.generator.config, self.discriminator.config.image_size
        # As it was trained: with drawings simplified like people's sketches.
        fitted = [fit(d.strokes, config.max_points, config.epsilon) for d in drawings]
        raster_BSS = torch.from_numpy(rasterise(fitted, side)).to(self.device)
        photo_B3SS = self._stacked(photos, side)
        # One at a time on a CPU, as above.
        at_once = len(fitted) if self.device.type == "cuda" else 1
        found: list[float] = []
        for photo_b3SS, raster_bSS in zip(
            photo_B3SS.split(at_once), raster_BSS.split(at_once), strict=True
        ):
            found += self.discriminator.certainty(photo_b3SS, raster_bSS).tolist()
        return found

    def _rank(self, photos: Sequence[Photos], drawings: Sequence[Drawing]) -> list[int]:
        if self.ranker is None:
            return [0] * len(drawings)
        photo_B3SS = np.stack([photo[self.ranker.image_size] for photo in photos])
        return self.ranker.rank(photo_B3SS, [drawing.strokes for drawing in drawings])

    def _stacked(self, photos: Sequence[Photos], side: int) -> Tensor:
        """(B, 3, S, S) on the device."""
        import torch

        return torch.from_numpy(np.stack([photo[side] for photo in photos])).to(self.device)


def ticket_seed(seed: int, ticket: int) -> int:
    """Seed of a ticket's drawing, 63 bits, from the run's seed."""
    return seed_of(seed, "ticket", ticket)


def published(generator: Generator, discriminator: PairDiscriminator | None) -> dict[str, Tensor]:
    """All tensors that training changes, by name: not copies, but the networks' own."""
    frozen = {
        f"generator.{name}" for name, p in generator.named_parameters() if not p.requires_grad
    }
    if not generator.config.train_backbone:
        frozen |= {f"generator.backbone.{name}" for name in generator.backbone.state_dict()}
    own = _named(generator, discriminator)
    return {name: tensor for name, tensor in own.items() if name not in frozen}


def _named(generator: Generator, discriminator: PairDiscriminator | None) -> dict[str, Tensor]:
    found = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    if discriminator is not None:
        found |= {f"discriminator.{k}": value for k, value in discriminator.state_dict().items()}
    return found


# --------------------------------------------------------------------------- travelling

_PHOTO = [
    pa.field("ticket", pa.int64()),
    pa.field("photo_id", pa.string()),
    pa.field("sides", pa.list_(pa.int32())),
    pa.field("photos", pa.list_(pa.binary())),
]
_DRAWING = pa.struct(
    [
        ("rows", pa.binary()),
        ("points", pa.binary()),
        ("lengths", pa.list_(pa.int32())),
        ("log_prob", pa.float64()),
        ("ended", pa.bool_()),
    ]
)
_PHOTO_SCHEMA = pa.schema([*_PHOTO, pa.field("fault", pa.string())])
_ROW_SCHEMA = pa.schema(
    [
        *_PHOTO,
        # The pseudo sketch, then the samples; none of a photo that failed.
        pa.field("drawings", pa.list_(_DRAWING)),
        pa.field("certainty", pa.float64()),
        pa.field("rows", pa.int32()),
        pa.field("rank", pa.int32()),
        pa.field("version", pa.int64()),
        pa.field("seed", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


def encode_photos(photos: Sequence[TicketPhoto]) -> bytes:
    """Photos as bytes (an Arrow stream)."""
    rows = [
        {"ticket": p.ticket, "photo_id": p.photo_id, "fault": p.fault, **_pixels(p.photos)}
        for p in photos
    ]
    return _to_bytes(rows, _PHOTO_SCHEMA)


def decode_photos(data: Any) -> list[TicketPhoto]:
    """The reverse of :func:`encode_photos`; ``data`` is any buffer, and is not kept."""
    return [
        TicketPhoto(row["ticket"], row["photo_id"], _photos(row), row["fault"])
        for row in _from_bytes(data)
    ]


def encode_rows(rows: Sequence[LiveRow | Failed], sides: Sequence[int]) -> bytes:
    """Rows as bytes (an Arrow stream), with their photos at ``sides`` alone."""
    return _to_bytes([_plain(row, sides) for row in rows], _ROW_SCHEMA)


def decode_rows(data: Any) -> list[LiveRow | Failed]:
    """The reverse of :func:`encode_rows`; ``data`` is any buffer, and is not kept."""
    found: list[LiveRow | Failed] = []
    for row in _from_bytes(data):
        if row["reason"]:
            found.append(Failed(row["ticket"], row["photo_id"], row["reason"], row["detail"]))
            continue
        pseudo, *samples = (_sample(drawing) for drawing in row["drawings"])
        drawn = Drawn(
            pseudo.strokes,
            row["certainty"],
            pseudo.log_prob,
            pseudo.ended,
            row["rows"],
            row["rank"],
        )
        found.append(
            LiveRow(
                row["ticket"],
                row["photo_id"],
                _photos(row),
                drawn,
                tuple(samples),
                row["version"],
                row["seed"],
            )
        )
    return found


def _plain(row: LiveRow | Failed, sides: Sequence[int]) -> dict[str, Any]:
    if isinstance(row, Failed):
        nothing = {"sides": [], "photos": [], "drawings": [], "reason": row.reason}
        return {"ticket": row.ticket, "photo_id": row.photo_id, "detail": row.detail, **nothing}
    drawn = row.drawn
    none = np.zeros((0, 5), np.float32)
    pseudo = Sample(none, drawn.strokes, drawn.log_prob, drawn.ended)
    return {
        "ticket": row.ticket,
        "photo_id": row.photo_id,
        **_pixels({side: row.photos[side] for side in sides}),
        "drawings": [_drawing(sample) for sample in (pseudo, *row.samples)],
        "certainty": drawn.certainty,
        "rows": drawn.rows,
        "rank": drawn.rank,
        "version": row.version,
        "seed": row.seed,
        "reason": "",
        "detail": "",
    }


def _drawing(sample: Sample) -> dict[str, Any]:
    points = [stroke.astype(np.float32, copy=False).tobytes() for stroke in sample.strokes]
    return {
        "rows": sample.rows.tobytes(),
        "points": b"".join(points),
        "lengths": [len(stroke) for stroke in sample.strokes],
        "log_prob": sample.log_prob,
        "ended": sample.ended,
    }


def _sample(drawing: dict[str, Any]) -> Sample:
    points_N2 = _array(drawing["points"], np.float32, (-1, 2))
    ends = np.cumsum(drawing["lengths"], dtype=np.int64)[:-1]
    strokes = np.split(points_N2, ends) if drawing["lengths"] else []
    rows_n5 = _array(drawing["rows"], np.float32, (-1, 5))
    return Sample(rows_n5, strokes, drawing["log_prob"], drawing["ended"])


def _pixels(photos: Photos) -> dict[str, Any]:
    return {"sides": list(photos), "photos": [photo.tobytes() for photo in photos.values()]}


def _photos(row: dict[str, Any]) -> Photos:
    return {
        side: _array(data, np.uint8, (3, side, side))
        for side, data in zip(row["sides"], row["photos"], strict=True)
    }


def _array(data: bytes, dtype: type[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A copy, which may be written to."""
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _to_bytes(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _from_bytes(data: Any) -> list[dict[str, Any]]:
    with pa.ipc.open_stream(data) as reader:
        rows: list[dict[str, Any]] = reader.read_all().to_pylist()
    return rows
