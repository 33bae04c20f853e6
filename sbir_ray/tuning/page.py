"""What a sweep found, for people: a page and a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sbir_ray import plots
from sbir_ray.places import write_bytes
from sbir_ray.tuning.records import DEFAULT, SPEED
from sbir_ray.tuning.space import Knob, Value, shown

_TOP, _BOTTOM, _APART, _MARGIN = 56, 276, 150, 70
"""Of the parallel coordinates, in the SVG's units."""


def summary(values: Mapping[str, Any]) -> str:
    """A few lines.

    Args:
        values: of ``tune.json``.
    """
    lines = [f"{values['space']}: {_counts(values)}.", headline(values)]
    for name, value in values["best"]["knobs"].items():
        lines.append(f"  {name} = {shown(value)} (default {shown(values['defaults'][name])})")
    for trial in values["trials"]:
        if trial["status"] in ("failed", "refused"):
            lines.append(f"trial {trial['number']} {trial['status']}: {trial['failures'][-1]}")
    if values["confirmed"]["status"] == "failed":
        for name, reason in values["confirmed"]["reasons"].items():
            lines.append(f"{name} failed: {reason}; the same command tries it again")
    lines += [f"Best configuration: {values['best']['config']}", f"Report: {values['report']}"]
    return "\n".join(lines)


def headline(values: Mapping[str, Any]) -> str:
    """The main result with its interval, whatever its sign."""
    metric, confirmed = values["metric"], values["confirmed"]
    trials = {trial["number"]: trial for trial in values["trials"]}
    best = trials[values["best"]["number"]]
    own = best["accuracy"][metric]["mean"]
    if values["confirmed"]["status"] == "default":
        return (
            f"No trial beat the default: {100 * own:.1f}% {metric} on validation is the most that "
            "was found."
        )
    text = f"Trial {best['number']} reaches {100 * own:.1f}% {metric} on validation"
    default = trials[DEFAULT].get("accuracy") if not trials[DEFAULT]["changes"] else None
    text += f", the default {100 * default[metric]['mean']:.1f}%" if default else ""
    if confirmed["status"] != "done":
        return text + " on the sweep's own seed, which chose it: not confirmed by other seeds."
    gain = confirmed["difference"][metric]
    low, high = gain["ci95"]
    verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable from it"
    return (
        f"{text}. With {len(confirmed['seeds'])} other seeds it changes the default's {metric} by "
        f"{_signed(gain['mean'])} points (95% interval {_signed(low)} to {_signed(high)}): "
        f"{verdict}.{_price(best, trials[DEFAULT])}"
    )


def _price(best: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """What the best configuration costs, where it is much slower."""
    step, plain = _seconds(best), _seconds(default)
    if step is None or plain is None or step < 1.5 * plain:
        return ""
    return f" A step of it takes {step / plain:.1f} times as long."


def _seconds(trial: Mapping[str, Any]) -> float | None:
    """Of a step, evaluations among them; None where none was made or an older sweep tells none."""
    speed = trial["evaluations"][-1].get(SPEED) if trial["evaluations"] else None
    return 1 / speed if speed else None


def write_page(out: Path, values: Mapping[str, Any]) -> Path:
    """Write ``report.html``, whole or not at all."""
    page = out / "report.html"
    write_bytes(page, render(values).encode())
    return page


def render(values: Mapping[str, Any]) -> str:
    """The page of ``tune.json`` as HTML text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sbir_ray"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        share=lambda value: f"{100 * value:.1f}",
        signed=_signed,
        range=lambda ends: f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}",
        signed_range=lambda ends: f"{_signed(ends[0])} to {_signed(ends[1])}",
        two=lambda value: f"{value:+.2f}".replace("-", "−"),
        knob=shown,
    )
    knobs = _knobs(values)
    trials = [_row(trial, values["metric"]) for trial in values["trials"]]
    return environment.get_template("tune.html").render(
        data=values,
        counts=_counts(values),
        headline=headline(values),
        shown=("acc@1", "acc@5", "acc@10"),
        coordinates=_coordinates(values, knobs, trials),
        panels=[_panel(values, knob, trials) for knob in knobs],
        trials=sorted(trials, key=_order),
    )


def _counts(values: Mapping[str, Any]) -> str:
    by = Counter(trial["status"] for trial in values["trials"])
    told = {
        "done": "trained to the end",
        "stopped": "stopped early",
        "failed": "failed",
        "refused": "refused",
        "open": "not at their end",
    }
    fates = ", ".join(f"{by[status]} {text}" for status, text in told.items() if by[status])
    return f"{len(values['trials'])} trials of {values['steps']} steps: {fates}"


def _row(trial: Mapping[str, Any], metric: str) -> dict[str, Any]:
    last = trial["evaluations"][-1] if trial["evaluations"] else None
    told = {"done": "", "stopped": "stopped: others were better here", "open": "not at its end"}
    fate = told.get(trial["status"]) or "; ".join(
        f"{trial['status']}: {why}" for why in trial["failures"]
    )
    return {
        "accuracy": None,
        "difference": None,
        **trial,
        "knobs": trial["changes"][-1]["knobs"] if trial["changes"] else trial["knobs"],
        "score": None if last is None else last[metric],
        "step": 0 if last is None else int(last["step"]),
        "seconds": _seconds(trial),
        "fate": fate,
    }


def _order(row: Mapping[str, Any]) -> tuple[bool, float]:
    return row["status"] != "done", -(row["score"] or 0.0)


def _knobs(values: Mapping[str, Any]) -> list[Knob]:
    return [
        Knob(name=name, choices=tuple(table["choices"]))
        if "choices" in table
        else Knob(
            name=name,
            low=table["range"][0],
            high=table["range"][1],
            scale=table["scale"],
            whole=table["whole"],
        )
        for name, table in values["request"]["space"]["knobs"].items()
    ]


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


# --------------------------------------------------------------------------- pictures


def _coordinates(
    values: Mapping[str, Any], knobs: Sequence[Knob], trials: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Axes and lines of the parallel coordinates."""
    scored = [trial for trial in trials if trial["score"] is not None]
    scores = [trial["score"] for trial in scored]
    low, high = min(scores), max(scores)
    places = [_MARGIN + _APART * i for i in range(len(knobs) + 1)]
    axes = [
        {
            "x": x,
            "name": knob.name,
            "low": shown(knob.choices[0] if knob.choices else knob.low),
            "high": shown(knob.choices[-1] if knob.choices else knob.high),
        }
        for x, knob in zip(places, knobs, strict=False)
    ]
    axes.append(
        {
            "x": places[-1],
            "name": f"{values['metric']}, %",
            "low": f"{100 * low:.1f}",
            "high": f"{100 * high:.1f}",
        }
    )
    lines = []
    for trial in sorted(scored, key=lambda one: _importance(values, one)):
        good = (trial["score"] - low) / (high - low) if high > low else 1.0
        turned = {**values["defaults"], **trial["knobs"]}
        heights = [knob.place(turned[knob.name]) for knob in knobs] + [good]
        points = " ".join(
            f"{x},{_BOTTOM - (_BOTTOM - _TOP) * height:.1f}"
            for x, height in zip(places, heights, strict=True)
        )
        kind = _kind(values, trial)
        lines.append(
            {
                "kind": f"{kind} stopped" if trial["status"] == "stopped" else kind,
                "opacity": f"{0.25 + 0.75 * good**2:.2f}",
                "points": points,
                "title": f"trial {trial['number']}: {values['metric']} {100 * trial['score']:.1f}%",
            }
        )
    return {"width": places[-1] + _MARGIN, "axes": axes, "lines": lines}


def _kind(values: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    if trial["number"] == values["best"]["number"]:
        return "best"
    return "default" if trial["number"] == DEFAULT else "other"


def _importance(values: Mapping[str, Any], trial: Mapping[str, Any]) -> tuple[int, float]:
    """What is drawn later lies above."""
    return ("other", "default", "best").index(_kind(values, trial)), trial["score"]


def _panel(
    values: Mapping[str, Any], knob: Knob, trials: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    def across(value: Value) -> float:
        return float(knob.choices.index(value)) if knob.choices else float(value)

    groups: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    colours = {"other": 0, "best": 1, "default": 2}
    for trial in trials:
        value = {**values["defaults"], **trial["knobs"]}[knob.name]
        if trial["score"] is not None and knob.holds(value):
            kind = colours[_kind(values, trial)], trial["status"] == "done"
            groups.setdefault(kind, []).append((across(value), trial["score"]))
    dots = []
    for (colour, filled), points in sorted(groups.items()):
        x, y = np.array(points).T
        dots.append(plots.Dots(colour, x, y, filled))
    svg = plots.dot_panel(
        knob.name,
        dots,
        knob.name,
        log=knob.scale == "log",
        ticks=[shown(choice) for choice in knob.choices],
    )
    return {"name": knob.name, "svg": svg}
