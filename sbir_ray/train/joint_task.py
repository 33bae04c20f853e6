"""F, D and G trained in turns, each for the others' benefit (Algorithm 1).

A turn of F and D on labelled and pseudo pairs (Eq. 7, 5) is followed by a turn of G on labelled
pairs and on the rewards of its drawings (Eq. 9). After each turn the weights of G and D are
published as the next version: whoever draws, the actors or the learners themselves, uses them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sbir_ray.data.pairs import PairSet, Split
from sbir_ray.data.raster import soft_rasterise
from sbir_ray.errors import UserError
from sbir_ray.joint import (
    PolicyRows,
    discriminator_losses,
    ema_,
    joint_generator_losses,
    policy_losses,
    ramp,
    rewards,
    soft_losses,
)
from sbir_ray.joint_config import JointTraining
from sbir_ray.losses import mean_triplet
from sbir_ray.places import place
from sbir_ray.runs import load_discriminator, load_generator, load_retrieval
from sbir_ray.stream.filters import TeacherRanker, reference_photos
from sbir_ray.stream.live_photos import seed_of
from sbir_ray.stream.live_rows import LiveSketcher, published
from sbir_ray.train.exhibits import SHOWN, Exhibits, finish
from sbir_ray.train.generator_task import GeneratorBatch, GeneratorTask
from sbir_ray.train.job import Board, Job, Player, divisible
from sbir_ray.train.joint_rows import (
    ActorsDraw,
    CriticRows,
    DrawnRows,
    Labelled,
    LearnersDraw,
    PolicyBatch,
    Sides,
    Source,
    critic_rows,
    policy_batch,
    pseudo_rows,
    some_photos,
)
from sbir_ray.train.position import Stream, check_position, identity
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.retrieval_task import RetrievalBatch, RetrievalTask, one_column_each

if TYPE_CHECKING:
    from sbir_ray.stream.live import Shard


PICTURES = 20
"""Times, at most, that the same photos are drawn to be looked at."""


@dataclass(frozen=True)
class RetrievalTurn:
    """Rows of a step of F and D."""

    pairs: RetrievalBatch
    critic: CriticRows


@dataclass(frozen=True)
class GeneratorTurn:
    """Rows of a step of G."""

    labelled: GeneratorBatch
    drawn: PolicyBatch | None


@dataclass(frozen=True)
class Columns:
    """Embedded photos, one column each."""

    photo_PD: Tensor
    of_R: Tensor
    """Column of each of this rank's photos."""


class JointTask:
    """Algorithm 1. Without ``live`` the learners draw for themselves."""

    def __init__(
        self, job: Job, ranks: Ranks, device: torch.device, live: Shard | None = None
    ) -> None:
        assert isinstance(job.config, JointTraining)
        config = job.config
        self.config, self.ranks, self.device = config, ranks, device
        self.run = place(job.out)
        self.steps = config.schedule.steps
        pairs = job.inputs["pairs"]

        # F, its teacher, and its rows.
        alone = dataclasses.replace(config.retrieval, seed=config.seed)
        inputs = {k: v for k, v in job.inputs.items() if k in ("pairs", "teacher", "negatives")}
        self.f = RetrievalTask(Job("retrieval", job.out, alone, inputs), ranks, device)
        self.pseudo_count = round(alone.pseudo_share * alone.optim.batch_size)
        divisible("retrieval.pseudo_share x optim.batch_size", self.pseudo_count, ranks)
        supervised = load_retrieval(place(job.inputs["teacher"])).model
        if config.warm_start:
            # A network in training has no pair norm, whether its teacher has one or not.
            weights = supervised.state_dict()
            mine = {k: v for k, v in weights.items() if not k.startswith("pair_norm.")}
            self.f.model.load_state_dict(mine)
        if config.teacher == "ema" and alone.loss.distill != "none":
            self.f.teacher = copy.deepcopy(self.f.model).requires_grad_(False)

        # G and its rows, D.
        run = place(job.inputs["generator"])
        drawing = dataclasses.replace(config.generator, seed=config.seed)
        trained = load_generator(run)
        generator = trained.model.to(device)
        self.steps_of_g = trained.version
        """Its steps before these: the weight of its KL term goes on rising."""
        generator.backbone.requires_grad_(drawing.model.train_backbone)
        g_job = Job("generator", job.out, drawing, {"pairs": pairs, "photos": job.inputs["photos"]})
        self.g = GeneratorTask(g_job, ranks, device, generator)
        critic = load_discriminator(run)
        if critic is None:
            raise UserError(f"{run}: has no discriminator; train one with discriminator.steps=400")
        self.d = critic.model.to(device)
        if config.policy.kind != "none" and config.schedule.generator_steps:
            divisible("policy.batch_size", config.policy.batch_size, ranks)

        self.players: Mapping[str, Player] = {
            "retrieval": Player(self.f.model, config.retrieval_optim),
            "discriminator": Player(self.d, config.discriminator_optim),
            "generator": Player(self.g.model, config.generator_optim),
        }
        networks: dict[str, nn.Module] = {k: v.module for k, v in self.players.items()}
        if config.teacher == "ema" and self.f.teacher is not None:
            networks["teacher"] = self.f.teacher
        self.trained: nn.Module = nn.ModuleDict(networks)

        # Who draws.
        self.sides = Sides(
            alone.model.image_size, drawing.model.image_size, drawing.discriminator.image_size
        )
        self.drawing = drawing
        self.labelled = Labelled(place(pairs), self.sides, self.g.pairs, self.f.pairs)
        self.own_stream = Stream(len(self.labelled.ids), config.seed, "rewarded")
        self.photos = place(job.inputs["photos"])
        ranker = None
        if config.filters.max_rank and live is None:
            side = supervised.config.image_size
            ranker = TeacherRanker(supervised.to(device), reference_photos(self.photos, side))
        samples = config.policy.samples if config.policy.kind != "none" else 0
        self.sketcher = LiveSketcher(
            copy.deepcopy(self.g.model), copy.deepcopy(self.d), config.stream, samples, ranker
        )
        self.live = live
        source: Source
        if live is None:
            source = LearnersDraw(self.photos, self.sketcher, self.sides, config)
        else:
            source = ActorsDraw(live)
        self.rows = DrawnRows(source, config, ranks)
        self.folder = place(pairs)
        self.exhibits: Exhibits | None = None

    def _exhibits(self) -> Exhibits:
        """Validation photos where there are some: they show what G makes of new ones."""
        split: Split = "val" if self.g.held_out else "train"
        g = self.g.held_out or self.g.pairs
        d = PairSet.load(self.folder, split, self.sides.d)
        ids = d.photo_ids[:SHOWN]
        return Exhibits(self.run, ids, g.photos[: len(ids)], d.photos[: len(ids)])

    # ----------------------------------------------------------------------- turns

    def generators_turn(self, step: int) -> bool:
        """Whether G learns in ``step``; else F and D do."""
        schedule = self.config.schedule
        cycle = schedule.retrieval_steps + schedule.generator_steps
        return step % cycle >= schedule.retrieval_steps

    def version(self, step: int) -> int:
        """Turns that are over before ``step``: the version of the weights that draw."""
        schedule = self.config.schedule
        cycles, place = divmod(step, schedule.retrieval_steps + schedule.generator_steps)
        turns = 2 if schedule.generator_steps else 1
        return cycles * turns + int(place >= schedule.retrieval_steps)

    def turn(self, step: int) -> Mapping[str, Player]:
        """See :class:`Task`."""
        names = ["generator"] if self.generators_turn(step) else ["retrieval", "discriminator"]
        return {name: self.players[name] for name in names}

    def ahead(self, step: int) -> bool:
        """Learners that draw for themselves wait for the version that a turn ends with."""
        if self.live is None or not self.config.stream.max_staleness:
            return not self.resumable(step)
        return True

    def resumable(self, step: int) -> bool:
        """Only between turns, where the weights that draw are those that learn."""
        return step == self.steps or self.version(step) != self.version(step - 1)

    # ----------------------------------------------------------------------- rows

    def batch(self, step: int) -> RetrievalTurn | GeneratorTurn:
        """See :class:`Task`."""
        version = self.version(step)
        if self.generators_turn(step):
            drawn = None
            if self.config.policy.kind != "none":
                drawn = self._policy_batch(step, version)
            return GeneratorTurn(self.g.batch(step), drawn)
        rows = self.rows.take(step, version, "pseudo", self.pseudo_count, self.config.filters)
        pairs = self.f.batch_with(step, pseudo_rows(rows, self.config, self.sides.f))
        critic = critic_rows(
            self.labelled,
            [row.sketch for row in self.f.labelled_rows(step)],
            [row for row, _ in rows],
            self.sketcher,
            self.drawing,
            (self.config.seed, step),
        )
        return RetrievalTurn(pairs, critic)

    def _policy_batch(self, step: int, version: int) -> PolicyBatch:
        count = self.config.policy.batch_size
        taken = self.rows.take(step, version, "policy", count, None)
        items = self.own_stream.batch(step, count)
        photos = [items[i][1] for i in self.ranks.mine(count)]
        seeds = [seed_of(self.config.seed, "rewarded", step, photo) for photo in photos]
        own = self.labelled.drawn(self.sketcher, photos, seeds, samples=None)
        return policy_batch([row for row, _ in taken] + own, self.sides, self.drawing)

    # ----------------------------------------------------------------------- losses

    def losses(self, batch: RetrievalTurn | GeneratorTurn, step: int) -> dict[str, Tensor]:
        """See :class:`Task`."""
        if isinstance(batch, RetrievalTurn):
            return self._retrieval_turn(batch, step)
        return self._generator_turn(batch, step)

    def _retrieval_turn(self, batch: RetrievalTurn, step: int) -> dict[str, Tensor]:
        """Eq. 7 and Eq. 5. They share no weight, so that one sum serves both."""
        schedule = self.config.schedule
        rising = ramp(step, schedule.pseudo_warmup, schedule.pseudo_ramp)
        f = self.f.losses(batch.pairs, step, rising)
        rows = batch.critic
        people = batch.pairs.photo_ids[: batch.pairs.labelled]
        unlabelled = batch.pairs.photo_ids[batch.pairs.labelled :]
        wrong = own = None
        if rows.wrong_bCSS is not None and rows.own_bSS is not None:
            wrong = self._logits(people, rows.wrong_bCSS, rows.real_bSS)
            own = self._logits(people, rows.photo_bCSS, rows.own_bSS)
        d = discriminator_losses(
            self._logits(people, rows.photo_bCSS, rows.real_bSS),
            self._logits(unlabelled, rows.photo_uCSS, rows.drawn_uSS),
            wrong,
            own,
        )
        loss = f.pop("loss") + d.pop("loss")
        named = {k if k.startswith("certainty") else f"d_{k}": v for k, v in d.items()}
        return {"loss": loss, **f, **named}

    def _logits(self, photo_ids: list[str], photo: Tensor, sketch: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            logits: Tensor = self.d(photo.to(self.device), sketch.to(self.device))
        self.ranks.watch(photo_ids, logits)
        return self.ranks.gather(logits.float())

    def _generator_turn(self, batch: GeneratorTurn, step: int) -> dict[str, Tensor]:
        """Eq. 9."""
        config, schedule = self.config.policy, self.config.schedule
        vae = self.g.losses(batch.labelled, self.steps_of_g + step)
        policy, soft = None, None
        if batch.drawn is not None:
            drawn = batch.drawn.to(self.device)
            self.f.model.eval()
            with frozen(self.f.model, self.d):
                map_RCHW = self.g.model.encode(drawn.photo_g)
                photos = self._columns(drawn)
                if config.reinforces:
                    policy = policy_losses(self._policy_rows(drawn, map_RCHW, photos), config)
                if config.softens:
                    soft = self._soft(drawn, map_RCHW, photos)
        rising = ramp(step, schedule.policy_warmup, schedule.policy_ramp)
        return joint_generator_losses(vae, config, rising, policy, soft)

    def _policy_rows(self, drawn: PolicyBatch, map_RCHW: Tensor, photos: Columns) -> PolicyRows:
        """The sampled drawings of all ranks with their rewards."""
        config, gather = self.config.policy, self.ranks.gather
        log_prob_BT = self.g.model.log_prob_of_code(
            map_RCHW[drawn.row_of_b],
            drawn.rows_bT5,
            drawn.length_b,
            last_only=config.layers == "last",
        )
        reward_b = self._rewards(drawn, drawn.row_of_b, drawn.sketch_f, drawn.sketch_d, photos)
        greedy_R = torch.zeros(len(map_RCHW), device=self.device)
        if config.baseline == "greedy":
            every = torch.arange(len(map_RCHW), device=self.device)
            greedy_R = self._rewards(drawn, every, drawn.pseudo_f, drawn.pseudo_d, photos)
        self.ranks.watch(drawn.photo_ids, log_prob_BT, drawn.behaviour_b, reward_b)
        return PolicyRows(
            log_prob_B=gather(log_prob_BT.sum(1)),
            rows_B=gather(drawn.length_b),
            behaviour_B=gather(drawn.behaviour_b),
            reward_B=gather(reward_b),
            photo_B=gather(photos.of_R[drawn.row_of_b]),
            greedy_B=gather(greedy_R[drawn.row_of_b]),
        )

    @torch.no_grad()
    def _rewards(
        self,
        drawn: PolicyBatch,
        row_of_b: Tensor,
        sketch_f: Tensor,
        sketch_d: Tensor,
        photos: Columns,
    ) -> Tensor:
        """Eq. 8 of this rank's drawings, among the photos of all ranks."""
        sketch_bD = self.f.model.embed_sketches(sketch_f).float()
        certainty_b = self.d.certainty(drawn.photo_d[row_of_b], sketch_d).float()
        column_b = photos.of_R[row_of_b]
        margin = self.config.retrieval.loss.margin
        config = self.config.policy
        return rewards(sketch_bD, photos.photo_PD, column_b, certainty_b, margin, config)

    def _soft(self, drawn: PolicyBatch, map_RCHW: Tensor, photos: Columns) -> Tensor:
        """Minus the mean reward of one drawing a photo, with gradients through its raster."""
        config = self.config.policy
        first_R = torch.arange(len(map_RCHW), device=self.device) * config.samples
        points_RN2, pen_RN = self.g.model.redraw_of_code(
            map_RCHW, drawn.rows_bT5[first_R], drawn.length_b[first_R]
        )
        f_side, d_side = self.sides.f, self.sides.d
        sketch_RSS = soft_rasterise(points_RN2, pen_RN, f_side, config.soft_sigma)
        small_RSS = sketch_RSS
        if d_side != f_side:
            small_RSS = soft_rasterise(points_RN2, pen_RN, d_side, config.soft_sigma)
        sketch_RD = self.f.model.embed_sketches(sketch_RSS)
        margin = self.config.retrieval.loss.margin
        retrieval_R = mean_triplet(sketch_RD, photos.photo_PD, photos.of_R, margin)
        certainty_R = self.d.certainty(drawn.photo_d, small_RSS)
        self.ranks.watch(drawn.photo_ids[:: config.samples], retrieval_R, certainty_R)
        return soft_losses(self.ranks.gather(retrieval_R), self.ranks.gather(certainty_R), config)

    @torch.no_grad()
    def _columns(self, drawn: PolicyBatch) -> Columns:
        """The photos of all ranks, among which drawings are searched with."""
        photo_ND = self.ranks.gather(self.f.model.embed_photos(drawn.photo_f).float())
        columns, place_N = one_column_each(self.ranks.gather(drawn.photo_id_R))
        own = self.ranks.mine(len(place_N))
        return Columns(photo_ND[columns], place_N[own.start : own.stop : own.step])

    # ----------------------------------------------------------------------- between steps

    def done(self, step: int, board: Board | None, updated: bool) -> dict[str, float]:
        """See :class:`Task`: the teacher's average, and at the end of a turn the next version."""
        averaged = self.f.teacher if self.config.teacher == "ema" else None
        if updated and averaged is not None and not self.generators_turn(step):
            ema_(averaged, self.f.model, self.config.ema_decay)
        version = self.version(step + 1)
        if version != self.version(step):
            self._publish(version)
            if self.exhibits is not None and self.generators_turn(step):
                part = max(1, self.steps // PICTURES)
                if (step + 1) // part > self.exhibits.last // part:
                    self.exhibits.draw(step + 1, version, self.g.model, self.d, board)
        turn = float(self.generators_turn(step))
        return {"turn": turn, "version": version, **self.rows.rates()}

    def _publish(self, version: int) -> None:
        weights = published(self.g.model, self.d)
        self.sketcher.load(version, weights)
        if self.live is not None and self.ranks.rank == 0:
            self.live.publish(version, weights)

    def _data(self) -> dict[str, Any]:
        found = {**self.f.data(), **self.g.data()}
        if isinstance(self.rows.source, LearnersDraw):
            found["photos"] = identity(self.rows.source.ids)
        return found

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        if step:
            check_position(state.get("data", {}), self._data(), f"{self.run}: step {step}")
        self.rows.restore(state.get("rows", {}))
        self._publish(self.version(step))
        if self.ranks.rank == 0:
            self.exhibits = self._exhibits()
            self.exhibits.resume(step)
            if step == 0:
                self.exhibits.draw(0, 0, self.g.model, self.d)

    def state(self) -> dict[str, Any]:
        """See :class:`Task`."""
        rows = self.rows.state()
        if self.ranks.rank == 0:
            self.rows.write(self.run, rows)
        return {"rows": rows, "data": self._data()}

    def evaluate(self) -> dict[str, float]:
        """Accuracy of F and likelihood of G on the validation split (empty when it has none)."""
        return {**self.f.evaluate(), **{f"g_{k}": v for k, v in self.g.evaluate().items()}}

    def finish(self) -> None:
        """See :class:`Task`: what the report shows of the end of training."""
        self.state()
        if self.live is not None:
            self.live.close()
        if self.exhibits is not None:
            ids, photos = some_photos(self.photos, self.sides)
            finish(
                self.run,
                self.steps,
                self.version(self.steps),
                self.g.model,
                self.d,
                self.f.model,
                ids,
                photos,
                self.config.stream.temperature,
                self.config.seed,
            )


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Gradients pass through the modules and are not taken for their weights."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
