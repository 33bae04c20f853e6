"""A study's work: what fails takes with it what needs it, and nothing else."""

from sbir_ray.joint_config import JointTraining
from sbir_ray.study import studies
from sbir_ray.study.data import Cell
from sbir_ray.study.execute import _hopeless
from sbir_ray.study.plan import Plan


def test_all_that_needs_what_failed_fails_for_that_reason(tmp_path):
    plan = Plan(tmp_path, JointTraining(), "val")
    cell = Cell(0.4, 0, "pairs-0", "pairs", "pool", 60)
    trained = plan.variant(studies.JOINT, cell)
    found = plan.measure(trained.f, cell)
    other = plan.variant(studies.SUPERVISED, cell)
    waiting = dict(plan.work)
    generator = trained.f.needs[1]
    del waiting[generator]
    failed = {generator: "no disk"}
    ended = _hopeless(waiting, failed)
    assert [piece.name for piece, _, _ in ended] == [trained.f.name, found]
    assert {reason for _, reason, _ in ended} == {f"in {generator}: no disk"}
    assert set(failed) == {generator, trained.f.name, found}
    assert other.f.name in waiting
