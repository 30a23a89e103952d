"""Makes trials side by side, in processes that each have a Hub and a home of their own."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from dev.faults.environment import environment
from dev.faults.trial import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dev.faults.trial import Trial

_PATIENCE_SECS: Final = 180.0
_ROOT: Final = Path(__file__).resolve().parents[2]


class _Worker:
    """One process; use it as a context manager."""

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="hf-home-")
        self._log = (Path(self._home.name) / "worker.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dev.faults.worker"],
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
