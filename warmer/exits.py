"""The exit codes of the commands. They are an interface: pipelines branch on them."""

from __future__ import annotations

from typing import Final

COMPLETE: Final = 0
"""Every selected chunk is on every node."""

USAGE: Final = 2
"""The command, the configuration or the rights are wrong: the same command would fail again. Also Typer's own code."""

FAILED: Final = 3
"""Some chunks are not there, each named; or a node took no part or was lost; or the Hub could not be reached. Running again moves only what is missing."""

REFUSED: Final = 4
"""There was nothing to do or nowhere to do it: nothing selected that fits the tier, no node that takes part or takes
any of it, or no room on any of them for a single chunk."""

INTERRUPTED: Final = 5
"""SIGTERM or SIGINT. Running again moves only what is missing."""
