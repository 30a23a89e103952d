"""Waiting for what happens elsewhere: a clock that a test moves, threads, processes and ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOST = "127.0.0.1"
_POLL_SECONDS = 0.01


class Clock:
    """Seconds that pass when a test says so, or, with `step`, whenever somebody looks."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 1000.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def eventually(condition: Callable[[], Any], seconds: float = 60.0, what: str | None = None) -> Any:
    """Wait until a condition holds, and return its value.

    Args:
        condition: Asked once at least.
        seconds: How long it may take.
        what: Is waited for, for the error.

    Raises:
        TimeoutError: It does not hold in time.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what or condition}")
        time.sleep(_POLL_SECONDS)
    return value


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call a function with 0, 1, … in as many threads at once, and return what it returned or raised."""
    results: list[Any] = [None] * count
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = function(number)
        except Exception as error:  # noqa: BLE001 - handed to the test
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def free_ports(count: int) -> list[int]:
    """Ports of the loopback on which nobody listens, each another."""
    listeners = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def unused_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def run_script(script: str, arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which finds the helpers of the tests: for what forks.

    Args:
        script: The text of the program.
        arguments: Its arguments.
        home: The process's HF_HOME.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env=environment,
    )
