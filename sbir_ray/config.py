"""The settings of every command, as frozen dataclasses.

Every object made by the program stores the JSON of its settings beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """The retrieval network F: a backbone shared by photos and sketches, pooled to one vector."""

    backbone: str = "mobilenetv2"
    """``mobilenetv2``, ``efficientnet_lite0``, ``vgg16``, ``inception_v3`` or ``timm:<name>``."""
    weights: str = "package"
    """``package`` (weights that an installed package ships), ``imagenet`` (torchvision's or timm's
    hub), ``none`` (random), or the path of a ``.safetensors`` or ``.pth`` file."""
    pool: Literal["grid", "attention"] = "grid"
    """``grid``: average over a ``grid`` x ``grid`` raster, concatenated; ``attention``: the paper's
    spatial attention F + F * softmax(conv(F)), then the global average (section 3.2)."""
    grid: int = 4
    dim: int = 0
    """Size of a linear projection after pooling; 0 for none."""
    image_size: int = 128
    """Side of the square input, pixels."""
    frozen_norm: bool = True
    """Keep the backbone's batch-normalisation statistics as pre-trained."""
    pair_norm: bool = True
    """After training, let directions count less in which sketches and their photos differ."""

    def __post_init__(self) -> None:
        at_least("grid", self.grid, 1)
        at_least("dim", self.dim, 0)
        at_least("image_size", self.image_size, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalLossConfig:
    """The retrieval loss (Eq. 4, 6, 7) and its later form."""

    kind: Literal["infonce", "triplet"] = "infonce"
    temperature: float = 0.07
    margin: float = 0.3
    pseudo_weight: float = 1.0
    """Factor of the pseudo pairs' loss before the certainty weights."""
    certainty: Literal["raw", "normalised", "none"] = "raw"
    """How a pseudo pair's certainty weighs it: as it is (the paper), divided by the batch's mean,
    or not at all."""
    distill: Literal["relational", "pair", "absolute", "none"] = "pair"
    """Which distances of the teacher are kept: all within the batch, the pair's own (Eq. 6), or the
    embeddings themselves."""
    distill_weight: float = 0.1

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        at_least("pseudo_weight", self.pseudo_weight, 0)
        at_least("distill_weight", self.distill_weight, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """Changes of the training input, drawn anew for every row from (seed, step, row)."""

    flip: float = 0.5
    """Probability of mirroring photo and sketch together."""
    rotate: float = 5.0
    """Largest rotation of the sketch, degrees."""
    scale: float = 0.08
    """Largest relative change of the sketch's size, per axis."""
    shift: float = 4.0
    """Largest shift of the sketch, canvas units."""
    bend: float = 2.0
    """Standard deviation of the smooth displacement of a stroke's points, canvas units."""
    stroke_dropout: float = 0.05
    """Probability that a stroke is left out (never all of them)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PenConfig:
    """What the generator ``pen`` has for its own, and how it learns from traced contours."""

    width: int = 160
    heads: int = 5
    blocks: int = 3
    contour_steps: int = 400
    """First steps, in which it learns from traced contours alone: of the training photos, and of
    those without sketches if they are given."""
    contour_share: float = 0.4
    """Share of traced contours in the later steps' rows."""
    contour_photos: int = 1000
    """Photos, at most, that are traced."""
    slip: float = 4.0
    """Standard deviation of the pen's slips in training, canvas units: the pen learns to find back
    from where it should not be."""
    rotate: float = 12.0
    """Largest rotation of photo and sketch together, degrees."""
    scale: float = 0.15
    """Largest relative change of both's size, per axis."""
    shift: float = 12.0
    """Largest shift of both, canvas units."""

    def __post_init__(self) -> None:
        for name in ("width", "heads", "blocks"):
            at_least(name, getattr(self, name), 1)
        for name in ("contour_steps", "contour_photos", "slip", "rotate", "scale", "shift"):
            at_least(name, getattr(self, name), 0)
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads={self.heads}")
        if not 0 <= self.contour_share < 1:
            raise ValueError(f"contour_share: {self.contour_share:g} is not in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorConfig:
    """The generator G, which draws a photo row by row with Gaussian mixtures.

    The defaults are sizes that train in minutes on two cores; the paper's are in
    recipes/paper-generator.toml.
    """

    kind: Literal["pen", "paper"] = "pen"
    """``pen``: looks where its pen is and at what it has drawn, and learns to follow contours
    first; ``paper``: image encoder, VAE start, 2-D attention LSTM (section 3.1)."""
    pen: PenConfig = field(default_factory=PenConfig)
    """Of the kind ``pen``."""

    backbone: str = "mobilenetv2"
    """As for the retrieval network."""
    weights: str = "package"
    """As for the retrieval network."""
    image_size: int = 128
    """Side of the square photo, pixels. The map that is attended to has 8 x 8 cells at 128 pixels
    with mobilenetv2, at 256 with vgg16."""
    latent: int = 64
    """The kind ``paper``: numbers of the variational start."""
    hidden: int = 256
    """The same: units of the LSTM."""
    attention: int = 128
    """The same: units of its attention."""
    mixtures: int = 10
    max_points: int = 100
    """Longest drawing, points; longer training sketches are simplified until they fit."""
    epsilon: float = 5.0
    """Tolerance of the simplification (RDP) of training sketches, canvas units: fewer, longer lines
    are learnt sooner."""
    attend: bool = True
    """Look at the map anew for each point (section 3.1); false: at its average, always."""
    train_backbone: bool = False
    """A backbone that does not train lets its maps be computed once."""
    kl_weight: float = 1.0
    kl_start: float = 0.01
    kl_decay: float = 0.99995
    """kl weight at step t: kl_weight * (1 - (1 - kl_start) * kl_decay^t)."""

    def __post_init__(self) -> None:
        if self.kind == "pen" and not self.attend:
            raise ValueError("attend: false is of kind=paper alone")
        at_least("max_points", self.max_points, 2)
        at_least("mixtures", self.mixtures, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscriminatorConfig:
    """The pair discriminator D: PatchGAN on photo and raster sketch (section 3.3)."""

    channels: int = 32
    layers: int = 3
    image_size: int = 64
    steps: int = 400
    """Updates of D after the generator's own training; 0: no discriminator."""
    lr: float = 3e-4
    batch_size: int = 16
    plain: bool = False
    """Only the paper's two terms (Eq. 5), without real sketches on wrong photos as fakes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamConfig:
    """AdamW of one network (weight decay 0: Adam) and the schedule of its rate."""

    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    schedule: Literal["one_cycle", "constant"] = "constant"
    clip_norm: float = 5.0
    """Largest norm of the gradient."""

    def __post_init__(self) -> None:
        positive("lr", self.lr)
        positive("clip_norm", self.clip_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig(AdamConfig):
    """The training of one network alone."""

    steps: int = 240
    batch_size: int = 32
    """Labelled pairs a step, over all workers."""
    lr: float = 4e-4
    weight_decay: float = 0.01
    schedule: Literal["one_cycle", "constant"] = "one_cycle"

    def __post_init__(self) -> None:
        AdamConfig.__post_init__(self)
        at_least("steps", self.steps, 1)
        at_least("batch_size", self.batch_size, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """When a run is measured on the validation split, saved, and what is kept."""

    log_every: int = 10
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0: at the end only."""
    checkpoint_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        at_least("log_every", self.log_every, 1)
        at_least("evaluate_every", self.evaluate_every, 0)
        at_least("checkpoint_every", self.checkpoint_every, 1)
        at_least("keep", self.keep, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Which drawings become pseudo pairs. A drawing is left out by the first of these that it does
    not meet, and counted under that name."""

    min_certainty: float = 0.0
    """Least certainty of the discriminator."""
    min_log_prob: float = -1000.0
    """Least mean log-probability of a drawing's rows, nats."""
    require_end: bool = False
    """Only drawings that came to an end by themselves."""
    min_points: int = 4
    max_points: int = 400
    min_strokes: int = 1
    max_strokes: int = 100
    min_ink: float = 0.0
    """Least share of inked pixels of the drawing's 64 x 64 raster."""
    max_ink: float = 1.0
    max_rank: int = 0
    """Largest rank of the photo, from 1, among the reference photos for its drawing, by the
    teacher; 0: not asked."""

    def __post_init__(self) -> None:
        at_least("max_rank", self.max_rank, 0)
        at_least("min_ink", self.min_ink, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceConfig:
    """Which drawings of a PSEUDO folder become pairs; nothing is drawn again for it."""

    keep: Literal["best", "all"] = "best"
    """As of ``sketch``."""
    samples: int = 0
    """Only the first so many drawings of each photo; 0: all that there are."""
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalTraining:
    """``train retrieval`` and ``train semi``."""

    seed: int = 0
    model: RetrievalConfig = field(default_factory=RetrievalConfig)
    loss: RetrievalLossConfig = field(default_factory=RetrievalLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    pseudo_share: float = 1.0
    """Pseudo pairs a step, as a multiple of the labelled pairs (the paper: equal parts)."""
    negatives: int = 0
    """Unlabelled photos a step that serve as negatives alone."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which drawings of the PSEUDO folder are pseudo pairs, chosen anew from all that were drawn;
    left as it is: those that the folder's own choice keeps. Joint training has filters itself."""
    samples: int = 0
    """Only the first so many drawings of each photo of the PSEUDO folder; 0: as the folder says."""
    cpu_bfloat16: bool = False
    """Half precision on CPUs as well, which those with avx512_bf16 run in two thirds of the time.
    GPUs always use it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorTraining:
    """``train generator``: G by Eq. 3 on the labelled pairs, then D on its drawings."""

    seed: int = 0
    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(
            rotate=0.0, scale=0.0, shift=0.0, bend=0.0, stroke_dropout=0.0
        )
    )
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            steps=1200, batch_size=24, lr=1.5e-3, weight_decay=0.1, clip_norm=1.0
        )
    )
    save: SaveConfig = field(default_factory=SaveConfig)

    def __post_init__(self) -> None:
        first, all_ = self.model.pen.contour_steps, self.optim.steps
        if self.model.kind == "pen" and first >= all_:
            raise ValueError(
                f"model.pen.contour_steps: {first} of optim.steps={all_} leave none for people's "
                "sketches; set less"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WebConfig:
    """``ingest``: how photos are asked of web servers."""

    timeout: float = 20.0
    """Seconds that a photo may take, redirects included."""
    retries: int = 2
    """More attempts when a server does not answer, or says that it cannot now."""
    per_host: float = 10.0
    """Photos a second that are asked of one host, by all workers together; 0: any number."""
    threads: int = 16
    """Photos that a worker waits for at once."""
    allow_private: bool = False
    """Also ask servers of this machine and network."""

    def __post_init__(self) -> None:
        positive("timeout", self.timeout)
        at_least("retries", self.retries, 0)
        at_least("per_host", self.per_host, 0)
        at_least("threads", self.threads, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestConfig:
    """``ingest``: how photos are stored and which are turned away."""

    longest: int = 512
    """Longest side of the stored picture, pixels."""
    form: Literal["jpeg", "webp"] = "jpeg"
    """Format of the stored picture."""
    quality: int = 95
    """Its quality, 1 to 100."""
    max_bytes: int = 67_108_864
    """Largest file that is read."""
    max_pixels: int = 64_000_000
    """Largest picture that is decoded, width times height."""
    near: int = 2
    """Photos whose perceptual hashes differ in at most this many of 64 bits are duplicates."""
    shard_rows: int = 512
    """Photos in a Parquet file of the store, at most."""
    max_reject_rate: float = 1.0
    """Share of photos that may be rejected or fail before the command ends with an error."""
    web: WebConfig = field(default_factory=WebConfig)

    def __post_init__(self) -> None:
        at_least("longest", self.longest, 8)
        at_least("quality", self.quality, 1)
        at_least("near", self.near, 0)
        if self.quality > 100 or self.near > 8:
            raise ValueError(f"quality: at most 100, near: at most 8 ({self.quality}, {self.near})")
        at_least("shard_rows", self.shard_rows, 1)


BEST_OF = 4
"""Drawings of a photo by a generator, of which one is chosen, where nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchConfig:
    """``sketch``: how pseudo sketches are drawn and which are kept."""

    seed: int = 0
    samples: int = 1
    """Drawings a photo."""
    keep: Literal["best", "all"] = "best"
    """Which of a photo's drawings that pass the filters become pairs: the one whose photo the
    teacher ranks first (of several, the most similar one; without a teacher, the most certain one),
    or all. The others are stored as well."""
    temperature: float = 0.25
    """Of a generator. 0: the most likely drawing (the paper's way); 1: sampled from the model.
    Between them more drawings come to an end by themselves than at 0."""
    batch_size: int = 32
    """Photos that an actor draws at once, all drawings of each."""
    filters: FilterConfig = field(default_factory=FilterConfig)

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 1)
        at_least("temperature", self.temperature, 0)
        at_least("batch_size", self.batch_size, 1)

    @property
    def choice(self) -> ChoiceConfig:
        """What of this says which drawings become pairs."""
        return ChoiceConfig(keep=self.keep, filters=self.filters)


def at_least(name: str, value: float, least: float) -> None:
    """Refuse less than ``least``; raises ValueError."""
    if not value >= least:
        raise ValueError(f"{name}: {value} is less than {least}")


def positive(name: str, value: float) -> None:
    """Refuse 0 and less; raises ValueError."""
    if not value > 0:
        raise ValueError(f"{name}: {value} has to be above 0")
