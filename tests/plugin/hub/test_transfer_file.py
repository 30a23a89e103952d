import errno
import itertools
import os
import select
import threading
import time

import pytest

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import (
    AccessDeniedError,
    DeadlineError,
    IntegrityError,
    LocalFileError,
    MissingError,
    RevokedError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub import xet_session
from hfbucket_plugin.hub.transfer import DownloadToBuffer, DownloadToFile
from localhub.faults import Fault
from tests.support.buckets import noise, opened, upload
from tests.support.waiting import eventually

SIZE = 600_000
DATA = noise(SIZE)
BIG = noise(9 * 1024 * 1024 + 17, seed=1)
BOUND = 5.0
"""What has a deadline of half a second ends before this many seconds, however slow the machine is."""


@pytest.fixture
def bucket_client(hub, bucket):
    with opened(hub.endpoint, bucket) as one:
        yield one


@pytest.fixture
def into(tmp_path):
    """Makes reads into files of one directory."""
    directory = tmp_path / "drafts"
    directory.mkdir()
    return lambda content, name="x": DownloadToFile(name, content, directory / f"{name}.part")


def stored(bucket_client, hub, files):
    upload(hub.endpoint, bucket_client.handle.bucket_id, files)
    found = bucket_client.stat(list(files), Deadline.after(60))
    return {path: found[path].content for path in files}


def read(bucket_client, *reads, secs=60.0):
    bucket_client.transfer.read(reads, Deadline.after(secs))


def hanging(hub, bucket_client, one):
    """A thread that reads, and hangs."""
    number = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    thread = threading.Thread(target=read, args=(bucket_client, one))
    thread.start()
    eventually(lambda: hub.control.hits(number))
    return thread


def left(one):
    return sorted(path.name for path in one.path.parent.iterdir())


def test_files_appear_as_the_objects_are(hub, bucket_client, into):
    files = {"none": b"", "a": DATA, "big": BIG}
    contents = stored(bucket_client, hub, files)
    reads = {name: into(content, name) for name, content in contents.items()}
    read(bucket_client, *reads.values())
    assert {name: one.path.read_bytes() for name, one in reads.items()} == files
    assert all(one.done and one.error is None for one in reads.values())
    assert left(reads["a"]) == ["a.part", "big.part", "none.part"]


def test_files_and_buffers_are_filled_by_one_call(hub, bucket_client, into):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    buffer, one = bytearray(SIZE), into(content)
    other = DownloadToBuffer("b", content, RevocableBuffer(memoryview(buffer)))
    read(bucket_client, one, other)
    assert one.path.read_bytes() == bytes(buffer) == DATA


def test_nothing_of_a_file_passes_through_a_buffer_of_ours(hub, bucket_client, into, monkeypatch):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    monkeypatch.setattr(RevocableBuffer, "write", lambda *_: pytest.fail("a lease was written to"))
    read(bucket_client, one := into(content))
    assert one.done


def test_a_group_is_followed_by_another_before_it_has_grown(hub, bucket_client, into, monkeypatch):
    monkeypatch.setattr(xet_session, "_FILES_OF_A_GROUP", 3)
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    bucket_client.transfer.warm_up(Deadline.after(60))
    session = bucket_client.transfer._reading._current
    groups = set()
    for number in range(7):
        read(bucket_client, one := into(content, str(number)))
        assert one.path.read_bytes() == DATA
        groups.add(id(session._files))
        session.kept = [*getattr(session, "kept", ()), session._files]  # so that no two have one id
    assert len(groups) == 3
    assert bucket_client.transfer._reading._current is session


FAULTS = {
    "no such file": ({"route": "reconstruction", "status": 404}, MissingError),
    "no such xorb": ({"route": "xorb-data", "status": 404}, MissingError),
    "store denies": ({"route": "reconstruction", "status": 401}, AccessDeniedError),
    "store forbids": ({"route": "reconstruction", "status": 403}, AccessDeniedError),
    "link forbidden": ({"route": "xorb-data", "status": 403}, AccessDeniedError),
    "store throttles": ({"route": "reconstruction", "status": 429}, ThrottledError),
    "data throttled": ({"route": "xorb-data", "status": 429}, ThrottledError),
    "store fails": ({"route": "reconstruction", "status": 500}, TransportError),
    "data fails": ({"route": "xorb-data", "status": 500}, TransportError),
    "plan is garbage": ({"route": "reconstruction", "status": 200, "body": "garbage"}, TransportError),
    "plan is empty": ({"route": "reconstruction", "status": 200, "body": "{}"}, (TransportError, IntegrityError)),
    "data is garbage": ({"route": "xorb-data", "status": 200, "body": "garbage"}, TransportError),
    "data is cut": ({"route": "xorb-data", "truncate_at": SIZE // 2}, TransportError),
    "data is cut at once": ({"route": "xorb-data", "truncate_at": 0}, TransportError),
    "connection reset": ({"route": "xorb-data", "reset": True}, TransportError),
    "plan reset": ({"route": "reconstruction", "reset": True}, TransportError),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_a_typed_failure_that_leaves_no_file_and_passes(hub, bucket_client, into, fault, expected):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    hub.control.add_fault(Fault(**fault))

    read(bucket_client, one := into(content))  # unlike with streams, the reason is never lost

    assert isinstance(one.error, expected), one.error
    assert not isinstance(one.error, LocalFileError)
    assert "x" in str(one.error)
    assert not one.done
    assert left(one) == []
    hub.control.clear_faults()

    def good():
        read(bucket_client, again := into(content, "again"))
        return again.done and again.path.read_bytes() == DATA

    eventually(good)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_the_store_refuses_once_is_replaced(hub, bucket, into, status):
    tally = MemorySink()
    with opened(hub.endpoint, bucket, sink=tally) as bucket_client:
        content = stored(bucket_client, hub, {"a": DATA})["a"]
        read(bucket_client, into(content, "first"))
        hub.control.add_fault(Fault(route="reconstruction", times=1, status=status))
        read(bucket_client, one := into(content))
        assert one.path.read_bytes() == DATA
        assert left(one) == ["first.part", "x.part"]
        assert tally.get(telemetry.HUB_REQUESTS, route="xet-read-token") == 2


def test_one_bad_object_does_not_harm_its_neighbours(hub, bucket_client, into):
    contents = stored(bucket_client, hub, {"a": DATA, "b": noise(SIZE, 2)})
    bad = into(ContentId("0" * 63 + "1", SIZE), "bad")
    good = [into(content, name) for name, content in contents.items()]
    read(bucket_client, good[0], bad, good[1])
    assert [one.done for one in (*good, bad)] == [True, True, False]
    assert isinstance(bad.error, MissingError)


@pytest.mark.parametrize("wrong", [-100, 100])
def test_an_object_of_another_size_than_listed_is_never_done_as_a_whole(hub, bucket_client, into, wrong):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    read(bucket_client, one := into(ContentId(content.xet_hash, SIZE + wrong)))
    if wrong < 0:  # the store sends as many bytes as it is asked for: that these are not the object is told by the hash
        assert one.path.read_bytes() == DATA[:wrong]
    else:
        assert isinstance(one.error, IntegrityError)
        assert not one.done
        assert left(one) == []


def test_a_file_that_came_out_short_is_no_chunk(hub, bucket_client, into, monkeypatch):
    content = stored(bucket_client, hub, {"a": DATA})["a"]

    def short(self, handle):
        handle.result()
        os.truncate(self.path, SIZE - 1)

    monkeypatch.setattr(DownloadToFile, "_wait", short)
    read(bucket_client, one := into(content))
    assert isinstance(one.error, IntegrityError)
    assert left(one) == []


@pytest.mark.parametrize("route", ["reconstruction", "xorb-data", "xet-read-token"])
@pytest.mark.parametrize("fault", [{"hang": True}, {"trickle_bytes": 2, "trickle_interval_s": 0.05}], ids=str)
def test_after_the_deadline_the_waiter_is_free_and_service_resumes(hub, bucket, into, route, fault):
    with opened(hub.endpoint, bucket, get_secs=0.5, put_timeout_secs=0.5) as hasty:
        contents = stored(hasty, hub, {f"p{number}": noise(SIZE, number) for number in range(4)})
        hub.control.add_fault(Fault(route=route, **fault))
        reads = [into(content, name) for name, content in contents.items()]
        started = time.monotonic()

        read(hasty, *reads, secs=0.5)

        assert time.monotonic() - started < BOUND
        assert all(isinstance(one.error, TransportError) and not one.done for one in reads)
        hub.control.clear_faults()
        eventually(lambda: left(reads[0]) == [])

        def good():
            read(hasty, again := into(contents["p1"], "again"))
            return again.done

        eventually(good)


def test_giving_up_frees_the_waiters_at_once(hub, bucket_client, into):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    one = into(content)
    thread = hanging(hub, bucket_client, one)
    one.give_up()
    one.give_up()
    thread.join(BOUND)
    assert not thread.is_alive()
    assert not one.done
    assert left(one) == []


@pytest.mark.parametrize("size", [0, SIZE])
def test_what_was_given_up_before_is_not_begun(hub, bucket_client, into, size):
    content = stored(bucket_client, hub, {"a": DATA[:size]})["a"]
    one = into(content)
    one.give_up()
    read(bucket_client, one)
    assert not one.done
    assert isinstance(one.error, RevokedError)
    assert left(one) == []


def test_a_disk_that_is_full_is_told_apart_from_the_store(hub, bucket_client, into):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    one = into(content)
    one.path.symlink_to("/dev/full")
    read(bucket_client, one)
    assert isinstance(one.error, LocalFileError)
    assert one.error.number == errno.ENOSPC
    assert str(one.path) in str(one.error)
    assert "No space left" in str(one.error)
    assert left(one) == []


@pytest.mark.parametrize("size", [0, SIZE])
def test_a_file_that_cannot_be_made_is_told_apart_from_the_store(hub, bucket_client, into, tmp_path, size):
    content = stored(bucket_client, hub, {"a": DATA[:size]})["a"]
    (tmp_path / "no-directory").write_bytes(b"")
    one = DownloadToFile("x", content, tmp_path / "no-directory" / "x.part")
    read(bucket_client, one)
    assert isinstance(one.error, LocalFileError), one.error
    assert not one.done


def blocked_disk(path):
    """A file that takes nothing, and blocks its writer until what is returned is closed."""
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


@pytest.mark.parametrize("how", ["deadline", "close"])
def test_a_disk_that_hangs_holds_up_nobody(hub, bucket, into, how):
    with opened(hub.endpoint, bucket) as bucket_client:
        content = stored(bucket_client, hub, {"a": BIG})["a"]
        read(bucket_client, into(content, "first"))
        one = into(content)
        descriptor = blocked_disk(one.path)
        ticks, over = [time.monotonic()], threading.Event()

        def tick():
            while not over.wait(0.01):
                ticks.append(time.monotonic())

        ticking = threading.Thread(target=tick)
        reading = threading.Thread(
            target=read, args=(bucket_client, one), kwargs={"secs": 1.0 if how == "deadline" else 60.0}
        )
        ticking.start()
        reading.start()
        try:
            eventually(lambda: select.select([descriptor], [], [], 0)[0])  # some of it is written: now it blocks
            if how == "close":
                bucket_client.close()
            reading.join(BOUND)
            assert not reading.is_alive()
            assert not one.done
            assert isinstance(one.error, TransportError)
        finally:
            over.set()
            ticking.join()
            os.close(descriptor)
            ticks.append(time.monotonic())
        assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < BOUND


def test_a_session_whose_token_ends_is_not_lent_and_its_groups_go_with_it(hub, bucket_client, into, monkeypatch):
    monkeypatch.setattr(xet_session, "_FILES_OF_A_GROUP", 2)
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    read(bucket_client, into(content, "first"))
    session = bucket_client.transfer._reading._current
    session.born -= 3600
    hub.control.reset_counters()
    for number in range(9):
        read(bucket_client, one := into(content, str(number)))
        assert one.done, one.error
    assert bucket_client.transfer._reading._current is not session
    assert hub.control.counters().route("xet-read-token").requests == 1


def test_a_name_that_reads_like_an_error_of_the_disk_is_none(hub, bucket_client, tmp_path):
    content = stored(bucket_client, hub, {"a": DATA})["a"]
    hub.control.add_fault(Fault(route="reconstruction", status=500))
    read(bucket_client, one := DownloadToFile("IO Error: full (os error 28)", content, tmp_path / "x.part"))
    assert isinstance(one.error, TransportError)


def test_the_first_error_is_the_one_that_is_told(into):
    one = into(ContentId("0" * 64, 1))
    one.fail(MissingError("x: first"))
    one.fail(DeadlineError("x: second"))
    assert str(one.error) == "x: first"
    assert not one.live


def test_close_frees_the_waiters(hub, bucket, into):
    with opened(hub.endpoint, bucket) as bucket_client:
        content = stored(bucket_client, hub, {"a": DATA})["a"]
        one = into(content)
        thread = hanging(hub, bucket_client, one)
        bucket_client.close()
        thread.join(BOUND)
        assert not thread.is_alive()
        assert isinstance(one.error, TransportError)
    assert left(one) == []
