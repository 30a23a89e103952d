"""What a build of a key index goes by. Pure: whether a listing is due, and which old objects nobody needs any more."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.index_store import MAX_JOURNALS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import datetime, timedelta

    from hfbucket_plugin.bucket import ObjectInfo
    from hfbucket_plugin.index_format import Pointer
    from hfbucket_plugin.index_store import Journal

_SNAPSHOT: Final = re.compile(r"[0-9]{8}T[0-9]{6}-[0-9a-f]{8}\.npy")
"""As `IndexStore.put_snapshot` names them: what is called otherwise is not ours to delete."""

_AHEAD_SECS: Final = 60.0


def why_listing(
    pointer: Pointer | None, now: float, every_secs: float, journals: int, max_age_secs: float = math.inf
) -> str:
    """Why a snapshot has to be made of a listing; empty where the one before and the journals will do.

    Args:
        pointer: To the present snapshot; None where there is none.
        now: The Hub's time, in seconds since 1970.
        every_secs: How old the listing that the present one goes back to may be.
        journals: How many there are.
        max_age_secs: `index_max_age_secs`: writers tell nothing of what they do while the present one is older.
    """
    if pointer is None:
        return "there is no snapshot yet"
    if journals > MAX_JOURNALS:
        return f"there are more than {MAX_JOURNALS:,} journals, which nobody reads"
    if pointer.full > now + _AHEAD_SECS or pointer.covers > now + _AHEAD_SECS:
        return "the times of the present snapshot are ahead of the Hub's clock"
    if now - pointer.full >= every_secs:
        return "the last listing is older than --full-every"
    if now - pointer.covers >= max_age_secs:
        return "the present snapshot is older than index_max_age_secs, and writers have told of nothing since"
    return ""


def spare_snapshots(
    snapshots: Iterable[ObjectInfo], present: str, now: datetime, keep: int, grace: timedelta
) -> Iterator[tuple[ObjectInfo, datetime]]:
    """Snapshots that may go, each with its time.

    Args:
        snapshots: All that there are.
        present: The path of the one that is pointed to, which always stays.
        now: The Hub's time.
        keep: How many stay, that one included; at least 1.
        grace: None goes that is younger: a reader that found its pointer just now is still loading it.
    """
    others = [
        (one, one.uploaded_at)
        for one in snapshots
        if one.path != present and one.uploaded_at is not None and _SNAPSHOT.fullmatch(one.path.rpartition("/")[2])
    ]
    others.sort(key=lambda pair: (pair[1], pair[0].path), reverse=True)
    for one, at in others[max(0, keep - 1) :]:
        if at <= now - grace:
            yield one, at


def spare_journals(journals: Sequence[Journal], covers: float, now: datetime, grace: timedelta) -> Iterator[Journal]:
    """Journals that may go: the present snapshot covers them, and they are older than the grace period.

    In that time readers may still go by the snapshot before it.

    Args:
        journals: All that are known.
        covers: Of the present snapshot.
        now: The Hub's time.
        grace: None goes that is younger.
    """
    for journal in journals:
        if journal.at < covers and journal.at <= (now - grace).timestamp():
            yield journal
