"""Tasks, locks and keys of the MP adapter."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.platform import create_event_notifier

from hfbucket_plugin.core.keys import MPKey, parse_key
from hfbucket_plugin.errors import KeyFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lmcache.v1.distributed.api import MemoryLayoutDesc

    from hfbucket_plugin.engine.memory import BorrowedMemory


def key_string(key: ObjectKey) -> str:
    """The key string of an object key, as LMCache's built-in adapter writes it."""
    return str(MPKey(key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt))


def object_key(text: str) -> ObjectKey | None:
    """The object key of a key string, or None for one of the classic engine's."""
    try:
        parsed = parse_key(text)
    except KeyFormatError:
        return None
    if not isinstance(parsed, MPKey) or "@" in parsed.model:  # LMCache permits no such model in MP mode
        return None
    return ObjectKey(
        chunk_hash=bytes.fromhex(parsed.chunk_hash),
        model_name=parsed.model,
        kv_rank=parsed.kv_rank,
        object_group_id=parsed.group,
        cache_salt=parsed.salt,
    )


def layout_bytes(layout: MemoryLayoutDesc) -> int:
    """Bytes of one object of a layout."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))


FORGOTTEN_SECS: Final = 300.0
"""A result that LMCache has not fetched after this long belongs to a request that it aborted: its loop fetches a result as soon
as the event is signalled, and does so before it begins another lookup."""


class Load:
    """A load in progress, or whose keys are not unlocked yet.

    Args:
        keys: What it loads, in the order of the task.
        buffers: What it fills, one for each key.
    """

    def __init__(self, keys: Sequence[ObjectKey], buffers: Sequence[BorrowedMemory]) -> None:
        self.keys = tuple(keys)
        self.buffers = tuple(buffers)
        self.fetched = False
        self.ended_at: float | None = None

    def revoke(self) -> None:
        """Make it write no more."""
        for buffer in self.buffers:
            buffer.lease.revoke()


class Locks:
    """Counts locks, and revokes the buffers of loads that LMCache gave up; thread-safe.

    Args:
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._count: Counter[ObjectKey] = Counter()
        self._unfetched: dict[int, tuple[float, tuple[ObjectKey, ...]]] = {}
        """When a lookup ended, and what it found, by task, the oldest first; LMCache has not fetched their results."""
        self._found: Counter[ObjectKey] = Counter()
        """Locks of lookups whose results were fetched, which are neither returned nor passed on to a load."""
        self._loads: list[Load] = []
        """Loads of locked objects that await an unlock, the oldest first."""
        self._given_up: list[list[Load]] = []
        """For each load that was given up, and is not known yet: those that it may be."""

    def __len__(self) -> int:
        """The number of objects that are locked."""
        return len(self._count)

    # --- lookups ----------------------------------------------------------------------------------------------------

    def add(self, keys: Iterable[ObjectKey], task: int | None = None) -> None:
        """Lock each key once more.

        Args:
            keys: What a lookup found.
            task: The lookup's, whose result is to be fetched (`answered`); None where the caller has it already.
        """
        found = tuple(keys)
        with self._lock:
            self._count.update(found)
            if task is None:
                self._found.update(found)
            else:
                self._unfetched[task] = (self._clock(), found)

    def answered(self, task: int) -> None:
        """Record that LMCache has fetched the result of a lookup: it loads or unlocks what was found from now on."""
        with self._lock:
            _, found = self._unfetched.pop(task, (0.0, ()))
            self._found.update(found)

    def free(self, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
        """Those of the keys that nobody has locked."""
        self.forget()
        with self._lock:
            return [key for key in keys if key not in self._count]

    # --- loads ------------------------------------------------------------------------------------------------------

    def begin(self, keys: Sequence[ObjectKey], buffers: Sequence[BorrowedMemory]) -> Load:
        """Record that a load begins, of what one of the lookups found.

        Where a key is not locked, which LMCache's always are, no unlock is awaited.
        """
        load = Load(keys, buffers)
        with self._lock:
            if load.keys and all(key in self._count for key in load.keys):
                _return(self._found, load.keys)
                self._loads.append(load)
        return load

    def end(self, load: Load) -> None:
        """Record that a load writes no more."""
        with self._lock:
            load.buffers = ()
            load.ended_at = self._clock()

    def fetched(self, load: Load) -> None:
        """Record that LMCache has the result of a load: it was not given up, and an unlock of its keys follows."""
        with self._lock:
            load.fetched = True
            self._clear(load)

    # --- unlocks ----------------------------------------------------------------------------------------------------

    def unlock(self, keys: Sequence[ObjectKey]) -> None:
        """Return one lock of each key.

        The unlock belongs to a load of exactly these keys whose result was fetched; else to lookups that found them and from which
        they were not loaded; else LMCache gives up a load of exactly these keys. Where that can be one load only, its buffers are
        revoked at once. Where it can be one of several, none is revoked: the one that was given up ends when its memory is freed.
        """
        wanted = tuple(keys)
        with self._lock:
            _return(self._count, wanted)
            load = next((load for load in self._loads if load.fetched and load.keys == wanted), None)
            if load is not None:
                self._loads.remove(load)
            elif all(self._found[key] >= locks for key, locks in Counter(wanted).items()):
                _return(self._found, wanted)
            else:
                self._give_up(wanted)

    def _give_up(self, keys: tuple[ObjectKey, ...]) -> None:
        maybe = [load for load in self._loads if not load.fetched and load.keys == keys]
        if maybe:
            self._given_up.append(maybe)
            if len(maybe) == 1:
                self._clear_up()
            return
        for key in keys:  # LMCache does not unlock some of the keys of a load; a caller that does has given up the load
            if key in self._found:
                _return(self._found, (key,))
            elif key not in self._count:
                for load in self._loads:
                    if not load.fetched and key in load.keys:
                        load.revoke()

    def _clear(self, load: Load) -> None:
        """A load was not given up."""
        for maybe in self._given_up:
            if load in maybe:
                maybe.remove(load)
        self._clear_up()

    def _clear_up(self) -> None:
        """Revoke what is known by now to be given up."""
        while (certain := next((maybe for maybe in self._given_up if len(maybe) <= 1), None)) is not None:
            self._given_up.remove(certain)
            for load in certain:
                load.revoke()
                self._loads.remove(load)
                for maybe in self._given_up:
                    if load in maybe:
                        maybe.remove(load)

    def forget(self) -> None:
        """Return the locks of lookups, and drop the loads, of requests that LMCache aborted `FORGOTTEN_SECS` ago."""
        before = self._clock() - FORGOTTEN_SECS
        with self._lock:
            for task, (since, found) in list(self._unfetched.items()):
                if since > before:
                    break
                del self._unfetched[task]
                _return(self._count, found)
            for load in [load for load in self._loads if load.ended_at is not None and load.ended_at <= before]:
                if load not in self._loads:  # dropped with the one before it, which left no other that was given up
                    continue
                self._loads.remove(load)
                explained = next((maybe for maybe in self._given_up if load in maybe), None)
                if explained is not None:
                    self._given_up.remove(explained)
                self._clear(load)


def _return(locks: Counter[ObjectKey], keys: Iterable[ObjectKey]) -> None:
    """Return one lock of each key; not by `-=`, which goes through all that is locked."""
    for key in keys:
        if locks[key] > 1:
            locks[key] -= 1
        else:
            del locks[key]


_Result = TypeVar("_Result")


class TaskTable(Generic[_Result]):
    """Hands out task ids, keeps results until they are fetched, and signals each.

    Results of requests that LMCache aborted are never fetched, and are dropped after `FORGOTTEN_SECS`. After `close` all are,
    since their reader is gone and its event's descriptor may be another file's.

    Args:
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notifier = create_event_notifier()
        self.fd: int = self._notifier.fileno()
        self._lock = threading.Lock()
        self._next = 0
        self._results: dict[int, tuple[float, _Result]] = {}
        self._under_way = 0
        self._closed = False

    def begin(self) -> int:
        """A new task's id."""
        before = self._clock() - FORGOTTEN_SECS
        with self._lock:
            for task, (since, _) in list(self._results.items()):
                if since > before:
                    break
                del self._results[task]
            self._next += 1
            self._under_way += 1
            return self._next

    def finish(self, task: int, result: _Result) -> None:
        """Keep a task's result, and signal it."""
        with self._lock:
            self._under_way -= 1
            if self._closed:
                return
            self._results[task] = (self._clock(), result)
            self._notifier.notify()

    def take(self, task: int) -> _Result | None:
        """A task's result, once; None while there is none."""
        with self._lock:
            found = self._results.pop(task, None)
        return None if found is None else found[1]

    def take_all(self) -> dict[int, _Result]:
        """All results that were not fetched yet."""
        with self._lock:
            results, self._results = self._results, {}
        return {task: result for task, (_, result) in results.items()}

    @property
    def under_way(self) -> int:
        """Tasks without a result."""
        return self._under_way

    def close(self) -> None:
        """Signal no more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._results.clear()
                self._notifier.close()
