"""Lookups, reads, writes and deletes of full chunks, shared by both engine interfaces.

All functions take key strings and block the calling thread no longer than their deadline. A failure of a single chunk
never raises into the engine: the chunk is a miss, counted and logged with its reason.
"""

from __future__ import annotations

import contextlib
import logging
import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.concurrency import ReadPriority
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.files import TempDir
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.core.telemetry import Telemetry
from hfbucket_plugin.errors import HFBucketError, RefusedError
from hfbucket_plugin.hub.circuit_breaker import CircuitBreakers
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.hub.listing import list_chunks
from hfbucket_plugin.index.access.recorder import why_not
from hfbucket_plugin.index.reader import KeyIndex
from hfbucket_plugin.store.guarded import GuardedBucket
from hfbucket_plugin.store.lookup import Existence, Lookups
from hfbucket_plugin.store.quarantine import CorruptObjectLog, Quarantine
from hfbucket_plugin.store.read import Reader
from hfbucket_plugin.store.write import Writer
from hfbucket_plugin.store.write_queue import PutQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core import telemetry
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.errors import ItemFailure
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo

_log = logging.getLogger(__name__)

_WARM_UP_SECS: Final = 5.0
_WARM_UP_EVERY_SECS: Final = 10.0
"""Minimum seconds between two attempts, so that an outage does not double the number of requests that lookups cause."""


class ChunkStore:
    """Store for the chunks of one instance.

    Args:
        settings: Settings of the instance.
        instance: Name of the instance.
        sink: Metrics sink for outcomes.
        get_timeout_secs: Usual deadline of a get, in seconds.
    """

    def __init__(
        self, settings: InstanceSettings, instance: str, sink: telemetry.Sink, get_timeout_secs: float
    ) -> None:
        self.settings = settings
        self._get_secs = get_timeout_secs
        self.bucket: Bucket = open_bucket(settings, instance, sink, get_timeout_secs, online=True)
        self._handle = settings.bucket_handle
        self._outcomes = Telemetry(instance, sink, creates_bucket=settings.create_bucket_if_missing)
        self._temp_dir = TempDir(settings.download_tmp_dir)
        self.breakers = CircuitBreakers(
            settings, instance, sink,
            {"lookup": self._probe_lookup, "read": self._probe_read, "write": self._probe_write},
        )  # fmt: skip
        guarded = GuardedBucket(self.bucket, settings, instance, self.breakers, ReadPriority(), self._temp_dir)
        self._corrupt = CorruptObjectLog(self.bucket, settings, instance, sink)
        quarantine = Quarantine(changed=self._outcomes.quarantined, proven=self._corrupt.record)
        self.index = None if settings.index == "off" else KeyIndex(self.bucket, settings, instance, sink)
        self._existence = Existence(guarded, sink, index=self.index)
        self._lookups = Lookups(guarded, self._existence, self._outcomes, quarantine)
        self._reader = Reader(guarded, self._existence, self._outcomes, quarantine)
        self._writer = Writer(guarded, self._existence, self._outcomes, quarantine)
        self.read_many = self._reader.read_many
        self.puts = PutQueue(self._writer, self._outcomes, settings)
        self._next_warm_up = 0.0
        if why := why_not(settings):
            _log.warning("[%s] %s", instance, why)
        if self.index is not None:
            self.index.start()

    def begin(self, *, reads: bool = True) -> None:
        """Remove temporary files of dead processes and open a read session, both in the background.

        Args:
            reads: Whether this process will read chunks.
        """
        self._existence.in_background(self._temp_dir.sweep_quietly)
        if reads:
            self.warm_up()
        if self.settings.resolve_token() is None:
            _log.warning(
                "[%s] no token: the environment variable %s (token_env) is not set and there is no inline token; "
                "only public buckets can be read", self._outcomes.instance, self.settings.token_env,
            )  # fmt: skip

    # --- lookups ----------------------------------------------------------------------------------------------------

    def found(
        self,
        keys: Sequence[str],
        sizes: Sequence[int | None],
        *,
        prefix_only: bool = False,
        deadline: Deadline | None = None,
    ) -> list[bool]:
        """Return, for each key, whether a full chunk exists and would be served.

        Returns within `lookup_timeout_secs`. A failure counts as a miss and is counted and logged as a failure. Answers
        that are known locally are returned even while the Hub is unreachable.

        Args:
            keys: Key strings.
            sizes: Full chunk size of each key in bytes; None accepts any size except 0.
            prefix_only: Whether hits after the first miss are useless to the caller.
            deadline: When to give up; by default `lookup_timeout_secs` from now.
        """
        if not self.settings.reads:
            self.not_looked_up(len(keys), "role")
            return [False] * len(keys)
        self.warm_up()
        until = deadline or Deadline.after(self.settings.lookup_timeout_secs)
        return self._lookups.found(keys, sizes, until, prefix_only=prefix_only)

    def not_looked_up(self, chunks: int, why: str) -> None:
        """Count chunks that are misses for a reason of the engine interface, given as a label value."""
        self._outcomes.chunks("lookup", why, chunks)

    def kept_out(self, operation: str, chunks: int, why: str) -> None:
        """Count chunks of an operation that the engine interface skipped, with the reason as a label value."""
        self._outcomes.chunks(operation, why, chunks)

    def prefix_hits(self, keys: Sequence[str], size: int) -> int:
        """Return the number of leading keys that exist as full chunks of `size` bytes; see `found`."""
        return sum(self.found(keys, [size] * len(keys), prefix_only=True))

    def warm_up(self) -> None:
        """Open a read session in the background if there is none.

        At startup this saves the first read the access token, TLS and client setup, and logs an unusable token or
        bucket at once. When it starts with a lookup, it runs while the Hub answers the lookup.
        """
        if not self.settings.reads or self.breakers.is_open("read"):
            return
        if not self.bucket.transfer.ready and time.monotonic() >= self._next_warm_up:
            self._next_warm_up = time.monotonic() + _WARM_UP_EVERY_SECS
            self._existence.in_background(self._make_session)

    def _make_session(self) -> None:
        try:
            self.bucket.transfer.warm_up(Deadline.after(_WARM_UP_SECS))
        except HFBucketError as error:
            if not self._outcomes.excuses(error):
                self._outcomes.warn("session", error.kind, str(error))

    # --- reads ------------------------------------------------------------------------------------------------------

    def delete(self, keys: Sequence[str], deadline: Deadline) -> dict[str, ItemFailure]:
        """Delete chunks immediately and permanently.

        Args:
            keys: Key strings.
            deadline: When to give up.

        Returns:
            The failures, by key.

        Raises:
            RefusedError: The role of the instance is read-only.
            HFBucketError: The request failed as a whole.
        """
        started = time.monotonic()
        if not self.settings.writes:
            raise RefusedError(f"instance {self._outcomes.instance!r}: its role is read-only: nothing is deleted")
        paths = {self._handle.join(encode_name(key)): key for key in keys}
        try:
            self.breakers.check("lookup")
            failures = {paths.get(p, p): f for p, f in self.bucket.delete(list(paths), deadline).items()}
        except HFBucketError as error:
            for key in keys:  # the delete may have succeeded with only the response lost
                self._existence.drop(key)
            self._outcomes.failed("delete", error, len(keys), started)
            raise
        for key in keys:
            if key in failures:
                self._existence.drop(key)
                self._outcomes.warn("delete", failures[key].kind, f"{key}: {failures[key].message}")
            else:
                self._existence.deleted(key)
        self._outcomes.chunks("delete", "deleted", len(keys) - len(failures))
        self._outcomes.chunks("delete", "hub", len(failures))
        self._outcomes.ended("delete", "hub" if failures else "ok", started)
        return failures

    def look(self, keys: Sequence[str], deadline: Deadline) -> dict[str, ObjectInfo]:
        """Ask the Hub which chunks exist, ignoring all cached answers.

        Args:
            keys: Key strings.
            deadline: When to give up.

        Returns:
            The objects that exist, by key.

        Raises:
            HFBucketError: The Hub did not answer.
        """
        started = time.monotonic()
        paths = {self._handle.join(encode_name(key)): key for key in keys}
        try:
            self.breakers.check("lookup")
            found = self.bucket.stat(list(paths), deadline)
        except HFBucketError as error:
            self._outcomes.failed("delete", error, len(keys), started)
            raise
        there = {paths[path]: info for path, info in found.items() if path in paths}
        for key in keys:
            if key not in there:
                self._existence.deleted(key)
        return there

    def on_answers(self, learn: Callable[[Mapping[str, ContentId | None], float], None]) -> None:
        """Register a callback for lookup answers of the Hub: the contents by key, and the time of the request."""
        self._existence.learn = learn

    def list_keys(self) -> Iterator[str]:
        """Stream the key strings of this instance, without other prefixes' keys and objects that are not chunks.

        Raises:
            HFBucketError: A page of the listing failed.
        """
        with self.listing():
            for entry in list_chunks(self.bucket, [""]):
                yield entry.text

    @contextlib.contextmanager
    def listing(self) -> Iterator[None]:
        """Count the listing in a `with` block, whether of the whole bucket or of one page, by its outcome."""
        started = time.monotonic()
        try:
            yield
        except HFBucketError as error:
            self._outcomes.failed("list", error, 0, started)
            raise
        self._outcomes.ended("list", "ok", started)

    # --- probes of the circuit breakers: each has the deadline of the operation that it stands for --------------------

    def _probe_lookup(self) -> None:
        self._existence.probe(Deadline.after(self.settings.lookup_timeout_secs))

    def _probe_read(self) -> None:
        self._reader.probe(Deadline.after(self._get_secs))

    def _probe_write(self) -> None:
        self._writer.probe(Deadline.after(self.settings.put_timeout_secs))

    # --- shutdown -----------------------------------------------------------------------------------------------------

    def wait_for_puts(self, secs: float) -> None:
        """Wait for the puts in progress. Call before `close`.

        Args:
            secs: Maximum wait in seconds.
        """
        _, unfinished = wait(self.puts.pending.copy(), timeout=secs)
        if unfinished:
            _log.warning("[%s] closed with %d puts unfinished", self._outcomes.instance, len(unfinished))

    def finish(self, secs: float) -> None:
        """Record the last puts in the key index. Call before `close`.

        Args:
            secs: Maximum wait in seconds.
        """
        if self.index is not None:
            self.index.finish(secs)

    def close(self) -> None:
        """Refuse new work and abort all transfers without waiting. No buffer is accessed after the return."""
        self.breakers.close()
        self.puts.close()
        self._reader.close()
        self._writer.close()
        self._corrupt.close()
        self._existence.close()
        self.bucket.close()
        self._temp_dir.close()
