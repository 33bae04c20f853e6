"""Other thresholds choose among the drawings of a PSEUDO folder as drawing with them would have."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sbir_ray.config import FilterConfig, RetrievalTraining, SketchConfig
from sbir_ray.data import photos
from sbir_ray.data.strokes import flatten
from sbir_ray.errors import UserError
from sbir_ray.runlog import Ledger
from sbir_ray.stream.filters import choose
from sbir_ray.stream.pseudo_store import PSEUDO_SCHEMA, PseudoSet
from sbir_ray.stream.sketchers import Drawn
from sbir_ray.strict import SCHEMA_VERSION, to_dict
from sbir_ray.train.thresholds import choice_for
from tests.tiny import photo, sketch

SAMPLES = 2


def drawings(ranked):
    """Two drawings of each of six photos, and a photo that could not be drawn."""
    rng = np.random.default_rng(0)
    for number in range(6):
        yield (
            f"photo{number}",
            [
                Drawn(
                    sketch(number, hand),
                    float(rng.random()),
                    float(rng.uniform(-80, 0)),
                    bool(rng.random() < 0.7),
                    20,
                    int(rng.integers(1, 9)) if ranked else 0,
                    float(rng.random()) if ranked else 0.0,
                )
                for hand in range(SAMPLES)
            ],
        )


def store(folder, ranked=True, filters=None):
    """A PSEUDO folder as `sketch` writes it."""
    settings = SketchConfig(samples=SAMPLES, filters=filters or FilterConfig())
    rows = []
    ledger = Ledger("pseudo", 7 * SAMPLES)
    for number, (name, drawn) in enumerate(drawings(ranked)):
        image = photos.row_of_pixels(photo(number), name)["image"]
        reasons = choose(drawn, settings.filters, settings.keep)
        for sample, (one, reason) in enumerate(zip(drawn, reasons, strict=True)):
            status = "filtered" if reason else "kept"
            ledger.add(status, reason)
            row = dict.fromkeys(PSEUDO_SCHEMA.names)
            names = ("certainty", "log_prob", "ended", "rows", "rank", "similarity")
            row |= {key: getattr(one, key) for key in names}
            # Seeds are not in the order of the samples.
            row |= {"photo_id": name, "image": image, "sample": sample, "seed": 90 - sample}
            row |= {"strokes": flatten(one.strokes), "kept": not reason}
            rows.append({**row, "status": status, "reason": reason})
    for sample in range(SAMPLES):
        ledger.add("failed", "damaged-photo")
        row = dict.fromkeys(PSEUDO_SCHEMA.names)
        row |= {"photo_id": "photo6", "image": b"", "strokes": [], "seed": sample, "kept": False}
        rows.append({**row, "sample": sample, "status": "failed", "reason": "damaged-photo"})
    (folder / "round-0000").mkdir(parents=True)
    table = pa.Table.from_pylist(rows[::-1], schema=PSEUDO_SCHEMA)
    pq.write_table(table, folder / "round-0000" / "part-000000.parquet")
    header = {
        "schema_version": SCHEMA_VERSION,
        "kind": "pseudo",
        "sketcher": "generator",
        "teacher_digest": "t" if ranked else None,
        "settings": to_dict(settings),
        "ledger": ledger.to_json(),
    }
    (folder / "pseudo.json").write_text(json.dumps(header))
    return folder


def chosen_pairs(folder, side, filters, samples=0):
    config = RetrievalTraining(filters=filters, samples=samples)
    return PseudoSet.load(folder, side, choice=choice_for(folder, config))


def same(a, b):
    assert a.photo_ids == b.photo_ids
    assert np.array_equal(a.photos, b.photos)
    assert np.array_equal(a.photo_of, b.photo_of)
    assert np.array_equal(a.certainty, b.certainty)
    for mine, other in zip(a.sketches, b.sketches, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(mine, other, strict=True))


@pytest.mark.parametrize(
    "filters",
    [
        FilterConfig(min_certainty=0.4),
        FilterConfig(min_log_prob=-2.0),
        FilterConfig(require_end=True),
        FilterConfig(max_rank=4),
        FilterConfig(min_points=7, max_ink=0.9),
    ],
)
def test_other_thresholds_choose_as_if_drawn_with_them(tmp_path, filters):
    # Drawn with stricter filters: what they turned away may come in again.
    folder = store(tmp_path / "strict", filters=FilterConfig(min_certainty=0.9))
    expected = PseudoSet.load(store(tmp_path / "expected", filters=filters), 32)
    found = chosen_pairs(folder, 32, filters)
    same(found, expected)
    assert 0 < len(found.sketches) < 6 * SAMPLES
    same(chosen_pairs(folder, 32, FilterConfig()), PseudoSet.load(folder, 32))


def test_fewer_drawings_of_each_photo(tmp_path):
    folder = store(tmp_path / "pseudo")
    one = chosen_pairs(folder, 32, FilterConfig(), samples=1)
    assert one.photo_ids == [f"photo{n}" for n in range(6)]
    for n, drawn in enumerate(drawn for _, drawn in drawings(True)):
        assert one.certainty[n] == np.float32(drawn[0].certainty)


def test_thresholds_that_leave_nothing_or_cannot_be_asked(tmp_path):
    folder = store(tmp_path / "pseudo", ranked=False)
    assert chosen_pairs(folder, 32, FilterConfig(min_points=390)).photo_ids == []
    with pytest.raises(UserError, match="max_rank=4: ranks are a teacher's; give --teacher"):
        chosen_pairs(folder, 32, FilterConfig(max_rank=4))
