"""The process that draws photos of a store, and the task that writes what was drawn."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sbir_ray.config import ChoiceConfig, SketchConfig
from sbir_ray.data.strokes import count_points, flatten
from sbir_ray.places import place, read_table, write_table
from sbir_ray.stream.attempts import KILLED, LIMIT, Attempts
from sbir_ray.stream.filters import RankerSpec, TeacherRanker, choose, reference_photos
from sbir_ray.stream.pseudo_rounds import ATTEMPTS, ERROR, REFERENCE
from sbir_ray.stream.pseudo_store import CHOICE, PSEUDO_SCHEMA
from sbir_ray.stream.sketch_blocks import one_line
from sbir_ray.stream.sketchers import Drawn, SketcherSpec, row_seed
from sbir_ray.strict import digest

_PHOTO = ["photo_id", "image", "photo_sha256"]
_DRAWING = pa.struct(
    [
        *(PSEUDO_SCHEMA.field(name) for name in PSEUDO_SCHEMA.names if name not in _PHOTO),
        pa.field("detail", pa.string()),
    ]
)
_DRAWN_SCHEMA = pa.schema(
    [
        *(PSEUDO_SCHEMA.field(name) for name in _PHOTO),
        # In one row, so that nothing parts the drawings of a photo.
        pa.field("drawings", pa.list_(_DRAWING)),
        pa.field("block", pa.int64()),
    ]
)
_DICTIONARY = 2**27
"""Bytes of a file's different photos, each of which is then stored once, however often drawn."""

Fault = tuple[str, str]
"""Reason and text of why there is no drawing."""


class SketchActor:
    """Actor: draws batches of photos; a photo that cannot be drawn is a failed row."""

    def __init__(
        self,
        spec: SketcherSpec,
        config: SketchConfig,
        folder: str,
        ranker: RankerSpec | None = None,
        settings_digest: str = "",
        round_number: int = 0,
    ) -> None:
        self.sketcher = spec.make()
        self.config = config
        self.ranker: TeacherRanker | None = None
        if ranker is not None:
            reference = read_table(place(folder) / REFERENCE)
            self.ranker = ranker.make(reference_photos(reference, ranker.image_size))
        self.journals = place(folder) / ATTEMPTS
        self.known = {
            "generator_version": self.sketcher.version,
            "generator_digest": self.sketcher.digest,
            "settings_digest": settings_digest,
            "round": round_number,
        }
        self.block = -1
        self.attempts: Attempts | None = None

    def __call__(self, photos: pa.Table) -> pa.Table:
        """A row of each row of ``read_photos``, with its ``drawings``."""
        rows: list[dict[str, Any]] = []
        for block in dict.fromkeys(photos["block"].to_pylist()):
            mine = photos.filter(pc.equal(photos["block"], block)).to_pylist()
            rows += self._rows(mine, self._journal(block))
        return pa.Table.from_pylist(rows, schema=_DRAWN_SCHEMA)

    def _journal(self, block: int) -> Attempts:
        if self.attempts is None or self.block != block:
            if self.attempts is not None:
                self.attempts.close()
            self.attempts = Attempts(self.journals / f"{block:06d}")
            self.block = block
        return self.attempts

    def _rows(self, photos: list[dict[str, Any]], attempts: Attempts) -> list[dict[str, Any]]:
        """All at once; one by one where that raised, or where a process ended at it before."""
        each = self.config.samples
        seeds = [
            [row_seed(self.config.seed, photo["photo_id"], k) for k in range(each)]
            for photo in photos
        ]
        whole = [i for i, photo in enumerate(photos) if not photo["fault"]]
        drawn: dict[int, list[Drawn | Fault]] = {}
        key = f"{photos[0]['photo_id']}/{len(photos)}"
        if whole and not attempts.deaths(key):
            try:
                with attempts.working_on(key):
                    flat = [seed for i in whole for seed in seeds[i]]
                    found = self._ranked([photos[i] for i in whole], flat)
                for n, i in enumerate(whole):
                    drawn[i] = [*found[n * each : (n + 1) * each]]
            except Exception:  # whose fault it is shows when they are drawn one by one
                drawn = {}
        for i, photo in enumerate(photos):
            if i not in drawn:
                drawn[i] = [
                    self._draw_alone(photo, seed, k, attempts) for k, seed in enumerate(seeds[i])
                ]
        return [
            {
                **{name: photo[name] for name in [*_PHOTO, "block"]},
                "drawings": self._judged(drawn[i], seeds[i]),
            }
            for i, photo in enumerate(photos)
        ]

    def _draw_alone(
        self, photo: dict[str, Any], seed: int, sample: int, attempts: Attempts
    ) -> Drawn | Fault:
        if photo["fault"]:
            return "damaged-photo", photo["fault"]
        key = f"{sample}/{photo['photo_id']}"
        if attempts.deaths(key) >= LIMIT:
            return KILLED, f"{attempts.deaths(key)} processes ended while they drew it"
        try:
            with attempts.working_on(key):
                return self._ranked([photo], [seed])[0]
        except Exception as error:  # any fault costs its own row alone, and is told
            return f"{ERROR}{type(error).__name__}", one_line(error)

    def _ranked(self, photos: list[dict[str, Any]], seeds: list[int]) -> list[Drawn]:
        """The drawings of photos, with the photo's rank where there is a teacher."""
        drawn = self.sketcher.draw(_pixels(photos, self.sketcher.image_size), seeds)
        if self.ranker is None:
            return [_as_stored(one) for one in drawn]
        photo_B3SS = _pixels(photos, self.ranker.image_size).transpose(0, 3, 1, 2)
        found = self.ranker.compare(photo_B3SS, [one.strokes for one in drawn])
        return [
            _as_stored(dataclasses.replace(one, rank=rank, similarity=similarity))
            for one, (rank, similarity) in zip(drawn, found, strict=True)
        ]

    def _judged(self, drawn: Sequence[Drawn | Fault], seeds: Sequence[int]) -> list[dict[str, Any]]:
        """The drawings of one photo with their fates."""
        there = [i for i, one in enumerate(drawn) if isinstance(one, Drawn) and one.strokes]
        whole = [one for one in drawn if isinstance(one, Drawn) and one.strokes]
        chosen = choose(whole, self.config.filters, self.config.keep)
        reasons = dict(zip(there, chosen, strict=True))
        rows = []
        for sample, (one, seed) in enumerate(zip(drawn, seeds, strict=True)):
            status, detail = "failed", ""
            if isinstance(one, tuple):
                reason, detail = one
            elif not one.strokes:
                reason = "nothing-to-draw"
            else:
                reason = reasons[sample]
                status = "filtered" if reason else "kept"
            found = one if status != "failed" and isinstance(one, Drawn) else _NOTHING
            rows.append(
                {
                    "sample": sample,
                    "strokes": flatten(found.strokes),
                    "points": count_points(found.strokes),
                    "certainty": found.certainty,
                    "log_prob": found.log_prob,
                    "rows": found.rows,
                    "ended": found.ended,
                    "rank": found.rank,
                    "similarity": found.similarity,
                    "seed": seed,
                    **self.known,
                    "kept": status == "kept",
                    "status": status,
                    "reason": reason,
                    "detail": detail,
                }
            )
        return rows


_NOTHING = Drawn([], certainty=0.0, ended=False)


def _as_stored(drawn: Drawn) -> Drawn:
    """With its numbers rounded as the store has them, so that filters say the same of both."""
    return dataclasses.replace(
        drawn,
        certainty=float(np.float32(drawn.certainty)),
        log_prob=float(np.float32(drawn.log_prob)),
        similarity=float(np.float32(drawn.similarity)),
    )


def _pixels(photos: list[dict[str, Any]], size: int) -> NDArray[np.uint8]:
    """(B, S, S, 3) the photos as they were aligned at one size."""
    pixels = np.stack([np.frombuffer(photo[f"aligned_{size}"], np.uint8) for photo in photos])
    return pixels.reshape(-1, size, size, 3)


def write_rows(photos: pa.Table, target: str, choice: ChoiceConfig) -> pa.Table:
    """Task: the drawings of photos, whose fates are by ``choice``, to files named after their block
    and content, in the order of photo and sample; returns their accounts."""
    for block in dict.fromkeys(photos["block"].to_pylist()):
        mine = photos.filter(pc.equal(photos["block"], block)).sort_by("photo_id")
        names = "".join(mine["photo_id"].to_pylist())
        content = hashlib.sha256(names.encode()).hexdigest()[:12]
        rows = _rows_of(mine).select(PSEUDO_SCHEMA.names)
        write_table(
            rows.replace_schema_metadata({CHOICE: digest(choice)}),
            place(target) / f"part-{block:06d}-{content}.parquet",
            compression="zstd",
            dictionary_pagesize_limit=_DICTIONARY,
        )
    fates = pc.list_flatten(photos["drawings"].combine_chunks())
    return pa.table({name: pc.struct_field(fates, name) for name in ("status", "reason", "detail")})


def _rows_of(photos: pa.Table) -> pa.Table:
    """A row for each drawing."""
    drawings = photos["drawings"].combine_chunks()
    rows = photos.select(_PHOTO).take(pc.list_parent_indices(drawings))
    flat = pc.list_flatten(drawings)
    for number, field in enumerate(_DRAWING):
        rows = rows.append_column(field, flat.field(number))
    return rows
