"""Listings of a bucket: parsed into keys, and split into ranges that are listed in parallel."""

from __future__ import annotations

import logging
import string
from collections import deque
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline, expect_time
from hfbucket_plugin.core.keys import RESERVED, decode_name, encode_name, parse_key
from hfbucket_plugin.errors import HFBucketError, KeyFormatError
from hfbucket_plugin.hub.bucket import ListingBound, ListingProgress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future
    from datetime import datetime

    from hfbucket_plugin.core.keys import ContentId, Key
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo


_PAGE_SECS: Final = 60.0


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One chunk of an instance.

    Attributes:
        text: Its key string.
        key: The same, parsed.
        content: Its hash and size.
        uploaded_at: When the Hub took it.
    """

    text: str
    key: Key
    content: ContentId
    uploaded_at: datetime | None


def list_chunks(bucket: Bucket, key_prefixes: Iterable[str]) -> Iterator[ChunkEntry]:
    """Stream the chunks whose key starts with one of the prefixes, each chunk once.

    Memory does not grow with the bucket: pages come one by one. Objects that are no chunks (names that do not parse,
    nested paths, our own records) are skipped.

    Args:
        bucket: The instance's.
        key_prefixes: Starts of key strings; an empty one is everything.

    Raises:
        HFBucketError: A page did not come: what was yielded is no complete listing.
    """
    for prefix in without_covered(key_prefixes):
        for info in bucket.list_objects(bucket.handle.join(encode_name(prefix)), _PAGE_SECS):
            entry = chunk_entry(bucket, info)
            if entry is not None and entry.text.startswith(prefix):
                yield entry


def without_covered(prefixes: Iterable[str]) -> list[str]:
    """Drop prefixes that a shorter one covers, so that no chunk is listed twice."""
    kept: list[str] = []
    for prefix in sorted(set(prefixes)):
        if not kept or not prefix.startswith(kept[-1]):
            kept.append(prefix)
    return kept


def chunk_entry(bucket: Bucket, info: ObjectInfo) -> ChunkEntry | None:
    """The chunk that an object is, or None for an object of another instance or of no chunk."""
    name = bucket.handle.relative(info.path)
    if name is None or "/" in name or name == RESERVED:
        return None
    try:
        text = decode_name(name)
        return ChunkEntry(text, parse_key(text), info.content, info.uploaded_at)
    except KeyFormatError:
        return None


_FIELDS: Final = "@-0123456789abcdef"
"""What follows the model, as far as the hash, in the order of objects' names (`@` is written `%40` there)."""

_HEXADECIMAL: Final = "0123456789ABCDEF"
_NAMES: Final = "%-." + "0123456789" + string.ascii_uppercase + "_" + string.ascii_lowercase + "~"
"""Characters of objects' names; what `%` begins goes on with two hexadecimal digits (`keys.encode_name`)."""

_HASH_FIELD: Final = 3
"""`@` before the hash, in keys of both kinds."""

_WASTE: Final = 4
"""Of the pages that there may be, one in so many may be asked for to find where chunks are."""


def shards(prefix: str, first_page: Sequence[str], pages: int) -> list[str]:
    """Starts of keys that together are a longer listing, in the order of objects' names.

    A listing is worth cutting when its first page does not come further than the first of the parts: as hashes are spread
    evenly, each part has then several pages.

    Args:
        prefix: The start of the keys that are listed.
        first_page: The keys of the first of its pages, of more than one.
        pages: How many there are at most.

    Returns:
        The parts, such that each key that is longer than the prefix starts with one of them; or none, when it is not
        worth it, or cannot be told.
    """
    common = _common(prefix, first_page)
    if not common or len(common) * len(_FIELDS) * _WASTE > pages:
        return []
    parts = [prefix + common]
    for length in range(len(common)):
        stem = prefix + common[:length]
        parts += [stem + other for other in _FIELDS if other != common[length]]
    return sorted(parts, key=lambda part: [_FIELDS.find(one) for one in part[len(prefix) :]])


def encoded_shards(prefix: str, first_page: Sequence[str], pages: int) -> list[str]:
    """As `shards`, where the model of the keys is not known: it may go on after an `@`, in any characters.

    Returns:
        Starts of objects' names, in their order, such that the name of each key that is longer than the prefix starts with
        one of them; or none.
    """
    common = _common(prefix, first_page)
    parts = [encode_name(prefix + common)]
    for length in range(len(common)):
        stem, one = encode_name(prefix + common[:length]), encode_name(common[length])
        for place, character in enumerate(one):  # `@` is written in three
            among = _HEXADECIMAL if place else _NAMES
            parts += [stem + one[:place] + other for other in among if other != character]
    return sorted(parts) if common and len(parts) * _WASTE <= pages else []


def whole_key(prefix: str) -> bool:
    """Whether the start of a key may be a key itself, which its parts then leave out."""
    return prefix.count("@") == _HASH_FIELD and not prefix.endswith("@")


def _common(prefix: str, texts: Sequence[str]) -> str:
    """What all the texts go on with after the prefix, as far as the end of the hash."""
    fields = prefix.count("@")
    if not texts or not 1 <= fields <= _HASH_FIELD:
        return ""
    least, greatest = min(texts), max(texts)
    end = start = len(prefix)
    while end < min(len(least), len(greatest)) and least[end] == greatest[end] and least[end] in _FIELDS:
        fields += least[end] == "@"
        if fields > _HASH_FIELD:
            break
        end += 1
    return least[start:end]


_log = logging.getLogger(__name__)

THREADS: Final = 8
"""Pages asked for at a time. The quota counts requests, not how many there are at once; this keeps one driver's cores busy."""

_MOST_AHEAD: Final = 48
"""Pages that wait for their turn: about 40 MB."""

_ENDLESS: Final = 1 << 62
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
    progress: ListingProgress | None = None
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
    """One listing, driven by the consumer of its chunks."""

    def __init__(self, bucket: Bucket, prefixes: Iterable[str], *, any_model: bool) -> None:
        self._bucket = bucket
        self._any_model = any_model
        self._parts = deque(_Part(prefix, encode_name(prefix)) for prefix in prefixes)
        self._workers = WorkerPool("hfbucket-listing", THREADS)
        self._total: int | None = None
        self._amount = ListingBound(bucket)

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
        """Ask for as many pages as may be in progress, those that are wanted first before all others."""
        in_progress = ahead = 0
        for number, part in enumerate(self._parts):
            if part.asked is None and not part.ended and (number == 0 or ahead < _MOST_AHEAD):
                part.asked = self._workers.submit(self._page, part.prefix, part.name, part.cursor, part.exact)
            in_progress += part.asked is not None
            ahead += len(part.pages) + (part.asked is not None)
            if in_progress == THREADS or ahead >= _MOST_AHEAD:
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
            part.progress = part.progress or ListingProgress(part.prefix)
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
                _log.info("listing page by page, because the Hub does not report the number of objects: %s", error)
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
