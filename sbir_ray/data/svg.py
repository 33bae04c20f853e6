"""SVG files as sketches, and sketches as SVG.

A file is read for its outlines: paths (curves flattened), lines, polylines, polygons, rectangles,
circles and ellipses, through groups, transforms and ``use``. An element counts if it has a stroke,
or a fill that is not white; style sheets, clipping and masks are not applied.

Files come from strangers: ``defusedxml`` parses them, without a DTD, entities or anything outside
the file, under limits that are checked while parsing, and :mod:`sbir_ray.data.svgpath` reads their
numbers in time proportional to the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder

import numpy as np
from defusedxml.common import DefusedXmlException, DTDForbidden
from defusedxml.ElementTree import DefusedXMLParser, ParseError
from numpy.typing import NDArray

from sbir_ray.data import svgpath
from sbir_ray.data.strokes import CANVAS, MAX_POINTS, MAX_STROKES, MAX_VALUE, Strokes, check
from sbir_ray.errors import UserError

MAX_BYTES = 4 << 20
"""Largest SVG file."""
MAX_ELEMENTS = 20_000
"""Most elements of a file, those drawn anew by ``use`` included."""
MAX_DEPTH = 64
"""Deepest nesting of elements, ``use`` included."""
MAX_TEXT = 1 << 19
"""Most characters in the attributes of what is drawn, those drawn anew by ``use`` included."""
TOLERANCE = 1e-3
"""Largest distance between a curve and its points, relative to the longest side of the drawing."""

_MAX_SCALE = 1e12
_SVG = "{http://www.w3.org/2000/svg}"
_GROUPS = frozenset({"svg", "g", "a", "switch", "symbol"})
_SHAPES = frozenset({"path", "line", "polyline", "polygon", "rect", "circle", "ellipse"})
_REFUSED = frozenset({"image", "feImage", "foreignObject", "script"})
_INHERITED = ("fill", "stroke", "visibility")
_STYLES = (*_INHERITED, "display")
_UNPAINTED = frozenset({"none", "transparent"})
_WHITE = frozenset({"white", "#fff", "#ffffff", "rgb(255,255,255)", "rgb(100%,100%,100%)"})


# --------------------------------------------------------------------------- reading


def read_svg(data: bytes, where: str) -> Strokes:
    """The outlines of an SVG file, in its own units; one stroke a subpath.

    Points that repeat the one before are left out; a subpath without length is one point.

    Raises:
        UserError: not an SVG, nothing drawn in it, something that this reader refuses (a DTD,
            entities, images, text, references outside the file), or a limit that it exceeds.
    """
    return check(outlines(parse_svg(data, where), where), where)


def parse_svg(data: bytes, where: str) -> Element:
    """The root element of an SVG file that keeps the limits.

    Raises:
        UserError: see :func:`read_svg`.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{where}: larger than {MAX_BYTES} bytes; simplify the drawing")
    parser = _Parser(target=_LimitedBuilder(where))
    try:
        parser.feed(data)
        root = parser.close()
    except DefusedXmlException as error:
        raise UserError(
            f"{where}: has a DTD, an entity or an external reference; save it as plain SVG"
        ) from error
    except (ParseError, ValueError, LookupError) as error:
        raise UserError(f"{where}: not a well-formed SVG file ({error})") from error
    if not isinstance(root, Element) or _local(root) != "svg":
        raise UserError(f"{where}: the root element is not <svg>; save it as plain SVG")
    return root


def outlines(root: Element, where: str, inside: Callable[[str], bool] | None = None) -> Strokes:
    """The outlines of a parsed SVG, possibly none; with ``inside`` only those that lie in an
    element whose id it accepts.

    Raises:
        UserError: see :func:`read_svg`.
    """
    walk = _Walk(where, root, inside)
    try:
        walk.visit(root, np.eye(3), {}, inside is None, 0)
    except svgpath.GeometryError as error:
        raise walk.error(str(error)) from error
    if not walk.chains:
        return []
    longest = float(np.ptp(np.concatenate(walk.chains), axis=0).max())
    tolerance = max(longest * TOLERANCE, 1e-9)
    counts = [svgpath.pieces(chain, tolerance) for chain in walk.chains]
    if sum(int(count.sum()) for count in counts) > MAX_POINTS:
        raise walk.error(f"more than {MAX_POINTS} points")
    return [svgpath.points(*pair) for pair in zip(walk.chains, counts, strict=True)]


class _Parser(DefusedXMLParser):  # type: ignore[misc]
    """Accepts the document type line that drawing programs write, and no other DTD.

    Expat never fetches what it names.
    """

    def __init__(self, target: TreeBuilder) -> None:
        super().__init__(target=target, forbid_dtd=True)

    def defused_start_doctype_decl(
        self, name: str, sysid: str | None, pubid: str | None, has_internal_subset: int
    ) -> None:
        if has_internal_subset or not (pubid or "").startswith("-//W3C//DTD SVG "):
            raise DTDForbidden(name, sysid, pubid)


class _LimitedBuilder(TreeBuilder):
    """Builds the tree and stops at the first element over a limit or that is refused."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self._elements = 0
        self._depth = 0

    def start(self, tag: Any, attrs: dict[Any, Any], /) -> Element:
        self._elements += 1
        self._depth += 1
        if self._elements > MAX_ELEMENTS:
            raise UserError(f"{self._where}: more than {MAX_ELEMENTS} elements")
        if self._depth > MAX_DEPTH:
            raise UserError(f"{self._where}: elements nested deeper than {MAX_DEPTH}")
        name = tag.rpartition("}")[2]
        if name in _REFUSED:
            raise UserError(f"{self._where}: <{name}> is not read; keep only drawn lines")
        href = _href(attrs)
        if href and not href.startswith("#") and name != "a":
            raise UserError(f"{self._where}: <{name}> refers to something outside the file")
        return super().start(tag, attrs)

    def end(self, tag: Any, /) -> Element:
        self._depth -= 1
        return super().end(tag)


@dataclass(slots=True)
class _Walk:
    """Collects the chains of everything drawn, under the limits."""

    where: str
    root: Element
    inside: Callable[[str], bool] | None
    chains: list[svgpath.Chain] = field(default_factory=list)
    _ids: dict[str, Element] | None = None
    _visited: int = 0
    _text: int = 0
    _curves: int = 0

    def visit(
        self,
        element: Element,
        matrix: NDArray[np.float64],
        style: Mapping[str, str],
        chosen: bool,
        depth: int,
    ) -> None:
        """Draw ``element`` and what is in it; ``chosen``: it lies in an element that counts."""
        name = _local(element)
        self._charge(element, depth)
        own = _declared(element)
        if own.get("display") == "none":
            return
        style = {**style, **{key: own[key] for key in _INHERITED if key in own}}
        matrix = self._move(matrix, svgpath.transform(element.get("transform", "")))
        chosen = chosen or (self.inside is not None and self.inside(element.get("id", "")))
        if name in _SHAPES:
            if chosen and _painted(style):
                self._draw(_chains(element, name), matrix)
        elif name == "use":
            shift = np.eye(3)
            shift[:2, 2] = _length(element, "x"), _length(element, "y")
            self.visit(self._target(element), self._move(matrix, shift), style, chosen, depth + 1)
        elif name == "text" and chosen:
            raise self.error("text is not read")
        elif name in _GROUPS:
            if depth > 0 and element.get("viewBox"):
                raise self.error(f"a nested <{name}> with a viewBox is not read")
            for child in element:
                if _local(child) != "symbol":  # drawn only where it is used
                    self.visit(child, matrix, style, chosen, depth + 1)

    def error(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}; simplify the drawing or save it as plain SVG")

    def _charge(self, element: Element, depth: int) -> None:
        self._visited += 1
        self._text += sum(len(value) for value in element.attrib.values())
        if depth > MAX_DEPTH:
            raise self.error(f"elements nested deeper than {MAX_DEPTH}, <use> included")
        if self._visited > MAX_ELEMENTS:
            raise self.error(f"more than {MAX_ELEMENTS} elements, those of <use> included")
        if self._text > MAX_TEXT:
            raise self.error(f"more than {MAX_TEXT} characters of attributes")

    def _move(
        self, matrix: NDArray[np.float64], change: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        with np.errstate(over="ignore", invalid="ignore"):
            moved = matrix @ change
        if not np.abs(moved).max() <= _MAX_SCALE:  # also false for NaN
            raise self.error(f"a transform is not within +-{_MAX_SCALE:.0e}")
        return np.asarray(moved)

    def _draw(self, chains: list[svgpath.Chain], matrix: NDArray[np.float64]) -> None:
        if len(self.chains) + len(chains) > MAX_STROKES:
            raise self.error(f"more than {MAX_STROKES} strokes")
        self._curves += sum(len(chain) // 3 for chain in chains)
        if self._curves > MAX_POINTS:
            raise self.error(f"more than {MAX_POINTS} points")
        for chain in chains:
            placed = chain @ matrix[:2, :2].T + matrix[:2, 2]
            if not np.abs(placed).max() <= MAX_VALUE:
                raise self.error(f"a coordinate is not a number within +-{MAX_VALUE:.0f}")
            self.chains.append(placed)

    def _target(self, element: Element) -> Element:
        if self._ids is None:
            self._ids = {e.get("id", ""): e for e in self.root.iter()}
        target = self._ids.get((_href(element.attrib) or "#")[1:])
        if target is None:
            raise self.error("a <use> refers to no element of the file")
        return target


def _chains(element: Element, name: str) -> list[svgpath.Chain]:
    """The outline of a shape in its own coordinates."""
    if name == "path":
        return svgpath.path(element.get("d", ""))
    if name in ("polyline", "polygon"):
        values = svgpath.numbers(element.get("points", ""))
        if len(values) % 2:
            raise svgpath.GeometryError("a list of points has an odd number of numbers")
        line = np.array(values).reshape(-1, 2)
        if name == "polygon":
            line = np.concatenate([line, line[:1]])
        return [svgpath.polyline(line)] if len(line) else []
    if name == "line":
        ends = [[_length(element, f"{axis}{end}") for axis in "xy"] for end in (1, 2)]
        return [svgpath.polyline(np.array(ends))]
    if name == "rect":
        place = [_length(element, key) for key in ("x", "y", "width", "height")]
        radii = [_length(element, key) for key in ("rx", "ry") if element.get(key)]
        return svgpath.rectangle(*place, *(radii * 2 or [0.0, 0.0])[:2])
    keys = ("cx", "cy", "r", "r") if name == "circle" else ("cx", "cy", "rx", "ry")
    return svgpath.ellipse(*(_length(element, key) for key in keys))


def _length(element: Element, key: str) -> float:
    return svgpath.number(element.get(key, "0").strip().removesuffix("px"))


def _local(element: Element) -> str:
    """The element's name if it is SVG's own, or ""."""
    tag = str(element.tag)
    return tag.removeprefix(_SVG) if tag.startswith(_SVG) or "}" not in tag else ""


def _href(attributes: Mapping[str, str]) -> str | None:
    return attributes.get("href", attributes.get("{http://www.w3.org/1999/xlink}href"))


def _declared(element: Element) -> dict[str, str]:
    """Presentation attributes, those of ``style`` last, in lower case without blanks."""
    declared = {key: element.get(key, "") for key in _STYLES if element.get(key)}
    for rule in element.get("style", "").split(";"):
        key, _, value = rule.partition(":")
        if key.strip() in _STYLES:
            declared[key.strip()] = value
    return {key: "".join(value.lower().split()) for key, value in declared.items()}


def _painted(style: Mapping[str, str]) -> bool:
    if style.get("visibility") in ("hidden", "collapse"):
        return False
    if style.get("stroke", "none") not in _UNPAINTED:
        return True
    return style.get("fill") not in _UNPAINTED | _WHITE


# --------------------------------------------------------------------------- writing


def svg_text(strokes: Strokes, width: float = 2.0) -> str:
    """The sketch as an SVG document of the canvas, black lines ``width`` wide.

    Coordinates have three decimals, so that reading it gives the points back within 0.001.
    """
    lines = []
    for stroke in strokes:
        points = [f"{x:.3f},{y:.3f}" for x, y in stroke.tolist()]
        points += points[:1] if len(points) == 1 else []  # a dot: a line without length
        lines.append(f'<path d="M{" ".join(points)}"/>')
    side = f"{CANVAS:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" fill="none" '
        f'stroke="#000" stroke-width="{width:g}" stroke-linecap="round" stroke-linejoin="round">'
        f"{''.join(lines)}</svg>\n"
    )
