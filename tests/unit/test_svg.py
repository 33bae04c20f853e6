from __future__ import annotations

import builtins
import io
import socket

import numpy as np
import pytest
import resvg_py
from PIL import Image, ImageDraw

from sbir_ray.data import svg
from sbir_ray.errors import UserError

NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


def document(body: str, attributes: str = 'viewBox="0 0 100 100"') -> bytes:
    return f"<svg {NAMESPACES} {attributes}>{body}</svg>".encode()


def read(body: str) -> list[list[list[float]]]:
    return [stroke.tolist() for stroke in svg.read_svg(document(body), "a.svg")]


SHAPES = {
    "cubic": '<path d="M10 80C40 10 65 10 95 80S50 95 10 80z"/>',
    "relative cubic": '<path d="m10,80 c30-70,55-70,85,0 s-45,15-85,0 z"/>',
    "quadratic": '<path d="M10 80Q52 10 95 80T40 95z"/>',
    "relative quadratic": '<path d="m10 80q42-70 85 0t-55 15z"/>',
    "small arc": '<path d="M20 20A40 25 30 0 1 80 40L20 90z"/>',
    "large arc": '<path d="M40 40A30 20 -25 1 1 60 50z"/>',
    "large arc the other way": '<path d="M40 40a30 20 -25 1 0 20 10z"/>',
    "small arc the other way": '<path d="M20 50a40 25 30 0 0 60 10z"/>',
    "arc too small for its ends": '<path d="M10 50A5 3 20 0 1 90 60z"/>',
    "arc with unparted flags": '<path d="M20 50a40,25 30 0160-20l0 40z"/>',
    "steps": '<path d="M10 10H60v30h30V90H10z"/>',
    "subpaths": '<path d="M10 10h30v30h-30zm50 50h30v30h-30zl10-10h20z"/>',
    "lines after a move": '<path d="M10 10 90 20 80 90"/>',
    "exponents": '<path d="M1e1,1.E1L9.0e+1.9e2-0 90z"/>',
    "polygon": '<polygon points="10,10 90,30 50,90"/>',
    "rectangle": '<rect x="10" y="20" width="70" height="50"/>',
    "rounded rectangle": '<rect x="10" y="20" width="70" height="50" rx="10" ry="25"/>',
    "rounded by one radius": '<rect x="10" y="20" width="70" height="50" rx="40"/>',
    "circle": '<circle cx="50" cy="40" r="30"/>',
    "ellipse": '<ellipse cx="50" cy="40" rx="40" ry="20" transform="rotate(30 50 40)"/>',
    "transforms": (
        '<g transform="translate(20,10) scale(.5 .8)"><g transform="skewX(20)skewY(-10)">'
        '<rect width="90" height="60" transform="matrix(.9 .1 -.2 1 5 6)"/></g></g>'
    ),
    "use": (
        '<defs><path id="p" d="M0 0h30v40z"/></defs><use xlink:href="#p" x="10" y="20"/>'
        '<use href="#p" transform="translate(60 60) rotate(90)"/>'
    ),
    "symbol": (
        '<symbol id="s"><circle cx="20" cy="20" r="20"/></symbol><use href="#s" x="40" y="50"/>'
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outlines_cover_what_a_renderer_fills(name: str) -> None:
    size = 400
    png = resvg_py.svg_to_bytes(
        svg_string=document(SHAPES[name]).decode(), width=size, height=size, background="#fff"
    )
    filled = np.asarray(Image.open(io.BytesIO(png)).convert("L")) < 128
    mask = Image.new("L", (size, size))
    for stroke in svg.read_svg(document(SHAPES[name]), "a.svg"):
        ImageDraw.Draw(mask).polygon([(x * 4 - 0.5, y * 4 - 0.5) for x, y in stroke.tolist()], 255)
    ours = np.asarray(mask) > 0
    assert filled.sum() > 1000
    assert (filled & ours).sum() / (filled | ours).sum() > 0.97


def test_curves_are_cut_finely_enough_and_no_finer_whatever_the_units() -> None:
    for scale in (0.001, 1.0, 1000.0):
        (circle,) = svg.read_svg(document(f'<circle r="{100 * scale}"/>'), "a.svg")
        middles = (circle[1:] + circle[:-1]) / 2
        assert 1 - np.hypot(*middles.T).min() / (100 * scale) < 2.2 * svg.TOLERANCE
        assert 25 < len(circle) < 60


def test_a_straight_curve_becomes_one_line() -> None:
    assert read('<path d="M0 0C10 10 20 20 30 30"/>') == [[[0, 0], [30, 30]]]


def test_a_line_a_polyline_and_a_dot_are_read() -> None:
    body = '<line x1="1" y1="2" x2="3px"/><polyline points="1 1 2,2,3 1"/><path d="M5 5l0 0M9 9"/>'
    assert read(body) == [[[1, 2], [3, 0]], [[1, 1], [2, 2], [3, 1]], [[5, 5]]]


def test_only_what_is_painted_and_visible_counts() -> None:
    body = (
        '<rect width="100%" height="100%" fill="white"/>'
        '<path d="M1 1h9" fill="none"/>'
        '<g fill="none" stroke="black"><path d="M2 2h9"/><path d="M3 3h9" style="stroke:none"/></g>'
        '<path d="M4 4h9" display="none"/><g style="display: none"><path d="M5 5h9"/></g>'
        '<g visibility="hidden"><path d="M6 6h9"/><path d="M7 7h9" visibility="visible"/></g>'
        '<clipPath><path d="M8 8h9"/></clipPath><title>a</title><style>.a{fill:red}</style>'
    )
    assert [stroke[0] for stroke in read(body)] == [[2, 2], [7, 7]]


def test_a_document_type_line_of_a_drawing_program_is_read() -> None:
    line = b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://w3.org/svg11.dtd">'
    strokes = svg.read_svg(line + document('<path d="M0 0h1"/>'), "a.svg")
    assert strokes[0].tolist() == [[0, 0], [1, 0]]


def test_outlines_can_be_taken_from_one_group_with_the_transforms_around_it() -> None:
    body = '<path d="M0 0h1"/><g transform="scale(2)"><g id="line"><path d="M1 1h1"/></g></g>'
    root = svg.parse_svg(document(body), "a.svg")
    assert [s.tolist() for s in svg.outlines(root, "a", "line".__eq__)] == [[[2, 2], [4, 2]]]
    assert svg.outlines(root, "a", "other".__eq__) == []


def test_svg_text_is_drawn_by_a_renderer_where_the_points_are() -> None:
    strokes = [np.array([[20, 30], [220, 30]], np.float32), np.array([[128, 200]], np.float32)]
    png = resvg_py.svg_to_bytes(svg_string=svg.svg_text(strokes, width=4), background="#fff")
    ink = np.asarray(Image.open(io.BytesIO(png)).convert("L")) < 128
    assert ink.shape == (256, 256)
    assert ink[30, 20:220].all()
    assert ink[200, 128]
    assert not ink[100].any()


# ------------------------------------------------------------------ hostile files


def _laughs() -> bytes:
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    return f'<!DOCTYPE svg [<!ENTITY l0 "ha">{entities}]>'.encode() + document("&l9;")


def _chain(links: int, copies: int) -> bytes:
    parts = ['<path id="u0" d="M0 0l1 1"/>']
    for i in range(1, links):
        parts.append(f'<g id="u{i}">{f"""<use xlink:href="#u{i - 1}"/>""" * copies}</g>')
    return document("".join(parts))


HOSTILE = {
    "billion laughs": (_laughs(), "DTD"),
    "external entity": (
        b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + document("<desc>&x;</desc>"),
        "DTD",
    ),
    "external DTD": (b'<!DOCTYPE svg SYSTEM "http://evil.invalid/a.dtd">' + document(""), "DTD"),
    "image in a file": (document('<image href="file:///etc/passwd"/>'), "<image>"),
    "image on the net": (document('<image xlink:href="http://evil.invalid/"/>'), "<image>"),
    "use of another file": (document('<use href="http://evil.invalid/a.svg#b"/>'), "outside"),
    "script": (document("<script>alert(1)</script>"), "<script>"),
    "use of itself": (document('<g id="a"><use href="#a"/></g>'), "nested deeper than 64"),
    "use chain": (_chain(12, 10), "more than 2000 strokes"),
    "use chain of nothing": (_chain(12, 10).replace(b"<path ", b"<desc "), "20000 elements"),
    "use of a long path": (
        document(f'<path id="p" d="M0 0{"l1 1" * 9000}"/>' + '<use href="#p"/>' * 900),
        "more than 50000 points",
    ),
    "deep nesting": (document("<g>" * 100_000), "nested deeper than 64"),
    "many elements": (document("<g/>" * 100_000), "more than 20000 elements"),
    "ten million points": (document(f'<path d="M0 0{"l1 1" * 10_000_000}"/>'), "4194304 bytes"),
    "long path": (document(f'<path d="M0 0{"l1 1" * 200_000}"/>'), "524288 characters"),
    "short commands": (document(f'<path d="M0 0{"h1" * 200_000}"/>'), "50000 commands"),
    "closed again and again": (document(f'<path d="M0 0{"z" * 500_000}"/>'), "50000 commands"),
    "many numbers": (document(f'<polyline points="{"1 " * 200_000}"/>'), "50000 points"),
    "many curves": (document(f'<path d="M0 0{"C0 9e3 9e3 9e3 0 0" * 9000}"/>'), "50000 points"),
    "blanks": (document(f'<path d="M0 0{" " * 500_000}x"/>'), "a path has"),
    "long number": (document(f'<path d="M0 {"1" * 500_000}"/>'), "not a number"),
    "long radius": (document(f'<circle r="{"1" * 500_000}x"/>'), "not a number"),
    "nan": (document('<path d="M0 nan"/>'), "lacks numbers"),
    "nan radius": (document('<circle r="nan"/>'), "'nan' is not a number"),
    "1e308": (document('<path d="M0 0L1e308 1e308"/>'), r"not within \+-1000000"),
    "1e999": (document('<path d="M0 0L1e999 1"/>'), r"not within \+-1000000"),
    "huge by scale": (document('<path transform="scale(1e6)" d="M9 9h9"/>'), r"\+-1000000"),
    "infinite by scale": (
        document('<g transform="scale(1e6)">' * 60 + '<path d="M1 1h1"/>' + "</g>" * 60),
        r"transform is not within",
    ),
    "50 MB": (b" " * 50_000_000, "4194304 bytes"),
    "unknown transform": (document('<g transform="turn(1)"/>'), "transform turn"),
    "unclosed transforms": (document(f'<g transform="{"scale(" * 50_000}"/>'), "not a transform"),
    "text": (document("<text>a</text>"), "text is not read"),
    "cut off": (document("<g>")[:-4], "well-formed"),
    "not svg": (b"<html/>", "not <svg>"),
    "not xml": (b"\x89PNG\r\n", "well-formed"),
    "odd encoding": (b'<?xml version="1.0" encoding="utf-7"?><svg/>', "well-formed"),
    "empty": (b"", "well-formed"),
    "nothing drawn": (document("<g/>"), "no points"),
}


@pytest.mark.timeout(20)  # each takes less than a second; without its limit, minutes
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_a_hostile_file_ends_at_once_in_an_error_that_names_the_limit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"opened {args}")

    data, says = HOSTILE[name]
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", forbidden)
        patch.setattr(socket, "socket", forbidden)
        with pytest.raises(UserError, match=says) as caught:
            svg.read_svg(data, "a.svg")
    assert str(caught.value).startswith("a.svg: ")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    ["l 1 1", "M 1 1 L 2", "M1 1 a 1 1 0 2 0 3 3", "M1 1 x", "M1 1 c 1 1 2", "M1 1 1e 3"],
)
def test_a_malformed_path_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="path"):
        read(f'<path d="{data}"/>')
