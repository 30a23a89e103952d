"""Listing, filtering and planning a million keys, without a Hub: how fast, and in how much memory of the driver.

    python dev/benchmarks/plan.py [--keys 1000000] [--json FILE]

Pages are made up as the Hub would send them, 1000 records of JSON each, and go through the product's own way from there:
records, keys, filters, order, plan file, and the plan read back as nodes are given it. Making the pages up costs time that
a Hub would spend elsewhere; it is measured apart and subtracted. Seconds are of the processor, and each case runs in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

MODEL = "meta-llama/Llama-3.1-70B-Instruct"
WORKERS = 8
PAGE = 1000
PREFIX = "prod"
LIMIT_MB = 400
NOW = datetime(2026, 1, 10, tzinfo=UTC)

CASES: dict[str, dict[str, Any]] = {
    "all": {"all": True},
    "model, world size, workers": {"model": MODEL, "world_size": WORKERS, "workers": "0-3"},
    "globs and since": {"all": True, "include": "*@bfloat16", "exclude": "*@7@*", "since": "12h"},
    "newest 100,000": {"all": True, "newest": 100_000},
    "max-bytes of 90 %": {"all": True, "max_bytes": "0"},
    "keys-from, every key": {"keys_from": "keys"},
}


def pages(keys: int, prefix: str) -> Iterator[list[dict[str, Any]]]:
    """What the Hub would list below a prefix of keys, page by page."""
    from hfbucket_plugin.core.keys import encode_name

    head = encode_name(prefix)
    each = -(-keys // WORKERS)
    page: list[str] = []
    for worker in range(WORKERS):
        name = encode_name(f"{MODEL}@{WORKERS}@{worker}@")
        if not (name.startswith(head) or head.startswith(name)):
            continue
        for number in range(each):
            mixed = (number * 2654435761 + worker) & 0xFFFFFFFF
            at = NOW - timedelta(seconds=mixed % 86400, microseconds=mixed % 1_000_000)
            page.append(
                f'{{"type":"file","path":"{PREFIX}/{name}{number:016x}%40bfloat16","size":{2**20 + mixed % 1000},'
                f'"xetHash":"{mixed:064x}","uploadedAt":"{at.isoformat()}"}}'
            )
            if len(page) == PAGE:
                yield json.loads(f"[{','.join(page)}]")
                page = []
    if page:
        yield json.loads(f"[{','.join(page)}]")


class MadeUpBucket:
    """A bucket that lists and looks up what it makes up."""

    def __init__(self, keys: int) -> None:
        from hfbucket_plugin.core.keys import BucketHandle

        self.keys = keys
        self.handle = BucketHandle("org", "bucket", PREFIX)
        self._in_progress: dict[str, Iterator[list[dict[str, Any]]]] = {}

    def info(self, _deadline: Any) -> dict[str, Any]:
        """Says nothing of how much there is, so that parts are listed as they were chosen."""
        return {}

    def list_page(self, path: str, cursor: str | None, _deadline: Any) -> tuple[list[Any], str | None]:
        """One page of what lies below a path."""
        from hfbucket_plugin.core.keys import decode_name
        from hfbucket_plugin.hub import bucket

        if cursor is None:
            self._in_progress[path] = pages(self.keys, decode_name(path.removeprefix(f"{PREFIX}/")))
        page = next(self._in_progress[path], None)
        if page is None:
            return [], None
        return [bucket._object_info(item, "tree") for item in page], str(int(cursor or 0) + 1)  # noqa: SLF001 - the very reading

    def stat(self, paths: list[str], _deadline: Any) -> dict[str, Any]:
        """Look paths up."""
        from hfbucket_plugin.core.keys import ContentId
        from hfbucket_plugin.hub.bucket import ObjectInfo

        return {path: ObjectInfo(path, ContentId("ab" * 32, 2**20), NOW) for path in paths}


def measure(case: str, keys: int) -> dict[str, Any]:
    """Run one case here."""
    from hfbucket_plugin.core.keys import ClassicKey
    from hfbucket_plugin.tools.selection import Selection
    from warmer.plan.build import PlanBuilder
    from warmer.plan.plan_file import WarmPlanFile

    given = dict(CASES[case])
    with tempfile.TemporaryDirectory() as directory:
        if "keys_from" in given:
            given["keys_from"] = Path(directory) / "keys"
            with given["keys_from"].open("w") as out:
                out.writelines(f"{MODEL}@{WORKERS}@0@{number:016x}@bfloat16\n" for number in range(keys))
        if "max_bytes" in given:
            given["max_bytes"] = keys * 2**20 * 9 // 10
        choosing = PlanBuilder(Selection(**given), ClassicKey, NOW)
        bucket: Any = MadeUpBucket(keys)
        started = time.process_time()
        listed = 0
        if "keys_from" not in given:
            listed = sum(len(page) for prefix in choosing.listed(ClassicKey) for page in pages(keys, prefix))
        making = time.process_time() - started
        started = time.process_time()
        plan = WarmPlanFile.write(Path(directory) / "plan", choosing.planned(bucket, Path(directory) / "scratch"))
        planning = time.process_time() - started - making
        started = time.process_time()
        opened = WarmPlanFile.open(Path(directory) / "plan")
        read = sum(len(opened.segment(index)) for index in range(opened.segments))
        reading = time.process_time() - started
    assert read == plan.chunks  # noqa: S101 - a benchmark of something wrong is worth nothing
    return {
        "case": case,
        "listed": listed or keys,
        "planned": plan.chunks,
        "seconds": round(planning, 2),
        "keys_per_second": round((listed or keys) / planning),
        "read_back_seconds": round(reading, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.keys)))
        return
    rows = []
    print(f"{'case':28} {'listed':>9} {'planned':>9} {'seconds':>8} {'keys/s':>8} {'read back':>9} {'peak':>7}")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--keys", str(options.keys)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        print(
            f"{case:28} {row['listed']:9,} {row['planned']:9,} {row['seconds']:8} {row['keys_per_second']:8,} "
            f"{row['read_back_seconds']:7} s {row['peak_mb']:4} MB",
            flush=True,
        )
    worst = max(row["peak_mb"] for row in rows)
    print(f"peak memory {worst} MB, limit {LIMIT_MB} MB: {'kept' if worst < LIMIT_MB else 'BROKEN'}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.exit(0 if worst < LIMIT_MB else 1)


if __name__ == "__main__":
    main()
