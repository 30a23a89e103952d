"""The account of an instance in MP mode: objects with their sizes, whoever wrote, replaced or deleted them."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Final

from hfbucket_plugin import forks
from hfbucket_plugin.l2_sizes import LARGEST_OWNER, LARGEST_SIZE, SizeTable, digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

MOST_OBJECTS: Final = 10_000_000
"""Objects whose sizes are kept one by one: 320 MB at most. Those beyond it are a sum, which listings alone correct."""

_MOST_RECENT: Final = 16_384
"""Objects that were learnt of last: an answer of the Hub to a question asked before that changes nothing."""

_NOBODY: Final = 0


class Usage:
    """Bytes below the prefix in all, and of this process's own objects by cache salt; thread-safe.

    What was counted for an object is taken off when it is found gone, deleted or replaced, whoever did it: by own deletes,
    by the answers to lookups, and by listings.

    Args:
        everybody: Whether to count the objects of others too, for a bound on the whole; else own objects only.
        most_objects: Objects whose sizes are kept one by one.
        clock: Seconds, monotonic; tests hand in their own.
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
        self._lock = forks.Lock()
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
                    self._take_off_the_rest(old)
                self.net += not known and path not in replaced
                self._is_news(digest, self._clock())
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
                    self._take_off_the_rest(size)

    def gone(self, paths: Iterable[str]) -> dict[str, int]:
        """Take objects off that are not there, though nobody here deleted them.

        Returns:
            What was counted for each of them that was counted, by path.
        """
        with self._lock:
            return {path: size for path in paths if (size := self._drop(digest_of(path)))}

    def learnt(self, sizes: Mapping[str, int | None], asked: float) -> list[str]:
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
                if not (known or self.everybody) or not self._is_news(digest, asked):
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
                if not self._is_news(digest, asked):
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
        """The clock that `learnt` and `listed` go by."""
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
        self._is_news(digest, self._clock())
        known, owner = self._sizes.get(digest)
        if known:
            self._count(digest, 0, known, owner, owner)
        return known

    def _is_news(self, digest: int, since: float) -> bool:
        """Note when an object was learnt of; False where something later is known of it."""
        if since < max(self._listed_since, self._recent.get(digest, since)):
            return False
        self._recent[digest] = since
        self._recent.move_to_end(digest)
        if len(self._recent) > _MOST_RECENT:
            self._recent.popitem(last=False)
        return True

    def _take_off_the_rest(self, size: int) -> None:
        """An object that is not known one by one went: it was among the rest, if there is any."""
        if self._more_objects:
            self._more_objects -= 1
            self._more_bytes = max(0, self._more_bytes - size)
