"""What an outage costs an engine: LMCache's built-in backend and ours, five lookups + retrieves in a row, one run.

    python dev/benchmarks/outage.py [--hang-secs 20] [--json FILE]

Each side is a real engine (`blocking_timeout_secs: 5`) in a process of its own that has just started. The fault begins before
the first lookup and ends after `--hang-secs`, or as soon as all five are done; then the same prompt is asked for until it
comes back whole. Where the built-in waits for the Hub without a deadline, its first lookup lasts as long as the hang: with
`--hang-secs 125` that is 125 s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dev.benchmarks import children  # noqa: E402 - the repository is on the path only now

CHUNK_TOKENS, CHUNKS = 256, 8
BLOCKING_SECS = 5
LOOKUP_SECS, GET_SECS = 1.0, 0.9 * BLOCKING_SECS
REQUESTS = 5
BACK_SECS = 30.0
PATIENCE_SECS = 240.0
SIDES = ("built-in", "ours")
FAULTS: dict[str, list[dict[str, Any]]] = {
    "paths-info hangs": [{"route": "paths-info", "hang": True}],
    "paths-info answers 500": [{"route": "paths-info", "status": 500}],
    "data hangs": [{"route": "xorb-data", "hang": True}, {"route": "reconstruction", "hang": True}],
}


def _engine(side: str, directory: Path) -> Any:
    from tests.support.lmcache_engine import CpuEngine

    head = "  remote_storage_plugin.hfbucket"
    lines = [
        f"chunk_size: {CHUNK_TOKENS}",
        "local_cpu: false",
        "save_unfull_chunk: false",
        'remote_serde: "naive"',
        f"blocking_timeout_secs: {BLOCKING_SECS}",
        "max_local_cpu_size: 0.1",
        'remote_storage_plugins: ["hfbucket"]',
        "extra_config:",
        f'{head}.bucket_handle: "hf://buckets/bench/kv/outage"',
        f"{head}.create_bucket_if_missing: true",
    ]
    if side == "ours":
        lines += [f"{head}.module_path: hfbucket_plugin.adapter", f"{head}.class_name: HFBucketConnectorAdapter"]
    path = directory / "lmcache.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CpuEngine(f"outage-{side}", path, layers=4, hidden=64, model="bench/outage")


def _prompt() -> list[int]:
    from tests.support.lmcache_engine import prompt

    return prompt(11, CHUNKS * CHUNK_TOKENS)


def store() -> dict[str, Any]:
    """Store the prompt."""
    with tempfile.TemporaryDirectory() as directory:
        engine = _engine("ours", Path(directory))
        tokens = _prompt()
        engine.store(tokens, engine.random_kv(len(tokens), 11))
        engine.wait_written(tokens)
        engine.close()
    return {}


def suffer(side: str, fault: str, hang_secs: float) -> dict[str, Any]:
    """Ask five times during a fault, and then until all is well again."""
    from localhub.client import HubControl
    from localhub.faults import Fault

    control = HubControl(os.environ["HF_ENDPOINT"])
    with tempfile.TemporaryDirectory() as directory:
        engine, tokens = _engine(side, Path(directory)), _prompt()
        expected = engine.random_kv(len(tokens), 11)
        for one in FAULTS[fault]:
            control.add_fault(Fault(**one))
        release = threading.Timer(hang_secs, control.clear_faults)
        if "hang" in fault:
            release.start()
        took = [_ask(engine, tokens)[0] for _ in range(REQUESTS)]
        release.cancel()
        control.clear_faults()
        ended = time.monotonic()
        while True:
            _, hit, found = _ask(engine, tokens)
            back = time.monotonic() - ended
            if (hit == len(tokens) and found.equal(expected)) or back > PATIENCE_SECS:
                break
            time.sleep(0.1)
    print(json.dumps({"took": took, "back": back}), flush=True)
    os._exit(0)  # threads of the built-in may still wait for the Hub


def _ask(engine: Any, tokens: list[int]) -> tuple[float, int, Any]:
    engine.forget_local()
    started = time.monotonic()
    found = engine.lookup(tokens)
    hit, kv = engine.retrieve(tokens) if found else (0, None)
    return time.monotonic() - started, hit, kv


def report(fault: str, sides: dict[str, dict[str, Any]]) -> bool:
    """Print one fault; whether ours met its bounds."""
    print(fault)
    for side, row in sides.items():
        each = " ".join(f"{seconds:6.2f}" for seconds in row["took"])
        print(f"  {side:9} each {each} s   five {sum(row['took']):7.2f} s   whole again after {row['back']:6.2f} s")
    ours, theirs = sides["ours"], sides["built-in"]
    deadline = LOOKUP_SECS + GET_SECS
    met = max(ours["took"]) <= deadline + 0.5 and sum(ours["took"]) <= 3 * deadline and ours["back"] <= BACK_SECS
    print(
        f"  ratio of five {sum(ours['took']) / sum(theirs['took']):.3f} x   (ours: each at most {deadline:.1f} s, five at "
        f"most {3 * deadline:.1f} s, whole again within {BACK_SECS:.0f} s: {'met' if met else 'MISSED'})\n"
    )
    return met


def main() -> None:
    """Run both sides through each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hang-secs", type=float, default=20.0, help="how long a hang lasts at most")
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()

    from localhub.process import start

    figures, met = {}, True
    with tempfile.TemporaryDirectory() as root, start(Path(root) / "hub", faults=True) as hub:
        children.run(hub, "dev.benchmarks.outage", "store")
        for fault in FAULTS:
            if options.only not in fault:
                continue
            sides = {}
            for side in SIDES:
                arguments = {"side": side, "fault": fault, "hang_secs": options.hang_secs}
                sides[side] = children.run(hub, "dev.benchmarks.outage", "suffer", **arguments)
                hub.control.clear_faults()
            figures[fault] = sides
            met = report(fault, sides) and met
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    raise SystemExit(0 if met else 1)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in {"store", "suffer"}:
        children.serve({"store": store, "suffer": suffer})
    else:
        main()
