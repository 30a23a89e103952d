"""A lock of an instance, in its bucket: only one job at a time deletes from it, or makes its key index.

The Hub's batch call has no conditional write, so each contender adds a claim of its own, and the smallest
(`uploaded_at`, id) that lives holds (`jobs.claims`). A holder lists the claims again before every batch, and stops when its
own is gone, about to end, or no longer the smallest. All times are the Hub's (`jobs.hubclock`): a contender takes the
earliest that it can be there when it judges others, and the latest when it judges itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
from datetime import UTC
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError, RefusedError, TransportError
from jobs import small
from jobs.claims import CLAIM, DELETING, LONGEST_SECONDS, Claim, Holder, LockHeldError, claims_in
from jobs.hubclock import HubClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.content import Content
    from jobs.claims import LockKind

_log = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = LONGEST_SECONDS

_RENEW_AT: Final = 2 / 3
_RELEASE_TRIES: Final = 3


class LockLostError(RefusedError):
    """The lock is no longer ours: nothing more may be done that it is for."""


class LockLapsedError(LockLostError):
    """The lock ended before it could be renewed: the Hub wanted to be left alone for too long, or we slept."""


class Lock:
    """The lock of one instance; thread-safe.

    Args:
        bucket: The instance's.
        what_for: Named to others, such as `cleanup`.
        seconds: How long the lock of a holder that was killed keeps others out; at most `LONGEST_SECONDS`.
        request_secs: Most seconds of a request.
        clock: The Hub's, which this also sets.
        kind: What it keeps others from.
    """

    def __init__(
        self,
        bucket: Bucket,
        what_for: str,
        *,
        seconds: int = DEFAULT_SECONDS,
        request_secs: float = 60.0,
        clock: HubClock | None = None,
        kind: LockKind = DELETING,
    ) -> None:
        self._bucket = bucket
        self._kind = kind
        self._secs = request_secs
        self.clock = clock or HubClock()
        owner = f"{what_for} on {platform.node()} pid {os.getpid()}"
        self._holder = Holder(secrets.token_hex(8), owner, min(seconds, LONGEST_SECONDS))
        self._mutex = threading.Lock()
        self._renewals = 0
        self._content: Content | None = None
        self._stops: datetime | None = None
        self._left = False

    @property
    def stops(self) -> datetime | None:
        """Until when it is ours by the Hub's clock, as last confirmed; None while it is not."""
        return self._stops

    @contextlib.contextmanager
    def held(self) -> Iterator[Lock]:
        """Hold the lock for the length of a `with` block.

        Raises:
            LockHeldError: Another one holds it; the message names it.
            HFBucketError: The claim could not be made.
        """
        try:
            self._acquire()
            yield self
        finally:
            self._release()

    def confirm(self) -> float:
        """Make sure that the lock is still ours, and renew it where that is due.

        Returns:
            Seconds for which it is ours from now on, whatever happens.

        Raises:
            LockLostError: It is not ours any more.
            HFBucketError: Nobody knows: the Hub did not tell.
        """
        with self._mutex:
            own = self._own(self._claims())
            if self._seconds_to(own.stops) < self._holder.seconds * _RENEW_AT:
                own = self._renew(own)
            self._stops = own.stops
            return self._seconds_to(own.stops)

    def keep(self) -> None:
        """Renew the lock where that is due, and ask nothing where it is not: for stretches that delete nothing.

        Raises:
            LockLostError: It is not ours any more.
            HFBucketError: Nobody knows: the Hub did not tell.
        """
        if self._stops is None or self._seconds_to(self._stops) < self._holder.seconds * _RENEW_AT:
            self.confirm()

    def leave(self) -> None:
        """Release it not, but let it end by itself: something is under way that may still delete."""
        self._left = True

    def _acquire(self) -> None:
        # For people who look into the bucket: the name says all that contenders need.
        told = {"owner": self._holder.owner, "lifetime_seconds": self._holder.seconds}
        self._content = small.upload(self._bucket, json.dumps(told).encode(), self._deadline())
        sent = self.clock.monotonic()
        small.put(self._bucket, self._name(CLAIM), self._content, self._deadline())
        answered = self.clock.monotonic()
        claims = self._claims()
        own = next((claim for claim in claims if claim.holder == self._holder), None)
        if own is None or own.since is None:
            raise TransportError(f"the Hub took our lock and does not list it: nothing is {self._kind.done}; run again")
        self.clock.stamped(own.since, sent, answered)
        for claim in claims[: claims.index(own)]:
            self._pass_over(claim)
        self._stops = own.stops

    def _pass_over(self, claim: Claim) -> None:
        """Do so with a claim before ours, if it is dead.

        Its objects go, so that its owner, should it only have slept, finds no lock when it wakes up.
        """
        if self.clock.earliest() <= claim.stale:
            raise LockHeldError(
                f"{self._bucket.handle} is locked by {claim.holder.owner} since {_told(claim.since)}; it ends by itself "
                f"when that is done, or at {_told(claim.stale)} if that was killed"
            )
        _log.warning(
            "the lock of %s, last renewed %s, is stale and passed over", claim.holder.owner, _told(claim.renewed)
        )
        small.remove(self._bucket, claim.paths, self._deadline())

    def _claims(self) -> list[Claim]:
        prefix = self._bucket.handle.join(f"{self._kind.directory}/")
        claims = claims_in(self._bucket.list_objects(prefix, self._secs), self._kind)
        for claim in claims:
            self.clock.saw(claim.renewed)
        return claims

    def _own(self, claims: list[Claim]) -> Claim:
        """Our claim, while it holds."""
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

    def _renew(self, own: Claim) -> Claim:
        if self._content is None:
            raise LockLostError("the lock was never ours")
        self._renewals += 1
        deadline = Deadline.after(min(self._secs, self._seconds_to(own.stops)))
        small.put(self._bucket, self._name(str(self._renewals)), self._content, deadline)
        renewed = self._own(self._claims())
        with contextlib.suppress(HFBucketError):  # they are deleted at the end, too
            old = [path for path in own.paths if not path.endswith(f"@{CLAIM}")]
            small.remove(self._bucket, old, self._deadline())
        return renewed

    def _release(self) -> None:
        """Take all of our objects away; they end by themselves where that fails."""
        if self._content is None:
            return
        if self._left:
            _log.warning("batches are still under way: our lock ends by itself, in %d s", self._holder.seconds)
            return
        problem: HFBucketError | None = None
        for _ in range(_RELEASE_TRIES):
            try:
                paths = [path for claim in self._claims() if claim.holder == self._holder for path in claim.paths]
                small.remove(self._bucket, paths, self._deadline())
            except RefusedError as error:  # something strange lies among the locks
                paths = [self._bucket.handle.join(self._name(CLAIM))]
                with contextlib.suppress(HFBucketError):
                    small.remove(self._bucket, paths, self._deadline())
                    return
                problem = error
            except HFBucketError as error:
                problem = error
            else:
                return
        _log.warning("our lock could not be taken away and ends in %d s: %s", self._holder.seconds, problem)

    def _name(self, part: str) -> str:
        return f"{self._kind.directory}/{self._holder.name(part)}"

    def _deadline(self) -> Deadline:
        return Deadline.after(self._secs)


def _told(moment: datetime | None) -> str:
    return "?" if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
