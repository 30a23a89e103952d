"""The online path against LMCache's built-in backends: lookups, gets and puts, classic and MP mode, 40 ms a request.

    python dev/benchmarks/online.py [--runs 3] [--only TEXT] [--delay-ms 40] [--json FILE]

Classic: a real engine. MP mode: the L2 adapter, driven as the controllers of `lmcache server` drive it. Both sides use one
local Hub, each run in a process of its own, with an empty HF_HOME and fresh connections. For gets, *cold* knows nothing
yet, and *hot* asks again for the same batch, all of its bytes included, once the engine's memory is empty. For puts, *cold*
is the first of a process and *hot* the next one, of another batch; each lasts until the bucket lists every chunk. Bytes
that were read are compared.

Printed: median seconds; the largest peak of memory beyond what the process held before, the engine's own touched already;
the lateness of a 1 ms heartbeat on the engine's event loop; requests by route, as the Hub counts them; and how many cores
other work took on the machine. At the end, every ratio against its target.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dev.benchmarks import children  # noqa: E402 - the path comes first
from dev.benchmarks.cases import BUCKET, CASES, SIDES  # noqa: E402
from dev.benchmarks.tables import Verdict, print_scenario, print_verdicts, summarise  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dev.benchmarks.tables import Row
    from localhub.faults import Fault
    from localhub.process import RunningHub

Mode = Literal["classic", "mp"]
Action = Literal["get", "put"]

_GET_MEMORY_MIB = 96
"""`max_inflight_bytes` and 32 MiB: what docs/operate.md says that reads take at most."""

_LARGER_PUT = 1.25
"""Memory of a put of twice as many chunks: it follows the commits, not the batch."""


@dataclass(frozen=True)
class Scenario:
    """One batch in one mode.

    Attributes:
        mode: Which engine.
        action: What it does.
        case: The batch's name.
        target: Most that our seconds may be of the built-in's, cold.
        hot_target: The same, hot; None where nothing is asked of it.
        sides: Who is measured.
    """

    mode: Mode
    action: Action
    case: str
    target: float | None
    hot_target: float | None = None
    sides: tuple[str, ...] = SIDES

    @property
    def name(self) -> str:
        """As `--only` finds it."""
        return f"{self.mode} {self.action} {self.case}"


def scenarios() -> Iterator[Scenario]:
    """All of them, in the order in which they run."""
    for mode in ("classic", "mp"):
        yield Scenario(mode, "get", "16 x 512 KiB", 0.45, 0.40)
        yield Scenario(mode, "get", "16 x 4 MiB", 0.55)
        yield Scenario(mode, "get", "8 x 32 MiB", 0.65)
        yield Scenario(mode, "get", "1 x 32 MiB", 1.0)
        for case in ("16 x 512 KiB", "16 x 4 MiB", "8 x 32 MiB"):
            yield Scenario(mode, "put", case, 1.0, 1.0)
        for case in ("32 x 32 MiB", "64 x 32 MiB"):
            yield Scenario(mode, "put", case, None, sides=("ours",))


def measure(hub: RunningHub, scenario: Scenario, runs: int, delay: Fault | None) -> dict[str, Row]:
    """Run every side, alternating."""
    module = f"dev.benchmarks.{scenario.mode}"
    folder = scenario.name.replace(" ", "-")
    hub.control.clear_faults()
    if scenario.action == "get":
        children.run(hub, module, "prepare", case=scenario.case, folder=folder, seeds=[7])
    if delay is not None:
        hub.control.add_fault(delay)
    rows: dict[str, list[Row]] = {side: [] for side in scenario.sides}
    for number in range(runs):
        for place, side in enumerate(scenario.sides):
            arguments: dict[str, Any] = {"side": side, "case": scenario.case, "folder": folder, "seed": 7}
            if scenario.action == "put":  # each of bytes that the Hub has not seen, into a place of its own
                arguments |= {
                    "folder": f"{folder}-{side}-{number}",
                    "seed": 1000 + 10 * (number * len(SIDES) + place),
                    "again": len(scenario.sides) > 1,
                }
            rows[side].append(children.run(hub, module, scenario.action, **arguments))
    return {side: summarise(rows[side]) for side in scenario.sides}


def judge(scenario: Scenario, figures: Mapping[str, Mapping[str, Row]]) -> Iterator[Verdict]:
    """The figures of a scenario that have targets."""
    ours = figures[scenario.name]["ours"]
    if scenario.target is not None:
        theirs = figures[scenario.name]["built-in"]
        yield Verdict(f"{scenario.name}, cold", ours["seconds"] / theirs["seconds"], scenario.target)
        if scenario.hot_target is not None:
            ratio = ours["hot_seconds"] / theirs["hot_seconds"]
            yield Verdict(f"{scenario.name}, hot", ratio, scenario.hot_target)
    if scenario.action == "get":
        yield Verdict(f"{scenario.name}, memory", ours["extra_mib"], _GET_MEMORY_MIB, "MiB")
    half = figures.get(f"{scenario.mode} put 32 x 32 MiB")
    if scenario.name.endswith("put 64 x 32 MiB") and half:  # 8 commits, and 4: in one alone not all of it has begun
        ratio = ours["extra_mib"] / half["ours"]["extra_mib"]
        yield Verdict(f"{scenario.mode} put, memory, 64 chunks to 32", ratio, _LARGER_PUT)


def main() -> None:
    """Run the scenarios and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side and scenario; medians are printed")
    parser.add_argument("--delay-ms", type=float, default=40.0, help="added to each request")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--only", action="append", help="scenarios whose name holds this, such as 'mp get' or '4 MiB'")
    options = parser.parse_args()

    from huggingface_hub import HfApi

    from localhub.faults import Fault
    from localhub.process import start

    # The benchmark's own listings are not delayed: they tell when a put is done.
    but_listings = r"^(?!/api/buckets/[^/]+/[^/]+/tree)"
    delay = Fault(delay_s=options.delay_ms / 1000, path_regex=but_listings) if options.delay_ms else None
    chosen = [one for one in scenarios() if not options.only or any(text in one.name for text in options.only)]
    if not chosen:
        parser.error(f"no scenario has such a name; there are: {'; '.join(one.name for one in scenarios())}")
    figures: dict[str, dict[str, Row]] = {}
    with tempfile.TemporaryDirectory() as root, start(Path(root) / "hub", faults=True) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        for scenario in chosen:
            figures[scenario.name] = measure(hub, scenario, options.runs, delay)
            chunk = CASES[scenario.case].chunk_bytes
            print_scenario(f"{scenario.name} ({chunk} bytes a chunk)", figures[scenario.name])
    verdicts = (verdict for scenario in chosen for verdict in judge(scenario, figures))
    print_verdicts(verdicts, "ours against the built-in, and bounds of our own")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
