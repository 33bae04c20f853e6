"""The report in a real browser: it loads whole, alone, and fits the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page

from sbir_ray.certainty import certainty_deciles
from sbir_ray.evaluate import paired_difference, summarise
from sbir_ray.report import (
    Curve,
    PseudoExample,
    PseudoGallery,
    QueryExample,
    QueryGrid,
    ReportData,
    Result,
    Timing,
    write_report,
)
from sbir_ray.run_report import run_report
from sbir_ray.runlog import Ledger
from tests.joint_run import leave_exhibits, log_steps, make_joint_run

Scheme = Literal["light", "dark"]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Made-up data with long names, large numbers and every section."""
    rng = np.random.default_rng(0)
    rank_a, rank_b = rng.integers(1, 1500, 900), rng.integers(1, 2000, 900)
    photo_of = np.arange(900) // 3
    photos = rng.integers(0, 256, (6, 96, 128, 3), dtype=np.uint8)
    sketch = [rng.uniform(33, 223, (40, 2)).astype(np.float32), np.full((1, 2), 9, np.float32)]
    data = ReportData(
        title="The report of a run whose title is rather long for the width of a telephone",
        subtitle="made-up numbers",
        note="Nothing here was measured.\nIt is all made up.",
        results=[
            Result(name="supervised", metrics=summarise(rank_b, photo_of, 2000), labelled=1800),
            Result(
                name="semi-supervised with_a_long_name_of_its_own",
                metrics=summarise(rank_a, photo_of, 2000),
                labelled=1800,
                pseudo=1_250_000,
                difference=paired_difference(rank_a, rank_b, photo_of),
            ),
            Result(name="all", metrics=summarise(rank_a, photo_of, 2000), role="ceiling"),
        ],
        curves=[
            Curve(panel=panel, name=name, steps=range(1, 90), values=rng.random(89).tolist())
            for panel in ("Training loss", "Validation loss")
            for name in ("supervised", "semi-supervised")
        ],
        queries=QueryGrid(
            examples=[
                QueryExample(
                    sketch=sketch, name=f"s{rank}", photo=photos[5], rank=rank, top=list(photos[:5])
                )
                for rank in (1, 4, 1999)
            ],
            queries=900,
            found=300,
            gallery=2000,
            seed=0,
        ),
        pseudo=PseudoGallery(
            examples=[
                PseudoExample(
                    photo=photos[i], sketch=sketch, certainty=1 - i / 5, reason="no_end_was_drawn"
                )
                for i in range(6)
            ],
            total=1_250_000,
        ),
        deciles=certainty_deciles(rng.random(400), rng.integers(1, 3, 400)),
        ledgers=[
            (
                "Pseudo pairs",
                Ledger.from_json(
                    "pseudo",
                    {
                        "drawn": 1_250_000,
                        "kept": 1_249_990,
                        "filtered": {"certainty_below_threshold": 6},
                        "failed": {"out_of_memory": 4},
                    },
                    "",
                ),
            )
        ],
        timings=[
            Timing(stage="train", seconds=83.2, detail="240 steps"),
            Timing(stage="evaluate", seconds=9_000),
        ],
        facts={"digest": "0123456789ab" * 9},
        config={"optim": {"lr": 4e-4, "a_setting_with_a_rather_long_name": "x" * 90}},
        commands=["sbir-ray train semi pairs --pseudo " + "a/rather/long/path" * 9],
    )
    return write_report(tmp_path / "out", data)


@pytest.fixture
def joint_report(tmp_path: Path) -> Path:
    """Of a run of joint training, as it is written at its end but for an evaluation."""
    run = make_joint_run(tmp_path / "run")
    log_steps(run, 240)
    leave_exhibits(run)
    return write_report(run, run_report(run))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_alone_and_whole_and_fits_the_screen(
    browser: BrowserContext, report: Path, scheme: Scheme
) -> None:
    page = browser.new_page()
    open_alone(page, report, scheme, images=3 * 5 + 1 + 6)
    fits_the_screen(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_a_joint_run_loads_alone_and_whole_and_fits_the_screen(
    browser: BrowserContext, joint_report: Path, scheme: Scheme, tmp_path: Path
) -> None:
    page = browser.new_page()
    open_alone(page, joint_report, scheme, images=12 + 4 * 6 + 24)
    sections = page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == ["curves", "lessons", "looks", "pseudo", "stream", "again"]
    fits_the_screen(page)
    # On a telephone three of the five drawings of a photo are left, and they can be told apart.
    page.set_viewport_size({"width": 320, "height": 800})
    tiles = page.evaluate(
        "[...document.querySelector('#lessons tbody tr').querySelectorAll('.tile')]"
        ".map(t => t.getBoundingClientRect().width).filter(w => w > 0)"
    )
    assert len(tiles) == 4
    assert min(tiles) > 55
    # The looked-at line lies upon its photo.
    over, under = page.evaluate(
        "['svg', 'img'].map(tag => document.querySelector('#looks .tile ' + tag))"
        ".map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height])"
    )
    assert over == pytest.approx(under, abs=0.5)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.screenshot(path=tmp_path / "joint.png", full_page=True)
    with Image.open(tmp_path / "joint.png") as picture:
        assert picture.width == 1280
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 1000


def open_alone(page: Page, report: Path, scheme: Scheme, images: int) -> None:
    """Open the report and see that it asks for nothing, says nothing, and has its pictures."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.emulate_media(color_scheme=scheme)
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")

    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    found = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
    assert len(found) == images
    assert all(width > 0 and alt for width, alt in found)
    unnamed = "[...document.querySelectorAll('svg')].filter(s => !s.ariaHidden && !s.ariaLabel)"
    assert page.evaluate(f"{unnamed}.length") == 0
    captions = "[...document.querySelectorAll('table')].map(t => !!t.caption.textContent.trim())"
    assert all(page.evaluate(captions))
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(21, 22, 23)") == (scheme == "dark")
    assert said == []


def fits_the_screen(page: Page) -> None:
    """Nothing sticks out at any width."""
    for width in (320, 375, 700, 900, 1100, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        wide = page.evaluate(
            "[...document.body.querySelectorAll('*')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.outerHTML.slice(0, 80))"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (width, wide)
        assert wide == [], width


@pytest.mark.parametrize("name", ["report", "joint_report"])
def test_a_page_printed_from_the_dark_is_light(
    browser: BrowserContext, name: str, request: pytest.FixtureRequest
) -> None:
    report: Path = request.getfixturevalue(name)
    page = browser.new_page()
    page.emulate_media(color_scheme="dark", media="print")
    page.goto(report.as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 680, "height": 960})  # A4 less its margins, in CSS pixels.
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
