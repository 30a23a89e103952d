"""What an outage of the Hub or of the store costs an engine, with LMCache's built-in backend and with ours.

    python benchmarks/outage.py [--hang-secs 40] [--only TEXT] [--json FILE]

A real classic engine with `blocking_timeout_secs: 5` and every other setting at its default, 16 chunks of 512 KiB a prompt,
each side in a process of its own with an empty HF_HOME. From the start of the outage on, five lookups + retrieves in a row,
of a prompt each; then one a second until a prompt is found, hit and identical again.

The outage lasts `--hang-secs`, and at least until the five are done; but not where `paths-info` hangs: there the built-in
backend's first lookup lasts as long as the hang does, and the five only end after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from benchmarks import children  # noqa: E402 - the path comes first
from benchmarks.cases import BUCKET, SIDES  # noqa: E402
from benchmarks.outage_engine import BLOCKING_SECS, IN_A_ROW, OUTAGES  # noqa: E402
from benchmarks.tables import Verdict, print_verdicts  # noqa: E402

_DEADLINES_SECS = 1.0 + 0.9 * BLOCKING_SECS
"""Of a lookup (`lookup_timeout_secs`) and of a get (`get_timeout_secs`: 90 % of LMCache's own)."""

_BACK_SECS = 30.0


def print_outage(name: str, sides: dict[str, dict[str, Any]]) -> None:
    """Print what both sides took."""
    print(name)
    for side, result in sides.items():
        each = "  ".join(f"{one['lookup']:.1f} + {one['retrieve']:.1f}" for one in result["row"])
        back = "never" if result["recovered"] is None else f"{result['recovered']:.1f} s after its end"
        print(f"  {side:9} lookup + retrieve, s: {each}")
        print(
            f"  {side:9} five in {result['took']:.1f} s; the outage lasted {result['lasted']:.1f} s; full service {back}"
        )
    print(flush=True)


def judge(name: str, result: dict[str, Any]) -> list[Verdict]:
    """Ours against its bounds."""
    slowest = max(one["lookup"] + one["retrieve"] for one in result["row"] + result["later"])
    back = float("inf") if result["recovered"] is None else result["recovered"]
    return [
        Verdict(f"{name}: slowest request", slowest, _DEADLINES_SECS, "s"),
        Verdict(f"{name}: five in a row", result["took"], 3 * _DEADLINES_SECS, "s"),
        Verdict(f"{name}: full service after", back, _BACK_SECS, "s"),
    ]


def main() -> None:
    """Run both sides through every outage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hang-secs", type=float, default=40.0, help="how long an outage lasts")
    parser.add_argument("--only", action="append", help="outages whose name holds this")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()

    from huggingface_hub import HfApi

    from localhub.process import start

    chosen = [name for name in OUTAGES if not options.only or any(text in name for text in options.only)]
    if not chosen:
        parser.error(f"no outage has such a name; there are: {'; '.join(OUTAGES)}")
    figures: dict[str, dict[str, Any]] = {}
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory() as root, start(Path(root) / "hub", faults=True) as hub:
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        children.run(hub, "benchmarks.outage_engine", "fill", folder="outage")
        for name in chosen:
            arguments = {"outage": name, "folder": "outage", "secs": options.hang_secs}
            figures[name] = {
                side: children.run(
                    hub,
                    "benchmarks.outage_engine",
                    "go_through",
                    side=side,
                    unbounded=name == "paths-info hangs",
                    **arguments,
                )
                for side in SIDES
            }
            print_outage(name, figures[name])
            verdicts += judge(name, figures[name]["ours"])
    if (hang := figures.get("paths-info hangs")) is not None:
        first = hang["built-in"]["row"][0]["lookup"]
        print(
            f"The built-in's first lookup blocked its engine for {first:.0f} s of a hang of {options.hang_secs:g} s: it has no "
            f"deadline, so a hang of 125 s blocks it for 125 s (--hang-secs 125).\n"
        )
    print_verdicts(
        verdicts, f"ours against its bounds: a request has {_DEADLINES_SECS:g} s, {IN_A_ROW} in a row three times that"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
