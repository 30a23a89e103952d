"""The breaker against a plain model, and its parts one by one."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hfbucket_plugin.hub.circuit_breaker import CircuitBreaker
from tests.support.models import untimed
from tests.support.waiting import Clock, in_threads

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
