"""The key index: what a table costs, what lookups and gets gain by it, and what a fleet's calls to the Hub come to.

    python dev/benchmarks/index.py [--keys 1000000] [--delay-ms 40] [--runs 3] [--nodes 200] [--only table|engine|fleet] [--json FILE]

*table*: a snapshot of so many keys, made, loaded and looked up in, in a process of its own. *engine*: a real classic engine
and the MP adapter, each with LMCache's built-in backend, with ours, and with ours and the index, on one local Hub; prompts of
16 chunks that the engine has not met before. *fleet*: calls to the Hub's API in 5 minutes of nodes that get a prompt a second
each, simulated with the calls that the engines just made, or without those, with the calls that they made when this was
written; against the quotas of a member.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dev.benchmarks import children  # noqa: E402 - the path comes first
from dev.benchmarks.cases import BUCKET, INDEXED, SIDES  # noqa: E402
from dev.benchmarks.gauges import HUB_ROUTES  # noqa: E402
from dev.benchmarks.tables import Verdict, print_verdicts  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping

CASE: Final = "16 x 512 KiB"
ALL_SIDES: Final = (*SIDES, INDEXED)
WINDOW_SECS: Final = 300
QUOTAS: Final = {"free": 1_000, "Enterprise": 6_000}
"""API calls of a member in 5 minutes, as the Hub documents them."""

_HITS, _MISSES = 7, 20
_TOKENS: Final = frozenset({"xet-read-token", "xet-write-token"})
_RESOLVER: Final = frozenset({"resolve"})
_AS_WRITTEN: Final = {
    "built-in": {"hit": 2.0, "miss": 1.0, "put": 2.0},
    "ours": {"hit": 1.0, "miss": 1.0, "put": 1.0},
    INDEXED: {"hit": 0.0, "miss": 0.0, "put": 2.0},
}
"""API calls of a prompt. A put without the index goes by the lookup just before it; with it, it asks by itself."""

_REFRESH_SECS, _JOURNAL_SECS, _SNAPSHOT_SECS, _JOURNAL_ENTRIES = 60, 30, 600, 2000
_SHARE_SECS = 0.3
"""What each process adds to the intervals of all: 1,000 calls in 5 minutes, see `hfbucket_plugin.index.refresh`."""

_CHUNKS = 16


def table(keys: int) -> dict[str, float]:
    """A table of its own, in this process: call it in a fresh one."""
    import numpy as np

    from dev.benchmarks.gauges import Memory
    from hfbucket_plugin.hub.transfer import xet_hashes
    from hfbucket_plugin.index.build import SnapshotFile
    from hfbucket_plugin.index.format import snapshot_of
    from hfbucket_plugin.index.table import ROW, content_of, digests_of

    chance = np.random.default_rng(1)
    figures: dict[str, float] = {"keys": keys}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "snapshot.npy"
        memory, started = Memory(), time.perf_counter()
        with SnapshotFile(Path(directory)) as file:
            left = keys
            while left:
                rows = np.zeros(min(left, 1000), ROW)  # a page of a listing
                digests = digests_of(f"org%2Fmodel%408%400%40{left - n:032x}%40bfloat16" for n in range(len(rows)))
                rows["digest_hi"], rows["digest_lo"] = digests[:, 0], digests[:, 1]
                rows["xet_hash"] = chance.integers(0, 256, (len(rows), 32), dtype=np.uint8)
                rows["size"], rows["uploaded_at"] = 524_288, 1_760_000_000
                file.add(rows)
                left -= len(rows)
            file.write(path)
        figures["build_secs"] = time.perf_counter() - started
        figures["build_extra_mib"] = memory.extra_mib()
        figures["file_mib"] = path.stat().st_size / 2**20
        started = time.perf_counter()
        xet_hashes([path])
        figures["check_secs"] = time.perf_counter() - started
        memory, started = Memory(), time.perf_counter()
        data = bytearray(path.stat().st_size)
        with path.open("rb") as source:
            source.readinto(data)
        loaded = snapshot_of(data, str(path))
        figures["load_secs"] = time.perf_counter() - started
        figures["resident_mib"] = memory.extra_mib()
    names = [f"org%2Fmodel%408%400%40{n + 1:032x}%40bfloat16" for n in range(_CHUNKS)]
    unknown = [name.replace("model", "other") for name in names]
    for what, asked in (("hit", names), ("miss", unknown)):
        times = []
        for _ in range(1000):
            started = time.perf_counter()
            found = loaded.find(digests_of(asked))
            answers = [content_of(loaded.rows[at]) for at in found.tolist() if at >= 0]
            times.append(time.perf_counter() - started)
            if len(answers) != (len(asked) if what == "hit" else 0):
                raise RuntimeError(f"{len(answers)} of {len(asked)} keys found")
        figures[f"{what}_us"] = 1e6 * sorted(times)[len(times) // 2]
    return figures


def print_table(figures: Mapping[str, float]) -> list[Verdict]:
    """Print them."""
    print(
        f"table of {figures['keys']:,.0f} keys\n"
        f"  build {figures['build_secs']:.2f} s (memory {figures['build_extra_mib']:+.0f} MiB), file "
        f"{figures['file_mib']:.1f} MiB, its hash checked in {figures['check_secs']:.2f} s\n"
        f"  load {figures['load_secs']:.3f} s, memory {figures['resident_mib']:+.1f} MiB\n"
        f"  look-up of {_CHUNKS} keys: hits {figures['hit_us']:.0f} us, misses {figures['miss_us']:.0f} us\n",
        flush=True,
    )
    scale = figures["keys"] / 1_000_000
    return [Verdict("table, memory of a reader", figures["resident_mib"], 100 * scale * 1e6 / 2**20, "MiB")]


def engines(delay_ms: float, runs: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Both modes, every side, alternating, each run in a process of its own; medians of all runs' prompts."""
    from huggingface_hub import HfApi

    from localhub.faults import Fault
    from localhub.process import start

    seeds = list(range(1, 2 + _HITS))
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as root, start(Path(root) / "hub", faults=True) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        for mode in ("classic", "mp"):
            hub.control.clear_faults()
            children.run(hub, f"dev.benchmarks.{mode}", "prepare", case=CASE, folder=mode, seeds=seeds)
            children.run(hub, "dev.benchmarks.indexed", "build", folder=mode)
            if delay_ms:
                hub.control.add_fault(Fault(delay_s=delay_ms / 1000))
            arguments = {"case": CASE, "folder": mode, "seeds": seeds, "misses": _MISSES}
            rows: dict[str, list[dict[str, Any]]] = {side: [] for side in ALL_SIDES}
            for _ in range(runs):
                for side in ALL_SIDES:
                    rows[side].append(children.run(hub, "dev.benchmarks.indexed", mode, side=side, **arguments))
            figures[mode] = {side: _median(rows[side]) for side in ALL_SIDES}
    return figures


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several runs: requests as the last one made them."""
    seconds = {
        name: statistics.median(value for row in rows for value in row[name])
        for name in ("hit_seconds", "miss_seconds")
    }
    return rows[-1] | seconds | {"others": statistics.median(row["others"] for row in rows)}


def _api_calls(requests: Mapping[str, int], prompts: int) -> float:
    """Calls of a prompt that count against the quota of the API. Access tokens last for long; `resolve` has its own quota."""
    return sum(count for name, count in requests.items() if name in HUB_ROUTES - _TOKENS - _RESOLVER) / prompts


def print_engines(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], delay_ms: float) -> list[Verdict]:
    """Print them."""
    verdicts = []
    for mode, sides in figures.items():
        print(f"{mode}, prompts of {CASE} that were not met before, {delay_ms:g} ms a request")
        for side, row in sides.items():
            print(
                f"  {side:9} miss {1000 * row['miss_seconds']:7.2f} ms, {_api_calls(row['miss_requests'], row['misses']):.1f} "
                f"calls   hit {1000 * row['hit_seconds']:7.1f} ms, {_api_calls(row['hit_requests'], row['hits']):.1f} calls"
                f"   other work {row['others']:.1f} cores"
            )
        print(flush=True)
        ours, theirs = sides[INDEXED], sides["built-in"]
        verdicts += [
            Verdict(f"{mode} miss, calls", _api_calls(ours["miss_requests"], ours["misses"]), 0, ""),
            Verdict(f"{mode} miss, milliseconds", 1000 * ours["miss_seconds"], 2.0, "ms"),
            Verdict(f"{mode} hit, against the built-in", ours["hit_seconds"] / theirs["hit_seconds"], 0.35),
        ]
    return verdicts


def fleet(nodes: int, share: float, side: str, calls: Mapping[str, float]) -> dict[str, float]:
    """Calls to the API in one window of the Hub's.

    Args:
        nodes: Each gets a prompt of 16 chunks a second.
        share: Of prompts that are in the bucket, as far as 16 chunks; what is not is put afterwards.
        side: Whose calls.
        calls: Of a hit, a miss and a put.
    """
    chance = random.Random(7)
    counts: dict[str, float] = {"lookups and gets": 0.0, "puts": 0.0, "refreshes": 0.0, "journals": 0.0}
    entries = [0] * nodes
    dirty = [False] * nodes
    for second in range(WINDOW_SECS):
        for node in range(nodes):
            if chance.random() < share:
                counts["lookups and gets"] += calls["hit"]
            else:
                counts["lookups and gets"] += calls["miss"]
                counts["puts"] += calls["put"]
                entries[node] += _CHUNKS
                dirty[node] = True
            if side != INDEXED:
                continue
            # As many as there are at the end of a builder's interval: the most that a listing shows.
            grown = entries[node] / (second + 1) * _SNAPSHOT_SECS
            pages = 1 + nodes * -(-grown // _JOURNAL_ENTRIES) // 1000
            if (second + node) % max(_JOURNAL_SECS, round(_SHARE_SECS * nodes)) == 0 and dirty[node]:
                counts["journals"] += 1
                dirty[node] = False
            if (second + node) % max(_REFRESH_SECS, round(_SHARE_SECS * nodes * pages)) == 0:
                counts["refreshes"] += pages
    return counts


def print_fleet(nodes: int, figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print them."""
    quotas = ", ".join(f"{name} {calls:,}" for name, calls in QUOTAS.items())
    print(
        f"fleet of {nodes} nodes, a prompt of {_CHUNKS} chunks a second each: API calls in 5 minutes. Quotas: {quotas}"
    )
    for share, sides in figures.items():
        for side, counts in sides.items():
            total = sum(counts.values())
            parts = ", ".join(f"{name} {count:,.0f}" for name, count in counts.items() if count)
            within = [name for name, quota in QUOTAS.items() if total <= quota]
            over = f"within {within[0]}" if within else f"{total / QUOTAS['Enterprise']:.1f} x Enterprise"
            print(f"  {share} hits  {side:9} {total:9,.0f}  {over:18} {parts}")
    print(flush=True)


def _measured(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Calls of a prompt, as the engines made them; of puts, as written."""
    return {
        side: _AS_WRITTEN[side]
        | {
            what: _api_calls(row[f"{what}_requests"], row["hits" if what == "hit" else "misses"])
            for what in ("hit", "miss")
        }
        for side, row in figures.items()
    }


def main() -> int:
    """Run the parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--delay-ms", type=float, default=40.0, help="added to each request")
    parser.add_argument("--runs", type=int, default=3, help="runs of each engine and side")
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--only", choices=("table", "engine", "fleet"), help="one part alone")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        print(json.dumps(table(options.keys)))
        return 0
    figures: dict[str, Any] = {}
    verdicts: list[Verdict] = []
    if options.only in {None, "table"}:
        command = [sys.executable, __file__, "--in-this-process", "--keys", str(options.keys)]
        figures["table"] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        verdicts += print_table(figures["table"])
    if options.only in {None, "engine"}:
        figures["engine"] = engines(options.delay_ms, options.runs)
        verdicts += print_engines(figures["engine"], options.delay_ms)
    if options.only in {None, "fleet"}:
        calls = _measured(figures["engine"]["classic"]) if "engine" in figures else _AS_WRITTEN
        figures["fleet"] = {
            f"{share:.0%}": {side: fleet(options.nodes, share, side, calls[side]) for side in ALL_SIDES}
            for share in (1.0, 0.98, 0.9)
        }
        print_fleet(options.nodes, figures["fleet"])
    print_verdicts(verdicts, "the index against its bounds and the built-in")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
