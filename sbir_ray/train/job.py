"""What is trained, where to and from what; and what the loop needs to know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from sbir_ray.config import AdamConfig, GeneratorTraining, RetrievalTraining
from sbir_ray.data.pairs import PairSet, read_header
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.train.position import check_position
from sbir_ray.train.ranks import Ranks

T = TypeVar("T")
Config = RetrievalTraining | GeneratorTraining | JointTraining
PSEUDO = "pseudo"
"""The input's name of the first PSEUDO folder."""


def pseudo_inputs(folders: Sequence[T]) -> dict[str, T]:
    """PSEUDO folders as inputs of a job: ``pseudo``, ``pseudo-2``, ``pseudo-3``."""
    return {PSEUDO if i == 1 else f"{PSEUDO}-{i}": one for i, one in enumerate(folders, 1)}


def pseudo_folders(inputs: Mapping[str, T]) -> list[T]:
    """The PSEUDO folders among a job's inputs, in order."""
    found = [name for name in inputs if name.partition("-")[0] == PSEUDO]
    return [inputs[name] for name in sorted(found, key=lambda name: (len(name), name))]


@dataclass(frozen=True)
class Job:
    """One run to train: what, where to, from what. Plain values, so that it travels."""

    kind: str
    out: str
    config: Config
    inputs: Mapping[str, str]
    """Folders by name: ``pairs``; for the retrieval network also ``pseudo`` (see
    :func:`pseudo_inputs`), ``teacher``, ``negatives``, each of which may be absent; for the
    discriminator ``generator`` (a run); for joint training ``photos``, ``teacher`` and
    ``generator``; and ``begin``: a run like this one, with other settings, whose newest step is
    gone on from."""


@dataclass(frozen=True)
class Player:
    """A network that is trained by its own optimiser."""

    module: nn.Module
    adam: AdamConfig

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [p for p in self.module.parameters() if p.requires_grad]


class Board(Protocol):
    """What pictures and numbers go to: tensorboardX's ``SummaryWriter``."""

    def add_image(self, tag: str, img_tensor: Any, global_step: int) -> None: ...

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Task(Protocol):
    """What :func:`sbir_ray.train.loop.fit` needs to know of what it trains."""

    steps: int
    trained: nn.Module
    """All that a checkpoint holds."""
    players: Mapping[str, Player]

    def turn(self, step: int) -> Mapping[str, Player]:
        """The networks that ``step`` updates."""
        ...

    def ahead(self, step: int) -> bool:
        """Whether the rows of ``step`` can be made before the step before it is done."""
        ...

    def resumable(self, step: int) -> bool:
        """Whether a run can go on from a checkpoint after ``step`` steps as if never stopped."""
        ...

    def batch(self, step: int) -> Any:
        """This rank's rows of ``step``."""
        ...

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]:
        """The terms of the whole batch, ``loss`` their sum; gradients reach this rank's rows."""
        ...

    def done(self, step: int, board: Board | None, updated: bool) -> dict[str, float]:
        """Called after ``step``; numbers to log. ``board``: on rank 0 alone; ``updated``: False
        where the step was skipped, so that no weight has changed."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Numbers of the validation split, by rank 0 alone."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside weights, as plain values. All ranks call it."""
        ...

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Take up after ``step`` steps: the weights are in place; ``state`` is {} for step 0.

        Raises:
            UserError: the data are no longer those of ``state``.
        """
        ...

    def finish(self) -> None:
        """Called after the last evaluation, by all ranks."""
        ...


class OnePlayer(ABC):
    """A task with one network, whose rows depend on nothing that training changes."""

    players: Mapping[str, Player]

    def turn(self, step: int) -> Mapping[str, Player]:
        """Always the one."""
        return self.players

    def ahead(self, step: int) -> bool:
        """Always."""
        return True

    def resumable(self, step: int) -> bool:
        """Always."""
        return True

    def done(self, step: int, board: Board | None, updated: bool) -> dict[str, float]:
        """Nothing more to do."""
        return {}

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """What the rows are rows of, see :func:`position.check_position`."""

    def state(self) -> dict[str, Any]:
        """The rows are a function of the step and of this."""
        return {"data": self.data()}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """See :class:`Task`."""
        if step:
            check_position(state.get("data", {}), self.data(), f"step {step}")

    def finish(self) -> None:
        """Nothing more to do."""
        return


def held_out(folder: Path, size: int) -> PairSet | None:
    """The validation split, when there is one with sketches."""
    if not read_header(folder)["splits"]["val"]["sketches"]:
        return None
    return PairSet.load(folder, "val", size)


def divisible(name: str, count: int, ranks: Ranks) -> None:
    """Refuse rows that cannot be shared evenly.

    Raises:
        UserError: with the name of the setting.
    """
    if count < 1 or count % ranks.world:
        raise UserError(
            f"{name}: {count} rows cannot be divided among {ranks.world} workers; "
            f"choose a multiple of {ranks.world}"
        )
