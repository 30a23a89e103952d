"""Runs each measurement in a process of its own, with an empty HF_HOME, and tells how busy the machine was meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from localhub.process import RunningHub

REPOSITORY = Path(__file__).resolve().parents[2]


def run(hub: RunningHub, module: str, action: str, **arguments: Any) -> dict[str, Any]:
    """Run an action of a module that calls `serve`, in a fresh process.

    Returns:
        What it returned, and `others`: processors that other work on the machine took meanwhile.

    Raises:
        RuntimeError: It failed; the message ends with what it wrote.
    """
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {
            "HF_HOME": home,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LMCACHE_LOG_LEVEL": os.environ.get("LMCACHE_LOG_LEVEL", "ERROR"),
            "LMCACHE_TRACK_USAGE": "false",
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": home,
        }
        started, before = time.monotonic(), _busy_elsewhere(hub)
        done = subprocess.run(
            [sys.executable, "-m", module, action, json.dumps(arguments)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        others = (_busy_elsewhere(hub) - before) / (time.monotonic() - started)
    if done.returncode:
        raise RuntimeError(f"{module} {action} {arguments} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {"others": max(0.0, others)}


def serve(actions: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """In the child: call the action that was asked for; the last line of output is its result."""
    result = actions[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result), flush=True)


def _busy_elsewhere(hub: RunningHub) -> float:
    """Processor seconds that this machine spent so far on anything but us, our ended children and the Hub."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    total = sum(map(int, fields[:8])) - int(fields[3]) - int(fields[4])  # all but idle and iowait
    return (total - sum(_ticks(os.getpid())) - sum(_ticks(hub.pid))) / tick


def _ticks(pid: int) -> Iterator[int]:
    """User and system time of a process, and of its children that ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    yield from map(int, fields[11:15])
