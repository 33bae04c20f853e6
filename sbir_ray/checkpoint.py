"""Checkpoints: safetensors + JSON, hashed, complete or absent.

A checkpoint is a folder ``checkpoints/step-00000240`` that is written under a temporary name,
synced and renamed; its ``manifest.json``, written last, holds the sha256 of every other file. A
folder without a good manifest is not a checkpoint: the previous one is used, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbir_ray.errors import DamagedError
from sbir_ray.runlog import write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION, check_schema

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load` found: the tensors by file, and the state."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optim: dict[str, Tensor]
    state: dict[str, Any]


def save(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optim: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the ``keep`` newest.

    Args:
        run: the run folder; ``model`` and ``optim``: tensors by name; ``state``: plain values.

    Returns:
        The checkpoint's folder. It exists under that name only when it is complete.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, tensors in (("model", model), ("optim", optim)):
        plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        save_file(plain, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
    files = sorted(temporary.iterdir())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": "checkpoint",
        "step": step,
        "files": {f.name: {"sha256": _sha256(f), "bytes": f.stat().st_size} for f in files},
    }
    for file in files:
        _sync(file)
    write_json_atomic(temporary / MANIFEST, manifest)
    _sync(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    for old in _folders(run)[keep:]:
        shutil.rmtree(old)
    return final


def load(
    run: Path, say: Callable[[str], None] = lambda _: None, with_optim: bool = True
) -> Checkpoint | None:
    """The newest complete checkpoint of ``run``, or None when there is none at all.

    A damaged one is refused by reason through ``say``, and the one before it is tried.

    Raises:
        DamagedError: there are checkpoints and none of them is whole.
        UserError: a checkpoint was written by a newer program.
    """
    reasons = []
    for folder in _folders(run):
        try:
            checkpoint = _read(folder, with_optim)
        except DamagedError as error:
            reasons.append(str(error))
            say(f"{error}; using the checkpoint before it")
            continue
        return checkpoint
    if reasons:
        raise DamagedError(f"{run}: no whole checkpoint is left ({'; '.join(reasons)})")
    return None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file was compared with it.

    Raises:
        DamagedError: a file is missing, changed or not named in the manifest.
        UserError: it was written by a newer program.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{folder}: no readable manifest ({type(error).__name__})") from error
    check_schema(manifest.get("schema_version"), str(folder / MANIFEST))
    found = {f.name for f in folder.iterdir()} - {MANIFEST}
    if found != set(files):
        odd = sorted(found ^ set(files))
        raise DamagedError(f"{folder}: files do not agree with the manifest ({', '.join(odd)})")
    for name, entry in files.items():
        if _sha256(folder / name) != entry["sha256"]:
            raise DamagedError(f"{folder / name}: its sha256 is not the manifest's")
    return manifest


def optim_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A copy of the optimiser's state as tensors named ``<parameter number>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).clone()
        for number, values in state.items()
        for name, value in values.items()
    }


def restore_optim(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The reverse of :func:`optim_tensors`, on an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _read(folder: Path, with_optim: bool) -> Checkpoint:
    manifest = verify(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        model = load_file(folder / "model.safetensors")
        optim = load_file(folder / "optim.safetensors") if with_optim else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedError(f"{folder}: cannot be read ({error})") from error
    return Checkpoint(folder, int(manifest["step"]), model, optim, state)


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
