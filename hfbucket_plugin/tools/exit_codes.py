"""The exit codes of all commands. They are an interface: scripts, schedules and pipelines branch on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable


OK: Final = 0
"""Done; `doctor` found nothing to mend."""

WARNINGS: Final = 1
"""`doctor` found warnings and no errors; `ls` and `stat` found nothing that `--model` or `--prefix` selects."""

USAGE: Final = 2
"""The command or the configuration is wrong: nothing was asked of the Hub. Also Typer's own code."""

ERRORS: Final = 3
"""`doctor` found errors; `ls` and `stat` could not list everything."""


COMPLETE: Final = 0
"""Every selected chunk is on every node."""

"""The command, the configuration or the rights are wrong: the same command would fail again. Also Typer's own code."""

FAILED: Final = 3
"""Some chunks are not there, each named; or a node took no part or was lost; or the Hub could not be reached. Running again moves only what is missing."""

REFUSED: Final = 4
"""There was nothing to do or nowhere to do it: nothing selected that fits the tier, no node that takes part or takes
any of it, or no room on any of them for a single chunk."""

INTERRUPTED: Final = 5
"""SIGTERM or SIGINT. Running again moves only what is missing."""


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
