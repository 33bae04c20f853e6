"""The rows of joint training: drawn photos with their fates, and what F, D and G make of them.

Shapes: R photos of this rank, b sampled drawings of them (K each), T rows of a drawing, S the side
of a picture.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sbir_ray.config import FilterConfig, GeneratorTraining
from sbir_ray.data import raster, strokes
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.data.photos import align, chosen_rows, decode_stored
from sbir_ray.data.strokes import Strokes
from sbir_ray.errors import SbirError, UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.runlog import Ledger, write_json_atomic
from sbir_ray.stream.exchange import Fate
from sbir_ray.stream.filters import filter_reason
from sbir_ray.stream.live_photos import seed_of
from sbir_ray.stream.live_rows import LiveRow, LiveSketcher
from sbir_ray.strict import SCHEMA_VERSION
from sbir_ray.train import batch_rows
from sbir_ray.train.exhibits import MOST_PAIRS
from sbir_ray.train.position import Stream, rng_of
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.retrieval_task import PseudoRow, number_of

if TYPE_CHECKING:
    from sbir_ray.stream.live import Shard

LEDGER = "ledger.json"


@dataclass(frozen=True)
class Sides:
    """Sides of the pictures that the networks look at, pixels."""

    f: int
    g: int
    d: int

    @property
    def all(self) -> list[int]:
        """Each once."""
        return sorted({self.f, self.g, self.d})


# --------------------------------------------------------------------------- who draws


class Source(Protocol):
    """Where drawn photos come from."""

    name: str
    """Of a stream whose account outlives a learner; "" of none."""

    def rows(
        self, kind: str, step: int, attempt: int, slots: Sequence[int], count: int
    ) -> list[LiveRow]:
        """A row for each of a rank's ``slots`` out of ``count`` in ``step``."""
        ...

    def account(self, fates: Mapping[int, Fate]) -> None:
        """What became of rows that were handed out, by ticket."""
        ...

    def told(self) -> Counter[str] | None:
        """Rows by fate, those that no learner saw and those in flight too; None: the learners' own
        counts are all there is. By rank 0 alone where they are those of all."""
        ...


class ActorsDraw:
    """Generator actors draw, and rows come as they are done."""

    def __init__(self, live: Shard) -> None:
        self.live, self.name = live, live.name

    def rows(
        self, kind: str, step: int, attempt: int, slots: Sequence[int], count: int
    ) -> list[LiveRow]:
        """See :class:`Source`."""
        return [self.live.next() for _ in slots]

    def account(self, fates: Mapping[int, Fate]) -> None:
        """See :class:`Source`."""
        self.live.account(fates)

    def told(self) -> Counter[str]:
        """See :class:`Source`."""
        if self.live.rank:
            return Counter()
        ledger = Ledger.from_json("live", self.live.ledger(), "the live stream")
        return Counter(
            {
                " ".join([fate, reason]).strip(): count
                for fate, reasons in ledger.by_reason.items()
                for reason, count in reasons.items()
            }
        )


class LearnersDraw:
    """The learners draw, photo by photo as a function of the step: repeatable bit for bit.

    All photos are kept in memory.
    """

    name = ""

    def __init__(
        self, photos: Path, sketcher: LiveSketcher, sides: Sides, config: JointTraining
    ) -> None:
        sets = {side: PhotoSet.load(photos, side) for side in sides.all}
        self.ids = sets[sides.g].photo_ids
        self.photos = {side: photo_set.photos for side, photo_set in sets.items()}
        self.sketcher, self.seed = sketcher, config.seed
        self.tries = config.stream.max_tries
        self.streams: dict[str, Stream] = {}

    def rows(
        self, kind: str, step: int, attempt: int, slots: Sequence[int], count: int
    ) -> list[LiveRow]:
        """See :class:`Source`."""
        key = f"{kind} {attempt}"
        if key not in self.streams:
            self.streams[key] = Stream(len(self.ids), self.seed, "unlabelled", key)
        positions = [step * count + slot for slot in slots]
        places = [self.streams[key].at(position)[1] for position in positions]
        tickets = [position * self.tries + attempt for position in positions]
        return self.sketcher.draw(
            tickets,
            [self.ids[i] for i in places],
            [{side: photos[i] for side, photos in self.photos.items()} for i in places],
            [seed_of(self.seed, key, position) for position in positions],
            samples=None if kind == "policy" else 0,
        )

    def account(self, fates: Mapping[int, Fate]) -> None:
        """Nobody waits for it."""

    def told(self) -> None:
        """See :class:`Source`."""


def some_photos(photos: Path, sides: Sides) -> tuple[list[str], dict[int, NDArray[np.uint8]]]:
    """The first photos of a store in the order of their ids, at most :data:`MOST_PAIRS`, at each
    side (N, 3, S, S)."""
    first = chosen_rows(photos, MOST_PAIRS, lambda name: name, ("photo_id", "image"))
    ids, whole = [], []
    for row in first.to_pylist():
        try:
            rgb = decode_stored(row["image"])
        except (OSError, SyntaxError, ValueError):  # told where it was to be drawn
            continue
        ids.append(row["photo_id"])
        whole.append(rgb)
    found = {
        side: np.stack([align(one, side).transpose(2, 0, 1) for one in whole]) for side in sides.all
    }
    return ids, found


# --------------------------------------------------------------------------- fates


class DrawnRows:
    """Takes rows, drops stale ones, asks the filters, and counts every fate.

    ``drawn = used + stale + filtered (by reason) + in flight`` always holds.
    """

    def __init__(self, source: Source, config: JointTraining, ranks: Ranks) -> None:
        self.source, self.config, self.ranks = source, config, ranks
        self.fates: Counter[str] = Counter()
        self.lags: Counter[int] = Counter()
        # Of earlier processes of this run.
        self.old_fates: Counter[str] = Counter()
        self.old_lags: Counter[int] = Counter()
        self.began, self.sketches, self.step_lag = time.monotonic(), 0, 0.0

    def take(
        self, step: int, version: int, kind: str, count: int, filters: FilterConfig | None
    ) -> list[tuple[LiveRow, bool]]:
        """This rank's share of ``count`` rows, and whether each is kept.

        A filtered row is replaced, ``stream.max_tries`` drawings a place at most; then the last one
        stays, so that all ranks have as many. A stale row is always replaced.

        Args:
            version: the learner's.
            filters: None keeps all.

        Raises:
            SbirError: the drawings stay too old.
        """
        stream = self.config.stream
        slots = list(self.ranks.mine(count))
        found: dict[int, tuple[LiveRow, bool]] = {}
        fates: dict[int, Fate] = {}
        lags: list[int] = []
        attempt = 0
        while True:
            if attempt < stream.max_tries:
                left = [slot for slot in slots if slot not in found or not found[slot][1]]
                attempt += 1
            else:
                left = [slot for slot in slots if slot not in found]
                self._refuse_endless(len(fates), slots)
            if not left:
                break
            rows = self.source.rows(kind, step, attempt - 1, left, count)
            for slot, row in zip(left, rows, strict=True):
                lags.append(max(0, version - row.version))
                # A version from the future was published by a process that died.
                if lags[-1] > stream.max_staleness or row.version > version:
                    fates[row.ticket] = "stale", ""
                    continue
                reason = "" if filters is None else filter_reason(row.drawn, filters)
                fates[row.ticket] = ("filtered", reason) if reason else ("used", "")
                found[slot] = row, not reason
                self.sketches += 1 + len(row.samples)
        self.step_lag = float(np.mean(lags)) if lags else 0.0
        self.lags.update(lags)
        self.fates.update(" ".join(fate).strip() for fate in fates.values())
        self.source.account(fates)
        return [found[slot] for slot in slots]

    def _refuse_endless(self, drawn: int, slots: Sequence[int]) -> None:
        """Only the drawers can make newer drawings; they have, soon after they saw the demand."""
        if drawn > 100 * len(slots):
            raise SbirError(
                f"{drawn} drawings in a row were more than stream.max_staleness="
                f"{self.config.stream.max_staleness} versions old; raise it, or draw faster with "
                "more --actors"
            )

    def rates(self) -> dict[str, float]:
        """Numbers for the log, of this rank's rows times the ranks; the rows dropped so far, by
        reason."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        dropped = {k.replace(" ", "_"): n for k, n in self.fates.items() if k != "used"}
        return {
            **{name: self.ranks.world * count for name, count in dropped.items()},
            "staleness": self.step_lag,
            "photos_per_second": self.ranks.world * self.lags.total() / seconds,
            "sketches_per_second": self.ranks.world * self.sketches / seconds,
        }

    def state(self) -> dict[str, Any]:
        """``fates`` and ``lags`` over all ranks and processes of this run. All ranks call it."""
        told = self.source.told()
        fates = self._summed(self.fates if told is None else told)
        late = self.config.stream.max_staleness + 1
        lags: Counter[str] = Counter()
        for lag, count in list(self.lags.items()):
            lags[str(min(lag, late))] += count
        return {
            "fates": fates + self.old_fates,
            "lags": self._summed(lags) + self.old_lags,
            # A worker group that starts again finds the same stream, whose account goes on.
            "stream": self.source.name,
            "fates_before": self.old_fates,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting where a run was interrupted; what was in flight then is lost."""
        if state and self.ranks.rank == 0:
            self.old_lags = Counter(state["lags"])
            if self.source.name and state["stream"] == self.source.name:
                self.old_fates = Counter(state["fates_before"])
                return
            self.old_fates = Counter(state["fates"])
            self.old_fates["filtered lost"] += self.old_fates.pop("in_flight", 0)

    def write(self, run: Path, state: Mapping[str, Any]) -> None:
        """``ledger.json``, by rank 0."""
        fates, start = state["fates"], "filtered "
        record = {
            "schema_version": SCHEMA_VERSION,
            "kind": "live",
            "drawn": sum(fates.values()),
            "used": fates["used"],
            "stale": fates["stale"],
            "filtered": {k.removeprefix(start): n for k, n in fates.items() if k.startswith(start)},
            "in_flight": fates["in_flight"],
            "staleness": dict(state["lags"]),
        }
        write_json_atomic(run / LEDGER, record)

    def _summed(self, counts: Counter[str]) -> Counter[str]:
        """Over the ranks, for the names that any of them has."""
        return Counter(self.ranks.sum_counts(counts))


# --------------------------------------------------------------------------- F's rows


def pseudo_rows(
    rows: Sequence[tuple[LiveRow, bool]], config: JointTraining, side: int
) -> list[PseudoRow]:
    """Drawn photos as rows of F, augmented like people's sketches."""
    augment = config.retrieval.augment
    photos, drawn = [], []
    for row, _ in rows:
        rng = rng_of(config.seed, "pseudo", row.seed)
        flip = rng.random() < augment.flip
        photos.append(batch_rows.mirrored(row.photos[side], flip))
        drawn.append(batch_rows.augmented(row.drawn.strokes, flip, augment, rng))
    pictures = raster.rasterise(drawn, side)
    return [
        PseudoRow(photo, picture, row.photo_id, row.drawn.certainty, kept)
        for (row, kept), photo, picture in zip(rows, photos, pictures, strict=True)
    ]


# --------------------------------------------------------------------------- D's rows


@dataclass(frozen=True)
class CriticRows:
    """Rows of D: labelled photos with people's sketches, drawn ones, and other photos; and
    unlabelled photos with drawings. uint8."""

    photo_bCSS: Tensor
    real_bSS: Tensor
    photo_uCSS: Tensor
    drawn_uSS: Tensor
    own_bSS: Tensor | None
    """Drawings of the labelled photos; None for plain Eq. 5, as below."""
    wrong_bCSS: Tensor | None
    """Other photos than the real sketches'."""


class Labelled:
    """The labelled pairs as G, D and F see them."""

    def __init__(self, folder: Path, sides: Sides, g: PairSet, f: PairSet) -> None:
        self.d = PairSet.load(folder, "train", sides.d)
        if len(self.d.photo_ids) < 2:
            raise UserError(f"{folder}: the discriminator needs at least two photos")
        self.ids = self.d.photo_ids
        self.photos = {sides.f: f.photos, sides.g: g.photos, sides.d: self.d.photos}

    def drawn(
        self,
        sketcher: LiveSketcher,
        photos: Sequence[int],
        seeds: Sequence[int],
        samples: int | None,
    ) -> list[LiveRow]:
        """The labelled photos, drawn by the learner."""
        return sketcher.draw(
            [-1] * len(photos),
            [self.ids[i] for i in photos],
            [{side: every[i] for side, every in self.photos.items()} for i in photos],
            seeds,
            samples=samples,
            judged=False,
        )


def critic_rows(
    labelled: Labelled,
    sketches: Sequence[int],
    rows: Sequence[LiveRow],
    sketcher: LiveSketcher,
    config: GeneratorTraining,
    keys: tuple[object, ...],
) -> CriticRows:
    """D's rows of a step; real and drawn sketches are simplified and augmented alike.

    Args:
        sketches: numbers of the labelled sketches.
        rows: drawn unlabelled photos.
        keys: what the random choices depend on, beside the row.
    """
    pairs, side = labelled.d, config.discriminator.image_size
    numbers = [int(pairs.photo_of[sketch]) for sketch in sketches]
    rngs = [rng_of(*keys, "critic", sketch) for sketch in sketches]
    flips = [rng.random() < config.augment.flip for rng in rngs]

    def changed(sketch: Strokes, flip: bool, rng: np.random.Generator) -> Strokes:
        fitted = strokes.fit(sketch, config.model.max_points, config.model.epsilon)
        return batch_rows.augmented(fitted, flip, config.augment, rng)

    def pictures(photos: Sequence[NDArray[np.uint8]], flips: Sequence[bool]) -> Tensor:
        every = [batch_rows.mirrored(p, flip) for p, flip in zip(photos, flips, strict=True)]
        return torch.from_numpy(np.stack(every))

    def rasters(drawn: Sequence[Strokes], flips: Sequence[bool], rngs: Sequence[Any]) -> Tensor:
        every = [changed(*one) for one in zip(drawn, flips, rngs, strict=True)]
        return torch.from_numpy(raster.rasterise(every, side))

    own = wrong = None
    if not config.discriminator.plain:
        seeds = [seed_of(*keys, "own", sketch) for sketch in sketches]
        drawings = labelled.drawn(sketcher, numbers, seeds, samples=0)
        own = rasters([row.drawn.strokes for row in drawings], flips, rngs)
        count = len(pairs.photo_ids)
        others = [
            (number + 1 + int(rng.integers(count - 1))) % count
            for number, rng in zip(numbers, rngs, strict=True)
        ]
        wrong = pictures([pairs.photos[i] for i in others], flips)
    row_rngs = [rng_of(*keys, "critic", row.seed) for row in rows]
    row_flips = [rng.random() < config.augment.flip for rng in row_rngs]
    return CriticRows(
        photo_bCSS=pictures([pairs.photos[i] for i in numbers], flips),
        real_bSS=rasters([pairs.sketches[i] for i in sketches], flips, rngs),
        photo_uCSS=pictures([row.photos[side] for row in rows], row_flips),
        drawn_uSS=rasters([row.drawn.strokes for row in rows], row_flips, row_rngs),
        own_bSS=own,
        wrong_bCSS=wrong,
    )


# --------------------------------------------------------------------------- G's rows


@dataclass(frozen=True)
class PolicyBatch:
    """R drawn photos of this rank, and K sampled drawings of each as b rows."""

    photo_f: Tensor
    photo_g: Tensor
    photo_d: Tensor
    """uint8 (R, 3, S, S), at the sides of F, G and D."""
    photo_ids: list[str]
    """Of the drawings."""
    photo_id_R: Tensor
    """int64, of ``number_of``: the same photo may come twice."""
    row_of_b: Tensor
    """Which photo each drawing shows."""
    rows_bT5: Tensor
    length_b: Tensor
    behaviour_b: Tensor
    """log p under the weights that drew."""
    sketch_f: Tensor
    sketch_d: Tensor
    """uint8 (b, S, S), at the sides of F and D."""
    pseudo_f: Tensor
    pseudo_d: Tensor
    """The photos' pseudo sketches (R, S, S): what the greedy baseline rewards."""

    def to(self, device: torch.device) -> Self:
        """On ``device``."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        return dataclasses.replace(self, **moved)


def policy_batch(rows: Sequence[LiveRow], sides: Sides, config: GeneratorTraining) -> PolicyBatch:
    """The sampled drawings of rows, ready for their rewards."""
    samples = [(i, sample) for i, row in enumerate(rows) for sample in row.samples]
    model = config.model

    def photos(side: int) -> Tensor:
        return torch.from_numpy(np.stack([row.photos[side] for row in rows]))

    def rasters(drawn: Sequence[Strokes], side: int, simplified: bool) -> Tensor:
        if simplified:  # as D's other rows
            drawn = [strokes.fit(s, model.max_points, model.epsilon) for s in drawn]
        return torch.from_numpy(raster.rasterise(drawn, side))

    drawn = [sample.strokes for _, sample in samples]
    pseudo = [row.drawn.strokes for row in rows]
    points, _ = batch_rows.padded([sample.rows for _, sample in samples])
    return PolicyBatch(
        photo_f=photos(sides.f),
        photo_g=photos(sides.g),
        photo_d=photos(sides.d),
        photo_ids=[rows[i].photo_id for i, _ in samples],
        photo_id_R=torch.tensor([number_of(row.photo_id) for row in rows]),
        row_of_b=torch.tensor([i for i, _ in samples]),
        rows_bT5=points,
        length_b=torch.tensor([len(sample.rows) for _, sample in samples]),
        behaviour_b=torch.tensor([sample.log_prob for _, sample in samples]),
        sketch_f=rasters(drawn, sides.f, simplified=False),
        sketch_d=rasters(drawn, sides.d, simplified=True),
        pseudo_f=rasters(pseudo, sides.f, simplified=False),
        pseudo_d=rasters(pseudo, sides.d, simplified=True),
    )
