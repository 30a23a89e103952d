"""Batches of objects, and what comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from hfbucket_plugin.core.deadline import Deadline

TRIES: Final = 4
"""Most tries at an object that fails; waiting for the Hub's quota is none."""


class WorkItem(Protocol):
    """An object that a batch is about."""

    @property
    def path(self) -> str:
        """Where it is."""

    @property
    def key(self) -> str:
        """Its key, or its name."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def reason(self) -> str:
        """Why it is in the plan."""


T = TypeVar("T", bound=WorkItem)


@dataclass(frozen=True, slots=True)
class ItemOutcome(Generic[T]):
    """An object that has ended.

    Attributes:
        item: The object.
        outcome: How.
        message: Why, where it failed.
    """

    item: T
    outcome: StrEnum
    message: str = ""


@dataclass(frozen=True, slots=True)
class ItemBatch(Generic[T]):
    """Objects that are to go, or to be copied.

    Attributes:
        items: At most 1000.
        tries: How often it was tried.
        asked: Paths that the Hub was asked to delete or to name, and of which it did not tell what became.
        losses: How often the process that tried it died meanwhile, which is no try of it.
    """

    items: tuple[T, ...]
    tries: int = 0
    asked: frozenset[str] = frozenset()
    losses: int = 0


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What came of a try.

    Attributes:
        ended: Objects that have ended.
        left: What is to be tried again; None when nothing is.
        wait_secs: How long the Hub wants to be left alone.
    """

    ended: tuple[ItemOutcome[T], ...]
    left: ItemBatch[T] | None = None
    wait_secs: float = 0.0


FRESH_SECS: Final = 3.0
"""How old a look may be, from when it was asked for, when the delete or the naming that goes by it is sent."""


SEND_SECS: Final = 10.0
"""When such a request is given up: the longer it is in progress, the older the look that it goes by."""


class Outcome(StrEnum):
    """How an object ended. The values stand in reports."""

    DELETED = "deleted"
    GONE = "gone"  # before we came to it
    USED = "used"  # read since it was planned, and it was to go for lack of use: it stays
    CHANGED = "changed"  # rewritten since it was planned, or at a mirror's source again: it stays
    TOO_YOUNG = "too-young"  # only a plan that was edited names one
    FAILED = "failed"


class ReferenceEndpoint(Protocol):
    """Where an object must not be for it to be deleted here: the source of a mirror."""

    def look_up(self, keys: Sequence[str], deadline: Deadline) -> Container[str]:
        """Return those of the keys that it has, and maybe others.

        Raises:
            HFBucketError: It did not answer.
        """

    def expect_chunks(self) -> None:
        """Refuse to go by it if it has no chunk at all: everything would be deleted.

        Raises:
            RefusedError: It has none.
            HFBucketError: It did not answer, or is not there.
        """
