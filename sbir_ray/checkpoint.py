"""Checkpoints: safetensors + JSON, hashed, complete or absent.

A checkpoint is a folder ``checkpoints/step-00000240``; its ``manifest.json``, written last, holds
the size and the sha256 of every other file, and which run it belongs to. On a disk it is written
under a temporary name, synced and renamed; in an object store, which cannot rename, it is written
in place. A folder without a good manifest is not a checkpoint: the previous one is used, and that
is said.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sbir_ray.errors import DamagedError, SbirError
from sbir_ray.places import is_local, remove_tree, sync, write_bytes
from sbir_ray.strict import SCHEMA_VERSION, check_schema

MANIFEST = "manifest.json"
MODEL, OPTIM, STATE = "model.safetensors", "optim.safetensors", "state.json"
MAX_JSON = 16 << 20
"""Largest manifest or state, bytes."""


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` found: the tensors by file, and the state."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]
    digest: str
    """First 12 hex digits of the sha256 of the model's file."""


@dataclass(frozen=True)
class Listed:
    """A checkpoint folder as :func:`listed` found it."""

    path: Path
    step: int
    score: tuple[float, ...]
    """Of the validation split when it was saved, the larger the better; () when not measured."""
    bytes: int


# --------------------------------------------------------------------------- writing


def save(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optim: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    *,
    identity: str = "",
    score: Sequence[float] = (),
) -> Path:
    """Write the checkpoint of ``step``; keep the ``keep`` newest and the one of the best score.

    Checkpoints of later steps are of a course that was given up, and go too.

    Args:
        run: the run folder; ``model`` and ``optim``: tensors by name; ``state``: plain values.
        identity: the digest of the run, see :func:`load`.
        score: of the validation split at this step, compared from the first number on.

    Returns:
        The checkpoint's folder. It exists under that name only when it is complete.

    Raises:
        SbirError: it cannot be written; the checkpoints before it are as they were.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    local = is_local(run)
    work = folder / f".step-{step:08d}.{os.getpid()}" if local else final
    entries: dict[str, Any] = {}
    try:
        remove_tree(work)
        for name in (MODEL, OPTIM, STATE):
            if name == STATE:
                data = json.dumps({**state, "step": step}, indent=1).encode()
            else:
                data = safetensors.torch.save(_plain(model if name == MODEL else optim))
            # The hash of what was meant to be written, whatever the disk made of it.
            entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            write_bytes(work / name, data)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "checkpoint",
            "run": identity,
            "step": step,
            "score": list(score),
            "files": entries,
        }
        write_bytes(work / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
        if local:
            _remove(final)
            work.rename(final)
            sync(folder)
    except OSError as error:
        remove_tree(work)
        raise SbirError(
            f"{final}: cannot be written ({error.strerror}); the checkpoints before it are whole: "
            "make room there, and the same command goes on from the newest"
        ) from error
    _prune(folder, step, keep)
    return final


def optim_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the optimiser's state as tensors named ``<parameter number>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).clone()
        for number, values in state.items()
        for name, value in values.items()
    }


def restore_optim(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of :func:`optim_tensors`, on an optimiser over the same parameters.

    Raises:
        ValueError: the tensors are not those of such parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if int(number) >= len(parameters) or (
            value.ndim and value.shape != parameters[int(number)].shape
        ):
            raise ValueError(f"{key} has no parameter of its shape")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}


def _prune(folder: Path, step: int, keep: int) -> None:
    """Drop what need not be kept once ``step`` is saved, and what killed processes left."""
    for left in folder.glob(".*-*"):
        remove_tree(left)
    found = _folders(folder)
    valid = [path for path in found if _step(path) <= step]
    best = _best([entry for path in valid if (entry := _listed(path)) is not None])
    kept = {*valid[:keep], *([] if best is None else [best.path])}
    for path in found:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint: under its own name it is whole or gone, never half gone."""
    if not is_local(path):
        (path / MANIFEST).unlink(missing_ok=True)
        remove_tree(path)
    elif path.exists():
        doomed = path.with_name(f".old-{path.name}.{os.getpid()}")
        path.rename(doomed)
        remove_tree(doomed)


# --------------------------------------------------------------------------- reading


def load(
    run: Path,
    say: Callable[[str], None] = lambda _: None,
    with_optim: bool = True,
    identity: str | None = None,
) -> Checkpoint | None:
    """The newest complete checkpoint of ``run``, or None when there is none at all.

    A damaged one is refused by reason through ``say``, and the one before it is tried.

    Args:
        identity: the digest of the run; a checkpoint of another run is refused as a damaged one is.

    Raises:
        DamagedError: there are checkpoints and none of them is whole.
        UserError: a checkpoint was written by a newer program.
    """
    reasons = []
    for folder in _folders(run / "checkpoints"):
        try:
            return read(folder, with_optim, identity)
        except DamagedError as error:
            reasons.append(str(error))
            say(f"{error}; using the checkpoint before it")
    if reasons:
        raise DamagedError(f"{run}: no whole checkpoint is left ({'; '.join(reasons)})")
    return None


def read(folder: Path, with_optim: bool = True, identity: str | None = None) -> Checkpoint:
    """One checkpoint, checked.

    Raises:
        DamagedError: it is not whole, or not of that run.
        UserError: it was written by a newer program.
    """
    manifest, parts = None, {}
    for name, data in _checked(folder, identity):
        if name == MANIFEST:
            manifest = json.loads(data)
        elif name != OPTIM or with_optim:
            parts[name] = _parsed(folder / name, data)
    assert manifest is not None
    return Checkpoint(
        path=folder,
        step=int(manifest["step"]),
        model=parts[MODEL],
        optim=parts.get(OPTIM, {}),
        state=parts[STATE],
        digest=str(manifest["files"][MODEL]["sha256"])[:12],
    )


def verify(folder: Path, identity: str | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file was compared with it.

    Raises:
        DamagedError: a file is missing, changed or not named in the manifest, or the checkpoint is
            of another run.
        UserError: it was written by a newer program.
    """
    manifest: dict[str, Any] = {}
    for name, data in _checked(folder, identity):
        if name == MANIFEST:
            manifest = json.loads(data)
        else:
            _parsed(folder / name, data)
    return manifest


def listed(run: Path) -> list[Listed]:
    """The checkpoints of ``run``, newest first, by their manifests alone: see :func:`verify`.

    A folder without a readable manifest has no score and 0 bytes.
    """
    found = []
    for path in _folders(run / "checkpoints"):
        found.append(_listed(path) or Listed(path, _step(path), (), 0))
    return found


def best(run: Path) -> Path | None:
    """The checkpoint of the best score, the earliest of equals; None when none was measured."""
    found = _best(listed(run))
    return None if found is None else found.path


def _best(entries: Sequence[Listed]) -> Listed | None:
    scored = [entry for entry in entries if entry.score]
    return max(scored, key=lambda e: (e.score, -e.step), default=None)


def _checked(folder: Path, identity: str | None) -> Iterator[tuple[str, bytes]]:
    """The files of a checkpoint, the manifest first, each as it was written."""
    text = _limited(folder / MANIFEST, MAX_JSON)
    try:
        manifest = json.loads(text)
        files = {str(name): (e["sha256"], int(e["bytes"])) for name, e in manifest["files"].items()}
        step, owner = int(manifest["step"]), manifest.get("run", identity)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{folder}: no readable manifest ({type(error).__name__})") from error
    check_schema(manifest.get("schema_version"), str(folder / MANIFEST))
    if identity is not None and owner != identity:
        raise DamagedError(f"{folder}: is of another run (digest {owner}, this one's {identity})")
    if step != _step(folder):
        raise DamagedError(f"{folder}: its manifest is that of step {step}")
    found = {f.name for f in folder.iterdir()} - {MANIFEST}
    if not found == set(files) == {MODEL, OPTIM, STATE}:
        odd = sorted((found ^ set(files)) | (set(files) ^ {MODEL, OPTIM, STATE}))
        raise DamagedError(f"{folder}: files do not agree with the manifest ({', '.join(odd)})")
    yield MANIFEST, text
    for name, (sha256, size) in files.items():
        data = _limited(folder / name, size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(f"{folder / name}: its sha256 is not the manifest's")
        yield name, data


def _parsed(file: Path, data: bytes) -> Any:
    try:
        if file.name == STATE:
            if len(data) > MAX_JSON:
                raise ValueError(f"{len(data)} bytes are more than {MAX_JSON}")
            return json.loads(data)
        return safetensors.torch.load(data)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"{file}: cannot be read ({error})") from error


def _limited(file: Path, most: int) -> bytes:
    """A file of at most ``most`` bytes; more are not read."""
    try:
        with file.open("rb") as stream:
            data = stream.read(most + 1)
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > most:
        raise DamagedError(f"{file}: is larger than the {most} bytes that it may have")
    return data


def _listed(path: Path) -> Listed | None:
    try:
        manifest = json.loads(_limited(path / MANIFEST, MAX_JSON))
        score = tuple(float(value) for value in manifest["score"])
        size = sum(int(entry["bytes"]) for entry in manifest["files"].values())
        return Listed(path, int(manifest["step"]), score, size)
    except (DamagedError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), reverse=True) if folder.exists() else []


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
