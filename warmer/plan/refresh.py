"""Second lookup of planned chunks in the bucket, just before they are copied."""

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
"""Seconds beyond its limit for which a lookup is awaited."""

_POLL_SECS: Final = 0.1
_PAUSE_SECS: Final = 30.0
"""Seconds without lookups after a failed one, in which chunks are copied as they were listed."""

CACHED_SEGMENTS: Final = 16
"""Number of cached segments: nodes that read the plan by themselves are rarely further apart."""


class RefreshedPlan:
    """A plan whose segments are looked up again when the first node reaches them.

    Hours may pass between the listing and that moment, in which chunks are deleted or rewritten. Nodes that keep pace
    share one lookup of a segment, so it costs the Hub as many requests as the listing did.

    Args:
        plan: A plan, or part of one.
        look_up: Returns chunks as the bucket has them now, such as `RefreshLookups.look_up`.
        cached: Number of cached segments.
    """

    def __init__(
        self, plan: Segments, look_up: Callable[[list[ChunkRef]], list[ChunkRef]], cached: int = CACHED_SEGMENTS
    ) -> None:
        self._plan = plan
        self._look_up = look_up
        self._cached = cached
        self._segments: OrderedDict[int, list[ChunkRef]] = OrderedDict()

    def chunks(self, start: int = 0) -> Iterator[ChunkRef]:
        """Yield the chunks of the plan from index `start` on; chunks deleted in the meantime are marked `gone`."""
        return chunks_from(self, start)

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self._plan.segments

    def segment(self, index: int) -> list[ChunkRef]:
        """Return the chunks of one segment, as the bucket has them."""
        segment = self._segments.get(index)
        if segment is None:
            segment = self._look_up(self._plan.segment(index))
            self._segments[index] = segment
            if len(self._segments) > self._cached:
                self._segments.popitem(last=False)
        return segment


class RefreshLookups:
    """Looks up chunks for a whole run. A stop takes effect even while the Hub hangs.

    Args:
        bucket: Bucket in which the chunks were listed.
        stop: Whether to stop.
        clock: Returns the time in seconds.
    """

    def __init__(self, bucket: Bucket, stop: Stop, clock: Callable[[], float] = time.monotonic) -> None:
        self._bucket = bucket
        self._stop = stop
        self._clock = clock
        self._again_at = 0.0

    def look_up(self, chunks: list[ChunkRef]) -> list[ChunkRef]:
        """Return the chunks as the bucket has them now; unchanged if the lookup fails or the run is stopped.

        A failed lookup is harmless: nodes check every byte that they fetch, so an old plan is no danger.
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
    """One lookup, in a daemon thread that does not delay the end of the command.

    Attributes:
        fresh: Chunks as the bucket has them; None until the lookup has succeeded.
        error: Error of a failed lookup.
    """

    def __init__(self, bucket: Bucket, chunks: list[ChunkRef]) -> None:
        super().__init__(name="warmer-lookup", daemon=True)
        self._bucket = bucket
        self._chunks = chunks
        self.fresh: list[ChunkRef] | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        """Send the request to the Hub."""
        try:
            self.fresh = _fresh(self._bucket, self._chunks)
        except Exception as error:  # noqa: BLE001 - after any error, chunks are copied as they were listed
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
