"""Schedule and time limit of a run, made from the options of a warm-up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from warmer.cluster.placement import parts_of
from warmer.plan.refresh import CACHED_SEGMENTS, RefreshedPlan, RefreshLookups
from warmer.schedule.cohort import PlanSection
from warmer.schedule.rate import Caps
from warmer.schedule.scheduler import Scheduler
from warmer.schedule.tasks import TaskLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.signals import ShutdownSignal, Stop
    from warmer.cluster.placement import Assignment
    from warmer.cluster.ray import Node
    from warmer.plan.plan_file import WarmPlanFile
    from warmer.request.model import TransferOptions

_LEAST_CACHED: Final = 2


def store_bytes(moving: TransferOptions, node: Node) -> int:
    """Return the bytes that chunks may take in a node's object store."""
    return int(node.store_bytes * moving.object_store_fraction)


def schedule_of(
    moving: TransferOptions, nodes: Sequence[Assignment], plan: WarmPlanFile, bucket: Bucket, stop: Stop
) -> Scheduler:
    """Return the schedule of a run, in which each chunk is looked up again just before it is assigned.

    Args:
        moving: Options of the transfer.
        nodes: Nodes that take part, with the ranks of their workers.
        plan: Plan of the chunks.
        bucket: Source of the chunks.
        stop: Whether the run must stop.
    """
    chosen = parts_of(nodes, plan)
    cached = max(_LEAST_CACHED, CACHED_SEGMENTS // max(1, len(chosen)))
    look_up = RefreshLookups(bucket, stop).look_up
    # Chunks that a lost node will never get need no lookup.
    parts = [
        PlanSection(RefreshedPlan(part, look_up, cached).chunks, names, rest=part.chunks_from)
        for names, part in chosen.items()
    ]
    return Scheduler(
        {one.node.id: store_bytes(moving, one.node) for one in nodes},
        parts,
        TaskLimits(run_bytes=moving.max_inflight_bytes),
        caps=Caps(moving.max_bandwidth, moving.max_node_bandwidth),
        direct=moving.direct,
        now=time.monotonic(),
    )


def direct_schedule(nodes: Sequence[Assignment], plan: WarmPlanFile) -> Scheduler:
    """Return a schedule in which every node processes all its planned chunks by itself."""
    parts = [PlanSection(part.chunks_from, names) for names, part in parts_of(nodes, plan).items()]
    return Scheduler(dict.fromkeys((one.node.id for one in nodes), 0), parts, direct=True, now=time.monotonic())


class TimeLimit:
    """Combination of a requested stop and a time limit.

    Args:
        stop: Whether a stop was requested.
        secs: Maximum seconds from now; None for no limit.
    """

    def __init__(self, stop: ShutdownSignal, secs: float | None) -> None:
        self._stop = stop
        self._end = None if secs is None else time.monotonic() + secs

    @property
    def requested(self) -> bool:
        """Whether the run must stop."""
        return self._stop.requested or (self._end is not None and time.monotonic() >= self._end)
