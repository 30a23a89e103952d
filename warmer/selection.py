"""What the bucket holds of a selection: listed into a plan, and looked up once more just before it is copied."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.catalog import list_chunks
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError
from warmer.plan import PlanFile, Planner, chunks_from, gone

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.keys import Key
    from warmer.plan import PlannedChunk, Segments

_log = logging.getLogger(__name__)

_LOOKUP_SECS: Final = 15.0
CACHED_SEGMENTS: Final = 16
"""Segments that are remembered: nodes that read the plan for themselves are rarely further apart."""


def select(bucket: Bucket, prefixes: Sequence[str], takes: type[Key], path: Path) -> tuple[PlanFile, Counter[str]]:
    """List a selection into a plan file.

    Args:
        bucket: The instance's.
        prefixes: Starts of key strings.
        takes: The kind of key that the tier takes.
        path: Of the plan file.

    Returns:
        The plan, and how many chunks were passed by, by reason (see `Planner`).

    Raises:
        HFBucketError: The listing is not complete.
        OSError: The plan cannot be written.
    """
    planner = Planner(bucket.handle, takes)
    plan = PlanFile.write(path, planner.plan(list_chunks(bucket, prefixes)))
    return plan, planner.skipped


class FreshPlan:
    """A plan as nodes are given it: each segment is looked up once more when the first node comes to it.

    Between the listing and that moment hours may pass, in which chunks are deleted or written anew. Nodes that keep
    pace share one lookup of a segment, so it costs the Hub as many requests as the listing did.

    Args:
        plan: The plan, or a part of it.
        bucket: Where it was listed.
        cached: Segments that are remembered.
    """

    def __init__(self, plan: Segments, bucket: Bucket, cached: int = CACHED_SEGMENTS) -> None:
        self._plan = plan
        self._bucket = bucket
        self._cached = cached
        self._segments: OrderedDict[int, list[PlannedChunk]] = OrderedDict()

    def chunks(self, start: int = 0) -> Iterator[PlannedChunk]:
        """The plan from its chunk number `start` on; chunks that were deleted meanwhile are `gone`."""
        return chunks_from(self, start)

    @property
    def segments(self) -> int:
        """How many segments it has."""
        return self._plan.segments

    def segment(self, index: int) -> list[PlannedChunk]:
        """The chunks of one segment, as the bucket has them."""
        segment = self._segments.get(index)
        if segment is None:
            segment = look_up(self._bucket, self._plan.segment(index))
            self._segments[index] = segment
            if len(self._segments) > self._cached:
                self._segments.popitem(last=False)
        return segment


def look_up(bucket: Bucket, chunks: list[PlannedChunk]) -> list[PlannedChunk]:
    """The chunks as the bucket has them now.

    A lookup that fails changes nothing: nodes check every byte that they fetch, so an old plan is no danger.
    """
    try:
        found = bucket.stat([chunk.path for chunk in chunks], Deadline.after(_LOOKUP_SECS))
    except HFBucketError as error:
        _log.warning("%d chunks are copied as they were listed, since the Hub did not tell: %s", len(chunks), error)
        return chunks
    fresh = []
    for chunk in chunks:
        info = found.get(chunk.path)
        if info is None:
            fresh.append(gone(chunk))
        else:
            content = info.content
            fresh.append(
                replace(chunk, xet_hash=content.xet_hash, size=content.size, uploaded_at=info.uploaded_at, gone=False)
            )
    return fresh
