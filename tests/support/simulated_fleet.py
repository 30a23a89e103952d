"""The warmer without Ray: a simulated fleet, and a plan applied to one tier.

The nodes of the fleet work at any pace, fail, lag, and are lost at any moment. The plan is applied in this process, or in
another one that kills itself at some step of it.
"""

import multiprocessing
import os
import random
import signal
import sys
import threading
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.tools.selection import ChunkRef
from hfbucket_plugin.tools.signals import ShutdownSignal
from tests.support.buckets import INSTANCE
from warmer.cluster.placement import Assignment
from warmer.cluster.ray import Node
from warmer.cluster.schedule_setup import schedule_of
from warmer.node.worker import NodeWarmer
from warmer.plan.plan_file import WarmPlanFile
from warmer.report.outcomes import INTERRUPTED, Copied, Failed, Present
from warmer.request.model import TransferOptions
from warmer.schedule.cohort import PlanSection
from warmer.schedule.scheduler import Scheduler
from warmer.schedule.tasks import FetchTask, ReceiveTask, TaskLimits, total_bytes
from warmer.tiers import declared_tier, open_tier

MIB = 1024 * 1024
ENDS = ("copied",) * 6 + ("reused", "present", "transport", "tier", "missing", INTERRUPTED)


def plan(chunk_sizes):
    return [ChunkRef(f"key-{n}", f"path-{n}", "00" * 32, size) for n, size in enumerate(chunk_sizes)]


def outcome(kind, chunk):
    if kind == "copied":
        return Copied(chunk.key, chunk.size)
    if kind == "reused":
        return Copied(chunk.key, chunk.size, reused=True)
    if kind == "present":
        return Present(chunk.key, chunk.size)
    return Failed(chunk.key, chunk.size, kind, "no")


class Fleet:
    """Every chunk ends exactly once for each node that is to have it, and no bound is ever passed.

    What happens is drawn from a seed: a run takes milliseconds, so that thousands of fleets are tried.
    """

    def __init__(self, seed):
        chance = self.chance = random.Random(seed)
        self.window = TaskLimits(
            batch_chunks=chance.randint(1, 5),
            batch_bytes=chance.randint(1, 50),
            fetches=chance.randint(1, 2),
            receives=chance.randint(1, 2),
            bytes=chance.randint(1, 80),
            batches=chance.randint(1, 6),
            run_bytes=chance.choice([None, None, chance.randint(1, 100)]),
            fan_out=chance.randint(1, 3),
        )
        most = chance.choice([20, 100])
        self.plan = plan(chance.randint(0, most) for _ in range(chance.randint(0, 40)))
        self.bound = chance.choice([10**6, chance.randint(1, 400)])
        self.now = 0.0
        names = [f"node-{n}" for n in range(chance.choice([0, 1, 2, 3, 3, 4, 5, 20]))]
        self.roles = {name: name for name in names}
        groups = chance.choice([[None], [None], self.groups_of(names), self.groups_of(names)])
        self.groups = {chunk.key: chance.choice(groups) for chunk in self.plan}
        self.direct = chance.random() < 0.1
        self.reliable = chance.random() < 0.3
        self.lossy = chance.random() < 0.3
        self.pauses = [0.0, 0.1, 1.0] if self.reliable else [0.0, 0.1, 1.0, 1.0, 11.0]
        self.schedule = Scheduler(
            dict.fromkeys(names, self.bound),
            [self.part(group) for group in groups],
            self.window,
            direct=self.direct,
        )
        self.unstarted = list(names)
        self.in_flight, self.objects, self.lost_objects = {}, {}, set()
        self.ended = {name: Counter() for name in names}
        self.fetched, self.excused, self.copied = Counter(), Counter(), 0
        self.released = set()
        self.vacant, self.numbers = {}, len(names)

    def groups_of(self, names):
        """Nodes that take the same chunks: each but its own, halves, all, or any."""
        some = [frozenset(name for name in names if self.chance.random() < 0.5) for _ in range(3)]
        halves = [frozenset(names[::2]), frozenset(names[1::2])]
        each = [frozenset([name]) for name in names] or [None]
        return list(dict.fromkeys(self.chance.choice([halves, [*halves, None], each, [*each, None], some])))

    def part(self, group):
        own = [chunk for chunk in self.plan if self.groups[chunk.key] == group]
        return PlanSection(lambda start: iter(own[start:]), group, rest=lambda start: iter(own[start:]))

    def play(self):
        chance = self.chance
        hung = {chance.choice(self.alive())} if self.alive() and chance.random() < 0.3 else set()
        for _ in range(chance.randint(0, 150)):
            self.start()
            able = [number for number, task in self.in_flight.items() if task.node not in hung]
            dice = chance.random()
            if able and dice < 0.55:
                self.finish(self.in_flight.pop(chance.choice(able)), well=self.reliable or chance.random() < 0.8)
            elif self.alive() and dice < 0.57:
                self.lose(chance.choice(self.alive()), keep=chance.random() < 0.5)
            elif self.vacant and dice < 0.6:
                chance.choice([self.abandon, self.replace, self.resume])()
            elif hung and dice < 0.61:
                hung.clear()
            else:
                self.decide(chance.choice(self.pauses))
            self.check()
        self.complete()

    def wanted(self, name):
        role = self.roles[name]
        of = self.groups
        return Counter(chunk.key for chunk in self.plan if of[chunk.key] is None or role in of[chunk.key])

    def alive(self):
        return self.schedule.nodes

    def end(self, ended):
        for name, result in ended:
            self.ended[name][result.key] += 1
            assert self.ended[name][result.key] == 1, "nothing ends twice"

    def drop_released(self):
        for number in self.schedule.released():
            assert number not in self.released, "told once"
            self.released.add(number)
            self.objects.pop(number, None)

    def start(self):
        if self.unstarted and self.chance.random() < 0.3:
            name = self.unstarted.pop()
            if name in self.alive():
                self.schedule.started(name)

    def decide(self, secs):
        self.now += secs
        for task in self.schedule.tasks(self.now):
            assert task.chunks
            assert task.number not in self.in_flight
            assert len(task.chunks) <= self.window.batch_chunks
            assert total_bytes(task.chunks) <= self.window.batch_bytes or len(task.chunks) == 1
            assert not {chunk.key for chunk in task.chunks} & set(self.ended[task.node])
            if isinstance(task, ReceiveTask):
                assert task.source not in self.released, "nobody has it any more"
                assert task.source in self.objects or task.source in self.lost_objects
                if task.source in self.objects:
                    assert tuple(self.objects[task.source][1]) == task.chunks
            else:
                self.fetched.update(chunk.key for chunk in task.chunks)
            self.in_flight[task.number] = task

    def finish(self, task, *, well):
        chance = self.chance
        kinds = ["copied" if well else chance.choice(ENDS) for _ in task.chunks]
        if isinstance(task, FetchTask):
            results = [outcome(kind, chunk) for kind, chunk in zip(kinds, task.chunks, strict=True)]
            stored = [c for c, result in zip(task.chunks, results, strict=True) if isinstance(result, Copied)]
            self.copied += sum(isinstance(result, Copied) and not result.reused for result in results)
            shared = task.share and bool(stored) and (well or chance.random() < 0.9)
            if shared:
                self.objects[task.number] = (task.node, stored)
            for chunk, result in zip(task.chunks, results, strict=True):
                if not isinstance(result, Copied) or (task.share and not shared):
                    self.excused[chunk.key] += 1  # others have to fetch it themselves
            self.end(self.schedule.fetched(task.number, results, shared=shared, now=self.now))
        else:
            if self.lossy and chance.random() < 0.05 and self.objects.pop(task.source, None):
                self.lost_objects.add(task.source)  # though its holder lives
                self.excused.update(chunk.key for chunk in self.plan)
            gone = task.source not in self.objects
            if gone or not well:
                kinds = ["undelivered"] * len(kinds) if gone or chance.random() < 0.3 else kinds
            results = [
                None if kind in ("undelivered", "transport", "missing") else outcome(kind, chunk)
                for kind, chunk in zip(kinds, task.chunks, strict=True)
            ]
            for chunk, result in zip(task.chunks, results, strict=True):
                self.excused[chunk.key] += result is None
            self.end(self.schedule.received(task.number, results, now=self.now, holder_lost=gone))
        with pytest.raises(KeyError):
            self.schedule.fetched(task.number, [], shared=False, now=self.now)
        self.drop_released()

    def lose(self, name, *, keep):
        self.in_flight = {number: task for number, task in self.in_flight.items() if task.node != name}
        self.objects = {number: held for number, held in self.objects.items() if held[0] != name}
        for chunk in self.plan:
            self.excused[chunk.key] += 1
        rest = self.schedule.lost(name, keep_place=keep)
        assert name not in self.alive()  # at once, not when the rest was read
        rest = [chunk.key for chunk in rest]
        if keep:
            assert rest == []
            self.vacant[name] = None
        else:
            self.ended[name].update(rest)
            assert self.ended[name] == self.wanted(name)
        self.drop_released()
        with pytest.raises(KeyError):
            self.schedule.lost(name)

    def abandon(self):
        name, _ = self.vacant.popitem()
        self.ended[name].update(chunk.key for chunk in self.schedule.abandon(name))
        assert self.ended[name] == self.wanted(name)

    def replace(self):
        lost, _ = self.vacant.popitem()
        name = f"node-{self.numbers}"
        self.numbers += 1
        self.roles[name] = self.roles[lost]
        self.ended[name] = Counter()
        del self.ended[lost]
        self.schedule.replace(lost, name, self.bound)
        self.unstarted.append(name)
        for chunk in self.plan:
            self.excused[chunk.key] += 1

    def resume(self):
        """A lost node goes on with what did not end on it: nothing ends twice, which `end` sees to."""
        name, _ = self.vacant.popitem()
        self.schedule.resume(name, self.bound)
        self.unstarted.append(name)
        for chunk in self.plan:
            self.excused[chunk.key] += 1

    def check(self):
        self.windows_hold()
        self.stores_hold()
        self.fetched_once_or_for_a_reason()

    def windows_hold(self):
        for name in self.alive():
            mine = [task for task in self.in_flight.values() if task.node == name]
            assert sum(isinstance(task, FetchTask) for task in mine) <= self.window.fetches
            assert sum(isinstance(task, ReceiveTask) for task in mine) <= self.window.receives
            size = sum(total_bytes(task.chunks) for task in mine)
            assert size <= self.window.bytes or len([task for task in mine if total_bytes(task.chunks)]) == 1
        fetching = [total_bytes(task.chunks) for task in self.in_flight.values() if isinstance(task, FetchTask)]
        if self.window.run_bytes is not None:
            assert sum(fetching) <= self.window.run_bytes or len([size for size in fetching if size]) == 1

    def stores_hold(self):
        used = self.schedule.store_bytes
        assert all(0 <= amount <= self.bound for amount in used.values())
        pinned = Counter()
        for holder, chunks in self.objects.values():
            pinned[holder] += total_bytes(tuple(chunks))
        for task in self.in_flight.values():
            if isinstance(task, ReceiveTask) and task.source in self.objects:
                pinned[task.node] += total_bytes(task.chunks)
        for name in self.alive():
            assert pinned[name] <= self.bound

    def fetched_once_or_for_a_reason(self):
        if self.direct:
            return
        assert self.copied == self.schedule.counts.fetched
        counts = self.schedule.counts
        if not counts.lags and not counts.slow_fetches and all(c.size <= self.bound for c in self.plan):
            for key, count in self.fetched.items():
                assert count <= 1 + self.excused[key]

    def complete(self):
        """Whatever happened, what is left can be carried out to the end."""
        while self.vacant:
            self.abandon()
        for name in self.alive():
            self.schedule.started(name)
        rounds = 0
        while not self.schedule.done:
            rounds += 1
            assert rounds < 2000, "it goes on for ever"
            self.decide(1.0)
            for number in list(self.in_flight):
                self.finish(self.in_flight.pop(number), well=True)
            self.check()
        for name, ended in self.ended.items():
            assert ended == self.wanted(name), name
        assert self.objects == {}, "nothing stays in the store"
        assert set(self.schedule.store_bytes.values()) <= {0}


def part(chunks, nodes=None):
    """Chunks for some nodes, or for all."""
    return PlanSection(lambda start: iter(chunks[start:]), None if nodes is None else frozenset(nodes))


def begin(nodes, chunks, **options):
    """A schedule whose nodes all take part at once; of chunks for all of them, or of parts."""
    names = nodes if isinstance(nodes, dict) else dict.fromkeys(nodes, 10**9)
    schedule = Scheduler(names, chunks if chunks and isinstance(chunks[0], PlanSection) else [part(chunks)], **options)
    for name in names:
        schedule.started(name)
    return schedule


def well(schedule, task, now):
    """An order ends well; returns what has ended by this."""
    results = [Copied(chunk.key, chunk.size) for chunk in task.chunks]
    if isinstance(task, FetchTask):
        return schedule.fetched(task.number, results, shared=task.share, now=now)
    return schedule.received(task.number, results, now=now)


def carry_out(schedule, now=0.0, *, holds=(), step=0.01, most=100_000):
    """Let every order end well at once, but those of some nodes; returns what was ordered, and the time."""
    seen = []
    for _ in range(most):
        tasks = [task for task in schedule.tasks(now) if task.node not in holds]
        seen += tasks
        now += step
        for task in tasks:
            well(schedule, task, now)
        if schedule.done or (not tasks and not holds):
            break
    return seen, now


def keys(tasks, kind, node=None):
    return Counter(
        chunk.key for task in tasks if isinstance(task, kind) and node in (None, task.node) for chunk in task.chunks
    )


def play(schedule, secs, until):
    """Orders take each node its own time, in seconds; returns when all has ended, and when for whom."""
    now, in_flight, last = 0.0, [], {}
    while not schedule.done:
        in_flight += [(now + secs[task.node], task) for task in schedule.tasks(now)]
        now += 0.05
        assert now < until
        for at, task in [entry for entry in in_flight if entry[0] <= now]:
            in_flight.remove((at, task))
            last[task.node] = now
            well(schedule, task, now)
    return last


STEPS = {
    "open", "close", "write", "pwrite", "truncate", "ftruncate", "fallocate", "posix_fallocate", "copy_file_range", "sendfile",
    "rename", "replace", "link", "unlink", "mkdir", "chmod", "fchmod", "chown", "fchown", "flock", "fsync",
}  # fmt: skip
"""What is called of the system, on a tier's files among others."""

PLACES = ("/warmer/tiers/", "/pathlib", "/shutil.py")


def applied(config: Path, plan: Path, ranks, batches=None):
    """Apply a plan, all of it or as far as it came before it was stopped; returns the outcomes."""
    settings = EngineConfig.read(config).instance(INSTANCE)
    bucket = open_bucket(settings, INSTANCE, telemetry.MemorySink(), 60.0)
    node = NodeWarmer(bucket, open_tier(declared_tier(EngineConfig.read(config), "fs.warm")))
    try:
        assigned = [Assignment(Node("n", "n"), ranks)]
        schedule = schedule_of(
            TransferOptions.model_validate({}), assigned, WarmPlanFile.open(plan), bucket, ShutdownSignal()
        )
        schedule.started("n")
        outcomes = []
        while not schedule.done and batches != 0:
            for order in schedule.tasks(0.0):
                ended = node.copy(order.chunks[:2] if batches else order.chunks)
                outcomes += ended
                if len(ended) == len(order.chunks):
                    schedule.fetched(order.number, ended, shared=False, now=0.0)
            batches = None if batches is None else 0
        return outcomes
    finally:
        node.close()
        bucket.close()


def _apply_and_die(config: Path, plan: Path, ranks, step: int) -> None:
    left = step

    def count(frame, event: str, function) -> None:
        nonlocal left
        if event == "c_return" and function.__name__ in STEPS:
            file = frame.f_code.co_filename
            if any(place in file for place in PLACES):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)  # of threads that are yet to start
    sys.setprofile(count)
    applied(config, plan, ranks)


def _forkserver():
    """Processes that begin with all modules loaded: the server would else not find this one, and say nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def applied_until_killed(config: Path, plan: Path, ranks, step: int) -> bool:
    """Apply a plan in a process that is killed just after its step number `step` on files; whether it was."""
    process = _forkserver().Process(target=_apply_and_die, args=(config, plan, ranks, step))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
