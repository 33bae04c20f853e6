"""Placement groups that Ray Train leaves, given back.

Ray Train 2.60 removes the group of its workers when they end, and has an actor that does so when
its controller is killed; both know the group from the moment that all its workers are set up. Where
a worker or the controller dies before that, nobody removes it: it would hold its CPUs as long as
the driver lives, and the workers that start again would wait for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.worker_group import WorkerGroupContext


class GivesBack(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Removes what failed starts of a run have left before the next start, and at its end. Runs in
    the controller."""

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Nothing of the earlier starts is in use."""
        _give_back_own()

    async def before_controller_shutdown(self) -> None:
        """The last workers have ended."""
        _give_back_own()


def give_back_of_the_dead(patience: float = 0.0) -> None:
    """Remove the placement groups of this driver whose makers, actors, are dead.

    Args:
        patience: seconds to wait for makers that are still dying, and for controllers, which may
            make one yet.
    """
    end = time.monotonic() + patience
    while True:
        living = _living()
        waiting = "TrainController" in living.values()
        for group in _groups():
            # Ray's own mark is missing where the group came after its maker's death was noticed.
            if group.creator_actor_dead or group.creator_actor_id.hex() not in living:
                _remove(group)
            else:
                waiting = True
        if not waiting or time.monotonic() >= end:
            return
        time.sleep(0.2)


def _living() -> dict[str, str]:
    """The classes of the actors of this driver that are not dead, by their ids."""
    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    found = cast(Any, ray)._private.state.state.actor_table(None, job_id=job)
    return {
        name: actor["ActorClassName"] for name, actor in found.items() if actor["State"] != "DEAD"
    }


def _give_back_own() -> None:
    me = bytes.fromhex(ray.get_runtime_context().get_actor_id() or "")
    for group in _groups():
        if group.creator_actor_id == me:
            _remove(group)


def _groups() -> Iterator[Any]:
    """The placement groups that actors of this driver have made and that are not removed, as Ray's
    own records: its tables for users do not tell who made a group."""
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData as Group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    accessor = cast(Any, ray)._private.state.state._connect_and_get_accessor()
    for record in accessor.get_placement_group_table():
        group = Group.FromString(record)
        # The driver's own groups count as those of a dead actor without a name.
        by_actor = not ray.ActorID(group.creator_actor_id).is_nil()
        ours = group.creator_job_id == job and not group.is_detached
        if ours and by_actor and group.state != Group.REMOVED:
            yield group


def _remove(group: Any) -> None:
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
