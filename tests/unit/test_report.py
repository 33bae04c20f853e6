from __future__ import annotations

import base64
import dataclasses
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sbir_ray import plots
from sbir_ray.certainty import Decile, certainty_deciles, pick_evenly
from sbir_ray.data.pairs import PairSet
from sbir_ray.evaluate import Difference, Evaluation, Metrics, paired_difference, summarise
from sbir_ray.report import (
    Curve,
    PseudoExample,
    PseudoGallery,
    QueryExample,
    QueryGrid,
    ReportData,
    Result,
    Timing,
    headline,
    pick_queries,
    query_grid,
    render,
    write_report,
)
from sbir_ray.runlog import Ledger


def metrics(share: float = 0.4, gallery: int = 30) -> Metrics:
    rank = np.where(np.arange(60) < share * 60, 1, np.arange(60) % (gallery - 1) + 2)
    return summarise(rank, np.arange(60) // 2, gallery)


def difference(low: float, value: float, high: float) -> Difference:
    return {
        "difference": {"acc@1": value, "acc@10": value},
        "ci95": {"acc@1": [low, high], "acc@10": [low, high]},
    }


def compared(low: float, value: float, high: float) -> ReportData:
    return ReportData(
        title="t",
        results=[
            Result(name="supervised", metrics=metrics()),
            Result(name="semi", metrics=metrics(0.5), difference=difference(low, value, high)),
        ],
    )


def photo(seed: int, side: int = 128) -> Any:
    """Smooth, as product photos are."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def sketch(seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(33, 223, (25, 2)).astype(np.float32) for _ in range(4)]


def full() -> ReportData:
    """A report of everything, of the size of a typical one."""
    rng = np.random.default_rng(0)
    rank_a, rank_b = rng.integers(1, 20, 90), rng.integers(1, 30, 90)
    photo_of = np.arange(90) // 3
    certainty = np.sort(rng.random(200))[::-1]
    return ReportData(
        title="A report",
        subtitle="made-up numbers",
        note="Nothing here was measured.",
        results=[
            Result(name="supervised", metrics=summarise(rank_b, photo_of, 30), labelled=40),
            Result(
                name="semi",
                metrics=summarise(rank_a, photo_of, 30),
                labelled=40,
                pseudo=200,
                difference=paired_difference(rank_a, rank_b, photo_of),
            ),
            Result(name="all labels", metrics=metrics(0.9), role="ceiling"),
        ],
        curves=[
            Curve(panel="Loss", name=name, steps=range(240), values=rng.random(240).tolist())
            for name in ("supervised", "semi")
        ]
        + [Curve(panel="acc@1", name="semi", steps=[80, 160], values=[0.2, 0.4], percent=True)],
        queries=QueryGrid(
            examples=[
                QueryExample(
                    sketch=sketch(i),
                    name=f"chair_{i}",
                    photo=photo(i),
                    rank=rank,
                    top=[photo(100 * i + k) for k in range(5)],
                )
                for i, rank in enumerate([1] * 6 + [2, 3, 5, 6, 17, 1234])
            ],
            queries=90,
            found=31,
            gallery=2000,
            seed=0,
        ),
        pseudo=PseudoGallery(
            examples=[
                PseudoExample(photo=photo(i), sketch=sketch(i), certainty=float(certainty[i]))
                for i in pick_evenly(certainty)
            ],
            total=200,
            sketcher="contours",
        ),
        deciles=certainty_deciles(certainty, rng.integers(1, 3, 200)),
        ledgers=[
            (
                "Photos",
                Ledger.from_json(
                    "photos",
                    {
                        "read": 212,
                        "stored": 200,
                        "duplicate": 5,
                        "leaked": 1,
                        "rejected": {"too small": 4},
                        "failed": {"truncated": 2},
                    },
                    "",
                ),
            ),
            (
                "Pseudo pairs",
                Ledger.from_json(
                    "pseudo", {"drawn": 200, "kept": 200, "filtered": {}, "failed": {}}, ""
                ),
            ),
        ],
        timings=[Timing(stage="train", seconds=83.2, detail="240 steps")],
        facts={"seed": "7", "digest": "0123456789ab"},
        config={"seed": 7, "optim": {"lr": 4e-4}},
        commands=["sbir-ray demo --seed 7"],
    )


def test_the_headline_gives_the_difference_whatever_its_sign() -> None:
    assert headline(compared(-0.01, 0.031, 0.072)) == (
        "The unlabelled photos changed acc@1 by +3.1 points "
        "(95% interval −1.0 to +7.2): not distinguishable from none."
    )
    assert "+3.1 points (95% interval +0.4 to +7.2): a gain" in headline(
        compared(0.004, 0.031, 0.072)
    )
    assert "−5.0 points (95% interval −9.0 to −1.0): a loss" in headline(
        compared(-0.09, -0.05, -0.01)
    )
    assert "by 0.0 points (95% interval 0.0 to 0.0): not distinguishable" in headline(
        compared(0.0, -0.0, 0.0)
    )


def test_the_ceiling_is_never_the_headline() -> None:
    data = compared(-0.01, 0.031, 0.072)
    ceiling = dataclasses.replace(
        data.results[1], difference=difference(0.2, 0.3, 0.4), role="ceiling"
    )
    with_ceiling = dataclasses.replace(data, results=[ceiling, *data.results])
    assert headline(with_ceiling) == headline(data)


def test_without_a_comparison_the_headline_is_the_accuracy_with_chance() -> None:
    data = ReportData(title="t", results=[Result(name="test", metrics=metrics(0.4))])
    assert re.fullmatch(
        r"test: 40\.0% of 60 sketches find their photo first among 30 "
        r"\(95% interval \d\d\.\d to \d\d\.\d; chance 3\.3%\)\.",
        headline(data),
    )


def test_a_section_is_shown_only_when_there_is_data() -> None:
    bare = render(ReportData(title="t", results=[Result(name="a", metrics=metrics())]))
    everything = render(full())
    sections = re.findall(r'<section id="(\w+)"', everything)
    assert sections == ["accuracy", "curves", "queries", "pseudo", "ledger", "timings", "again"]
    assert re.findall(r'href="#(\w+)"', everything)[: len(sections)] == sections
    assert re.findall(r'<section id="(\w+)"', bare) == ["accuracy"]
    assert "labelled photos" not in bare.partition("<body>")[2]
    assert "change of" not in bare.partition("<body>")[2]


def test_the_table_has_a_chance_row_and_a_ceiling_row() -> None:
    page = render(full())
    names = re.findall(r'role="rowheader">([^<]*)', page)
    assert names == ["chance", "supervised", "semi", "all labels"]


def test_a_report_needs_a_result() -> None:
    with pytest.raises(ValueError, match="at least one result"):
        render(ReportData(title="t", results=[]))


def test_the_page_asks_nothing_of_the_network_and_runs_no_script() -> None:
    page = render(full())
    assert not re.search(r"https?:|//[\w.]+\.\w|@import|url\((?!#)|<script", page)
    assert all(
        source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)', page)
    )


def test_ids_in_the_page_are_unique() -> None:
    ids = re.findall(r'\bid="([^"]+)"', render(full()))
    assert len(ids) == len(set(ids))


def test_a_typical_report_is_below_3_megabytes_and_the_same_each_time(tmp_path: Path) -> None:
    first = write_report(tmp_path / "new" / "folder", full())
    assert first == tmp_path / "new" / "folder" / "report.html"
    assert first.stat().st_size < 3_000_000
    assert first.read_text() == render(full())


def test_names_cannot_inject_markup() -> None:
    bad = '<script>alert("x")</script>'
    data = full()
    page = render(
        dataclasses.replace(
            data,
            title=bad,
            note=bad,
            baseline=bad,
            results=[dataclasses.replace(data.results[0], name=bad)],
            curves=[Curve(panel=bad, name=bad, steps=[1], values=[1])],
            config={bad: bad},
            facts={bad: bad},
            commands=[bad],
        )
    )
    assert "<script" not in page


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    out = write_report(tmp_path, full())
    before = out.read_bytes()
    with pytest.raises(ValueError, match="at least one"):
        write_report(tmp_path, ReportData(title="t", results=[]))
    assert out.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]


def test_text_has_enough_contrast_in_both_modes() -> None:
    style = render(full()).partition("</style>")[0]
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.S)[:2]
    assert len(blocks) == 2
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for text in ("ink", "soft", "accent"):
            assert contrast(colour[text], colour["page"]) >= 4.5
        for text, ground in (("accent", "accent-wash"), ("miss", "miss-wash"), ("ink", "card")):
            assert contrast(colour[text], colour[ground]) >= 4.5
        for i in range(plots.COLOURS):
            assert contrast(colour[f"line-{i + 1}"], colour["page"]) >= 3


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# --------------------------------------------------------------------------- samples


def test_queries_are_drawn_at_random_from_successes_and_failures() -> None:
    rank = np.where(np.arange(200) % 2 == 0, 1, np.arange(200))
    rank[1] = 2
    chosen = pick_queries(rank, each=6, seed=0)
    found, missed = chosen[:6], chosen[6:]
    assert all(rank[i] == 1 for i in found)
    assert [rank[i] for i in missed] == sorted(rank[i] for i in missed)
    assert all(rank[i] > 1 for i in missed)
    assert len(set(chosen)) == 12
    assert pick_queries(rank, each=6, seed=0) == chosen
    # Not the easiest failures: over seeds, any failure is shown about equally often.
    mean = np.mean([rank[pick_queries(rank, each=6, seed=s)[6:]].mean() for s in range(200)])
    assert mean == pytest.approx(rank[rank > 1].mean(), rel=0.1)


def test_there_may_be_fewer_successes_or_failures_than_asked_for() -> None:
    assert pick_queries([1, 1, 5], each=6) in ([0, 1, 2], [1, 0, 2])
    assert pick_queries([3, 2], each=1) in ([0], [1])


def test_pseudo_pairs_are_picked_evenly_from_the_best_to_the_worst() -> None:
    certainty = np.random.default_rng(0).permutation(np.linspace(0, 1, 101))
    shown = certainty[pick_evenly(certainty, 11)]
    assert shown == pytest.approx(np.linspace(1, 0, 11))
    assert pick_evenly([0.2, 0.9], 24) == [1, 0]
    assert pick_evenly([], 24) == []


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_deciles_divide_all_pairs_in_the_order_of_certainty(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    certainty, rank = rng.random(count), rng.integers(1, 3, count)
    deciles = certainty_deciles(certainty, rank)
    assert len(deciles) == min(10, count)
    assert sum(d.count for d in deciles) == count
    assert sum(d.found * d.count for d in deciles) == pytest.approx((rank == 1).sum())
    means = [d.certainty for d in deciles]
    assert means == sorted(means, reverse=True)
    assert max(d.count for d in deciles) - min(d.count for d in deciles) <= 1
    for d, below in pairwise(deciles):
        assert d.low <= d.certainty <= d.high
        assert below.high <= d.low


def test_no_pseudo_pairs_make_no_deciles() -> None:
    assert certainty_deciles([], []) == []
    assert certainty_deciles([0.5], [1]) == [
        Decile(certainty=0.5, low=0.5, high=0.5, count=1, found=1.0, found10=1.0, median_rank=1.0)
    ]


def test_a_decile_counts_the_first_and_the_first_ten() -> None:
    low, high = np.linspace(0.1, 0.4, 10), np.linspace(0.9, 0.6, 10)
    ranks = [11, 1, 50, 10, 2, 1, 12, 99, 1, 3, *[1] * 9, 10]
    first, *_, last = certainty_deciles([*low, *high], ranks)
    assert (first.count, first.found, first.found10, first.median_rank) == (2, 1.0, 1.0, 1.0)
    assert (last.low, last.high) == pytest.approx((0.1, 0.1 + 0.3 / 9))
    assert (last.found, last.found10, last.median_rank) == (0.5, 0.5, 6.0)


def test_the_grid_shows_what_the_evaluation_found() -> None:
    photos = np.stack([photo(i, 16).transpose(2, 0, 1) for i in range(3)])
    pairs = PairSet(
        split="test",
        photo_ids=["a", "b", "c"],
        names=["a", "b", "c"],
        photos=photos,
        sketch_ids=["a_1", "b_1"],
        sketches=[sketch(0), sketch(1)],
        drawings=[None, None],
        photo_of=np.array([0, 1]),
    )
    evaluation = Evaluation(
        metrics=summarise(np.array([1, 3]), [0, 1], 4),
        per_query=[
            {"sketch_id": "a_1", "photo": "a", "rank": 1, "top": ["a", "extra", "b", "c"]},
            {"sketch_id": "b_1", "photo": "b", "rank": 3, "top": ["c", "a", "b", "extra"]},
        ],
    )
    extra = photo(9, 16)
    grid = query_grid(evaluation, pairs, {"extra": extra.transpose(2, 0, 1)})
    assert (grid.queries, grid.found, grid.gallery) == (2, 1, 4)
    first, second = grid.examples
    assert (first.name, first.rank, second.name, second.rank) == ("a_1", 1, "b_1", 3)
    assert (first.top[1] == extra).all()
    assert (second.photo == photo(1, 16)).all()
    assert (second.top[2] == second.photo).all()


def test_the_right_photo_is_framed_once_for_each_query() -> None:
    page = render(full())
    assert page.count('<div class="true">') == 12
    assert page.count("The right photo, found at place") == 3
    assert "6 of the 31 sketches that found their photo first" in page
    assert "and 6 of the 59 that did not" in page


# --------------------------------------------------------------------------- pictures


def drawn(path: str) -> list[list[tuple[int, int]]]:
    """The points of an SVG path of relative moves and lines."""
    strokes: list[list[tuple[int, int]]] = []
    at = (0, 0)
    for command, text in re.findall(r"([mlh])([^mlh]*)", path):
        numbers = [int(n) for n in re.findall(r"-?\d+", text)]
        if command == "h":
            assert numbers == [0]
            continue
        for x, y in zip(numbers[::2], numbers[1::2], strict=True):
            at = (at[0] + x, at[1] + y)
            if command == "m":
                strokes.append([at])
            else:
                strokes[-1].append(at)
    return strokes


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 256), st.floats(0, 256)), min_size=1, max_size=9),
        min_size=1,
        max_size=4,
    )
)
def test_a_sketch_path_passes_through_the_rounded_points(strokes: list[Any]) -> None:
    path = plots.sketch_path([np.array(s, dtype=np.float32) for s in strokes])
    expected = []
    for stroke in strokes:
        rounded = [tuple(p) for p in np.rint(np.array(stroke, dtype=np.float32)).astype(int)]
        expected.append([p for i, p in enumerate(rounded) if i == 0 or p != rounded[i - 1]])
    assert drawn(path) == expected


def test_a_photo_becomes_a_small_picture_of_the_same_colours() -> None:
    rgb = np.zeros((300, 150, 3), dtype=np.uint8)
    rgb[:] = (200, 30, 60)
    head, _, body = plots.photo_uri(rgb).partition(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert image.size == (plots.THUMBNAIL // 2, plots.THUMBNAIL)
    assert np.abs(np.asarray(image.convert("RGB")).mean((0, 1)) - (200, 30, 60)).max() < 6


def test_a_long_curve_is_thinned_without_changing_its_mean() -> None:
    steps, values = np.arange(3000.0), np.random.default_rng(0).random(3000)
    thin_steps, thin_values = plots.thin(steps, values)
    assert len(thin_steps) <= plots.MAX_POINTS
    assert thin_values.mean() == pytest.approx(values.mean())
    assert (plots.thin(steps[:9], values[:9])[1] == values[:9]).all()


def test_a_curve_takes_its_colours_from_the_page() -> None:
    lines = [plots.Line(i, np.arange(3.0), np.array([1.0, np.nan, 2.0])) for i in range(6)]
    svg = plots.curve_panel("Loss", lines, percent=False)
    assert svg.startswith("<svg ")
    assert "width=" not in svg[: svg.index(">")]
    assert "viewBox" in svg[: svg.index(">")]
    assert not re.search(r"#0102|<style|metadata|DejaVu", svg)
    assert {f"var(--line-{i})" for i in range(1, 6)} <= set(re.findall(r"var\([\w-]+\)", svg))
