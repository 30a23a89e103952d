"""The breakers of an instance: fed by work, probed by a thread of their own, told to the log and the metrics."""

import threading
from types import SimpleNamespace

import pytest

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BreakerOpenError,
    BucketMissingError,
    BudgetError,
    DeadlineError,
    IntegrityError,
    ObjectMissingError,
    RevokedError,
    ThrottledError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.circuit_breaker import _AT_ONCE, PARTS, CircuitBreakers
from tests.support.waiting import eventually, in_threads

SECRETLY_FAR = 3600.0


class Probes:
    """A probe of each part: raises what a test says, and counts."""

    def __init__(self):
        self.errors = dict.fromkeys(PARTS, TransportError("still out"))
        self.calls = dict.fromkeys(PARTS, 0)
        self.threads = set()
        self.hold = threading.Event()
        self.hold.set()

    def of(self, part):
        def probe():
            self.threads.add(threading.current_thread())
            self.calls[part] += 1
            assert self.hold.wait(30)
            if (error := self.errors[part]) is not None:
                raise error

        return probe

    def recovers(self, part):
        self.errors[part] = None


class Guarded:
    def __init__(self, failures, first, longest):
        self.tally, self.probes = MemorySink(), Probes()
        settings = SimpleNamespace(breaker_failures=failures, breaker_probe_secs=first, breaker_max_probe_secs=longest)
        self.breakers = CircuitBreakers(
            settings, "hfbucket.eu", self.tally, {part: self.probes.of(part) for part in PARTS}
        )

    def open(self, part, *, words="cannot be reached"):
        while not self.breakers.is_open(part):
            self.breakers.failed(part, TransportError(words))

    def gauge(self, part):
        return self.tally.get(telemetry.BREAKER_OPEN, instance="hfbucket.eu", part=part)

    def changes(self, part, to):
        return self.tally.get(telemetry.BREAKER_CHANGES, instance="hfbucket.eu", part=part, to=to)


@pytest.fixture
def make():
    made = []

    def guarded(failures=2, first=0.005, longest=0.01):
        made.append(Guarded(failures, first, longest))
        return made[-1]

    yield guarded
    for one in made:
        one.probes.hold.set()
        one.breakers.close()


@pytest.fixture
def far(make):
    """One whose probes are never due."""
    return make(first=SECRETLY_FAR, longest=SECRETLY_FAR)


def test_at_first_everything_works_and_the_gauges_say_so(make):
    one = make()

    for part in PARTS:
        one.breakers.check(part)
        assert not one.breakers.is_open(part)
        assert one.tally._counts[telemetry.BREAKER_OPEN, (("instance", "hfbucket.eu"), ("part", part))] == 0
    assert one.breakers.status() == {}
    assert one.breakers._prober is None, "as long as all is well there is no thread"


def test_a_part_is_given_up_after_so_many_failures_in_a_row_and_the_others_are_not(far, caplog):
    far.breakers.failed("read", TransportError("once"))
    far.breakers.succeeded("read")
    far.breakers.failed("read", TransportError("twice"))
    far.breakers.check("read")

    far.breakers.failed("read", TransportError("the store is gone"))

    with pytest.raises(
        BreakerOpenError, match=r"'hfbucket\.eu': read: not tried, since the store is gone; probed again in \d+\.\d s"
    ):
        far.breakers.check("read")
    far.breakers.check("lookup")
    far.breakers.check("write")
    assert far.breakers.status() == {"read": "the store is gone"}
    assert [far.gauge(part) for part in PARTS] == [0, 1, 0]
    assert (far.changes("read", "open"), far.changes("read", "closed")) == (1, 0)
    assert caplog.text.count("[hfbucket.eu] breaker: read is given up for now and probed in the background") == 1

    far.breakers.failed("read", TransportError("and still"))
    assert far.breakers.reason("read") == "the store is gone", "why it opened is what is told"
    assert far.changes("read", "open") == 1


@pytest.mark.parametrize(
    ("error", "opens"),
    [
        (TransportError("x"), True),
        (DeadlineError("x"), True),
        (UnsentError("x"), False),
        (RevokedError("x"), False),
        (BudgetError("x"), False),
        (BreakerOpenError("x"), False),
        (ThrottledError("x"), False),
        (AccessDeniedError("x", 401), False),
        (BucketMissingError("x"), False),
        (ObjectMissingError("x"), False),
        (IntegrityError("x"), False),
        (None, False),
    ],
    ids=repr,
)
def test_only_failures_in_transport_speak_against_a_part(far, error, opens):
    for _ in range(5):
        far.breakers.ended("lookup", error)

    assert far.breakers.is_open("lookup") == opens


def test_when_all_is_well_again_there_is_no_thread_any_more(make):
    one = make()
    one.open("lookup")
    eventually(lambda: one.probes.calls["lookup"] >= 3)
    one.probes.recovers("lookup")
    eventually(lambda: not one.breakers.is_open("lookup"))

    eventually(lambda: one.breakers._prober is None)
    [prober] = one.probes.threads
    prober.join(30)
    assert not prober.is_alive()
    assert one.breakers.status() == {}
    assert one.probes.calls["read"] == one.probes.calls["write"] == 0


def test_it_opens_and_recovers_again_and_again(make):
    one = make()
    for round_ in range(1, 6):
        one.probes.errors["write"] = TransportError("out again")
        one.open("write")
        one.probes.recovers("write")
        eventually(lambda: not one.breakers.is_open("write"))
        eventually(lambda expected=round_: one.changes("write", "closed") == expected)
        one.breakers.check("write")
    assert one.changes("write", "open") == 5


class Panic(BaseException):
    """As hf_xet's: no `Exception`."""


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), Panic("oops")], ids=repr)
def test_a_probe_that_breaks_does_not_end_the_probing(make, error):
    one = make()
    one.probes.errors["read"] = error
    one.open("read")

    eventually(lambda: one.probes.calls["read"] >= 3)
    assert one.breakers.is_open("read")
    assert one.breakers.reason("read") == f"the probe failed: {type(error).__name__}: oops"
    one.probes.recovers("read")
    eventually(lambda: not one.breakers.is_open("read"))


def test_one_thread_probes_all_that_is_open_and_what_opens_meanwhile(make):
    one = make()
    one.breakers._breakers["lookup"]._first = one.breakers._breakers["lookup"]._backoff = SECRETLY_FAR
    one.open("lookup")
    eventually(lambda: one.breakers._wake._cond._waiters)

    one.open("read")  # due at once, while the thread waits for what is due in an hour
    one.open("write")
    one.probes.recovers("write")
    eventually(lambda: not one.breakers.is_open("write"))
    one.probes.recovers("read")
    eventually(lambda: not one.breakers.is_open("read"))

    assert len(one.probes.threads) == 1
    assert one.breakers.is_open("lookup")
    assert one.probes.calls["lookup"] == 0


def test_after_close_nothing_is_probed_or_counted_any_more(make, caplog):
    one = make()
    one.probes.hold.clear()
    one.open("read")
    eventually(lambda: one.probes.calls["read"] == 1)
    [prober] = one.probes.threads

    one.breakers.close()
    one.breakers.close()
    one.probes.hold.set()

    prober.join(30)
    assert not prober.is_alive()
    assert one.probes.calls["read"] == 1
    for _ in range(5):
        one.breakers.failed("write", TransportError("an end of ours, no failure of theirs"))
    assert not one.breakers.is_open("write")
    assert "write is given up" not in caplog.text


def probers():
    return {one for one in threading.enumerate() if one.name == "hfbucket-probe-hfbucket.eu"}


def test_many_threads_at_once_open_a_breaker_once(far, caplog):
    before = probers()

    in_threads(16, lambda number: [far.breakers.failed(PARTS[number % 3], TransportError("x")) for _ in range(10)])

    assert sorted(far.breakers.status()) == sorted(PARTS)
    assert [far.changes(part, "open") for part in PARTS] == [1, 1, 1]
    assert caplog.text.count("is given up for now") == 3
    assert len(probers() - before) == 1


# --- one real request, and probes that take long ------------------------------------------------------------------------


def admits(breakers, part, keys=(), *, found=False):
    try:
        breakers.admit(part, keys, found=found)
    except BreakerOpenError:
        return False
    return True


def test_a_part_whose_probes_fail_for_a_reason_of_their_own_is_closed_by_work(make):
    one = make()
    one.open("write")
    eventually(lambda: one.probes.calls["write"] >= 3)

    eventually(lambda: admits(one.breakers, "write"))
    one.breakers.ended("write", None)

    assert not one.breakers.is_open("write")
    assert one.changes("write", "closed") == 1
    assert one.gauge("write") == 0
    eventually(lambda: one.breakers._prober is None)


def test_a_lookup_that_is_let_through_lets_one_get_of_its_keys_through(far):
    far.open("read")
    assert not admits(far.breakers, "read", ["a"])
    for _ in range(2):
        far.breakers._breakers["read"].probed(well=False)

    assert admits(far.breakers, "read", ["a", "b"])
    assert not admits(far.breakers, "read", ["a", "b"]), "one lookup"
    assert not admits(far.breakers, "read", ["c"], found=True), "another's get"
    assert admits(far.breakers, "read", ["b", "c"], found=True)
    assert not admits(far.breakers, "read", ["a"], found=True), "one get"
    far.breakers.succeeded("read")
    assert admits(far.breakers, "read", ["d"])


def test_a_get_without_a_lookup_may_be_the_one(far):
    far.open("read")
    for _ in range(2):
        far.breakers._breakers["read"].probed(well=False)

    assert admits(far.breakers, "read", ["a"], found=True)
    assert not admits(far.breakers, "read", ["a"], found=True)


def test_a_probe_that_takes_long_holds_up_no_other_and_may_still_close_its_breaker(make, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.hub.circuit_breaker._OVERLAP_SECS", 0.05)
    one = make(longest=0.05)
    one.probes.hold.clear()
    one.probes.errors["read"] = None
    slow = one.breakers._probes["read"]
    one.breakers._probes["read"] = lambda: slow() if not one.probes.calls["read"] else one.probes.of("lookup")()
    one.open("read")
    eventually(lambda: one.probes.calls["read"])

    one.breakers._probes["write"] = lambda: None
    one.open("write")
    eventually(lambda: not one.breakers.is_open("write"))
    assert one.breakers.is_open("read"), "undecided"
    one.probes.hold.set()

    eventually(lambda: not one.breakers.is_open("read"))
    eventually(lambda: one.breakers._prober is None)


def test_probes_that_all_hang_are_bounded_in_number(make, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.hub.circuit_breaker._OVERLAP_SECS", 0.005)
    one = make()
    one.probes.hold.clear()
    one.open("read")
    eventually(lambda: one.probes.calls["read"] == _AT_ONCE)
    eventually(lambda: one.breakers._wake._cond._waiters)

    assert one.probes.calls["read"] == _AT_ONCE
    one.probes.recovers("read")
    one.probes.hold.set()
    eventually(lambda: not one.breakers.is_open("read"))
    eventually(lambda: not any(one.breakers._probing.values()))
    assert one.changes("read", "closed") == 1
