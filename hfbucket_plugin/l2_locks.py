"""Locks on objects that were looked up, and the buffers that loads of them fill.

LMCache (0.5.6) locks what a lookup found, loads it, fetches the load's result, and unlocks exactly the keys that it loaded.
When it gives a load up it unlocks the same keys without fetching the result, and frees the buffers at once: nothing may
write into them any more. An unlock does not say which load it is for, so this is told from what is under way.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lmcache.v1.distributed.api import ObjectKey

    from hfbucket_plugin.engine_memory import BorrowedMemory


class Load:
    """A load under way, or whose keys were not unlocked yet.

    Args:
        keys: What it loads, in the order of the task.
        buffers: What it fills, one a key.
    """

    def __init__(self, keys: Sequence[ObjectKey], buffers: Sequence[BorrowedMemory]) -> None:
        self.keys = tuple(keys)
        self.buffers = tuple(buffers)
        self.fetched = False

    def revoke(self) -> None:
        """Have it write no more."""
        for buffer in self.buffers:
            buffer.lease.revoke()


class Locks:
    """Counts locks, and takes buffers back from loads that LMCache gave up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count: Counter[ObjectKey] = Counter()
        self._running: dict[ObjectKey, list[Load]] = {}
        self._owed: dict[tuple[ObjectKey, ...], list[Load]] = {}
        """Loads of locked objects that await an unlock, the oldest first."""

    def __len__(self) -> int:
        """Objects that are locked."""
        return len(self._count)

    def add(self, keys: Iterable[ObjectKey]) -> None:
        """Lock each once more."""
        with self._lock:
            self._count.update(keys)

    def free(self, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
        """Those of the keys that nobody has locked."""
        with self._lock:
            return [key for key in keys if key not in self._count]

    def begin(self, keys: Sequence[ObjectKey], buffers: Sequence[BorrowedMemory]) -> Load:
        """A load begins. Where a key is not locked, which LMCache's always are, no unlock is awaited."""
        load = Load(keys, buffers)
        with self._lock:
            for key in load.keys:
                if key in self._count:
                    self._running.setdefault(key, []).append(load)
            if load.keys and all(key in self._count for key in load.keys):
                self._owed.setdefault(load.keys, []).append(load)
        return load

    def end(self, load: Load) -> None:
        """A load has written its last."""
        with self._lock:
            load.buffers = ()
            for key in load.keys:
                running = self._running.get(key, [])
                if load in running:
                    running.remove(load)
                if not running:
                    self._running.pop(key, None)

    def fetched(self, load: Load) -> None:
        """LMCache has the result of a load: an unlock of its keys follows, and is no giving up."""
        load.fetched = True

    def unlock(self, keys: Sequence[ObjectKey]) -> None:
        """Take back one lock of each object.

        Unless a load of these very keys was fetched, the unlock gives one up, where there is any: which one it does not say,
        so none of them writes any more. Nor does any load of a key of which more loads are under way than locks are left.
        """
        with self._lock:
            for key in keys:
                if self._count[key] > 1:
                    self._count[key] -= 1
                else:
                    del self._count[key]
            given_up = self._settle(tuple(keys))
            for key in keys:
                running = self._running.get(key, ())
                if len(running) > self._count[key]:
                    given_up.extend(running)
            for load in given_up:
                load.revoke()

    def _settle(self, keys: tuple[ObjectKey, ...]) -> list[Load]:
        """Find the load that an unlock is for, and return those that it may have given up."""
        loads = self._owed.get(keys)
        if not loads:
            return []
        fetched = next((load for load in loads if load.fetched), None)
        given_up = [] if fetched is not None else list(loads)
        loads.remove(fetched or loads[0])
        if not loads:
            del self._owed[keys]
        return given_up
