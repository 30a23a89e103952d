"""Listings of millions of chunks, several pages at a time: parts are listed side by side, and come in their order.

A page of the Hub names the one that follows it, so one listing is as slow as its pages are long in coming. Several
prefixes, and the parts of a prefix with very many chunks (`shards`), are independent of each other.
"""

from __future__ import annotations

import logging
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.bucket import Amount, Progress
from hfbucket_plugin.catalog import chunk_entry, without_covered
from hfbucket_plugin.deadlines import Deadline, expect_time
from hfbucket_plugin.errors import HFBucketError, KeyFormatError
from hfbucket_plugin.keys import decode_name, encode_name
from hfbucket_plugin.shards import encoded_shards, shards, whole_key
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from concurrent.futures import Future

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.catalog import ChunkEntry

_log = logging.getLogger(__name__)

THREADS: Final = 8
"""Pages asked for at a time. The quota counts requests, not how many there are at once; this keeps one driver's cores busy."""

_MOST_AHEAD: Final = 48
"""Pages that wait for their turn: about 40 MB."""

_ENDLESS: Final = 1 << 62
_PAGE_SECS: Final = 60.0
_INFO_SECS: Final = 15.0


@dataclass(slots=True)
class _Part:
    """What starts with one text, or is that text.

    Attributes:
        prefix: The start of the keys.
        name: The start of their objects' names: not of less, and where a part was cut from a longer one, of more.
        exact: Whether only the key of that name is wanted.
    """

    prefix: str
    name: str
    exact: bool = False
    pages: deque[list[ChunkEntry]] = field(default_factory=deque)
    cursor: str | None = None
    asked: Future[tuple[list[ChunkEntry], list[ObjectInfo], str | None]] | None = None
    progress: Progress | None = None
    ended: bool = False


def list_chunks_ahead(bucket: Bucket, key_prefixes: Iterable[str], *, any_model: bool = False) -> Iterator[ChunkEntry]:
    """As `catalog.list_chunks`, and in the same order, several pages at a time.

    Memory does not grow with the bucket: 48 pages wait at most.

    Args:
        bucket: The instance's.
        key_prefixes: Starts of key strings; an empty one is everything.
        any_model: Whether chunks are wanted of models whose names go on after an `@` in a prefix. A listing is then cut
            into more parts, and only where it is longer.

    Raises:
        HFBucketError: A page did not come: what was yielded is no complete listing.
    """
    listing = _Listing(bucket, without_covered(key_prefixes), any_model=any_model)
    try:
        yield from listing.chunks()
    finally:
        listing.close()


class _Listing:
    """One listing, driven by whoever takes its chunks."""

    def __init__(self, bucket: Bucket, prefixes: Iterable[str], *, any_model: bool) -> None:
        self._bucket = bucket
        self._any_model = any_model
        self._parts = deque(_Part(prefix, encode_name(prefix)) for prefix in prefixes)
        self._workers = WorkerPool("hfbucket-listing", THREADS)
        self._total: int | None = None
        self._amount = Amount(bucket)

    def close(self) -> None:
        self._workers.close()

    def chunks(self) -> Iterator[ChunkEntry]:
        while self._parts:
            head = self._parts[0]
            expect_time(f"listing {head.prefix!r}")
            self._ask()
            if head.pages:
                yield from head.pages.popleft()
            elif head.ended:
                self._parts.popleft()
            else:
                self._take_in()

    def _ask(self) -> None:
        """Ask for as many pages as may be under way, those that are wanted first before all others."""
        under_way = ahead = 0
        for number, part in enumerate(self._parts):
            if part.asked is None and not part.ended and (number == 0 or ahead < _MOST_AHEAD):
                part.asked = self._workers.submit(self._page, part.prefix, part.name, part.cursor, part.exact)
            under_way += part.asked is not None
            ahead += len(part.pages) + (part.asked is not None)
            if under_way == THREADS or ahead >= _MOST_AHEAD:
                return

    def _page(
        self, prefix: str, name: str, cursor: str | None, exact: bool
    ) -> tuple[list[ChunkEntry], list[ObjectInfo], str | None]:
        path = self._bucket.handle.join(name)
        deadline = Deadline.patient(_PAGE_SECS)
        if exact:
            infos, following = list(self._bucket.stat([path], deadline).values()), None
        else:
            infos, following = self._bucket.list_page(path, cursor, deadline)
        entries = (chunk_entry(self._bucket, info) for info in infos)
        return [entry for entry in entries if entry is not None and entry.text.startswith(prefix)], infos, following

    def _take_in(self) -> None:
        """Wait for an answer, and take in those that are there."""
        asked = {part.asked: part for part in self._parts if part.asked is not None}
        for future in wait(asked, return_when=FIRST_COMPLETED).done:
            part = asked[future]
            part.asked = None
            entries, infos, following = future.result()
            part.progress = part.progress or Progress(part.prefix)
            part.progress.see(infos, following)
            if following is not None:
                self._amount.see(len(infos))
            parts = self._cut(part, entries, following)
            if parts:
                place = self._parts.index(part)
                self._parts.remove(part)
                for one in reversed(parts):
                    self._parts.insert(place, one)
            else:
                _follow(part, entries, following)

    def _cut(self, part: _Part, entries: list[ChunkEntry], following: str | None) -> list[_Part]:
        """The parts of a part whose first page this is; none when it is listed page by page."""
        if following is None or part.cursor is not None or part.name != encode_name(part.prefix):
            return []
        texts = [entry.text for entry in entries]
        if not shards(part.prefix, texts, _ENDLESS):
            return []
        pages = self._objects() // len(texts)
        if self._any_model:
            parts = [_Part(_start(name, part.prefix), name) for name in encoded_shards(part.prefix, texts, pages)]
        else:
            parts = [_Part(prefix, encode_name(prefix)) for prefix in shards(part.prefix, texts, pages)]
        whole = parts and (self._any_model or whole_key(part.prefix))
        return [_Part(part.prefix, part.name, exact=True), *parts] if whole else parts

    def _objects(self) -> int:
        """How many objects the whole bucket has, asked for once; 0 when the Hub does not tell."""
        if self._total is None:
            try:
                total = self._bucket.info(Deadline.patient(_INFO_SECS)).get("totalFiles")
            except HFBucketError as error:
                _log.info("listed page by page, since the Hub does not tell how much there is: %s", error)
                total = None
            self._total = total if isinstance(total, int) else 0
        return self._total


def _start(name: str, shorter: str) -> str:
    """The start of keys that the start of a name stands for; a shorter one where it ends within an encoded character."""
    try:
        return decode_name(name)
    except KeyFormatError:
        return shorter


def _follow(part: _Part, entries: list[ChunkEntry], following: str | None) -> None:
    if entries:
        part.pages.append(entries)
    part.cursor, part.ended = following, following is None
