"""One trial: an engine in service, a fault, some calls, the fault's end, and how long service takes to come back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hf_xet
import torch
from huggingface_hub import HfApi

from dev.faults.guarantees import BACK_SECS, FAILED, SILENT
from dev.faults.injections import WHOLE_HUB, injected
from hfbucket_plugin.core.keys import encode_name
from tests.support.lmcache_classic import Classic
from tests.support.lmcache_mp import MP
from tests.support.surface import Limits, chunks_counted, content, operations_counted

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from localhub.process import RunningHub
    from tests.support.surface import Surface


_PATIENCE_SECS: Final = BACK_SECS + 5
_SETTLE_SECS: Final = 2.0
"""How long the metrics are waited for: a call that was given up at its deadline is counted by the thread that gave it up."""

_TRAFFIC_SECS: Final = 0.5
"""Between calls that only keep an engine busy while a long fault lasts."""

_CHUNKS: Final = 2
"""Of one call."""

_LISTING_HANGS_SECS: Final = 1.5
_POLL_SECS: Final = 0.05
_TOKEN_ROUTES: Final = ("xet-read-token", "xet-write-token")
_SHORT: Final = Limits()


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        surface: ``classic`` or ``mp``.
        fault: One of `dev.faults.injections.FAULTS`.
        operation: One of `dev.faults.injections.OPERATIONS`.
        route: Where the fault is.
        verify: The instance's setting.
        calls: How often the operation is called while the fault lasts.
        outage_secs: How long the fault lasts at least, with an engine at work.
    """

    surface: str
    fault: str
    operation: str
    route: str
    verify: str = "size"
    calls: int = 4
    outage_secs: float = 0.0


@dataclass
class Call:
    """One call under the fault: what the engine was told of its chunks, and how long it took."""

    words: dict[str, int]
    seconds: float
    raised: str = ""


@dataclass
class Report:
    """What happened.

    Attributes:
        trial: What was tried.
        calls: Call by call.
        asked: Chunks of all calls.
        chunks: What the metrics say of them: outcome to number.
        operations: What the metrics say of the calls.
        wrong: Chunks that came back with wrong bytes, under the fault or after it.
        lost: Chunks that the engine was told are stored, and that are not.
        leaked: Chunks of the engine's memory that did not come back.
        healthy: Whether LMCache's check held, under the fault and after it.
        back_secs: From the fault's end to a full round trip; None when it did not come in time.
        repeated: Whether what failed was asked for again, until it was served.
        same_secs: Until that was so; None when it was not in time.
        deadline: Most seconds that a call may take.
        problem: What kept the trial from being made.
    """

    trial: Trial
    calls: list[Call] = field(default_factory=list)
    asked: int = 0
    chunks: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    wrong: int = 0
    lost: int = 0
    leaked: int = 0
    healthy: bool = True
    back_secs: float | None = None
    repeated: bool = False
    same_secs: float | None = None
    deadline: float = 0.0
    problem: str = ""

    @property
    def late(self) -> float:
        """Seconds by which the slowest call outlasted its deadline."""
        return max([call.seconds - self.deadline for call in self.calls], default=0.0)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Report:
        """From JSON."""
        values = record | {"trial": Trial(**record["trial"]), "calls": [Call(**call) for call in record["calls"]]}
        return cls(**values)


class Bench:
    """Where trials are made, one after the other.

    Args:
        hub: A local Hub with faults.
        loop: The engine's event loop.
        directory: For files.
        to_the_end: Whether gets that failed are repeated until they are served.
    """

    def __init__(
        self, hub: RunningHub, loop: asyncio.AbstractEventLoop, directory: Path, *, to_the_end: bool = True
    ) -> None:
        self._hub = hub
        self._loop = loop
        self._directory = directory
        self.to_the_end = to_the_end
        self._made = 0
        self._bucket = "faults/matrix"
        self._api = HfApi(endpoint=hub.endpoint, token=False)
        self._api.create_bucket(self._bucket, exist_ok=True)

    def run(self, trial: Trial, limits: Limits = _SHORT) -> Report:
        """Make one trial.

        Args:
            trial: What is tried.
            limits: The deadlines of the engine.
        """
        self._made += 1
        self._hub.control.clear_faults()
        return _Run(self, trial, self._made, limits).report()

    def surface(self, trial: Trial, number: int, limits: Limits) -> Surface:
        """An engine's client of a prefix of its own."""
        where: dict[str, Any] = {
            "handle": f"hf://buckets/{self._bucket}/t{number}",
            "endpoint": self._hub.endpoint,
            "limits": limits,
            "verify": trial.verify,
        }
        instance = f"hfbucket.t{number}"
        if trial.surface == "mp":
            return MP(instance, self._directory, **where)
        return Classic(instance, self._loop, self._directory, **where)

    def seed(self, number: int, chunks: Mapping[int, str]) -> None:
        """Put chunks there under their keys, with nothing of ours."""
        files: list[tuple[str | Path | bytes, str]] = [
            (content(n), f"t{number}/{encode_name(key)}") for n, key in chunks.items()
        ]
        self._api.batch_bucket_files(self._bucket, add=files)

    def xet_hash(self, number: int, key: str) -> str:
        """Of a chunk that was put there."""
        (found,) = self._api.get_bucket_paths_info(self._bucket, [f"t{number}/{encode_name(key)}"])
        return found.xet_hash

    def start_fault(self, trial: Trial, item: str) -> None:
        """Have the Hub fail."""
        if trial.route == WHOLE_HUB:
            self._hub.kill()
        else:
            self._hub.control.add_fault(injected(trial.fault, trial.route, item))

    def end_fault(self, trial: Trial) -> None:
        """Have the Hub serve again."""
        if trial.route == WHOLE_HUB:
            self._hub.restart()
        else:
            self._hub.control.clear_faults()


class _Run:
    """The state of one trial."""

    def __init__(self, bench: Bench, trial: Trial, number: int, limits: Limits) -> None:
        self._bench = bench
        self._trial = trial
        self._limits = limits
        self._name = MP.name if trial.surface == "mp" else Classic.name
        self._number = number
        first = number * 10_000
        self._wanted = list(range(first, first + _CHUNKS * trial.calls))
        self._fresh = [first + 1000 + index for index in range(len(self._wanted))]
        self._warm, self._others = first + 2000, [first + 2001, first + 2002]
        self._new = first + 3000
        self._surface: Surface
        self._reported_stored: list[int] = []
        self._result = Report(trial)

    def report(self) -> Report:
        trial, bench = self._trial, self._bench
        bench.seed(self._number, {number: self._name(number) for number in self._seeded()})
        cold = trial.route in _TOKEN_ROUTES
        item = self._item()
        if cold:
            bench.start_fault(trial, item)
        self._surface = bench.surface(trial, self._number, self._limits)
        try:
            if not cold and self._wait(lambda: self._serves([self._warm]), time.monotonic()) is None:
                self._result.problem = "no service before the fault"
                return self._result
            free = self._surface.free_chunks()
            if trial.operation == "get" and trial.route != "paths-info":
                self._surface.lookup(self._wanted)
            if not cold:
                bench.start_fault(trial, item)
            self._under_fault()
            bench.end_fault(trial)
            self._afterwards()
            self._wait(lambda: self._surface.free_chunks() >= free, time.monotonic(), _SETTLE_SECS)
            self._result.leaked = free - self._surface.free_chunks()
        finally:
            if trial.route != WHOLE_HUB:
                bench.end_fault(trial)
            self._surface.close()
        return self._result

    def _seeded(self) -> list[int]:
        return [*self._wanted, self._warm, *self._others]

    def _item(self) -> str:
        """What fails of a batch."""
        name = self._name(self._targets()[0])
        return self._bench.xet_hash(self._number, name) if self._trial.operation == "get" else encode_name(name)

    def _targets(self) -> list[int]:
        return self._fresh if self._trial.operation == "put" else self._wanted

    # --- under the fault --------------------------------------------------------------------------------------------

    def _under_fault(self) -> None:
        trial, result = self._trial, self._result
        result.deadline = self._surface.deadline(trial.operation)
        before = self._counts()
        since = time.monotonic()
        size = self._surface.deletes_at_once if trial.operation == "delete" else _CHUNKS
        for index in range(trial.calls):
            numbers = self._targets()[index * _CHUNKS :][:size]
            if trial.operation == "list":
                self._end_hang_soon()
            else:
                result.asked += len(numbers)
            result.calls.append(self._call(numbers))
        settled = time.monotonic() + _SETTLE_SECS
        while True:
            chunks, operations = (after - was for after, was in zip(self._counts(), before, strict=True))
            known = operations.total() >= trial.calls and chunks.total() >= result.asked
            if known or time.monotonic() > settled:
                break
            time.sleep(_POLL_SECS)
        result.chunks, result.operations = dict(chunks), dict(operations)
        result.healthy = self._surface.healthy()
        while time.monotonic() - since < trial.outage_secs:
            self._surface.lookup(self._others)
            self._surface.get(self._others)
            time.sleep(_TRAFFIC_SECS)

    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        instance, operation = self._surface.instance, self._trial.operation
        return chunks_counted(instance, operation), operations_counted(instance, operation)

    def _end_hang_soon(self) -> None:
        """A page of a listing has a minute: no trial waits for that."""
        if self._trial.fault == "hang":
            timer = threading.Timer(_LISTING_HANGS_SECS, self._bench.end_fault, [self._trial])
            timer.daemon = True
            timer.start()

    def _call(self, numbers: Sequence[int]) -> Call:
        began = time.monotonic()
        words: Counter[str] = Counter()
        raised = ""
        try:
            words = self._words(numbers)
        except Exception as error:  # noqa: BLE001 - what it raises is what is looked at
            raised = f"{type(error).__name__}: {error}"
        return Call(dict(words), time.monotonic() - began, raised)

    def _words(self, numbers: Sequence[int]) -> Counter[str]:
        surface, operation = self._surface, self._trial.operation
        if operation == "lookup":
            return Counter("hit" if hit else "miss" for hit in surface.lookup(numbers))
        if operation == "get":
            return Counter(self._judged(zip(numbers, surface.get(numbers), strict=True)))
        if operation == "put":
            done = surface.put(numbers)
            if done:
                self._reported_stored += numbers
            return Counter({SILENT if done is None else "stored" if done else FAILED[operation]: len(numbers)})
        if operation == "delete":
            return Counter({"deleted" if surface.delete(numbers) else FAILED[operation]: len(numbers)})
        names = set(surface.list())
        there = {self._name(number) for number in self._seeded()}
        return Counter({"listed": 1} if there <= names else {"incomplete": 1})

    def _judged(self, pairs: Iterable[tuple[int, bytes | None]]) -> list[str]:
        words = []
        for number, data in pairs:
            if data is not None and data != content(number):
                self._result.wrong += 1
                words.append("wrong")
            else:
                words.append("miss" if data is None else "hit")
        return words

    # --- after it ---------------------------------------------------------------------------------------------------

    def _afterwards(self) -> None:
        result = self._result
        ended = time.monotonic()
        result.back_secs = self._wait(lambda: self._serves(self._others), ended)
        result.healthy = result.healthy and self._surface.healthy()
        if self._trial.operation == "get" and self._bench.to_the_end:
            result.repeated = True
            result.same_secs = self._wait(self._serves_what_failed, ended)
        if self._trial.operation == "put" and result.back_secs is not None:
            found = self._surface.get(self._fresh)
            self._judged(zip(self._fresh, found, strict=True))
            there = {number for number, data in zip(self._fresh, found, strict=True) if data is not None}
            counted = result.chunks.get("stored", 0) + result.chunks.get("present", 0)
            result.lost = len(set(self._reported_stored) - there) + max(0, counted - len(there))

    @staticmethod
    def _wait(condition: Callable[[], bool], since: float, patience: float = _PATIENCE_SECS) -> float | None:
        while time.monotonic() - since < patience:
            if condition():
                return time.monotonic() - since
            time.sleep(_POLL_SECS)
        return None

    def _serves_what_failed(self) -> bool:
        numbers = self._wanted[:_CHUNKS]
        if not all(self._surface.lookup(numbers)):
            return False
        return self._judged(zip(numbers, self._surface.get(numbers), strict=True)) == ["hit"] * _CHUNKS

    def _serves(self, numbers: Sequence[int]) -> bool:
        """Whether a lookup hits, a get returns what was stored, and a put of something new is found."""
        surface = self._surface
        if not all(surface.lookup(numbers)) or surface.get(numbers) != [content(number) for number in numbers]:
            return False
        self._new += 1
        surface.put([self._new])
        return surface.lookup([self._new]) == [True]


_FOREIGN = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_ENDPOINT",
    "HF_XET_CACHE",
    "HF_HUB_CACHE",
    "PROMETHEUS_MULTIPROC_DIR",
)


def environment(home: Path) -> dict[str, str]:
    """The environment of a process that talks to one Hub.

    Args:
        home: Its `HF_HOME`: hf_xet remembers there what it uploaded to which address.
    """
    ours = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return ours | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "CRITICAL",
        "DO_NOT_TRACK": "1",
    }


_MIB = 1024 * 1024


@dataclass(frozen=True)
class Held:
    """At one moment.

    Attributes:
        rss_mib: Resident memory.
        threads: Of the system's, those of hf_xet included.
        python_threads: Of Python's.
        descriptors: Open files and sockets.
        files: Temporary files of ours.
        names: Of the system's threads, how many there are of each name.
    """

    rss_mib: float
    threads: int
    python_threads: int
    descriptors: int
    files: int
    names: dict[str, int]


def warm_libraries(temporary: Path) -> None:
    """Have the libraries start what they keep for the life of a process: threads of hf_xet's hashing, and of torch."""
    temporary.mkdir(parents=True, exist_ok=True)
    sample = temporary / "sample"
    sample.write_bytes(bytes(_MIB))
    hf_xet.hash_files([str(sample)])
    sample.unlink()
    torch.zeros(4 * _MIB).add_(1)


def held(temporary: Path) -> Held:
    """What this process holds now, after what nobody refers to was given back to the system.

    Args:
        temporary: Where temporary files lie.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    names: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names[(task / "comm").read_text().strip()] += 1
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        rss_mib=pages * os.sysconf("SC_PAGE_SIZE") / _MIB,
        threads=names.total(),
        python_threads=threading.active_count(),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
        files=sum(len(files) for _, _, files in os.walk(temporary)),
        names=dict(names),
    )
