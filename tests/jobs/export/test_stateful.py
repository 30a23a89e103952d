"""Exports and cleanups on a real local Hub with writers and faults beside them, against a plain model.

Writers act, faults begin and runs are broken off just before a batch, where `Copier.attempt` is.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import Interrupted
from jobs.export.copy import Copier
from localhub.faults import Fault
from tests.support.buckets import DAY, HOUR, ExportRig, key
from tests.support.models import run_on_hub

KEYS = [key(number) for number in range(6)]
NAMES = [encode_name(one) for one in KEYS]
AGES = (1 * HOUR, 10 * DAY, 20 * DAY)
ATTEMPT = Copier.attempt
FAULTS = (
    None,
    {"route": "batch", "items": "%401000%40", "times": 1},
    {"route": "batch", "items": "%401001%40"},
    {"route": "batch", "truncate_at": 5, "times": 1},
    {"route": "batch", "status": 502, "times": 1},
    {"route": "batch", "status": 429, "headers": {"Retry-After": "0"}, "times": 1},
    {"route": "paths-info", "status": 503, "times": 2},
    {"route": "reconstruction", "status": 500, "times": 2},
    {"route": "xorb-data", "truncate_at": 1, "times": 1},
)


@dataclass(frozen=True)
class Meanwhile:
    """What happens just before the batch with this number."""

    batch: int
    rewritten: int | None
    at_source: bool
    fault: dict | None
    kill: bool


meanwhile = st.lists(
    st.builds(
        Meanwhile,
        st.integers(1, 3),
        st.one_of(st.none(), st.integers(0, 5), st.integers(0, 5)),
        st.booleans(),
        st.sampled_from(FAULTS),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=3,
)
ways = st.sampled_from(["skip", "newer", "overwrite"])
modes = st.sampled_from(["auto", "stream"])
fresh_keys = st.sets(st.sampled_from(KEYS), min_size=2)


class Exports(RuleBasedStateMachine):
    plans = Bundle("plans")
    # Given by the test.
    hub = new_bucket = directory = monkeypatch = None
    numbers = itertools.count(1)

    def __init__(self):
        super().__init__()
        own = Path(self.directory, str(next(self.numbers)))
        own.mkdir()
        self.rig = ExportRig.on(self.hub, own, self.new_bucket(), self.new_bucket())
        self.versions = itertools.count(1)
        self.us, self.eu = {}, {}  # name → version; an object is as long as its version
        self.old = set()  # names of objects of eu that a cleanup deletes
        self.hub.control.clear_faults()

    @initialize()
    def stock(self):
        for one in KEYS[:4]:
            self.write_us(one, 10 * DAY)
        self.write_eu(KEYS[0], 20 * DAY)

    @rule(one=st.sampled_from(KEYS), age=st.sampled_from(AGES))
    def write_us(self, one, age):
        self.us[encode_name(one)] = self.put(self.rig.us, one, age)

    @rule(one=st.sampled_from(KEYS), age=st.sampled_from(AGES))
    def write_eu(self, one, age):
        name = encode_name(one)
        self.eu[name] = self.put(self.rig.eu, one, age)
        (self.old.add if age > 14 * DAY else self.old.discard)(name)

    def put(self, depot, one, age):
        version = next(self.versions)
        depot.put({one: b"x" * version}, age)
        return version

    @rule()
    def cleanup(self):
        ran = self.rig.eu.cleanup("--max-age", "14d", "--max-delete", "100%", "--accept-shrunk", "--yes")
        assert ran.code == (0 if self.eu else 4), ran.stderr
        assert ran.counts("deleted") == [len(self.old)]
        for name in self.old:
            del self.eu[name]
        self.old.clear()

    def refresh(self, keys):
        """Have something to copy."""
        for one in sorted(keys):
            self.write_us(one, 1 * HOUR)

    def may_become(self, way):
        """What a plan of now may make of each name, in plain words."""
        us, eu = self.times(self.rig.us), self.times(self.rig.eu)
        return {
            name: version
            for name, version in self.us.items()
            if name not in self.eu
            or self.eu[name] == version
            or way == "overwrite"
            or (way == "newer" and us[name] > eu[name])
        }

    def times(self, depot):
        from huggingface_hub import HfApi

        listed = HfApi(endpoint=self.hub.endpoint, token=False).list_bucket_tree(depot.bucket_id, recursive=True)
        return {item.path.rpartition("/")[2]: item.uploaded_at for item in listed}

    @rule(target=plans, fresh=fresh_keys, way=ways, mode=modes)
    def plan(self, fresh, way, mode):
        self.refresh(fresh)
        becomes = self.may_become(way)
        ran = self.rig.export("--on-conflict", way, "--mode", mode, "--dry-run")
        assert ran.code == 0, ran.stderr
        return ran.summary["plan"], becomes, dict(self.eu)

    @rule(plan=plans, events=meanwhile)
    def apply(self, plan, events):
        path, becomes, then = plan
        if Path(path).exists():  # a plan that was carried out whole is not kept
            untouched = {name: version for name, version in becomes.items() if self.eu.get(name) == then.get(name)}
            self.carry_out(untouched, events, lambda: self.rig.apply(path, "--yes"))

    @rule(fresh=fresh_keys, way=ways, mode=modes, events=meanwhile)
    def export(self, fresh, way, mode, events):
        self.refresh(fresh)
        arguments = ("--on-conflict", way, "--mode", mode, "--window", "20B", "--parallel", "1", "--yes")
        self.carry_out(self.may_become(way), events, lambda: self.rig.export(*arguments))

    def carry_out(self, becomes, events, run):
        counter, lock = itertools.count(1), threading.Lock()
        before, at_source = dict(self.eu), set()

        def attempt_and_more(mover, batch, seconds):
            with lock:
                number = next(counter)
                for event in [event for event in events if event.batch == number]:
                    self.happen(event, at_source, sorted(becomes) or NAMES)
            return ATTEMPT(mover, batch, seconds)

        self.monkeypatch.setattr(Copier, "attempt", attempt_and_more)
        wanted = {name: version for name, version in becomes.items() if self.us.get(name) == version}
        ran = run()
        self.monkeypatch.setattr(Copier, "attempt", ATTEMPT)
        self.hub.control.clear_faults()

        there = self.sizes(self.rig.eu)
        reported = (events, becomes, before, self.eu, there, ran.stderr)
        assert there.keys() >= self.eu.keys(), reported  # nothing is ever lost
        for name, version in there.items():
            rewritten = self.eu.get(name) != before.get(name)
            assert version == self.eu.get(name) or (version == becomes.get(name) and not rewritten), (name, reported)
        if ran.code == 0:
            done = {name: version for name, version in wanted.items() if name not in at_source}
            assert all(there[name] in (version, self.eu.get(name)) for name, version in done.items()), reported
            kept = {name for name in done if self.eu.get(name) != before.get(name)}
            assert all(there[name] == done[name] for name in done.keys() - kept), reported
        else:
            assert events
            assert ran.code in (3, 5), ran.stderr
        for name, version in there.items():
            if self.eu.get(name) != version:
                self.eu[name] = version
                self.old.discard(name)

    def happen(self, event, at_source, planned):
        if event.rewritten is not None:
            name = planned[event.rewritten % len(planned)]
            (self.write_us if event.at_source else self.write_eu)(KEYS[NAMES.index(name)], 0.0)
            if event.at_source:
                at_source.add(name)
        if event.fault is not None:
            self.hub.control.add_fault(Fault(**event.fault))
        if event.kill:
            raise Interrupted

    def sizes(self, depot):
        return {name: size for name, (_, size) in self.rig.listing(depot).items()}

    @invariant()
    def what_is_there_is_what_the_model_says(self):
        assert (self.sizes(self.rig.us), self.sizes(self.rig.eu)) == (self.us, self.eu)


def test_an_export_loses_nothing_and_replaces_what_it_may(hub, new_bucket, tmp_path, monkeypatch):
    # Faults that last are tried four times; what matters is what is there, not how long it takes.
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    monkeypatch.setattr("jobs.batch.apply._LOOK_SECS", 0.01)
    monkeypatch.setattr("jobs.export.job.PAGE", 2)  # so that there are batches to come between

    run_on_hub(Exports, hub, new_bucket, tmp_path, monkeypatch, max_examples=5, steps=8)
