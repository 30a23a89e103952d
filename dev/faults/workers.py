"""Who works: the threads of a soak, and the processes that make trials side by side.

The threads look up, get, put and delete random chunks, and compare each answer. `python -m dev.faults.workers` makes trials
against a Hub of its own, with a home of its own: specifications come on stdin, reports go to stdout, a line each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tests.support.surface import content

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dev.faults.report import Ledger
    from dev.faults.trial import Report, Trial
    from tests.support.surface import Surface


_THREADS: Final = 4
_CHUNKS: Final = 96
_MOST: Final = 6
"""Chunks of one call."""

_PAUSE_SECS: Final = 0.02
_SERVED_SECS: Final = 60.0
_FRESH: Final = 8


class Workers:
    """Four threads, each at one of the engines at a time.

    Args:
        engines: What they work.
        ledger: Where they note what they saw.
        seed: What they do.
    """

    def __init__(self, engines: Sequence[Surface], ledger: Ledger, seed: int) -> None:
        self._engines = engines
        self._ledger = ledger
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(random.Random(seed * 100 + number),), daemon=True)
            for number in range(_THREADS)
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End, when each thread's present call has."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, dice: random.Random) -> None:
        while not self._over.is_set():
            engine = dice.choice(self._engines)
            first, count = dice.randrange(_CHUNKS), dice.randint(1, _MOST)
            numbers = [(first + index) % _CHUNKS for index in range(count)]
            act = dice.choices((self._retrieve, self._put, self._delete), (6, 3, 1))[0]
            try:
                act(engine, numbers)
            except Exception as error:  # noqa: BLE001 - nothing may be raised into an engine: noted, and a breach
                self._ledger.note_raised(f"{engine.instance}: {type(error).__name__}: {error}")
            time.sleep(dice.uniform(0, _PAUSE_SECS))

    def _retrieve(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        hits, got = engine.retrieve(numbers)
        late = time.monotonic() - began - engine.deadline("lookup") - engine.deadline("get")
        found = [number for number, hit in zip(numbers, hits, strict=True) if hit]
        self._ledger.note("lookup", len(numbers), len(found), 0.0)
        if found:
            served = [(number, data) for number, data in zip(found, got, strict=True) if data is not None]
            wrong = sum(data != content(number) for number, data in served)
            self._ledger.note("get", len(found), len(served), late, wrong)

    def _put(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        engine.put(numbers)
        self._ledger.note("put", len(numbers), 0, time.monotonic() - began - engine.deadline("put"))

    def _delete(self, engine: Surface, numbers: Sequence[int]) -> None:
        began = time.monotonic()
        engine.delete(numbers[:1])
        self._ledger.note("delete", 1, 0, time.monotonic() - began - engine.deadline("delete"))

    def served_again(self) -> float | None:
        """Seconds until every engine stores and serves chunks that are new; None when they do not in a minute."""
        began = time.monotonic()
        for index, engine in enumerate(self._engines):
            fresh = [_CHUNKS + _FRESH * index + number for number in range(_FRESH)]
            while not self._serves(engine, fresh):
                if time.monotonic() - began > _SERVED_SECS:
                    return None
                time.sleep(0.1)
        return time.monotonic() - began

    def _serves(self, engine: Surface, fresh: Sequence[int]) -> bool:
        self._put(engine, fresh)
        hits, got = engine.retrieve(fresh)
        found = [number for number, hit in zip(fresh, hits, strict=True) if hit]
        right = [data == content(number) for number, data in zip(found, got, strict=True) if data is not None]
        self._ledger.note("lookup", len(fresh), len(found), 0.0)
        self._ledger.note("get", len(found), len(right), 0.0, right.count(False))
        return right == [True] * len(fresh)


def make_trials() -> None:
    """Make trials until stdin ends."""
    # Whatever the libraries print must not get between the reports.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)

    from dev.faults.trial import Bench, Report, Trial
    from localhub.process import start
    from tests.support.lmcache_classic import running_loop

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        hub = stack.enter_context(start(directory / "hub", faults=True))
        bench = Bench(hub, stack.enter_context(running_loop()), directory)
        for line in sys.stdin:
            trial = Trial(**json.loads(line))
            try:
                report = bench.run(trial)
            except Exception:  # noqa: BLE001 - told, and the next one is made all the same
                report = Report(trial, problem=traceback.format_exc())
                hub.restart()
            out.write(json.dumps(report.record()) + "\n")
        out.flush()


_PATIENCE_SECS: Final = 180.0
_ROOT: Final = Path(__file__).resolve().parents[2]


class _Worker:
    """One process; use it as a context manager."""

    def __init__(self) -> None:
        from dev.faults.trial import environment

        self._home = tempfile.TemporaryDirectory(prefix="hf-home-")
        self._log = (Path(self._home.name) / "worker.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dev.faults.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(Path(self._home.name)),
            cwd=_ROOT,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self._home.cleanup()

    def make(self, trial: Trial) -> Report:
        """Make one trial; a process that does not come back is ended."""
        from dev.faults.trial import Report

        timer = threading.Timer(_PATIENCE_SECS, self._process.kill)
        timer.start()
        try:
            line = self._ask(trial)
        finally:
            timer.cancel()
        if not line:
            self._log.seek(0)
            return Report(trial, problem=f"the process ended: {self._log.read()[-2000:]}")
        record: dict[str, Any] = json.loads(line)
        return Report.of(record)

    def _ask(self, trial: Trial) -> str:
        if self._process.stdin is None or self._process.stdout is None:
            return ""
        try:
            self._process.stdin.write(json.dumps(vars(trial)) + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""

    @property
    def lives(self) -> bool:
        """Whether it takes another trial."""
        return self._process.poll() is None


def make_all(trials: Sequence[Trial], workers: int, tell: Callable[[Report], None]) -> list[Report]:
    """Make trials side by side.

    Args:
        trials: In the order in which they are begun.
        workers: Processes.
        tell: Called with each report when it is there.
    """
    waiting: queue.SimpleQueue[Trial] = queue.SimpleQueue()
    for trial in trials:
        waiting.put(trial)
    reports: list[Report] = []
    lock = threading.Lock()

    def work() -> None:
        while not waiting.empty():
            with _Worker() as worker:
                while worker.lives:
                    try:
                        trial = waiting.get_nowait()
                    except queue.Empty:
                        return
                    report = worker.make(trial)
                    with lock:
                        reports.append(report)
                        tell(report)

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(trials)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports
