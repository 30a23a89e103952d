"""Usage accounting of the MP adapter: objects, sizes, and the listings that correct them."""

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
    """Return one page of the MP keys of an instance, in the order of the Hub's listing.

    Args:
        bucket: Bucket of the instance.
        model: Restricts the page to keys of this model; None for all.
        page_size: Maximum number of entries, 1 to 10,000.
        cursor: Cursor from the previous page; None for the first.

    Raises:
        ValueError: `page_size` is out of range, or `cursor` was not issued by this function.
        HFBucketError: The Hub's listing failed.
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
            if len(entries) == page_size:  # another entry exists, so announce another page
                return KeyListPage(tuple(entries), _encode(*last))
            entries.append(entry)
            last = (place, info.path)
        if following is None:
            return KeyListPage(tuple(entries), None)
        # New objects push others into the next page, including ones that were already returned.
        place, after = following, None if passed else after


def _behind(infos: Sequence[ObjectInfo], after: str | None) -> Iterator[ObjectInfo]:
    """Yield the objects of a page after a path; if the path was deleted meanwhile, those that sort after it."""
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
    """Encode a cursor from the Hub's own page cursor (never an address) and the last path returned from that page."""
    return base64.urlsafe_b64encode(json.dumps([place, after]).encode()).decode()


def _decode(cursor: str) -> tuple[str | None, str]:
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError  # noqa: TRY301 - reworded below
        given = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if not isinstance(given, list):
            raise TypeError  # noqa: TRY301 - reworded below
        place, after = given
        if not (place is None or isinstance(place, str)) or not isinstance(after, str):
            raise TypeError  # noqa: TRY301 - reworded below
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise ValueError("the cursor is not one that this adapter gave; start without one") from None
    return place, after


_SHARD_BITS: Final = 10
_SHARD_SHIFT: Final = 64 - _SHARD_BITS
"""1,024 tables, so that one grows within milliseconds: at 10,000,000 objects each holds about 10,000."""

_FEWEST_SLOTS: Final = 8
_SIZE_BITS: Final = 40
_SIZE_MASK: Final = (1 << _SIZE_BITS) - 1
_OWNER_BITS: Final = 23
_OWNER_MASK: Final = (1 << _OWNER_BITS) - 1
_MARK: Final = 1 << 63

LARGEST_SIZE: Final = _SIZE_MASK
LARGEST_OWNER: Final = _OWNER_MASK


def digest_of(path: str) -> int:
    """Return the table key of a path: 63 bits of its BLAKE2b hash.

    The chance that any two of 10,000,000 paths share a digest is about 1 in 200,000; the account is then off by one
    object.
    """
    return int.from_bytes(hashlib.blake2b(path.encode(errors="surrogatepass"), digest_size=8).digest(), "big") | 1


class SizeTable:
    """Hash table from digest to size, owner and a mark; not thread-safe.

    Uses open addressing with linear probing. Size 0 marks a deleted entry, whose slot is reclaimed when its table
    grows.
    """

    def __init__(self) -> None:
        self._shards: list[_Shard | None] = [None] * (1 << _SHARD_BITS)
        self._generation = 0
        self.objects = 0

    def get(self, digest: int) -> tuple[int, int]:
        """Return the size and the owner of an entry; the size is 0 if there is none."""
        shard = self._shards[digest >> _SHARD_SHIFT]
        value = shard.get(digest) if shard is not None else 0
        return value & _SIZE_MASK, value >> _SIZE_BITS & _OWNER_MASK

    def set(self, digest: int, size: int, owner: int) -> None:
        """Add or replace an entry and mark it; size 0 deletes it."""
        number = digest >> _SHARD_SHIFT
        shard = self._shards[number]
        if shard is None:
            if not size:
                return
            shard = self._shards[number] = _Shard()
        old = shard.put(digest, (size | owner << _SIZE_BITS | self._generation) if size else 0)
        self.objects += bool(size) - bool(old & _SIZE_MASK)

    def unmark_all(self) -> None:
        """Remove all marks in constant time, by starting a new generation."""
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
            An owner and the bytes that it loses, one pair for each table and owner.
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
        """Total size of all arrays in bytes."""
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
        """Return the slot of a digest, or the free slot for it. A free slot has the value 0."""
        keys = self._keys
        slots = len(keys)
        at = (digest >> 1) % slots
        while (key := keys[at]) and key != digest:
            at += 1
            if at == slots:
                at = 0
        return at

    def _grow(self) -> None:
        """Grow the table by half of the live entries, and drop deleted ones."""
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
"""Maximum number of objects whose sizes are kept individually, in at most 320 MB. Those beyond it are only a sum, which
listings correct."""

_MOST_RECENT: Final = 16_384
"""Maximum number of recently changed objects. Answers to requests made before the change do not override it."""

_NOBODY: Final = 0


class Usage:
    """Total bytes below the prefix, and bytes of this process's own objects by cache salt; thread-safe.

    The count of an object is removed when any process deletes or replaces it, as found by own deletes, answers to
    lookups, and listings.

    Args:
        everybody: Whether to count objects of other processes too, for a limit on the total.
        most_objects: Maximum number of objects whose sizes are kept individually.
        clock: Monotonic clock in seconds.
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
        """Cache salt of each owner number; 0 stands for other processes."""
        self._bytes = 0
        self._by_owner: Counter[int] = Counter()
        self._more_bytes = self._more_objects = 0
        self._listed_more_bytes = self._listed_more_objects = 0
        self._recent: OrderedDict[int, float] = OrderedDict()
        self._listing = False
        self._began = self._listed_since = float("-inf")
        self.net = 0
        """Number of objects that this process added to the bucket, minus those that it deleted."""
        self.complete = False
        """Whether a listing has seen every object."""

    # --- own changes --------------------------------------------------------------------------------------------------

    def wrote(self, entries: Iterable[tuple[str, str, int]], replaced: Mapping[str, int]) -> None:
        """Count own writes.

        Args:
            entries: Path, cache salt and size in bytes of each object.
            replaced: Sizes in bytes of previous objects, by path, as far as they are known.
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
            held: Size in bytes of each deleted object, by path.
        """
        with self._lock:
            for path, size in held.items():
                digest = digest_of(path)
                self.net -= 1
                if not self._drop(digest):
                    self._drop_remaining(size)

    def gone(self, paths: Iterable[str]) -> dict[str, int]:
        """Remove objects that are missing although this process did not delete them.

        Returns:
            The counted bytes of each object that was counted, by path.
        """
        with self._lock:
            return {path: size for path in paths if (size := self._drop(digest_of(path)))}

    def learned(self, sizes: Mapping[str, int | None], asked: float) -> list[str]:
        """Correct the account by an answer of the Hub.

        Args:
            sizes: Sizes of objects in bytes, by path; None for a missing object.
            asked: Time of the request, by the clock; later changes override the answer.

        Returns:
            The paths of counted objects that are missing.
        """
        lost = []
        with self._lock:
            for path, size in sizes.items():
                digest = digest_of(path)
                known, owner = self._sizes.get(digest)
                if not (known or self.everybody) or not self._is_newer(digest, asked):
                    continue
                if size:  # even without a change: a listing in progress may have been requested earlier
                    self._set(digest, size, owner)
                elif known:
                    self._count(digest, 0, known, owner, owner)
                    lost.append(path)
        return lost

    def counts(self, paths: Sequence[str]) -> list[bool]:
        """Return whether each object is counted."""
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
            sizes: Path and size in bytes of each object.
            asked: Time of the request for the page, by the clock; later changes override the page.
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
                    if known:  # the known size is newer than this page, and the object exists
                        self._sizes.set(digest, known, owner)
                    continue
                if known or self._sizes.objects < self._most_objects:
                    self._count(digest, min(size, LARGEST_SIZE), known, owner, owner)
                else:
                    self._listed_more_bytes += size
                    self._listed_more_objects += 1

    def end(self, *, complete: bool) -> bool:
        """End a listing. A complete one removes the objects that it did not see.

        Returns:
            Whether anything was removed.
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
        """End a failed listing: keep what it counted, and remove nothing."""
        self.end(complete=False)

    # --- figures ------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Total bytes."""
        return self._bytes + self._more_bytes

    @property
    def objects(self) -> int:
        """Number of objects."""
        return self._sizes.objects + self._more_objects

    @property
    def exact(self) -> bool:
        """Whether every counted object is known individually."""
        return not self._more_objects

    @property
    def now(self) -> float:
        """Current time of the clock for `learned` and `listed`."""
        return self._clock()

    def by_salt(self) -> dict[str, int]:
        """Return the bytes of own objects by cache salt, without zeros."""
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
        """Remove an object; return the bytes that were counted for it."""
        self._is_newer(digest, self._clock())
        known, owner = self._sizes.get(digest)
        if known:
            self._count(digest, 0, known, owner, owner)
        return known

    def _is_newer(self, digest: int, since: float) -> bool:
        """Record when the state of an object was observed; return False if a later observation is known."""
        if since < max(self._listed_since, self._recent.get(digest, since)):
            return False
        self._recent[digest] = since
        self._recent.move_to_end(digest)
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)
        return True

    def _drop_remaining(self, size: int) -> None:
        """Remove one object that is not known individually, if any are counted."""
        if self._more_objects:
            self._more_objects -= 1
            self._more_bytes = max(0, self._more_bytes - size)


_log = logging.getLogger(__name__)

_SETTLE_SECS: Final = 0.2
"""Delay between the request for a listing and its start, in seconds: LMCache registers its listeners right after it has
made an adapter."""

_PAGE_SECS: Final = 60.0
_INFO_SECS: Final = 10.0
_RETRY_SECS: Final = 60.0
_TRIES: Final = 5
"""Number of consecutive failures of a page after which the listing restarts, because the Hub may no longer accept its
cursor."""

_GAPS_IN_RETRY: Final = 60
"""After a pause requested by the Hub, pages are a sixtieth of `_RETRY_SECS` apart; each further pause doubles that."""

_LONGEST_GAP_SECS: Final = 30.0
_FIRST_SHARE: Final = 60
"""A first listing of several pages waits before its second page for a random time, up to this fraction (one in N) of
`usage_refresh_secs`."""

_STALE_SHARE: Final = 3
"""Rest after a listing, as a multiple of its duration: listings that evictions request take at most a quarter of the
time."""

_STALE_PERCENT: Final = 100
"""List again if other processes deleted more than one in this many objects."""

_MOST_TOLD: Final = 1_000_000
"""Maximum number of objects reported to LMCache's eviction, which keeps a key of about 400 bytes for each; the oldest
first."""

_SLACK: Final = timedelta(minutes=5)
_LONG_AGO: Final = datetime.fromtimestamp(0, UTC)

Tell = Callable[[list["ObjectKey"], list[int]], None]


@dataclass(slots=True)
class _Progress:
    """State of a listing in progress, kept over pauses and failures, so that no page is requested twice.

    Attributes:
        number: Number of the request that this listing serves.
        began: Start, by this machine's clock.
        started: Start, by the monotonic clock.
        cursor: Cursor of the next page; None before the first one.
        pages: Number of pages received.
        tries: Number of failures of the next page.
        oldest: Heap of the oldest objects not reported yet, with the newest of them on top.
        oldest_left_out: Upload time of the oldest object that did not fit, in Unix seconds.
        reported: Number of objects seen that had been reported before.
        seen: Number of objects seen that had not.
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
    """Lists an instance on a thread of its own, periodically or only on request.

    Args:
        bucket: Bucket of the instance.
        usage: Account that the listing corrects.
        refresh_secs: Seconds from the end of a listing to the next one; 0 disables listings.
        max_pages: Maximum number of pages of a listing; None for all.
        tell: Called with objects that are new to this process, and their sizes, newest first: LMCache treats the keys
            of a call as one request's, and evicts those at its end first.
        by_itself: Whether to list at startup and periodically; else only when an eviction finds the account wrong.
        corrected: Called when a listing removed objects from the account.
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
        self._asked = 0  # requests for a listing that begins after them
        self._reported_until = _LONG_AGO  # everything uploaded until then was reported
        self._reported_newest: datetime | None = None  # newest reported object; None if all were reported
        self._reported_left = 0
        self._restart = False
        self._gap_secs = 0.0
        self._last_secs = 0.0
        self._rest_until = 0.0
        self._baseline: tuple[int, int] | None = None  # files of the bucket when a listing began, and `Usage.net` then
        self._trusted = not (refresh_secs and by_itself)
        if refresh_secs and by_itself:
            self._want()

    # --- requests of evictions ----------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether evictions may rely on the account: a listing has ended, and no error was found since."""
        with self._lock:
            return self._trusted

    def found_stale(self) -> bool:
        """Record that the account is wrong, and request a listing before further evictions.

        Returns:
            Whether a listing follows; False if `usage_refresh_secs` is 0.
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
        """Ask the Hub for the number of files; return whether other processes deleted more than 1 % of the objects.

        Raises:
            HFBucketError: The Hub did not answer.
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
        """Return whether older objects exist that were not reported to LMCache, and should be evicted first."""
        with self._lock:
            return self._reported_newest is not None and uploaded is not None and uploaded > self._reported_newest

    def evicted(self, objects: int) -> None:
        """Count evicted objects, and list again when half of the objects reported to LMCache are gone."""
        with self._lock:
            self._reported_left = max(0, self._reported_left - objects)
            more = (
                self._reported_newest is not None and self._reported_left <= _MOST_TOLD // 2 and self._progress is None
            )
        if more:
            self._want()

    def again(self) -> None:
        """List soon and report all objects again, if periodic listings are on."""
        if not self._by_itself:
            return
        with self._lock:
            self._restart = True  # applied when the next listing starts, because one in progress has skipped objects
        self._want()

    def close(self) -> None:
        """Stop listing; a page in progress ends by itself."""
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
            except RuntimeError:  # no thread is available: the next eviction retries
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
                self._give_up()  # the reads and writes report it
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
            except Exception:  # noqa: BLE001 - the next listing must follow after any error
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
            with contextlib.suppress(HFBucketError):  # the first page reports the error
                files = self._bucket.info(Deadline.after(_INFO_SECS)).get("totalFiles")
        with self._lock:
            if self._restart:
                self._restart, self._reported_until, self._reported_newest = False, _LONG_AGO, None
            number = self._asked
            self._baseline = (files, self._usage.net) if isinstance(files, int) else None
        self._usage.begin()
        return _Progress(number, datetime.now(UTC), time.monotonic())

    def _list(self) -> None:
        """Continue the listing in progress, or start one, and run it to the end."""
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
        """Wait until a page may be requested; return False if the listing was closed meanwhile."""
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
        """Leave more of the quota to other callers, because it was used up."""
        self._gap_secs = min(max(self._gap_secs * 2, _RETRY_SECS / _GAPS_IN_RETRY), _LONGEST_GAP_SECS)

    def _take_in(self, infos: list[ObjectInfo], asked: float, progress: _Progress) -> None:
        sizes = []
        for info in infos:
            chunk = chunk_entry(self._bucket, info)
            key = object_key(chunk.text) if chunk is not None else None
            if (
                key is None
            ):  # foreign, or of the classic engine: LMCache could not evict it, and would evict all others instead
                continue
            sizes.append((info.path, info.content.size))
            if self._by_itself:
                self._see(key, info, progress)
        self._usage.listed(sizes, asked)

    def _see(self, key: ObjectKey, info: ObjectInfo, progress: _Progress) -> None:
        """Keep an object if it is among the oldest that were not reported."""
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
        """Return the objects to report, newest first: as many of the oldest as fit."""
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
                # If only some of the objects of one time were reported, all of them are reported again.
                whole = next((at for at, *_ in chosen if -at < progress.oldest_left_out), None)
                if whole is not None:
                    self._reported_until = datetime.fromtimestamp(-whole, UTC)
        return chosen
