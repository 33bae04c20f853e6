"""A joint training of some seconds, as a command."""

from __future__ import annotations

from pathlib import Path

from sbir_ray.config import FilterConfig
from sbir_ray.joint_config import ScheduleConfig, StreamConfig
from sbir_ray.strict import to_toml
from sbir_ray.train.launch import train
from sbir_ray.train.tasks import joint_jobs
from tests.tiny import joint_config, tiny_pairs
from tests.tiny_store import tiny_store

CONFIG = "joint.toml"


def live_joint(folder: Path, place: Path, steps: int, wait_limit: float) -> list[str]:
    """What follows ``sbir-ray``, but for --out, workers and actors; what it starts from is there.

    Args:
        folder: empty, for data and the runs that come before.
        place: folder for its settings, :data:`CONFIG`.
        wait_limit: of the stream, seconds.
    """
    inputs = {
        "pairs": str(tiny_pairs(folder / "pairs")),
        "photos": str(tiny_store(folder / "photos", 9)),
    }
    config = joint_config(
        schedule=ScheduleConfig(steps=steps, retrieval_steps=2, generator_steps=1),
        filters=FilterConfig(min_points=1),
        stream=StreamConfig(batch_size=4, wait_limit=wait_limit),
    )
    *before, joint = joint_jobs(str(folder / "before"), config, inputs)
    train(before, workers=0)
    (place / CONFIG).write_text(to_toml(config))
    names = ("pairs", "photos", "teacher", "generator")
    return ["train", "joint", *(w for n in names for w in (f"--{n}", joint.inputs[n]))]
