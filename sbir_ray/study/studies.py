"""The four studies: which rows each has."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from sbir_ray.config import BEST_OF
from sbir_ray.errors import UserError
from sbir_ray.joint_config import JointTraining
from sbir_ray.study.data import Cell
from sbir_ray.study.people import PEOPLE
from sbir_ray.study.plan import Plan, Row, Variant
from sbir_ray.study.work import TRACERS

SUPERVISED = Variant("supervised", "labelled pairs alone")
JOINT = Variant("full", "joint training", joint=True)
NEGATIVES = Variant("negatives", "photos as negatives alone", negatives=True)
CONTOURS = Variant("contours", "contour tracing as pseudo sketches", drawn=("contours",))
EDGES = Variant("edges", "edge maps as pseudo sketches", drawn=("edges",))

Reward = Literal["reinforce", "soft", "both", "none"]
_REWARDS: dict[Reward, tuple[str, str]] = {
    "none": ("no-policy", "without rewards (Eq. 3 alone)"),
    "reinforce": ("policy-reinforce", "rewards by policy gradient"),
    "soft": ("policy-soft", "rewards through a soft raster"),
    "both": ("policy-both", "rewards by policy gradient and soft raster"),
}


def _with_loss(**changes: Any) -> Callable[[JointTraining], JointTraining]:
    def change(config: JointTraining) -> JointTraining:
        loss = replace(config.retrieval.loss, **changes)
        return replace(config, retrieval=replace(config.retrieval, loss=loss))

    return change


def _with_policy(kind: Reward) -> Callable[[JointTraining], JointTraining]:
    return lambda config: replace(config, policy=replace(config.policy, kind=kind))


def _paper(config: JointTraining) -> JointTraining:
    """With the paper's generator; it forgets what it learnt when it is trained for longer."""
    drawing = config.generator
    optim = replace(drawing.optim, lr=4e-3, weight_decay=0.0, steps=min(drawing.optim.steps, 500))
    model = replace(drawing.model, kind="paper")
    return replace(config, generator=replace(drawing, model=model, optim=optim))


def _without_attention(config: JointTraining) -> JointTraining:
    if config.generator.model.kind != "paper":
        config = _paper(config)
    model = replace(config.generator.model, attend=False)
    return replace(config, generator=replace(config.generator, model=model))


def _vanilla(config: JointTraining) -> JointTraining:
    return _without_attention(_with_loss(certainty="none", distill="none")(config))


def _joint(name: str, title: str, change: Callable[[JointTraining], JointTraining]) -> Variant:
    return Variant(name, title, joint=True, change=change)


def ablation_variants(base: JointTraining) -> list[Variant]:
    """The rows of the paper's Table 3, the other kinds of rewards, and the controls."""
    papers = [_joint("no-attention", "without attention", _without_attention)]
    if base.generator.model.kind != "paper":
        papers = [
            _joint("paper-generator", "with the paper's generator", _paper),
            replace(papers[0], title="with the paper's generator, without attention"),
        ]
    return [
        SUPERVISED,
        JOINT,
        _joint("no-weighting", "without instance weights", _with_loss(certainty="none")),
        _joint("no-teacher", "without the teacher", _with_loss(distill="none")),
        *papers,
        Variant("no-joint", "cached pseudo sketches, without joint training", drawn=("generator",)),
        Variant("vanilla", "without all four (vanilla SSL)", drawn=("generator",), change=_vanilla),
        *(
            _joint(name, title, _with_policy(kind))
            for kind, (name, title) in _REWARDS.items()
            if kind != base.policy.kind
        ),
        NEGATIVES,
        CONTOURS,
        EDGES,
    ]


def label_variants(base: JointTraining) -> list[Variant]:
    """The rows of each share of labels: :func:`usual_label_variants`, and by name those of an
    ablation."""
    usual = usual_label_variants(base)
    names = {variant.name for variant in usual}
    return usual + [one for one in ablation_variants(base) if one.name not in names]


def usual_label_variants(base: JointTraining) -> list[Variant]:
    """The controls, the generators, their drawings with contours, joint training, the ceilings."""
    best = f"the best of {BEST_OF}"
    by_paper = [
        Variant(
            "paper-drawings",
            f"drawings by the paper's generator, {best}",
            drawn=("generator",),
            samples=BEST_OF,
            change=_paper,
        )
    ]
    return [
        SUPERVISED,
        NEGATIVES,
        EDGES,
        CONTOURS,
        replace(
            CONTOURS,
            name="contours-negatives",
            title="contour tracing, and photos as negatives",
            negatives=True,
        ),
        *(by_paper if base.generator.model.kind != "paper" else []),
        Variant("drawings", f"drawings, {best}", drawn=("generator",), samples=BEST_OF),
        Variant(
            "mixed",
            f"drawings, {best}, contour tracing, and photos as negatives",
            drawn=("generator", "contours"),
            samples=BEST_OF,
            negatives=True,
        ),
        JOINT,
        Variant(PEOPLE, "people's hidden sketches (ceiling)", drawn=("people",)),
        Variant(
            "people-mixed",
            "people's hidden sketches, contour tracing, and photos as negatives (ceiling)",
            drawn=("people", "contours"),
            negatives=True,
        ),
    ]


def chosen(
    variants: Sequence[Variant], names: Sequence[str], option: str = "--rows"
) -> list[Variant]:
    """The variants of these names, or all where there are none, in the order of the table.

    Raises:
        UserError: an unknown name.
    """
    known = [variant.name for variant in variants]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise UserError(f"{option} {name}: no such row; did you mean {near[0]}?")
    return [variant for variant in variants if not names or variant.name in names]


def ablation(
    plan: Plan, cells: Sequence[Cell], names: Sequence[str] = (), against: str = SUPERVISED.name
) -> list[Row]:
    """What each part of the method brings (Table 3); with a judge of the generators' drawings.

    Args:
        cells: one for each seed.
        names: of the rows; all by default.
        against: name of the row that the others are compared with.
    """
    variants = chosen(ablation_variants(plan.base), names)
    return [_row(plan, variant, cells, against, judging=True) for variant in variants]


def labels(
    plan: Plan, cells: Sequence[Cell], names: Sequence[str] = (), against: str = SUPERVISED.name
) -> list[Row]:
    """Accuracy by the share of labels (Fig. 4b).

    Args:
        cells: of all shares and seeds. Where none of them has photos without sketches, the row is
            that of the labelled pairs alone; where none hides sketches, ceilings are left out.
        names, against: as of :func:`ablation`, at each share.
    """
    rows = []
    usual = [variant.name for variant in usual_label_variants(plan.base)]
    variants = chosen(label_variants(plan.base), names or usual)
    for share, group in _groups(cells, lambda cell: cell.labels):
        for variant in variants:
            pools = all(cell.pool for cell in group)
            hiding = all(cell.labels < 1 for cell in group)
            if variant == SUPERVISED or (pools and (hiding or PEOPLE not in variant.drawn)):
                row = _row(plan, variant, group, against)
                baseline = f"{row.baseline}-{share:g}" if row.baseline else ""
                name = f"{variant.name}-{share:g}"
                rows.append(replace(row, name=name, baseline=baseline, x=share))
    return rows


def photos(plan: Plan, cells: Sequence[Cell]) -> list[Row]:
    """Accuracy by the number of photos without sketches.

    Args:
        cells: of all numbers and seeds; with 0 photos the labelled pairs alone.
    """
    rows = []
    for count, group in _groups(cells, lambda cell: cell.photos):
        for variant in [JOINT, NEGATIVES, CONTOURS] if count else [SUPERVISED]:
            row = _row(plan, variant, group, SUPERVISED.name)
            baseline = f"{row.baseline}-0" if row.baseline else ""
            rows.append(replace(row, name=f"{variant.name}-{count}", baseline=baseline, x=count))
    return rows


def generation(plan: Plan, cells: Sequence[Cell]) -> list[Row]:
    """How well drawings of held-out photos find their photo (Table 1).

    Args:
        cells: one for each seed, all of one PAIRS folder.
    """
    people = {0: plan.judged(PEOPLE, PEOPLE, 0, cells[0])}
    rows = [Row(PEOPLE, "people's sketches (ceiling)", PEOPLE, drawn=people)]
    joint = {cell.seed: plan.variant(JOINT, cell).f for cell in cells}
    alone = {cell.seed: plan.generator(cell, plan.base) for cell in cells}
    for name, title, runs in (
        (JOINT.name, "generator after joint training", joint),
        ("generator", "generator on labelled pairs alone", alone),
    ):
        drawn = {cell.seed: plan.judged(name, runs[cell.seed], cell.seed, cell) for cell in cells}
        rows.append(Row(name, title, name, drawn=drawn, facts=_facts(cells)))
    for name, title in zip(TRACERS, ("contour tracing", "edge maps"), strict=True):
        rows.append(Row(name, title, name, drawn={0: plan.judged(name, name, 0, cells[0])}))
    return rows


def _row(
    plan: Plan, variant: Variant, cells: Sequence[Cell], baseline: str, judging: bool = False
) -> Row:
    """The row of a variant; ``judging``: its generators' drawings too."""
    trained = {cell.seed: plan.variant(variant, cell) for cell in cells}
    drawn = {
        cell.seed: plan.judged(variant.name, drawer, cell.seed, cell)
        for cell in cells
        if judging and (drawer := trained[cell.seed].drawer) is not None
    }
    (updates,) = {one.updates for one in trained.values()}
    return Row(
        variant.name,
        variant.title,
        variant.name,
        baseline="" if variant.name == baseline else baseline,
        found={cell.seed: plan.measure(trained[cell.seed].f, cell) for cell in cells},
        drawn=drawn,
        facts={"updates": updates, **_facts(cells)},
    )


def _facts(cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "labels": cells[0].labels,
        "photos": {cell.seed: cell.photos for cell in cells},
    }


def _groups(cells: Iterable[Cell], key: Callable[[Cell], float]) -> list[tuple[float, list[Cell]]]:
    groups: dict[float, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return sorted(groups.items())
