"""One engine through one outage, in a process of its own; see `outage`."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from benchmarks.cases import CASES
from benchmarks.children import serve
from localhub.client import HubControl
from localhub.faults import Fault

if TYPE_CHECKING:
    from demo.engine import CpuEngine

CASE: Final = "16 x 512 KiB"
BLOCKING_SECS: Final = 5.0
IN_A_ROW: Final = 5
PROMPTS: Final = 16
_PATIENCE_SECS: Final = 300.0
"""Longest that an engine is asked after the end of a fault."""

OUTAGES: Final = {
    "paths-info hangs": [Fault(route="paths-info", hang=True)],
    "paths-info answers 500": [Fault(route="paths-info", status=500)],
    "data hangs": [Fault(route="xorb-data", hang=True), Fault(route="reconstruction", hang=True)],
}


@dataclass(frozen=True)
class Request:
    """One lookup and one retrieve: seconds of each, and whether everything came, as it was stored."""

    lookup: float
    retrieve: float
    full: bool


class Outage:
    """Faults that are there until they are ended, once."""

    def __init__(self, name: str) -> None:
        self._control = HubControl(os.environ["HF_ENDPOINT"])
        self._numbers = [self._control.add_fault(fault) for fault in OUTAGES[name]]
        self._lock = threading.Lock()
        self.began = time.monotonic()
        self.ended: float | None = None

    def end(self) -> None:
        """Take the faults back."""
        with self._lock:
            if self.ended is None:
                for number in self._numbers:
                    self._control.clear_fault(number)
                self.ended = time.monotonic()


def ask(engine: CpuEngine, seed: int) -> Request:
    """Look a prompt up and retrieve it, whatever the lookup said."""
    import torch

    from demo.engine import prompt

    tokens = prompt(seed, CASES[CASE].tokens)
    expected = engine.random_kv(len(tokens), seed)
    into = torch.zeros_like(expected)
    engine.forget_local()
    started = time.monotonic()
    found = engine.lookup(tokens)
    looked_up = time.monotonic()
    hit = engine.retrieve_into(tokens, into)
    retrieved = time.monotonic()
    full = found == hit == len(tokens) and torch.equal(into, expected)
    return Request(looked_up - started, retrieved - looked_up, full)


def go_through(side: str, outage: str, folder: str, secs: float, *, unbounded: bool) -> dict[str, Any]:
    """Five requests in a row from the start of an outage on, then one a second until everything is served again.

    Args:
        side: Whose backend.
        outage: Of `OUTAGES`.
        folder: Where the prompts are.
        secs: How long the outage lasts.
        unbounded: Whether it ends then although the five are not done: they would never be. Otherwise it lasts until
            they are.
    """
    from benchmarks.classic import make_engine

    engine = make_engine(side, CASES[CASE], folder, blocking_secs=BLOCKING_SECS)
    if not ask(engine, 0).full:
        raise RuntimeError("the engine does not work before the outage")
    fault = Outage(outage)
    if unbounded:
        timer = threading.Timer(secs, fault.end)
        timer.daemon = True
        timer.start()
    row = [ask(engine, 1 + number) for number in range(IN_A_ROW)]
    later = []
    recovered = None
    seed = IN_A_ROW
    while recovered is None:
        if time.monotonic() - fault.began >= secs:
            fault.end()
        seed = IN_A_ROW + 1 + (seed - IN_A_ROW) % (PROMPTS - IN_A_ROW - 1)
        request = ask(engine, seed)
        later.append(request)
        if fault.ended is not None:
            if request.full:
                recovered = time.monotonic() - fault.ended
            elif time.monotonic() - fault.ended > _PATIENCE_SECS:
                break
        if recovered is None:
            time.sleep(max(0.0, 1 - request.lookup - request.retrieve))
    return {
        "row": [asdict(request) for request in row],
        "took": sum(request.lookup + request.retrieve for request in row),
        "later": [asdict(request) for request in later],
        "lasted": (fault.ended or 0.0) - fault.began,
        "recovered": recovered,
    }


def fill(folder: str) -> dict[str, Any]:
    """Store the prompts."""
    from benchmarks.classic import prepare

    return prepare(CASE, folder, list(range(PROMPTS)))


if __name__ == "__main__":
    serve({"fill": fill, "go_through": go_through})
    os._exit(0)  # threads of the built-in backend may still be blocked, and would be waited for
