"""Key index of an instance in an engine: the content of the bucket, known without asking the Hub.

Answers come from the first of three sources that knows the key: the overlay of single keys (own changes and answers of
the Hub), the journals since the snapshot, and the snapshot. One background thread refreshes them, and another writes
this process's journal. Lookups wait for neither.

Answers may be stale: a delete by another process is known after its journal, and one without the index after the next
snapshot. If the store lacks an object, its key is doubted, and for `_DOUBT_SECS` all other hits are checked with the
Hub. Stale entries therefore cannot add up until LMCache disables the engine (`health_monitor`), however many a cleanup
left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core import forks, telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId, encode_name, is_probe
from hfbucket_plugin.core.telemetry import RateLimitedLogger
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.index.access.recorder import HITS_ENTRIES, recorder_of
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.overlay import LocalOverlay
from hfbucket_plugin.index.refresh import (
    ListingSource,
    SnapshotSource,
    TooLargeError,
    journal_secs,
    problem_of,
    refresh_secs,
)
from hfbucket_plugin.index.store import IndexStore
from hfbucket_plugin.index.table import Absent, digests_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.index.access.recorder import AccessRecorder
    from hfbucket_plugin.index.refresh import Refreshed, ViewSource
    from hfbucket_plugin.index.table import View

_log = logging.getLogger(__name__)

_DOUBT_SECS: Final = 30.0
"""Interval in seconds at which LMCache's health monitor checks failed gets."""

_JOURNAL_SECS: Final = 30.0
_SPREAD: Final = (0.9, 1.1)
_FIRST_SPREAD: Final = (0.25, 1.0)
_FIRST_LISTING_SPREAD: Final = (1.0, 1.75)
"""Random range of the first wait, as a fraction of the full one, so that processes started together do not call
together. A listing has already cost the calls of the whole wait, so its first wait is never shorter."""

_MOST_DOUBLINGS: Final = 5
"""After consecutive failures the wait for a refresh grows up to 32-fold."""

_TOO_LARGE_SECS: Final = 6 * 3600.0
"""Seconds until a listing that did not fit is repeated; it costs the same calls."""

STATES: Final = ("usable", "loading", "missing", "stale", "too_large", "failed")


class KeyIndex:
    """Index of one instance; thread-safe.

    Args:
        bucket: Bucket of the instance.
        settings: Settings of the instance; `index` is not `off`.
        instance: Name of the instance.
        sink: Metrics sink for its state.
        clock: Monotonic clock in seconds.
    """

    def __init__(
        self,
        bucket: Bucket,
        settings: InstanceSettings,
        instance: str,
        sink: telemetry.Sink,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._settings = settings
        self._instance = instance
        self._sink = sink
        self._clock = clock
        self._limited = RateLimitedLogger(_log)
        self._closed = threading.Event()
        self._recent = LocalOverlay()
        self._make_journals()
        self._store = IndexStore(bucket, instance)
        self._journals = settings.index == "snapshot" and settings.writes
        self._source: ViewSource = (
            ListingSource(bucket, settings.index_max_bytes, self._closed)
            if settings.index == "listing"
            else SnapshotSource(self._store, self._journal.writer, settings.index_max_bytes, settings.reads)
        )
        self._view: View | None = None
        self._alive = False
        self._problem: HFBucketError | None = None
        self._crowded = ""
        self._failures = 0
        self._writers = 1
        self._state = "loading"
        self._hub_offset = time.time() - clock()
        self._renewed_at = clock()
        self._doubt_until = clock()
        self._starting = forks.ForkSafeLock()
        self._pid = 0
        self._log_state("loading")
        forks.reset_in_child(self._start_over)

    # --- lookups ----------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[str], *, misses: bool) -> dict[str, ContentId | None]:
        """Return what the index knows of keys; the Hub has to be asked about omitted ones.

        Args:
            keys: Key strings.
            misses: Whether misses may be trusted if `index_miss` is `trust`. If not, as for puts, answers of the Hub
                about keys that the index does not know are not trusted either, because no journal would report their
                end.
        """
        view = self._usable_view()
        # Not the probe, which LMCache writes and reads to test the bucket itself.
        asked = list(dict.fromkeys(key for key in keys if not is_probe(key)))
        if view is None or not asked:
            return {}
        trusts = misses and self._settings.index_miss == "trust"
        believes = self._clock() >= self._doubt_until
        digests = digests_of(map(encode_name, asked))
        found: dict[str, ContentId | None] = {}
        hits = 0
        for key, digest, answer in zip(asked, digests, view.look_up(digests), strict=True):
            note = self._recent.get(digest.tobytes())
            content = answer if isinstance(answer, ContentId) else None
            if note is not None:
                if note.doubtful or (note.reported and not misses):
                    continue
                content = note.content
            if content is not None and believes:
                found[key] = content
                hits += 1
            elif content is None and trusts:
                found[key] = None
        self._count_answers(hits, len(found) - hits, len(asked) - len(found))
        return found

    def _count_answers(self, hits: int, misses: int, asked: int) -> None:
        for outcome, number in (("hit", hits), ("miss", misses), ("asked", asked)):
            if number:
                self._sink.count(telemetry.INDEX_ANSWERS, number, instance=self._instance, outcome=outcome)

    def _usable_view(self) -> View | None:
        if self._pid != os.getpid() and not self._closed.is_set():
            self.start()  # in a forked child no thread of the parent runs
        view = self._view
        if view is None or self._age(view) > self._settings.index_max_age_secs:
            return None
        return view

    def _age(self, view: View) -> float:
        """Return the seconds since the snapshot was made or since it was last refreshed, whichever is longer."""
        return max(self._hub_now() - view.covers, self._clock() - self._renewed_at)

    def _hub_now(self) -> float:
        """Return the Hub's time as known from its responses, to about a second."""
        return self._clock() + self._hub_offset

    # --- state of single keys -------------------------------------------------------------------------------------------

    def wrote(self, key: str, content: ContentId) -> None:
        """Record a put by this process, to be reported in the journal."""
        self._did(key, content)

    def deleted(self, key: str) -> None:
        """Record a delete by this process, to be reported in the journal."""
        self._did(key, None)

    def _did(self, key: str, content: ContentId | None) -> None:
        if is_probe(key):
            return
        digest = digests_of([encode_name(key)]).tobytes()
        now, seq = self._clock(), 1  # numbered even without a journal: it was done, but not reported
        if self._journals:
            seq, dropped = self._journal.note(digest, content, now)
            if dropped:
                self._sink.count(telemetry.INDEX_DROPPED, dropped, instance=self._instance)
            if len(self._journal) >= self._settings.index_journal_entries:
                self._journal_due.set()
        self._recent.did(digest, content, seq, now, self._hub_now())

    def served(self, keys: Iterable[str]) -> None:
        """Record that the chunks of these keys were served to the engine, to be reported periodically as hits."""
        if self._recorder is not None:
            self._recorder.read(keys)

    def doubt(self, key: str) -> None:
        """Distrust everything known of a key: the Hub is asked the next time."""
        if not is_probe(key):
            self._recent.doubt(digests_of([encode_name(key)]).tobytes(), self._clock(), self._hub_now())

    def gone(self, key: str) -> None:
        """Record that the store lacks what the index says of a key; it and, for a while, all other hits are doubted."""
        self.doubt(key)
        self.doubt_all()

    def doubt_all(self) -> None:
        """Ask the Hub about all hits for a while."""
        self._doubt_until = self._clock() + _DOUBT_SECS

    def reported(self, answers: Mapping[str, ContentId | None], asked: float) -> None:
        """Record the Hub's answers that differ from the index.

        Args:
            answers: Content by key string; None for a miss.
            asked: Time of the request in monotonic seconds; later changes by this process take precedence.
        """
        view = self._usable_view()
        keys = [key for key in answers if not is_probe(key)]
        if view is None or not keys:
            return
        digests = digests_of(map(encode_name, keys))
        for key, row, answer in zip(keys, digests, view.look_up(digests), strict=True):
            digest, content = row.tobytes(), answers[key]
            believed = None if isinstance(answer, Absent) else answer
            if believed != content:
                # Dated at the request: changes by others while the answer was on its way take precedence.
                self._recent.reported(digest, content, asked, self._clock(), asked + self._hub_offset)
            else:
                self._recent.drop(digest, asked)

    # --- renewal --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the background refresh and the journal writer; if no thread is available, a later call does."""
        with self._starting:
            if self._closed.is_set() or self._pid == os.getpid():
                return
            names = [("refresh", self._run_refresh)] + [("journal", self._run_journal)] * self._journals
            try:
                for name, run in names:
                    threading.Thread(target=run, name=f"hfbucket-index-{name}-{self._instance}", daemon=True).start()
            except RuntimeError as error:
                self._limited.warning("thread", f"[{self._instance}] key index: not renewed for now: {error}")
                return
            self._pid = os.getpid()

    def _start_over(self) -> None:
        """Reset threads and journals in a forked child, where any lock may be held by a thread that does not run.

        The parent reports the pending entries.
        """
        closed = threading.Event()
        if self._closed.is_set():
            closed.set()
        self._closed = closed
        self._recent = self._recent.forked()
        self._make_journals()
        if isinstance(self._source, SnapshotSource):
            self._source.writer = self._journal.writer
        elif isinstance(self._source, ListingSource):
            self._source.closed = closed
        self._pid = 0

    def _make_journals(self) -> None:
        settings = self._settings
        self._refreshing, self._flushing = threading.Lock(), threading.Lock()
        self._journal_due = threading.Event()
        self._recorder = recorder_of(settings, self._clock())
        self._journal = JournalWriter(settings.index_journal_entries, settings.index_journal_waiting)
        self._hits = JournalWriter(HITS_ENTRIES, HITS_ENTRIES, hits=True)

    def _run_refresh(self) -> None:
        wait, spread = 0.0, _SPREAD
        first = _FIRST_LISTING_SPREAD if self._settings.index == "listing" else _FIRST_SPREAD
        while not self._closed.wait(wait * random.uniform(*spread)):
            try:
                self.refresh()
            except Exception:  # noqa: BLE001 - the next refresh must follow after any error
                _log.exception("[%s] key index: the refresh failed", self._instance)
            wait, spread = self.refresh_wait_secs, _SPREAD if wait else first

    @property
    def refresh_wait_secs(self) -> float:
        """Return the seconds until the next refresh, from the cost of the last one, the processes and the failures."""
        settings, calls = self._settings, self._source.calls
        secs = settings.index_refresh_secs
        if settings.index == "listing":
            if isinstance(self._problem, TooLargeError):
                return max(secs, _TOO_LARGE_SECS)
            wait = max(secs, min(calls * secs, settings.index_max_age_secs / 2))
        else:
            wait = refresh_secs(settings, self._writers, calls)
        longest = max(wait, settings.index_max_age_secs / 4)
        return float(min(longest, wait * 2 ** min(self._failures, _MOST_DOUBLINGS)))

    def refresh(self) -> int:
        """Look for a new snapshot and new journals now; a failure leaves the known state unchanged.

        Returns:
            The number of calls to the Hub, whatever the outcome.
        """
        with self._refreshing:
            began = self._clock()
            try:
                result = self._source.refresh(self._view)
                self._take(result, began)
            except Exception as error:  # noqa: BLE001 - any error is logged and the refresh repeated
                if not isinstance(error, HFBucketError):
                    _log.debug("[%s] key index: the refresh failed", self._instance, exc_info=True)
                self._problem = problem_of(error)
                self._failures += 1
                self._refreshed(self._problem.kind)
            return self._source.calls

    def _take(self, result: Refreshed, began: float) -> None:
        now = self._clock()
        began -= result.took
        if result.date is not None:
            passed = time.monotonic() - result.dated  # a snapshot may have been loaded meanwhile
            self._hub_offset = result.date + 0.5 + passed - now  # a header has whole seconds
        self._view, self._problem, self._failures, self._writers = result.view, result.problem, 0, result.writers
        # An index that no reader uses any more needs no journals, and no builder would prune them.
        self._alive = result.alive and self._hub_now() - result.covers <= self._settings.index_max_age_secs
        self._renewed_at = began
        if result.renewed:
            if self._settings.index == "listing":
                self._recent.listed(mono=began)
            else:
                self._recent.listed(hub=result.full)  # one made from journals keeps the errors of the previous one
                self._journal.forget_before(now - (self._hub_now() - result.listed))
                self._hits.forget_before(now, result.heat_until)
        self._recent.journalled(min(result.own_seq, self._journal.reported))
        if result.view is not None:
            self._recent.overruled(result.view.changes, *result.view.tiers)
        for outcome, number in (("folded", result.folded), ("garbage", result.garbage), ("unread", result.unread)):
            if number:
                self._sink.count(telemetry.INDEX_JOURNALS, number, instance=self._instance, outcome=outcome)
        if result.garbage:
            self._limited.warning(
                "garbage", f"[{self._instance}] key index: skipped {result.garbage} journals that are not valid"
            )
        if result.crowded:
            self._limited.warning(
                "crowded", f"[{self._instance}] key index: not all journals are read: {result.crowded}"
            )
        elif result.strangers:
            self._limited.warning(
                "strangers", f"[{self._instance}] key index: a refresh costs a call more: {result.strangers}"
            )
        self._crowded = result.crowded
        self._refreshed("ok" if result.problem is None else result.problem.kind)

    def _refreshed(self, outcome: str) -> None:
        self._sink.count(telemetry.INDEX_REFRESHES, instance=self._instance, outcome=outcome)
        view, problem = self._view, self._problem
        if view is not None and self._age(view) <= self._settings.index_max_age_secs:
            state = "usable"
        elif isinstance(problem, TooLargeError):
            state = "too_large"
        elif problem is not None:
            state = "failed"
        else:
            state = "stale" if view is not None else "missing"
        self._sink.gauge(telemetry.INDEX_KEYS, 0 if view is None else view.keys, instance=self._instance)
        self._sink.gauge(telemetry.INDEX_BYTES, 0 if view is None else view.nbytes, instance=self._instance)
        self._sink.gauge(telemetry.INDEX_AGE, 0 if view is None else max(0.0, self._age(view)), instance=self._instance)
        if problem is not None:
            self._limited.warning("refresh", f"[{self._instance}] key index: {problem}")
        if state != self._state:
            self._log_state(state)

    def _log_state(self, state: str) -> None:
        for one in STATES:
            self._sink.gauge(telemetry.INDEX_STATE, float(one == state), instance=self._instance, state=one)
        if self._settings.reads and state == "usable":
            keys = 0 if self._view is None else self._view.keys
            _log.info("[%s] key index: in use, %d keys", self._instance, keys)
        elif self._settings.reads and state != "loading":
            _log.warning("[%s] key index: %s", self._instance, _WORDS[state])
        self._state = state

    # --- the journal ----------------------------------------------------------------------------------------------------

    def _run_journal(self) -> None:
        done, next_at = True, self._clock() + self._journal_wait_secs
        while not self._closed.is_set():
            # Failed writes are not repeated sooner, however much is pending.
            pause = self._journal_due if done else self._closed
            pause.wait(self._settings.index_journal_secs * random.uniform(*_SPREAD))
            hurry = self._journal_due.is_set() and done
            self._journal_due.clear()
            if self._closed.is_set():
                return
            try:
                if not hurry and self._clock() < next_at:
                    self._look_at_hits()
                    continue
                done = self.flush()
            except Exception:  # noqa: BLE001 - the next journal must follow after any error
                _log.exception("[%s] key index: the journal failed", self._instance)
                done = False
            next_at = self._clock() + self._journal_wait_secs
            if done and len(self._journal) >= self._settings.index_journal_entries:
                self._journal_due.set()

    @property
    def _journal_wait_secs(self) -> float:
        """Return the seconds between two journals: longer, the more processes write some."""
        secs = journal_secs(self._settings, self._writers)
        return 0.0 if secs <= self._settings.index_journal_secs else secs * random.uniform(*_SPREAD)

    def _look_at_hits(self) -> None:
        with self._flushing:
            if self._recorder is not None:
                self._recorder.look(self._clock())

    def flush(self, *, last: bool = False) -> bool:
        """Write pending entries as journals now, in one call, if an index exists.

        Args:
            last: Whether this is the last flush, so that hits are reported before they are due.

        Returns:
            Whether everything due was written.
        """
        self._look_at_hits()
        with self._flushing:
            if not self._alive:
                return False
            if self._recorder is not None:
                self._publish_hits(self._recorder, last=last)
            return self._write()

    def _write(self) -> bool:
        """Write journals with new entries; return whether everything due was written, not counting hits."""
        now = self._clock()
        drafts = [(one, draft) for one in (self._journal, self._hits) if (draft := one.draft(now)) is not None]
        if not drafts:
            return True
        failed: Sequence[HFBucketError | None]
        try:
            failed = self._store.put_journals(
                [(draft.name.text, draft.data, draft.instead_of) for _, draft in drafts], Deadline.after(_JOURNAL_SECS)
            )
        except HFBucketError as error:
            failed = [error] * len(drafts)
        finally:
            for journal, _ in drafts:
                journal.attempted(self._clock())
        done = True
        for (journal, draft), why in zip(drafts, failed, strict=True):
            if why is None:
                journal.written(draft)
                self._sink.count(telemetry.INDEX_JOURNALS, instance=self._instance, outcome="written")
                continue
            done = done and journal is self._hits  # the outcome of hits delays nothing
            self._sink.count(telemetry.INDEX_JOURNALS, instance=self._instance, outcome="not_written")
            self._limited.warning("journal", f"[{self._instance}] key index: a journal was not written: {why}")
        return done

    def _publish_hits(self, heat: AccessRecorder, *, last: bool) -> None:
        """Report hits, if due and if the previous ones are in a journal; heat may wait."""
        if len(self._hits):
            return
        hits = heat.due(self._clock(), last=last)
        if hits and (lost := heat.take_lost()) is not None:
            self._hits.tell([*hits, lost], self._hub_now())
            self._limited.warning(
                "heat",
                f"[{self._instance}] key index: {lost.number} hits were dropped, because more keys were read than are "
                "reported: a cleanup by max_idle will count nothing as idle before now. Raise heat_keys, or lower heat_secs",
            )
        else:
            self._hits.tell(hits, self._hub_now())
        reported = sum(one.number for one in hits)
        for outcome, number in (("told", reported), ("dropped", heat.take_dropped())):
            if number:
                self._sink.count(telemetry.ACCESS_HITS, number, instance=self._instance, outcome=outcome)

    # --- status and shutdown --------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the state of the index for reports and monitoring."""
        view = self._view
        return {
            "state": self._state,
            "keys": 0 if view is None else view.keys,
            "age_seconds": None if view is None else round(max(0.0, self._age(view)), 1),
            "heat": "off" if self._recorder is None else "on",
            "problem": self._crowded or None if self._problem is None else str(self._problem),
        }

    def finish(self, secs: float) -> None:
        """Write a last journal of pending entries, including hits.

        Args:
            secs: Maximum wait in seconds.
        """
        news = len(self._journal) or (self._recorder is not None and len(self._recorder))
        if not news or not self._alive or self._pid != os.getpid():
            return
        last = threading.Thread(target=self._last_flush, name=f"hfbucket-index-last-{self._instance}", daemon=True)
        with contextlib.suppress(RuntimeError):  # no thread is available: the next listing includes it
            last.start()
            last.join(max(0.0, secs))

    def _last_flush(self) -> None:
        try:
            self.flush(last=True)
        except Exception:  # noqa: BLE001 - the process is about to end
            _log.exception("[%s] key index: the last journal failed", self._instance)

    def close(self) -> None:
        """Stop refreshing and writing, without waiting."""
        self._closed.set()
        self._journal_due.set()
        self._store.close()


_WORDS: Final = {
    "missing": "there is no snapshot below .hfbucket/index yet: lookups ask the Hub, as without an index",
    "stale": "the snapshot is older than index_max_age_secs: lookups ask the Hub, as without an index. Does its builder run?",
    "too_large": "it takes more memory than index_max_bytes: lookups ask the Hub, as without an index",
    "failed": "it could not be read: lookups ask the Hub, as without an index",
}
