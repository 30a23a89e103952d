"""Selections of the objects that a cleanup or an `rm` deletes."""

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
    """Selection by a retention policy.

    Args:
        policy: Policy of the instance.
        directory: Directory of the spill file; None for the system's directory of temporary files.
    """

    def __init__(self, policy: Policy, directory: Path | None = None) -> None:
        self._policy = policy
        self._directory = directory

    @property
    def needs_access(self) -> bool:
        """Whether the policy depends on the last reads of chunks."""
        return self._policy.goes_by_use

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Yield a decision for every chunk."""
        return decide(self._policy, entries, now, self._directory)

    def foreign(self, entry: RetentionEntry, now: datetime) -> Decision:
        """Delete an object that is not a chunk, unless it is too young or shielded by its name."""
        if entry.key.startswith(self._policy.keep_prefix):
            return Decision(entry, Reason.SHIELDED, delete=False)
        return by_age(entry, now, self._policy.min_age, Reason.FOREIGN)


NAMED_ABSENT: Final = 1000
"""Maximum number of missing keys that a summary names; it counts all of them."""


class ByName:
    """Selection by keys and prefixes.

    Args:
        keys: Whole keys, or names below the instance's prefix of objects that are not chunks. None counts as found.
        prefixes: Prefixes of keys; none is empty.
        min_age: Minimum age of the objects to delete.
    """

    needs_access = False

    def __init__(self, keys: KeySet, prefixes: Sequence[str], min_age: timedelta) -> None:
        keys.forget()
        self._keys = keys
        self._prefixes = tuple(prefixes)
        self._min_age = min_age

    @property
    def absent(self) -> tuple[str, ...]:
        """The first keys that no listing has shown so far."""
        return tuple(self._keys.absent(NAMED_ABSENT))

    @property
    def absent_count(self) -> int:
        """Number of keys that no listing has shown so far."""
        return self._keys.count_absent()

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Yield a decision for every chunk."""
        return (self.foreign(entry, now) for entry in entries)

    def foreign(self, entry: RetentionEntry, now: datetime) -> Decision:
        """Decide on any object."""
        if not self._keys.find(entry.key) and not entry.key.startswith(self._prefixes):
            return Decision(entry, Reason.KEPT, delete=False)
        return by_age(entry, now, self._min_age, Reason.ASKED)


def read_keys(path: Path) -> Iterator[str]:
    """Stream the keys of a file, one per line; empty lines are skipped.

    Raises:
        ConfigError: If the file cannot be read, has no keys, or a line contains a control character.
    """
    number = 0
    for number, line in key_lines(path, "--key-file"):  # noqa: B007 - checked after the loop, to detect an empty file
        yield line
    if not number:
        raise ConfigError(f"--key-file {str(path)!r} names no key")


def expect_text(argument: str) -> None:
    """Refuse an argument that cannot be part of a name.

    Raises:
        ConfigError: If the shell passed bytes that are not valid UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        character = f"U+{ord(argument[error.start]):04X}"
        raise ConfigError(f"{argument!r}: character {error.start + 1} is {character}, not valid UTF-8") from None
