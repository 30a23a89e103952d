"""Planned chunks with what the key index of their instance knows of their reads."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.heat_table import heat_of
from hfbucket_plugin.keys import encode_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.heat_table import HeatTable
    from warmer.plan import PlannedChunk

_PAGE: Final = 1000
_REQUEST_SECS: Final = 60.0


@contextlib.contextmanager
def warmed(
    chunks: Iterable[PlannedChunk], bucket: Bucket, now: datetime, scratch: Path
) -> Iterator[tuple[Iterator[PlannedChunk], str]]:
    """Chunks with their heat, for a stretch of work, and why there is none: empty where there is.

    An index that cannot be read is no reason not to warm: nothing but the order goes by it.

    Args:
        chunks: As they come.
        bucket: The instance's.
        now: The time.
        scratch: Where the snapshot of the index lies meanwhile.
    """
    with contextlib.ExitStack() as stack:
        try:
            table, why = stack.enter_context(heat_of(bucket, now, _REQUEST_SECS, scratch)), "no hits are recorded"
        except HFBucketError as error:
            table, why = None, str(error)
        yield (iter(chunks), why) if table is None else (_with_heat(chunks, table), "")


def _with_heat(chunks: Iterable[PlannedChunk], table: HeatTable) -> Iterator[PlannedChunk]:
    chunks = iter(chunks)
    while page := list(islice(chunks, _PAGE)):
        for chunk, use in zip(page, table.look_up([encode_name(one.key) for one in page]), strict=True):
            yield replace(chunk, heat=use.bucket, last_hit=use.last)
