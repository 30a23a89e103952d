"""Which nodes hold up the others so much that these go on without them. Pure: a view goes in, names of nodes come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FADING: Final = 3.0
"""How many times its patience a schedule remembers who held up the others: often is more than a third of the time."""

_LATE: Final = 4.0
"""A fetch is slow when it takes this many times what one of its size usually takes."""

_SLOW: Final = 2.0
"""Nodes that take this many times as long as most are slow; others are waited for: a run is as fast as its slowest node."""

_SLOW_PATIENCE: Final = 6.0
"""How many times more patience there is with those that are slow already: beyond it they cost the Hub a copy each."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A node that a few stored batches wait for.

    Attributes:
        blame: Seconds for which it recently held up the others.
        started: Whether it takes part yet.
        receive_pace: Seconds a byte in which it receives; None before it has received anything.
        waits: Of each of its tasks in flight: its seconds so far, its bytes, and whether it receives.
    """

    blame: float
    started: bool
    receive_pace: float | None
    waits: Sequence[tuple[float, int, bool]]


@dataclass(frozen=True, slots=True)
class StragglerView:
    """A cohort that has no room for another batch.

    Attributes:
        patience_secs: How long a node may hold up the others in general.
        patience: The same in this cohort.
        receive_pace: Seconds a byte in which nodes usually receive; None before one has received anything.
        nodes: Its members that are waited for, by name.
    """

    patience_secs: float
    patience: float
    receive_pace: float | None
    nodes: Mapping[str, Waited]


def patience(secs: float, *, last: bool) -> float:
    """How long a node may hold up the others of its cohort.

    Args:
        secs: The same in general.
        last: Whether those that the cohort leaves behind go on each by itself.
    """
    return secs * _SLOW_PATIENCE if last else secs


def stragglers(view: StragglerView) -> list[str]:
    """The nodes that hold up the others often, and are slow."""
    return [name for name, node in view.nodes.items() if node.blame > view.patience and _is_slow(node, view)]


def _is_slow(node: Waited, view: StragglerView) -> bool:
    """Whether a node receives much more slowly than most; or nothing at all."""
    if not node.started:
        return True
    if view.receive_pace is None:  # nobody has received anything: there may be nobody else to receive
        longest = max((secs for secs, _, receives in node.waits if receives), default=0.0)
        return longest > patience(view.patience_secs, last=True)
    waits = (secs / max(1, size) for secs, size, _ in node.waits)
    return max(node.receive_pace or 0.0, *waits, 0.0) > _SLOW * view.receive_pace


def is_slow_fetch(waited: float, size: int, pace: float | None, patience_secs: float) -> bool:
    """Whether a fetch takes much longer than one of its size usually does.

    Args:
        waited: Its seconds so far.
        size: Its bytes.
        pace: Seconds a byte that fetches usually take; None when none has ended yet.
        patience_secs: What it may take in any case.
    """
    return pace is not None and waited > max(patience_secs, _LATE * size * pace)
