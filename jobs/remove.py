"""What `rm` deletes: keys and prefixes that were named."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.lines import key_lines
from jobs.planning import by_age
from jobs.retention import Decision, Entry, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime, timedelta
    from pathlib import Path


class ByName:
    """A selection by keys and prefixes.

    Args:
        keys: Whole keys; of what is no chunk, its name below the instance's prefix.
        prefixes: Starts of keys; none empty.
        min_age: Nothing younger goes.
    """

    needs_heat = False

    def __init__(self, keys: Iterable[str], prefixes: Sequence[str], min_age: timedelta) -> None:
        self._absent = set(keys)
        self._keys = frozenset(self._absent)
        self._prefixes = tuple(prefixes)
        self._min_age = min_age

    @property
    def absent(self) -> tuple[str, ...]:
        """Keys that no listing had so far."""
        return tuple(sorted(self._absent))

    def chunks(self, entries: Iterable[Entry], now: datetime) -> Iterator[Decision]:
        """Decide upon the chunks."""
        return (self.foreign(entry, now) for entry in entries)

    def foreign(self, entry: Entry, now: datetime) -> Decision:
        """Decide upon any object."""
        if entry.key in self._keys:
            self._absent.discard(entry.key)
        elif not entry.key.startswith(self._prefixes):
            return Decision(entry, Reason.KEPT, delete=False)
        return by_age(entry, now, self._min_age, Reason.ASKED)


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; empty lines are left out.

    Raises:
        ConfigError: It cannot be read, names nothing, or a line holds a control character.
    """
    keys = [line for _, line in key_lines(path, "--key-file")]
    if not keys:
        raise ConfigError(f"--key-file {str(path)!r} names no key")
    return keys


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
