"""Exit codes of all commands. They are an interface: scripts, schedules and pipelines depend on them.

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
"""Everything requested is done, or was already done."""

USAGE: Final = 2
"""The command, configuration or permissions are invalid: the same command would fail again. Also Typer's own code."""

FAILED: Final = 3
"""Something failed and was reported, or the Hub did not answer. Another run does only what is left."""

REFUSED: Final = 4
"""Nothing was done, or nothing more: there was nothing to do, or a safety check refused."""

INTERRUPTED: Final = 5
"""A signal or `--max-duration` ended the run. Another run does only what is left."""

RESULTS: Final = {
    COMPLETE: "complete",
    USAGE: "error",
    FAILED: "failed",
    REFUSED: "refused",
    INTERRUPTED: "interrupted",
}
"""Names of the warmer's and the jobs' exit codes, as used in summaries."""

_WORST_FIRST: Final = (INTERRUPTED, USAGE, REFUSED, FAILED)


def worst(codes: Iterable[int]) -> int:
    """Return the most severe exit code, for a command with several results."""
    found = set(codes)
    return next((code for code in _WORST_FIRST if code in found), COMPLETE)
