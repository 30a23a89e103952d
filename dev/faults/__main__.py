"""The fault matrix: every fault, operation and surface; the table goes into docs/reliability.md.

    python -m dev.faults [--workers 4] [--only SURFACE[/FAULT[/OPERATION]]]… [--dry-run] [--json FILE]

Exits 0 only if every trial kept its promise. With `--only` nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from dev.faults.matrix import tables, trials
from dev.faults.report import PAGE, breaches, parts, timing
from dev.faults.workers import make_all
from dev.generated import write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dev.faults.trial import Report, Trial


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="processes, each with a Hub of its own")
    parser.add_argument("--only", action="append", default=[], help="SURFACE[/FAULT[/OPERATION]]")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and make none")
    parser.add_argument("--json", type=Path, help="write the reports there")
    options = parser.parse_args()
    wanted = [trial for trial in trials() if _is_wanted(trial, options.only)]
    if options.dry_run:
        print("\n".join(map(str, wanted)))
        return 0
    began = time.monotonic()
    done = 0

    def tell(report: Report) -> None:
        nonlocal done
        done += 1
        trial = report.trial
        where = f"{trial.surface} {trial.operation} {trial.fault} on {trial.route} ({trial.verify})"
        broken = breaches(report)
        for breach in broken:
            print(f"  ✗ {where}: {breach}", flush=True)
        if not broken and not done % 20:
            print(f"{done} of {len(wanted)} trials, {time.monotonic() - began:.0f} s", flush=True)

    reports = make_all(wanted, options.workers, tell)
    reports, again = _again_alone(reports, tell)
    if options.json:
        options.json.write_text(json.dumps([report.record() for report in reports], indent=1))
    return _end(reports, again, time.monotonic() - began, write_page=not options.only)


def _is_wanted(trial: Trial, only: Sequence[str]) -> bool:
    parts = (trial.surface, trial.fault, trial.operation)
    return not only or any(tuple(one.split("/")) == parts[: one.count("/") + 1] for one in only)


def _again_alone(reports: list[Report], tell: Callable[[Report], None]) -> tuple[list[Report], int]:
    """Make those trials again, one by one, that broke nothing but a time: the others beside them may have been to blame."""
    late = [report for report in reports if timing(report) and breaches(report) == timing(report)]
    if not late:
        return reports, 0
    print(f"{len(late)} trials missed nothing but a time; they are made again, alone")
    kept = [report for report in reports if report not in late]
    return kept + make_all([report.trial for report in late], 1, tell), len(late)


def _end(reports: Sequence[Report], again: int, seconds: float, *, write_page: bool) -> int:
    broken = [report for report in reports if breaches(report)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("lmcache", "huggingface_hub", "hf_xet"))
    calls = sum(len(report.calls) for report in reports)
    summary = (
        f"{len(reports)} trials with {calls} calls under a fault, in {seconds:.0f} s on {os.cpu_count()} cores; "
        f"Python {platform.python_version()}, {versions}. "
        + (f"{len(broken)} trials broke a promise." if broken else "Every promise was kept.")
        + (f" {again} trials were made again alone, since a time was missed beside others." if again else "")
    )
    text = f"{summary}\n\n{tables(reports)}"
    print(text)
    if write_page:
        write(PAGE, parts() | {"measured": text})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
