"""The folder of a joint run, written by hand: made-up numbers in the files of a real one."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from sbir_ray.certainty import certainty_deciles, pick_evenly
from sbir_ray.data.photos import encode_jpeg
from sbir_ray.data.strokes import flatten
from sbir_ray.joint_config import JointTraining
from sbir_ray.strict import to_dict
from tests.tiny import photo, sketch

PHOTOS, TIMES, POOL = 12, 8, 60
LEDGER = {
    "schema_version": 1,
    "kind": "live",
    "drawn": 1000,
    "used": 817,
    "stale": 41,
    "filtered": {"min_points": 23, "max_rank": 97},
    "in_flight": 22,
    "staleness": {"0": 611, "1": 289, "2": 59, "5": 41},
}


def make_joint_run(run: Path, **inputs: str) -> Path:
    """A run that has begun and has written nothing but ``run.json``."""
    run.mkdir(parents=True)
    write(
        run / "run.json",
        {
            "schema_version": 1,
            "kind": "joint",
            "config": to_dict(JointTraining()),
            "digest": "0123456789ab",
            "versions": {"torch": "2"},
            "inputs": {"pairs": "pairs", "photos": "photos", **inputs},
            "status": "running",
        },
    )
    return run


def log_steps(run: Path, steps: int = 40) -> list[dict[str, Any]]:
    """Its ``metrics.jsonl`` up to ``steps`` of 240: turns of five steps, two evaluations."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        turn = (step - 1) // 5 % 2
        keys = (
            ("offset", "pen", "kl", "policy", "soft", "reward", "reward_std", "ratio")
            if turn
            else (
                *("labelled", "pseudo", "distill", "certainty", "kept", "d_real", "d_drawn"),
                *("d_own", "d_wrong", "certainty_real", "certainty_drawn"),
            )
        )
        always = ("wait_share", "photos_per_second", "sketches_per_second", "staleness")
        line = {"kind": "step", "step": step, "steps": 240, "seconds": 1.5 * step, "turn": turn}
        values = {key: round(float(rng.random()), 4) for key in (*keys, *always)}
        lines.append({**line, "version": step // 5, **values})
        if step % 20 == 0:
            shares = {"acc@1": 0.002 * step, "acc@5": 0.003 * step, "acc@10": 0.004 * step}
            nats = {"g_offset": 2 - 0.004 * step, "g_pen": 0.5, "g_kl": 0.2}
            lines.append({"kind": "evaluation", "step": step, "steps": 240, **shares, **nats})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def leave_exhibits(run: Path) -> None:
    """Its ledger, drawings, certainty and attention."""
    rng = np.random.default_rng(1)
    write(run / "ledger.json", LEDGER)
    photos = [encoded(number) for number in range(POOL)]
    ids = [f"photo{number}" for number in range(POOL)]
    head = {"schema_version": 1, "photo_ids": ids[:PHOTOS]}
    write(run / "exhibits.json", {**head, "kind": "exhibits", "photos": photos[:PHOTOS]})
    lines = [
        {
            "step": 30 * time,
            "version": 6 * time,
            "photo_ids": ids[:PHOTOS],
            "strokes": [flatten(sketch(number, time)) for number in range(PHOTOS)],
            "certainty": [round((12 * time + number) / 100, 2) for number in range(PHOTOS)],
        }
        for time in range(TIMES)
    ]
    (run / "drawings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    certainty = rng.random(POOL).round(6).tolist()
    rank = rng.integers(1, POOL + 1, POOL).tolist()
    now = {"schema_version": 1, "step": 240, "version": 48}
    write(
        run / "certainty.json",
        {
            **now,
            "kind": "certainty",
            "temperature": 0.25,
            "photo_ids": ids,
            "certainty": certainty,
            "rank": rank,
            "deciles": [dataclasses.asdict(d) for d in certainty_deciles(certainty, rank)],
            "examples": [
                {"number": i, "photo": photos[i], "strokes": flatten(sketch(i))}
                for i in pick_evenly(certainty)
            ],
        },
    )
    looks = []
    for number in range(4):
        strokes = sketch(number)
        shape = [sum(map(len, strokes)), 4, 4]
        share = rng.dirichlet(np.ones(16), shape[0])
        whole = np.rint(share * 65535).astype("<u2").tobytes()
        looks.append(
            {
                "photo_id": ids[number],
                "photo": photos[number],
                "certainty": 0.5,
                "strokes": flatten(strokes),
                "shape": shape,
                "attention": base64.b64encode(whole).decode(),
            }
        )
    write(run / "attention.json", {**now, "kind": "attention", "looks": looks})


def encoded(number: int) -> str:
    return base64.b64encode(encode_jpeg(photo(number))).decode()


def write(file: Path, record: object) -> None:
    file.write_text(json.dumps(record))
