"""Trained networks as files for others: safetensors + JSON, and ONNX of the retrieval network."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from sbir_ray import checkpoint
from sbir_ray.data.atomic import new_folder
from sbir_ray.errors import DamagedError, SbirError, UserError
from sbir_ray.models.retrieval import RetrievalNet
from sbir_ray.places import write_bytes
from sbir_ray.runlog import versions, write_json_atomic
from sbir_ray.runs import (
    JOINT,
    Trained,
    load_discriminator,
    load_generator,
    load_retrieval,
    read_run,
)
from sbir_ray.strict import SCHEMA_VERSION, to_dict

HEADER = "export.json"
ONNX = "retrieval.onnx"
TOLERANCE = 1e-4
"""Largest difference between an embedding by ONNX and by PyTorch."""


def chosen(run: Path, which: str) -> Path:
    """The checkpoint ``best`` (by the validation split), ``newest``, or of a step.

    Raises:
        UserError: there is none such.
    """
    entries = checkpoint.listed(run)
    if which == "best":
        found = checkpoint.best(run)
        if found is None:
            raise UserError(
                f"{run}: no checkpoint was measured on a validation split; export --which newest"
            )
        return found
    if which == "newest" and entries:
        return entries[0].path
    for entry in entries:
        if str(entry.step) == which:
            return entry.path
    steps = ", ".join(str(entry.step) for entry in entries) or "none"
    raise UserError(f"{run}: has no checkpoint {which}; it has best, newest and the steps {steps}")


def export(run: Path, out: Path, which: str, onnx: bool) -> dict[str, Any]:
    """Write the networks of a checkpoint to a new folder; returns what ``export.json`` says.

    Raises:
        UserError: no such checkpoint, ``out`` exists, or the packages for ONNX are missing.
        DamagedError: the checkpoint is not whole.
        SbirError: ONNX computes other embeddings than PyTorch.
    """
    record = read_run(run)
    folder = chosen(run, which)
    networks: dict[str, Trained[Any]] = {}
    if record["kind"] in ("retrieval", JOINT):
        networks["retrieval"] = load_retrieval(run, folder)
    if record["kind"] in ("generator", JOINT):
        networks["generator"] = load_generator(run, folder)
    if record["kind"] == JOINT:
        judge = load_discriminator(run, folder)
        assert judge is not None
        networks["discriminator"] = judge
    if not networks:
        raise UserError(f"{run}: is the run of a {record['kind']}, which is not exported by itself")
    if onnx and "retrieval" not in networks:
        raise UserError(f"{run}: has no retrieval network; leave --onnx out")
    score = next(e.score for e in checkpoint.listed(run) if e.path == folder)
    with new_folder(out) as work:
        header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": "export",
            "run": record["digest"],
            "step": next(iter(networks.values())).version,
            "score": list(score),
            "versions": versions(),
            "networks": {},
        }
        for name, trained in networks.items():
            data = save({k: v.contiguous() for k, v in trained.model.state_dict().items()})
            write_bytes(work / f"{name}.safetensors", data)
            header["networks"][name] = {
                "file": f"{name}.safetensors",
                "sha256": hashlib.sha256(data).hexdigest(),
                "settings": to_dict(trained.model.config),
            }
        if onnx:
            header["onnx"] = write_onnx(networks["retrieval"].model, work / ONNX)
        write_json_atomic(work / HEADER, header)
    return header


class _Pictures(nn.Module):
    """Photos and sketches alike: a sketch is black ink on a white photo."""

    def __init__(self, model: RetrievalNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture_N3SS: Tensor) -> Tensor:
        return self.model.embed_photos(picture_N3SS)


def write_onnx(model: RetrievalNet, file: Path) -> dict[str, Any]:
    """The retrieval network as ONNX: ``picture`` uint8 (n, 3, S, S) to ``embedding`` (n, D).

    A sketch goes in as RGB, 255 minus its ink in all three channels.

    Returns:
        What a caller needs to know, with the largest difference to PyTorch that was found.

    Raises:
        UserError: ``onnx`` or ``onnxruntime`` is not installed, or a layer cannot be written.
        SbirError: the file computes something else.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError("--onnx: needs pip install 'sbir_ray[onnx]'") from error
    side = model.config.image_size
    pictures = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 3, side, side), np.uint8)
    )
    whole = _Pictures(model).eval()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter that needs no further package is the older one, and warns of that.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                whole,
                (pictures[:2],),
                str(file),
                input_names=["picture"],
                output_names=["embedding"],
                dynamic_axes={"picture": {0: "n"}, "embedding": {0: "n"}},
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            line = str(error).splitlines()[0][:200]
            raise UserError(f"--onnx: this network cannot be written as ONNX ({line})") from error
        expected = whole(pictures).numpy()
    onnx.checker.check_model(str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(["embedding"], {"picture": pictures.numpy()})[0]
    difference = float(np.abs(found - expected).max())
    if not difference <= TOLERANCE:
        raise SbirError(f"{file}: its embeddings differ from PyTorch's by {difference:.2g}")
    return {
        "file": file.name,
        "input": {"name": "picture", "shape": ["n", 3, side, side], "type": "uint8"},
        "output": {"name": "embedding", "shape": ["n", model.dim], "type": "float32"},
        "difference": difference,
    }


def verified(run: Path) -> list[dict[str, Any]]:
    """Each checkpoint of a run, newest first, with ``fault``: "" when it is whole.

    Raises:
        UserError: not a run folder, or a newer program wrote a checkpoint.
    """
    identity = read_run(run).get("digest")
    rows = []
    for row in rows_of(run):
        fault = ""
        try:
            checkpoint.verify(run / "checkpoints" / row["name"], identity)
        except DamagedError as error:
            fault = str(error)
        rows.append({**row, "fault": fault})
    return rows


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Each checkpoint of a run by its manifest, newest first.

    Raises:
        UserError: not a run folder.
    """
    read_run(run)
    best = checkpoint.best(run)
    return [
        {
            "name": entry.path.name,
            "step": entry.step,
            "bytes": entry.bytes,
            "score": list(entry.score),
            "best": entry.path == best,
        }
        for entry in checkpoint.listed(run)
    ]
