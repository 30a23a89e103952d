"""What jobs know of an instance's heat: which chunk was read when; whether that is known at all, and why not.

No heat (no key index, or nobody records) is no failure: then everything goes by `uploaded_at`, and who plans says so. An index that
cannot be read or is out of date is one: what needs heat is refused, unless `--without-heat` says to go by `uploaded_at`.
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
"""After as long as it takes to notice that nobody records, what is read daily is known again."""

ADVICE: Final = "Give --without-heat to go by when objects were put, whatever is read"


@dataclass(frozen=True, slots=True)
class AccessStats:
    """What is known.

    Attributes:
        table: When chunks were read; None where that is not known.
        why: Why not; empty where it is, and where nobody asked.
    """

    table: AccessTable | None = None
    why: str = ""

    def warmed(self, entries: Iterable[RetentionEntry]) -> Iterator[RetentionEntry]:
        """Entries with when they were read, a page at a time."""
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
        """Why an object must not go because others were used later; empty where it may.

        A budget has to delete something, so it cannot go by the moment since which hits are known, as `max_idle` does. Where
        recorders dropped hits since the object was last used, and within a day, it may have been among them.

        Args:
            last_used: When the object was last put or read, as far as that is known.
            now: The Hub's time.
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
        """For a plan's header and for reports."""
        since = None if self.table is None else self.table.since.isoformat(timespec="seconds")
        record: dict[str, Any] = {"known": self.table is not None, "since": since, "why": self.why}
        if self.table is not None and self.table.lost_at is not None:
            record |= {"dropped": self.table.lost, "dropped_at": self.table.lost_at.isoformat(timespec="seconds")}
        return record


NOT_ASKED: Final = AccessStats()


def line_of(record: dict[str, Any]) -> str:
    """What `AccessStats.record` made, for people; empty where nobody asked."""
    if record.get("known"):
        return f"by last use: hits are known since {record.get('since')}{dropped_of(record)}"
    why = record.get("why")
    return f"by when objects were put, not by when they were read: {why}" if why else ""


def dropped_of(record: dict[str, Any]) -> str:
    """What `AccessStats.record` says of hits that were dropped, for people; empty where none were."""
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
    """The heat of an instance, for the duration of a block that needs it.

    Args:
        bucket: The instance's.
        now: The Hub's time.
        request_secs: Most seconds of a request.
        without: Whether to do without it, whatever there is.
        temp_dir: Where the snapshot of the index lies meanwhile; None for the system's directory of temporary files.

    Raises:
        HeatUnknownError: There is an index, and it cannot be gone by; the message says what to do.
        HFBucketError: The Hub does not say whether there is one.
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
