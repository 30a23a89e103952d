"""Detection of nodes that delay the others so much that these continue without them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FADING: Final = 3.0
"""Time for which delays are remembered, in multiples of the patience: a node may delay the others a third of the time."""

_LATE: Final = 4.0
"""A fetch is slow if it takes this many times the usual time for its size."""

_SLOW: Final = 2.0
"""A node is slow if it takes this many times as long as most; the others are waited for, as they limit the run anyway."""

_SLOW_PATIENCE: Final = 6.0
"""Factor on the patience for nodes that are slow already: if left behind again, each costs the Hub another copy."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A node that a few stored batches wait for.

    Attributes:
        blame: Seconds for which the node recently delayed the others.
        started: Whether the node gets tasks yet.
        receive_pace: Seconds a byte that the node needs to receive; None before its first receive.
        waits: For each task in flight on the node: seconds since its start, bytes, and whether it is a receive.
    """

    blame: float
    started: bool
    receive_pace: float | None
    waits: Sequence[tuple[float, int, bool]]


@dataclass(frozen=True, slots=True)
class StragglerView:
    """A cohort that has no room for another batch.

    Attributes:
        patience_secs: Seconds for which a node may delay the others in general.
        patience: Seconds for which a node may delay the others in this cohort.
        receive_pace: Seconds a byte that nodes usually need to receive; None before the first receive.
        nodes: Members of the cohort that batches wait for, by name.
    """

    patience_secs: float
    patience: float
    receive_pace: float | None
    nodes: Mapping[str, Waited]


def patience(secs: float, *, last: bool) -> float:
    """Return the seconds for which a node may delay the others of its cohort.

    Args:
        secs: Patience in general, in seconds.
        last: Whether nodes that the cohort leaves behind continue each by itself.
    """
    return secs * _SLOW_PATIENCE if last else secs


def stragglers(view: StragglerView) -> list[str]:
    """Return the names of the nodes that delay the others often and are slow."""
    return [name for name, node in view.nodes.items() if node.blame > view.patience and _is_slow(node, view)]


def _is_slow(node: Waited, view: StragglerView) -> bool:
    """Return whether a node has not started, receives much more slowly than most, or has waited too long for a first receive."""
    if not node.started:
        return True
    if view.receive_pace is None:  # no node has received anything: perhaps no other node needs to
        longest = max((secs for secs, _, receives in node.waits if receives), default=0.0)
        return longest > patience(view.patience_secs, last=True)
    waits = (secs / max(1, size) for secs, size, _ in node.waits)
    return max(node.receive_pace or 0.0, *waits, 0.0) > _SLOW * view.receive_pace


def is_slow_fetch(waited: float, size: int, pace: float | None, patience_secs: float) -> bool:
    """Return whether a fetch takes much longer than is usual for its size.

    Args:
        waited: Seconds since its start.
        size: Bytes of its chunks.
        pace: Seconds a byte that fetches usually take; None if none has ended yet.
        patience_secs: Seconds that a fetch may take in any case.
    """
    return pace is not None and waited > max(patience_secs, _LATE * size * pace)
