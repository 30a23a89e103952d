"""The exit codes of all commands. They are an interface: scripts, schedules and pipelines branch on them.

The plugin's own commands (`doctor`, `ls`, `stat`) use `OK`, `WARNINGS`, `USAGE` and `ERRORS`, the warmer and the jobs the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

OK: Final = 0
"""Done; `doctor` found nothing to fix."""

WARNINGS: Final = 1
"""`doctor` found warnings and no errors; nothing matched `--model` or `--prefix` of `ls` or `stat`."""

ERRORS: Final = 3
"""`doctor` found errors; `ls` or `stat` could not list everything."""

COMPLETE: Final = 0
"""Everything that was asked for is done, or was done before."""

USAGE: Final = 2
"""The command, the configuration or the permissions are wrong: the same command would fail again. Also Typer's own code."""

FAILED: Final = 3
"""Something failed and was reported, or the Hub did not answer. Running again does only what is left."""

REFUSED: Final = 4
"""Nothing was done, or nothing more: there was nothing to do, or a safety check refused."""

INTERRUPTED: Final = 5
"""A signal or `--max-duration` ended the run. Running again does only what is left."""

RESULTS: Final = {
    COMPLETE: "complete",
    USAGE: "error",
    FAILED: "failed",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
}
"""The codes of the warmer and the jobs in words, as they stand in summaries."""

_WORST_FIRST: Final = (INTERRUPTED, USAGE, REFUSED, FAILED)


def worst(codes: Iterable[int]) -> int:
    """The code of a command that did several things."""
    found = set(codes)
    return next((code for code in _WORST_FIRST if code in found), COMPLETE)
