"""The soak's own process: `python -m dev.faults.soak` starts it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from huggingface_hub import HfApi

from dev.faults.classic import Classic, running_loop
from dev.faults.ledger import Ledger
from dev.faults.mp import MP
from dev.faults.random_faults import RandomFaults
from dev.faults.resources import held, warm_libraries
from dev.faults.soak_report import Moments, judge
from dev.faults.surface import Limits
from dev.faults.workers import Workers
from localhub.process import start

if TYPE_CHECKING:
    from dev.faults.surface import Surface

_SETTLE_SECS: Final = 3.0
"""For work that was given up to end, and threads with it."""

LIMITS: Final = Limits(lookup=0.5, get=2.0, put=3.0)


def main(directory: Path, seconds: float, seed: int, *, verbose: bool) -> int:
    """Soak; the exit status."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what LMCache prints stays out of the report
    logging.disable(logging.CRITICAL)
    began = time.monotonic()

    def tell(text: str) -> None:
        if verbose:
            out.write(f"{time.monotonic() - began:7.1f} s  {text}\n")

    out.write(f"seed {seed}, {seconds:g} s\n")
    temporary = directory / "tmp"
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(start(directory / "hub", faults=True))
        loop = stack.enter_context(running_loop())
        HfApi(endpoint=hub.endpoint, token=False).create_bucket("faults/soak")
        where: dict[str, Any] = {
            "handle": "hf://buckets/faults/soak/kv",
            "endpoint": hub.endpoint,
            "limits": LIMITS,
            "verify": "hash",
        }
        warm_libraries(temporary)
        before = held(temporary)
        classic = [Classic(f"hfbucket.{name}", loop, directory, cpu_gb=0.1, **where) for name in ("one", "two")]
        engines: list[Surface] = [*classic, MP("hfbucket.mp", directory, **where)]
        free = [engine.free_chunks() for engine in classic]
        ledger = Ledger()
        workers, random_faults = Workers(engines, ledger, seed), RandomFaults(hub, seed, tell)
        workers.start()
        random_faults.start()
        time.sleep(seconds / 3)
        warm = held(temporary)
        time.sleep(seconds * 2 / 3)
        random_faults.clear()
        workers.stop()
        back = workers.served_again()
        time.sleep(_SETTLE_SECS)
        end = held(temporary)
        healthy = all(engine.healthy() for engine in engines)
        leaked = sum(free) - sum(engine.free_chunks() for engine in classic)
        ledger.read_metrics(engines)
        for engine in engines:
            engine.close()
        time.sleep(_SETTLE_SECS)
        after = held(temporary)
    moments = Moments(before, warm, end, after, warm_secs=seconds / 3)
    text, kept = judge(ledger, random_faults, moments, back=back, healthy=healthy, leaked=leaked)
    out.write(text + "\n")
    out.flush()
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), verbose="--verbose" in sys.argv))
