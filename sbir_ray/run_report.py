"""The report of one training run, with its queries and its pseudo pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbir_ray import report
from sbir_ray.assess import pseudo_ranks
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.evaluate import Evaluation
from sbir_ray.runlog import Ledger
from sbir_ray.runs import read_run
from sbir_ray.stream import pseudo_store
from sbir_ray.stream.pseudo_store import PseudoSet


def run_report(run: Path) -> report.ReportData:
    """All that can be shown of an evaluated run whose inputs are still where they were.

    Raises:
        UserError: not a run, or not evaluated yet.
        DamagedError: a file of the run cannot be read.
    """
    data = report.from_run(run)
    record = read_run(run)
    size = record["config"]["model"]["image_size"]
    files = [run / f"evaluation-{split}.json" for split in ("test", "val", "train")]
    file = next(file for file in files if file.exists())
    found = json.loads(file.read_text())
    if Path(found["pairs"]).exists():
        pairs = PairSet.load(found["pairs"], found["split"], size)
        extra = None
        if found["gallery"] and Path(found["gallery"]).exists():
            others = PhotoSet.load(Path(found["gallery"]), size)
            extra = dict(zip(others.photo_ids, others.photos, strict=True))
        if extra is not None or not found["gallery"]:
            grid = report.query_grid(Evaluation.from_json(found), pairs, extra)
            data = replace(data, queries=grid)
    folder = record["inputs"].get("pseudo")
    if folder and Path(folder).exists():
        data = replace(data, **pseudo_sections(Path(folder), size, record["inputs"].get("teacher")))
    return data


def pseudo_sections(folder: Path, size: int, teacher: str | None) -> dict[str, Any]:
    """The gallery, the account and, by a teacher's run, the deciles of a PSEUDO folder, as fields
    of :class:`sbir_ray.report.ReportData`.

    Args:
        size: side of the photos, pixels; the teacher's own.
    """
    header = pseudo_store.read_header(folder)
    pseudo = PseudoSet.load(folder, size)
    ledger = Ledger.from_json("pseudo", header["ledger"], str(folder / pseudo_store.HEADER))
    fields: dict[str, Any] = {
        "ledgers": [ledger],
        "pseudo": report.PseudoGallery(
            examples=[
                report.PseudoExample(
                    photo=pseudo.photos[pseudo.photo_of[i]].transpose(1, 2, 0),
                    sketch=pseudo.sketches[i],
                    certainty=float(pseudo.certainty[i]),
                )
                for i in report.pick_evenly(pseudo.certainty)
            ],
            total=len(pseudo.sketches),
            sketcher=header["sketcher"],
        ),
    }
    if teacher is not None and Path(teacher).exists():
        ranks = pseudo_ranks(Path(teacher), pseudo)
        fields["deciles"] = report.certainty_deciles(pseudo.certainty, ranks)
    return fields
