"""Plans applied to a real tier from a real bucket, against a plain model of both, whatever happens in between."""

import random
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from warming import MODEL, Warehouse, content

from hfbucket_plugin.keys import ClassicKey, parse_key
from warmer.checking import NodeChecker
from warmer.choose import Choice
from warmer.cluster import Node
from warmer.interrupt import StopSwitch
from warmer.moving import schedule_of
from warmer.node import NodeWarmer
from warmer.nodes import Assigned
from warmer.outcomes import Copied, Failed, Missing, Present, Right, Wrong
from warmer.plan import PlanFile
from warmer.planning import Choosing
from warmer.tiers import open_tier
from warmer.warmup import Moving

KEYS = [f"{MODEL}@2@{worker}@{0xA00 + number:x}@half" for worker in range(2) for number in range(4)]
KEYS += [f"org/other@1@0@{0xB00 + number:x}@half" for number in range(2)]

keys = st.sampled_from(KEYS)
some_keys = st.lists(keys, unique=True, min_size=1, max_size=6)
choices = st.sampled_from(
    [{"all": True}, {"model": MODEL}, {"model": MODEL, "world_size": 2, "workers": "1"}, {"prefix": "org/o"}]
)
ranks = st.sampled_from([None, frozenset({0}), frozenset({1, 2})])


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
        choice = Choice.model_validate(given)
        choosing = Choosing(choice, ClassicKey, datetime.now(UTC))
        scratch = Path(self.held.name) / "scratch"
        path = Path(self.held.name) / "plan.jsonl"
        PlanFile.write(path, choosing.planned(self.warehouse.open(), scratch), lambda plan: {"n": plan.chunks})
        self.plan = PlanFile.open(path)  # as another process would
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
            own = [key for key in self.planned if ranks is None or "@1@0@" in key or int(key.split("@")[2]) in ranks]
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
        node = NodeWarmer(self.warehouse.open(), open_tier(self.warehouse.declaration()))
        try:
            bucket = self.warehouse.open()
            moving = Moving.model_validate({})
            schedule = schedule_of(moving, [Assigned(Node("n", "n"), ranks)], self.plan, bucket, StopSwitch())
            schedule.started("n")
            outcomes = []
            while not schedule.done and batches != 0:
                for order in schedule.orders(0.0):
                    ended = node.copy(order.chunks[:2] if batches else order.chunks)
                    outcomes += ended
                    if len(ended) == len(order.chunks):
                        schedule.fetched(order.number, ended, shared=False, now=0.0)
                batches = None if batches is None else 0
            return outcomes
        finally:
            node.close()

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
        from hfbucket_plugin.transfer import xet_hashes

        for data in (self.bucket.get(chunk.key), self.tier.get(chunk.key)):
            if data is not None:
                path = Path(self.held.name) / "hashed"
                path.write_bytes(data)
                if xet_hashes([path]) == [chunk.xet_hash]:
                    return data
        return None

    def teardown(self):
        if hasattr(self, "held"):
            assert not self.warehouse.tier.exists() or self.warehouse.leftovers() == []
            self.held.cleanup()


@pytest.mark.timeout(200)
def test_applying_plans(new_bucket, hub):
    run_state_machine_as_test(
        type("OnThisHub", (Applying,), {"hub": hub, "new_bucket": staticmethod(new_bucket)}),
        settings=settings(max_examples=20, stateful_step_count=12, deadline=None, database=None),
    )
