"""Locks and loads of many requests, in any order that LMCache may bring them in."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.l2_locks import Locks
from hfbucket_plugin.leases import Lease


class Request:
    """Looks keys up, loads them, and either fetches and unlocks, or is given up."""

    def __init__(self, locks, keys):
        self.locks, self.keys = locks, keys
        locks.add(keys)
        self.buffers = [SimpleNamespace(lease=Lease(memoryview(bytearray(4)))) for _ in keys]
        self.load = locks.begin(keys, self.buffers)
        self.state = "loading"

    def step(self, give_up):
        """The next thing that happens to it; whether there was one."""
        if self.state == "loading" and not give_up:
            self.locks.end(self.load)
            self.state = "ended"
        elif self.state in ("loading", "ended") and give_up:
            self.locks.unlock(self.keys)
            self.state = "late" if self.state == "loading" else "over"
        elif self.state == "ended":
            self.locks.fetched(self.load)
            self.locks.unlock(self.keys)
            self.state = "over"
        elif self.state == "late":
            self.locks.end(self.load)
            self.state = "over"
        else:
            return False
        return True

    @property
    def live(self):
        return all(buffer.lease.live for buffer in self.buffers)


keys = st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True)
steps = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=60)


def drive(requests, steps):
    for number, give_up in steps:
        request = requests[number % len(requests)]
        request.step(give_up)
        yield request


@given(wanted=st.lists(keys, min_size=1, max_size=6), steps=steps)
def test_what_is_given_up_writes_no_more_and_all_locks_are_taken_back(wanted, steps):
    locks = Locks()
    requests = [Request(locks, one) for one in wanted]

    for _ in drive(requests, steps):
        for request in requests:
            assert request.state != "late" or not request.live

    for request in requests:
        while request.step(give_up=False):
            pass
    assert len(locks) == 0
    assert (locks._running, locks._owed) == ({}, {})


@given(wanted=st.lists(keys, min_size=1, max_size=6), steps=steps)
def test_where_nothing_is_given_up_nothing_is_taken_back(wanted, steps):
    locks = Locks()
    requests = [Request(locks, one) for one in wanted]

    for request in drive(requests, [(number, False) for number, _ in steps]):
        assert request.live
    assert all(request.live for request in requests)


def test_what_is_locked_is_not_free():
    locks = Locks()
    locks.add(["a", "b", "a"])
    locks.unlock(["a", "b"])

    assert locks.free(["a", "b", "c"]) == ["b", "c"]
    assert len(locks) == 1
