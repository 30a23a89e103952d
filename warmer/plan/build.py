"""Construction of a plan from keys, prefixes, prompts or access statistics."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import ClassicKey, MPKey, encode_name, is_probe, parse_key
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.listing import list_chunks, list_chunks_ahead
from hfbucket_plugin.index.access.table import open_access_table
from hfbucket_plugin.tools.selection import hottest_first, in_order, newest_first, within
from warmer.plan.key_files import keys_of, look_up_keys
from warmer.plan.plan_file import Planner

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.access.table import AccessTable
    from hfbucket_plugin.tools.selection import ChunkRef


_PAGE: Final = 1000
_REQUEST_SECS: Final = 60.0


@contextlib.contextmanager
def warmed(
    chunks: Iterable[ChunkRef], bucket: Bucket, now: datetime, temp_dir: Path
) -> Iterator[tuple[Iterator[ChunkRef], str]]:
    """Provide chunks with their heat, and the reason if there is none (otherwise empty), for the duration of a block.

    An unreadable index does not prevent the warm-up, because only the order of the chunks depends on it.

    Args:
        chunks: Chunks, in any order.
        bucket: Bucket of the instance.
        now: Current time.
        temp_dir: Directory for a temporary snapshot of the index.
    """
    with contextlib.ExitStack() as stack:
        try:
            table, why = (
                stack.enter_context(open_access_table(bucket, now, _REQUEST_SECS, temp_dir)),
                "no hits are recorded",
            )
        except HFBucketError as error:
            table, why = None, str(error)
        yield (iter(chunks), why) if table is None else (_with_access(chunks, table), "")


def _with_access(chunks: Iterable[ChunkRef], table: AccessTable) -> Iterator[ChunkRef]:
    chunks = iter(chunks)
    while page := list(islice(chunks, _PAGE)):
        for chunk, use in zip(page, table.look_up([encode_name(one.key) for one in page]), strict=True):
            yield replace(chunk, heat=use.bucket, last_hit=use.last)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from hfbucket_plugin.core.keys import Key
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.hub.listing import ChunkEntry
    from hfbucket_plugin.tools.prompts import PromptOrder
    from hfbucket_plugin.tools.selection import ChunkRef, Selection

    Listing = Callable[[Iterable[str]], Iterator[ChunkEntry]]

_log = logging.getLogger(__name__)

_WHY_CHARS: Final = 500
"""Maximum characters of a reason in the header of a plan, whose size is limited."""

_LOOKED_THROUGH: Final = 100_000
"""Maximum number of chunks searched for one of the other kind, to report that there is one."""

WORDS: Final[dict[type[Key], str]] = {
    ClassicKey: "keys of the classic engine",
    MPKey: "keys of MP mode (`lmcache server`)",
}


@dataclass(slots=True)
class PlanBuilder:
    """Selection of chunks from one bucket.

    Attributes:
        selection: Criteria.
        takes: Kind of key that the tiers accept.
        now: Time from which `since` counts back.
        prompts: Order of chunks in the prompts; None if the selection names no prompts.
        skipped: Chunks skipped, by reason: ``other_kind`` and ``probe`` (see `Planner`), ``not_chosen`` (listed, but
            excluded by a filter) and ``not_in_bucket`` (keys of a file).
        chosen: Number of chunks that were not skipped, before a budget is applied.
        cold: Why chunks are not ordered by their reads although this was requested; otherwise empty.
    """

    selection: Selection
    takes: type[Key]
    now: datetime
    prompts: PromptOrder | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    chosen: int = 0
    cold: str = ""

    def planned(self, bucket: Bucket, temp_dir: Path) -> Iterator[ChunkRef]:
        """Yield the chosen chunks, in the order in which they are to be copied.

        With prompts: in the order of the prompts, each from its start. With `hottest` or `max_bytes`: most read first, as far
        as the instance's key index has statistics. Without statistics, or with `newest`: newest first. With a file of keys:
        in the order of the file. Otherwise: by key.

        Args:
            bucket: Bucket of the instance.
            temp_dir: Directory for a file to sort in.

        Raises:
            ConfigError: A file of keys cannot be read.
            HFBucketError: The listing is incomplete.
            OSError: There is no room for sorting.
        """
        chunks = self.of(self._entries(bucket), bucket)
        selection, prompts = self.selection, self.prompts

        def cut(ordered: Iterable[ChunkRef]) -> Iterator[ChunkRef]:
            return within(ordered, selection.most, selection.max_bytes)

        if prompts is not None:
            return in_order(chunks, lambda chunk: (_placed(prompts, chunk), chunk.key), temp_dir, cut)
        if selection.most is None and selection.max_bytes is None:
            return chunks
        if not selection.wants_access:
            return in_order(chunks, newest_first, temp_dir, cut)
        return self._hottest(chunks, bucket, temp_dir, cut)

    def _hottest(
        self,
        chunks: Iterable[ChunkRef],
        bucket: Bucket,
        temp_dir: Path,
        cut: Callable[[Iterable[ChunkRef]], Iterator[ChunkRef]],
    ) -> Iterator[ChunkRef]:
        """Yield the most read chunks first; the newest first if no access statistics are available."""
        with warmed(chunks, bucket, self.now, temp_dir.parent) as (reported, why):
            self.cold = why[:_WHY_CHARS]
            if why:
                _log.info("the newest chunks come first, not those that are read most: %s", why)
            yield from in_order(reported, newest_first if why else hottest_first, temp_dir, cut)

    def of(self, entries: Iterable[ChunkEntry], bucket: Bucket) -> Iterator[ChunkRef]:
        """Yield the chosen chunks among the given ones, in their order."""
        planner = Planner(bucket.handle, self.takes)
        planner.skipped = self.skipped
        for chunk in planner.plan(self._chosen(entries)):
            self.chosen += 1
            yield chunk

    def _entries(self, bucket: Bucket) -> Iterator[ChunkEntry]:
        files = self.selection.keys_from
        if files:
            keys = itertools.chain.from_iterable(keys_of(path) for path in files)
            return look_up_keys(bucket, keys, self.skipped)
        named = bool(self.selection.model) or (self.prompts is not None and self.prompts.models is not None)
        return list_chunks_ahead(bucket, self.listed(self.takes), any_model=not named)

    def listed(self, kind: type[Key]) -> list[str]:
        """Return the prefixes of keys to list for one kind of key."""
        selection = self.selection
        if self.prompts is not None and self.prompts.models is not None and not selection.model:
            selection = selection.model_copy(update={"model": tuple(sorted(self.prompts.models))})
        return selection.listing_prefixes(kind)

    def _chosen(self, entries: Iterable[ChunkEntry]) -> Iterator[ChunkEntry]:
        passes = self._passes()
        for entry in entries:
            if passes(entry):
                yield entry
            else:
                self.skipped["not_chosen"] += 1

    def _passes(self) -> Callable[[ChunkEntry], bool]:
        prompts, filtered = self.prompts, self.selection.filter(self.now)
        if prompts is None:
            return filtered
        return lambda entry: filtered(entry) and prompts.place(entry.key) is not None

    def other_kind_found(self, bucket: Bucket) -> bool:
        """Return whether the selection would contain chunks of the kind that the tiers do not accept.

        Raises:
            HFBucketError: The Hub did not answer.
        """
        if self.skipped["other_kind"] or self.selection.keys_from:
            return self.skipped["other_kind"] > 0
        other = MPKey if self.takes is ClassicKey else ClassicKey
        filtered = self.selection.filter(self.now)
        entries = itertools.islice(list_chunks(bucket, self.listed(other)), _LOOKED_THROUGH)
        return any(isinstance(entry.key, other) and not is_probe(entry.text) and filtered(entry) for entry in entries)


def _placed(prompts: PromptOrder, chunk: ChunkRef) -> int:
    place = prompts.place(parse_key(chunk.key))
    if place is None:
        raise ValueError(f"{chunk.key} is of no prompt")
    return place
