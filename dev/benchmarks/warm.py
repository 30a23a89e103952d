"""Warming one node: the warmer against the stock client, and against LMCache's own bulk load; 40 ms a request.

    python dev/benchmarks/warm.py [--runs 3] [--only TEXT] [--sides stock,length] [--delay-ms 40] [--directory DIR] [--json FILE]

All sides take the same objects from one local Hub, one after the other, in every run:

- stock: `huggingface_hub.download_bucket_files`, told what to download, in a process of its own;
- load: a fresh LMCache engine that is told to `load-fs-chunks` from `plugin://hfbucket` into its memory;
- length, hash: `python -m warmer run` on a Ray cluster of one raylet, with `--verify length`, and with hashes;
- staged: the same as hash, and then the engine's `load-fs-chunks` of the directory: from the bucket into its memory.

No side's start of a process and of its imports is counted, and no listing: the stock client is timed from the call on, the
engine of `load` from the request on, and the warmer from when its actor's process is up (`start_secs` of its summary) to
the last chunk, so that opening the tier and asking for access count. *Started* is what the actor took until then, most of
it Ray's; *whole* is what the command took: Python, Ray, listing, planning, and the end of the actor.

Before each side what the last one wrote is on the disk and what it had in memory is the machine's again, also where a virtual
machine hands free memory back to its host and has to get it again: who came first would else find it there. Every run
checks that all chunks are there at their size, and the contents of some. Medians are printed, and all ratios against their targets.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from dev.benchmarks import children, warm_sides  # noqa: E402 - the path comes first
from dev.benchmarks.cases import BUCKET, CHUNK_TOKENS, MIB  # noqa: E402
from tests.support.ray_cluster import ray_cluster  # noqa: E402
from tests.support.waiting import free_ports  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from localhub.process import RunningHub
    from tests.support.ray_cluster import RayCluster

Row = dict[str, Any]

SIDES: Final = ("stock", "load", "length", "hash", "staged")
_SETTLING_SECS: Final = 10.0
"""Free memory is reported to the host of a virtual machine in rounds of two seconds."""

_LOOKED_INTO: Final = 16
"""The contents of one chunk in so many are compared with what was uploaded."""


@dataclass(frozen=True)
class Case:
    """Chunks of one size, and the model that makes them as large as they are.

    Attributes:
        name: As `--only` finds it.
        chunks: How many.
        layers: Of the model.
        hidden: Its KV heads times their size of 128.
        targets: Least that our rate may be of another side's: by our side and the other.
    """

    name: str
    chunks: int
    layers: int
    hidden: int
    targets: Mapping[tuple[str, str], float]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk: K and V, bfloat16."""
        return 2 * self.layers * CHUNK_TOKENS * self.hidden * 2

    @property
    def total_bytes(self) -> int:
        """Bytes of all chunks."""
        return self.chunks * self.chunk_bytes

    @property
    def folder(self) -> str:
        """The prefix in the bucket."""
        return self.name.replace(" ", "-")


CASES: Final = (
    Case(
        "512 x 1 MiB",
        512,
        4,
        256,
        {("length", "stock"): 2.5, ("hash", "stock"): 1.8, ("length", "load"): 2.5, ("hash", "load"): 2.5},
    ),
    Case(
        "64 x 32 MiB",
        64,
        32,
        1024,
        {("length", "stock"): 0.95, ("hash", "stock"): 0.6, ("length", "load"): 1.0, ("hash", "load"): 1.0},
    ),
)


@dataclass(frozen=True)
class Bench:
    """Where all sides run.

    Attributes:
        hub: The Hub.
        cluster: One raylet.
        directory: On the file system that is filled.
        environment: Of engines.
    """

    hub: RunningHub
    cluster: RayCluster
    directory: Path
    environment: Mapping[str, str]

    def measure(self, case: Case, side: str, digests: Mapping[int, str]) -> Row:
        """Let one side take all chunks of a case, and see whether it has them."""
        os.sync()
        time.sleep(_SETTLING_SECS)
        self.hub.control.reset_counters()
        with tempfile.TemporaryDirectory(dir=self.directory) as name, _elsewhere() as others:
            row = self._run(case, side, Path(name), digests)
        routes = self.hub.control.counters().routes
        return row | {"others": others[0], "requests": {route: one.requests for route, one in routes.items()}}

    def _run(self, case: Case, side: str, directory: Path, digests: Mapping[int, str]) -> Row:
        into = directory / "tier"
        into.mkdir()
        if side == "stock":
            done = children.run(self.hub, "dev.benchmarks.warm_sides", "stock", folder=case.folder, into=str(into))
            _expect(into, "{}", case, digests)
            return {"seconds": done["seconds"]}
        (port,) = free_ports(1)
        engine = warm_sides.Engine(case, directory, self.environment, port)
        if side == "load":
            with engine.running():
                return {"seconds": engine.load_bucket(case.folder)}
        verify = "length" if side == "length" else "hash"
        with contextlib.ExitStack() as stack:
            if side == "staged":
                stack.enter_context(engine.running())
            done = warm_sides.warmer(self.cluster, self.hub.endpoint, case.folder, into, "--verify", verify)
            _expect(into, "{}.data", case, digests)
            started = done["nodes"][0]["start_secs"]
            row = {"seconds": done["seconds"] - started, "started": started, "whole": done["whole"]}
            if side == "staged":
                row["loading"] = engine.load_directory(into)
                row["seconds"] += row["loading"]
        return row


def _expect(directory: Path, name: str, case: Case, digests: Mapping[int, str]) -> None:
    """Every chunk is there at its size, and some are looked into.

    Raises:
        RuntimeError: One is not.
    """
    from hfbucket_plugin.core.keys import encode_name

    for number in range(case.chunks):
        key = warm_sides.key(number)
        path = directory / name.format(key.replace("/", "-SEP-") if name.endswith(".data") else encode_name(key))
        if path.stat().st_size != case.chunk_bytes:
            raise RuntimeError(f"{path} has {path.stat().st_size} bytes")
        if number in digests and hashlib.sha256(path.read_bytes()).hexdigest() != digests[number]:
            raise RuntimeError(f"{path} is not what was uploaded")


@contextlib.contextmanager
def _elsewhere() -> Iterator[list[float]]:
    """Puts into a list how many processors other work on the machine took during the block."""
    taken: list[float] = []
    started, before = time.monotonic(), _others()
    yield taken
    spent = sum(secs - before.get(one, 0.0) for one, secs in _others().items())
    taken.append(max(0.0, spent / (time.monotonic() - started)))


def _others() -> dict[tuple[int, float], float]:
    """Processor seconds of each process that neither is ours nor was started by us."""
    import psutil

    me = psutil.Process()
    own = {me.pid, *(one.pid for one in me.children(recursive=True))}
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own:
                found[process.pid, process.create_time()] = sum(process.cpu_times()[:2])
    return found


def upload(hub: RunningHub, case: Case, seed: int) -> dict[int, str]:
    """Put the chunks of a case into the bucket, incompressible as KV nearly is; returns digests of some."""
    from huggingface_hub import HfApi

    from hfbucket_plugin.core.keys import encode_name

    api, dice, digests = HfApi(endpoint=hub.endpoint, token=False), random.Random(seed), {}
    each = max(1, 128 * MIB // case.chunk_bytes)
    for start in range(0, case.chunks, each):
        add = []
        for number in range(start, min(start + each, case.chunks)):
            content = dice.randbytes(case.chunk_bytes)
            if number % _LOOKED_INTO == 0:
                digests[number] = hashlib.sha256(content).hexdigest()
            add.append((content, f"{case.folder}/{encode_name(warm_sides.key(number))}"))
        api.batch_bucket_files(BUCKET, add=add)
    return digests


def print_case(case: Case, rows: Mapping[str, list[Row]]) -> dict[str, float]:
    """Print the medians of a case, and its ratios; returns the ratios by name."""
    print(f"{case.name} ({case.total_bytes // MIB} MiB)")
    medians = {}
    for side, runs in rows.items():
        medians[side] = seconds = statistics.median(run["seconds"] for run in runs)
        each = ", ".join(f"{run['seconds']:.2f}" for run in runs)
        line = f"  {side:8} {seconds:7.2f} s {case.total_bytes / MIB / seconds:7.0f} MiB/s   of {each}"
        for field in ("started", "whole", "loading"):
            if field in runs[0]:
                line += f"   {field} {statistics.median(run[field] for run in runs):.2f} s"
        line += f"   other work {statistics.median(run['others'] for run in runs):.1f} cores"
        print(line)
        requests = sorted(runs[-1]["requests"].items(), key=lambda one: -one[1])
        print(" " * 11 + ", ".join(f"{route} {count}" for route, count in requests if count))
    ratios = {}
    for (ours, theirs), target in case.targets.items():
        if ours in medians and theirs in medians:
            # Run by run, so that what else the machine did meanwhile weighs on both sides alike.
            ratio = statistics.median(
                b["seconds"] / a["seconds"] for a, b in zip(rows[ours], rows[theirs], strict=True)
            )
            ratios[f"{ours} / {theirs}"] = ratio
            word = "met" if ratio >= target else "MISSED"
            with_start = statistics.median(
                b["seconds"] / (a["seconds"] + a["started"]) for a, b in zip(rows[ours], rows[theirs], strict=True)
            )
            print(
                f"  {ours:6} is {ratio:5.2f} x as fast as {theirs:6}  at least {target:.2f}   {word}   "
                f"({with_start:.2f} x with the start of its actor)"
            )
    if "staged" in medians and "load" in medians:
        ratio = statistics.median(
            b["seconds"] / a["seconds"] for a, b in zip(rows["staged"], rows["load"], strict=True)
        )
        ratios["staged / load"] = ratio
        print(f"  staged is {ratio:5.2f} x as fast as load, both into the engine's memory")
    print(flush=True)
    return ratios


def main() -> None:
    """Run the cases and print what each side took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of each side; medians are printed")
    parser.add_argument("--only", help="cases whose name holds this, such as '1 MiB'")
    parser.add_argument("--sides", default=",".join(SIDES), help="sides to run, separated by commas")
    parser.add_argument("--delay-ms", type=float, default=40.0, help="added to each request")
    parser.add_argument(
        "--directory", type=Path, help="on the file system that is filled; default: that for temporary files"
    )
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args()
    sides = options.sides.split(",")
    if unknown := set(sides) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))}: there are {', '.join(SIDES)}")
    from huggingface_hub import HfApi

    from localhub.faults import Fault
    from localhub.process import start

    figures: dict[str, Any] = {}
    # Short: Ray puts sockets below it, whose paths are limited.
    with tempfile.TemporaryDirectory(prefix="bw-", dir="/tmp") as ray, contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
        os.environ |= {
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "LMCACHE_TRACK_USAGE": "false",
        }
        hub = stack.enter_context(start(root / "hub", faults=True))
        os.environ |= {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(REPOSITORY), "LMCACHE_LOG_LEVEL": "ERROR"}
        os.environ["RAY_AUTH_MODE"] = "disabled"  # whatever a token in ~/.ray would have this cluster of ours ask for
        os.environ.pop("RAY_ADDRESS", None)
        cluster = stack.enter_context(ray_cluster(Path(ray), dict(os.environ), serves_jobs=False))
        bench = Bench(hub, cluster, root, dict(os.environ))
        HfApi(endpoint=hub.endpoint, token=False).create_bucket(BUCKET)
        for seed, case in enumerate(one for one in CASES if not options.only or options.only in one.name):
            hub.control.clear_faults()
            digests = upload(hub, case, seed)
            if options.delay_ms:
                hub.control.add_fault(Fault(delay_s=options.delay_ms / 1000))
            rows: dict[str, list[Row]] = {side: [] for side in sides}
            for number in range(options.runs):
                for side in sides:
                    rows[side].append(row := bench.measure(case, side, digests))
                    print(f"{case.name}, run {number + 1}, {side}: {row['seconds']:.2f} s", file=sys.stderr, flush=True)
            figures[case.name] = {"runs": rows, "ratios": print_case(case, rows)}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
