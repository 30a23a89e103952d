"""Claims on an instance, read from objects of its bucket. Pure: which claim holds, and which are dead.

A claim is one object that is never rewritten, so that its `uploaded_at` gives its place in the queue; renewals are
further objects. Owner, lifetime and number are in the names, so that one listing shows everything:

    <prefix>/.hfbucket/locks/<id>@<seconds>@<owner>@claim
    <prefix>/.hfbucket/locks/<id>@<seconds>@<owner>@<number of the renewal>

Builders of the key index have a separate lock, below `index-locks/`: they and jobs that delete do not block each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.hub.bucket import ObjectInfo

CLAIM: Final = "claim"

_NAME: Final = re.compile(
    r"(?P<id>[0-9a-f]{16})@(?P<secs>[1-9][0-9]{0,5})@(?P<owner>[^@/]{1,300})@(?P<part>claim|[0-9]{1,9})"
)
LONGEST_SECONDS: Final = 600
"""Maximum lifetime in seconds of a claim or renewal, whatever its name says: any writer of the bucket can create one.

Longer than the longest pause that the Hub requests (300 s), during which a holder cannot renew."""

_MARGIN: Final = 0.1
"""Fraction of the lifetime by which a holder stops early and others wait longer, because clocks are not exact."""


class LockHeldError(RefusedError):
    """Another process holds the lock of the instance."""


@dataclass(frozen=True, slots=True)
class LockKind:
    """Kind of exclusive work; locks of different kinds are independent.

    Attributes:
        directory: Directory of the claims of this kind, below the instance's prefix.
        done: Participle of the work that needs the lock, used in messages.
    """

    directory: str
    done: str


DELETING: Final = LockKind(f"{RESERVED}/locks", "deleted")
INDEXING: Final = LockKind(f"{RESERVED}/index-locks", "published")


@dataclass(frozen=True, slots=True)
class Holder:
    """Owner of a claim.

    Attributes:
        id: Unique identifier.
        owner: Host, process and purpose, as text.
        seconds: Lifetime of the claim and of each renewal.
    """

    id: str
    owner: str
    seconds: int

    def name(self, part: str) -> str:
        """Return the name of an object of the claim, below the directory of its kind."""
        return f"{self.id}@{self.seconds}@{quote(self.owner, safe=' :')[:300]}@{part}"


@dataclass(frozen=True, slots=True)
class LockClaim:
    """Claim with its renewals.

    Attributes:
        holder: Owner of the claim.
        since: Upload time of the claim; None if only renewals are left.
        renewed: Upload time of its last object.
        paths: Paths of all its objects.
    """

    holder: Holder
    since: datetime | None
    renewed: datetime
    paths: tuple[str, ...] = field(repr=False)

    @property
    def rank(self) -> tuple[datetime, str]:
        """Place in the queue: the live claim with the smallest rank holds the lock."""
        return self.since or self.renewed, self.holder.id

    @property
    def stops(self) -> datetime:
        """Time at which the holder stops working unless it has renewed the claim."""
        return self.renewed + timedelta(seconds=self._term * (1 - _MARGIN))

    @property
    def stale(self) -> datetime:
        """Time from which others may ignore the claim."""
        return self.renewed + timedelta(seconds=self._term * (1 + _MARGIN))

    @property
    def _term(self) -> int:
        return min(self.holder.seconds, LONGEST_SECONDS)


def claims_in(infos: Iterable[ObjectInfo], kind: LockKind = DELETING) -> list[LockClaim]:
    """Return the claims in a listing of the directory of their kind, in queue order.

    Raises:
        RefusedError: If an object does not belong to a claim: a newer version may have other rules.
    """
    parts: dict[Holder, list[tuple[str, ObjectInfo, datetime]]] = {}
    for info in infos:
        match = _NAME.fullmatch(info.path.rpartition("/")[2])
        if match is None or info.uploaded_at is None:
            raise RefusedError(
                f"{info.path} lies where locks do and is none that is known: nothing is {kind.done}. If no newer version "
                "works on this instance, delete it"
            )
        holder = Holder(match["id"], unquote(match["owner"], errors="replace"), int(match["secs"]))
        parts.setdefault(holder, []).append((match["part"], info, info.uploaded_at))
    return sorted((_claim(holder, found) for holder, found in parts.items()), key=lambda claim: claim.rank)


def _claim(holder: Holder, found: list[tuple[str, ObjectInfo, datetime]]) -> LockClaim:
    since = next((at for part, _, at in found if part == CLAIM), None)
    return LockClaim(holder, since, max(at for _, _, at in found), tuple(info.path for _, info, _ in found))
