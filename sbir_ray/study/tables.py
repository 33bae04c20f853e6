"""What a study found: numbers, a Markdown table, a plot."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbir_ray.places import write_bytes
from sbir_ray.plots import DASHES
from sbir_ray.study.intervals import NAMES, Found, accuracy, difference, shares
from sbir_ray.study.plan import Row

CHANCE = "chance"
"""The row of a random order."""
_COLOURS = ("#1f5fa8", "#c2571a", "#2c7a4b", "#8a3f8f", "#6b6b6b")
_AXES = {
    "labels": "share of the training photos with sketches",
    "photos": "photos without sketches",
}
_PANELS = {"accuracy": "sketches find their photo, %", "drawings": "drawings find their photo, %"}
_TITLES = {
    "ablation": "What each part brings",
    "labels": "Accuracy by the share of labels",
    "photos": "Accuracy by the number of photos without sketches",
    "generation": "Do drawings of held-out photos find their photo?",
}
_DIFFERENCE = (
    "All rows have the same number of updates of the retrieval network, the same batch of labelled "
    "pairs, loss, augmentation and optimiser. Differences are paired: the same seed, labels and "
    "queries."
)
_JUDGED = (
    "Drawings: of the held-out photos, searched with a retrieval network that had no part in their "
    "making; a photo for which nothing was drawn counts as last. FID and recognition of classes "
    "are not measured: that needs a classifier of sketches, and none ships with this program."
)


def numbers(
    rows: Sequence[Row], found: Mapping[str, Found], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Each row as plain values.

    ``name``, ``title``, ``series``, ``x``, the row's facts, ``seeds`` (of the runs that count),
    ``failed`` {seed: reason}; where there are such runs ``accuracy`` of F and ``drawings`` (of
    held-out photos, by the judge), each {acc@k: {mean, ci95, by_seed}}, and ``difference``
    {acc@k: {mean, ci95}} to the row ``baseline``, over the seeds that both have.

    Args:
        found: what was measured, by the measurement's name.
        failed: why others were not.
    """
    by_name = {row.name: row for row in rows}
    values = []
    for row in rows:
        reasons = {
            str(seed): failed[name]
            for measured in (row.found, row.drawn)
            for seed, name in measured.items()
            if name in failed
        }
        entry = {
            "name": row.name,
            "title": row.title,
            "series": row.series,
            "x": row.x,
            **row.facts,
            "seeds": [seed for seed, name in (row.found or row.drawn).items() if name in found],
            "failed": reasons,
        }
        for key, measured in (("accuracy", row.found), ("drawings", row.drawn)):
            runs = {seed: found[name] for seed, name in measured.items() if name in found}
            if runs:
                entry[key] = _accuracy(runs)
        baseline = by_name.get(row.baseline)
        if baseline is not None:
            both = [
                (found[name], found[baseline.found[seed]])
                for seed, name in row.found.items()
                if name in found and baseline.found.get(seed) in found
            ]
            if both:
                gained = difference([a for a, _ in both], [b for _, b in both])
                entry["baseline"] = baseline.name
                entry["difference"] = {k: v.to_json() for k, v in gained.items()}
        values.append(entry)
    return values


def _accuracy(runs: Mapping[int, Found]) -> dict[str, Any]:
    single = {str(seed): shares(run) for seed, run in runs.items()}
    return {
        name: {**e.to_json(), "by_seed": {seed: one[name] for seed, one in single.items()}}
        for name, e in accuracy(list(runs.values())).items()
    }


# --------------------------------------------------------------------------- Markdown


def markdown(study: str, values: Mapping[str, Any]) -> str:
    """``study.md``.

    Args:
        values: of ``study.json``.
    """
    rows = values["rows"]
    heads, cells = _columns(study, rows)
    lines = [
        f"# {_TITLES[study]}",
        "",
        _setting(values),
        "",
        "| " + " | ".join(heads) + " |",
        "| " + " | ".join("---" for _ in heads) + " |",
        *("| " + " | ".join(_safe(cell) for cell in row) + " |" for row in cells),
        "",
        f"Accuracies in per cent. {values['intervals']}",
        *([] if study == "generation" else ["", _DIFFERENCE]),
        *(["", _JUDGED] if any("drawings" in row for row in rows) else []),
        "",
        "![plot](study.png)",
        "",
        f"Made by `{values['command']}`, " + _versions(values["versions"]) + ".",
    ]
    return "\n".join(lines) + "\n"


def _setting(values: Mapping[str, Any]) -> str:
    request = values["request"]
    seeds = ", ".join(map(str, request["seeds"]))
    more = " and more photos" if request["gallery"] else ""
    folders = ", ".join(f"`{folder}`" for folder, _ in request["pairs"])
    text = f"Pairs: {folders}, measured on {request['split']}{more}"
    text += f", {values['searched']} photos searched. Seeds: {seeds}"
    text += ", taking the folders in turn." if len(request["pairs"]) > 1 else "."
    if values["study"] != "labels":
        text += f" Share of labels: {request['labels'][0]:g}."
    (updates, *_) = [row["updates"] for row in values["rows"] if "updates" in row] or [0]
    return text + (f" Updates of the retrieval network: {updates}." if updates else "")


def _columns(study: str, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    key = "drawings" if study == "generation" else "accuracy"
    drawn = study != "generation" and any("drawings" in row for row in rows)
    compared = any("difference" in row for row in rows)
    heads = ["drawn by" if study == "generation" else "trained with", *NAMES]
    heads = [study, *heads] if study in _AXES else heads
    gains = ("acc@1", "acc@10")
    against = next((row["baseline"] for row in rows if "difference" in row), "")
    if study in _AXES:
        against = against.rpartition("-")[0]
    heads += [f"{name} against {against}" for name in gains] if compared else []
    heads += ["drawings acc@1", "drawings acc@10"] if drawn else []
    table = []
    for row in rows:
        cells = [f"{row['x']:g}"] if study in _AXES else []
        cells += [row["title"], *(_share(row.get(key), name) for name in NAMES)]
        if compared:
            cells += [_share(row.get("difference"), name, "+") for name in gains]
        if drawn:
            cells += [_share(row.get("drawings"), name) for name in ("acc@1", "acc@10")]
        table.append([*cells, _runs(row)])
    return [*heads, "runs"], table


def _share(values: Mapping[str, Any] | None, name: str, sign: str = "") -> str:
    if values is None:
        return ""
    low, high = values[name]["ci95"]
    mean = values[name]["mean"]
    return f"{100 * mean:{sign}.1f} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def _runs(row: Mapping[str, Any]) -> str:
    if row["series"] == CHANCE:
        return ""
    failures = [f"seed {seed} failed: {reason}" for seed, reason in row["failed"].items()]
    return "; ".join([str(len(row["seeds"])), *failures])


def _safe(cell: str) -> str:
    return " ".join(cell.replace("|", "/").split())


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


# --------------------------------------------------------------------------- plots


def plot(study: str, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """``study.png``: lines over the axis where the study has one, else a dot for each row."""
    if study in _AXES:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        _lines(figure.add_subplot(), [row for row in rows if "accuracy" in row], _AXES[study])
    else:
        panels = [key for key in ("accuracy", "drawings") if any(key in row for row in rows)]
        height = 1.2 + 0.34 * len(rows)
        figure = Figure(figsize=(4 + 3.4 * max(1, len(panels)), height), layout="constrained")
        axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
        for place, key in zip(axes, panels, strict=False):
            _dots(place, rows, key)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    write_bytes(file, picture.getvalue())


def _lines(axes: Axes, rows: Sequence[Mapping[str, Any]], across: str) -> None:
    names = list(dict.fromkeys(row["series"] for row in rows))
    places = [row["x"] for row in rows] or [0]
    # Beside each other, so that one bar does not hide another.
    apart = 0.012 * (max(places) - min(places))
    for i, name in enumerate(names):
        mine = [row for row in rows if row["series"] == name]
        found = [row["accuracy"]["acc@1"] for row in mine]
        axes.errorbar(
            [row["x"] + apart * (i - (len(names) - 1) / 2) for row in mine],
            [100 * one["mean"] for one in found],
            yerr=_bars(found),
            label=mine[0]["title"],
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
            marker="o",
            markersize=4,
            capsize=3,
        )
    axes.set_xlabel(across)
    axes.set_ylabel("acc@1, %")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    if names:
        axes.legend(frameon=False)


def _dots(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    for i, name in enumerate(("acc@1", "acc@10")):
        mine = [(place, row[key][name]) for place, row in enumerate(rows) if key in row]
        found = [one for _, one in mine]
        axes.errorbar(
            [100 * one["mean"] for one in found],
            [place for place, _ in mine],
            xerr=_bars(found),
            label=name,
            color=_COLOURS[i],
            linestyle="none",
            marker="os"[i],
            markersize=5,
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(_PANELS[key])
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, loc="best")


def _bars(found: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Lengths of the bars below and above. A mean may lie outside a skewed interval by a little."""
    low = [max(0.0, 100 * (one["mean"] - one["ci95"][0])) for one in found]
    high = [max(0.0, 100 * (one["ci95"][1] - one["mean"])) for one in found]
    return [low, high]
