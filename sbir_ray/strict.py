"""Strict settings: TOML, ``--set key=value``, JSON and digests of frozen dataclasses.

An unknown key is refused with the nearest name; a value of the wrong type is refused with the type
it has to have.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sbir_ray.errors import DamagedError, UserError
from sbir_ray.places import place

SCHEMA_VERSION = 1
"""Of every file that the program writes."""
C = TypeVar("C")


def load(
    cls: type[C], file: str | Path | None = None, sets: Sequence[str] = (), base: C | None = None
) -> C:
    """The configuration of type ``cls`` from defaults, a TOML file and ``key=value`` settings.

    Later ones win; ``base`` takes the place of the defaults. Keys of nested settings are dotted:
    ``optim.lr=1e-4``.

    Raises:
        UserError: an unknown key (the nearest known one is named), a value of the wrong type or
            out of range, an unreadable file.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            text = place(file).read_bytes().decode()
            values = tomllib.loads(text)
        except OSError as error:
            raise UserError(f"{file}: cannot read the configuration ({error.strerror})") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(f"{file}: not a TOML file ({error})") from error
    for setting in sets:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: write it as key=value, for example optim.lr=1e-4")
        _place(values, key.strip(), _parse(text.strip()), setting)
    if base is not None:
        values = _merge(to_dict(base), values)
    return from_dict(cls, values, where=str(file) if file is not None else "")


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """``cls`` built from nested plain values, strictly (see :func:`load`)."""
    return typing.cast(C, _build(cls, values, "", where))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a configuration, as they are stored."""
    return dataclasses.asdict(config)


def digest(config: Any) -> str:
    """First 12 hex digits of the sha256 of the configuration's canonical JSON."""
    values = config if isinstance(config, Mapping) else to_dict(config)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_toml(config: Any) -> str:
    """The configuration as a TOML file that :func:`load` reads, each setting with its meaning."""
    lines: list[str] = []
    _toml(config, "", lines)
    return "\n".join(lines).strip() + "\n"


def _toml(config: Any, path: str, lines: list[str]) -> None:
    notes = _field_docs(type(config))
    nested = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            nested.append((f"{path}{f.name}", value))
            continue
        lines += [f"# {line}" for line in notes.get(f.name, [])]
        lines.append(f"{f.name} = {json.dumps(value)}")
    for name, value in nested:
        lines += ["", *(f"# {line}" for line in _doc_lines(type(value).__doc__)), f"[{name}]"]
        _toml(value, f"{name}.", lines)


def _field_docs(cls: type[Any]) -> dict[str, list[str]]:
    """The string below each field of a settings class, or of one that it extends."""
    found: dict[str, list[str]] = {}
    for base in cls.__mro__[::-1]:
        if dataclasses.is_dataclass(base):
            found |= _own_field_docs(base)
    return found


def _own_field_docs(cls: type[Any]) -> dict[str, list[str]]:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for first, second in itertools.pairwise(body.body):
        if (
            isinstance(first, ast.AnnAssign)
            and isinstance(first.target, ast.Name)
            and isinstance(second, ast.Expr)
            and isinstance(second.value, ast.Constant)
        ):
            found[first.target.id] = _doc_lines(str(second.value.value))
    return found


def _doc_lines(text: str | None) -> list[str]:
    return [line for line in inspect.cleandoc(text or "").replace("``", "").splitlines() if line]


def check_schema(found: object, where: str) -> None:
    """Refuse what a newer program wrote.

    Raises:
        UserError: ``found`` is not a known schema version; ``where`` names the file.
    """
    if not isinstance(found, int) or isinstance(found, bool):
        raise UserError(f"{where}: has no schema_version; was it written by this program?")
    if found > SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema_version {found} is newer than this program's {SCHEMA_VERSION}; "
            "upgrade sbir_ray to read it"
        )


def read_kind(file: Path, kind: str, advice: str, again: str) -> dict[str, Any]:
    """The header of a folder: JSON that names the ``kind`` of what lies beside it.

    Args:
        advice: what the folder is not, and how to make one.
        again: what to do where the file is damaged.

    Raises:
        UserError: not such a folder, or one of a newer version.
        DamagedError: not JSON.
    """
    try:
        header = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file.parent}: {advice}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: not a JSON file; {again}") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise UserError(f"{file.parent}: {advice}")
    check_schema(header.get("schema_version"), str(file))
    return header


def _build(cls: type[Any], values: Mapping[str, Any], path: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    built: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{path}{key}"
        if key not in names:
            raise UserError(_prefix(where) + _unknown(cls, dotted, key, names))
        hint = hints[key]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise UserError(f"{_prefix(where)}{dotted}: is a table, not {value!r}")
            default = _default_of(cls, key)
            merged = _merge(to_dict(default), value)
            built[key] = _build(hint, merged, f"{dotted}.", where)
        else:
            built[key] = _typed(hint, value, dotted, where)
    try:
        return cls(**built)
    except ValueError as error:
        raise UserError(f"{_prefix(where)}{path}{error}") from error


def _default_of(cls: type[Any], name: str) -> Any:
    for f in dataclasses.fields(cls):
        if f.name == name:
            if f.default_factory is not dataclasses.MISSING:
                return f.default_factory()
            return f.default
    raise AssertionError(name)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _unknown(cls: type[Any], dotted: str, key: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if near:
        prefix = dotted[: len(dotted) - len(key)]
        return f"unknown setting {dotted}; did you mean {prefix}{near[0]}?"
    return f"unknown setting {dotted}; known here: {', '.join(names)}"


def _typed(hint: Any, value: Any, dotted: str, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise UserError(f"{_prefix(where)}{dotted}: {value!r} is not one of {', '.join(choices)}")
    if origin is tuple and isinstance(value, (list, tuple)):
        item = typing.get_args(hint)[0]
        return tuple(_typed(item, one, f"{dotted}[{i}]", where) for i, one in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            if option is type(None) and value is None:
                return None
            if option is not type(None):
                return _typed(option, value, dotted, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and not isinstance(value, str) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        if hint is float and (value != value or value in (float("inf"), float("-inf"))):
            raise UserError(f"{_prefix(where)}{dotted}: {value} is not a finite number")
        return value
    raise UserError(f"{_prefix(where)}{dotted}: {value!r} is not of type {hint.__name__}")


def _place(values: dict[str, Any], key: str, value: Any, setting: str) -> None:
    parts = key.split(".")
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"--set {setting}: {part} is not a table of settings")
        values = inner
    values[parts[-1]] = value


def _parse(text: str) -> Any:
    """A TOML value, or else the text itself (so that ``backbone=vgg16`` needs no quotes)."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""
