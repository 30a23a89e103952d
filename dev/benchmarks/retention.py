"""Planning the retention of a large bucket: seconds and memory, on made-up entries and no network.

    python dev/benchmarks/retention.py [--objects 1000000] [--json FILE]

Each case runs in a process of its own. Printed for each: seconds, entries a second, the growth of peak memory over the
decisions, and how many objects were planned for deletion.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hfbucket_plugin.tools.inventory import RetentionEntry
from jobs.retention.order import decide
from jobs.retention.policy import from_values

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CHUNK_BYTES = 32 * 1024 * 1024
CASES = {
    "age only": {"max_age": "14d"},
    "age, rules, models": {
        "max_age": "14d",
        "models": {"keep": ["org/model-0", "org/model-1", "org/model-2"]},
        "rules": [{"prefix": "org/model-1@8@", "max_age": "3d"}, {"model": "org/model-2", "max_age": "30d"}],
    },
    "budget": {"max_bytes": 20_000_000_000_000},
    "budgets, shields": {
        "max_objects": 700_000,
        "keep_newest": 100_000,
        "keep_prefix": ["org/model-0@8@0@"],
        "rules": [{"model": "org/model-1", "max_bytes": "5TiB"}, {"model": "org/model-2", "keep_newest": 1000}],
    },
}


def entries(count: int) -> Iterator[RetentionEntry]:
    """As a listing gives them: by key, and so in no order of age."""
    dice = random.Random(7)
    hashes = [f"{dice.getrandbits(256):064x}" for _ in range(997)]
    for number in range(count):
        key = f"org/model-{number * 4 // count}@8@{number % 8}@{dice.getrandbits(64):016x}@bfloat16"
        age = timedelta(seconds=dice.randrange(30 * 86400), microseconds=dice.randrange(1_000_000))
        yield RetentionEntry(key, hashes[number % 997], CHUNK_BYTES, NOW - age)


def measure(case: str, count: int) -> dict[str, float]:
    """One case, in this process."""
    policy = from_values(CASES[case], case)
    for _ in decide(policy, entries(1000), NOW):  # everything imported and warm
        pass
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    deleted = sum(decision.delete for decision in decide(policy, entries(count), NOW))
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"seconds": seconds, "peak_growth_mib": grown, "deleted": deleted, "objects": count}


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.objects)))
        return
    print(f"{'case':20} {'seconds':>8} {'entries/s':>10} {'MiB more':>9} {'deleted':>9}")
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--objects", str(options.objects)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[case] = found = json.loads(done.stdout)
        rate = found["objects"] / found["seconds"]
        print(f"{case:20} {found['seconds']:8.1f} {rate:10,.0f} {found['peak_growth_mib']:9.1f} {found['deleted']:9,}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
