"""The report of one training run, of any kind, from its folder and from what it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbir_ray import joint_report, report
from sbir_ray.assess import pseudo_ranks
from sbir_ray.certainty import certainty_deciles, pick_evenly
from sbir_ray.config import ChoiceConfig, RetrievalTraining
from sbir_ray.data.pairs import PairSet
from sbir_ray.data.photo_set import PhotoSet
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.evaluate import Evaluation, Metrics, paired_difference
from sbir_ray.places import place
from sbir_ray.report import Curve, ReportData, Result
from sbir_ray.runs import DISCRIMINATOR, JOINT, read_run, retrieval_config
from sbir_ray.stream import pseudo_store
from sbir_ray.stream.pseudo_store import PseudoSet
from sbir_ray.strict import from_dict
from sbir_ray.train.job import pseudo_folders
from sbir_ray.train.thresholds import choice_for

Lines = Sequence[Mapping[str, Any]]
Panels = Sequence[tuple[str, str, Mapping[str, str]]]
"""Title, kind of line, and for each key of the lines the curve's name."""

ACCURACY = ("Validation accuracy, %", "evaluation", {f"acc@{k}": f"acc@{k}" for k in (1, 5, 10)})
G_TERMS = {"offset": "offsets", "pen": "pen states"}
PANELS: Mapping[str, Panels] = {
    "generator": (
        ("Generator: loss", "step", {"loss": "loss"}),
        ("Generator: negative log-likelihood, nats a point", "step", G_TERMS),
        ("Generator: the same in validation", "evaluation", G_TERMS),
        ("Generator: KL divergence, nats", "step", {"kl": "KL divergence"}),
    ),
    "discriminator": (
        (
            "Discriminator: loss",
            "step",
            {"real": "people's sketches", "drawn": "drawings", "wrong": "wrong photos"},
        ),
        (
            "Discriminator: certainty",
            "step",
            {"certainty_real": "people's sketches", "certainty_drawn": "drawings"},
        ),
    ),
    JOINT: (
        ACCURACY,
        (
            "Retrieval: loss",
            "step",
            {"labelled": "labelled pairs", "pseudo": "pseudo pairs", "distill": "distillation"},
        ),
        ("Generator: negative log-likelihood, nats a point", "step", G_TERMS),
        (
            "Generator: the same in validation",
            "evaluation",
            {f"g_{key}": name for key, name in G_TERMS.items()},
        ),
        ("Generator: KL divergence, nats", "step", {"kl": "KL divergence"}),
        ("Generator: reward", "step", {"reward": "mean", "reward_std": "standard deviation"}),
        (
            "Generator: gradients of the reward, as losses",
            "step",
            {"policy": "policy", "soft": "through the raster"},
        ),
        ("Generator: importance ratio", "step", {"ratio": "mean"}),
        (
            "Discriminator: loss",
            "step",
            {
                "d_real": "people's sketches",
                "d_drawn": "drawings",
                "d_own": "drawings of labelled photos",
                "d_wrong": "wrong photos",
            },
        ),
        (
            "Discriminator: certainty",
            "step",
            {
                "certainty_real": "people's sketches",
                "certainty_drawn": "drawings",
                "certainty": "pseudo pairs that count",
            },
        ),
    ),
}
"""What is drawn of the learning curves of a run, by its kind; a retrieval network's are those of
:func:`sbir_ray.report.curves_of`."""
STREAM_PANELS: Panels = (
    ("Share of the time spent waiting for rows, %", "step", {"wait_share": "waiting"}),
    (
        "Rates, a second",
        "step",
        {"photos_per_second": "photos", "sketches_per_second": "drawings"},
    ),
    ("Versions behind, mean of a step", "step", {"staleness": "staleness"}),
    ("Pseudo pairs that passed the filters, %", "step", {"kept": "kept"}),
)


# --------------------------------------------------------------------------- a run


def run_report(run: Path) -> ReportData:
    """All that can be shown of a run whose inputs are still where they were.

    The run of a retrieval network has to be evaluated first; other runs need not be finished.

    Raises:
        UserError: not a run, or not evaluated yet.
        DamagedError: a file of the run cannot be read.
    """
    data = from_run(run)
    record = read_run(run)
    if record["kind"] in ("retrieval", JOINT):
        size = retrieval_config(record, run).image_size
        data = replace(data, queries=_queries(run, size))
        folders = [place(folder) for folder in pseudo_folders(record["inputs"])]
        if folders and all(folder.exists() for folder in folders):
            teacher = record["inputs"].get("teacher")
            training = from_dict(RetrievalTraining, record["config"], str(run))
            chosen = {folder: choice_for(folder, training) for folder in folders}
            data = replace(data, **pseudo_sections(chosen, size, teacher))
    return data


def from_run(run: Path) -> ReportData:
    """What the run folder alone can tell; raises as :func:`run_report`."""
    record = read_run(run)
    kind, log = record["kind"], lines_of(run)
    facts = {"digest": str(record["digest"]), "seed": str(record["config"].get("seed", ""))}
    facts.update({f"version of {k}": str(v) for k, v in record.get("versions", {}).items()})
    facts.update({f"input: {k}": str(v) for k, v in record.get("inputs", {}).items()})
    data = ReportData(
        title=f"Training run {run.resolve().name}",
        subtitle=f"{kind}, status {record['status']}",
        results=[],
        headline=progress(log),
        facts=facts,
        config=record["config"],
        commands=[f"sbir-ray report {run}"],
    )
    if kind == JOINT:
        teacher = record["inputs"].get("teacher")
        return replace(
            data,
            results=_compared(run, place(teacher)) if teacher else _results(run),
            cause="Joint training",
            curves=panels(log, PANELS[kind]),
            **joint_sections(run, log, record["config"]["stream"]["max_staleness"]),
        )
    if kind in PANELS:
        curves = panels(log, PANELS[kind])
        critic = run / DISCRIMINATOR
        if critic.exists():
            curves += panels(lines_of(critic), PANELS["discriminator"])
        return replace(data, curves=curves)
    results = _results(run)
    if not results:
        raise UserError(
            f"{run}: has no evaluation-*.json; run `sbir-ray evaluate` on it before the report"
        )
    return replace(data, results=results, curves=report.curves_of(log))


def progress(log: Lines) -> str:
    """One sentence on how far a run has come, by the last lines of its ``metrics.jsonl``."""
    if not log:
        return "No step has been logged yet."
    text = f"Step {log[-1]['step']} of {log[-1]['steps']}"
    found = [line for line in log if line["kind"] == "evaluation"]
    if found and "acc@1" in found[-1]:
        last = found[-1]
        return (
            f"{text}: {100 * last['acc@1']:.1f}% of the validation sketches found their photo "
            f"first at step {last['step']}."
        )
    if found and "offset" in found[-1]:
        last = found[-1]
        return (
            f"{text}: in validation {last['offset']:.2f} nats a point for the offsets and "
            f"{last['pen']:.2f} for the pen at step {last['step']}."
        )
    return f"{text}; nothing was evaluated."


def panels(log: Lines, wanted: Panels) -> list[Curve]:
    """The curves of ``wanted`` that the lines of a ``metrics.jsonl`` have values for."""
    curves = []
    for title, kind, names in wanted:
        for key, name in names.items():
            points = [(row["step"], row[key]) for row in log if row["kind"] == kind and key in row]
            if points:
                steps, values = zip(*points, strict=True)
                curves.append(
                    Curve(
                        panel=title,
                        name=name,
                        steps=steps,
                        values=values,
                        percent=title.endswith("%"),
                    )
                )
    return curves


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, [] if there is none.

    Raises:
        DamagedError: a line is not JSON.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DamagedError(f"{file}: line {number} is not JSON; remove that line") from error
    return lines


# --------------------------------------------------------------------------- accuracy


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """What ``evaluation-<split>.json`` say, by split, the test split first."""
    evaluations = {}
    for file in sorted(run.glob("evaluation-*.json"), key=lambda f: ("test" not in f.stem, f.stem)):
        found = _read(file)
        try:
            Metrics.from_json(found["metrics"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{file}: not an evaluation ({error!r})") from error
        evaluations[file.stem.removeprefix("evaluation-")] = found
    return evaluations


def _results(run: Path) -> list[Result]:
    return [
        Result(name=split, metrics=Metrics.from_json(found["metrics"]))
        for split, found in _evaluations(run).items()
    ]


def _compared(run: Path, teacher: Path) -> list[Result]:
    """The run's results, each behind its teacher's where that searched the same photos with the
    same sketches."""
    results = []
    theirs = _evaluations(teacher)
    for split, found in _evaluations(run).items():
        metrics = Metrics.from_json(found["metrics"])
        other = theirs.get(split)
        if other is None or not _alike(found, other):
            results.append(Result(name=f"joint, {split}", metrics=metrics))
            continue
        mine, before = Evaluation.from_json(found), Evaluation.from_json(other)
        photos = {name: i for i, name in enumerate(dict.fromkeys(_photos(found)))}
        gain = paired_difference(
            mine.ranks, before.ranks, [photos[name] for name in _photos(found)]
        )
        results += [
            Result(name=f"supervised, {split}", metrics=before.metrics),
            Result(name=f"joint, {split}", metrics=metrics, difference=gain),
        ]
    return results


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two evaluations are of the same queries in the same gallery."""
    same = all(a.get(key) == b.get(key) for key in ("pairs", "gallery", "mirror"))
    sketches = [[query["sketch_id"] for query in found["per_query"]] for found in (a, b)]
    return same and sketches[0] == sketches[1] and len(sketches[0]) > 0


def _photos(found: Mapping[str, Any]) -> list[str]:
    return [query["photo"] for query in found["per_query"]]


def _queries(run: Path, size: int) -> report.QueryGrid | None:
    """The grid of the first of the run's evaluations, if its photos are where they were."""
    files = [run / f"evaluation-{split}.json" for split in ("test", "val", "train")]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        return None
    found = _read(file)
    if not place(found["pairs"]).exists():
        return None
    extra = None
    if found["gallery"]:
        if not place(found["gallery"]).exists():
            return None
        others = PhotoSet.load(place(found["gallery"]), size)
        extra = dict(zip(others.photo_ids, others.photos, strict=True))
    pairs = PairSet.load(found["pairs"], found["split"], size)
    return report.query_grid(Evaluation.from_json(found), pairs, extra)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read ({error})") from error


# --------------------------------------------------------------------------- pseudo pairs


def joint_sections(run: Path, log: Lines, max_staleness: int) -> dict[str, Any]:
    """What a run of joint training has beside results and learning curves, as fields of
    :class:`sbir_ray.report.ReportData`.

    Args:
        max_staleness: versions that its drawings may lie behind.
    """
    fields: dict[str, Any] = {
        "lessons": joint_report.read_lessons(run),
        "looks": joint_report.read_looks(run),
        "stream": joint_report.read_stream(run, max_staleness),
        "stream_curves": panels(log, STREAM_PANELS),
    }
    table = joint_report.read_certainty(run)
    if table is not None:
        fields["deciles"] = table.deciles
        fields["searched"] = (
            f"Searched among the {table.pairs} photos by the retrieval network of step "
            f"{table.step}, which trained on such pairs."
        )
        fields["pseudo"] = report.PseudoGallery(
            examples=[
                report.PseudoExample(
                    photo=pair.photo, sketch=pair.sketch, certainty=pair.certainty, rank=pair.rank
                )
                for pair in table.examples
            ],
            total=table.pairs,
            sketcher=f"the generator of step {table.step}, at temperature {table.temperature:g}",
        )
    return fields


def pseudo_sections(
    folders: Mapping[Path, ChoiceConfig | None], size: int, teacher: str | None
) -> dict[str, Any]:
    """The gallery and, by a teacher's run, the deciles of all pairs of some PSEUDO folders, and the
    account of each folder, as fields of :class:`sbir_ray.report.ReportData`.

    Args:
        folders: with which drawings are pairs; None: by the folder's own choice.
        size: side of the photos, pixels; the teacher's own.
    """
    headers = {folder: pseudo_store.read_header(folder) for folder in folders}
    pseudo = PseudoSet.join(
        [PseudoSet.load(folder, size, choice=choice) for folder, choice in folders.items()]
    )
    fields: dict[str, Any] = {
        "ledgers": [
            (
                f"Pseudo pairs of {folder.name}" if len(folders) > 1 else "Pseudo pairs",
                pseudo_store.account(folder, headers[folder], choice),
            )
            for folder, choice in folders.items()
        ],
        "pseudo": report.PseudoGallery(
            examples=[
                report.PseudoExample(
                    photo=pseudo.photos[pseudo.photo_of[i]].transpose(1, 2, 0),
                    sketch=pseudo.sketches[i],
                    certainty=float(pseudo.certainty[i]),
                )
                for i in pick_evenly(pseudo.certainty)
            ],
            total=len(pseudo.sketches),
            sketcher=" and ".join(dict.fromkeys(header["sketcher"] for header in headers.values())),
        ),
    }
    if teacher is not None and place(teacher).exists():
        ranks = pseudo_ranks(place(teacher), pseudo)
        fields["deciles"] = certainty_deciles(pseudo.certainty, ranks)
        fields["searched"] = f"Searched among the {len(pseudo.photos)} photos by the teacher."
    return fields
