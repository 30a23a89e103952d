"""The exit codes of the commands. They are an interface: scripts branch on them."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Done; `doctor` found nothing to mend."""

WARNINGS: Final = 1
"""`doctor` found warnings and no errors; `ls` and `stat` found nothing that `--model` or `--prefix` selects."""

USAGE: Final = 2
"""The command or the configuration is wrong: nothing was asked of the Hub. Also Typer's own code."""

ERRORS: Final = 3
"""`doctor` found errors; `ls` and `stat` could not list everything."""
