"""Claims on an instance, as objects of its bucket tell of them. Pure: which claim holds, which are dead.

A claim is one object that is never written again, so that its `uploaded_at` gives it its place in the queue; renewals are
objects beside it. Owner, lifetime and number are in the names, so that one listing tells everything:

    <prefix>/.hfbucket/locks/<id>@<seconds>@<owner>@claim
    <prefix>/.hfbucket/locks/<id>@<seconds>@<owner>@<number of the renewal>

Builders of the key index have a lock of their own, below `index-locks/`: they and those who delete chunks hold up nobody.
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
"""For how long a claim or a renewal of it holds at most, whatever its name says: any writer of the bucket can make one.

Longer than the longest pause that the Hub asks for (300 s), in which a holder cannot renew."""

_MARGIN: Final = 0.1
"""Share of its lifetime by which a holder stops early, and others wait longer: clocks are known within bounds only."""


class LockHeldError(RefusedError):
    """Another one holds the instance."""


@dataclass(frozen=True, slots=True)
class LockKind:
    """What is done one at a time; locks of different kinds have nothing to do with each other.

    Attributes:
        directory: Where claims of this kind lie, below the instance's prefix.
        done: What is not done without the lock, for messages.
    """

    directory: str
    done: str


DELETING: Final = LockKind(f"{RESERVED}/locks", "deleted")
INDEXING: Final = LockKind(f"{RESERVED}/index-locks", "published")


@dataclass(frozen=True, slots=True)
class Holder:
    """Who claims.

    Attributes:
        id: Unique.
        owner: Host, process and what for, in words.
        seconds: For how long a claim and each of its renewals holds.
    """

    id: str
    owner: str
    seconds: int

    def name(self, part: str) -> str:
        """The name of an object of the claim, below the directory of its kind."""
        return f"{self.id}@{self.seconds}@{quote(self.owner, safe=' :')[:300]}@{part}"


@dataclass(frozen=True, slots=True)
class LockClaim:
    """One claim.

    Attributes:
        holder: Who.
        since: When the Hub took it; None when only renewals are left of it.
        renewed: When the Hub took its last object.
        paths: Of all its objects.
    """

    holder: Holder
    since: datetime | None
    renewed: datetime
    paths: tuple[str, ...] = field(repr=False)

    @property
    def rank(self) -> tuple[datetime, str]:
        """Its place in the queue: the smallest that lives holds."""
        return self.since or self.renewed, self.holder.id

    @property
    def stops(self) -> datetime:
        """When its holder does nothing more, unless it renews before."""
        return self.renewed + timedelta(seconds=self._term * (1 - _MARGIN))

    @property
    def stale(self) -> datetime:
        """When others may pass it over."""
        return self.renewed + timedelta(seconds=self._term * (1 + _MARGIN))

    @property
    def _term(self) -> int:
        return min(self.holder.seconds, LONGEST_SECONDS)


def claims_in(infos: Iterable[ObjectInfo], kind: LockKind = DELETING) -> list[LockClaim]:
    """The claims that a listing of the directory of their kind tells of, in their order.

    Raises:
        RefusedError: An object there is none of a claim: of a newer version perhaps, whose rules are not known here.
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
