"""What a cleanup or an `rm` deletes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.tools.lines import key_lines
from jobs.deletion.planning import by_age
from jobs.retention.order import Decision, Reason, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime, timedelta
    from pathlib import Path

    from hfbucket_plugin.tools.external_sort import KeySet
    from hfbucket_plugin.tools.inventory import RetentionEntry
    from jobs.retention.policy import Policy


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
    def needs_access(self) -> bool:
        """Whether the policy goes by when chunks were last read."""
        return self._policy.goes_by_use

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Decide upon the chunks."""
        return decide(self._policy, entries, now, self._directory)

    def foreign(self, entry: RetentionEntry, now: datetime) -> Decision:
        """Let go of what is no chunk, unless it is too young or shielded by its name."""
        if entry.key.startswith(self._policy.keep_prefix):
            return Decision(entry, Reason.SHIELDED, delete=False)
        return by_age(entry, now, self._policy.min_age, Reason.FOREIGN)


NAMED_ABSENT: Final = 1000
"""Keys that are not there which a summary names; it counts all of them."""


class ByName:
    """A selection by keys and prefixes.

    Args:
        keys: Whole keys; of what is no chunk, its name below the instance's prefix. None counts as found.
        prefixes: Starts of keys; none empty.
        min_age: Nothing younger goes.
    """

    needs_access = False

    def __init__(self, keys: KeySet, prefixes: Sequence[str], min_age: timedelta) -> None:
        keys.forget()
        self._keys = keys
        self._prefixes = tuple(prefixes)
        self._min_age = min_age

    @property
    def absent(self) -> tuple[str, ...]:
        """Keys that no listing had so far, the first ones."""
        return tuple(self._keys.absent(NAMED_ABSENT))

    @property
    def absent_count(self) -> int:
        """How many keys no listing had so far."""
        return self._keys.count_absent()

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Decide upon the chunks."""
        return (self.foreign(entry, now) for entry in entries)

    def foreign(self, entry: RetentionEntry, now: datetime) -> Decision:
        """Decide upon any object."""
        if not self._keys.find(entry.key) and not entry.key.startswith(self._prefixes):
            return Decision(entry, Reason.KEPT, delete=False)
        return by_age(entry, now, self._min_age, Reason.ASKED)


def read_keys(path: Path) -> Iterator[str]:
    """Stream the keys of a file, one a line; empty lines are left out.

    Raises:
        ConfigError: It cannot be read, names nothing, or a line holds a control character.
    """
    number = 0
    for number, line in key_lines(path, "--key-file"):  # noqa: B007 - whether there was one is asked below
        yield line
    if not number:
        raise ConfigError(f"--key-file {str(path)!r} names no key")


def expect_text(argument: str) -> None:
    """Make sure that an argument is text that a name can hold.

    Raises:
        ConfigError: The shell handed over bytes that are not valid UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        character = f"U+{ord(argument[error.start]):04X}"
        raise ConfigError(f"{argument!r}: character {error.start + 1} is {character}, not valid UTF-8") from None
