"""Plans applied to a real tier from a real bucket, against a plain model of both, whatever happens in between."""

import itertools
import random
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from hfbucket_plugin.core.keys import ClassicKey, parse_key
from hfbucket_plugin.tools.selection import Selection
from localhub.faults import Fault
from tests.support.buckets import MODEL, Warehouse, content
from tests.support.models import examples
from tests.support.simulated_fleet import applied, applied_until_killed
from warmer.check.node import NodeChecker
from warmer.plan.build import PlanBuilder
from warmer.plan.plan_file import WarmPlanFile
from warmer.report.outcomes import Copied, Failed, Missing, Present, Right, Wrong

KEYS = [f"{MODEL}@2@{worker}@{0xA00 + number:x}@half" for worker in range(2) for number in range(4)]
KEYS += [f"org/other@1@0@{0xB00 + number:x}@half" for number in range(2)]

keys = st.sampled_from(KEYS)
some_keys = st.lists(keys, unique=True, min_size=1, max_size=6)
choices = st.sampled_from(
    [{"all": True}, {"model": MODEL}, {"model": MODEL, "world_size": 2, "workers": "1"}, {"prefix": "org/o"}]
)
ranks = st.sampled_from([None, frozenset({0}), frozenset({1, 2})])


def taken_by(ranks, key):
    return ranks is None or "@1@0@" in key or int(key.split("@")[2]) in ranks


class Applying(RuleBasedStateMachine):
    """Each run has a bucket and a directory of its own."""

    hub = new_bucket = None

    @initialize()
    def begin(self):
        self.held = tempfile.TemporaryDirectory()
        self.warehouse = Warehouse(self.hub.endpoint, type(self).new_bucket(), Path(self.held.name))
        self.bucket, self.tier, self.plan = {}, {}, None
        self.planned = []
        self.versions = 0
        self.killed = False

    @rule(chosen=some_keys)
    def put(self, chosen):
        self.versions += 1
        # Half of the sizes are shared by all versions: only the hash tells these apart.
        chunks = {key: content(f"{key} {self.versions}", random.Random(key).choice([900, 900 + self.versions]))
                  for key in chosen}  # fmt: skip
        self.warehouse.put(chunks)
        self.bucket |= chunks

    @precondition(lambda self: self.bucket)
    @rule(data=st.data())
    def delete(self, data):
        key = data.draw(st.sampled_from(sorted(self.bucket)))
        self.warehouse.delete(key)
        del self.bucket[key]

    @rule(given=choices)
    def choose(self, given):
        choice = Selection.model_validate(given)
        choosing = PlanBuilder(choice, ClassicKey, datetime.now(UTC))
        temp_dir = Path(self.held.name) / "scratch"
        path = Path(self.held.name) / "plan.jsonl"
        WarmPlanFile.write(path, choosing.planned(self.warehouse.open(), temp_dir), lambda plan: {"n": plan.chunks})
        self.plan = WarmPlanFile.open(path)  # as another process would
        chosen = choice.filter(datetime.now(UTC))
        self.planned = sorted(key for key in self.bucket if self.is_chosen(chosen, key))
        assert [chunk.key for chunk in self.plan.chunks_from(0)] == self.planned

    @staticmethod
    def is_chosen(chosen, key):
        return chosen._named(key) and chosen._written_by(parse_key(key))

    @precondition(lambda self: self.tier)
    @rule(data=st.data(), harm=st.sampled_from(["remove", "truncate", "garble"]))
    def harm(self, data, harm):
        key = data.draw(st.sampled_from(sorted(self.tier)))
        file = self.warehouse.declaration().file(key)
        if harm == "remove":
            file.unlink()
            del self.tier[key]
            return
        self.tier[key] = self.tier[key][:-1] if harm == "truncate" else bytes(len(self.tier[key]))
        file.write_bytes(self.tier[key])

    @precondition(lambda self: self.plan is not None)
    @rule(ranks=ranks, batches=st.none() | st.integers(0, 2))
    def apply(self, ranks, batches):
        """Apply the plan: all of it, or as far as it came before it was stopped."""
        outcomes = self.carried_out(ranks, batches)
        for outcome in outcomes:
            expected = self.expected(outcome.key, outcome.size)
            assert type(outcome) is expected, outcome
            if expected is Copied:
                self.tier[outcome.key] = self.bucket[outcome.key]
            elif expected is Failed:
                assert outcome.kind == "missing"
        assert self.warehouse.in_tier() == self.tier
        if batches is None:
            own = [key for key in self.planned if taken_by(ranks, key)]
            assert [outcome.key for outcome in outcomes] == own
            self.hub.control.reset_counters()
            again = self.carried_out(ranks, None)
            assert not any(isinstance(outcome, Copied) for outcome in again)
            assert self.hub.control.counters().route("xorb-data").requests == 0

    def expected(self, key, size):
        if key in self.tier and len(self.tier[key]) == size:
            return Present  # warming looks at lengths; `check` at contents
        return Copied if key in self.bucket else Failed

    def carried_out(self, ranks, batches):
        self.killed = False
        return applied(self.warehouse.config, self.plan.path, ranks, batches)

    @precondition(lambda self: self.plan is not None)
    @rule(ranks=ranks, step=st.integers(1, 60))
    def apply_and_be_killed(self, ranks, step):
        """What is seen afterwards is what was there, or what was to come: nothing between."""
        self.killed = killed = applied_until_killed(self.warehouse.config, self.plan.path, ranks, step)
        seen = self.warehouse.in_tier() if self.warehouse.tier.exists() else {}
        own = [chunk for chunk in self.plan.chunks_from(0) if taken_by(ranks, chunk.key)]
        expected = {chunk.key for chunk in own if self.expected(chunk.key, chunk.size) is Copied}
        for key in seen.keys() | self.tier.keys():
            assert seen.get(key) in [self.tier.get(key), *([self.bucket[key]] if key in expected else [])], key
            assert killed or key not in expected or seen[key] == self.bucket[key]
        self.tier = seen

    @precondition(lambda self: self.plan is not None)
    @rule(ranks=ranks, times=st.sampled_from([1, None]))
    def apply_over_a_bad_wire(self, ranks, times):
        """A byte that changed on its way is noticed: fetched once more, or a failure, and never a chunk."""
        self.hub.control.add_fault(Fault(route="xorb-data", flip_at=(100,), times=times))
        try:
            outcomes = self.carried_out(ranks, None)
        finally:
            self.hub.control.clear_faults()
        for outcome in outcomes:
            expected = self.expected(outcome.key, outcome.size)
            if expected is Copied and times is None:
                assert isinstance(outcome, Failed)
                assert outcome.kind in ("integrity", "transport")
            else:
                assert type(outcome) is expected, outcome
            if isinstance(outcome, Copied):
                self.tier[outcome.key] = self.bucket[outcome.key]
        assert self.warehouse.in_tier() == self.tier

    @precondition(lambda self: self.plan is not None)
    @rule()
    def check(self):
        chunks = list(self.plan.chunks_from(0))
        found = NodeChecker(self.warehouse.declaration()).copy(chunks)
        for chunk, outcome in zip(chunks, found, strict=True):
            planned = self.warehouse_content(chunk)
            there = self.tier.get(chunk.key)
            expected = Missing if there is None else Right if there == planned else Wrong
            assert type(outcome) is expected

    def warehouse_content(self, chunk):
        """What the plan says, by its hash: contents of the model that the plan may know."""
        from hfbucket_plugin.hub.transfer import xet_hashes

        for data in (self.bucket.get(chunk.key), self.tier.get(chunk.key)):
            if data is not None:
                path = Path(self.held.name) / "hashed"
                path.write_bytes(data)
                if xet_hashes([path]) == [chunk.xet_hash]:
                    return data
        return None

    def teardown(self):
        if hasattr(self, "held"):
            # What a run that was killed left behind, the next one removes.
            assert self.killed or not self.warehouse.tier.exists() or self.warehouse.leftovers() == []
            self.held.cleanup()


@pytest.mark.timeout(200)
def test_applying_plans(new_bucket, hub):
    run_state_machine_as_test(
        type("OnThisHub", (Applying,), {"hub": hub, "new_bucket": staticmethod(new_bucket)}),
        settings=settings(max_examples=examples(15), stateful_step_count=12, deadline=None, database=None),
    )


@pytest.mark.timeout(200)
def test_a_run_killed_at_any_step_shows_whole_chunks_only(hub, bucket, tmp_path):
    """One chunk is new, and one takes the place of a file of another length."""
    warehouse = Warehouse(hub.endpoint, bucket, tmp_path)
    new, old = KEYS[:2]
    warehouse.put({new: content(1, 3000), old: content(2, 3000)})
    warehouse.plan(f"{MODEL}@2@")
    killed = []
    for step in itertools.count(1):
        file = warehouse.declaration().file(old)
        shutil.rmtree(warehouse.tier, ignore_errors=True)
        file.parent.mkdir()
        file.write_bytes(b"of another length")
        if not applied_until_killed(warehouse.config, tmp_path / "plan.jsonl", None, step):
            break
        killed.append(warehouse.in_tier())
        assert killed[-1].pop(old) in (b"of another length", content(2, 3000)), step
        assert killed[-1].pop(new, content(1, 3000)) == content(1, 3000), step
        assert not killed[-1], step
    assert len(killed) > 10
    assert warehouse.in_tier() == warehouse.chunks
    assert warehouse.leftovers() == []
