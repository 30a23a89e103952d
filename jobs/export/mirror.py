"""Deletion of a mirror at its destination: selected chunks that the source does not hold, guarded like a cleanup."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId, parse_key
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.hub.listing import ChunkEntry
from jobs.deletion.planning import by_age
from jobs.retention.order import Decision, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime, timedelta

    from hfbucket_plugin.tools.inventory import RetentionEntry
    from hfbucket_plugin.tools.selection import Selection
    from jobs.export.bucket import InstanceEnd
    from jobs.export.plan import Renames

_PAGE: Final = 1000
_LOOK_UP_SECS: Final = 330.0
_PARTS: Final = ("since", "newest", "max_bytes", "keys_from", "prompts")


def check_mirror(selection: Selection, renames: Renames, *, directories: bool) -> None:
    """Refuse an unsupported mirror: both sides are compared by name only.

    Raises:
        ConfigError: If the selection depends on more than names, or an endpoint is a directory.
    """
    if directories:
        raise ConfigError("--mirror works between two instances: files of a directory are yours to delete")
    if renames.rules:
        raise ConfigError("--mirror and --rename contradict each other: the source does not have the copies' names")
    flags = [f"--{name.replace('_', '-')}" for name in _PARTS if getattr(selection, name) not in (None, ())]
    if flags:
        raise ConfigError(
            f"--mirror and {', '.join(flags)} contradict each other: what was not chosen would be deleted. Choose by names "
            "(--prefix, --model, --world-size, --workers, --include, --exclude)"
        )


class NotAtSource:
    """Selection of the chunks that the source does not hold now.

    Args:
        source: Source of the mirror.
        selection: Chunks that the mirror covers.
        min_age: Minimum age of the objects to delete.
    """

    needs_access = False

    def __init__(self, source: InstanceEnd, selection: Selection, min_age: timedelta) -> None:
        self._source = source
        self._selection = selection
        self._min_age = min_age

    def chunks(self, entries: Iterable[RetentionEntry], now: datetime) -> Iterator[Decision]:
        """Yield a decision for every chunk, a page at a time: the source is asked for each by name."""
        chosen = self._selection.filter(now)
        entries = iter(entries)
        while page := list(itertools.islice(entries, _PAGE)):
            ours = {entry.key for entry in page if chosen(_chunk(entry))}
            there = self._source.look_up(sorted(ours), Deadline.patient(_LOOK_UP_SECS)) if ours else {}
            for entry in page:
                if entry.key in ours and entry.key not in there:
                    yield by_age(entry, now, self._min_age, Reason.NOT_AT_SOURCE)
                else:
                    yield Decision(entry, Reason.KEPT, delete=False)

    @staticmethod
    def foreign(entry: RetentionEntry, _now: datetime) -> Decision:
        """Keep objects that are not chunks."""
        return Decision(entry, Reason.KEPT, delete=False)


def _chunk(entry: RetentionEntry) -> ChunkEntry:
    return ChunkEntry(entry.key, parse_key(entry.key), ContentId(entry.xet_hash, entry.size), entry.uploaded_at)
