"""Listings in the background that correct the account of an instance, and give LMCache's eviction what there is to evict."""

from __future__ import annotations

import contextlib
import heapq
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.catalog import chunk_entry
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import BucketMissingError, HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.l2_keys import object_key

if TYPE_CHECKING:
    from lmcache.v1.distributed.api import ObjectKey

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.l2_usage import Usage

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
    """A listing under way: kept over pauses and failures, so that no page is asked for twice.

    Attributes:
        number: Which wish for a listing it grants.
        began: When, by this machine's clock.
        started: The same, monotonic.
        cursor: Of the next page; None before the first one.
        pages: Pages that came.
        tries: Failures of the next page.
        oldest: The oldest objects that were not told of yet; the newest of them first.
        oldest_left_out: When the oldest object was uploaded for which there was no room.
        told: Objects seen that were told of before.
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
    told: int = 0
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
        self._tell = tell
        self._by_itself = by_itself
        self._corrected = corrected
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._progress: _Progress | None = None
        self._asked = 0  # wishes for a listing that begins after them
        self._told_until = _LONG_AGO  # everything uploaded until then was told
        self._told_newest: datetime | None = None  # the newest object that was told; None where all were
        self._told_left = 0
        self._anew = False
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
        """Note that the account is wrong, and list again before anything more is evicted by it.

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
            return self._told_newest is not None and uploaded is not None and uploaded > self._told_newest

    def evicted(self, objects: int) -> None:
        """Count objects that are gone; when half of what LMCache was told of is, it is told of more."""
        with self._lock:
            self._told_left = max(0, self._told_left - objects)
            more = self._told_newest is not None and self._told_left <= _MOST_TOLD // 2 and self._progress is None
        if more:
            self._want()

    def again(self) -> None:
        """List soon, and tell of everything again, where listings are made at all."""
        if not self._by_itself:
            return
        with self._lock:
            self._anew = True  # taken up at the start of a listing: one that is under way has skipped objects
        self._want()

    def close(self) -> None:
        """List no more; a page under way ends by itself."""
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
            if self._anew:
                self._anew, self._told_until, self._told_newest = False, _LONG_AGO, None
            number = self._asked
            self._baseline = (files, self._usage.net) if isinstance(files, int) else None
        self._usage.begin()
        return _Progress(number, datetime.now(UTC), time.monotonic())

    def _list(self) -> None:
        """List what is left of the listing under way, or all."""
        if self._anew and self._progress is not None:
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
        if uploaded <= self._told_until:
            progress.told += 1
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
        told_before = self._told_until, self._told_newest
        told = self._choose(progress)
        try:
            corrected = self._usage.end(complete=progress.cursor is None)
            if told and not self._closed.is_set():
                self._tell([key for _, _, key, _ in told], [size for _, _, _, size in told])
            if corrected and not self._closed.is_set():
                self._corrected()
        except BaseException:
            self._told_until, self._told_newest = told_before
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
        room = max(0, _MOST_TOLD - progress.told)
        newest_first = sorted(progress.oldest)
        too_many = max(0, len(newest_first) - room)
        for at, *_ in newest_first[:too_many]:
            progress.oldest_left_out = min(progress.oldest_left_out, -at)
        chosen = newest_first[too_many:]
        with self._lock:
            self._told_left = progress.told + len(chosen)
            if progress.oldest_left_out == float("inf"):
                self._told_until, self._told_newest = max(self._told_until, progress.began - _SLACK), None
            elif chosen:
                self._told_newest = datetime.fromtimestamp(-chosen[0][0], UTC)
                # Those of one moment of which only some were told are told again.
                whole = next((at for at, *_ in chosen if -at < progress.oldest_left_out), None)
                if whole is not None:
                    self._told_until = datetime.fromtimestamp(-whole, UTC)
        return chosen
