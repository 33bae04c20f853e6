"""Run folders as others use them: their record, and their trained networks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from sbir_ray import checkpoint
from sbir_ray.config import GeneratorTraining, RetrievalConfig, RetrievalTraining
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.models.discriminator import PairDiscriminator
from sbir_ray.models.generator import Generator
from sbir_ray.models.generators import make_generator
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.strict import check_schema, from_dict

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
JOINT = "joint"
"""Kind of the runs whose checkpoints hold all three networks, each under its name."""
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


def load_retrieval(run: Path, folder: Path | None = None) -> Trained[RetrievalNet]:
    """The retrieval network of a run, its own or that of joint training.

    Args:
        folder: one of its checkpoints; None: the newest.

    Raises:
        UserError: ``run`` is not such a run, or has no checkpoint.
        DamagedError: none of its checkpoints is whole.
    """
    record = _record(run, "retrieval")
    config = retrieval_config(record, run)
    # The run's own weights follow: the pre-trained ones are not needed, nor their package.
    model = RetrievalNet(dataclasses.replace(config, weights="none"))
    return _restored(run, model, record, "retrieval", folder)


def load_generator(run: Path, folder: Path | None = None) -> Trained[Generator]:
    """The generator of a run; raises as :func:`load_retrieval`."""
    record = _record(run, "generator")
    config = generator_training(record, run).model
    model = make_generator(dataclasses.replace(config, weights="none"))
    return _restored(run, model, record, "generator", folder)


def load_discriminator(run: Path, folder: Path | None = None) -> Trained[PairDiscriminator] | None:
    """The discriminator trained on a generator's drawings, or None; raises as the others.

    Args:
        run: the generator's.
    """
    record = read_run(run)
    if record["kind"] != JOINT:
        run = run / DISCRIMINATOR
        if not run.exists():
            return None
        record = _record(run, "discriminator")
    config = generator_training(record, run).discriminator
    return _restored(run, PairDiscriminator(config), record, "discriminator", folder)


def weights_digest(run: Path) -> str:
    """First 12 hex digits of the sha256 of a run's newest weights, a generator's with those of the
    discriminator that goes with it; raises as :func:`load_retrieval`."""
    weights = hashlib.sha256()
    for part in (run, run / DISCRIMINATOR):
        if part == run or part.exists():
            found = checkpoint.load(part, with_optim=False, identity=read_run(part).get("digest"))
            weights.update(_there(found, part).digest.encode())
    return weights.hexdigest()[:12]


def retrieval_config(record: dict[str, Any], run: Path) -> RetrievalConfig:
    """The retrieval network's settings in ``run.json``."""
    if record["kind"] == JOINT:
        return _config(JointTraining, record, run).retrieval.model
    return _config(RetrievalTraining, record, run).model


def generator_training(record: dict[str, Any], run: Path) -> GeneratorTraining:
    """The settings of the generator and the discriminator in ``run.json``."""
    if record["kind"] == JOINT:
        return _config(JointTraining, record, run).generator
    return _config(GeneratorTraining, record, run)


def _record(run: Path, kind: str) -> dict[str, Any]:
    record = read_run(run)
    if record["kind"] not in (kind, JOINT):
        raise UserError(f"{run}: is the run of a {record['kind']}; a {kind}'s run is needed here")
    return record


def _config(cls: type[T], record: dict[str, Any], run: Path) -> T:
    return from_dict(cls, record["config"], str(run / "run.json"))


def _restored(
    run: Path, model: M, record: dict[str, Any], name: str, folder: Path | None
) -> Trained[M]:
    identity = record.get("digest")
    if folder is None:
        found = checkpoint.load(run, with_optim=False, identity=identity)
    else:
        found = checkpoint.read(folder, with_optim=False, identity=identity)
    found = _there(found, run)
    start = f"{name}." if record["kind"] == JOINT else ""
    weights = {k.removeprefix(start): v for k, v in found.model.items() if k.startswith(start)}
    _fill(model, weights, found.path)
    model.eval()
    return Trained(model, found.step, found.digest, record)


def _there(found: checkpoint.Checkpoint | None, run: Path) -> checkpoint.Checkpoint:
    if found is None:
        raise UserError(f"{run}: has no checkpoint yet; let its training go on by the same command")
    return found


def _fill(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DamagedError(f"{path}: does not fit the network of its run ({error})") from error
