"""Lock of a bucket instance, and the thread that refreshes it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
from dataclasses import replace
from datetime import UTC
from typing import TYPE_CHECKING, Final, Self

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import HFBucketError, Interrupted, RefusedError, ThrottledError, TransportError
from hfbucket_plugin.hub import records
from hfbucket_plugin.hub.bucket import ListingProgress
from jobs.lock.claims import CLAIM, DELETING, LONGEST_SECONDS, Holder, LockClaim, LockHeldError, claims_in
from jobs.lock.clock import ServerClock, ask

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from jobs.lock.claims import LockKind


_log = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = LONGEST_SECONDS

_RENEW_AT: Final = 2 / 3
_RELEASE_TRIES: Final = 3
_UNSURE_SECS: Final = 15.0
_CLOCK_TRIES: Final = 3


class LockLostError(RefusedError):
    """The lock is lost; nothing that needs it may continue."""


class LockLapsedError(LockLostError):
    """The lock expired before its renewal: the Hub requested a long pause, or the process was suspended."""


class BucketLock:
    """Lock of one instance; thread-safe.

    Args:
        bucket: Client of the instance's bucket.
        what_for: Purpose shown to others, such as `cleanup`.
        seconds: Lifetime of a killed holder's lock; at most `LONGEST_SECONDS`.
        request_secs: Timeout of a request, in seconds.
        clock: The Hub's clock, which the lock also updates.
        kind: Kind of work that the lock makes exclusive.
    """

    def __init__(
        self,
        bucket: Bucket,
        what_for: str,
        *,
        seconds: int = DEFAULT_SECONDS,
        request_secs: float = 60.0,
        clock: ServerClock | None = None,
        kind: LockKind = DELETING,
    ) -> None:
        self._bucket = bucket
        self._kind = kind
        self._secs = request_secs
        self.clock = clock or ServerClock()
        owner = f"{what_for} on {platform.node()} pid {os.getpid()}"
        self._holder = Holder(secrets.token_hex(8), owner, min(seconds, LONGEST_SECONDS))
        self._mutex = threading.Lock()
        self._renewals = 0
        self._content: ContentId | None = None
        self._stops: datetime | None = None
        self._left = False
        self._written: list[str] = []

    @property
    def stops(self) -> datetime | None:
        """End of the lock by the Hub's clock, as last confirmed; None while it is not held."""
        return self._stops

    @contextlib.contextmanager
    def held(self) -> Iterator[BucketLock]:
        """Hold the lock for the length of a `with` block.

        Raises:
            LockHeldError: If another process holds the lock; the message names it.
            HFBucketError: If the claim cannot be created.
        """
        patient = True
        try:
            self._acquire()
            yield self
        except (Interrupted, KeyboardInterrupt):
            patient = False
            raise
        finally:
            self._release(patient=patient)

    def confirm(self, *, patient: bool = False) -> float:
        """Verify that the lock is still held, and renew it when due.

        Args:
            patient: Whether to wait out pauses of the Hub. A caller with work in progress must attend to it instead.

        Returns:
            Seconds for which the lock is certainly held from now on.

        Raises:
            LockLostError: If the lock is lost.
            HFBucketError: If the Hub does not answer, so that the state of the lock is unknown.
        """
        with self._mutex:
            own = self._own(self._claims(patient=patient))
            if self._seconds_to(own.stops) < self._holder.seconds * _RENEW_AT:
                own = self._renew(own, patient=patient)
            self._stops = own.stops
            return self._seconds_to(own.stops)

    def keep(self) -> None:
        """Renew the lock when due, and send no request otherwise: for phases that delete nothing.

        Raises:
            LockLostError: If the lock is lost.
            HFBucketError: If the Hub does not answer, so that the state of the lock is unknown.
        """
        if self._stops is None or self._seconds_to(self._stops) < self._holder.seconds * _RENEW_AT:
            self.confirm()

    def keep_planning(self) -> None:
        """Keep the lock while nothing is changed yet: wait out pauses, and claim it again if it expires.

        This is safe because everything planned without a lock is looked up again before it is applied.

        Raises:
            LockHeldError: If another process has taken the lock in the meantime.
            LockLostError: If the claim was removed.
            HFBucketError: If the Hub does not answer, so that the state of the lock is unknown.
        """
        if self._stops is not None and self._seconds_to(self._stops) >= self._holder.seconds * _RENEW_AT:
            return
        while True:
            try:
                self.confirm(patient=True)
            except LockLapsedError:
                self._make_again()
            except ThrottledError as error:
                Deadline.patient(self._secs).wait_out(error)
                continue
            return

    def _make_again(self) -> None:
        _log.warning("our lock ended during a pause of the Hub: it is made again")
        with self._mutex:
            # Remove the old claim first: it would precede the new one in the queue.
            records.remove(self._bucket, self._written, Deadline.patient(self._secs))
            self._written.clear()
            self._holder = replace(self._holder, id=secrets.token_hex(8))
            self._acquire()

    def leave(self) -> None:
        """Do not release the lock; let it expire, because a delete may still be in flight."""
        self._left = True

    def _acquire(self) -> None:
        # For people who inspect the bucket: other holders need only the name.
        record = {"owner": self._holder.owner, "lifetime_seconds": self._holder.seconds}
        self._content = records.upload(self._bucket, json.dumps(record).encode(), Deadline.patient(self._secs))
        sent = self.clock.monotonic()
        self._put(CLAIM, Deadline.patient(self._secs))
        answered = self.clock.monotonic()
        claims = self._claims(patient=True)
        own = next((claim for claim in claims if claim.holder == self._holder), None)
        if own is None or own.since is None:
            raise TransportError(f"the Hub took our lock and does not list it: nothing is {self._kind.done}; run again")
        self.clock.stamped(own.since, sent, answered)
        for _ in range(_CLOCK_TRIES):
            if answered - sent <= _UNSURE_SECS:
                break
            sent = self.clock.monotonic()  # after the wait for a pause, the claim's stamp says little
            ask(self._bucket, self.clock, self._secs)
            answered = self.clock.monotonic()
        for claim in claims[: claims.index(own)]:
            self._pass_over(claim)
        self._stops = own.stops

    def _pass_over(self, claim: LockClaim) -> None:
        """Remove an expired claim that precedes this one.

        Its objects are deleted, so that a suspended owner finds no lock when it resumes.
        """
        if self.clock.earliest() <= claim.stale:
            raise LockHeldError(
                f"{self._bucket.handle} is locked by {claim.holder.owner} since {_reported(claim.since)}; it ends by itself "
                f"when that is done, or at {_reported(claim.stale)} if that was killed"
            )
        _log.warning(
            "the lock of %s, last renewed %s, is stale and passed over", claim.holder.owner, _reported(claim.renewed)
        )
        records.remove(self._bucket, claim.paths, Deadline.patient(self._secs))

    def _claims(self, *, patient: bool) -> list[LockClaim]:
        prefix = self._bucket.handle.join(f"{self._kind.directory}/")
        claims = claims_in(
            self._bucket.list_objects(prefix, self._secs) if patient else self._listed_now(prefix), self._kind
        )
        for claim in claims:
            self.clock.saw(claim.renewed)
        return claims

    def _listed_now(self, prefix: str) -> Iterator[ObjectInfo]:
        """List without waiting for a pause: a caller with work in progress must attend to it."""
        progress, cursor = ListingProgress(prefix), None
        while True:
            infos, cursor = self._bucket.list_page(prefix, cursor, self._deadline())
            progress.see(infos, cursor)
            yield from infos
            if cursor is None:
                return

    def _own(self, claims: list[LockClaim]) -> LockClaim:
        """Return the own claim; raise `LockLostError` if it no longer holds."""
        for claim in claims:
            if claim.holder == self._holder and claim.since is not None:
                if self.clock.latest() >= claim.stops:
                    raise LockLapsedError(
                        f"our lock was not renewed in time: nothing more is {self._kind.done}; run again"
                    )
                return claim
            if self.clock.earliest() <= claim.stale:
                raise LockLostError(f"the lock went to {claim.holder.owner}: nothing more is {self._kind.done}")
        raise LockLostError(f"our lock was taken away: nothing more is {self._kind.done}; run again")

    def _seconds_to(self, moment: datetime) -> float:
        return (moment - self.clock.latest()).total_seconds()

    def _renew(self, own: LockClaim, *, patient: bool) -> LockClaim:
        self._renewals += 1
        seconds = self._seconds_to(own.stops)  # a later renewal would have no effect
        deadline = Deadline.after(seconds if patient else min(self._secs, seconds))
        self._put(str(self._renewals), deadline)
        renewed = self._own(self._claims(patient=patient))
        with contextlib.suppress(HFBucketError):  # they are also deleted at the end
            old = [path for path in own.paths if not path.endswith(f"@{CLAIM}")]
            records.remove(self._bucket, old, self._deadline())
        return renewed

    def _put(self, part: str, deadline: Deadline) -> None:
        """Create an object of the lock; its removal at the end is registered even if this fails."""
        if self._content is None:
            raise LockLostError("the lock was never ours")
        self._written.append(self._bucket.handle.join(self._name(part)))
        records.put(self._bucket, self._name(part), self._content, deadline)

    def _release(self, *, patient: bool) -> None:
        """Delete all objects of this lock by their recorded names: a listing may fail.

        The request ignores a pause of the Hub, because others wait for the lock; if it fails, the objects expire.
        """
        if not self._written:
            return
        if self._left:
            _log.warning("batches are still in progress: our lock ends by itself, in %d s", self._holder.seconds)
            return
        deadline = Deadline.patient(self._secs) if patient else self._deadline()
        problem: HFBucketError | None = None
        for number in range(_RELEASE_TRIES):
            try:
                # The first request ignores a pause: deletes may be served while listings are not.
                records.raise_failed(self._bucket.delete(self._written, deadline, urgent=not number))
            except HFBucketError as error:
                problem = error
            else:
                return
        _log.warning("our lock could not be taken away and ends in %d s: %s", self._holder.seconds, problem)

    def _name(self, part: str) -> str:
        return f"{self._kind.directory}/{self._holder.name(part)}"

    def _deadline(self) -> Deadline:
        return Deadline.after(self._secs)


def _reported(moment: datetime | None) -> str:
    return "?" if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")


_LOOK_SECS: Final = 5.0
_LOOKS: Final = 20
"""Number of checks per lifetime of a renewal, for short lifetimes."""


class LockRefresher:
    """Thread that renews a lock when due. Use it as a context manager, inside that of the lock.

    Args:
        lock: The lock, held.
        seconds: Lifetime of each renewal.
    """

    def __init__(self, lock: BucketLock, seconds: float) -> None:
        self._lock = lock
        self._every = min(_LOOK_SECS, seconds / _LOOKS)
        self._over = threading.Event()
        self._lost: LockLostError | None = None
        self._thread = threading.Thread(target=self._run, name="jobs-lock-refresher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()  # a renewal in progress ends by its deadline; the lock is released afterwards

    def check(self) -> None:
        """Raise if the lock is lost; send no request.

        Raises:
            LockLostError: If the lock is lost.
        """
        if self._lost is not None:
            raise self._lost

    def _run(self) -> None:
        while not self._over.wait(self._every):
            try:
                self._lock.keep()
            except LockLostError as error:
                self._lost = error
                return
            except HFBucketError as error:  # the code that needs the lock confirms it again
                _log.warning("the lock could not be renewed yet: %s", error)
