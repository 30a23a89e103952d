"""How bytes move in a run: through whom, how many at a time, how fast, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from warmer.orders import Window
from warmer.pace import Caps
from warmer.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.cluster import Node
    from warmer.interrupt import StopSwitch
    from warmer.lanes import Reader
    from warmer.receive import Verify

OBJECT_STORE_FRACTION: Final = 0.3
"""Ray begins to write objects to disk when a store is 80 % full; this leaves half of the store to others before that."""


@dataclass(frozen=True, slots=True)
class Moving:
    """What was asked for.

    Attributes:
        direct: Every node fetches everything for itself.
        store_fraction: Most of each node's object store that chunks may take.
        verify: What is checked before a chunk appears: its length, or its Xet hash too.
        max_bandwidth: Most bytes a second from the Hub, in the whole run; None for no cap.
        max_node_bandwidth: Most bytes a second that reach a node, from the Hub or from others; None for no cap.
        max_inflight_bytes: Most bytes being fetched from the Hub, in the whole run; None for no cap.
        max_secs: When to stop, in seconds from the first actor; None for never.
        replace_nodes: Whether nodes that join take the places of lost ones.
    """

    direct: bool = False
    store_fraction: float = OBJECT_STORE_FRACTION
    verify: Verify = "hash"
    max_bandwidth: int | None = None
    max_node_bandwidth: int | None = None
    max_inflight_bytes: int | None = None
    max_secs: float | None = None
    replace_nodes: bool = False

    def store_bytes(self, node: Node) -> int:
        """The bytes that chunks may take in a node's object store."""
        return int(node.store_bytes * self.store_fraction)

    def schedule(self, nodes: Sequence[Node], plan: Reader, rest: Reader) -> Schedule:
        """The schedule of a run; see `Schedule` for `plan` and `rest`."""
        return Schedule(
            {node.id: self.store_bytes(node) for node in nodes},
            plan,
            Window(run_bytes=self.max_inflight_bytes),
            rest=rest,
            caps=Caps(self.max_bandwidth, self.max_node_bandwidth),
            direct=self.direct,
            now=time.monotonic(),
        )


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
