"""Pictures for the report: photos as data URIs, sketches as SVG paths, curves as inline SVG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]

THUMBNAIL = 144
"""Longest side of an embedded photo, pixels: sharp at 72 CSS pixels on a dense screen."""
MAX_POINTS = 300
"""Points of a curve that are drawn; a longer one is averaged over windows."""
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)))
"""Line styles, so that lines are told apart without colour too."""
SVG_DASHES = ("none", "9 3.6", "2.7 2.7", "10.8 3.6 2.7 3.6", "16 5.4")
"""The same for the page's legend."""
COLOURS = 5
"""Colours of the page, ``--line-1`` to ``--line-5``."""

_TINT, _TINTED = (236, 106, 30), 0.8
"""Colour of what is looked at, and how much of it covers the photo where the look is strongest."""
_CLEAR = 4
"""Times the share of an even look from which a cell's tint is full."""
_NICE = [1, 2, 2.5, 5, 10]
# Written by matplotlib and then replaced by the page's own colours, which follow its dark mode.
_TEXT, _RULE = "#010203", "#010204"
_LINES = tuple(f"#01020{5 + i}" for i in range(COLOURS))


def photo_uri(rgb: NDArray[np.uint8]) -> str:
    """A WebP thumbnail of a photo, uint8 (H, W, 3), as a data URI."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=78, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def look_uri(rgb: NDArray[np.uint8], share: Floats) -> str:
    """A photo, uint8 (H, W, 3), paled, and tinted where ``share`` (h, w) of a look is large.

    The tint is full at the largest share, if that is a few times what an even look would give.
    """
    full = max(share.max(), _CLEAR / share.size)
    photo = Image.fromarray(np.ascontiguousarray(rgb)).convert("L")
    photo.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    map_hw = Image.fromarray((share / full).astype(np.float32))
    heat_HW1 = np.asarray(map_hw.resize(photo.size, Image.Resampling.BICUBIC))[..., None]
    pale_HW1 = 255 - 0.55 * (255 - np.asarray(photo, np.float64))[..., None]
    weight_HW1 = _TINTED * heat_HW1.clip(0, 1)
    tinted_HW3 = pale_HW1 * (1 - weight_HW1) + np.array(_TINT) * weight_HW1
    return photo_uri(np.rint(tinted_HW3).astype(np.uint8))


def sketch_path(strokes: Sequence[NDArray[np.float32]]) -> str:
    """The ``d`` of one SVG path for all strokes, in whole canvas units (a third of a CSS pixel).

    Points are rounded before their differences are taken, so that errors do not add up.
    """
    parts: list[str] = []
    at = np.zeros(2, dtype=np.int64)
    for stroke in strokes:
        points = np.rint(np.asarray(stroke, dtype=np.float64)).astype(np.int64)
        steps = np.diff(points, axis=0)
        steps = steps[np.any(steps != 0, axis=1)]
        parts.append(f"m{_pair(points[0] - at)}")
        parts.append("l" + " ".join(map(_pair, steps)) if len(steps) else "h0")
        at = points[0] + steps.sum(axis=0)
    return "".join(parts)


def _pair(xy: NDArray[np.int64]) -> str:
    x, y = int(xy[0]), int(xy[1])
    return f"{x}{y}" if y < 0 else f"{x} {y}"


class Line(NamedTuple):
    """One curve of a panel."""

    colour: int
    """Which of the page's colours and dashes, counted from 0 and around."""
    steps: Floats
    """(n,)"""
    values: Floats
    """(n,); one that is not finite leaves a gap."""


def curve_panel(title: str, lines: Sequence[Line], percent: bool, across: str = "step") -> str:
    """One panel of curves as an SVG element without a fixed size.

    Args:
        title: names the panel (and keeps the ids of two panels apart).
        percent: the values are shares in [0, 1], shown as per cent.
        across: what the horizontal axis counts; of ``step`` in whole numbers.
    """
    whole = across == "step"
    with matplotlib.rc_context(_settings(title)):
        figure, axes = _empty_panel()
        for line in lines:
            x, y = thin(line.steps, line.values)
            axes.plot(
                x,
                y * (100 if percent else 1),
                color=_LINES[line.colour % COLOURS],
                linestyle=DASHES[line.colour % len(DASHES)],
                linewidth=1.8,
                marker="o" if len(x) < 15 else "",
                markersize=4,
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=_NICE))
        if whole:
            axes.set_xlim(left=0)
        if all((line.values[np.isfinite(line.values)] >= 0).all() for line in lines):
            axes.set_ylim(bottom=0)
        axes.set_xlabel(across, color=_TEXT)
        return _as_svg(figure)


class Dots(NamedTuple):
    """Points of one kind."""

    colour: int
    """As of a :class:`Line`."""
    x: Floats
    """(n,)"""
    y: Floats
    """(n,) shares in [0, 1], shown as per cent."""
    filled: bool = True


def dot_panel(
    title: str,
    groups: Sequence[Dots],
    across: str,
    *,
    log: bool = False,
    ticks: Sequence[str] = (),
) -> str:
    """One panel of dots as an SVG element without a fixed size.

    Args:
        title: keeps the ids of two panels apart.
        across: what the horizontal axis is.
        log: its scale.
        ticks: names of 0, 1, ... on it, instead of numbers.
    """
    with matplotlib.rc_context(_settings(title)):
        figure, axes = _empty_panel()
        for group in groups:
            colour = _LINES[group.colour % COLOURS]
            axes.plot(
                group.x,
                100 * group.y,
                color=colour,
                linestyle="",
                marker="o",
                markersize=7,
                markerfacecolor=colour if group.filled else "none",
                markeredgewidth=1.6,
                clip_on=False,
            )
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        elif ticks:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=_NICE))
        axes.set_xlabel(across, color=_TEXT)
        return _as_svg(figure)


def _settings(title: str) -> dict[Any, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "DejaVu Sans",
        "font.size": 11.5,
    }


def _empty_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_TEXT, pad=5)
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set(visible=True, color=_RULE, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=_NICE))
    return figure, axes


def _as_svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _for_page(stream.getvalue())


def thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """At most :data:`MAX_POINTS` points: means over windows of equal length."""
    window = -(-len(steps) // MAX_POINTS)
    if window <= 1:
        return steps, values
    starts = np.arange(0, len(steps), window)
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _for_page(svg: str) -> str:
    """The bare element: no size, no ids that could meet another panel's, the page's fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)  # It would style the whole page.
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # Not needed within HTML.
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", svg)
    svg = svg.replace(_TEXT, "var(--soft)").replace(_RULE, "var(--rule)")
    for i, colour in enumerate(_LINES):
        svg = svg.replace(colour, f"var(--line-{i + 1})")
    svg = svg.replace("<svg ", '<svg class="plot" aria-hidden="true" ', 1)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
