"""Tasks, locks and keys of the MP adapter."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.platform import create_event_notifier

from hfbucket_plugin.core.keys import MPKey, parse_key
from hfbucket_plugin.errors import KeyFormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lmcache.v1.distributed.api import MemoryLayoutDesc

    from hfbucket_plugin.engine.memory import BorrowedMemory


def key_string(key: ObjectKey) -> str:
    """Return the key string of an object key, in the format of LMCache's built-in adapter."""
    return str(MPKey(key.model_name, key.kv_rank, key.object_group_id, key.chunk_hash.hex(), key.cache_salt))


def object_key(text: str) -> ObjectKey | None:
    """Return the object key of a key string, or None for a key of the classic engine."""
    try:
        parsed = parse_key(text)
    except KeyFormatError:
        return None
    if not isinstance(parsed, MPKey) or "@" in parsed.model:  # LMCache does not allow such model names in MP mode
        return None
    return ObjectKey(
        chunk_hash=bytes.fromhex(parsed.chunk_hash),
        model_name=parsed.model,
        kv_rank=parsed.kv_rank,
        object_group_id=parsed.group,
        cache_salt=parsed.salt,
    )


def layout_bytes(layout: MemoryLayoutDesc) -> int:
    """Return the size in bytes of one object with a layout."""
    return sum(shape.numel() * dtype.itemsize for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True))


FORGOTTEN_SECS: Final = 300.0
"""Seconds after which an unfetched result belongs to an aborted request: LMCache fetches a result as soon as its event
is signalled, and before it begins another lookup."""

Kind = Literal["store", "lookup", "load"]
KINDS: Final[tuple[Kind, ...]] = ("store", "lookup", "load")
State = Literal["running", "ended", "fetched"]


@dataclass(slots=True, eq=False)
class Task:
    """Store, lookup or load that is running, or whose result or unlock is still pending.

    Attributes:
        kind: Kind of the task.
        id: Number of the task, unique among all tasks.
        keys: Keys that a lookup found and locked, or that a load loads, in task order.
        buffers: Buffers that a running load fills, one for each key.
        state: Whether the task is running, its result is pending, or the result was fetched.
        awaits_unlock: Whether LMCache still has to unlock the keys that a load took over from a lookup.
        result: Result of the task until it is fetched.
        ended_at: End time, by the clock of its table.
    """

    kind: Kind
    id: int
    keys: tuple[ObjectKey, ...] = ()
    buffers: tuple[BorrowedMemory, ...] = ()
    state: State = "running"
    awaits_unlock: bool = False
    result: Any = None
    ended_at: float = math.inf

    def revoke(self) -> None:
        """Stop all writes of the task."""
        for buffer in self.buffers:
            buffer.lease.revoke()


class TaskTable:
    """Tasks of one adapter and the locks of their keys, from submission to the last unlock; thread-safe.

    Each result is signalled, and kept until LMCache fetches it. Tasks of requests that LMCache aborted are dropped
    after `FORGOTTEN_SECS`. After `close` all results are dropped, because their reader is gone and the event descriptor
    may belong to another file.

    Args:
        clock: Monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._tasks: dict[Kind, dict[int, Task]] = {kind: {} for kind in KINDS}
        """Tasks by kind; those that have ended are in the order in which they ended."""
        self._notifiers = {kind: create_event_notifier() for kind in KINDS}
        self._descriptors: dict[Kind, int] = {kind: notifier.fileno() for kind, notifier in self._notifiers.items()}
        self._locks: Counter[ObjectKey] = Counter()
        self._unclaimed: Counter[ObjectKey] = Counter()
        """Locks of lookups whose results were fetched, and that were neither released nor passed on to a load."""
        self._given_up: list[list[Task]] = []
        """Candidates for each load that was given up but is not yet identified."""
        self._closed = False

    def __len__(self) -> int:
        """Return the number of tasks."""
        return sum(map(len, self._tasks.values()))

    @property
    def locked(self) -> int:
        """Number of locked objects."""
        return len(self._locks)

    def fd(self, kind: Kind) -> int:
        """Return the descriptor that is signalled when a task of a kind ends."""
        return self._descriptors[kind]

    def running(self, kind: Kind) -> int:
        """Return the number of tasks of a kind without a result."""
        with self._lock:
            return sum(task.state == "running" for task in self._tasks[kind].values())

    # --- from submission to result ------------------------------------------------------------------------------------

    def begin(self, kind: Kind, keys: Iterable[ObjectKey] = (), buffers: Iterable[BorrowedMemory] = ()) -> Task:
        """Add a task.

        Args:
            kind: Kind of the task.
            keys: Keys that a load loads. It takes over the locks of the lookup that found them. If a key is not locked,
                which does not happen with LMCache, no unlock is expected.
            buffers: Buffers that a load fills, one for each key.
        """
        task = Task(kind, next(self._numbers), tuple(keys), tuple(buffers))
        with self._lock:
            self._forget()
            if task.keys and all(key in self._locks for key in task.keys):
                _return(self._unclaimed, task.keys)
                task.awaits_unlock = True
            self._tasks[kind][task.id] = task
        return task

    def finish(self, task: Task, result: Any) -> None:
        """Record that a task has ended and writes no more; keep its result and signal it."""
        with self._lock:
            task.buffers = ()
            task.state, task.result, task.ended_at = "ended", result, self._clock()
            tasks = self._tasks[task.kind]
            del tasks[task.id]
            if not self._closed:
                tasks[task.id] = task
                self._notifiers[task.kind].notify()

    def take(self, kind: Kind, number: int) -> Any:
        """Return the result of a task once; None if there is none."""
        with self._lock:
            task = self._tasks[kind].get(number)
            return self._fetch(task) if task is not None and task.state == "ended" else None

    def take_all(self, kind: Kind) -> dict[int, Any]:
        """Return all results of a kind that were not fetched yet, by task number."""
        with self._lock:
            ended = [task for task in self._tasks[kind].values() if task.state == "ended"]
            return {task.id: self._fetch(task) for task in ended}

    def _fetch(self, task: Task) -> Any:
        """Return the result. LMCache then loads or unlocks the keys of a lookup, and unlocks those of a load."""
        result, task.result, task.state = task.result, None, "fetched"
        if task.kind == "lookup":
            self._unclaimed.update(task.keys)
        if task.awaits_unlock:
            self._was_not_given_up(task)
        else:
            del self._tasks[task.kind][task.id]
        return result

    def forget(self) -> None:
        """Drop results of requests aborted `FORGOTTEN_SECS` ago, and release the locks of their lookups."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        before = self._clock() - FORGOTTEN_SECS
        for tasks in self._tasks.values():
            for task in list(tasks.values()):
                if task.state == "running":
                    continue
                if task.ended_at > before:
                    break
                del tasks[task.id]
                if task.kind == "lookup":
                    _return(self._locks, task.keys)
                elif task.awaits_unlock:
                    task.awaits_unlock = False
                    explained = next((maybe for maybe in self._given_up if task in maybe), None)
                    if explained is not None:
                        self._given_up.remove(explained)
                    self._was_not_given_up(task)

    def close(self) -> None:
        """Stop signalling, and drop all results."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for kind, tasks in self._tasks.items():
                self._tasks[kind] = {number: task for number, task in tasks.items() if task.state == "running"}
                self._notifiers[kind].close()

    # --- locks --------------------------------------------------------------------------------------------------------

    def lock(self, keys: Iterable[ObjectKey], lookup: Task | None = None) -> None:
        """Add one lock to each key.

        Args:
            keys: Keys that a lookup found.
            lookup: Lookup task whose result is still to be fetched; None if the caller already has it.
        """
        found = tuple(keys)
        with self._lock:
            self._locks.update(found)
            if lookup is None:
                self._unclaimed.update(found)
            else:
                lookup.keys = found

    def free(self, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
        """Return the keys that are not locked."""
        with self._lock:
            self._forget()
            return [key for key in keys if key not in self._locks]

    def unlock(self, keys: Sequence[ObjectKey]) -> None:
        """Release one lock of each key.

        An unlock of exactly the keys of a load whose result was fetched belongs to that load. Otherwise it belongs to
        lookups that found the keys without a load following; otherwise LMCache gives up a load of exactly these keys.
        If only one load qualifies, its buffers are revoked at once. If several qualify, none is revoked, and the load
        that was given up ends when its memory is freed.
        """
        wanted = tuple(keys)
        with self._lock:
            _return(self._locks, wanted)
            loads = [task for task in self._tasks["load"].values() if task.awaits_unlock]
            load = next((load for load in loads if load.state == "fetched" and load.keys == wanted), None)
            if load is not None:
                del self._tasks["load"][load.id]
            elif all(self._unclaimed[key] >= locks for key, locks in Counter(wanted).items()):
                _return(self._unclaimed, wanted)
            else:
                self._give_up(wanted, [load for load in loads if load.state != "fetched"])

    def _give_up(self, keys: tuple[ObjectKey, ...], loads: Sequence[Task]) -> None:
        maybe = [load for load in loads if load.keys == keys]
        if maybe:
            self._given_up.append(maybe)
            self._revoke_what_is_certain()
            return
        for key in keys:  # LMCache unlocks all keys of a load or gives up the load
            if key in self._unclaimed:
                _return(self._unclaimed, (key,))
            elif key not in self._locks:
                for load in loads:
                    if key in load.keys:
                        load.revoke()

    def _was_not_given_up(self, load: Task) -> None:
        for maybe in self._given_up:
            if load in maybe:
                maybe.remove(load)
        self._revoke_what_is_certain()

    def _revoke_what_is_certain(self) -> None:
        """Revoke the loads that are certain to have been given up, as the only candidates."""
        while (certain := next((maybe for maybe in self._given_up if len(maybe) <= 1), None)) is not None:
            self._given_up.remove(certain)
            for load in certain:
                load.revoke()
                load.awaits_unlock = False
                for maybe in self._given_up:
                    if load in maybe:
                        maybe.remove(load)


def _return(locks: Counter[ObjectKey], keys: Iterable[ObjectKey]) -> None:
    """Release one lock of each key; `-=` would iterate over all locked keys."""
    for key in keys:
        if locks[key] > 1:
            locks[key] -= 1
        else:
            del locks[key]
