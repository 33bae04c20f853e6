"""What a sweep varies: a small TOML file of settings with their ranges."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from sbir_ray.config import RetrievalTraining
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.strict import from_dict, load, to_dict

Value = float | int | str | bool
Knobs = Mapping[str, Value]
"""Settings by their dotted names."""
Trains = Literal["semi", "joint"]
TRAININGS: dict[Trains, type[RetrievalTraining] | type[JointTraining]] = {
    "semi": RetrievalTraining,
    "joint": JointTraining,
}
SCHEDULED = ("optim.lr", "optim.weight_decay", "optim.clip_norm")
"""Settings that may change while a network trains, beside those of ``loss``."""
C = TypeVar("C", bound=RetrievalTraining | JointTraining)
_NOT_VARIED = {
    "seed": "the seed is not a setting to search; the sweep tries other seeds at its end"
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One setting and what it may be: a range of numbers, or some choices."""

    name: str
    """Dotted, as in ``--set``."""
    low: float = 0.0
    high: float = 0.0
    scale: Literal["linear", "log"] = "linear"
    whole: bool = False
    """Whole numbers alone."""
    choices: tuple[Value, ...] = ()
    """Instead of a range."""

    def draw(self, rng: np.random.Generator) -> Value:
        """A value at random, even on the scale."""
        if self.choices:
            return self.choices[int(rng.integers(len(self.choices)))]
        if self.scale == "log":
            value = float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        else:
            value = float(rng.uniform(self.low, self.high))
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def moved(self, value: Value, rng: np.random.Generator) -> Value:
        """A value near ``value``: times or divided by 1.25, or a neighbour of a choice."""
        if self.choices:
            place = self.choices.index(value) + (1 if rng.random() < 0.5 else -1)
            return self.choices[min(max(place, 0), len(self.choices) - 1)]
        number = float(value) * (1.25 if rng.random() < 0.5 else 0.8)
        number = min(max(number, self.low), self.high)
        return round(number) if self.whole else number

    def holds(self, value: Value) -> bool:
        """Whether ``value`` is one of its choices or lies in its range."""
        if self.choices:
            return value in self.choices
        return not isinstance(value, str) and self.low <= value <= self.high

    def place(self, value: Value) -> float:
        """Where a value lies between the ends of the scale, in [0, 1]; outside it, the nearer."""
        if self.choices:
            at = self.choices.index(value) if value in self.choices else 0
            return at / max(1, len(self.choices) - 1)
        low, high, number = self.low, self.high, float(value)
        if self.scale == "log":
            low, high, number = np.log(low), np.log(high), np.log(max(number, low))
        return float(min(max((number - low) / (high - low), 0.0), 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The knobs of a sweep and what they are settings of."""

    name: str
    trains: Trains
    """What a trial is: ``train semi`` on cached pseudo pairs, or ``train joint``."""
    knobs: tuple[Knob, ...]

    @property
    def training(self) -> type[RetrievalTraining] | type[JointTraining]:
        """The class of the settings."""
        return TRAININGS[self.trains]

    def to_json(self) -> dict[str, Any]:
        """Plain values: what the numbers of a trial depend on."""
        return {
            "trains": self.trains,
            "knobs": {
                knob.name: {"choices": list(knob.choices)}
                if knob.choices
                else {"range": [knob.low, knob.high], "scale": knob.scale, "whole": knob.whole}
                for knob in self.knobs
            },
        }

    def ensure_scheduled(self) -> None:
        """Refuse knobs that cannot change while a network trains.

        Raises:
            UserError: the knob, and which can.
        """
        for knob in self.knobs:
            if self.trains != "semi" or not (
                knob.name in SCHEDULED
                or (knob.name.startswith("loss.") and not knob.choices)
                or knob.name == "pseudo_share"
            ):
                raise UserError(
                    f"{self.name}: {knob.name} cannot change while a network trains; a schedule "
                    f"is over {', '.join(SCHEDULED)}, pseudo_share and the numbers of loss, of "
                    "semi-supervised training"
                )


def read_space(file: Path) -> Space:
    """The space in a TOML file.

    ``trains`` says what a trial is (``semi`` or ``joint``); each table ``[knob."loss.margin"]`` has
    ``range = [low, high]`` with ``scale = "linear"`` or ``"log"``, or ``choices = [...]``.

    Raises:
        UserError: not such a file; an unknown setting (the nearest known one is named); a value
            that the setting cannot have.
    """
    try:
        values = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{file}: cannot read the space ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not a TOML file ({error})") from error
    odd = sorted(set(values) - {"trains", "knob"})
    if odd:
        raise UserError(f"{file}: unknown {odd[0]}; a space has trains and tables [knob.NAME]")
    trains = values.get("trains")
    if trains not in TRAININGS:
        raise UserError(f"{file}: trains is {trains!r}; set it to one of {', '.join(TRAININGS)}")
    tables = values.get("knob")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f'{file}: no knobs; add tables like [knob."loss.temperature"]')
    knobs = [_knob(name, table, trains, file) for name, table in _tables(tables)]
    return Space(name=file.stem, trains=trains, knobs=tuple(knobs))


def _tables(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """The knobs, whether their names were quoted or written as nested tables."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = (
            isinstance(value, dict)
            and value
            and all(isinstance(one, dict) for one in value.values())
        )
        name = f"{path}{key}"
        found += _tables(value, f"{name}.") if nested else [(name, value)]
    return found


def _knob(name: str, table: Any, trains: Trains, file: Path) -> Knob:
    where = f"{file}: {name}"
    if name in _NOT_VARIED:
        raise UserError(f"{where}: {_NOT_VARIED[name]}")
    if not isinstance(table, dict):
        raise UserError(f"{where}: is not a table with a range or choices")
    odd = sorted(set(table) - {"range", "scale", "choices"})
    if odd:
        raise UserError(f"{where}: unknown {odd[0]}; a knob has range and scale, or choices")
    if ("range" in table) == ("choices" in table):
        raise UserError(f"{where}: give it a range = [low, high], or choices = [...]")
    cls = TRAININGS[trains]
    if "choices" in table:
        choices = table["choices"]
        if not isinstance(choices, list) or len(choices) < 2 or "scale" in table:
            raise UserError(f"{where}: choices is a list of two or more, without a scale")
        # As the setting has them: 1 is 1.0 for a number.
        values = [_value(cls, name, choice, where) for choice in choices]
        if len(set(values)) < len(values):
            raise UserError(f"{where}: a choice comes twice")
        return Knob(name=name, choices=tuple(values))
    ends, scale = table["range"], table.get("scale", "linear")
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)):
        raise UserError(f"{where}: range is [low, high], two numbers")
    low, high = (_value(cls, name, end, where) for end in ends)
    if isinstance(low, (str, bool)) or isinstance(high, (str, bool)):
        raise UserError(f"{where}: is not a number; give it choices")
    if not low < high:
        raise UserError(f"{where}: range {ends} is empty")
    if scale not in ("linear", "log"):
        raise UserError(f"{where}: scale is linear or log, not {scale!r}")
    if scale == "log" and low <= 0:
        raise UserError(f"{where}: a log scale begins above 0")
    return Knob(name=name, low=low, high=high, scale=scale, whole=isinstance(low, int))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(
    cls: type[RetrievalTraining] | type[JointTraining], name: str, value: Value, where: str
) -> Value:
    """``value`` as the setting holds it, if it can."""
    try:
        return value_of(load(cls, None, [f"{name}={json.dumps(value)}"]), name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def value_of(config: RetrievalTraining | JointTraining, name: str) -> Value:
    """The setting with a dotted name.

    Raises:
        UserError: it is a table of settings.
    """
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, (str, bool, int, float)):
        raise UserError(f"{name} is a table of settings; name one of them")
    return found


def with_knobs(config: C, knobs: Knobs) -> C:
    """The configuration with some settings changed.

    Raises:
        UserError: settings that contradict each other.
    """
    values = to_dict(config)
    for name, value in knobs.items():
        table = values
        *path, last = name.split(".")
        for part in path:
            table = table[part]
        table[last] = value
    return from_dict(type(config), values)


def shown(value: Value) -> str:
    """For people: three digits of a number."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def defaults(config: RetrievalTraining | JointTraining, knobs: Sequence[Knob]) -> dict[str, Value]:
    """What the knobs are before any is turned."""
    return {knob.name: value_of(config, knob.name) for knob in knobs}
