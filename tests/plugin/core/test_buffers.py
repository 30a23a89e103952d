"""Rights to somebody else's memory that are taken back, and deadlines."""

import dis
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import DeadlineError, RevokedError
from hfbucket_plugin.hub.transfer import Upload
from hfbucket_plugin.store.write import _Commit
from tests.support.buckets import opened
from tests.support.models import untimed
from tests.support.waiting import in_threads


def test_pieces_go_where_they_belong():
    buffer = bytearray(b"........")
    lease = RevocableBuffer(memoryview(buffer))

    assert lease.size == 8
    assert lease.live
    assert lease.write(4, b"45")
    assert lease.write(0, b"0")
    assert lease.write(7, b"7")
    assert lease.write(8, b"")
    assert buffer == b"0...45.7"


@untimed
@given(st.integers(0, 16), st.integers(-20, 40), st.binary(max_size=32))
def test_a_piece_that_does_not_fit_is_refused_and_nothing_of_it_written(size, at, piece):
    buffer = bytearray(size)
    lease = RevocableBuffer(memoryview(buffer))

    if at >= 0 and at + len(piece) <= size:
        assert lease.write(at, piece)
        assert buffer == bytes(at) + piece + bytes(size - at - len(piece))
    else:
        with pytest.raises(ValueError, match="do not fit"):
            lease.write(at, piece)
        assert buffer == bytes(size)


def test_after_it_was_revoked_nothing_is_written_and_the_buffer_is_let_go():
    buffer = bytearray(4)
    lease = RevocableBuffer(memoryview(buffer))

    lease.revoke()
    lease.revoke()

    assert not lease.live
    assert not lease.write(0, b"late")
    assert buffer == bytes(4)
    buffer.extend(b"a bytearray cannot grow while somebody holds a view of it")


@pytest.mark.parametrize("round_", range(20))
def test_writers_in_full_swing_stop_with_the_revocation(round_):
    buffer = bytearray(64 * 1024)
    lease = RevocableBuffer(memoryview(buffer))
    piece = b"\xff" * 16 * 1024
    begun = threading.Semaphore(0)

    def write(at):
        begun.release()
        while lease.write(at, piece):
            pass

    writers = [threading.Thread(target=write, args=(at * len(piece),)) for at in range(4)]
    for writer in writers:
        writer.start()
    for _ in writers:
        begun.acquire()
    time.sleep(0.001 * (round_ % 3))
    lease.revoke()
    buffer[:] = b"\x01" * len(buffer)
    for writer in writers:
        writer.join()

    assert buffer == b"\x01" * len(buffer)


def test_a_range_is_copied_out_until_the_lease_is_revoked():
    buffer = bytearray(b"01234567")
    lease = RevocableBuffer(memoryview(buffer))

    first = lease.read(2, 5)
    buffer[:] = b"x" * 8

    assert first == b"234", "a copy, not a view"
    assert lease.read(6, 100) == b"xx"
    lease.revoke()
    assert lease.read(2, 5) is None


def test_a_source_is_copied_as_often_as_wanted_until_it_is_taken_back():
    buffer = bytearray(b"chunk")
    lease = RevocableBuffer(memoryview(buffer))
    assert lease.size == 5

    first = lease.read(1, 4)
    buffer[:] = b"other"

    assert first == b"hun", "a copy, not a view"
    assert type(first) is bytes
    assert lease.read(0, 5) == b"other"
    lease.revoke()
    lease.revoke()
    assert lease.read(0, 5) is None
    assert lease.size == 5
    buffer.extend(b"a bytearray cannot grow while somebody holds a view of it")


@pytest.mark.parametrize("round_", range(10))
def test_readers_in_full_swing_never_see_what_the_owner_writes_after_the_revocation(round_):
    buffer = bytearray(b"\x01" * 256 * 1024)
    half = len(buffer) // 2
    lease = RevocableBuffer(memoryview(buffer))
    begun, seen = threading.Semaphore(0), set()

    def read(start):
        begun.release()
        while (copy := lease.read(start, start + half)) is not None:
            seen.add(copy.count(b"\x01"))

    readers = [threading.Thread(target=read, args=(at % 2 * half,)) for at in range(4)]
    for reader in readers:
        reader.start()
    for _ in readers:
        begun.acquire()
    time.sleep(0.001 * (round_ % 3))
    lease.revoke()
    buffer[:] = b"\x02" * len(buffer)
    for reader in readers:
        reader.join()

    assert seen <= {half}


# --- memory that the engine frees without a word ------------------------------------------------------------------------


class Freed:
    """A memory object whose memory belongs to somebody else."""

    valid = False


def test_memory_that_was_freed_is_neither_written_nor_read():
    buffer, memory = bytearray(b"another"), Freed()
    lease = RevocableBuffer(memoryview(buffer), memory)

    assert lease.read(0, 7) is None
    assert not lease.live
    assert not lease.write(0, b"mine")
    assert buffer == b"another"

    memory.valid = True
    assert lease.read(0, 7) == b"another"


def test_no_call_stands_between_the_question_whether_memory_is_valid_and_the_copy_into_it():
    names = [(one.opname, one.argval) for one in dis.get_instructions(RevocableBuffer.write)]
    asked = max(index for index, (_, value) in enumerate(names) if value == "valid")
    copied = next(index for index, (name, _) in enumerate(names) if name in ("STORE_SUBSCR", "STORE_SLICE"))

    assert asked < copied
    between = names[asked:copied]
    assert not [name for name, _ in between if "CALL" in name or "JUMP_BACKWARD" in name]


# --- a commit's -------------------------------------------------------------------------------------------------------


class Source:
    """A chunk that notes, whenever it is given back, which leases of its commit could still be read."""

    key = "chunk"

    def __init__(self, log):
        self.view = memoryview(b"chunk")
        self.commit = None
        self._log = log

    def release(self):
        self._log.append((self, [lease.read(0, 5) is not None for lease in self.commit.leases]))


@pytest.fixture
def commit():
    """A commit of three sources, and what they noted."""
    log = []
    sources = [Source(log) for _ in range(3)]
    made = _Commit(sources)
    for source in sources:
        source.commit = made
    return made, log


def test_a_commit_gives_its_memory_back_once_and_after_nothing_reads_it_any_more(commit):
    made, log = commit
    assert [lease.read(0, 5) for lease in made.leases] == [b"chunk"] * 3

    in_threads(8, lambda _number: made.release())

    assert [source for source, _ in log] == made.sources
    assert [readable for _, readable in log] == [[False, True, True], [False, False, True], [False] * 3]


def test_a_commit_gives_each_chunk_back_when_it_was_taken_and_the_others_at_the_end(commit):
    made, log = commit

    made.release(made.leases[1])
    made.release(made.leases[1])
    assert [source for source, _ in log] == [made.sources[1]]
    made.release()
    made.release()

    assert [source for source, _ in log] == [made.sources[1], made.sources[0], made.sources[2]]
    assert log[-1][1] == [False] * 3


def test_an_upload_of_a_source_that_was_taken_back_is_none(hub, bucket):
    with opened(hub.endpoint, bucket) as bucket_client:
        lease = RevocableBuffer(memoryview(b"chunk"))
        lease.revoke()

        with pytest.raises(RevokedError, match="taken back"):
            bucket_client.transfer.upload([b"before", lease, b"after"], Deadline.after(30), Upload())


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_deadline_is_handed_down_and_only_ever_comes_nearer():
    far = Deadline.after(1000)

    assert not far.passed
    assert 990 < far.remaining() <= 1000
    assert far.within(5000) is far
    assert far.within(10).at < far.at
    assert far.within(10).seconds == 10
    far.check("nothing")


def test_a_deadline_that_is_over_says_what_was_abandoned():
    over = Deadline.after(0)

    assert over.passed
    assert over.remaining() == 0.0
    with pytest.raises(DeadlineError, match=r"instance 'x': paths-info: no answer within 0 s"):
        over.check("instance 'x': paths-info")
    assert Deadline.after(-5).remaining() == 0.0
