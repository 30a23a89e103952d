"""What the bucket holds of a selection: listed into a plan, and looked up once more just before it is copied."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.deadline import Deadline
from warmer.plan.plan_file import chunks_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.selection import ChunkRef
    from hfbucket_plugin.tools.signals import Stop
    from warmer.plan.plan_file import Segments

_log = logging.getLogger(__name__)

_LOOKUP_SECS: Final = 15.0
_GRACE_SECS: Final = 5.0
"""A lookup that goes on for so much longer than it may is not waited for."""

_POLL_SECS: Final = 0.1
_PAUSE_SECS: Final = 30.0
"""How long no lookup is made after one failed: chunks are then copied as they were listed."""

CACHED_SEGMENTS: Final = 16
"""Segments that are remembered: nodes that read the plan for themselves are rarely further apart."""


class RefreshedPlan:
    """A plan as nodes are given it: each segment is looked up once more when the first node comes to it.

    Between the listing and that moment hours may pass, in which chunks are deleted or rewritten. Nodes that keep
    pace share one lookup of a segment, so it costs the Hub as many requests as the listing did.

    Args:
        plan: The plan, or a part of it.
        look_up: Tells chunks as the bucket has them now, such as `RefreshLookups.look_up`.
        cached: Segments that are remembered.
    """

    def __init__(
        self, plan: Segments, look_up: Callable[[list[ChunkRef]], list[ChunkRef]], cached: int = CACHED_SEGMENTS
    ) -> None:
        self._plan = plan
        self._look_up = look_up
        self._cached = cached
        self._segments: OrderedDict[int, list[ChunkRef]] = OrderedDict()

    def chunks(self, start: int = 0) -> Iterator[ChunkRef]:
        """The plan from its chunk number `start` on; chunks that were deleted meanwhile are `gone`."""
        return chunks_from(self, start)

    @property
    def segments(self) -> int:
        """How many segments it has."""
        return self._plan.segments

    def segment(self, index: int) -> list[ChunkRef]:
        """The chunks of one segment, as the bucket has them."""
        segment = self._segments.get(index)
        if segment is None:
            segment = self._look_up(self._plan.segment(index))
            self._segments[index] = segment
            if len(self._segments) > self._cached:
                self._segments.popitem(last=False)
        return segment


class RefreshLookups:
    """Looks chunks up for a whole run. The Hub may hang: an order to stop is obeyed meanwhile.

    Args:
        bucket: Where they were listed.
        stop: Says whether to stop.
        clock: Tells the time, in seconds.
    """

    def __init__(self, bucket: Bucket, stop: Stop, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = bucket
        self._stop = stop
        self._clock = clock
        self._again_at = 0.0

    def look_up(self, chunks: list[ChunkRef]) -> list[ChunkRef]:
        """The chunks as the bucket has them now; unchanged where the lookup fails or the run is stopped.

        A lookup that fails changes nothing: nodes check every byte that they fetch, so an old plan is no danger.
        """
        if self._stopped() or self._clock() < self._again_at:
            return chunks
        asked = _Asked(self._bucket, chunks)
        asked.start()
        end = self._clock() + _LOOKUP_SECS + _GRACE_SECS
        while asked.is_alive() and not self._stopped() and self._clock() < end:
            asked.join(_POLL_SECS)
        if asked.fresh is not None:
            return asked.fresh
        if not self._stopped():
            self._again_at = self._clock() + _PAUSE_SECS
            reason = asked.error or "no answer"
            _log.warning(
                "chunks are copied as they were listed for %g s, since the Hub did not tell: %s", _PAUSE_SECS, reason
            )
        return chunks

    def _stopped(self) -> bool:
        return self._stop.requested


class _Asked(threading.Thread):
    """One lookup. Nobody waits for it when the command ends.

    Attributes:
        fresh: The chunks as the bucket has them; None until the lookup has succeeded.
        error: Why it did not.
    """

    def __init__(self, bucket: Bucket, chunks: list[ChunkRef]) -> None:
        super().__init__(name="warmer-lookup", daemon=True)
        self._bucket = bucket
        self._chunks = chunks
        self.fresh: list[ChunkRef] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Ask the Hub."""
        try:
            self.fresh = _fresh(self._bucket, self._chunks)
        except Exception as error:  # noqa: BLE001 - whatever it is, chunks are copied as they were listed
            self.error = error


def _fresh(bucket: Bucket, chunks: list[ChunkRef]) -> list[ChunkRef]:
    found = bucket.stat([chunk.path for chunk in chunks], Deadline.patient(_LOOKUP_SECS))
    fresh = []
    for chunk in chunks:
        info = found.get(chunk.path)
        if info is None:
            fresh.append(replace(chunk, gone=True))
        else:
            content = info.content
            fresh.append(
                replace(chunk, xet_hash=content.xet_hash, size=content.size, uploaded_at=info.uploaded_at, gone=False)
            )
    return fresh
