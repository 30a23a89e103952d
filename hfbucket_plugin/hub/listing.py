"""Listings of a bucket, parsed into keys and split into ranges that are listed in parallel."""

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
    """Chunk of an instance.

    Attributes:
        text: Key string.
        key: Parsed key.
        content: Hash and size.
        uploaded_at: Upload time; None if unknown.
    """

    text: str
    key: Key
    content: ContentId
    uploaded_at: datetime | None


def list_chunks(bucket: Bucket, key_prefixes: Iterable[str]) -> Iterator[ChunkEntry]:
    """Stream the chunks whose key starts with one of the prefixes, each chunk once.

    Memory use does not depend on the size of the bucket, because pages are read one by one. Objects that are not chunks
    (unparsable names, nested paths, metadata records) are skipped.

    Args:
        bucket: Bucket of the instance.
        key_prefixes: Starts of key strings; an empty one matches all.

    Raises:
        HFBucketError: A page failed; the chunks yielded before are not a complete listing.
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
    """Return the chunk of an object; None for objects of other instances and objects that are not chunks."""
    name = bucket.handle.relative(info.path)
    if name is None or "/" in name or name == RESERVED:
        return None
    try:
        text = decode_name(name)
        return ChunkEntry(text, parse_key(text), info.content, info.uploaded_at)
    except KeyFormatError:
        return None


_FIELDS: Final = "@-0123456789abcdef"
"""Characters that follow the model, up to the hash, in the order of object names (where `@` is written `%40`)."""

_HEXADECIMAL: Final = "0123456789ABCDEF"
_NAMES: Final = "%-." + "0123456789" + string.ascii_uppercase + "_" + string.ascii_lowercase + "~"
"""Characters of object names; `%` is followed by two hexadecimal digits (`keys.encode_name`)."""

_HASH_FIELD: Final = 3
"""Number of `@` before the hash, in both kinds of keys."""

_WASTE: Final = 4
"""At most one in this many of the expected pages is requested to find where chunks are."""


def shards(prefix: str, first_page: Sequence[str], pages: int) -> list[str]:
    """Return prefixes that together cover a longer listing, in the order of object names.

    Splitting a listing pays off if its first page does not reach beyond the first part. Hashes are evenly distributed,
    so each part then has several pages.

    Args:
        prefix: Start of the listed keys.
        first_page: Keys of the first of several pages.
        pages: Maximum number of pages.

    Returns:
        Parts such that each key longer than the prefix starts with one of them; empty if splitting does not pay off or
        cannot be decided.
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
    """Return parts like `shards` for keys of an unknown model, which may continue after an `@` with any character.

    Returns:
        Starts of object names, in order, such that the name of each key longer than the prefix starts with one of them;
        empty if splitting does not pay off.
    """
    common = _common(prefix, first_page)
    parts = [encode_name(prefix + common)]
    for length in range(len(common)):
        stem, one = encode_name(prefix + common[:length]), encode_name(common[length])
        for place, character in enumerate(one):  # `@` takes three characters
            among = _HEXADECIMAL if place else _NAMES
            parts += [stem + one[:place] + other for other in among if other != character]
    return sorted(parts) if common and len(parts) * _WASTE <= pages else []


def whole_key(prefix: str) -> bool:
    """Return whether the start of a key may be a complete key, which its parts would omit."""
    return prefix.count("@") == _HASH_FIELD and not prefix.endswith("@")


def _common(prefix: str, texts: Sequence[str]) -> str:
    """Return what follows the prefix in all texts, up to the end of the hash."""
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
"""Maximum number of concurrent page requests. The quota counts requests, not concurrency; this keeps the cores of one
driver busy."""

_MOST_AHEAD: Final = 48
"""Maximum number of pages waiting for their turn, about 40 MB."""

_ENDLESS: Final = 1 << 62
_INFO_SECS: Final = 15.0


@dataclass(slots=True)
class _Part:
    """Keys that start with a text, or the key that equals it.

    Attributes:
        prefix: Start of the keys.
        name: Start of their object names; it covers all keys of the part, and more if cut from a longer start.
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
    """Stream chunks in the order of `list_chunks`, with several concurrent page requests.

    Memory use does not depend on the size of the bucket: at most 48 pages wait.

    Args:
        bucket: Bucket of the instance.
        key_prefixes: Starts of key strings; an empty one matches all.
        any_model: Whether to include models whose names continue after an `@` in a prefix. A listing is then split into
            more parts, and only if it is longer.

    Raises:
        HFBucketError: A page failed; the chunks yielded before are not a complete listing.
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
        """Request as many pages as may be in progress, in the order in which they are needed."""
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
        """Wait for a response, and process all that have arrived."""
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
        """Return the parts of a part with the given first page; empty if it is listed page by page."""
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
        """Return the number of objects in the whole bucket, requested once; 0 if the Hub does not report it."""
        if self._total is None:
            try:
                total = self._bucket.info(Deadline.patient(_INFO_SECS)).get("totalFiles")
            except HFBucketError as error:
                _log.info("listing page by page, because the Hub does not report the number of objects: %s", error)
                total = None
            self._total = total if isinstance(total, int) else 0
        return self._total


def _start(name: str, shorter: str) -> str:
    """Return the key prefix that a name prefix stands for, shortened if it ends within an encoded character."""
    try:
        return decode_name(name)
    except KeyFormatError:
        return shorter


def _follow(part: _Part, entries: list[ChunkEntry], following: str | None) -> None:
    if entries:
        part.pages.append(entries)
    part.cursor, part.ended = following, following is None
