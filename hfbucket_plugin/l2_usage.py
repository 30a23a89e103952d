"""How much an instance holds in MP mode: told by listings, kept current by own writes and deletes in between."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Usage:
    """Bytes below the prefix, in all and by cache salt; thread-safe.

    A listing takes a while, in which own writes and deletes go on. It runs in the order of the paths: a change *behind* the
    place where it is has to be added to what it saw, one *before* it will be seen, or not, as it should.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()
        self._objects = 0
        self._listed: Counter[str] | None = None
        self._listed_objects = 0
        self._place = ""
        self.complete = False
        """Whether a listing has seen every object."""

    def changed(self, entries: Iterable[tuple[str, str, int]], sign: int) -> None:
        """Count own writes or deletes.

        Args:
            entries: Path, cache salt and bytes of each object.
            sign: 1 for objects that were added, -1 for such as were deleted.
        """
        with self._lock:
            for path, salt, size in entries:
                self._bytes[salt] += sign * size
                self._objects += sign
                if self._listed is not None and path <= self._place:
                    self._listed[salt] += sign * size
                    self._listed_objects += sign

    def begin(self) -> None:
        """Begin a listing."""
        with self._lock:
            self._listed, self._listed_objects, self._place = Counter(), 0, ""

    def seen(self, path: str, salt: str, size: int) -> None:
        """Count an object of the listing."""
        with self._lock:
            if self._listed is not None:
                self._listed[salt] += size
                self._listed_objects += 1
                self._place = path

    def end(self, *, complete: bool) -> None:
        """End a listing: what it saw replaces what was believed, if it saw all or more than that."""
        with self._lock:
            listed, self._listed = self._listed, None
            if listed is None:
                return
            if complete or listed.total() > self._bytes.total():
                self._bytes, self._objects = listed, self._listed_objects
                self.complete = complete

    def give_up(self) -> None:
        """Forget a listing that failed."""
        with self._lock:
            self._listed = None

    @property
    def total(self) -> int:
        """Bytes in all."""
        with self._lock:
            return max(0, self._bytes.total())

    @property
    def objects(self) -> int:
        """Number of objects."""
        return max(0, self._objects)

    def by_salt(self) -> Mapping[str, int]:
        """Bytes by cache salt, those above 0."""
        with self._lock:
            return {salt: size for salt, size in self._bytes.items() if size > 0}
