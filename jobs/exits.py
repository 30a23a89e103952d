"""The exit codes of the commands, as the warmer's. They are an interface: schedules branch on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from warmer.exits import COMPLETE, FAILED, INTERRUPTED, REFUSED, USAGE

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["COMPLETE", "FAILED", "INTERRUPTED", "REFUSED", "RESULTS", "USAGE", "worst"]

_WORST_FIRST: Final = (INTERRUPTED, USAGE, REFUSED, FAILED)

RESULTS: Final = {
    COMPLETE: "complete",
    USAGE: "error",
    FAILED: "failed",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
}
"""The codes in words, as they stand in summaries."""


def worst(codes: Iterable[int]) -> int:
    """The code of a command that did several things."""
    found = set(codes)
    return next((code for code in _WORST_FIRST if code in found), COMPLETE)
