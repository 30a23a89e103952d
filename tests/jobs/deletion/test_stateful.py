"""Cleanup on a real local Hub with writers and faults beside it, against a plain model of what may be lost.

Time does not pass: writers act, faults begin and orders to stop come just before a batch, where `BucketLock.confirm` is.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from hfbucket_plugin.errors import Interrupted
from jobs.lock.lock import BucketLock
from localhub.faults import Fault
from tests.support.buckets import DAY, HOUR, PREFIX, Depot, key
from tests.support.models import run_on_hub

KEYS = [key(number) for number in range(6)] + [key(number, "org/kept") for number in range(2)]
OTHERS = [f"{PREFIX}/README.md", f"{PREFIX}/nested/x", f"{PREFIX}/test%401%400%400%40bfloat16", f"{PREFIX}-east/x"]
AGES = (0.0, 2 * HOUR, 10 * DAY, 20 * DAY, 40 * DAY)
POLICY = ("--max-age", "14d", "--keep-prefix", "org/kept@", "--max-delete", "100%", "--accept-shrunk")
CONFIRM = BucketLock.confirm
FAULTS = (
    None,
    {"route": "batch", "items": "%401000%40", "times": 1},
    {"route": "batch", "items": "%401001%40"},
    {"route": "batch", "truncate_at": 5, "times": 1},
    {"route": "batch", "status": 502, "times": 1},
    {"route": "paths-info", "status": 503, "times": 2},
    {"route": "paths-info", "status": 429, "headers": {"Retry-After": "0"}, "times": 1},
    {"route": "tree", "status": 500, "times": 1},
)


@dataclass(frozen=True)
class Meanwhile:
    """What happens just before the batch with this number."""

    batch: int
    rewritten: int | None  # which of those planned
    fault: dict | None
    stop: bool


meanwhile = st.lists(
    st.builds(
        Meanwhile,
        st.integers(1, 4),
        st.one_of(st.none(), st.integers(0, 5), st.integers(0, 5)),
        st.sampled_from(FAULTS),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=3,
)
old_keys = st.sets(st.sampled_from(KEYS), min_size=2)


class Cleanups(RuleBasedStateMachine):
    plans = Bundle("plans")
    # Given by the test.
    hub = new_bucket = directory = monkeypatch = None
    numbers = itertools.count(1)

    def __init__(self):
        super().__init__()
        own = Path(self.directory, str(next(self.numbers)))
        own.mkdir()
        self.depot = Depot(self.hub, self.new_bucket(), own)
        self.versions = itertools.count(1)
        self.there = {}  # path → (version, age); an object is as long as its version
        self.hub.control.clear_faults()

    @initialize()
    def stock(self):
        for number, one in enumerate(KEYS):
            self.write(one, 10 * DAY if number == 5 else 20 * DAY)
        for path in OTHERS:
            self.put(path, 90 * DAY)

    def put(self, path, age):
        version = next(self.versions)
        self.depot.put_paths({path: b"x" * version}, age)
        self.there[path] = (version, age)

    @rule(one=st.sampled_from(KEYS), age=st.sampled_from(AGES))
    def write(self, one, age):
        self.put(self.depot.path(one), age)

    @rule(one=st.sampled_from(KEYS))
    def delete(self, one):
        HfApi(endpoint=self.hub.endpoint, token=False).batch_bucket_files(
            self.depot.bucket_id, delete=[self.depot.path(one)]
        )
        self.there.pop(self.depot.path(one), None)

    def wanted(self):
        """What the policy lets go, in plain words."""
        return {
            path: version
            for path, (version, age) in self.there.items()
            if path not in OTHERS and "kept" not in path and age > 14 * DAY
        }

    def age(self, keys):
        for one in sorted(keys):
            self.write(one, 20 * DAY)

    @rule(target=plans, old=old_keys)
    def plan(self, old):
        self.age(old)
        ran = self.depot.cleanup(*POLICY)
        assert ran.code == 0, ran.stderr
        assert ran.counts("planned") == [len(self.wanted())]
        return ran.summary["plan"], self.wanted()

    @rule(plan=plans, events=meanwhile, size=st.integers(1, 3))
    def apply(self, plan, events, size):
        path, planned = plan
        if Path(path).exists():  # a plan that was carried out whole is not kept
            self.carry_out(planned, events, "apply", path, "--yes", "--batch-size", str(size))

    @rule(old=old_keys, events=meanwhile, size=st.integers(1, 2))
    def cleanup(self, old, events, size):
        self.age(old)
        self.carry_out(self.wanted(), events, "cleanup", *POLICY, "--yes", "--batch-size", str(size))

    def carry_out(self, planned, events, *arguments):
        counter, lock = itertools.count(1), threading.Lock()

        def confirm_and_more(of):
            with lock:
                number = next(counter)
                for event in [event for event in events if event.batch == number]:
                    self.happen(event, sorted(planned))
            return CONFIRM(of)

        self.monkeypatch.setattr(BucketLock, "confirm", confirm_and_more)
        fresh = [f"{PREFIX}/fresh%40{n}" for n in range(2)]
        writer = threading.Thread(target=self.depot.put_paths, args=(dict.fromkeys(fresh, b"new"), 0))
        writer.start()
        ran = self.depot.run(*arguments, "--parallel", "1")
        writer.join()
        self.monkeypatch.setattr(BucketLock, "confirm", CONFIRM)
        self.hub.control.clear_faults()

        there = self.sizes()
        assert all(there.pop(path) == 3 for path in fresh), "an object of a concurrent writer is lost"
        may_go = {path for path, version in planned.items() if self.there.get(path, (0,))[0] == version}
        lost = self.there.keys() - there.keys()
        assert lost <= may_go, (events, planned, self.there, there, ran.stderr, ran.summary)
        if ran.code == 0:
            assert lost == may_go, ran.stderr
        else:
            assert events
            assert ran.code in (3, 5), ran.stderr
        back = sum(event.rewritten is not None for event in events)  # deleted, and then written again
        # Told to stop, nobody looks any more what became of a batch whose answer was lost: it counts as unfinished.
        unknown = ran.summary["unfinished"]["objects"] if ran.code == 5 else 0
        assert len(lost) - unknown <= ran.summary["deleted"]["objects"] <= len(lost) + back, ran.stderr
        for path in lost:
            del self.there[path]
        HfApi(endpoint=self.hub.endpoint, token=False).batch_bucket_files(self.depot.bucket_id, delete=fresh)

    def happen(self, event, planned):
        if event.rewritten is not None and planned:
            self.put(planned[event.rewritten % len(planned)], 0.0)
        if event.fault is not None:
            self.hub.control.add_fault(Fault(**event.fault))
        if event.stop:
            raise Interrupted

    def sizes(self):
        listed = HfApi(endpoint=self.hub.endpoint, token=False).list_bucket_tree(self.depot.bucket_id, recursive=True)
        return {item.path: item.size for item in listed if "/.hfbucket/" not in item.path}

    @invariant()
    def what_is_there_is_what_the_model_says(self):
        assert self.sizes() == {path: version for path, (version, _) in self.there.items()}

    def teardown(self):
        assert not [path for path in self.depot.all_paths() if "/locks/" in path]


def test_nothing_outside_the_plan_is_ever_lost(hub, new_bucket, tmp_path, monkeypatch):
    # Faults that last are tried four times; what matters is what is lost, not how long it takes.
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    monkeypatch.setattr("jobs.batch.apply._LOOK_SECS", 0.01)

    run_on_hub(Cleanups, hub, new_bucket, tmp_path, monkeypatch, max_examples=5, steps=8)
