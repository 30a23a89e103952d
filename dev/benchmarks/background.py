"""Calls to the Hub that no request asked for, of a fleet: measured of some real processes, and added up.

    python dev/benchmarks/background.py [--fleet 1000] [--processes 3] [--windows 18] [--speed 30] [--json FILE]

Each process is a real L2 adapter with the default settings, which loads, looks up and stores all the time, on a local Hub whose
bucket has the journals of a fleet. Its clockwork runs `--speed` times as fast: every interval of the defaults, the Hub's window and
the lifetime of its tokens are divided by it. Calls are classified by the thread that makes them: what lookups, loads and stores ask for
is not counted, except for their tokens. `index: off` and `index: snapshot` are measured one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dev.benchmarks import children  # noqa: E402 - the path comes first
from dev.benchmarks.tables import Verdict, print_verdicts  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localhub.process import RunningHub

BUCKET: Final = "bench/background"
FOLDER: Final = "v1"
WINDOW_SECS: Final = 300.0
TOKEN_SECS: Final = 3600.0
_MARGIN_SECS: Final = 60.0
"""Before its end a token is replaced, see `hfbucket_plugin.hub.xet_session`: not divided by the speed, so the lifetime is longer by it."""

MOST_CALLS: Final = 2_500
"""Calls of a PRO account in 5 minutes, as the Hub documents them."""

MODES: Final = ("off", "snapshot")
_CHUNKS: Final = 16
_BACKGROUND: Final = {
    "hfbucket-index-refresh": "refreshes",
    "hfbucket-index-journal": "journals",
    "hfbucket-index-last": "journals",
    "hfbucket-fingerprint": "fingerprints",
    "hfbucket-usage": "listings",
    "hfbucket-probe": "probes",
    "hfbucket-bad": "records",
}
_INTERVALS: Final = ("index_refresh_secs", "index_journal_secs", "heat_secs", "fingerprint_refresh_secs")


def kind_of(thread: str, route: str) -> str:
    """What a call is for; empty where a lookup, a load or a store asked for it.

    Args:
        thread: The name of the thread that makes it.
        route: See `HubClient.request`.
    """
    if route.endswith("-token"):
        return "tokens"
    return next((kind for start, kind in _BACKGROUND.items() if thread.startswith(start)), "")


def child(mode: str, endpoint: str, speed: float, windows: float, seed: int) -> dict[str, Any]:
    """A process: serves for N windows, and returns the calls that it made."""
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.hub import client
    from hfbucket_plugin.index import refresh
    from hfbucket_plugin.index.access import recorder
    from tests.support.lmcache_mp import MP
    from tests.support.surface import Limits

    calls: Counter[str] = Counter()
    request = client.HubClient.request

    def counted(self: client.HubClient, method: str, url: str, *, route: str, **more: Any) -> Any:
        calls[kind_of(threading.current_thread().name, route)] += 1
        return request(self, method, url, route=route, **more)

    client.HubClient.request = counted  # type: ignore[method-assign, assignment] # with what it is called with here
    refresh._WINDOW_SECS /= speed  # type: ignore[misc] # noqa: SLF001 - the clockwork of this process
    recorder._SIGN_SECS /= speed  # type: ignore[misc] # noqa: SLF001 - the same
    fields = InstanceSettings.model_fields
    values = {name: fields[name].default / speed for name in _INTERVALS}
    values |= {"fingerprint": fields["fingerprint"].default, "index": mode}
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        made = MP(
            f"hfbucket.{mode}{seed}",
            Path(directory),
            handle=f"hf://buckets/{BUCKET}/{FOLDER}",
            endpoint=endpoint,
            limits=Limits(lookup=20, get=20, put=60),
            **values,
        )
        started = dict(calls)
        until, number = 0.0, 0
        while not until or time.monotonic() < until:
            made.retrieve([chance.randrange(_CHUNKS) for _ in range(4)])
            if number % 10 == 0:
                made.put([_CHUNKS + seed * 1_000_000 + number])
            number += 1
            state = made.adapter.report_status()["index"] if mode != "off" else {"state": "usable"}
            if not until and state["state"] == "usable" and number >= _CHUNKS:
                started, until = dict(calls), time.monotonic() + windows * WINDOW_SECS / speed
            time.sleep(1 / speed)
        reported = Counter(calls)
        made.close()
    reported.subtract(started)
    asked, _ = reported.pop("", 0), started.pop("", 0)
    return {"start": started, "calls": {kind: count for kind, count in reported.items() if count}, "asked": asked}


def prepare(fleet: int, seconds: float = 60.0) -> dict[str, Any]:
    """Fill the bucket: chunks, a snapshot, and a journal of puts and one of hits of each process of the fleet."""
    from datetime import UTC, datetime

    from dev.benchmarks.indexed import build_at
    from hfbucket_plugin.config.settings import load
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.telemetry import MemorySink
    from hfbucket_plugin.hub.connect import open_bucket
    from hfbucket_plugin.hub.transfer import Upload
    from hfbucket_plugin.index.access.recorder import Hits
    from hfbucket_plugin.index.journal import JournalWriter
    from hfbucket_plugin.index.store import JOURNALS, JournalName
    from tests.support.lmcache_mp import MP
    from tests.support.surface import Limits

    handle = f"hf://buckets/{BUCKET}/{FOLDER}"
    settings = load({"remote_storage_plugin.hfbucket.bucket_handle": handle}, "hfbucket")
    with tempfile.TemporaryDirectory() as directory:
        writer = MP(
            "hfbucket.writer", Path(directory), handle=handle, endpoint=settings.endpoint,
            limits=Limits(lookup=20, get=20, put=60),
        )  # fmt: skip
        writer.put(range(_CHUNKS))
        writer.close()
    build_at(handle)
    bucket, deadline = open_bucket(settings, "hfbucket", MemorySink(), seconds), Deadline.after(10 * seconds)
    files = {}
    for hits in (False, True):
        journal = JournalWriter(10, 10, hits=hits)
        if hits:
            journal.tell([Hits(b"x" * 16, 1, 0.0)], time.time())
        else:
            journal.note(b"x" * 16, None, 0.0)
        draft = journal.draft(0.0)
        if draft is None:
            raise RuntimeError("no journal was made")
        (content,) = bucket.transfer.upload([draft.data], deadline, Upload())
        for _ in range(fleet):
            name = JournalName.make(random.randbytes(8).hex(), 1, datetime.now(UTC), hits=hits)
            files[bucket.handle.join(f"{JOURNALS}/{name.text}")] = content
    failed = bucket.add(files, deadline)
    bucket.close()
    return {"journals": len(files) - len(failed)}


def measure(hub: RunningHub, mode: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What some processes did, side by side."""
    with ThreadPoolExecutor(options.processes) as pool:
        return list(
            pool.map(
                lambda seed: children.run(
                    hub, "dev.benchmarks.background", "child", mode=mode, endpoint=hub.endpoint, speed=options.speed,
                    windows=options.windows, seed=seed,
                ),
                range(options.processes),
            )
        )  # fmt: skip


def added_up(rows: list[dict[str, Any]], fleet: int, windows: float) -> dict[str, Any]:
    """Calls of a fleet in a window, by kind; and those that a start costs, once.

    Args:
        rows: Of the processes that were measured.
        fleet: How many processes there are.
        windows: How long these were.
    """
    reported: Counter[str] = Counter()
    start: Counter[str] = Counter()
    for row in rows:
        reported.update(row["calls"])
        start.update(row["start"])
    calls = {kind: math.ceil(count * fleet / len(rows) / windows) for kind, count in sorted(reported.items())}
    return {"calls": calls, "total": sum(calls.values()), "start": {k: n / len(rows) for k, n in sorted(start.items())}}


def print_sums(fleet: int, figures: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Print them."""
    print(f"calls to the Hub in 5 minutes that no request asked for, of {fleet:,} processes with default settings")
    for mode, found in figures.items():
        parts = ", ".join(f"{kind} {count:,}" for kind, count in found["calls"].items())
        start = ", ".join(f"{kind} {count:.1f}" for kind, count in found["start"].items())
        print(f"  index: {mode:9} {found['total']:6,}   {parts or 'none'}   (at the start of a process: {start})")
    print(flush=True)
    return [Verdict(f"index: {mode}, calls", found["total"], MOST_CALLS, "") for mode, found in figures.items()]


def main() -> int:
    """Measure, and print the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--windows", type=float, default=18.0, help="of 5 minutes, that are measured")
    parser.add_argument("--speed", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    from huggingface_hub import HfApi

    from localhub.process import start

    figures = {}
    with (
        tempfile.TemporaryDirectory() as root,
        start(
            Path(root) / "hub", faults=True, cas_token_ttl_s=(TOKEN_SECS - _MARGIN_SECS) / options.speed + _MARGIN_SECS
        ) as hub,
    ):
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        children.run(hub, "dev.benchmarks.background", "prepare", fleet=options.fleet)
        for mode in MODES:
            figures[mode] = added_up(measure(hub, mode, options), options.fleet, options.windows)
    print_verdicts(print_sums(options.fleet, figures), "calls of the fleet against the quota")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(any(found["total"] > MOST_CALLS for found in figures.values()))


if __name__ == "__main__":
    if sys.argv[1:2] in (["child"], ["prepare"]):
        children.serve({"child": child, "prepare": prepare})
    else:
        sys.exit(main())
