"""An engine that puts, replaces and deletes while exports, mirrors and cleanups run, against a plain model.

It acts wherever a job waits: before a look, after a look that grows old, during a pause of the Hub where a name would be
given or an object deleted, and where the answer to such a request is lost, whether it was carried out or not. The Hub has
no conditional write, so nothing can be said of the moment in which that single request is in progress; of everything else,
what the engine wrote after the job had looked stays.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import HfApi
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from hfbucket_plugin.errors import ThrottledError, TransportError
from hfbucket_plugin.hub.client import HubClient
from jobs.deletion.job import DeletionJob
from jobs.export.job import Export
from tests.support.buckets import DAY, ExportRig, key
from tests.support.models import run_on_hub

KEYS = [key(number) for number in range(6)]
WHEN = ("before a look", "after a look that grows old", "pause", "lost before", "lost after")


@dataclass(frozen=True)
class Act:
    """What the engine does, at which opportunity of its kind."""

    when: str
    turn: int
    number: int
    deletes: bool


acts = st.lists(
    st.builds(Act, st.sampled_from(WHEN), st.integers(0, 1), st.integers(0, 5), st.sampled_from([False, False, True])),
    max_size=3,
    unique_by=lambda act: (act.when, act.turn),
)


class Engine:
    """Acts on the destination, at the opportunities that a job gives.

    Args:
        machine: Whose destination.
        planned: What it does.
    """

    def __init__(self, machine, planned):
        self._machine = machine
        self._planned = list(planned)
        self._turns = dict.fromkeys(WHEN, 0)
        self.wrote = {}  # path → content, None for what it deleted; only what it did after the plan
        self.at_work = False
        self.skew = 0.0

    def monotonic(self):
        return time.monotonic() + self.skew

    def may(self, when):
        """Whether it acts now; it has acted then."""
        turn, self._turns[when] = self._turns[when], self._turns[when] + 1
        due = [act for act in self._planned if (act.when, act.turn) == (when, turn)]
        for act in due:
            path = self._machine.rig.eu.path(KEYS[act.number])
            self.wrote[path] = self._machine.engine_does(path, deletes=act.deletes)
        return bool(due)

    def request(self, own, client, method, url, **more):
        """`HubClient.request`, with the engine beside it."""
        route, eu = more["route"], self._machine.rig.eu
        if not self.at_work or eu.bucket_id not in url:
            return own(client, method, url, **more)
        if route == "paths-info":
            self.may("before a look")
            answer = own(client, method, url, **more)
            if self.may("after a look that grows old"):
                self.skew += 3.5
            return answer
        if route == "batch" and b".hfbucket" not in more["content"]:
            assert (more["attempts"], more["patient"]) == (1, False), "what goes by a look is sent once"
            if self.may("pause"):
                raise ThrottledError("the Hub pauses", 0.01)
            if self.may("lost before"):
                raise TransportError("the answer is lost")
            answer = own(client, method, url, **more)
            if self.may("lost after"):
                raise TransportError("the answer is lost")
            return answer
        return own(client, method, url, **more)


class Engines(RuleBasedStateMachine):
    # Given by the test.
    hub = new_bucket = directory = monkeypatch = None
    numbers = itertools.count(1)

    def __init__(self):
        super().__init__()
        own = Path(self.directory, str(next(self.numbers)))
        own.mkdir()
        self.rig = ExportRig.on(self.hub, own, self.new_bucket(), self.new_bucket())
        self.versions = itertools.count(1)

    @initialize()
    def stock(self):
        for one in KEYS[:4]:
            self.put(self.rig.us, one)
        for one in KEYS[3:]:
            self.put(self.rig.eu, one)

    def put(self, depot, one, age=20 * DAY):
        data = f"version {next(self.versions)}".encode()
        depot.put({one: data}, age)
        return data

    def engine_does(self, path, *, deletes):
        if deletes:
            HfApi(endpoint=self.hub.endpoint, token=False).batch_bucket_files(self.rig.eu.bucket_id, delete=[path])
            return None
        data = f"engine's {next(self.versions)}".encode().ljust(64, b".")
        self.rig.eu.put_paths({path: data}, 0)
        return data

    @rule(one=st.sampled_from(KEYS))
    def write_us(self, one):
        self.put(self.rig.us, one)

    @rule(one=st.sampled_from(KEYS))
    def write_eu(self, one):
        self.put(self.rig.eu, one)

    @rule(acts=acts, mode=st.sampled_from(["copy", "stream", "auto"]), way=st.sampled_from(["skip", "overwrite"]))
    def export(self, acts, mode, way):
        self.beside(acts, lambda: self.rig.export("--mode", mode, "--on-conflict", way, "--yes", "--parallel", "1"))

    @rule(acts=acts, mode=st.sampled_from(["copy", "stream"]))
    def mirror(self, acts, mode):
        arguments = ("--mirror", "--mode", mode, "--yes", "--max-delete", "100%", "--accept-shrunk", "--parallel", "1")
        self.beside(acts, lambda: self.rig.export(*arguments))

    @rule(acts=acts)
    def cleanup(self, acts):
        arguments = ("--max-age", "14d", "--max-delete", "100%", "--accept-shrunk", "--yes", "--parallel", "1")
        self.beside(acts, lambda: self.rig.eu.cleanup(*arguments))

    def beside(self, planned, run):
        """Run a job with the engine beside it, and compare what the engine did with what is there."""
        engine = Engine(self, planned)
        request, jobs = HubClient.request, (Export._apply, DeletionJob._apply)

        def working(own):
            def apply(*arguments):
                engine.at_work = True
                try:
                    return own(*arguments)
                finally:
                    engine.at_work = False

            return apply

        with self.monkeypatch.context() as patch:
            patch.setattr(HubClient, "request", lambda *args, **more: engine.request(request, *args, **more))
            patch.setattr(Export, "_apply", working(jobs[0]))
            patch.setattr(DeletionJob, "_apply", working(jobs[1]))
            patch.setattr("jobs.deletion.attempt.monotonic", engine.monotonic)
            patch.setattr("jobs.export.copy.time", SimpleNamespace(monotonic=engine.monotonic, sleep=time.sleep))
            ran = run()
        assert ran.code in (0, 3, 4), ran.stderr
        assert "Traceback" not in ran.stderr
        sizes = self.sizes()
        for path, data in engine.wrote.items():
            if data is not None:
                assert sizes.get(path) == len(data), (planned, path, ran.stderr, ran.lines)

    def sizes(self):
        listed = HfApi(endpoint=self.hub.endpoint, token=False).list_bucket_tree(self.rig.eu.bucket_id, recursive=True)
        return {item.path: item.size for item in listed if "/.hfbucket/" not in item.path}


def test_what_an_engine_writes_after_a_look_is_never_overwritten_or_deleted(hub, new_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    monkeypatch.setattr("jobs.batch.apply._LOOK_SECS", 0.01)
    monkeypatch.setattr("jobs.export.copy._AGAIN_SECS", 0.01)

    run_on_hub(Engines, hub, new_bucket, tmp_path, monkeypatch, max_examples=4, steps=6)
