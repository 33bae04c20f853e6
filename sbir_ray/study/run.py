"""One study from its request to its table."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sbir_ray.data.pairs import Split, content_digest, iter_sketches, read_header
from sbir_ray.data.photos import read_store
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.places import remove_tree
from sbir_ray.runlog import Progress, versions, write_json_atomic
from sbir_ray.strict import SCHEMA_VERSION, to_dict, to_toml
from sbir_ray.study import studies
from sbir_ray.study.claim import claimed
from sbir_ray.study.data import Cell, part_of_pool, prepare
from sbir_ray.study.execute import execute
from sbir_ray.study.intervals import FOLDS, METHOD, chance
from sbir_ray.study.plan import Plan, Row, Variant
from sbir_ray.study.tables import CHANCE, markdown, numbers, plot
from sbir_ray.study.work import Measure

Name = Literal["ablation", "labels", "photos", "generation"]
_RESULT, _SETTINGS = "study.json", "joint.toml"
_VARIED: dict[str, Callable[[JointTraining], list[Variant]]] = {
    "ablation": studies.ablation_variants,
    "labels": studies.label_variants,
}
"""The studies whose rows can be chosen."""
_USUAL = {**_VARIED, "labels": studies.usual_label_variants}
"""The rows that these have by default."""
_DOUBLINGS = 4
"""Halvings of the pool below the whole of it, by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be studied."""

    study: Name
    pairs: tuple[Path, ...]
    """PAIRS folders with all labels, which the seeds take in turn: one, or folds of one."""
    photos: Path | None = None
    """PHOTOS folder of photos without sketches."""
    config: JointTraining
    """What is varied; its seed is the first."""
    labels: tuple[float, ...] = (0.4,)
    """Shares of the training photos that keep their sketches."""
    seeds: int = 3
    rows: tuple[str, ...] = ()
    """Names of the rows, for ``ablation`` and ``labels``; all by default."""
    against: str = studies.SUPERVISED.name
    """Name of the row that these two compare the others with."""
    counts: tuple[int, ...] = ()
    """Numbers of photos, for ``photos``; doubling up to all by default."""
    split: Split = "val"
    gallery: Path | None = None
    """PHOTOS folder that is searched as well."""
    judge: Path | None = None
    """RUN of an F that judges drawings; by default one is trained on all labels."""

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run, as plain values. More seeds, rows, numbers of photos
        or, where they are what is studied, shares of labels are more runs, and change none."""
        return {
            "study": self.study,
            "pairs": [marked_pairs(pairs) for pairs in self.pairs],
            "photos": None if self.photos is None else marked(self.photos, "store.json"),
            "labels": None if self.study == "labels" else list(self.labels),
            "split": self.split,
            "gallery": None if self.gallery is None else marked(self.gallery, "store.json"),
            "judge": None if self.judge is None else weighed(self.judge),
            "config": to_dict(self.config),
        }

    def command(self, out: Path) -> str:
        """The command line that asks for it."""
        words = ["sbir-ray", "study", self.study]
        words += [word for pairs in self.pairs for word in ("--pairs", str(pairs))]
        for name in ("photos", "gallery", "judge"):
            value = getattr(self, name)
            words += [] if value is None else [f"--{name}", str(value)]
        shares = [f"{share:g}" for share in self.labels]
        words += ["--labels", ",".join(shares), "--split", self.split, "--seeds", str(self.seeds)]
        words += ["--rows", ",".join(self.rows)] if self.rows else []
        if self.study in _VARIED and self.against != studies.SUPERVISED.name:
            words += ["--against", self.against]
        words += ["--counts", ",".join(map(str, self.counts))] if self.counts else []
        return shlex.join([*words, "--config", str(out / _SETTINGS), "--out", str(out)])


def marked(folder: Path, marker: str) -> list[str]:
    """A folder and the digest of the file that tells what it holds, for a request's identity."""
    file = folder / marker
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    return [str(folder.resolve()), digest]


def marked_pairs(folder: Path) -> list[str]:
    """The same for a PAIRS folder, by what is in it."""
    return [str(folder.resolve()), content_digest(folder)]


def weighed(run: Path) -> list[str]:
    """The same for a RUN folder, by its newest weights."""
    from sbir_ray.runs import weights_digest

    return [str(run.resolve()), weights_digest(run)]


def run_study(
    request: Request,
    out: Path,
    *,
    parallel: int | None = None,
    cpus: float = 1.0,
    gpu: bool = False,
    address: str | None = None,
    progress: Callable[[str], Progress],
) -> dict[str, Any]:
    """Do what is left of a study and write ``study.json``, ``study.md`` and ``study.png``.

    Args:
        out: STUDY folder.
        parallel: trainings at a time; by default as many as the cluster, or this machine if Ray is
            started here, has room for.
        cpus: of each, also its threads; ``gpu``: one for each.
        address: the Ray cluster, see :func:`sbir_ray.stream.cluster.connect`.
        progress: makes a progress line from a title.

    Returns:
        What ``study.json`` has, and ``text`` for people. ``failed`` has what failed, by name.

    Raises:
        UserError: data, settings or rows that the user has to change; ``out`` holds another study.
    """
    out = out.resolve()
    plan = _empty_plan(request, out)
    _check(request, plan)
    settings = {_SETTINGS: to_toml(request.config)}
    with claimed(out, "study", request.identity(), settings):
        from sbir_ray.stream.cluster import connect

        with connect(address):
            parallel = room(parallel, cpus, gpu, address)
            cells = _cells(request, out / "data", progress)
            rows = _rows(request, plan, cells)
            remove_tree(out / "failures")
            failed = execute(
                list(plan.work.values()),
                parallel=parallel,
                cpus=cpus,
                gpu=gpu,
                failures=out / "failures",
                progress=progress,
            )
        return _write(request, out, plan, rows, failed)


def _check(request: Request, plan: Plan) -> None:
    """Refuse what would fail late."""
    if request.study in _VARIED:
        known = _VARIED[request.study](plan.base)
        for variant in studies.chosen(known, request.rows):
            plan.changed(variant, plan.base.seed)
        studies.chosen(known, [request.against], "--against")
        rows = request.rows or [variant.name for variant in _USUAL[request.study](plan.base)]
        if request.against not in (studies.SUPERVISED.name, *rows):
            raise UserError(f"--against {request.against}: is not among --rows; add it there")
    _check_pairs(request)
    for folder in (request.photos, request.gallery):
        if folder is not None and next(read_store(folder), None) is None:
            raise UserError(f"{folder}: holds no photo; see its ledger")
    if request.judge is not None:
        from sbir_ray.runs import load_retrieval

        load_retrieval(request.judge)


def _check_pairs(request: Request) -> None:
    """Refuse folders without queries, and folds that share some."""
    count = len(request.pairs)
    if count > 1 and request.study == "generation":
        raise UserError("study generation: give one --pairs")
    if request.seeds < count:
        raise UserError(f"--seeds {request.seeds}: give one for each of {count} --pairs, or more")
    held: dict[str, Path] = {}
    for pairs in request.pairs:
        if not read_header(pairs)["splits"][request.split]["sketches"]:
            raise UserError(
                f"{pairs}: no sketches in {request.split} to measure with; import it with "
                "--val-every or another split, or choose --split"
            )
        for row in iter_sketches(pairs, {request.split}):
            if held.setdefault(row["photo_id"], pairs) != pairs:
                raise UserError(
                    f"{pairs}: {request.split} has a photo that {held[row['photo_id']]} has there "
                    "too; import the folds with --fold 0/N, 1/N, ..."
                )


def room(parallel: int | None, cpus: float, gpu: bool, address: str | None) -> int:
    """How many trainings run at a time: as asked, or as many as there is room for.

    Raises:
        UserError: they do not fit.
    """
    from sbir_ray.stream.cluster import ensure_fits

    if parallel is not None:
        ensure_fits(cpus, float(gpu), parallel, what="--parallel")
        return parallel
    fits = ensure_fits(cpus, float(gpu), what="--cpus-per-run")
    if address or os.environ.get("RAY_ADDRESS"):
        return fits
    return max(1, min(fits, int(len(os.sched_getaffinity(0)) / cpus)))


def _cells(request: Request, data: Path, progress: Callable[[str], Progress]) -> list[Cell]:
    first = request.config.seed
    seeds = range(first, first + request.seeds)
    folds = [pairs.resolve() for pairs in request.pairs]
    cells = prepare(data, folds, request.photos, request.labels, seeds, progress)
    if request.study != "photos":
        return cells
    most = min(cell.photos for cell in cells)
    if not most:
        raise UserError(
            f"study photos: no photo is without a sketch at labels={cells[0].labels:g}; give "
            "--photos, or fewer labels"
        )
    counts = request.counts or _doubling(most)
    return [part_of_pool(data, cell, count) for count in counts for cell in cells]


def _doubling(most: int) -> list[int]:
    """0, and numbers that double up to ``most``."""
    return [0, *sorted({most >> halvings for halvings in range(_DOUBLINGS + 1)} - {0})]


def _empty_plan(request: Request, out: Path) -> Plan:
    return Plan(
        out,
        request.config,
        request.split,
        "" if request.gallery is None else str(request.gallery.resolve()),
        "" if request.judge is None else str(request.judge.resolve()),
    )


def _rows(request: Request, plan: Plan, cells: Sequence[Cell]) -> list[Row]:
    if request.study == "ablation":
        return studies.ablation(plan, cells, request.rows, request.against)
    if request.study == "labels":
        return studies.labels(plan, cells, request.rows, request.against)
    if request.study == "photos":
        return studies.photos(plan, cells)
    return studies.generation(plan, cells)


def _write(
    request: Request, out: Path, plan: Plan, rows: list[Row], failed: dict[str, str]
) -> dict[str, Any]:
    measures = [piece for piece in plan.work.values() if isinstance(piece, Measure)]
    found = {piece.name: piece.found() for piece in measures if piece.name not in failed}
    gallery = next((one.gallery for one in found.values()), 0)
    lines = numbers(rows, found, failed)
    if request.study == "generation" and gallery:
        lines.append(_chance(gallery))
    first = request.config.seed
    values = {
        "schema_version": SCHEMA_VERSION,
        "kind": "study",
        "study": request.study,
        "request": {
            **request.identity(),
            "labels": list(request.labels),
            "seeds": list(range(first, first + request.seeds)),
            "rows": list(request.rows),
            "counts": list(request.counts),
        },
        "rows": lines,
        "searched": gallery,
        "intervals": f"{METHOD} {FOLDS}" if len(request.pairs) > 1 else METHOD,
        "failed": failed,
        "command": request.command(out),
        "versions": versions(),
    }
    write_json_atomic(out / _RESULT, values)
    text = markdown(request.study, values)
    (out / "study.md").write_text(text)
    plot(request.study, lines, out / "study.png")
    return {**values, "text": text}


def _chance(gallery: int) -> dict[str, Any]:
    shares = chance(gallery).items()
    values = {name: {"mean": v, "ci95": [v, v], "by_seed": {}} for name, v in shares}
    return {
        "name": CHANCE,
        "title": CHANCE,
        "series": CHANCE,
        "x": None,
        "seeds": [],
        "failed": {},
        "drawings": values,
    }
