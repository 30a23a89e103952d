"""What a cleanup deletes: what the policy of the instance lets go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.planning import by_age
from jobs.retention import Decision, Entry, Reason, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from jobs.policy import Policy


class ByPolicy:
    """A selection by a policy.

    Args:
        policy: Of the instance.
        directory: Where to spill; None for the system's directory of temporary files.
    """

    def __init__(self, policy: Policy, directory: Path | None = None) -> None:
        self._policy = policy
        self._directory = directory

    @property
    def needs_heat(self) -> bool:
        """Whether the policy goes by when chunks were last read."""
        return self._policy.goes_by_use

    def chunks(self, entries: Iterable[Entry], now: datetime) -> Iterator[Decision]:
        """Decide upon the chunks."""
        return decide(self._policy, entries, now, self._directory)

    def foreign(self, entry: Entry, now: datetime) -> Decision:
        """Let go of what is no chunk, unless it is too young or shielded by its name."""
        if entry.key.startswith(self._policy.keep_prefix):
            return Decision(entry, Reason.SHIELDED, delete=False)
        return by_age(entry, now, self._policy.min_age, Reason.FOREIGN)
