"""Circuit breakers: their states, what opens and closes those of an instance, and their probes."""

import logging
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
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
from hfbucket_plugin.hub.circuit_breaker import _AT_ONCE, PARTS, CircuitBreaker, CircuitBreakers
from hfbucket_plugin.hub.transfer import xet_hashes
from localhub.faults import Fault
from tests.support.buckets import instance_settings
from tests.support.models import untimed
from tests.support.surface import content, store_of
from tests.support.waiting import Clock, eventually, in_threads

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
    assert caplog.text.count("[hfbucket.eu] breaker: read is disabled for now and probed in the background") == 1

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
    assert caplog.text.count("is disabled for now") == 3
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


JITTER = 0.2
STEADY = 60.0


class BreakerMachine(RuleBasedStateMachine):
    """What a breaker should do, step by step."""

    @initialize(limit=st.integers(1, 4), first=st.floats(0.5, 20), longest=st.floats(0.5, 40))
    def make(self, limit, first, longest):
        self.clock = Clock()
        self.limit, self.longest = limit, longest
        self.first = min(first, longest)
        self.breaker = CircuitBreaker(limit, first, longest, self.clock)
        self.in_a_row = 0
        self.open = False
        self.backoff = self.first
        self.since = None
        self.closed_at = None

    def _due_in(self, wait):
        """The next probe is due so many seconds from now, less some jitter, and the one after it twice that later."""
        self.due = (self.clock.now + wait * (1 - JITTER), self.clock.now + wait)
        self.backoff = min(self.longest, wait * 2)

    @rule()
    def fail(self):
        opened = self.breaker.failed()

        self.in_a_row += 1
        assert opened == (not self.open and self.in_a_row >= self.limit)
        if opened:
            self.open = True
            if self.closed_at is None or self.clock.now - self.closed_at >= STEADY:
                self.backoff = self.first
            self._due_in(self.backoff)

    @rule()
    def succeed(self):
        self.breaker.succeeded()

        if not self.open:
            self.in_a_row = 0

    @rule(well=st.booleans())
    def probe(self, well):
        self.breaker.probed(well=well)

        if not self.open:
            return
        if well:
            self.open, self.in_a_row, self.closed_at = False, 0, self.clock.now
        else:
            self._due_in(self.backoff)

    @rule(seconds=st.one_of(st.floats(0, 5), st.sampled_from([STEADY, STEADY - 0.1, 1000.0])))
    def wait(self, seconds):
        self.clock.now += seconds

    @invariant()
    def it_is_as_the_model_says(self):
        assert self.breaker.is_open == self.open
        if self.open:
            earliest, latest = self.due
            wait = self.breaker.probe_in
            assert wait >= 0
            assert earliest - self.clock.now - 1e-6 <= wait <= max(0.0, latest - self.clock.now) + 1e-6
            assert wait <= self.longest


TestBreaker = BreakerMachine.TestCase
TestBreaker.settings = untimed


def opened(failures=3, **options):
    clock = Clock()
    breaker = CircuitBreaker(failures, 1.0, 10.0, clock, **options)
    for _ in range(failures):
        breaker.failed()
    return clock, breaker


@pytest.mark.parametrize("limit", [1, 3])
def test_it_opens_after_so_many_failures_in_a_row_and_tells_so_once(limit):
    breaker = CircuitBreaker(limit, 1.0, 10.0)

    for _ in range(5):
        assert [breaker.failed() for _ in range(limit - 1)] == [False] * (limit - 1)
        breaker.succeeded()
        assert not breaker.is_open
    assert [breaker.failed() for _ in range(limit + 2)] == [False] * (limit - 1) + [True, False, False]
    assert breaker.is_open


def test_work_that_ends_well_late_does_not_close_it_only_a_probe_does():
    _, breaker = opened()

    breaker.succeeded()
    assert breaker.is_open
    breaker.probed(well=False)
    assert breaker.is_open
    breaker.probed(well=True)
    assert not breaker.is_open
    assert [breaker.failed() for _ in range(3)] == [False, False, True], "it counts from the start"


def probes_apart(clock, breaker, count):
    """Seconds between failing probes, jitter taken out as far as it can be known."""
    waits = []
    for _ in range(count):
        waits.append(breaker.probe_in)
        clock.now += waits[-1]
        breaker.probed(well=False)
    return waits


def test_probes_come_twice_as_far_apart_each_time_up_to_a_bound():
    clock, breaker = opened()

    for wait, wanted in zip(probes_apart(clock, breaker, 7), [1, 2, 4, 8, 10, 10, 10], strict=True):
        assert wanted * (1 - JITTER) <= wait <= wanted


@pytest.mark.parametrize(("quiet", "wanted"), [(59.9, 8), (60.1, 1)])
def test_one_that_opens_again_soon_goes_on_with_the_distance_that_it_had(quiet, wanted):
    clock, breaker = opened()
    probes_apart(clock, breaker, 2)  # 1, 2, and 4 to the third
    breaker.probed(well=True)

    clock.now += quiet
    for _ in range(3):
        breaker.failed()

    assert wanted * (1 - JITTER) <= breaker.probe_in <= wanted


def test_a_fleet_does_not_probe_in_step():
    waits = {opened()[1].probe_in for _ in range(50)}

    assert len(waits) > 40
    assert all(1 - JITTER <= wait <= 1 for wait in waits)


def test_of_many_threads_one_is_told_that_it_opened():
    breaker = CircuitBreaker(8, 1.0, 10.0)

    assert sorted(in_threads(16, lambda _number: breaker.failed())) == [False] * 15 + [True]


def opened_breaker(clock, failures=3, first=1.0, longest=8.0):
    breaker = CircuitBreaker(failures, first, longest, clock)
    for _ in range(failures):
        breaker.failed()
    assert breaker.is_open
    return breaker


@untimed
@given(st.integers(1, 6), st.lists(st.sampled_from(["failed", "succeeded"]), max_size=40))
def test_it_opens_on_so_many_failures_in_a_row_and_stays_open(limit, events):
    breaker = CircuitBreaker(limit, 1.0, 8.0, Clock())
    row, was_open = 0, False
    for event in events:
        opens = getattr(breaker, event)()
        row = row + 1 if event == "failed" else 0
        assert bool(opens) == (not was_open and row >= limit), "it says once that it opened"
        was_open = was_open or row >= limit
        assert breaker.is_open == was_open, "what was begun before it opened does not close it"


def test_probes_are_put_off_for_twice_as_long_each_time_up_to_a_bound():
    clock = Clock()
    breaker = opened_breaker(clock)
    for expected in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert 0.8 * expected <= breaker.probe_in <= expected
        clock.now += expected
        assert breaker.probe_in == 0
        breaker.probed(well=False)
    assert breaker.is_open


def test_a_probe_that_succeeds_closes_it_and_the_count_start_over():
    breaker = opened_breaker(Clock())
    breaker.probed(well=True)

    assert not breaker.is_open
    assert not breaker.failed()
    assert not breaker.is_open


@pytest.mark.parametrize(("steady", "expected"), [(1.0, 4.0), (100.0, 1.0)])
def test_one_that_opens_again_soon_goes_on_with_its_backoff(steady, expected):
    clock = Clock()
    breaker = opened_breaker(clock)
    clock.now += 1
    breaker.probed(well=False)  # the next one is due in 2 s, the one after it in 4
    clock.now += 2
    breaker.probed(well=True)
    clock.now += steady
    for _ in range(3):
        breaker.failed()

    assert 0.8 * expected <= breaker.probe_in <= expected


def test_after_two_bad_probes_one_request_is_tried_and_again_later():
    breaker = opened_breaker(Clock())
    assert not breaker.try_anyway()
    tried = []
    for probe in range(1, 13):
        breaker.probed(well=False)
        if breaker.try_anyway():
            tried.append(probe)
        assert not breaker.try_anyway(), "one"
        assert not breaker.failed()
        assert not breaker.succeeded(), "the one that was tried has failed"
        assert breaker.is_open

    assert tried == [2, 3, 4, 5, 8, 11]


def test_a_request_that_is_tried_and_succeeds_closes_it():
    breaker = opened_breaker(Clock())
    for _ in range(2):
        breaker.probed(well=False)
        assert not breaker.succeeded(), "begun before it opened"
    assert breaker.try_anyway()

    assert breaker.succeeded()

    assert not breaker.is_open
    assert not breaker.try_anyway()
    for _ in range(3):
        breaker.failed()
    assert breaker.is_open
    assert not breaker.succeeded(), "the trial was of another time"


# --- the three of an instance ----------------------------------------------------------------------------------------


@pytest.fixture
def tally():
    return MemorySink()


@pytest.fixture
def all_breakers(tally):
    made = []

    def make(probe, **values):
        values = {"breaker_probe_secs": 0.01, "breaker_max_probe_secs": 0.02} | values
        settings = instance_settings("http://127.0.0.1:1", "a/b", **values)
        made.append(CircuitBreakers(settings, "hfbucket", tally, dict.fromkeys(PARTS, probe)))
        return made[-1]

    yield make
    for breakers in made:
        breakers.close()


def fail(breakers, part="read", times=3):
    for _ in range(times):
        breakers.ended(part, TransportError("no answer"))


def test_a_part_that_fails_is_given_up_probed_told_and_taken_up_again(all_breakers, tally, caplog):
    caplog.set_level(logging.WARNING)
    well, probes = threading.Event(), []

    def probe():
        probes.append(1)
        if not well.is_set():
            raise DeadlineError("still no answer")

    breakers = all_breakers(probe)
    fail(breakers)

    assert breakers.is_open("read")
    assert not breakers.is_open("lookup")
    assert tally.get(telemetry.BREAKER_OPEN, part="read") == 1
    assert breakers.status().keys() == {"read"}
    with pytest.raises(BreakerOpenError, match="no answer"):
        breakers.check("read")
    breakers.check("write")
    eventually(lambda: len(probes) >= 3)
    assert "still no answer" in breakers.reason("read")

    well.set()
    eventually(lambda: not breakers.is_open("read"))
    breakers.check("read")
    eventually(lambda: tally.get(telemetry.BREAKER_OPEN, part="read") == 0)
    assert tally.get(telemetry.BREAKER_CHANGES, part="read", to="open") == 1
    eventually(lambda: tally.get(telemetry.BREAKER_CHANGES, part="read", to="closed") == 1)
    assert "read is disabled for now" in caplog.text
    eventually(lambda: "read works again" in caplog.text)


@pytest.mark.parametrize("error", [AccessDeniedError("no", 401), ThrottledError("later"), None], ids=str)
def test_an_answer_is_an_answer_though_it_refuses(all_breakers, error):
    breakers = all_breakers(lambda: None)
    fail(breakers, times=2)
    breakers.ended("read", error)
    fail(breakers, times=2)

    assert not breakers.is_open("read")


@pytest.mark.parametrize("error", [BudgetError("used up"), BreakerOpenError("open")], ids=str)
def test_what_was_never_asked_says_nothing(all_breakers, error):
    breakers = all_breakers(lambda: None, breaker_probe_secs=60, breaker_max_probe_secs=60)
    fail(breakers, times=2)
    breakers.ended("read", error)
    fail(breakers, times=1)

    assert breakers.is_open("read")


@pytest.mark.parametrize(
    ("part", "error", "closes"),
    [
        ("lookup", AccessDeniedError("no", 403), True),
        ("read", AccessDeniedError("no", 403), False),
        ("write", AccessDeniedError("no", 403), True),
        ("lookup", BucketMissingError("none"), True),
        ("read", ObjectMissingError("none"), True),
        ("lookup", ThrottledError("later"), False),
        ("read", BudgetError("used up"), False),
        ("read", ValueError(), False),
    ],
)
def test_what_a_probe_says(all_breakers, part, error, closes):
    probed = threading.Event()

    def probe():
        probed.set()
        raise error

    breakers = all_breakers(probe, breaker_max_probe_secs=60)
    fail(breakers, part)

    assert probed.wait(30)
    if closes:
        eventually(lambda: not breakers.is_open(part))
    else:
        eventually(lambda: "no answer" not in breakers.reason(part))
        assert breakers.is_open(part)


def test_an_open_breaker_whose_prober_could_not_start_is_probed_when_somebody_asks(all_breakers, monkeypatch):
    breakers = all_breakers(lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("no thread left")))
        fail(breakers)
    assert breakers.is_open("read")

    def works():
        try:
            breakers.check("read")
        except BreakerOpenError:
            return False
        return True

    assert eventually(works)


def test_a_closed_guard_probes_no_more(all_breakers):
    probes = []
    breakers = all_breakers(lambda: probes.append(1), breaker_probe_secs=60, breaker_max_probe_secs=60)
    fail(breakers)

    breakers.close()

    eventually(lambda: not [one for one in threading.enumerate() if one.name == "hfbucket-probe-hfbucket"])
    assert probes == []
    fail(breakers, "lookup")
    assert not breakers.is_open("lookup")


@pytest.fixture
def hash_of(tmp_path):
    """The Xet hash of a chunk's content."""

    def of(number):
        path = tmp_path / f"content-{number}"
        path.write_bytes(content(number))
        return xet_hashes([path])[0]

    return of


def served(surface, number):
    return surface.get([number])[0] is not None


QUICK = {"breaker_probe_secs": 0.05, "breaker_max_probe_secs": 0.1}


def opened_by_one_bad_content(hub, surface, xet_hash):
    hub.control.add_fault(Fault(route="reconstruction", path=xet_hash, status=500))
    eventually(lambda: not served(surface, 0) and store_of(surface).breakers.is_open("read"))


def test_a_content_that_cannot_be_read_does_not_keep_the_others_from_being_read(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)
    assert served(reader, 1)
    assert served(reader, 0)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    eventually(lambda: not store_of(reader).breakers.is_open("read"))
    assert reader.lookup([1]) == [True]
    assert served(reader, 1)
    assert eventually(lambda: reader.lookup([0]) == [False]), "what failed beside it is quarantined"


def test_where_no_other_content_is_known_a_real_request_closes_it(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)
    assert served(reader, 0)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    assert eventually(lambda: reader.lookup([1]) == [True])
    assert served(reader, 1)
    assert not store_of(reader).breakers.is_open("read")


def test_a_process_whose_first_gets_meet_one_bad_content_recovers(hub, surfaces, hash_of):
    surfaces().put([0, 1])
    reader = surfaces(breaker_failures=3, **QUICK)

    opened_by_one_bad_content(hub, reader, hash_of(0))

    assert eventually(lambda: reader.lookup([1]) == [True] and served(reader, 1))


@pytest.mark.parametrize("part", ["read", "write", "lookup"])
def test_a_probe_has_the_time_that_its_work_has(surfaces, monkeypatch, part):
    surface = surfaces()
    store = store_of(surface)
    worker = {"read": store._reader, "write": store._writer, "lookup": store._existence}[part]
    given = []
    monkeypatch.setattr(worker, "probe", given.append)

    store.breakers._probes[part]()

    limits = {
        "read": store._get_secs,
        "write": store.settings.put_timeout_secs,
        "lookup": store.settings.lookup_timeout_secs,
    }
    [deadline] = given
    assert deadline.seconds == limits[part]


def test_a_probe_of_writing_does_not_wait_behind_puts(surfaces):
    writer = store_of(surfaces(max_parallel_writes=1))._writer
    writer._threads.close()

    writer.probe(Deadline.after(30))
