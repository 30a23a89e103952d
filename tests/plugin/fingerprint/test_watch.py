"""When a watch asks, and what it believes meanwhile, on a real Hub with a clock of the test's."""

import threading
from types import SimpleNamespace

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import FINGERPRINT_STATE, MemorySink
from hfbucket_plugin.fingerprint.model import Fingerprint
from hfbucket_plugin.fingerprint.store import FingerprintStore
from hfbucket_plugin.fingerprint.watch import CONFLICT, UNKNOWN, FingerprintWatch
from localhub.faults import Fault
from tests.support.buckets import instance_settings, opened
from tests.support.waiting import Clock, eventually

MODEL = "org/model"


def engine(revision="v1"):
    return Fingerprint(mode="classic", model=MODEL, world_size=1, dtype="half", model_revision=revision)


class Rig:
    """A watch over a bucket in which `v1` is recorded."""

    def __init__(self, hub, bucket_id, bucket_client, **values):
        self.hub = hub
        self.clock = Clock()
        self.broken = False
        self.tally = MemorySink()
        settings = instance_settings(hub.endpoint, bucket_id, "kv", **values)
        breakers = SimpleNamespace(is_open=lambda part: self.broken and part == "lookup")
        self.watch = FingerprintWatch(bucket_client, settings, "hfbucket", breakers, self.tally, clock=self.clock)

    @property
    def calls(self):
        return self.hub.control.counters().route("paths-info").requests

    def reported(self, state):
        """Wait until a subject was found to be in a state."""
        eventually(lambda: self.tally.get(FINGERPRINT_STATE, state=state) == 1)


@pytest.fixture
def rigs(hub, bucket):
    with opened(hub.endpoint, bucket, "kv") as bucket_client:
        store = FingerprintStore(bucket_client, "first")
        store.record_first(engine(), Deadline.after(60))
        store.close()
        made = []

        def make(**values):
            made.append(Rig(hub, bucket, bucket_client, **values))
            hub.control.reset_counters()
            return made[-1]

        yield make
        hub.control.clear_faults()
        for one in made:
            one.watch.close()


def test_an_engine_that_starts_asks_once_and_again_when_it_is_time(rigs):
    rig = rigs(fingerprint_refresh_secs=100)
    subject = rig.watch.add(MODEL, engine)
    rig.reported("agrees")
    assert rig.calls == 1

    for _ in range(3):
        assert subject.refusal() is None
        assert subject.refusal(storing=True) is None
    rig.clock.now += 99
    subject.refusal()
    assert rig.calls == 1, "what is known is compared without asking"

    rig.clock.now += 2
    subject.refusal()
    eventually(lambda: rig.calls == 2)


def test_nothing_is_asked_while_the_breaker_is_open(rigs):
    rig = rigs(fingerprint="enforce")
    rig.broken = True
    subject = rig.watch.add(MODEL, engine)
    assert subject.refusal() == UNKNOWN
    rig.reported("unknown")
    assert rig.calls == 0

    rig.broken = False
    rig.clock.now += 2
    assert subject.refusal() == UNKNOWN
    eventually(lambda: subject.refusal() is None)
    assert rig.calls == 1


def test_what_fails_is_asked_again_and_again_less_often(rigs, hub):
    rig = rigs(fingerprint="enforce")
    fault = hub.control.add_fault(Fault(route="paths-info", status=403))
    subject = rig.watch.add(MODEL, engine)
    for seconds in (2, 4, 8, 16, 32, 60, 60):
        known = hub.control.hits(fault)
        eventually(lambda known=known: hub.control.hits(fault) > known or known)
        eventually(lambda: not rig.watch._known[MODEL].busy)
        before = hub.control.hits(fault)
        rig.clock.now += seconds - 1
        assert subject.refusal() == UNKNOWN
        assert hub.control.hits(fault) == before
        rig.clock.now += 1
        subject.refusal()
        eventually(lambda before=before: hub.control.hits(fault) > before)
        eventually(lambda: not rig.watch._known[MODEL].busy)

    hub.control.clear_faults()
    rig.clock.now += 60
    eventually(lambda: subject.refusal() is None)


def test_what_was_known_is_believed_while_the_hub_does_not_answer(rigs, hub):
    rig = rigs(fingerprint="enforce", fingerprint_refresh_secs=10)
    good, bad = rig.watch.add(MODEL, engine), rig.watch.add(MODEL, lambda: engine("v2"))
    eventually(lambda: good.refusal() is None and bad.refusal() == CONFLICT)
    fault = hub.control.add_fault(Fault(route="paths-info", status=403))

    rig.clock.now += 20
    good.refusal()
    eventually(lambda: hub.control.hits(fault))
    eventually(lambda: not rig.watch._known[MODEL].busy)

    assert good.refusal() is None
    assert bad.refusal() == CONFLICT


@pytest.mark.parametrize("revision", ["v1", "v2"])
def test_who_may_not_write_asks_no_more_than_others(rigs, hub, revision):
    """A fleet whose token can only read must not use its quota up with records that it may not write."""
    rig = rigs(fingerprint="warn", fingerprint_refresh_secs=100)
    fault = hub.control.add_fault(Fault(route="batch", status=403))
    subject = rig.watch.add(
        MODEL, lambda: engine(revision).model_copy(update={"world_size": 2 if revision == "v1" else 1})
    )
    subject.refusal(storing=True)
    eventually(lambda: hub.control.hits(fault) and not rig.watch._known[MODEL].busy)
    tried = hub.control.hits(fault)
    for _ in range(5):
        before = rig.calls
        rig.clock.now += 11
        subject.refusal(storing=True)
        eventually(lambda before=before: rig.calls > before and not rig.watch._known[MODEL].busy)

    assert hub.control.hits(fault) == tried
    assert rig.calls <= 8

    hub.control.clear_faults()
    rig.clock.now += 60
    subject.refusal(storing=True)
    kept = lambda: [c for c in rig.watch._store.claims(MODEL, Deadline.after(60)) if c.fingerprint == subject.facts()]  # noqa: E731
    eventually(kept)


@pytest.mark.parametrize(("fingerprint", "refusal"), [("warn", None), ("enforce", UNKNOWN)])
def test_facts_that_cannot_be_made_stop_no_engine(rigs, caplog, fingerprint, refusal):
    rig = rigs(fingerprint=fingerprint)

    def facts():
        raise AttributeError("another LMCache")

    subject = rig.watch.add(MODEL, facts)

    assert subject.refusal(storing=True) == refusal
    eventually(lambda: "another LMCache" in caplog.text)
    assert subject.refusal() == refusal


def test_what_was_found_out_about_earlier_facts_does_not_count(rigs):
    rig = rigs(fingerprint="enforce")
    asked, go = threading.Event(), threading.Event()
    revision = "v1"

    def facts():
        own = engine(revision)
        asked.set()
        go.wait(60)
        return own

    subject = rig.watch.add(MODEL, facts)
    assert asked.wait(60)
    revision = "v2"
    subject.changed()
    go.set()

    eventually(lambda: subject.state == "conflict")
    assert subject.refusal() == CONFLICT


def test_an_engine_that_is_dropped_is_forgotten(rigs):
    rig = rigs()
    subject = rig.watch.add(MODEL, lambda: engine("v2"))
    eventually(lambda: rig.watch.status() == [f"{MODEL}: model_revision is v1 in the bucket and v2 here"])

    rig.watch.drop(subject)

    assert rig.watch.status() == []
    assert subject.refusal() is None
