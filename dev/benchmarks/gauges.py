"""What is measured beside seconds: memory, the event loop's punctuality, and requests by route."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dev.benchmarks.cases import BUCKET, MIB

if TYPE_CHECKING:
    from collections.abc import Collection

HUB_ROUTES: Final = frozenset(
    {"bucket-create", "bucket-info", "tree", "paths-info", "batch", "resolve", "xet-read-token", "xet-write-token"}
)
"""Routes of the Hub's API, which its quotas count; the others are the store's."""

_RETRIES: Final = 3000


class Memory:
    """Peak memory of this process beyond what it held when this was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again here
        self._before = _resident("VmRSS")

    def extra_mib(self) -> float:
        """MiB."""
        return (_resident("VmHWM") - self._before) / MIB


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Heartbeat:
    """How late a callback that is due every millisecond comes on an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running = True
        self._late: list[float] = []
        self._done = asyncio.run_coroutine_threadsafe(self._beat(), loop)

    async def _beat(self) -> None:
        while self._running:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self._late.append(time.perf_counter() - due)

    def stop(self) -> tuple[float, float]:
        """Milliseconds: 99th percentile and maximum."""
        self._running = False
        self._done.result()
        ordered = sorted(self._late)
        return 1000 * ordered[int(len(ordered) * 0.99)], 1000 * ordered[-1]


class SlowCallbacks(logging.Handler):
    """Callbacks on a loop that took longer than 5 ms, as asyncio's debug mode reports them from now on."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.seen: list[str] = []
        logging.getLogger("asyncio").addHandler(self)
        loop.slow_callback_duration = 0.005
        loop.call_soon_threadsafe(loop.set_debug, True)

    def emit(self, record: logging.LogRecord) -> None:
        """Note a report."""
        if "took" in record.getMessage():
            self.seen.append(record.getMessage())


class Wire:
    """Requests by route, as the Hub counts them itself, phase by phase."""

    def __init__(self) -> None:
        from localhub.client import HubControl

        self._control = HubControl(os.environ["HF_ENDPOINT"])
        self._seen: dict[str, int] = self._counts()

    def _counts(self) -> dict[str, int]:
        return {name: route.requests for name, route in self._control.counters().routes.items()}

    def phase(self) -> dict[str, int]:
        """Requests since this was made, or since the last call."""
        before, self._seen = self._seen, self._counts()
        return {name: more for name, count in self._seen.items() if (more := count - before.get(name, 0))}


class Listing:
    """What the bucket lists under a prefix, asked over a connection that is kept: the benchmark's own `tree` requests."""

    def __init__(self, folder: str) -> None:
        import httpx2

        self._client = httpx2.Client()
        self._url = f"{os.environ['HF_ENDPOINT']}/api/buckets/{BUCKET}/tree/{folder}?recursive=true"
        self.asked = 0

    def sizes(self) -> list[int]:
        """Sizes of the objects that are there, but for our own records."""
        self.asked += 1
        answer: list[dict[str, Any]] = self._client.get(self._url).raise_for_status().json()
        return [entry["size"] for entry in answer if "/.hfbucket/" not in entry["path"]]

    def wait_for(self, expected: Collection[int]) -> None:
        """Wait until objects of these sizes are there.

        Raises:
            TimeoutError: They are not within a minute.
        """
        wanted = sorted(expected)
        for _ in range(_RETRIES):
            if sorted(found := self.sizes()) == wanted:
                return
            time.sleep(0.02)
        raise TimeoutError(f"the bucket lists {len(found)} objects instead of {len(wanted)}")
