"""Puts that wait: bounded in bytes, refused beyond it, and every source given back once."""

import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import MemorySink, Telemetry
from hfbucket_plugin.errors import ItemFailure
from hfbucket_plugin.store import write_queue
from hfbucket_plugin.store.write import PutReport
from hfbucket_plugin.store.write_queue import PutQueue
from tests.support.models import untimed
from tests.support.waiting import eventually, in_threads


class Source:
    """One chunk, which knows how often it was given back."""

    def __init__(self, key, size):
        self.key = key
        self.view = memoryview(bytes(size))
        self.released = 0

    def release(self):
        self.released += 1
        assert self.released == 1, "given back twice"


class Writer:
    """Takes what it is given, as long as a test lets it through."""

    def __init__(self):
        self.gate = threading.Event()
        self.calls = []
        self.error = None
        self.held = 0
        self.most_held = 0
        self._lock = threading.Lock()

    def write_many(self, sources, size, deadline):
        with self._lock:
            self.calls.append([source.key for source in sources])
            self.held += sum(len(source.view) for source in sources)
            self.most_held = max(self.most_held, self.held)
        assert self.gate.wait(30)
        assert deadline.remaining() >= 0
        with self._lock:
            self.held -= sum(len(source.view) for source in sources)
        for source in sources:
            source.release()
        if self.error is not None:
            raise self.error
        failed = [ItemFailure(source.key, "hub", "no room") for source in sources if source.key.startswith("bad")]
        return PutReport(failed, [source.key for source in sources if not source.key.startswith("bad")])


class Queue:
    def __init__(self, limit, writers=1, role="read-write"):
        self.writer, self.tally = Writer(), MemorySink()
        settings = SimpleNamespace(max_waiting_put_bytes=limit, max_parallel_writes=writers, writes=role != "read-only")
        self.queue = PutQueue(self.writer, Telemetry("hfbucket", self.tally), settings)
        self.sources = []

    def put(self, *sizes, name="chunk"):
        sources = [Source(f"{name}-{len(self.sources) + number}", size) for number, size in enumerate(sizes)]
        self.sources += sources
        return sources, self.queue.submit(sources, 10, Deadline.after(600))

    def count(self, outcome):
        return self.tally.get(telemetry.CHUNKS, operation="put", outcome=outcome)

    def reported(self):
        """What the gauges say: calls and bytes."""
        return (
            self.tally.get(telemetry.IN_FLIGHT, operation="put"),
            self.tally.get(telemetry.WAITING_PUT_BYTES, instance="hfbucket"),
        )

    def settle(self):
        self.writer.gate.set()
        eventually(lambda: all(source.released for source in self.sources))
        eventually(lambda: self.queue.waiting_bytes == 0 and not self.queue.pending)
        assert self.reported() == (0, 0)


@pytest.fixture
def make():
    made = []

    def queue(*args, **options):
        made.append(Queue(*args, **options))
        return made[-1]

    yield queue
    for one in made:
        one.writer.gate.set()
        one.queue.close()


def test_a_put_is_handed_on_at_once_and_its_report_comes_back(make):
    one = make(100)
    one.writer.gate.set()
    sources, future = one.put(30, 40)

    assert future.result(30).stored == [source.key for source in sources]
    assert future.result().failures == []
    one.settle()


def test_of_a_put_that_does_not_fit_the_front_is_taken_and_the_rest_refused(make, caplog):
    one = make(100)
    sources, future = one.put(60, 30, 20, 5)

    assert [source.released for source in sources] == [0, 0, 1, 1], "what is refused is given back at once"
    assert one.queue.waiting_bytes == 90
    assert one.reported() == (1, 90)
    one.writer.gate.set()
    report = future.result(30)
    assert report.stored == ["chunk-0", "chunk-1"]
    assert [(failure.item, failure.kind) for failure in report.failures] == [
        ("chunk-2", "not_taken"),
        ("chunk-3", "not_taken"),
    ]
    assert "max_waiting_put_bytes (100)" in report.failures[0].message
    assert one.count("not_taken") == 2
    assert "2 chunks were not stored: more than max_waiting_put_bytes (100)" in caplog.text
    one.settle()


def test_what_is_full_refuses_and_takes_again_when_something_has_ended(make):
    one = make(100)
    one.put(100)
    eventually(lambda: one.writer.calls)

    refused, future = one.put(1)
    assert future.done()
    assert [failure.kind for failure in future.result().failures] == ["not_taken"]
    assert refused[0].released == 1

    one.writer.gate.set()
    eventually(lambda: one.queue.waiting_bytes == 0)
    _, future = one.put(100)
    assert future.result(30).failures == []
    one.settle()


def test_a_chunk_that_is_larger_than_the_bound_is_refused_though_nothing_waits(make):
    one = make(100)
    _, future = one.put(101, 1)

    assert [failure.kind for failure in future.result(30).failures] == ["not_taken"] * 2
    assert one.writer.calls == []
    one.settle()


def test_an_empty_put_is_done(make):
    one = make(100)
    _, future = one.put()

    assert future.result(0) == PutReport()
    assert one.writer.calls == []
    one.settle()


def test_a_read_only_instance_takes_nothing_and_warns_of_nothing(make, caplog):
    one = make(100, role="read-only")
    sources, future = one.put(10, 200)

    assert [failure.kind for failure in future.result(0).failures] == ["role", "role"]
    assert [source.released for source in sources] == [1, 1]
    assert one.count("role") == 2
    assert one.count("not_taken") == 0
    assert caplog.text == ""


def test_what_the_writer_could_not_store_is_told_with_what_was_refused(make):
    one = make(100)
    _, future = one.put(50, 60, name="bad")
    one.writer.gate.set()

    assert [(failure.item, failure.kind) for failure in future.result(30).failures] == [
        ("bad-0", "hub"),
        ("bad-1", "not_taken"),
    ]
    one.settle()


def test_a_writer_that_breaks_gives_its_room_back(make):
    one = make(100)
    one.writer.error = ZeroDivisionError("oops")
    _, future = one.put(100)
    one.writer.gate.set()

    with pytest.raises(ZeroDivisionError):
        future.result(30)
    one.writer.error = None
    eventually(lambda: one.queue.waiting_bytes == 0)
    assert one.put(100)[1].result(30).failures == []
    one.settle()


def test_a_put_that_is_cancelled_before_its_turn_gives_everything_back_and_one_in_progress_goes_on(make):
    one = make(1000)
    running, first = one.put(10)
    eventually(lambda: one.writer.calls)
    waiting, second = one.put(10, 10)

    assert second.cancel()
    assert not first.cancel()

    assert [source.released for source in waiting] == [1, 1]
    assert [source.released for source in running] == [0]
    assert one.queue.waiting_bytes == 10
    assert one.count("not_taken") == 2
    with pytest.raises(CancelledError):
        second.result(0)
    one.writer.gate.set()
    assert first.result(30).failures == []
    one.settle()
    assert len(one.writer.calls) == 1


def test_more_calls_than_may_wait_are_refused_whatever_their_bytes(make, monkeypatch):
    monkeypatch.setattr(write_queue, "_BACKLOG", 3)
    one = make(10**9)
    futures = [one.put(1)[1]]
    eventually(lambda: one.writer.calls)
    futures += [one.put(1)[1] for _ in range(5)]

    refused = [future for future in futures if future.done()]
    assert refused == futures[4:]
    assert {failure.kind for future in refused for failure in future.result().failures} == {"not_taken"}
    assert "takes no more" in refused[0].result().failures[0].message
    assert one.reported() == (4, 4)
    one.settle()
    assert [len(future.result(30).failures) for future in futures] == [0, 0, 0, 0, 1, 1]


def test_close_gives_up_what_waits_and_takes_no_more(make):
    one = make(1000)
    _, first = one.put(10)
    eventually(lambda: one.writer.calls)
    waiting, second = one.put(10)

    one.queue.close()
    one.queue.close()

    assert second.cancelled()
    assert waiting[0].released == 1
    late, third = one.put(10)
    assert [failure.kind for failure in third.result(0).failures] == ["not_taken"]
    assert late[0].released == 1
    assert not first.done(), "what is in progress is ended by closing the writer"
    one.settle()


@untimed
@given(limit=st.integers(0, 30), puts=st.lists(st.lists(st.integers(0, 12), max_size=6), max_size=8))
def test_of_each_put_as_many_from_the_front_are_taken_as_there_is_room_for(limit, puts):
    one = Queue(limit, writers=1)
    try:
        room = limit
        for sizes in puts:
            sources, future = one.put(*sizes)
            taken = 0
            while taken < len(sizes) and sizes[taken] <= room:
                room -= sizes[taken]
                taken += 1
            assert one.queue.waiting_bytes == limit - room
            assert [source.released for source in sources[taken:]] == [1] * (len(sizes) - taken)
            assert future.done() == (taken == 0)
        one.settle()
        assert one.count("not_taken") == sum(map(len, puts)) - sum(map(len, one.writer.calls))
    finally:
        one.writer.gate.set()
        one.queue.close()


def test_threads_together_never_have_more_waiting_than_the_bound(make):
    one = make(50, writers=4)
    one.writer.gate.set()
    highest = []

    def put(number):
        futures = []
        for _ in range(30):
            futures.append(one.put(7, 9, name=f"t{number}")[1])
            highest.append(one.queue.waiting_bytes)
        return sum(len(future.result(30).stored) for future in futures)

    stored = sum(in_threads(6, put))

    assert max(highest) <= 50
    assert one.writer.most_held <= 50
    assert stored + one.count("not_taken") == 6 * 30 * 2
    one.settle()
