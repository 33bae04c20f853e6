"""Jobs by what they train, and the order of those that belong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sbir_ray.config import DiscriminatorConfig, GeneratorConfig, GeneratorTraining, RetrievalConfig
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining, StreamConfig
from sbir_ray.places import place
from sbir_ray.runs import DISCRIMINATOR, generator_training, read_run, retrieval_config
from sbir_ray.train.generator_task import DiscriminatorTask, GeneratorTask
from sbir_ray.train.job import Job, Task
from sbir_ray.train.joint_task import JointTask
from sbir_ray.train.ranks import Ranks
from sbir_ray.train.retrieval_task import RetrievalTask

if TYPE_CHECKING:
    from sbir_ray.stream.live import Shard


def build(job: Job, ranks: Ranks, device: torch.device, live: Shard | None = None) -> Task:
    """The task of a job, with its data loaded.

    Raises:
        UserError: data or a setting that the user has to change.
    """
    if job.kind == "joint":
        return JointTask(job, ranks, device, live)
    if job.kind == "retrieval":
        return RetrievalTask(job, ranks, device)
    if job.kind == "generator":
        return GeneratorTask(job, ranks, device)
    assert job.kind == "discriminator", job.kind
    return DiscriminatorTask(job, ranks, device)


def generator_jobs(out: str, config: GeneratorTraining, inputs: Mapping[str, str]) -> list[Job]:
    """The generator, then the discriminator on its drawings, in a folder inside the run.

    Args:
        inputs: ``pairs``, and maybe ``photos`` without sketches, which a pen generator traces.
    """
    if config.model.kind == "paper":
        inputs = {"pairs": inputs["pairs"]}
    jobs = [Job("generator", out, config, inputs)]
    if config.discriminator.steps:
        critic = str(place(out) / DISCRIMINATOR)
        jobs.append(
            Job("discriminator", critic, config, {"pairs": inputs["pairs"], "generator": out})
        )
    return jobs


def joint_jobs(out: str, config: JointTraining, inputs: Mapping[str, str]) -> list[Job]:
    """Joint training, and before it what Algorithm 1 starts from: F alone, and G with D alone, each
    in a folder inside the run, where ``inputs`` does not name a run of it.

    Raises:
        UserError: a run that ``inputs`` names has networks of other settings.
    """
    jobs: list[Job] = []
    found = dict(inputs)
    config = _adopted(config, inputs)
    _refuse_without_effect(config)
    if "generator" not in inputs and not config.generator.discriminator.steps:
        raise UserError("generator.discriminator.steps=0: joint training needs a discriminator")
    if config.retrieval.negatives:
        found.setdefault("negatives", inputs["photos"])
    pairs = {"pairs": inputs["pairs"]}
    if "teacher" not in inputs:
        found["teacher"] = str(place(out) / SUPERVISED)
        alone = dataclasses.replace(config.retrieval, seed=config.seed, negatives=0)
        jobs.append(Job("retrieval", found["teacher"], alone, pairs))
    if "generator" not in inputs:
        found["generator"] = str(place(out) / GENERATOR)
        drawing = dataclasses.replace(config.generator, seed=config.seed)
        jobs += generator_jobs(found["generator"], drawing, {**pairs, "photos": inputs["photos"]})
    return [*jobs, Job("joint", out, config, found)]


def _adopted(config: JointTraining, inputs: Mapping[str, str]) -> JointTraining:
    """The settings with the networks of the runs that ``inputs`` names."""
    retrieval, generator = config.retrieval, config.generator
    if "teacher" in inputs:
        run = place(inputs["teacher"])
        model = retrieval_config(read_run(run), run)
        _agree(run, "retrieval.model", retrieval.model, RetrievalConfig(), model)
        retrieval = dataclasses.replace(retrieval, model=model)
    if "generator" in inputs:
        run = place(inputs["generator"])
        made = generator_training(read_run(run), run)
        plain = GeneratorTraining()
        # How G and D learn may differ, what they are may not.
        kl = _kl(plain.model)
        asked, found = (dataclasses.replace(model, **kl) for model in (generator.model, made.model))
        _agree(run, "generator.model", asked, plain.model, found)
        changed = {k: v for k, v in _kl(generator.model).items() if v != kl[k]}
        drawing = dataclasses.replace(made.model, **changed)
        shape = _shape(made.discriminator)
        _agree(
            run,
            "generator.discriminator",
            _shape(generator.discriminator),
            _shape(plain.discriminator),
            shape,
        )
        critic = dataclasses.replace(generator.discriminator, **shape)
        generator = dataclasses.replace(generator, model=drawing, discriminator=critic)
    return dataclasses.replace(config, retrieval=retrieval, generator=generator)


def _kl(config: GeneratorConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("kl_weight", "kl_start", "kl_decay")}


def _shape(config: DiscriminatorConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("channels", "layers", "image_size")}


def _refuse_without_effect(config: JointTraining) -> None:
    plain = StreamConfig()
    if config.stream.sync:
        for name in ("batch_size", "window", "max_staleness", "wait_limit"):
            if getattr(config.stream, name) != getattr(plain, name):
                raise UserError(f"stream.{name}: no actors draw with stream.sync; leave it out")
    if config.teacher == "ema" and config.retrieval.loss.distill == "none":
        raise UserError("teacher=ema: nothing is distilled with retrieval.loss.distill=none")
    if config.teacher == "frozen" and config.ema_decay != JointTraining().ema_decay:
        raise UserError("ema_decay: has no effect without teacher=ema")


def _agree(run: Path, name: str, asked: object, default: object, found: object) -> None:
    if asked not in (default, found):
        raise UserError(
            f"{run}: its network has other settings than {name}; leave {name} out, or train it "
            "anew by leaving the run out"
        )


SUPERVISED, GENERATOR = "supervised", "generator"
"""Folders, inside a joint run, of the runs that it starts from."""
