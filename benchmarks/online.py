"""The online path against LMCache's built-in backend: lookup + retrieve by a real engine, cold, 40 ms a request.

    python benchmarks/online.py [--runs 3] [--delay-ms 40] [--json FILE]

Both sides read the same objects of one local Hub, each run in a process of its own: fresh engine, fresh connections, no
metadata known. Printed for each: median seconds of lookup + retrieve, requests, peak memory beyond what the engine held
before (its pool and the KV tensor were touched already), and lateness of a 1 ms heartbeat on the engine's event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MIB = 1024 * 1024
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Case:
    """A batch: how many chunks, and the model that makes them as large as they are."""

    name: str
    chunks: int
    layers: int
    hidden: int
    target: float

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk: K and V, bfloat16."""
        return 2 * self.layers * CHUNK_TOKENS * self.hidden * 2


CASES = (
    Case("16 x 512 KiB", 16, 4, 128, 0.45),
    Case("16 x 4 MiB", 16, 8, 512, 0.55),
    Case("8 x 32 MiB", 8, 32, 1024, 0.65),
)
SIDES = ("built-in", "ours")


def config_text(side: str, case: Case) -> str:
    """The seed's minimal configuration, with our class named or not."""
    lines = [
        f"chunk_size: {CHUNK_TOKENS}",
        "local_cpu: false",
        "save_unfull_chunk: false",
        'remote_serde: "naive"',
        "blocking_timeout_secs: 30",
        f"max_local_cpu_size: {max(0.25, 2.5 * case.chunks * case.chunk_bytes / 2**30)}",
        'remote_storage_plugins: ["hfbucket"]',
        "extra_config:",
        f'  remote_storage_plugin.hfbucket.bucket_handle: "hf://buckets/bench/kv/{case.chunk_bytes}"',
        "  remote_storage_plugin.hfbucket.create_bucket_if_missing: true",
    ]
    if side == "ours":
        lines += [
            "  remote_storage_plugin.hfbucket.module_path: hfbucket_plugin.adapter",
            "  remote_storage_plugin.hfbucket.class_name: HFBucketConnectorAdapter",
        ]
    return "\n".join(lines) + "\n"


# --- in the process of one run ---------------------------------------------------------------------------------------


def make_engine(side: str, case: Case, directory: Path) -> Any:
    """A real engine with one side's backend."""
    from demo.engine import CpuEngine

    path = directory / "lmcache.yaml"
    path.write_text(config_text(side, case), encoding="utf-8")
    return CpuEngine("bench", path, layers=case.layers, hidden=case.hidden, model="bench/model")


def prepare(case: Case, directory: Path) -> None:
    """Store the batch."""
    from demo.engine import prompt

    engine = make_engine("ours", case, directory)
    tokens = prompt(7, case.chunks * CHUNK_TOKENS)
    engine.store(tokens, engine.random_kv(len(tokens), 7))
    engine.wait_written(tokens)
    engine.close()


class Heartbeat:
    """How late a callback that is due every millisecond comes on the engine's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._running = True
        self.late: list[float] = []
        self._done = asyncio.run_coroutine_threadsafe(self._beat(), loop)

    async def _beat(self) -> None:
        while self._running:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self.late.append(time.perf_counter() - due)

    def stop(self) -> tuple[float, float]:
        """Milliseconds: 99th percentile and maximum."""
        self._running = False
        self._done.result()
        ordered = sorted(self.late)
        return 1000 * ordered[int(len(ordered) * 0.99)], 1000 * ordered[-1]


class SlowCallbacks(logging.Handler):
    """Callbacks on the loop that took longer than 5 ms, as asyncio's debug mode reports them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note a report."""
        if "took" in record.getMessage():
            self.seen.append(record.getMessage())


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def touch_pool(engine: Any, case: Case) -> None:
    """Write to the engine's memory, so that pages it faults in later are not taken for the backend's."""
    backend = engine.engine.storage_manager.local_cpu_backend
    shapes, dtypes = engine.metadata.get_shapes(), engine.metadata.get_dtypes()
    held = [backend.allocate(shapes, dtypes, busy_loop=False) for _ in range(2 * case.chunks)]
    for memory_obj in held:
        if memory_obj is not None:
            memory_obj.tensor.zero_()
    for memory_obj in held:
        if memory_obj is not None:
            memory_obj.ref_count_down()


def measure(side: str, case: Case, directory: Path) -> dict[str, Any]:
    """One cold lookup + retrieve, and a second one under asyncio's debug mode for slow callbacks."""
    import torch

    from demo.engine import prompt
    from localhub.client import HubControl

    engine = make_engine(side, case, directory)
    tokens = prompt(7, case.chunks * CHUNK_TOKENS)
    expected = engine.random_kv(len(tokens), 7)
    touch_pool(engine, case)
    into = torch.zeros_like(expected)
    control = HubControl(os.environ["HF_ENDPOINT"])
    control.reset_counters()
    heartbeat = Heartbeat(engine.remotes[0].loop)
    time.sleep(0.2)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew here
    before = resident("VmRSS")
    started = time.perf_counter()
    found = engine.lookup(tokens)
    hit = engine.retrieve_into(tokens, into)
    seconds = time.perf_counter() - started
    extra = resident("VmHWM") - before
    p99, worst = heartbeat.stop()
    counters = control.counters()
    if (found, hit) != (len(tokens), len(tokens)) or not torch.equal(into, expected):
        raise RuntimeError(f"{side}, {case.name}: found {found}, hit {hit} of {len(tokens)} tokens, or not identical")
    slow = slow_callbacks(engine, tokens, into)
    engine.close()
    return {
        "seconds": seconds,
        "requests": counters.total.requests,
        "extra_mib": extra / MIB,
        "p99_ms": p99,
        "max_ms": worst,
        "slow_callbacks": slow,
    }


def slow_callbacks(engine: Any, tokens: list[int], into: Any) -> list[str]:
    """Retrieve once more with asyncio's debug mode on."""
    handler = SlowCallbacks()
    logging.getLogger("asyncio").addHandler(handler)
    loop = engine.remotes[0].loop
    loop.slow_callback_duration = 0.005
    loop.call_soon_threadsafe(loop.set_debug, True)
    engine.forget_local()
    engine.retrieve_into(tokens, into)
    return handler.seen


# --- the process that starts them --------------------------------------------------------------------------------------


def run_child(action: str, side: str, index: int, endpoint: str) -> dict[str, Any]:
    """Run one action in a fresh process with a fresh HF_HOME."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {
            "HF_HOME": home,
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LMCACHE_LOG_LEVEL": "ERROR",
            "PYTHONHASHSEED": "0",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--child", action, "--side", side, "--case", str(index)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{action} of {side}, {CASES[index].name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def child(action: str, side: str, index: int) -> None:
    """What a child does; its last line of output is its result."""
    with tempfile.TemporaryDirectory() as directory:
        if action == "prepare":
            prepare(CASES[index], Path(directory))
            print("{}")
        else:
            print(json.dumps(measure(side, CASES[index], Path(directory))))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs; the worst for what must never happen."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "requests": statistics.median(run["requests"] for run in runs),
        "extra_mib": max(run["extra_mib"] for run in runs),
        "p99_ms": statistics.median(run["p99_ms"] for run in runs),
        "max_ms": statistics.median(run["max_ms"] for run in runs),
        "slow_callbacks": [text for run in runs for text in run["slow_callbacks"]],
    }


def report(case: Case, sides: dict[str, dict[str, Any]]) -> None:
    """Print one case."""
    for side, row in sides.items():
        print(
            f"{case.name:14} {side:9} {row['seconds']:7.3f} s {row['requests']:5.0f} requests "
            f"{row['extra_mib']:+8.1f} MiB   heartbeat p99 {row['p99_ms']:5.1f} ms max {row['max_ms']:5.1f} ms   "
            f"callbacks over 5 ms: {len(row['slow_callbacks'])}"
        )
    for text in sides["ours"]["slow_callbacks"]:
        print(f"{'':14} ours      slow: {text}")
    ratio = sides["ours"]["seconds"] / sides["built-in"]["seconds"]
    print(f"{case.name:14} ratio     {ratio:7.2f} x   (target: at most {case.target:.2f} x)\n")


def main() -> None:
    """Run both sides, alternating, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side and case; medians are printed")
    parser.add_argument("--delay-ms", type=float, default=40.0, help="added to each request")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--only", type=int, choices=range(len(CASES)), help="one case only")
    for name in ("--child", "--side", "--case"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.side, int(options.case))
        return

    from localhub.faults import Fault
    from localhub.process import start

    figures = {}
    with tempfile.TemporaryDirectory() as root, start(Path(root) / "hub", faults=True) as hub:
        for index, case in enumerate(CASES):
            if options.only not in (None, index):
                continue
            hub.control.clear_faults()
            run_child("prepare", "ours", index, hub.endpoint)
            hub.control.add_fault(Fault(delay_s=options.delay_ms / 1000))
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(options.runs):
                for side in SIDES:
                    runs[side].append(run_child("measure", side, index, hub.endpoint))
            figures[case.name] = {side: summarise(runs[side]) for side in SIDES}
            report(case, figures[case.name])
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
