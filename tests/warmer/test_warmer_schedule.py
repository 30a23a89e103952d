"""The schedule against a simulated fleet: nodes that work at any pace, and are lost at any moment."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from warmer.plan import PlannedChunk
from warmer.schedule import Batch, Schedule, Window

windows = st.builds(
    Window,
    batch_chunks=st.integers(1, 5),
    batch_bytes=st.integers(1, 50),
    chunks=st.integers(1, 8),
    bytes=st.integers(1, 80),
)
sizes = st.lists(st.integers(0, 100), max_size=30)


def plan(chunk_sizes):
    return [PlannedChunk(f"key-{n}", f"path-{n}", "00" * 32, size) for n, size in enumerate(chunk_sizes)]


class Fleet(RuleBasedStateMachine):
    """Every chunk ends exactly once for each node that it is for, in order, and no window is ever passed."""

    @initialize(
        window=windows, chunk_sizes=sizes, nodes=st.integers(0, 4), shortcut=st.booleans(), ranks=st.integers(1, 3)
    )
    def begin(self, window, chunk_sizes, nodes, shortcut, ranks):
        self.window = window
        self.plan = plan(chunk_sizes)
        self.names = [f"node-{n}" for n in range(nodes)]
        rest = (lambda start: iter(self.plan[start:])) if shortcut else None
        # With one rank all nodes take all; with more, each takes some of the chunks, or none.
        wanted = {name: number % ranks for number, name in enumerate(self.names)}
        self.own = {
            name: [chunk for number, chunk in enumerate(self.plan) if number % ranks == wanted[name]]
            for name in self.names
        }
        own = {name: set(chunks) for name, chunks in self.own.items()}
        takes = lambda node, chunk: chunk in own[node]  # noqa: E731
        self.schedule = Schedule(self.names, lambda: iter(self.plan), window, rest, takes)
        self.flying: list[Batch] = []
        self.given = {name: [] for name in self.names}
        self.ended = {name: Counter() for name in self.names}

    def alive(self):
        return self.schedule.nodes

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def feed(self, data):
        name = data.draw(st.sampled_from(self.alive()))
        batch = self.schedule.next_batch(name)
        if batch is None:
            left = self.own[name][len(self.given[name]) :]
            assert not left or self.under_way(name), "an idle node with work left is given some"
            return
        assert batch.node == name
        assert batch.chunks
        assert len(batch.chunks) <= self.window.batch_chunks
        assert batch.bytes <= self.window.batch_bytes or len(batch.chunks) == 1
        self.given[name] += batch.chunks
        self.flying.append(batch)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def finish(self, data):
        batch = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        self.schedule.finished(batch)
        self.ended[batch.node].update(batch.chunks)
        with pytest.raises(KeyError):
            self.schedule.finished(batch)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def lose(self, data):
        name = data.draw(st.sampled_from(self.alive()))
        flying = self.under_way(name)
        self.flying = [batch for batch in self.flying if batch.node != name]
        rest = self.schedule.lost(name)
        assert name not in self.alive()  # at once, not when the rest was read
        self.ended[name].update(rest)
        assert self.ended[name] == Counter(self.own[name])
        for batch in flying:
            with pytest.raises(KeyError):
                self.schedule.finished(batch)
        with pytest.raises(KeyError):
            self.schedule.next_batch(name)

    @rule()
    def rest(self):
        """Nothing happens: there is always something that may."""

    def under_way(self, name):
        return [batch for batch in self.flying if batch.node == name]

    @invariant()
    def windows_hold(self):
        for name in getattr(self, "names", []):
            chunks = [chunk for batch in self.under_way(name) for chunk in batch.chunks]
            assert len(chunks) <= self.window.chunks
            assert sum(chunk.size for chunk in chunks) <= self.window.bytes or len(chunks) == 1

    @invariant()
    def order_holds(self):
        for name in getattr(self, "names", []):
            assert self.given[name] == self.own[name][: len(self.given[name])]

    @invariant()
    def done_means_done(self):
        if hasattr(self, "schedule"):
            complete = all(self.ended[name] == Counter(self.own[name]) for name in self.names)
            assert self.schedule.done == complete

    def teardown(self):
        """Whatever happened, what is left can be carried out to the end."""
        if not hasattr(self, "schedule"):
            return
        while not self.schedule.done:
            for name in self.alive():
                while (batch := self.schedule.next_batch(name)) is not None:
                    self.flying.append(batch)
            for batch in self.flying:
                self.schedule.finished(batch)
                self.ended[batch.node].update(batch.chunks)
            self.flying = []
        assert all(ended == Counter(self.own[name]) for name, ended in self.ended.items())


Fleet.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFleet = Fleet.TestCase


@given(sizes)
def test_a_schedule_reads_no_further_than_its_windows(chunk_sizes):
    read = 0

    def chunks():
        nonlocal read
        for chunk in plan(chunk_sizes):
            read += 1
            yield chunk

    schedule = Schedule(["node"], chunks, Window(batch_chunks=2, batch_bytes=100, chunks=4, bytes=10**6))
    while schedule.next_batch("node") is not None:
        pass
    assert read <= 5  # four under way, and one looked at


def test_by_default_two_batches_are_under_way():
    schedule = Schedule(["node"], lambda: iter(plan([1024 * 1024] * 200)))
    batches = [schedule.next_batch("node"), schedule.next_batch("node")]
    assert [len(batch.chunks) for batch in batches] == [64, 64]
    assert schedule.next_batch("node") is None


def test_a_chunk_larger_than_the_window_goes_alone():
    schedule = Schedule(["node"], lambda: iter(plan([1, 10**12, 1])))
    first = schedule.next_batch("node")
    assert [chunk.size for chunk in first.chunks] == [1]
    assert schedule.next_batch("node") is None
    schedule.finished(first)
    assert [chunk.size for chunk in schedule.next_batch("node").chunks] == [10**12]


def test_a_slow_node_holds_up_no_other():
    schedule = Schedule(["slow", "fast"], lambda: iter(plan([1] * 1000)))
    schedule.next_batch("slow")
    done = 0
    while (batch := schedule.next_batch("fast")) is not None:
        schedule.finished(batch)
        done += len(batch.chunks)
    assert done == 1000


def test_no_nodes_and_no_chunks_are_done_at_once():
    assert Schedule([], lambda: iter(plan([1]))).done
    assert Schedule(["node"], lambda: iter([])).done


def test_a_window_without_room_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Window(chunks=0)


def test_no_more_batches_are_under_way_than_an_actor_has_slots_for():
    mib = 1024 * 1024
    schedule = Schedule(["node"], lambda: iter(plan([n * mib for n in (11, 23, 25, 33, 40, 42)])))

    assert [schedule.next_batch("node") is not None for _ in range(4)] == [True, True, False, False]
