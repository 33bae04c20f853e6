"""The drawing page in a real browser: drawn on by mouse, finger and keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from playwright.sync_api import BrowserContext, Page, expect

from sbir_ray.data.formats import read_sketch
from sbir_ray.search.searcher import Searcher
from tests.serving import Serving
from tests.tiny import sketch
from tests.tiny_index import make, tiny_retrieval
from tests.tiny_store import tiny_store

COUNT = 9


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    folder = tmp_path_factory.mktemp("page")
    run = tiny_retrieval(folder / "run")
    return Searcher(make(tiny_store(folder / "store", COUNT), folder / "index", run))


@pytest.fixture
def page(browser: BrowserContext, searcher: Searcher) -> Iterator[Page]:
    """The page, which must say nothing on its console and ask nobody else."""
    said: list[str] = []
    asked: list[str] = []
    with Serving(searcher) as port:
        opened = browser.new_page()
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("request", lambda request: asked.append(request.url))
        opened.goto(f"http://127.0.0.1:{port}/")
        expect(opened.locator("#status")).to_have_text("Draw something.")
        yield opened
        opened.close()
        own = (f"http://127.0.0.1:{port}/", "blob:", "data:")
        assert [url for url in asked if not url.startswith(own)] == []
    assert said == []


def place(page: Page, x: float, y: float) -> tuple[float, float]:
    """Where a point of the canvas is in the window."""
    box = page.locator("#paper").bounding_box()
    assert box is not None
    return box["x"] + x / 256 * box["width"], box["y"] + y / 256 * box["height"]


def draw(page: Page, strokes: Any) -> None:
    for stroke in strokes:
        points = [place(page, x, y) for x, y in stroke.tolist()]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


def shown(page: Page, strokes: int) -> list[str | None]:
    """The photos, once they are those of so many strokes."""
    word = "stroke" if strokes == 1 else "strokes"
    expect(page.locator("#status")).to_have_text(
        re.compile(rf"{strokes} {word}, {COUNT} photos compared in \d+ ms\.")
    )
    return [b.get_attribute("data-id") for b in page.locator("#found button").all()]


def found(searcher: Searcher, strokes: Any) -> list[str]:
    return [hit.photo_id for hit in searcher.find(searcher.raster_of(strokes), COUNT)]


def test_a_drawing_shows_the_nearest_photos(page: Page, searcher: Searcher, tmp_path: Path) -> None:
    draw(page, sketch(3))
    ids = shown(page, 2)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save SVG").click()
    saved.value.save_as(tmp_path / "drawing.svg")
    # The mouse moves by whole pixels, so what was drawn is what was saved.
    strokes = read_sketch(tmp_path / "drawing.svg")
    assert [len(stroke) for stroke in strokes] == [len(stroke) for stroke in sketch(3)]
    assert set(ids) == set(found(searcher, strokes))
    assert ids[:3] == found(searcher, strokes)[:3]
    first = page.locator("#found img").first
    assert first.evaluate("image => image.complete && image.naturalWidth") > 0
    assert page.locator("#found .moved", has_text=re.compile("▲|▼|new")).count() > 0


def test_strokes_are_taken_back_and_brought_again(page: Page) -> None:
    undo, redo = (page.get_by_role("button", name=name) for name in ("Undo", "Redo"))
    clear = page.get_by_role("button", name="Clear")
    for button in (undo, redo, clear):
        expect(button).to_be_disabled()
    strokes = sketch(5)
    draw(page, strokes[:1])
    one = shown(page, 1)
    draw(page, strokes[1:])
    two = shown(page, 2)
    undo.click()
    assert shown(page, 1) == one
    page.keyboard.press("Control+y")
    assert shown(page, 2) == two
    page.keyboard.press("Control+z")
    assert shown(page, 1) == one
    redo.click()
    shown(page, 2)
    page.keyboard.press("Delete")
    expect(page.locator("#status")).to_have_text("Draw something.")
    expect(page.locator("#found button")).to_have_count(0)
    redo.click()
    assert shown(page, 1) == one
    # A reloaded page still has the drawing.
    page.reload()
    assert shown(page, 1) == one


def test_a_photo_tells_which_stroke_moved_it(page: Page, searcher: Searcher) -> None:
    draw(page, sketch(7))
    shown(page, 2)
    photo = page.locator('#found button[data-id="photo07"]')
    photo.click()
    expect(photo).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#ranks button")).to_have_count(2)
    ranks = [int(text) for text in page.locator("#ranks button").all_inner_texts()]
    order = [b.get_attribute("data-id") for b in page.locator("#found button").all()]
    assert ranks[-1] == order.index("photo07") + 1
    undo = page.get_by_role("button", name="Undo")
    undo.click()
    expect(page.locator("#ranks button")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#story")).to_be_hidden()


def test_the_keyboard_draws(page: Page, searcher: Searcher) -> None:
    page.locator("#paper").focus()
    for key in (" ", *["ArrowRight"] * 9, *["Shift+ArrowDown"] * 2, " "):
        page.keyboard.press(key)
    ids = shown(page, 1)
    corner = [[128 + 4 * i, 128] for i in range(10)] + [[164, 144], [164, 160]]
    assert ids == found(searcher, [np.float32(corner)])
    page.keyboard.press(" ")
    page.keyboard.press(" ")  # a dot
    shown(page, 2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(360, 740), (1280, 800)])
def test_it_fits_the_screen(
    page: Page, size: tuple[int, int], scheme: Literal["light", "dark"]
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    draw(page, sketch(1))
    shown(page, 2)
    page.locator("#found button").nth(2).click()
    expect(page.locator("#story")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    for button in page.locator(".tools button").all():
        box = button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark)[:3])) < 60) == (scheme == "dark")


def test_a_finger_draws_and_does_not_scroll(browser: BrowserContext, searcher: Searcher) -> None:
    with Serving(searcher) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        wire = browser.new_cdp_session(page)
        wire.send("Emulation.setTouchEmulationEnabled", {"enabled": True})

        def touch(kind: str, *points: tuple[float, float]) -> None:
            touches = [{"x": x, "y": y} for x, y in points]
            wire.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})

        touch("touchStart", place(page, 60, 60))
        for step in range(1, 9):
            touch("touchMove", place(page, 60 + 10 * step, 60 + 12 * step))
        touch("touchEnd")
        assert len(shown(page, 1)) == COUNT
        assert page.evaluate("scrollY") == 0
        page.close()


def test_a_server_that_is_gone_is_told(browser: BrowserContext, searcher: Searcher) -> None:
    with Serving(searcher) as port:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        expect(page.locator("#status")).to_have_text("Draw something.")
    draw(page, sketch(2))
    expect(page.locator("#status")).to_have_text("The server does not answer; is it still running?")
    page.close()
