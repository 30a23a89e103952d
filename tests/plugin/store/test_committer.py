"""Naming uploaded contents: many uploads share a call, a lone one waits for nobody."""

import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import AccessDeniedError, ItemFailure, TransportError
from hfbucket_plugin.store.committer import BatchCommitter
from tests.support.models import untimed
from tests.support.waiting import eventually


class Hub:
    """Names what it is told to, and remembers its calls."""

    def __init__(self):
        self.calls = []
        self.deadlines = []
        self.failing = {}
        self.error = None
        self.in_progress = 0
        self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()

    def add(self, files, deadline):
        with self._lock:
            self.calls.append(dict(files))
            self.deadlines.append(deadline)
            self.in_progress += 1
            self.most = max(self.most, self.in_progress)
        assert self.gate.wait(30)
        with self._lock:
            self.in_progress -= 1
        if self.error is not None:
            raise self.error
        return {path: ItemFailure(path, "hub", self.failing[path]) for path in files if path in self.failing}


def files(*numbers):
    return {f"v1/{number}": ContentId(f"{number:064x}", number + 1) for number in numbers}


def soon(seconds=60.0):
    return Deadline.after(seconds)


@pytest.fixture
def hub():
    return Hub()


@pytest.fixture
def make(hub):
    """Makes namers, and ends their threads."""
    made = []

    def committer(window_secs=3600.0):
        made.append(BatchCommitter(hub, window_secs))
        return made[-1]

    yield committer
    hub.gate.set()
    for one in made:
        one.close()


def quiet(committer):
    """Wait until no call is in progress or about to be made."""
    pool = committer._threads

    def is_idle():
        with pool._lock:
            return pool._idle == pool._threads and not pool._waiting

    return eventually(is_idle)


def upload(committer, *numbers, deadline=None):
    """As an upload does: it announces itself, and hands its contents over at its end."""
    with committer.expecting():
        return committer.name(files(*numbers), deadline or soon())


def test_a_lone_upload_is_named_at_its_end_and_waits_for_no_window(hub, make):
    committer = make()

    future = upload(committer, 1, 2)

    assert future.result(30) == {}
    assert hub.calls == [files(1, 2)]


def test_while_others_upload_contents_wait_and_the_last_one_names_them_all(hub, make):
    committer = make()
    first, second = committer.expecting(), committer.expecting()
    first.__enter__()
    second.__enter__()
    waiting = [upload(committer, 1), committer.name(files(2), soon())]
    first.__exit__(None, None, None)
    committer.flush(only_due=True)
    quiet(committer)
    assert hub.calls == []
    assert not any(future.done() for future in waiting)

    second.__exit__(None, None, None)

    assert [future.result(30) for future in waiting] == [{}, {}]
    assert hub.calls == [files(1, 2)]


def test_many_uploads_at_once_are_few_calls(hub, make):
    committer = make()
    barrier, futures = threading.Barrier(16), []

    def run(number):
        with committer.expecting():
            barrier.wait(30)
            futures.append(committer.name(files(number), soon()))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert [future.result(30) for future in futures] == [{}] * 16
    assert len(hub.calls) == 1, "all were in progress together"
    assert hub.calls[0] == files(*range(16))


def test_what_has_waited_for_the_window_is_named_though_others_upload(hub, make):
    committer = make(0.02)
    with committer.expecting():
        future = upload(committer, 1)

        eventually(lambda: committer.flush(only_due=True) or future.done())
        assert hub.calls == [files(1)]


def test_with_a_window_of_nothing_nothing_waits(hub, make):
    committer = make(0.0)
    with committer.expecting():
        assert upload(committer, 1).result(30) == {}
        assert hub.calls == [files(1)]


def test_what_must_be_named_now_is_named_during_any_upload(hub, make):
    committer = make()
    with committer.expecting():
        future = committer.name(files(1), soon())
        committer.flush(only_due=True)
        quiet(committer)
        assert not future.done()
        committer.flush(only_due=False)
        assert future.result(30) == {}
    committer.flush(only_due=False)
    quiet(committer)
    assert hub.calls == [files(1)], "where nothing waits nothing is asked"


def test_an_upload_that_fails_is_no_longer_waited_for(hub, make):
    committer = make()
    waiting = []

    def fail():
        with committer.expecting():
            waiting.append(upload(committer, 1))
            assert not waiting[0].done()
            raise TransportError("not uploaded")

    with pytest.raises(TransportError):
        fail()
    assert waiting[0].result(30) == {}


def test_failures_go_to_those_whose_items_they_are(hub, make):
    committer = make()
    hub.failing = {"v1/2": "no room", "v1/9": "nobody's"}
    with committer.expecting():
        first, second = committer.name(files(1, 2), soon()), committer.name(files(3), soon())

    assert first.result(30) == {"v1/2": ItemFailure("v1/2", "hub", "no room")}
    assert second.result(30) == {}


def test_a_path_that_two_hand_over_is_named_once_and_its_failure_told_to_both(hub, make):
    committer = make()
    hub.failing = {"v1/1": "no room"}
    with committer.expecting():
        both = [committer.name(files(1), soon()) for _ in range(2)]

    assert [list(one.result(30)) for one in both] == [["v1/1"]] * 2
    assert len(hub.calls) == 1


@pytest.mark.parametrize(
    ("error", "reported"),
    [
        (AccessDeniedError("no", 403), AccessDeniedError),
        (ZeroDivisionError("oops"), TransportError),
        (KeyboardInterrupt("stop"), TransportError),
    ],
    ids=repr,
)
def test_a_call_that_fails_fails_for_all_and_not_for_those_that_come_later(hub, make, error, reported):
    committer = make()
    hub.error = error
    with committer.expecting():
        waiting = [committer.name(files(number), soon()) for number in range(3)]

    for future in waiting:
        assert isinstance(future.exception(30), reported)
        assert str(future.exception()) == str(error)
    hub.error = None
    assert upload(committer, 1).result(30) == {}


def test_the_call_has_the_time_of_the_most_patient(hub, make):
    committer = make()
    with committer.expecting():
        for seconds in (5, 50, 20):
            committer.name(files(seconds), soon(seconds))

    eventually(lambda: hub.deadlines)
    assert 40 < hub.deadlines[0].remaining() <= 50


def test_contents_that_come_during_a_call_are_in_a_call_of_their_own_beside_it(hub, make):
    committer = make()
    hub.gate.clear()
    first = upload(committer, 1)
    eventually(lambda: hub.calls == [files(1)])

    second = upload(committer, 2)
    eventually(lambda: hub.calls == [files(1), files(2)])
    assert not first.done()
    assert not second.done()

    hub.gate.set()
    assert (first.result(30), second.result(30)) == ({}, {})


def test_handing_over_or_flushing_does_not_wait_for_the_hub(hub, make):
    committer = make()
    hub.gate.clear()

    waiting = [upload(committer, number) for number in range(6)]
    committer.flush(only_due=False)
    eventually(lambda: len(hub.calls) == 4)
    assert not any(one.done() for one in waiting)

    hub.gate.set()
    assert [one.result(30) for one in waiting] == [{}] * 6
    assert hub.most == 4, "so many calls at one time"


def test_after_close_nothing_is_named_and_waiters_are_told(hub, make):
    committer = make()
    with committer.expecting():
        waiting = committer.name(files(1), soon())
        committer.close()
        committer.close()
        late = committer.name(files(2), soon())

    for future in (waiting, late):
        assert isinstance(future.exception(30), TransportError)
        assert "closed" in str(future.exception())
    committer.flush(only_due=False)
    quiet(committer)
    assert hub.calls == []


def test_a_call_that_waits_for_a_thread_is_not_made_after_close(hub, make):
    committer = make()
    hub.gate.clear()
    waiting = [upload(committer, number) for number in range(5)]
    eventually(lambda: len(hub.calls) == 4)

    committer.close()
    hub.gate.set()

    assert isinstance(waiting[4].exception(30), TransportError)
    assert [one.result(30) for one in waiting[:4]] == [{}] * 4, "those in progress end by themselves"
    assert sorted(map(list, hub.calls)) == [[f"v1/{number}"] for number in range(4)]


def test_concurrent_flushes_name_each_content_once(hub, make):
    committer = make()
    with committer.expecting():
        futures = [committer.name(files(number), soon()) for number in range(50)]
        threads = [threading.Thread(target=committer.flush, kwargs={"only_due": False}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert [future.result(30) for future in futures] == [{}] * 50
    named = [path for call in hub.calls for path in call]
    assert len(named) == len(set(named)) == 50


steps = st.lists(st.tuples(st.sampled_from(["begin", "name", "end", "flush"]), st.integers(0, 5)), max_size=40)


@untimed
@given(steps)
def test_everything_is_named_once_and_never_while_an_upload_is_under_way(wanted):
    hub = Hub()
    committer = BatchCommitter(hub, 3600.0)
    open_, futures, number = [], [], 0
    for step, which in wanted:
        before = len(hub.calls)
        if step == "begin":
            open_.append(committer.expecting())
            open_[-1].__enter__()
        elif step == "name":
            futures.append(committer.name(files(number), soon()))
            number += 1
        elif step == "flush":
            committer.flush(only_due=True)
        elif open_:
            open_.pop(which % len(open_)).__exit__(None, None, None)
        quiet(committer)
        if len(hub.calls) > before:
            assert not open_
    for one in open_:
        one.__exit__(None, None, None)
    committer.flush(only_due=True)

    assert [future.result(30) for future in futures] == [{}] * number
    committer.close()
    named = [path for call in hub.calls for path in call]
    assert sorted(named) == sorted(f"v1/{one}" for one in range(number))


def test_the_window_begins_with_the_first_content_that_waits_and_again_after_a_call(hub, make, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hfbucket_plugin.store.committer.time", SimpleNamespace(monotonic=lambda: now[0]))
    committer = make(8.0)

    def name(number):
        committer.name(files(number), Deadline(1e9, 1e9))
        committer._waiting[-1].since = now[0]

    with committer.expecting():
        name(1)
        now[0] += 7.5
        name(2)
        committer.flush(only_due=True)
        quiet(committer)
        assert hub.calls == []
        now[0] += 0.5
        committer.flush(only_due=True)
        eventually(lambda: hub.calls == [files(1, 2)])
        name(3)
        now[0] += 7.5
        committer.flush(only_due=True)
        quiet(committer)
        assert len(hub.calls) == 1
