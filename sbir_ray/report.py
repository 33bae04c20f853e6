"""One HTML file that tells what was measured, made from plain values.

It needs no network and no script, prints, and shows a section only when there is something in it.
What it shows of single sketches is drawn at random or evenly over the order by score, never chosen,
and it says so.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from sbir_ray import plots
from sbir_ray.data.pairs import PairSet
from sbir_ray.errors import DamagedError, UserError
from sbir_ray.evaluate import RESAMPLES, Difference, Evaluation, Metrics
from sbir_ray.runlog import Ledger, duration

Strokes = list[NDArray[np.float32]]
Bytes = NDArray[np.uint8]

SHOWN = 5
"""Photos shown for each query."""
MINUS = "−"


# --------------------------------------------------------------------------- what it is made from


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of the accuracy table."""

    name: str
    metrics: Metrics
    labelled: int | None = None
    """Labelled photos it was trained with."""
    pseudo: int | None = None
    """Pseudo pairs it was trained with."""
    difference: Difference | None = None
    """This model minus the one of :attr:`ReportData.baseline`, paired by query."""
    role: Literal["model", "ceiling"] = "model"
    """``ceiling``: what a model with all labels reaches; shown apart and never in the headline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of the learning curves."""

    panel: str
    """Curves of one panel share its axes; panels are shown in the order in which they appear."""
    name: str
    steps: Sequence[float]
    values: Sequence[float]
    percent: bool = False
    """The values are shares in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryExample:
    """A sketch and what was found with it."""

    sketch: Strokes
    name: str
    """Names the sketch in its alternative text."""
    photo: Bytes
    """The photo it is of, (H, W, 3)."""
    rank: int
    top: Sequence[Bytes]
    """The nearest photos, nearest first; its own is at ``rank - 1`` if it is among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryGrid:
    """Example queries, and how many there were to draw them from (:func:`pick_queries`)."""

    examples: Sequence[QueryExample]
    queries: int
    found: int
    """Queries of all whose photo was first."""
    gallery: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoExample:
    """A pseudo pair with its certainty."""

    photo: Bytes
    """(H, W, 3)"""
    sketch: Strokes
    certainty: float
    reason: str = ""
    """Why a filter left it out; empty if it was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoGallery:
    """Pseudo pairs, most certain first, evenly spaced over all (:func:`pick_evenly`)."""

    examples: Sequence[PseudoExample]
    total: int
    sketcher: str = ""
    """What drew them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decile:
    """A tenth of the pseudo pairs in the order of their certainty."""

    certainty: float
    """Mean."""
    found: float
    """Share whose sketch finds its own photo first."""
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a stage took."""

    stage: str
    seconds: float
    detail: str = ""
    """What was done in that time, such as ``381 photos``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that a report can show. What is left empty is left out."""

    title: str
    results: Sequence[Result]
    """The headline is about the first model with a difference, or else the first row."""
    baseline: str = "supervised"
    """Name of the row that the differences are to."""
    subtitle: str = ""
    note: str = ""
    """What a reader must know to read the numbers rightly."""
    curves: Sequence[Curve] = ()
    queries: QueryGrid | None = None
    pseudo: PseudoGallery | None = None
    deciles: Sequence[Decile] = ()
    ledgers: Sequence[Ledger] = ()
    """Of the photos and of the pseudo pairs, by fate."""
    timings: Sequence[Timing] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Seed, digests, versions, and whatever else identifies the run."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Nested settings."""
    commands: Sequence[str] = ()
    """Shell lines that make it again."""


# --------------------------------------------------------------------------- honest samples


def pick_queries(ranks: NDArray[Any] | Sequence[int], each: int = 6, seed: int = 0) -> list[int]:
    """Queries to show: up to ``each`` found first and up to ``each`` not, drawn at random.

    Returns:
        Rows of ``ranks``: the successes, then the failures by rank.
    """
    rank_Q = np.asarray(ranks)
    order = np.random.default_rng(seed).permutation(len(rank_Q))
    found = [int(i) for i in order if rank_Q[i] == 1][:each]
    missed = [int(i) for i in order if rank_Q[i] > 1][:each]
    return found + sorted(missed, key=lambda i: int(rank_Q[i]))


def query_grid(
    evaluation: Evaluation,
    pairs: PairSet,
    extra_photos: Mapping[str, Bytes] | None = None,
    each: int = 6,
    seed: int = 0,
) -> QueryGrid:
    """The grid of an evaluation of ``pairs``.

    Args:
        extra_photos: (3, S, S) by id, of gallery photos that ``pairs`` does not hold.

    Raises:
        KeyError: a photo among the shown ones that neither holds.
    """
    photos = dict(zip(pairs.photo_ids, pairs.photos, strict=True))
    photos.update(extra_photos or {})
    rows = pick_queries(evaluation.ranks, each, seed)
    examples = []
    for row in rows:
        query = evaluation.per_query[row]
        examples.append(
            QueryExample(
                sketch=pairs.sketches[row],
                name=query["sketch_id"],
                photo=photos[query["photo"]].transpose(1, 2, 0),
                rank=query["rank"],
                top=[photos[i].transpose(1, 2, 0) for i in query["top"][:SHOWN]],
            )
        )
    return QueryGrid(
        examples=examples,
        queries=evaluation.metrics.queries,
        found=int((evaluation.ranks == 1).sum()),
        gallery=evaluation.metrics.gallery,
        seed=seed,
    )


def pick_evenly(certainty: NDArray[Any] | Sequence[float], count: int = 24) -> list[int]:
    """Rows evenly spaced over the order by certainty, from the most to the least certain."""
    order = np.argsort(-np.asarray(certainty), kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(order[place]) for place in places]


def certainty_deciles(
    certainty: NDArray[Any] | Sequence[float], ranks: NDArray[Any] | Sequence[int]
) -> list[Decile]:
    """Tenths of the pseudo pairs, most certain first (fewer parts if there are fewer pairs).

    Args:
        certainty: (N,).
        ranks: (N,) rank of each pair's photo when its own pseudo sketch is the query.
    """
    score, rank = np.asarray(certainty, dtype=np.float64), np.asarray(ranks)
    order = np.argsort(-score, kind="stable")
    return [
        Decile(
            certainty=float(score[part].mean()),
            found=float((rank[part] == 1).mean()),
            count=len(part),
        )
        for part in np.array_split(order, min(10, len(order)) or 1)
        if len(part)
    ]


# --------------------------------------------------------------------------- a training run


def from_run(run: Path) -> ReportData:
    """The report of one training run from ``run.json``, ``metrics.jsonl`` and its evaluations.

    Raises:
        UserError: there is no run, or it has not been evaluated.
        DamagedError: a file of the run cannot be read.
    """
    from sbir_ray.runs import read_run  # Here, so that other reports need not load torch.

    record = read_run(run)
    files = sorted(run.glob("evaluation-*.json"), key=lambda f: ("test" not in f.stem, f.stem))
    if not files:
        raise UserError(
            f"{run}: has no evaluation-*.json; run `sbir-ray evaluate` on it before the report"
        )
    results = []
    for file in files:
        try:
            metrics = Metrics.from_json(_read(file)["metrics"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{file}: not an evaluation ({error!r})") from error
        results.append(Result(name=file.stem.removeprefix("evaluation-"), metrics=metrics))
    log = run / "metrics.jsonl"
    facts = {"digest": str(record["digest"]), "seed": str(record["config"].get("seed", ""))}
    facts.update({f"version of {k}": str(v) for k, v in record.get("versions", {}).items()})
    facts.update({f"input: {k}": str(v) for k, v in record.get("inputs", {}).items()})
    return ReportData(
        title=f"Training run {run.resolve().name}",
        subtitle=f"{record['kind']}, status {record['status']}",
        results=results,
        curves=curves_of(_lines(log) if log.is_file() else []),
        facts=facts,
        config=record["config"],
        commands=[f"sbir-ray report {run}"],
    )


def curves_of(lines: Sequence[Mapping[str, Any]], name: str = "") -> list[Curve]:
    """Learning curves of the lines of ``metrics.jsonl``: the losses, and acc@k in validation.

    Args:
        name: put before each curve's name, to tell several runs apart.
    """
    curves = []
    for kind, panel, percent in (
        ("step", "Training loss", False),
        ("evaluation", "Validation accuracy, %", True),
    ):
        rows = [line for line in lines if line.get("kind") == kind]
        keys = dict.fromkeys(key for row in rows for key in row)
        wanted = [k for k in keys if (k.startswith("acc@") if percent else k.endswith("loss"))]
        for key in wanted:
            points = [(row["step"], row[key]) for row in rows if key in row]
            steps, values = zip(*points, strict=True)
            label = f"{name} {key}".strip()
            curves.append(
                Curve(panel=panel, name=label, steps=steps, values=values, percent=percent)
            )
    return curves


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise DamagedError(f"{file}: line {number} is not JSON; remove that line") from error
    return lines


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read ({error})") from error


# --------------------------------------------------------------------------- the page


def write_report(folder: Path, data: ReportData) -> Path:
    """Write ``folder/report.html``, whole or not at all, and return its path.

    Raises:
        ValueError: no results.
    """
    page = render(data)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "report.html"
    part = folder / ".report.html.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, out)
    return out


def render(data: ReportData) -> str:
    """The page of ``data`` as HTML text."""
    if not data.results:
        raise ValueError("a report needs at least one result")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sbir_ray"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        share=_share,
        signed=_signed,
        count=_count,
        duration=_duration,
        photo=plots.photo_uri,
        strokes=plots.sketch_path,
    )
    return environment.get_template("report.html").render(
        data=data,
        headline=headline(data),
        chances={r.metrics.gallery: r.metrics.chance for r in data.results},
        models=[r for r in data.results if r.role == "model"],
        ceilings=[r for r in data.results if r.role == "ceiling"],
        panels=_panels(data.curves),
        accounts=_accounts(data.ledgers),
        settings="\n".join(_flat(data.config)),
        shown=SHOWN,
        resamples=RESAMPLES,
        dashes=plots.SVG_DASHES,
        ends=_ends,
        hits=sum(q.rank == 1 for q in data.queries.examples) if data.queries else 0,
        tests=list(
            {(r.metrics.queries, r.metrics.gallery): r.metrics for r in data.results}.values()
        ),
        counts={
            "labelled": any(r.labelled is not None for r in data.results),
            "pseudo": any(r.pseudo is not None for r in data.results),
        },
    )


def headline(data: ReportData) -> str:
    """One sentence with the main number and its interval, whatever its sign."""
    compared = [r for r in data.results if r.difference is not None and r.role == "model"]
    if not compared:
        first = data.results[0]
        m = first.metrics
        lo, hi = m.ci95["acc@1"]
        return (
            f"{first.name}: {_share(m.acc1)}% of {_count(m.queries)} sketches find their photo "
            f"first among {_count(m.gallery)} (95% interval {_share(lo)} to {_share(hi)}; "
            f"chance {_share(m.chance['acc@1'])}%)."
        )
    difference = compared[0].difference
    assert difference is not None
    lo, hi = difference["ci95"]["acc@1"]
    return (
        f"The unlabelled photos changed acc@1 by {_signed(difference['difference']['acc@1'])} "
        f"points (95% interval {_signed(lo)} to {_signed(hi)}): {_verdict(lo, hi)}."
    )


def _verdict(lo: float, hi: float) -> str:
    if lo > 0:
        return "a gain that the choice of test photos does not explain"
    if hi < 0:
        return "a loss that the choice of test photos does not explain"
    return "not distinguishable from none"


def _panels(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """What the template shows of each panel; a name has one colour in all of them."""
    curves = [curve for curve in curves if len(curve.steps)]
    colours = {name: i for i, name in enumerate(dict.fromkeys(c.name for c in curves))}
    panels = []
    for title in dict.fromkeys(curve.panel for curve in curves):
        chosen = [curve for curve in curves if curve.panel == title]
        lines = [
            plots.Line(colours[c.name], np.asarray(c.steps, float), np.asarray(c.values, float))
            for c in chosen
        ]
        panels.append(
            {
                "title": title,
                "svg": plots.curve_panel(title, lines, percent=chosen[0].percent),
                "curves": [(colours[c.name] % plots.COLOURS, c) for c in chosen],
                "averaged": any(len(c.steps) > plots.MAX_POINTS for c in chosen),
            }
        )
    return panels


def _ends(curve: Curve) -> list[str]:
    """The first and the last value, as shown in the legend."""
    ends = (curve.values[0], curve.values[-1])
    return [_share(v) if curve.percent else f"{v:.3g}" for v in ends]


def _accounts(ledgers: Sequence[Ledger]) -> list[dict[str, Any]]:
    """What the template shows of each ledger; the first number of its JSON is the total."""
    titles = {"photos": "Photos", "pseudo": "Pseudo pairs"}
    accounts = []
    for ledger in ledgers:
        (counted, total), *fates = ledger.to_json().items()
        accounts.append(
            {
                "title": titles[ledger.kind],
                "counted": counted,
                "total": total,
                "fates": [
                    (fate, ledger.count(fate), value if isinstance(value, dict) else {})
                    for fate, value in fates
                ],
            }
        )
    return accounts


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}")
    return lines


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
