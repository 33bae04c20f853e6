"""The settings of joint training, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sbir_ray.config import (
    AdamConfig,
    FilterConfig,
    GeneratorTraining,
    RetrievalTraining,
    SaveConfig,
    at_least,
    positive,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """How the generator learns from the retrieval network and the discriminator (Eq. 8, 9)."""

    kind: Literal["reinforce", "soft", "both", "none"] = "none"
    """``reinforce``: the policy gradient on sampled drawings (the paper); ``soft``: gradients of F
    and D through a differentiable raster of the drawing; ``both``: their sum; ``none``: Eq. 3
    alone, half the time and no worse by what docs/results.md measured."""
    batch_size: int = 8
    """Photos a step of G whose drawings are rewarded, so many labelled and so many unlabelled."""
    samples: int = 2
    """Drawings of each, sampled at temperature 1."""
    retrieval_weight: float = 1.0
    """lambda_r1: of minus the drawing's triplet loss under F."""
    certainty_weight: float = 1.0
    """lambda_r2: of D's certainty."""
    weight: float = 0.1
    """lambda_G: of the policy gradient beside Eq. 3."""
    soft_weight: float = 0.1
    """Of the gradient through the raster beside Eq. 3."""
    soft_sigma: float = 2.0
    """Standard deviation of its lines' ink, canvas units."""
    baseline: Literal["none", "greedy", "leave_one_out"] = "leave_one_out"
    """What a reward is compared with: nothing (the paper), the reward of the photo's pseudo sketch
    (self-critical), or the mean of the photo's other samples."""
    normalise: bool = True
    """Divide the advantages by their root mean square over the batch."""
    per_row: bool = True
    """The mean log-probability of a drawing's rows; false: their sum (the paper)."""
    layers: Literal["all", "last"] = "all"
    """What the policy gradient trains; ``last``: W_y and b_y alone (the paper)."""
    max_ratio: float = 2.0
    """Limit of the importance ratio of drawings made by older weights; 0: no correction."""

    def __post_init__(self) -> None:
        at_least("batch_size", self.batch_size, 1)
        at_least("samples", self.samples, 1)
        at_least("weight", self.weight, 0)
        at_least("soft_weight", self.soft_weight, 0)
        positive("soft_sigma", self.soft_sigma)
        at_least("max_ratio", self.max_ratio, 0)
        if self.baseline == "leave_one_out" and self.samples < 2 and self.reinforces:
            raise ValueError("baseline: leave_one_out needs samples=2 or more")

    @property
    def reinforces(self) -> bool:
        """Whether drawings are sampled for the policy gradient."""
        return self.kind in ("reinforce", "both")

    @property
    def softens(self) -> bool:
        """Whether gradients go through the raster."""
        return self.kind in ("soft", "both")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The order of the joint updates (Algorithm 1)."""

    steps: int = 240
    """Updates of F and D, and of G, counted together."""
    retrieval_steps: int = 5
    """k_r: updates of F and D before G's turn."""
    generator_steps: int = 5
    """k_g: updates of G before F's and D's turn; 0: G does not change."""
    pseudo_warmup: int = 0
    """Steps before the pseudo pairs' own loss counts; their photos and sketches are negatives of
    the labelled pairs, and count in distillation, from the start."""
    pseudo_ramp: int = 0
    """Steps over which their weight then rises."""
    policy_warmup: int = 0
    """Steps before G learns from F and D."""
    policy_ramp: int = 0
    """Steps over which that weight then rises."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("retrieval_steps", self.retrieval_steps, 1)
        for name in ("generator_steps", "pseudo_warmup", "pseudo_ramp"):
            at_least(name, getattr(self, name), 0)
        for name in ("policy_warmup", "policy_ramp"):
            at_least(name, getattr(self, name), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """Where joint training gets its pseudo sketches from."""

    sync: bool = False
    """The learners draw for themselves, one after the other with training: repeatable bit for bit
    on CPUs; all photos are kept in memory. False: generator actors draw while the learners
    train."""
    temperature: float = 0.25
    """Of the drawings that become pseudo pairs, as for ``sketch``."""
    batch_size: int = 16
    """Photos that an actor draws at once."""
    max_tries: int = 3
    """Photos that may be drawn for each pseudo pair of a step, until one passes the filters."""
    max_staleness: int = 4
    """Versions of the generator that a drawing may lie behind; older ones are dropped."""
    window: int = 3
    """Steps' worth of drawings that may be under way or waiting at once."""
    wait_limit: float = 300.0
    """Seconds that a learner waits for drawings before the run fails."""

    def __post_init__(self) -> None:
        at_least("temperature", self.temperature, 0)
        at_least("batch_size", self.batch_size, 1)
        at_least("max_tries", self.max_tries, 1)
        at_least("max_staleness", self.max_staleness, 0)
        at_least("window", self.window, 1)
        positive("wait_limit", self.wait_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class JointTraining:
    """``train joint``: F, D and G trained together (Algorithm 1), after each alone."""

    seed: int = 0
    retrieval: RetrievalTraining = field(default_factory=RetrievalTraining)
    """F: its supervised training first (not when --teacher is given), and its loss, augmentation,
    labelled rows a step (optim.batch_size) and pseudo_share in joint training."""
    generator: GeneratorTraining = field(default_factory=GeneratorTraining)
    """G and D: their training first (not when --generator is given), and G's labelled rows a step
    and augmentation in joint training."""
    warm_start: bool = False
    """Joint training takes F up where its supervised training ended; false: from the backbone's
    weights."""
    teacher: Literal["frozen", "ema"] = "frozen"
    """Whose distances are distilled: F as its supervised training ended (the paper), or its running
    average."""
    ema_decay: float = 0.99
    """Of the running average, a step of F."""
    retrieval_optim: AdamConfig = field(
        default_factory=lambda: AdamConfig(lr=4e-4, weight_decay=0.01, schedule="one_cycle")
    )
    """F's in joint training."""
    discriminator_optim: AdamConfig = field(default_factory=lambda: AdamConfig(lr=1e-4, beta1=0.5))
    """D's in joint training."""
    generator_optim: AdamConfig = field(default_factory=lambda: AdamConfig(lr=5e-4, clip_norm=1.0))
    """G's in joint training."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay:g} is not in [0, 1)")
        for name, part in (("retrieval", self.retrieval), ("generator", self.generator)):
            if part.seed:
                raise ValueError(f"{name}.seed: all parts take the run's seed; set seed instead")
        if self.retrieval.filters != FilterConfig():
            raise ValueError("retrieval.filters: are those of a PSEUDO folder; set filters instead")
        if self.retrieval.samples:
            raise ValueError("retrieval.samples: are those of a PSEUDO folder; leave it at 0")
