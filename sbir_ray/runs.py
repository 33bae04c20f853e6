"""Run folders as others use them: their record, and their trained networks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from sbir_ray import checkpoint
from sbir_ray.config import (
    DiscriminatorConfig,
    GeneratorTraining,
    RetrievalTraining,
    check_schema,
    from_dict,
)
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.generator import Generator
from sbir_ray.models.retrieval import RetrievalNet

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
DISCRIMINATOR = "discriminator"
"""Folder, inside a generator's run, of the run that trained the discriminator on its drawings."""


@dataclass(frozen=True)
class Trained(Generic[M]):
    """A network as a run left it, in evaluation mode."""

    model: M
    version: int
    """Step of its checkpoint."""
    digest: str
    """First 12 hex digits of the sha256 of its weights file."""
    record: dict[str, Any]
    """The run's ``run.json``."""


def read_run(run: Path) -> dict[str, Any]:
    """``run.json`` of a run folder.

    Raises:
        UserError: there is none, or a newer program wrote it.
    """
    file = run / "run.json"
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{run}: not a run folder (no run.json); train one first") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    check_schema(record.get("schema_version"), str(file))
    return record


def load_retrieval(run: Path) -> Trained[RetrievalNet]:
    """The retrieval network of a run.

    Raises:
        UserError: ``run`` is not the run of a retrieval network, or has no checkpoint.
        DamagedError: none of its checkpoints is whole.
    """
    record = _record(run, "retrieval")
    config = _config(RetrievalTraining, record, run).model
    # The run's own weights follow: the pre-trained ones are not needed, nor their package.
    return _restored(run, RetrievalNet(dataclasses.replace(config, weights="none")), record)


def load_generator(run: Path) -> Trained[Generator]:
    """The generator of a run; raises as :func:`load_retrieval`."""
    record = _record(run, "generator")
    config = _config(GeneratorTraining, record, run).model
    return _restored(run, Generator(dataclasses.replace(config, weights="none")), record)


def load_discriminator(generator_run: Path) -> Trained[PairDiscriminator] | None:
    """The discriminator trained on a generator's drawings, or None; raises as the others."""
    run = generator_run / DISCRIMINATOR
    if not run.exists():
        return None
    record = _record(run, "discriminator")
    config: DiscriminatorConfig = _config(GeneratorTraining, record, run).discriminator
    return _restored(run, PairDiscriminator(config), record)


def _record(run: Path, kind: str) -> dict[str, Any]:
    record = read_run(run)
    if record["kind"] != kind:
        raise UserError(f"{run}: is the run of a {record['kind']}; a {kind}'s run is needed here")
    return record


def _config(cls: type[T], record: dict[str, Any], run: Path) -> T:
    return from_dict(cls, record["config"], str(run / "run.json"))


def _restored(run: Path, model: M, record: dict[str, Any]) -> Trained[M]:
    found = checkpoint.load(run, with_optim=False)
    if found is None:
        raise UserError(f"{run}: has no checkpoint yet; let its training go on by the same command")
    _fill(model, found.model, found.path)
    sha = checkpoint.verify(found.path)["files"]["model.safetensors"]["sha256"]
    model.eval()
    return Trained(model, found.step, str(sha)[:12], record)


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DamagedError(f"{path}: does not fit the network of its run ({error})") from error
