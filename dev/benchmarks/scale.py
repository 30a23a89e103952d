"""The scheduling core against a simulated fleet, without Ray: what it costs the driver, the Hub and the nodes that wait.

    python dev/benchmarks/scale.py [--nodes 1000] [--chunks 1000] [--chunk-mib 32] [--groups 1] [--lost 10] [--slow 20] [--json FILE]

The clock is simulated, the decisions are not: `warmer.schedule.scheduler` is driven by the events that a fleet of so many nodes
would send, and the processor time spent in it is measured. A placement is one chunk on one node.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from hfbucket_plugin.tools.selection import ChunkRef  # noqa: E402
from warmer.plan.plan_file import SEGMENT_CHUNKS  # noqa: E402
from warmer.report.outcomes import Copied  # noqa: E402
from warmer.schedule.cohort import PlanSection  # noqa: E402 - found by the line above
from warmer.schedule.scheduler import Scheduler  # noqa: E402
from warmer.schedule.tasks import FetchTask, Task, total_bytes  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass
class Fleet:
    """Nodes that take their time, fall behind, and die."""

    options: argparse.Namespace
    now: float = 0.0
    spent: float = 0.0
    tasks: int = 0
    placements: int = 0
    unplaced: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    longest_wait: float = 0.0
    peak_store: int = 0

    def __post_init__(self) -> None:
        options = self.options
        self.chance = random.Random(options.seed)
        names = [f"node-{number:05d}" for number in range(options.nodes)]
        self.store = int(options.store_gib * GIB * 0.3)
        self.slow = set(self.chance.sample(names, options.slow))
        healthy = [name for name in names if name not in self.slow]
        self.doomed = self.chance.sample(healthy, options.lost)
        started = time.process_time()
        self.schedule = Scheduler(
            dict.fromkeys(names, self.store), [self.part(names, n) for n in range(options.groups)]
        )
        for name in names:
            self.schedule.started(name)
        self.spent += time.process_time() - started
        self.requests["xet-read-token"] = options.nodes
        self.in_flight: dict[str, int] = dict.fromkeys(names, 0)
        self.left: dict[str, int] = dict.fromkeys(names, options.chunks)
        self.idle_since: dict[str, float] = dict.fromkeys(names, 0.0)
        self.events: list[tuple[float, int, Task | str]] = []
        self.numbers = itertools.count()
        self.dead: set[str] = set()
        self.ended_at: dict[str, float] = {}
        self.holders: dict[int, str] = {}

    def part(self, names: list[str], group: int) -> PlanSection:
        """The chunks of one group of nodes."""
        own = frozenset(names[group :: self.options.groups])
        return PlanSection(lambda start: self.plan(group, start), own, rest=lambda start: self.listed(group, start))

    def listed(self, group: int, start: int) -> Iterator[ChunkRef]:
        """The plan of a group, made as it is read."""
        for number in range(start, self.options.chunks):
            yield ChunkRef(
                f"org/model@8@{group}@{number:064x}@bfloat16", f"kv/{group}/{number:064x}", f"{number:064x}", self.size
            )

    @property
    def size(self) -> int:
        """Bytes of a chunk."""
        return int(self.options.chunk_mib * MIB)

    def plan(self, group: int, start: int) -> Iterator[ChunkRef]:
        """The same as it is looked up once more, segment by segment."""
        for chunk, number in zip(self.listed(group, start), itertools.count(start), strict=False):
            if number == start or number % SEGMENT_CHUNKS == 0:
                self.requests["paths-info"] += 1
            yield chunk

    def secs(self, task: Task) -> float:
        """How long a node takes to carry an order out."""
        rate = self.options.wan_mib if isinstance(task, FetchTask) else self.options.lan_mib
        slowness = self.options.slowness if task.node in self.slow else 1.0
        jitter = self.chance.uniform(0.8, 1.25)
        return self.options.call_secs + slowness * jitter * total_bytes(task.chunks) / (rate * MIB)

    def at(self, secs: float, what: Task | str) -> None:
        """Have something happen."""
        heapq.heappush(self.events, (self.now + secs, next(self.numbers), what))

    def run(self) -> None:
        """Until every placement has ended."""
        share = self.options.chunks * self.size / (self.options.lan_mib * MIB)
        for name in self.doomed:
            self.at(self.chance.uniform(0.05, 0.9) * share, name)
        self.decide()
        while not self.schedule.done:
            if not self.events:
                self.now += 0.25
            else:
                self.now = max(self.now, self.events[0][0])
            until = self.now + 0.001  # what Ray hands over at a time
            while self.events and self.events[0][0] <= until:
                self.happen(heapq.heappop(self.events)[2])
            self.decide()

    def decide(self) -> None:
        """Have the schedule say what to do."""
        started = time.process_time()
        tasks = self.schedule.tasks(self.now)
        self.spent += time.process_time() - started
        for task in tasks:
            self.tasks += 1
            name = task.node
            if not self.in_flight[name] and name not in self.slow and name not in self.dead:
                self.longest_wait = max(self.longest_wait, self.now - self.idle_since[name])
            self.in_flight[name] += 1
            self.at(self.secs(task), task)
            if isinstance(task, FetchTask):
                # As hf_xet asks: how a file is put together, and its bytes, once for each piece of 4 MiB.
                ranges = -(-self.size // (4 * MIB))
                self.requests["reconstruction"] += ranges * len(task.chunks)
                self.requests["data"] += ranges * len(task.chunks)

    def happen(self, what: Task | str) -> None:
        """A node has carried out an order, or dies."""
        if isinstance(what, str):
            self.die(what)
            return
        name = what.node
        if name in self.dead:
            return
        results = [Copied(chunk.key, chunk.size) for chunk in what.chunks]
        started = time.process_time()
        if isinstance(what, FetchTask):
            self.holders[what.number] = name
            ended = self.schedule.fetched(what.number, results, shared=what.share, now=self.now)
        elif self.holders.get(what.source) in self.dead and self.chance.random() < 0.5:
            # Half of those who were taking something from a node when it died did not get it.
            ended = self.schedule.received(what.number, [None] * len(results), now=self.now, holder_lost=True)
        else:
            ended = self.schedule.received(what.number, results, now=self.now)
        released = self.schedule.released()
        self.spent += time.process_time() - started
        for number in released:
            if self.holders.get(number) not in self.dead:
                self.holders.pop(number, None)
        self.placements += len(ended)
        self.left[name] -= len(ended)
        self.in_flight[name] -= 1
        if not self.in_flight[name]:
            self.idle_since[name] = self.now
        if not self.left[name]:
            self.ended_at[name] = self.now
        if self.tasks % 1000 == 0:
            self.peak_store = max(self.peak_store, *self.schedule.store_bytes.values())

    def die(self, name: str) -> None:
        """A node is lost."""
        if name in self.dead:
            return
        self.dead.add(name)
        started = time.process_time()
        rest = sum(1 for _ in self.schedule.lost(name))
        self.spent += time.process_time() - started
        self.unplaced += rest


def ray_calls(count: int, chunks_of_each: int) -> tuple[float, float]:
    """Orders that a driver gets through Ray when nodes do nothing: 8 actors on this machine, 4 orders each.

    Returns:
        Orders a second here; and for each second of the driver's own processor time, which is what bounds it where the
        actors have processors of their own.
    """
    import ray

    chunks = tuple(
        ChunkRef(f"org/model@8@0@{number:064x}@bfloat16", f"kv/{number:064x}", f"{number:064x}", MIB)
        for number in range(chunks_of_each)
    )

    class Actor:
        def fetch(self, chunks: tuple[ChunkRef, ...]) -> list[Copied]:
            return [Copied(chunk.key, chunk.size) for chunk in chunks]

    ray.init("local", include_dashboard=False, num_cpus=2, log_to_driver=False, object_store_memory=100 * MIB)
    actors = [ray.remote(Actor).options(num_cpus=0, max_concurrency=5).remote() for _ in range(8)]
    ray.get([actor.fetch.remote(chunks) for actor in actors])
    started, spent, given = time.perf_counter(), time.process_time(), 0
    in_flight: dict[Any, Any] = {}
    while given < count or in_flight:
        for actor in actors:
            while given < count and sum(other is actor for other in in_flight.values()) < 4:
                in_flight[actor.fetch.remote(chunks)] = actor
                given += 1
        landed, _ = ray.wait(list(in_flight), num_returns=1, fetch_local=False)
        landed, _ = ray.wait(list(in_flight), num_returns=len(in_flight), timeout=0, fetch_local=False)
        for ref in landed:
            ray.get(ref)
            del in_flight[ref]
    rates = count / (time.perf_counter() - started), count / (time.process_time() - spent)
    ray.shutdown()
    return rates


def peak_mib() -> float:
    """The most memory of this process so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Run one simulation and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=1, help="groups of nodes, each of which has so many of its own")
    parser.add_argument("--chunk-mib", type=float, default=32.0)
    parser.add_argument("--lost", type=int, default=10)
    parser.add_argument("--slow", type=int, default=20)
    parser.add_argument("--slowness", type=float, default=10.0, help="how many times slower a slow node is")
    parser.add_argument("--wan-mib", type=float, default=500.0, help="MiB a second of an order to fetch")
    parser.add_argument("--lan-mib", type=float, default=1500.0, help="MiB a second of an order to receive")
    parser.add_argument("--call-secs", type=float, default=0.005, help="what an order costs beside its bytes")
    parser.add_argument("--store-gib", type=float, default=16.0, help="object store of a node; 0.3 of it is used")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--ray-calls", type=int, help="measure instead how many orders of 64 chunks Ray itself passes on"
    )
    parser.add_argument("--order-chunks", type=int, default=64, help="chunks of each of these orders")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.ray_calls:
        rate, of_cpu = ray_calls(options.ray_calls, options.order_chunks)
        print(
            f"orders of {options.order_chunks} chunks: {rate:.0f} a second, {of_cpu:.0f} a second of the driver's processor"
        )
        return
    gc.collect()
    before = peak_mib()
    wall = time.perf_counter()
    fleet = Fleet(options)
    fleet.run()
    wall = time.perf_counter() - wall
    counts = fleet.schedule.counts
    copies = counts.fetched / options.chunks / options.groups
    figures = {
        "nodes": options.nodes,
        "chunks": options.chunks,
        "groups": options.groups,
        "chunk_mib": options.chunk_mib,
        "lost": options.lost,
        "slow": options.slow,
        "placements": fleet.placements,
        "placements_of_lost_nodes": fleet.unplaced,
        "orders": fleet.tasks,
        "scheduler_cpu_secs": round(fleet.spent, 2),
        "orders_per_cpu_sec": round(fleet.tasks / fleet.spent),
        "placements_per_cpu_sec": round(fleet.placements / fleet.spent),
        "driver_mib": round(peak_mib(), 1),
        "driver_mib_before": round(before, 1),
        "hub_copies": round(copies, 3),
        "hub_requests": dict(fleet.requests),
        "refetched": counts.refetched,
        "fetched_alone": counts.own,
        "fell_behind": counts.lags,
        "slow_fetches": counts.slow_fetches,
        "simulated_secs": round(fleet.now, 1),
        "simulated_secs_of_the_not_slow": round(
            max(at for name, at in fleet.ended_at.items() if name not in fleet.slow), 1
        ),
        "longest_wait_secs": round(fleet.longest_wait, 2),
        "store_mib_at_most": round(fleet.peak_store / MIB, 1),
        "store_mib_bound": round(fleet.store / MIB, 1),
        "wall_secs": round(wall, 1),
    }
    for name, value in figures.items():
        print(f"{name:32} {value}")
    total = options.nodes * options.chunks
    if fleet.placements + fleet.unplaced != total:
        raise SystemExit(f"{fleet.placements} + {fleet.unplaced} placements are not {total}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
