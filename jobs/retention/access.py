"""Heat of an instance, as known to jobs: the last reads of chunks, whether they are known, and why not.

Missing heat (no key index, or no recorded reads) is not a failure: `uploaded_at` is used instead, and plans say so.
An index that cannot be read or is out of date is a failure: jobs that need heat are refused, unless `--without-heat`
is given.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.index.access.table import AccessUnknownError, open_access_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.access.table import AccessTable
    from hfbucket_plugin.tools.inventory import RetentionEntry

_PAGE: Final = 1000
_DOUBTED: Final = timedelta(days=1)
"""Time after which a daily read is known again: as long as the detection of missing recorders takes."""

ADVICE: Final = "Give --without-heat to go by when objects were put, whatever is read"


@dataclass(frozen=True, slots=True)
class AccessStats:
    """Known reads of chunks.

    Attributes:
        table: Last reads of chunks; None if unknown.
        why: Why they are unknown; empty if they are known or not needed.
    """

    table: AccessTable | None = None
    why: str = ""

    def warmed(self, entries: Iterable[RetentionEntry]) -> Iterator[RetentionEntry]:
        """Add last reads to entries, a page at a time."""
        table = self.table
        if table is None:
            yield from entries
            return
        entries = iter(entries)
        while page := list(islice(entries, _PAGE)):
            uses = table.look_up([encode_name(entry.key) for entry in page])
            for entry, use in zip(page, uses, strict=True):
                yield replace(entry, last_hit=use.last, counted_since=table.since)

    def why_no_order(self, last_used: datetime | None, now: datetime) -> str:
        """Return why an object must not be deleted as the least recently used one; empty if it may.

        A budget must delete something, so it cannot rely on the start of the recording, as `max_idle` does. If
        recorders
        dropped hits since the last use of the object, and within a day, its own hit may be among them.

        Args:
            last_used: Last known put or read of the object.
            now: Time of the Hub.
        """
        lost_at = None if self.table is None else self.table.lost_at
        if lost_at is None or self.table is None or now - lost_at > _DOUBTED:
            return ""
        if last_used is not None and last_used >= lost_at:
            return ""
        return (
            f"which objects are longest unused is not known: engines dropped {self.table.lost:,} hits, the last at "
            f"{lost_at.isoformat(timespec='seconds')}. Raise heat_keys in the engines and wait a day, or "
            f"{ADVICE[0].lower()}{ADVICE[1:]}"
        )

    def record(self) -> dict[str, Any]:
        """Return the fields for a plan's header and for reports."""
        since = None if self.table is None else self.table.since.isoformat(timespec="seconds")
        record: dict[str, Any] = {"known": self.table is not None, "since": since, "why": self.why}
        if self.table is not None and self.table.lost_at is not None:
            record |= {"dropped": self.table.lost, "dropped_at": self.table.lost_at.isoformat(timespec="seconds")}
        return record


NOT_ASKED: Final = AccessStats()


def line_of(record: dict[str, Any]) -> str:
    """Format the result of `AccessStats.record` as text; empty if heat was not needed."""
    if record.get("known"):
        return f"by last use: hits are known since {record.get('since')}{dropped_of(record)}"
    why = record.get("why")
    return f"by when objects were put, not by when they were read: {why}" if why else ""


def dropped_of(record: dict[str, Any]) -> str:
    """Format the dropped hits of `AccessStats.record` as text; empty if there were none."""
    if not record.get("dropped_at"):
        return ""
    return (
        f"; engines dropped {record.get('dropped', 0):,} hits, the last at {record.get('dropped_at')}: nothing counts as idle "
        "before then"
    )


@contextlib.contextmanager
def open_access_stats(
    bucket: Bucket, now: datetime, request_secs: float, *, without: bool = False, temp_dir: Path | None = None
) -> Iterator[AccessStats]:
    """Provide the heat of an instance for the length of a `with` block.

    Args:
        bucket: Client of the instance's bucket.
        now: Time of the Hub.
        request_secs: Timeout of a request, in seconds.
        without: Whether to ignore heat even if it is known.
        temp_dir: Directory for the snapshot of the index; None for the system's directory of temporary files.

    Raises:
        HeatUnknownError: If there is an index that cannot be used; the message says what to do.
        HFBucketError: If the Hub does not say whether there is an index.
    """
    if without:
        yield AccessStats(None, "--without-heat was given")
        return
    with contextlib.ExitStack() as stack:
        try:
            table = stack.enter_context(open_access_table(bucket, now, request_secs, temp_dir))
        except AccessUnknownError as error:
            raise AccessUnknownError(f"{error}. {ADVICE}") from None
        yield AccessStats(
            table, "" if table is not None else "no hits are recorded (no key index, or heat is off in the engines)"
        )
