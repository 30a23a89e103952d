"""Planning an export of a large bucket: seconds and memory, on made-up chunks and no network.

    python dev/benchmarks/export_plan.py [--chunks 1000000] [--json FILE]

Each case runs in a process of its own. Printed for each: seconds to plan, seconds to read the plan back as `apply` does, and
the growth of peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hfbucket_plugin.core.keys import ContentId, parse_key
from hfbucket_plugin.hub.listing import ChunkEntry
from hfbucket_plugin.tools.selection import Selection
from jobs.export.plan import EndpointRef, ExportHeader, ExportPlanFile, ExportPlanWriter, OnConflict, Renames
from jobs.export.planning import ExportPlanning, WantedChunks

if TYPE_CHECKING:
    from collections.abc import Iterator

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CHUNK_BYTES = 32 * 1024 * 1024
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all": ([], {}),
    "renamed": (["org/model@=org/other@"], {}),
    "the newest half": ([], {"newest": 0}),
}


class Source:
    """A bucket of made-up chunks."""

    name = "source"

    def __init__(self, count: int) -> None:
        self._count = count

    def entries(self, _selection: Selection, _skipped: object) -> Iterator[ChunkEntry]:
        """As a listing gives them."""
        for number in range(self._count):
            key = f"org/model@8@{number % 8}@{number:016x}@bfloat16"
            content = ContentId(f"{number:064x}", CHUNK_BYTES)
            yield ChunkEntry(key, parse_key(key), content, NOW - timedelta(seconds=number))


class Destination:
    """A bucket that holds nothing."""

    name = "destination"

    def look_up(self, _keys: object, _deadline: object) -> dict[str, Any]:
        """Nothing."""
        return {}


def measure(case: str, count: int) -> dict[str, float]:
    """One case, in this process."""
    rules, selection = CASES[case]
    wanted = WantedChunks(Selection.model_validate(selection | ({"newest": count // 2} if selection else {})), NOW)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_mib()
    with tempfile.TemporaryDirectory() as name:
        places = [EndpointRef(one, f"hf://buckets/org/{one}") for one in ("us", "eu")]
        header = ExportHeader(places[0], places[1], NOW, "auto", Renames.parse(rules))
        path, started = Path(name, "plan.jsonl"), time.perf_counter()
        with ExportPlanWriter(path, header) as writer:
            source, destination = Source(count), Destination()
            planning = ExportPlanning(
                header,
                source,  # type: ignore[arg-type]
                destination,  # type: ignore[arg-type]
                on_conflict=OnConflict.SKIP,
                writer=writer,
                tick=lambda: None,
            )
            planning.run(wanted, Path(name, "order"))
        planned = time.perf_counter()
        ExportPlanFile.open(path)
        read = time.perf_counter()
    return {"plan": planned - started, "read": read - planned, "memory_mib": peak_mib() - before}


def peak_mib() -> float:
    """The largest memory of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.chunks)))
        return
    print(f"{'case':18} {'plan s':>8} {'read s':>8} {'MiB more':>9}")
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--chunks", str(options.chunks)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[case] = found = json.loads(done.stdout)
        print(f"{case:18} {found['plan']:8.1f} {found['read']:8.1f} {found['memory_mib']:9.1f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
