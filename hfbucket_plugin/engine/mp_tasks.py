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

Kind = Literal["store", "lookup", "load"]
KINDS: Final[tuple[Kind, ...]] = ("store", "lookup", "load")
State = Literal["running", "ended", "fetched"]


@dataclass(slots=True, eq=False)
class Task:
    """A store, lookup or load that is running, or of which LMCache still has to fetch the result or to unlock the keys.

    Attributes:
        kind: What it does.
        id: Its number, unique among all tasks.
        keys: What a lookup found and locked; what a load loads, in the order of the task.
        buffers: What a load fills, one for each key, while it runs.
        state: Whether it runs, or its result awaits LMCache, or LMCache has fetched it.
        awaits_unlock: Whether LMCache still has to unlock the keys that a load took over from a lookup.
        result: What it ended with, until it is fetched.
        ended_at: When it ended, by the clock of its table.
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
        """Make it write no more."""
        for buffer in self.buffers:
            buffer.lease.revoke()


class TaskTable:
    """The tasks of one adapter and the locks of their keys: each task once, from its submission to its last unlock; thread-safe.

    Results are kept until LMCache fetches them, and each is signalled. What belongs to requests that LMCache aborted is dropped
    after `FORGOTTEN_SECS`. After `close` all results are, since their reader is gone and the event's descriptor may be another
    file's.

    Args:
        clock: Seconds, monotonic; tests pass their own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._tasks: dict[Kind, dict[int, Task]] = {kind: {} for kind in KINDS}
        """Those that have ended follow each other in the order in which they ended."""
        self._notifiers = {kind: create_event_notifier() for kind in KINDS}
        self._descriptors: dict[Kind, int] = {kind: notifier.fileno() for kind, notifier in self._notifiers.items()}
        self._locks: Counter[ObjectKey] = Counter()
        self._unclaimed: Counter[ObjectKey] = Counter()
        """Locks of lookups whose results were fetched, which are neither returned nor passed on to a load."""
        self._given_up: list[list[Task]] = []
        """For each load that was given up, and is not known yet: those that it may be."""
        self._closed = False

    def __len__(self) -> int:
        """The number of tasks."""
        return sum(map(len, self._tasks.values()))

    @property
    def locked(self) -> int:
        """The number of objects that are locked."""
        return len(self._locks)

    def fd(self, kind: Kind) -> int:
        """The descriptor that is signalled when a task of a kind ends."""
        return self._descriptors[kind]

    def running(self, kind: Kind) -> int:
        """How many tasks of a kind have no result yet."""
        with self._lock:
            return sum(task.state == "running" for task in self._tasks[kind].values())

    # --- from submission to result ------------------------------------------------------------------------------------

    def begin(self, kind: Kind, keys: Iterable[ObjectKey] = (), buffers: Iterable[BorrowedMemory] = ()) -> Task:
        """Add a task.

        Args:
            kind: What it does.
            keys: What a load loads. It takes over the locks of the lookup that found them; where a key is not locked, which
                LMCache's always are, no unlock is awaited.
            buffers: What a load fills, one for each key.
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
        """Record that a task has ended, and writes no more; keep its result, and signal it."""
        with self._lock:
            task.buffers = ()
            task.state, task.result, task.ended_at = "ended", result, self._clock()
            tasks = self._tasks[task.kind]
            del tasks[task.id]
            if not self._closed:
                tasks[task.id] = task
                self._notifiers[task.kind].notify()

    def take(self, kind: Kind, number: int) -> Any:
        """The result of a task, once; None while there is none."""
        with self._lock:
            task = self._tasks[kind].get(number)
            return self._fetch(task) if task is not None and task.state == "ended" else None

    def take_all(self, kind: Kind) -> dict[int, Any]:
        """All results of a kind that were not fetched yet, by number."""
        with self._lock:
            ended = [task for task in self._tasks[kind].values() if task.state == "ended"]
            return {task.id: self._fetch(task) for task in ended}

    def _fetch(self, task: Task) -> Any:
        """Give a result out. What a lookup found is loaded or unlocked from now on; an unlock of what was loaded follows."""
        result, task.result, task.state = task.result, None, "fetched"
        if task.kind == "lookup":
            self._unclaimed.update(task.keys)
        if task.awaits_unlock:
            self._was_not_given_up(task)
        else:
            del self._tasks[task.kind][task.id]
        return result

    def forget(self) -> None:
        """Drop the results of requests that LMCache aborted `FORGOTTEN_SECS` ago, return the locks of their lookups."""
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
        """Signal no more, and drop all results."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for kind, tasks in self._tasks.items():
                self._tasks[kind] = {number: task for number, task in tasks.items() if task.state == "running"}
                self._notifiers[kind].close()

    # --- locks --------------------------------------------------------------------------------------------------------

    def lock(self, keys: Iterable[ObjectKey], lookup: Task | None = None) -> None:
        """Lock each key once more.

        Args:
            keys: What a lookup found.
            lookup: Its task, whose result is to be fetched; None where the caller has it already.
        """
        found = tuple(keys)
        with self._lock:
            self._locks.update(found)
            if lookup is None:
                self._unclaimed.update(found)
            else:
                lookup.keys = found

    def free(self, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
        """Those of the keys that are not locked."""
        with self._lock:
            self._forget()
            return [key for key in keys if key not in self._locks]

    def unlock(self, keys: Sequence[ObjectKey]) -> None:
        """Return one lock of each key.

        The unlock belongs to a load of exactly these keys whose result was fetched; else to lookups that found them and from which
        they were not loaded; else LMCache gives up a load of exactly these keys. Where that can be one load only, its buffers are
        revoked at once. Where it can be one of several, none is revoked: the one that was given up ends when its memory is freed.
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
        for key in keys:  # LMCache does not unlock some of the keys of a load; an unlock of some gives up the load
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
        """Revoke the loads that can be the only ones that were given up."""
        while (certain := next((maybe for maybe in self._given_up if len(maybe) <= 1), None)) is not None:
            self._given_up.remove(certain)
            for load in certain:
                load.revoke()
                load.awaits_unlock = False
                for maybe in self._given_up:
                    if load in maybe:
                        maybe.remove(load)


def _return(locks: Counter[ObjectKey], keys: Iterable[ObjectKey]) -> None:
    """Return one lock of each key; not by `-=`, which goes through all that is locked."""
    for key in keys:
        if locks[key] > 1:
            locks[key] -= 1
        else:
            del locks[key]
