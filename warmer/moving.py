"""How bytes move in a run: what the warm-up says of it, as a schedule has it; and for how long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from warmer.orders import Window
from warmer.pace import Caps
from warmer.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.cluster import Node
    from warmer.dispatch import Takers
    from warmer.interrupt import StopSwitch
    from warmer.lanes import Reader
    from warmer.nodes import Assigned
    from warmer.plan import PlannedChunk
    from warmer.warmup import Moving


def store_bytes(moving: Moving, node: Node) -> int:
    """The bytes that chunks may take in a node's object store."""
    return int(node.store_bytes * moving.object_store_fraction)


def schedule_of(moving: Moving, nodes: Sequence[Assigned], plan: Reader, rest: Reader) -> Schedule:
    """The schedule of a run; see `Schedule` for `plan` and `rest`."""
    return Schedule(
        {one.node.id: store_bytes(moving, one.node) for one in nodes},
        plan,
        Window(run_bytes=moving.max_inflight_bytes),
        rest=rest,
        takers=takers(nodes),
        caps=Caps(moving.max_bandwidth, moving.max_node_bandwidth),
        direct=moving.direct,
        now=time.monotonic(),
    )


def direct_schedule(nodes: Sequence[Assigned], plan: Reader) -> Schedule:
    """A schedule by which every node works through all that is for it by itself."""
    names = dict.fromkeys((one.node.id for one in nodes), 0)
    return Schedule(names, plan, takers=takers(nodes), direct=True, now=time.monotonic())


def takers(nodes: Sequence[Assigned]) -> Takers:
    """Tells which nodes a chunk is for."""

    def of(chunk: PlannedChunk) -> frozenset[str]:
        return frozenset(one.node.id for one in nodes if one.takes(chunk))

    return of


class TimeLimit:
    """Says whether a run is to stop: it was told to, or its time is up.

    Args:
        stop: Whether it was told to.
        secs: Most seconds from now; None for no limit.
    """

    def __init__(self, stop: StopSwitch, secs: float | None) -> None:
        self._stop = stop
        self._end = None if secs is None else time.monotonic() + secs

    @property
    def requested(self) -> bool:
        """Whether it is to stop."""
        return self._stop.requested or (self._end is not None and time.monotonic() >= self._end)
