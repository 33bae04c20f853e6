"""CPUs that a failed start of a training has reserved come back."""

import sys

import pytest
import ray
from ray import cloudpickle
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from sbir_ray import checkpoint
from sbir_ray.train import launch
from sbir_ray.train.groups import give_back_of_the_dead
from sbir_ray.train.job import Job
from tests.tiny import retrieval_config, tiny_pairs

# Ray's processes cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Deadly(WorkerGroupCallback):
    """Kills a worker of the first group while that is set up, or just when it is."""

    def __init__(self, log, when):
        self.log, self.when = log, when

    def after_worker_group_start(self, worker_group):
        if not self.log.exists():
            self.log.touch()
            worker = worker_group.get_workers()[0].actor
            ray.kill(worker)
            while self.when == "setting up":
                # Until it fails, as the rest of the setting up would.
                ray.get(worker.get_metadata.remote())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["setting up", "set up"])
def test_workers_that_die_while_they_start_leave_nothing_that_the_next_would_wait_for(
    tmp_path, cluster, monkeypatch, when
):
    log = tmp_path / "killed"
    made = launch._trainer

    def deadly(*asked):
        trainer = made(*asked)
        trainer.run_config.callbacks.append(Deadly(log, when))
        return trainer

    monkeypatch.setattr(launch, "_trainer", deadly)
    pairs = str(tiny_pairs(tmp_path / "pairs"))
    job = Job("retrieval", str(tmp_path / "run"), retrieval_config(), {"pairs": pairs})
    # Such a start holds all four CPUs.
    launch.train([job], workers=2, cpus_per_worker=2.0)
    assert log.exists()
    assert checkpoint.load(tmp_path / "run").step == job.config.optim.steps


@ray.remote(num_cpus=0)
class Holder:
    def reserve(self):
        group = placement_group([{"CPU": 1}])
        group.wait(10)
        return group.id.hex()


def states(*names):
    return [placement_group_table()[name]["state"] for name in names]


def test_what_dead_actors_reserved_is_given_back_and_nothing_else(cluster):
    living, dead = Holder.remote(), Holder.remote()
    names = ray.get([living.reserve.remote(), dead.reserve.remote()])
    mine = placement_group([{"CPU": 1}])
    try:
        assert mine.wait(10)
        names.append(mine.id.hex())
        assert states(*names) == ["CREATED", "CREATED", "CREATED"]
        ray.kill(dead)
        give_back_of_the_dead(patience=2.0)
        assert states(*names) == ["CREATED", "REMOVED", "CREATED"]
    finally:
        ray.kill(living)
        give_back_of_the_dead(patience=10.0)
        assert states(*names) == ["REMOVED", "REMOVED", "CREATED"]
        remove_placement_group(mine)
