"""What the MP adapter accounts for: objects, sizes, and the listings that correct them."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import heapq
import json
import logging
import random
import threading
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import numpy as np
from lmcache.v1.distributed.api import KeyEntry, KeyListPage

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.engine.mp_tasks import object_key
from hfbucket_plugin.errors import BucketMissingError, HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.hub.listing import chunk_entry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from lmcache.v1.distributed.api import ObjectKey

    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo


_LISTING_PAGE_SECS: Final = 30.0
_LARGEST_PAGE: Final = 10_000
_LONGEST_CURSOR: Final = 16_384


def list_page(bucket: Bucket, model: str | None, page_size: int, cursor: str | None) -> KeyListPage:
    """One page of the MP keys of an instance, in the order of the Hub's listing.

    Args:
        bucket: The instance's.
        model: Only keys of this model; None for all.
        page_size: Most entries, 1 to 10,000.
        cursor: Of the page before; None for the first.

    Raises:
        ValueError: `page_size` or `cursor` is none of ours.
        HFBucketError: The Hub's listing did not come.
    """
    if isinstance(page_size, bool) or not 0 < page_size <= _LARGEST_PAGE:
        raise ValueError(f"page_size must be 1 to {_LARGEST_PAGE}, not {page_size!r}")
    place, after = _decode(cursor) if cursor is not None else (None, None)
    prefix = bucket.handle.join(encode_name(f"{model}@") if model is not None else "")
    entries: list[KeyEntry] = []
    last: tuple[str | None, str] = (place, "")
    while True:
        infos, following = bucket.list_page(prefix, place, Deadline.after(_LISTING_PAGE_SECS))
        passed = after is None or any(info.path >= after for info in infos)
        for info in _behind(infos, after):
            entry = _entry(bucket, info, model)
            if entry is None:
                continue
            if len(entries) == page_size:  # there is one more: only now is another page promised
                return KeyListPage(tuple(entries), _encode(*last))
            entries.append(entry)
            last = (place, info.path)
        if following is None:
            return KeyListPage(tuple(entries), None)
        # Objects that came meanwhile push others into the next page: told ones too.
        place, after = following, None if passed else after


def _behind(infos: Sequence[ObjectInfo], after: str | None) -> Iterator[ObjectInfo]:
    """The objects of a page behind a path; where that was deleted meanwhile, those that sort behind it."""
    if after is None:
        yield from infos
        return
    index = next((at for at, info in enumerate(infos) if info.path == after), None)
    yield from infos[index + 1 :] if index is not None else [info for info in infos if info.path > after]


def _entry(bucket: Bucket, info: ObjectInfo, model: str | None) -> KeyEntry | None:
    chunk = chunk_entry(bucket, info)
    key = object_key(chunk.text) if chunk is not None else None
    if key is None or (model is not None and key.model_name != model):
        return None
    return KeyEntry(key.to_encoded_object_key(), info.content.size)


def _encode(place: str | None, after: str) -> str:
    """A cursor: the Hub's own cursor of a page, never an address, and the last path that was told of it."""
    return base64.urlsafe_b64encode(json.dumps([place, after]).encode()).decode()


def _decode(cursor: str) -> tuple[str | None, str]:
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError  # noqa: TRY301 - worded below
        given = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if not isinstance(given, list):
            raise TypeError  # noqa: TRY301 - worded below
        place, after = given
        if not (place is None or isinstance(place, str)) or not isinstance(after, str):
            raise TypeError  # noqa: TRY301 - worded below
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise ValueError("the cursor is not one that this adapter gave; start without one") from None
    return place, after


_SHARD_BITS: Final = 10
_SHARD_SHIFT: Final = 64 - _SHARD_BITS
"""1,024 tables, so that one grows in milliseconds: at 10,000,000 objects each holds about 10,000."""

_FEWEST_SLOTS: Final = 8
_SIZE_BITS: Final = 40
_SIZE_MASK: Final = (1 << _SIZE_BITS) - 1
_OWNER_BITS: Final = 23
_OWNER_MASK: Final = (1 << _OWNER_BITS) - 1
_MARK: Final = 1 << 63

LARGEST_SIZE: Final = _SIZE_MASK
LARGEST_OWNER: Final = _OWNER_MASK


def digest_of(path: str) -> int:
    """The key of a path: 63 bits of its BLAKE2b hash.

    Among 10,000,000 paths the chance that any two share a digest is about 1 in 200,000; the account is off by one object then.
    """
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogatepass"), digest_size=8).digest(), "big") | 1


class SizeTable:
    """Digest → size, owner and a mark; not thread-safe.

    Open addressing with linear probing. An entry of size 0 is a deleted one, whose slot is used again when its table grows.
    """

    def __init__(self) -> None:
        self._shards: list[_Shard | None] = [None] * (1 << _SHARD_BITS)
        self._generation = 0
        self.objects = 0

    def get(self, digest: int) -> tuple[int, int]:
        """The size and the owner of an entry; the size is 0 where there is none."""
        shard = self._shards[digest >> _SHARD_SHIFT]
        value = shard.get(digest) if shard is not None else 0
        return value & _SIZE_MASK, value >> _SIZE_BITS & _OWNER_MASK

    def set(self, digest: int, size: int, owner: int) -> None:
        """Add or replace an entry, and mark it; size 0 deletes it."""
        number = digest >> _SHARD_SHIFT
        shard = self._shards[number]
        if shard is None:
            if not size:
                return
            shard = self._shards[number] = _Shard()
        old = shard.put(digest, (size | owner << _SIZE_BITS | self._generation) if size else 0)
        self.objects += bool(size) - bool(old & _SIZE_MASK)

    def unmark_all(self) -> None:
        """Take the marks of all entries, at once: each has the mark of this generation or is set later."""
        self._generation ^= _MARK

    def mark_all(self) -> None:
        """Mark every entry."""
        for shard in self._shards:
            if shard is not None:
                values = shard.as_numpy()
                live = (values & np.uint64(_SIZE_MASK)) != 0
                values[live] = (values[live] & np.uint64(_MARK - 1)) | np.uint64(self._generation)

    def drop_unmarked(self) -> Iterator[tuple[int, int]]:
        """Delete the entries without a mark.

        Yields:
            The owner, and the bytes that it loses; one pair for each table and owner.
        """
        for shard in self._shards:
            if shard is None:
                continue
            values = shard.as_numpy()
            sizes = values & np.uint64(_SIZE_MASK)
            gone = (sizes != 0) & ((values & np.uint64(_MARK)) != np.uint64(self._generation))
            if not gone.any():
                continue
            owners = (values[gone] >> np.uint64(_SIZE_BITS)) & np.uint64(_OWNER_MASK)
            lost = sizes[gone]
            values[gone] = 0
            self.objects -= len(lost)
            for owner in np.unique(owners):
                yield int(owner), int(lost[owners == owner].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(shard.nbytes for shard in self._shards if shard is not None)


class _Shard:
    """One hash table."""

    __slots__ = ("_keys", "_taken", "_values")

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * _FEWEST_SLOTS))
        self._values = array("Q", bytes(8 * _FEWEST_SLOTS))
        self._taken = 0

    def get(self, digest: int) -> int:
        return self._values[self._slot(digest)]

    def put(self, digest: int, value: int) -> int:
        slot = self._slot(digest)
        old = self._values[slot]
        if self._keys[slot] != digest:
            if not value:
                return 0
            if (self._taken + 1) * 4 > len(self._keys) * 3:
                self._grow()
                slot = self._slot(digest)
            self._keys[slot] = digest
            self._taken += 1
        self._values[slot] = value
        return old

    def _slot(self, digest: int) -> int:
        """Where a digest is, or would be put. A free slot has the value 0."""
        keys = self._keys
        slots = len(keys)
        at = (digest >> 1) % slots
        while (key := keys[at]) and key != digest:
            at += 1
            if at == slots:
                at = 0
        return at

    def _grow(self) -> None:
        """Make room for half as many again as there are, and leave out what was deleted."""
        live = [(key, value) for key, value in zip(self._keys, self._values, strict=True) if value & _SIZE_MASK]
        slots = max(_FEWEST_SLOTS, len(live) * 2)
        self._keys = array("Q", bytes(8 * slots))
        self._values = array("Q", bytes(8 * slots))
        self._taken = len(live)
        for key, value in live:
            at = self._slot(key)
            self._keys[at], self._values[at] = key, value

    def as_numpy(self) -> npt.NDArray[np.uint64]:
        return np.frombuffer(self._values, dtype=np.uint64)

    @property
    def nbytes(self) -> int:
        return 16 * len(self._keys)


MOST_OBJECTS: Final = 10_000_000
"""Objects whose sizes are kept one by one: 320 MB at most. Those beyond it are a sum, which listings alone correct."""

_MOST_RECENT: Final = 16_384
"""Objects that were learnt of last: an answer of the Hub to a question asked before that changes nothing."""

_NOBODY: Final = 0


class Usage:
    """Bytes below the prefix in all, and of this process's own objects by cache salt; thread-safe.

    What was counted for an object is taken off when it is found gone, deleted or replaced, by any process: by own deletes,
    by the answers to lookups, and by listings.

    Args:
        everybody: Whether to count the objects of others too, for a bound on the whole; else own objects only.
        most_objects: Objects whose sizes are kept one by one.
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(
        self,
        *,
        everybody: bool = True,
        most_objects: int = MOST_OBJECTS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.everybody = everybody
        self._most_objects = most_objects
        self._clock = clock
        self._lock = forks.ForkSafeLock()
        self._sizes = SizeTable()
        self._owners: dict[str, int] = {}
        self._salts: list[str] = [""]
        """The cache salt of each owner number; 0 is nobody's, that is, another process's."""
        self._bytes = 0
        self._by_owner: Counter[int] = Counter()
        self._more_bytes = self._more_objects = 0
        self._listed_more_bytes = self._listed_more_objects = 0
        self._recent: OrderedDict[int, float] = OrderedDict()
        self._listing = False
        self._began = self._listed_since = float("-inf")
        self.net = 0
        """Objects that this process added to the bucket, less those that it deleted."""
        self.complete = False
        """Whether a listing has seen every object."""

    # --- own changes --------------------------------------------------------------------------------------------------

    def wrote(self, entries: Iterable[tuple[str, str, int]], replaced: Mapping[str, int]) -> None:
        """Count own writes.

        Args:
            entries: Path, cache salt and bytes of each object.
            replaced: Bytes of the objects that were there before, by path, as far as that is known.
        """
        with self._lock:
            for path, salt, size in entries:
                digest = digest_of(path)
                known, _ = self._sizes.get(digest)
                if not known and (old := replaced.get(path)):
                    self._drop_remaining(old)
                self.net += not known and path not in replaced
                self._is_newer(digest, self._clock())
                self._set(digest, size, self._owner(salt))

    def deleted(self, held: Mapping[str, int]) -> None:
        """Count own deletes.

        Args:
            held: Bytes of each object that was there, by path.
        """
        with self._lock:
            for path, size in held.items():
                digest = digest_of(path)
                self.net -= 1
                if not self._drop(digest):
                    self._drop_remaining(size)

    def gone(self, paths: Iterable[str]) -> dict[str, int]:
        """Take objects off that are not there, though this process did not delete them.

        Returns:
            What was counted for each of them that was counted, by path.
        """
        with self._lock:
            return {path: size for path in paths if (size := self._drop(digest_of(path)))}

    def learned(self, sizes: Mapping[str, int | None], asked: float) -> list[str]:
        """Correct the account by an answer of the Hub.

        Args:
            sizes: Bytes of objects by path; None for one that is not there.
            asked: When the question was asked, by the clock: later changes win.

        Returns:
            The paths of the objects that were counted and are not there.
        """
        lost = []
        with self._lock:
            for path, size in sizes.items():
                digest = digest_of(path)
                known, owner = self._sizes.get(digest)
                if not (known or self.everybody) or not self._is_newer(digest, asked):
                    continue
                if (
                    size
                ):  # also where nothing changes: a listing in progress may have been asked before, and is passed over
                    self._set(digest, size, owner)
                elif known:
                    self._count(digest, 0, known, owner, owner)
                    lost.append(path)
        return lost

    def counts(self, paths: Sequence[str]) -> list[bool]:
        """Whether each object is counted."""
        with self._lock:
            return [bool(self._sizes.get(digest_of(path))[0]) for path in paths]

    # --- listings -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a listing."""
        with self._lock:
            if self._listing:
                self._sizes.mark_all()
            self._sizes.unmark_all()
            self._listing, self._began = True, self._clock()
            self._listed_more_bytes = self._listed_more_objects = 0

    def listed(self, sizes: Iterable[tuple[str, int]], asked: float) -> None:
        """Count a page of the listing.

        Args:
            sizes: Path and bytes of each object.
            asked: When the page was asked for, by the clock: later changes win.
        """
        with self._lock:
            if not self._listing:
                return
            for path, size in sizes:
                digest = digest_of(path)
                known, owner = self._sizes.get(digest)
                if not (known or self.everybody):
                    continue
                if not self._is_newer(digest, asked):
                    if known:  # what is known is later than this page, and the object is there
                        self._sizes.set(digest, known, owner)
                    continue
                if known or self._sizes.objects < self._most_objects:
                    self._count(digest, min(size, LARGEST_SIZE), known, owner, owner)
                else:
                    self._listed_more_bytes += size
                    self._listed_more_objects += 1

    def end(self, *, complete: bool) -> bool:
        """End a listing: a complete one takes off what it did not see.

        Returns:
            Whether there was anything to take off.
        """
        with self._lock:
            if not self._listing:
                return False
            self._listing = False
            if not complete:
                self._sizes.mark_all()
                return False
            lost = list(self._sizes.drop_unmarked())
            for owner, size in lost:
                self._bytes -= size
                self._by_owner[owner] -= size
            self._more_bytes, self._more_objects = self._listed_more_bytes, self._listed_more_objects
            self.complete = self.everybody
            self._listed_since = self._began
            return bool(lost)

    def give_up(self) -> None:
        """End a listing that failed: what it saw stays counted, and nothing is taken off."""
        self.end(complete=False)

    # --- figures ------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self._bytes + self._more_bytes

    @property
    def objects(self) -> int:
        """Number of objects."""
        return self._sizes.objects + self._more_objects

    @property
    def exact(self) -> bool:
        """Whether every object that is counted is known one by one."""
        return not self._more_objects

    @property
    def now(self) -> float:
        """The clock that `learned` and `listed` go by."""
        return self._clock()

    def by_salt(self) -> dict[str, int]:
        """Bytes of own objects by cache salt, those above 0."""
        with self._lock:
            return {self._salts[owner]: size for owner, size in self._by_owner.items() if owner and size > 0}

    # --- under the lock -----------------------------------------------------------------------------------------------

    def _owner(self, salt: str) -> int:
        owner = self._owners.get(salt)
        if owner is None:
            if len(self._salts) > LARGEST_OWNER:
                return _NOBODY
            owner = self._owners[salt] = len(self._salts)
            self._salts.append(salt)
        return owner

    def _set(self, digest: int, size: int, owner: int) -> None:
        known, before = self._sizes.get(digest)
        if known or self._sizes.objects < self._most_objects:
            self._count(digest, min(size, LARGEST_SIZE), known, owner, before)
        elif self.everybody:
            self._more_bytes += size
            self._more_objects += 1

    def _count(self, digest: int, size: int, known: int, owner: int, before: int) -> None:
        self._bytes += size - known
        self._by_owner[before] -= known
        self._by_owner[owner] += size
        self._sizes.set(digest, size, owner)

    def _drop(self, digest: int) -> int:
        """Take an object off, and return what was counted for it."""
        self._is_newer(digest, self._clock())
        known, owner = self._sizes.get(digest)
        if known:
            self._count(digest, 0, known, owner, owner)
        return known

    def _is_newer(self, digest: int, since: float) -> bool:
        """Record when an object was learnt of; False where something later is known of it."""
        if since < max(self._listed_since, self._recent.get(digest, since)):
            return False
        self._recent[digest] = since
        self._recent.move_to_end(digest)
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)
        return True

    def _drop_remaining(self, size: int) -> None:
        """An object that is not known one by one went: it was among the rest, if there is any."""
        if self._more_objects:
            self._more_objects -= 1
            self._more_bytes = max(0, self._more_bytes - size)


_log = logging.getLogger(__name__)

_SETTLE_SECS: Final = 0.2
"""Between the wish for a listing and its start: LMCache makes an adapter, and registers its listeners right after that."""

_PAGE_SECS: Final = 60.0
_INFO_SECS: Final = 10.0
_RETRY_SECS: Final = 60.0
_TRIES: Final = 5
"""Failures of one page in a row after which the listing begins again: its cursor may be what the Hub does not take."""

_GAPS_IN_RETRY: Final = 60
"""After a pause that the Hub asked for, pages come a sixtieth of `_RETRY_SECS` apart; each further pause doubles that."""

_LONGEST_GAP_SECS: Final = 30.0
_FIRST_SHARE: Final = 60
"""A first listing of several pages waits before its second page: at random, up to a sixtieth of the time to the next listing."""

_STALE_SHARE: Final = 3
"""Listings that evictions ask for take a quarter of the time at most."""

_STALE_PERCENT: Final = 100
"""Objects that others deleted are a reason to list again when they are more than a hundredth of all."""

_MOST_TOLD: Final = 1_000_000
"""Objects that LMCache's eviction is told of: it keeps a key of about 400 bytes for each. The oldest are told first."""

_SLACK: Final = timedelta(minutes=5)
_LONG_AGO: Final = datetime.fromtimestamp(0, UTC)

Tell = Callable[[list["ObjectKey"], list[int]], None]


@dataclass(slots=True)
class _Progress:
    """A listing in progress: kept over pauses and failures, so that no page is asked for twice.

    Attributes:
        number: Which wish for a listing it grants.
        began: When, by this machine's clock.
        started: The same, monotonic.
        cursor: Of the next page; None before the first one.
        pages: Pages that came.
        tries: Failures of the next page.
        oldest: The oldest objects that were not told of yet; the newest of them first.
        oldest_left_out: When the oldest object was uploaded for which there was no room.
        reported: Objects seen that were told of before.
        seen: Objects seen that were not.
    """

    number: int
    began: datetime
    started: float
    cursor: str | None = None
    pages: int = 0
    tries: int = 0
    oldest: list[tuple[float, int, ObjectKey, int]] = field(default_factory=list)
    oldest_left_out: float = float("inf")
    reported: int = 0
    seen: int = 0


class UsageListing:
    """Lists an instance on a thread of its own: by itself every so often, or only when it is asked to.

    Args:
        bucket: The instance's.
        usage: Is corrected by what is there.
        refresh_secs: From the end of a listing to the next one; 0 never lists.
        max_pages: Most pages of a listing; None for all.
        tell: Given objects that are new to this process, with their sizes. The newest come first: LMCache takes the keys of
            a call for one request's, and evicts those at its end first.
        by_itself: Whether to list at first and every so often; else only when an eviction finds the account wrong.
        corrected: Called when a listing took objects off the account.
    """

    def __init__(
        self,
        bucket: Bucket,
        usage: Usage,
        refresh_secs: float,
        max_pages: int | None,
        tell: Tell,
        *,
        by_itself: bool = True,
        corrected: Callable[[], None] = lambda: None,
    ) -> None:
        self._bucket = bucket
        self._usage = usage
        self._refresh_secs = refresh_secs
        self._max_pages = max_pages
        self._notify = tell
        self._by_itself = by_itself
        self._corrected = corrected
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress: _Progress | None = None
        self._asked = 0  # wishes for a listing that begins after them
        self._reported_until = _LONG_AGO  # everything uploaded until then was told
        self._reported_newest: datetime | None = None  # the newest object that was told; None where all were
        self._reported_left = 0
        self._restart = False
        self._gap_secs = 0.0
        self._last_secs = 0.0
        self._rest_until = 0.0
        self._baseline: tuple[int, int] | None = None  # files of the bucket when a listing began, and `Usage.net` then
        self._trusted = not (refresh_secs and by_itself)
        if refresh_secs and by_itself:
            self._want()

    # --- what evictions ask ---------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the account may be evicted by: it was listed, and nothing was found wrong with it since."""
        with self._lock:
            return self._trusted

    def found_stale(self) -> bool:
        """Record that the account is wrong, and list again before anything more is evicted by it.

        Returns:
            Whether a listing comes: not where `usage_refresh_secs` is 0.
        """
        if not self._refresh_secs or self._closed.is_set():
            return False
        with self._lock:
            if self._trusted:
                self._trusted = False
                self._asked += 1
        self._want()
        return True

    def others_deleted(self) -> bool:
        """Ask how many files the bucket has, and tell whether others deleted more than a hundredth of the objects.

        Raises:
            HFBucketError: The Hub did not say.
        """
        with self._lock:
            baseline = self._baseline
        if baseline is None:
            return False
        files = self._bucket.info(Deadline.after(_INFO_SECS)).get("totalFiles")
        if not isinstance(files, int):
            return False
        before, net = baseline
        lost = before + (self._usage.net - net) - files
        return lost > self._usage.objects // _STALE_PERCENT

    def too_new(self, uploaded: datetime | None) -> bool:
        """Whether older objects are there that LMCache was not told of: they go first."""
        with self._lock:
            return self._reported_newest is not None and uploaded is not None and uploaded > self._reported_newest

    def evicted(self, objects: int) -> None:
        """Count objects that are gone; when half of what LMCache was told of is, it is told of more."""
        with self._lock:
            self._reported_left = max(0, self._reported_left - objects)
            more = (
                self._reported_newest is not None and self._reported_left <= _MOST_TOLD // 2 and self._progress is None
            )
        if more:
            self._want()

    def again(self) -> None:
        """List soon, and tell of everything again, where listings are made at all."""
        if not self._by_itself:
            return
        with self._lock:
            self._restart = True  # taken up at the start of a listing: one that is in progress has skipped objects
        self._want()

    def close(self) -> None:
        """List no more; a page in progress ends by itself."""
        self._closed.set()
        self._wanted.set()

    # --- the thread -----------------------------------------------------------------------------------------------------

    def _want(self) -> None:
        self._wanted.set()
        with self._lock:
            if (
                self._closed.is_set()
                or not self._refresh_secs
                or (self._thread is not None and self._thread.is_alive())
            ):
                return
            thread = threading.Thread(target=self._run, name="hfbucket-usage", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread is left: the next eviction asks again
                return
            self._thread = thread

    def _run(self) -> None:
        wait: float | None = None
        while True:
            self._wanted.wait(wait)
            self._closed.wait(self._rest_until - time.monotonic())
            if self._closed.wait(_SETTLE_SECS):
                return
            self._wanted.clear()
            try:
                self._list()
            except BucketMissingError:
                self._give_up()  # whatever reads or writes reports it
                wait = self._retry_secs()
            except ThrottledError as error:
                self._slow_down()
                wait = max(self._bucket.paused_secs, error.retry_after or 0.0)
                wait += self._gap_secs * random.random()
            except HFBucketError as error:
                wait = self._retry_secs()
                if self._progress is not None:
                    self._progress.tries += 1
                    if self._progress.tries >= _TRIES:
                        self._give_up()
                _log.warning("usage: the listing did not go on, and does in %.0f s: %s", wait, error)
            except Exception:  # noqa: BLE001 - whatever it was, the next listing must come
                self._give_up()
                wait = self._retry_secs()
                _log.exception("usage: the listing failed")
            else:
                wait = self._refresh_secs * random.uniform(0.75, 1.0) if self._by_itself else None

    def _retry_secs(self) -> float:
        return min(_RETRY_SECS, self._refresh_secs) * random.uniform(0.5, 1.0)

    def _give_up(self) -> None:
        self._progress = None
        self._usage.give_up()

    def _begin(self) -> _Progress:
        files = None
        if self._by_itself:
            with contextlib.suppress(HFBucketError):  # the first page tells what is wrong
                files = self._bucket.info(Deadline.after(_INFO_SECS)).get("totalFiles")
        with self._lock:
            if self._restart:
                self._restart, self._reported_until, self._reported_newest = False, _LONG_AGO, None
            number = self._asked
            self._baseline = (files, self._usage.net) if isinstance(files, int) else None
        self._usage.begin()
        return _Progress(number, datetime.now(UTC), time.monotonic())

    def _list(self) -> None:
        """List what is left of the listing in progress, or all."""
        if self._restart and self._progress is not None:
            self._give_up()
        if not self._wait_for_turn():
            return
        progress = self._progress = self._progress or self._begin()
        prefix = self._bucket.handle.join("")
        while self._wait_for_turn():
            asked = self._usage.now
            infos, following = self._bucket.list_page(prefix, progress.cursor, Deadline.after(_PAGE_SECS))
            if following is not None and following == progress.cursor:
                raise TransportError("usage: the Hub's next page is the one that was just listed")
            self._take_in(infos, asked, progress)
            progress.cursor, progress.pages, progress.tries = following, progress.pages + 1, 0
            if following is None or progress.pages == self._max_pages:
                self._end(progress)
                return

    def _wait_for_turn(self) -> bool:
        """Wait until a page may be asked for; False when this was closed meanwhile."""
        pause, progress = self._gap_secs, self._progress
        if progress is not None and progress.pages == 1 and not self._last_secs and not progress.number:
            spread = min(_RETRY_SECS, self._refresh_secs / _FIRST_SHARE)
            pause = max(pause, spread * random.random())
        while not self._closed.is_set():
            if paused := self._bucket.paused_secs:
                self._slow_down()
                pause = paused + self._gap_secs * random.random()
            pause = max(pause, self._bucket.background_wait_secs)
            if not pause:
                return True
            self._closed.wait(pause)
            pause = 0.0
        return False

    def _slow_down(self) -> None:
        """Leave more of the quota to others: it was used up."""
        self._gap_secs = min(max(self._gap_secs * 2, _RETRY_SECS / _GAPS_IN_RETRY), _LONGEST_GAP_SECS)

    def _take_in(self, infos: list[ObjectInfo], asked: float, progress: _Progress) -> None:
        sizes = []
        for info in infos:
            chunk = chunk_entry(self._bucket, info)
            key = object_key(chunk.text) if chunk is not None else None
            if (
                key is None
            ):  # foreign, or the classic engine's: LMCache could not evict it, and would evict all others in its stead
                continue
            sizes.append((info.path, info.content.size))
            if self._by_itself:
                self._see(key, info, progress)
        self._usage.listed(sizes, asked)

    def _see(self, key: ObjectKey, info: ObjectInfo, progress: _Progress) -> None:
        """Keep the oldest of what was not told."""
        uploaded = info.uploaded_at or _LONG_AGO
        if uploaded <= self._reported_until:
            progress.reported += 1
            return
        at = uploaded.timestamp()
        entry = (-at, progress.seen, key, info.content.size)
        progress.seen += 1
        if len(progress.oldest) < _MOST_TOLD:
            heapq.heappush(progress.oldest, entry)
        else:
            left_out = heapq.heappushpop(progress.oldest, entry)
            progress.oldest_left_out = min(progress.oldest_left_out, -left_out[0])

    def _end(self, progress: _Progress) -> None:
        reported_before = self._reported_until, self._reported_newest
        reported = self._choose(progress)
        try:
            corrected = self._usage.end(complete=progress.cursor is None)
            if reported and not self._closed.is_set():
                self._notify([key for _, _, key, _ in reported], [size for _, _, _, size in reported])
            if corrected and not self._closed.is_set():
                self._corrected()
        except BaseException:
            self._reported_until, self._reported_newest = reported_before
            raise
        self._progress = None
        self._last_secs = time.monotonic() - progress.started
        self._rest_until = time.monotonic() + min(self._last_secs * _STALE_SHARE, self._refresh_secs)
        self._gap_secs = self._gap_secs / 2 if self._gap_secs > _RETRY_SECS / _GAPS_IN_RETRY else 0.0
        with self._lock:
            self._trusted = self._asked == progress.number
        if self._asked != progress.number:
            self._wanted.set()

    def _choose(self, progress: _Progress) -> list[tuple[float, int, ObjectKey, int]]:
        """The objects to tell of, the newest first: as many of the oldest as there is room for."""
        room = max(0, _MOST_TOLD - progress.reported)
        newest_first = sorted(progress.oldest)
        too_many = max(0, len(newest_first) - room)
        for at, *_ in newest_first[:too_many]:
            progress.oldest_left_out = min(progress.oldest_left_out, -at)
        chosen = newest_first[too_many:]
        with self._lock:
            self._reported_left = progress.reported + len(chosen)
            if progress.oldest_left_out == float("inf"):
                self._reported_until, self._reported_newest = max(self._reported_until, progress.began - _SLACK), None
            elif chosen:
                self._reported_newest = datetime.fromtimestamp(-chosen[0][0], UTC)
                # Those of one moment of which only some were told are told again.
                whole = next((at for at, *_ in chosen if -at < progress.oldest_left_out), None)
                if whole is not None:
                    self._reported_until = datetime.fromtimestamp(-whole, UTC)
        return chosen
