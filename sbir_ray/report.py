"""One HTML file that tells what was measured, made from plain values.

It needs no network and no script, prints, and shows a section only when there is something in it.
What it shows of single sketches is drawn at random or evenly over the order by score, never chosen,
and it says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from sbir_ray import plots
from sbir_ray.certainty import Decile
from sbir_ray.data.pairs import PairSet
from sbir_ray.evaluate import RESAMPLES, Difference, Evaluation, Metrics
from sbir_ray.joint_report import Lessons, Look, StreamAccount
from sbir_ray.places import write_bytes
from sbir_ray.runlog import Ledger, duration

Strokes = list[NDArray[np.float32]]
Bytes = NDArray[np.uint8]

SHOWN = 5
"""Photos shown for each query."""
CERTAINTY = "Pseudo sketches that find their own photo, %"
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
    rank: int = 0
    """Of the photo for its sketch, from 1; 0: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PseudoGallery:
    """Pseudo pairs, most certain first, evenly spaced over all (``certainty.pick_evenly``)."""

    examples: Sequence[PseudoExample]
    total: int
    sketcher: str = ""
    """What drew them."""


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
    cause: str = "The unlabelled photos"
    """What the headline puts the difference down to."""
    headline: str = ""
    """Said where there are no results yet."""
    baseline: str = "supervised"
    """Name of the row that the differences are to."""
    subtitle: str = ""
    note: str = ""
    """What a reader must know to read the numbers rightly."""
    curves: Sequence[Curve] = ()
    queries: QueryGrid | None = None
    pseudo: PseudoGallery | None = None
    deciles: Sequence[Decile] = ()
    searched: str = ""
    """By what and among what the deciles' ranks are."""
    lessons: Lessons | None = None
    looks: Sequence[Look] = ()
    stream: StreamAccount | None = None
    stream_curves: Sequence[Curve] = ()
    ledgers: Sequence[tuple[str, Ledger]] = ()
    """Titles, and the accounts of the photos and of the pseudo pairs, by fate."""
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


# --------------------------------------------------------------------------- learning curves


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


# --------------------------------------------------------------------------- the page


def write_report(folder: Path, data: ReportData) -> Path:
    """Write ``folder/report.html``, whole or not at all, and return its path.

    Raises:
        ValueError: no results and no headline.
    """
    page = render(data)
    out = folder / "report.html"
    write_bytes(out, page.encode())
    return out


def render(data: ReportData) -> str:
    """The page of ``data`` as HTML text."""
    if not data.results and not data.headline:
        raise ValueError("a report needs at least one result, or a headline")
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
        look=plots.look_uri,
    )
    return environment.get_template("report.html").render(
        data=data,
        headline=headline(data) if data.results else data.headline,
        chances={r.metrics.gallery: r.metrics.chance for r in data.results},
        models=[r for r in data.results if r.role == "model"],
        ceilings=[r for r in data.results if r.role == "ceiling"],
        panels=_panels(data.curves),
        stream_panels=_panels(data.stream_curves),
        certainty_panels=_panels(_certainty_curves(data.deciles), across="mean certainty"),
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
        f"{data.cause} changed acc@1 by {_signed(difference['difference']['acc@1'])} "
        f"points (95% interval {_signed(lo)} to {_signed(hi)}): {_verdict(lo, hi)}."
    )


def _verdict(lo: float, hi: float) -> str:
    if lo > 0:
        return "a gain that the choice of test photos does not explain"
    if hi < 0:
        return "a loss that the choice of test photos does not explain"
    return "not distinguishable from none"


def _panels(curves: Sequence[Curve], across: str = "step") -> list[dict[str, Any]]:
    """What the template shows of each panel; a name keeps its colour where it can."""
    curves = [curve for curve in curves if len(curve.steps)]
    colours: dict[str, int] = {}
    panels = []
    for title in dict.fromkeys(curve.panel for curve in curves):
        chosen = [curve for curve in curves if curve.panel == title]
        taken = {colours[c.name] for c in chosen if c.name in colours}
        free = [i for i in range(plots.COLOURS + len(chosen)) if i not in taken]
        for curve in chosen:
            if curve.name not in colours:
                colours[curve.name] = free.pop(0)
        lines = [
            plots.Line(colours[c.name], np.asarray(c.steps, float), np.asarray(c.values, float))
            for c in chosen
        ]
        panels.append(
            {
                "title": title,
                "svg": plots.curve_panel(title, lines, percent=chosen[0].percent, across=across),
                "curves": [(colours[c.name] % plots.COLOURS, c) for c in chosen],
                "averaged": any(len(c.steps) > plots.MAX_POINTS for c in chosen),
            }
        )
    return panels


def _certainty_curves(deciles: Sequence[Decile]) -> list[Curve]:
    """The share found over the certainty, least certain first (the paper's Fig. 4a)."""
    rising = deciles[::-1]
    steps = [d.certainty for d in rising]
    return [
        Curve(panel=CERTAINTY, name=name, steps=steps, values=values, percent=True)
        for name, values in (
            ("found first", [d.found for d in rising]),
            ("among the first ten", [d.found10 for d in rising]),
        )
    ]


def _ends(curve: Curve) -> list[str]:
    """The first and the last value, as shown in the legend."""
    ends = (curve.values[0], curve.values[-1])
    return [_share(v) if curve.percent else f"{v:.3g}" for v in ends]


def _accounts(ledgers: Sequence[tuple[str, Ledger]]) -> list[dict[str, Any]]:
    """What the template shows of each ledger; the first number of its JSON is the total."""
    accounts = []
    for title, ledger in ledgers:
        (counted, total), *fates = ledger.to_json().items()
        accounts.append(
            {
                "title": title,
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
