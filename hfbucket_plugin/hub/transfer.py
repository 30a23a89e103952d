"""Transfer of bytes: streams from the store into buffers or files, uploads, and hashes; independent of keys."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import hf_xet

from hfbucket_plugin.core.buffers import RevocableBuffer
from hfbucket_plugin.core.concurrency import WorkerPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineError,
    HFBucketError,
    IntegrityError,
    LocalFileError,
    RevokedError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.xet_session import SessionPool, typed_errors, xet_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.core.concurrency import FairPool
    from hfbucket_plugin.core.files import TempDir
    from hfbucket_plugin.hub.client import HubClient
    from hfbucket_plugin.hub.xet_session import SessionLease, XetSession


_LOCAL: Final = re.compile(r"\bIO Error: .*\(os error (\d+)\)")
"""Message of hf_xet 1.8 for a disk error; its network errors have no such number."""

_MISMATCH: Final = "File size mismatch"
"""Message of hf_xet for an object whose size differs from the requested one."""


_WRITE_PIECE: Final = 4 * 1024 * 1024
"""Bytes passed to an upload at a time: copying a piece holds the GIL for about a millisecond."""

_UNIT_BYTES: Final = 64 * 1024 * 1024
"""Size of the units into which hf_xet packs its input; each is sent when full."""

_PROBES: Final = 4
"""Number of concurrent samples. They have threads of their own: a probe must not wait behind the reads that it is to
judge."""

_TRIES: Final = 2
"""Maximum number of attempts: a second one follows if the store refused an expired token, the session was given up
during the read, or hf_xet lost the reason why a stream ended."""

_QUICK_TRIES: Final = 6
_QUICK_SECS: Final = 1.0
"""If hf_xet lost the reason, as it does every other time, a missing content would look like a failure instead of a
miss. Such a read is repeated if the answer was as quick as that for a missing content: while all attempts together
took at most this time in seconds."""

_REASON_LOST: Final = "Data sender was dropped"
"""Message of a stream of hf_xet 1.8 that lost the reason of its failure, as every other does; it may also just end."""


class _ReasonLostError(TransportError):
    """A stream failed, and hf_xet does not report the reason."""


@dataclass(slots=True, eq=False)
class _Download(ABC):
    name: str
    content: ContentId
    error: HFBucketError | None = field(default=None, kw_only=True)
    done: bool = field(default=False, kw_only=True)
    asked: int = field(default=0, kw_only=True)

    @abstractmethod
    def give_up(self) -> None:
        """Stop the read."""

    def fail(self, error: HFBucketError) -> None:
        """Record the first error, and stop the read."""
        if self.error is None:
            self.error = error
        self.give_up()


@dataclass(slots=True, eq=False)
class DownloadToBuffer(_Download):
    """Read of one object into one buffer.

    Attributes:
        name: Key or path of the object, for errors.
        content: Content to read, with the size of the buffer.
        lease: Buffer to fill.
        background: Whether no caller waits for it, so that other reads take precedence.
        error: Cause of the failure; None without one.
        done: Whether every byte has arrived.
        asked: Bytes requested from the store, over all attempts; hf_xet's own retries are not known.
    """

    lease: RevocableBuffer
    background: bool = False

    @property
    def live(self) -> bool:
        """Whether the read is in progress."""
        return self.lease.live

    def give_up(self) -> None:
        """Stop the read; nothing writes to the buffer after the return."""
        self.lease.revoke()

    def fail(self, error: HFBucketError) -> None:
        """Record the first error, and stop all writes to the buffer.

        An error after the buffer was revoked does not concern the owner, and is not a failure of the store.
        """
        _Download.fail(self, error if self.live else RevokedError(f"{self.name}: its buffer was taken back"))


@dataclass(slots=True, eq=False)
class DownloadToFile(_Download):
    """Read of one object into one file, which hf_xet creates.

    Attributes:
        name: Key or path of the object, for errors.
        content: Content to read.
        path: Path of the file, in an existing directory that nobody else may write to, because hf_xet follows links and
            creates missing directories. The file must not exist. It exists after a successful read, and may exist with
            any content after a failed one.
        error: Cause of the failure; None without one.
        done: Whether every byte has arrived.
        asked: Bytes requested from the store, over all attempts; hf_xet's own retries are not known.
    """

    path: Path
    _live: bool = True
    _handle: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def live(self) -> bool:
        """Whether the read is in progress."""
        return self._live

    def give_up(self) -> None:
        """Stop the read and free its waiting thread at once. Never raises."""
        with self._lock:
            self._live = False
            handle = self._handle
        if handle is not None:
            handle.cancel()

    def fetch(self, session: XetSession, attempt: int) -> None:
        """Have hf_xet write the file, and wait for it.

        Blocks its thread until hf_xet ends or `give_up` is called.

        Args:
            session: Session for reading.
            attempt: Number of the attempt, from 0: each writes a file of its own, so that an abandoned attempt never
                writes into the file of another.

        Raises:
            LocalFileError: The disk rejected the write.
            HFBucketError: The store did not send the content.
        """
        path = self.path if not attempt else self.path.with_name(f"{self.path.stem}-{attempt}{self.path.suffix}")
        try:
            self._write(session, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            if (number := self._local(error)) is not None:
                raise LocalFileError(f"{self.name}: {path}: {os.strerror(number)}", number) from None
            raise

    def _write(self, session: XetSession, path: Path) -> None:
        size = self.content.size
        self._expect_live()
        if size:
            info = hf_xet.XetFileInfo(self.content.xet_hash, size)
            try:
                with typed_errors(self.name), session.download(info, path) as handle:
                    self._wait(handle)
            except TransportError as error:
                if _MISMATCH in str(error):
                    raise IntegrityError(str(error)) from None
                raise
        else:
            path.touch(exist_ok=False)
        # Judge by the file: a store that has lost a content may send nothing without an error.
        if (arrived := path.stat().st_size) != size:
            raise IntegrityError(f"{self.name}: {arrived} of {size} bytes arrived")
        if path is not self.path:
            self._expect_live()
            path.replace(self.path)

    def _expect_live(self) -> None:
        if not self._live:
            raise RevokedError(f"{self.name}: cancelled before it was read")

    def _wait(self, handle: Any) -> None:
        with self._lock:
            self._handle = handle
            live = self._live
        try:
            if not live:
                handle.cancel()
                self._expect_live()
            handle.result()
        finally:
            with self._lock:
                self._handle = None

    def _local(self, error: BaseException) -> int | None:
        """Return the errno of a local failure; None for a failure of the store or the network."""
        if isinstance(error, HFBucketError):
            found = _LOCAL.search(str(error).removeprefix(self.name))  # names are foreign text and might match
            return int(found[1]) if found else None
        return error.errno if isinstance(error, OSError) else None


class _Ticket:
    """Task on a worker that its coordinator may abandon."""

    def __init__(self) -> None:
        self.abandoned = False
        self.session_lease: SessionLease | None = None


class _Part(_Ticket):
    """Byte range of an object, `start` to `end`, that a worker reads; the whole object for a file."""

    def __init__(self, read: DownloadToBuffer | DownloadToFile, start: int, end: int, deadline: Deadline) -> None:
        super().__init__()
        self.read = read
        self.start = start
        self.end = end
        self.deadline = deadline
        self.asked = 0  # written by the reading thread
        self._submitted = time.monotonic()
        self._began: float | None = None

    def begin(self) -> None:
        """Record that a thread has started on it."""
        self._began = time.monotonic()

    @property
    def waited(self) -> bool:
        """Whether most of its time was spent waiting for a thread, so that lateness says nothing about the store."""
        now = time.monotonic()
        return (self._began or now) - self._submitted > (now - self._submitted) / 2


class Transfer:
    """Transfers the bytes of one bucket.

    Args:
        hub: Client that requests access tokens.
        bucket_id: `<namespace>/<bucket>`.
        read_workers: Number of read threads, which limits the open streams, except those of `sample`.
        range_bytes: Size of the ranges of larger objects, of which several are read at a time.
        piece_bytes: Size of the pieces that a stream requests and returns; see `xet_config`.
        buffer_bytes: Maximum number of bytes that all streams hold together.
        read_timeout_secs: Usual deadline of reads in seconds; hf_xet's own timeouts are set below it.
        write_timeout_secs: Usual deadline of writes in seconds; likewise.
        streams: Maximum number of open streams.
        patient: Whether reads wait for pauses of the Hub, as tools do, or fail at once, as engines do.
        read_retries: Number of retries that hf_xet makes of a failed read request.
        temp_dir: Directory of hf_xet's files, removed by `close`; None for the places set by the environment.
    """

    def __init__(
        self,
        hub: HubClient,
        bucket_id: str,
        *,
        read_workers: FairPool,
        range_bytes: int,
        piece_bytes: int,
        buffer_bytes: int,
        read_timeout_secs: float,
        write_timeout_secs: float,
        streams: int,
        patient: bool = True,
        read_retries: int = 1,
        temp_dir: TempDir | None = None,
    ) -> None:
        self._temp_dir = temp_dir
        self._workers = read_workers
        self._probes = WorkerPool("hfbucket-read-probe", _PROBES)
        self._range_bytes = range_bytes
        reading = xet_config(read_timeout_secs, streams, piece_bytes, buffer_bytes, read_retries)
        writing = xet_config(write_timeout_secs, streams, piece_bytes, buffer_bytes)
        self._reading = SessionPool(hub, bucket_id, "read", reading, patient=patient, temp_dir=temp_dir)
        self._writing = SessionPool(hub, bucket_id, "write", writing, temp_dir=temp_dir)

    @property
    def ready(self) -> bool:
        """Whether a session for reading is available."""
        return self._reading.ready

    def warm_up(self, deadline: Deadline) -> None:
        """Open a session for reading, so that the first read does not wait for one.

        Raises:
            HFBucketError: Access was refused, or did not arrive before the deadline.
        """
        self._reading.give_back(self._reading.borrow(deadline))

    def renew(self) -> None:
        """Use a new session for later reads, so that nothing cached by the present one serves them."""
        self._reading.renew()

    def read(self, reads: Sequence[DownloadToBuffer | DownloadToFile], deadline: Deadline) -> None:
        """Run several reads; return when all have ended or the deadline has passed.

        A failed read does not raise: check its `done` and `error`. After the return, nothing writes to the buffer of a
        read that is not done.
        """
        self._fill([(read, read.content.size) for read in reads], deadline)

    def sample(
        self,
        contents: Sequence[ContentId],
        length: int,
        deadline: Deadline,
        ended: Callable[[ContentId, HFBucketError | None], None] = lambda _content, _error: None,
    ) -> None:
        """Read and discard the first bytes of several contents, to check that the store serves any.

        Returns as soon as one was served; the others continue until the deadline.

        Args:
            contents: Contents to sample, at least one.
            length: Number of bytes of each.
            deadline: When to give up.
            ended: Called on any thread for each content that has ended, with its error or None.

        Raises:
            HFBucketError: No content was served before the deadline; the error of the first that failed.
        """
        tasks: dict[Future[int], _Part] = {}
        for content in contents:
            wanted = min(length, content.size)
            part = _Part(
                DownloadToBuffer("sample", content, RevocableBuffer(memoryview(bytearray(wanted)))), 0, wanted, deadline
            )
            try:
                tasks[self._probes.submit(self._read_part, part)] = part
            except RuntimeError as error:
                part.read.fail(TransportError(f"sample: {error}"))
                ended(content, part.read.error)
        for future, part in tasks.items():
            future.add_done_callback(partial(_report_sample, part, ended))
        waiting = set(tasks)
        failure: HFBucketError | None = None
        while waiting and not deadline.passed:
            finished, waiting = wait(waiting, timeout=deadline.remaining(), return_when=FIRST_COMPLETED)
            for future in finished:
                outcome = _sample_error(tasks[future], future)
                if outcome is None:
                    return
                failure = failure or outcome
        for future in waiting:
            part = tasks[future]
            part.read.fail(_late(part, never_began=future.cancel()))
            self._abandon(part, self._reading)
            failure = failure or part.read.error
        raise failure or TransportError("sample: nothing was read")

    def _fill(self, reads: Sequence[tuple[DownloadToBuffer | DownloadToFile, int]], deadline: Deadline) -> None:
        """Read the wanted number of leading bytes of each."""
        tasks: dict[Future[int], _Part] = {}
        request = object()
        for read, wanted in reads:
            for start, end in [(0, wanted)] if isinstance(read, DownloadToFile) else cut(wanted, self._range_bytes):
                part = _Part(read, start, end, deadline)
                try:
                    background = not isinstance(read, DownloadToFile) and read.background
                    future = self._workers.submit_for(request, background, self._read_part, part)
                except RuntimeError as error:
                    read.fail(TransportError(f"{read.name}: {error}"))
                    break
                tasks[future] = part
        finished, unfinished = wait(tasks, timeout=deadline.remaining())
        late = {tasks[future]: future.cancel() for future in unfinished}
        for part in sorted(
            late, key=_waited_for_a_thread
        ):  # if the store is late with one part, it is late with the object
            part.read.fail(_late(part, never_began=late[part]))
            self._abandon(part, self._reading)
        arrived = {id(read): 0 for read, _ in reads}
        for future in finished:
            arrived[id(tasks[future].read)] += future.result()
        for part in tasks.values():
            part.read.asked += part.asked
        for read, wanted in reads:
            # Judged by the bytes that arrived, because a stream may end early without an error.
            if read.error is None and arrived[id(read)] != wanted:
                read.fail(IntegrityError(f"{read.name}: {arrived[id(read)]} of {wanted} bytes arrived"))
            read.done = read.error is None

    @staticmethod
    def _abandon(ticket: _Ticket, sessions: SessionPool) -> None:
        ticket.abandoned = True
        if ticket.session_lease is not None:
            sessions.give_up(ticket.session_lease)

    def _read_part(self, part: _Part) -> int:
        """Read one part; return the number of its bytes that are in place: all, or none after a failure."""
        read, quick = part.read, Deadline.after(_QUICK_SECS)
        part.begin()
        try:
            for attempt in range(_QUICK_TRIES):
                if not read.live or part.abandoned:
                    read.fail(RevokedError(f"{read.name}: cancelled before it was read"))
                    break
                last = attempt >= _TRIES - 1
                reason_last = last and (attempt == _QUICK_TRIES - 1 or quick.passed)
                if self._try_part(part, attempt, last=last, reason_last=reason_last):
                    return part.end - part.start
        except DeadlineError as error:
            read.fail(_late(part) if part.waited else error)
        except HFBucketError as error:
            read.fail(error)
        except BaseException as error:  # noqa: BLE001 - includes hf_xet's panics: this read has failed
            read.fail(TransportError(f"{read.name}: {type(error).__name__}: {error}"))
        return 0

    def _try_part(self, part: _Part, attempt: int, *, last: bool, reason_last: bool) -> bool:
        read, deadline = part.read, part.deadline
        part.session_lease = session_lease = self._reading.borrow(deadline)
        try:
            if part.abandoned:  # abandoned while waiting for the session, which the abandoning thread did not know
                raise RevokedError(f"{read.name}: cancelled before it was read")
            part.asked += part.end - part.start
            if isinstance(read, DownloadToFile):
                read.fetch(session_lease.session, attempt)
            else:
                with typed_errors(read.name):
                    self._stream(session_lease.session, read, part)
        except AccessDeniedError:
            self._reading.retire(session_lease)
            if last:
                raise
            return False
        except ConfigError:  # about hf_xet's directories: the next session creates them again
            self._reading.retire(session_lease)
            raise
        except TransportError as error:
            if read.live:  # a read that was stopped here says nothing about its session
                self._reading.doubt(session_lease)
            if isinstance(error, _ReasonLostError) or _REASON_LOST in str(error):
                again = not reason_last
            else:
                again = session_lease.session.retired and not last
            if deadline.passed or not again:
                raise
            return False
        finally:
            self._reading.give_back(session_lease)
        return True

    @staticmethod
    def _stream(session: XetSession, read: DownloadToBuffer, part: _Part) -> None:
        start, end = part.start, part.end
        info = hf_xet.XetFileInfo(read.content.xet_hash, read.content.size)
        whole = end - start == read.content.size
        bounds = {} if whole else {"start": start, "end": end}
        at = start
        for piece in session.group.download_stream(info, **bounds):
            if at + len(piece) > end:
                raise IntegrityError(f"{read.name}: more bytes arrived than the {read.content.size} that it has")
            if not read.lease.write(at, piece):
                raise RevokedError(f"{read.name}: its buffer was taken back while it was being read")
            at += len(piece)
            del piece  # frees the piece while the next one is awaited
            part.deadline.check(read.name)
        if at == start:
            raise _ReasonLostError(f"{read.name}: the store sent nothing, and hf_xet does not say why")
        if at != end:
            raise IntegrityError(f"{read.name}: only {at - start} of the bytes {start} to {end} arrived")

    def upload(
        self,
        sources: Sequence[RevocableBuffer | bytes],
        deadline: Deadline,
        upload: Upload,
        taken: Callable[[RevocableBuffer], None] = lambda _source: None,
    ) -> list[ContentId]:
        """Upload several contents as one commit to the store, without naming them in a bucket; see `Bucket.add`.

        Blocks its thread as long as the store takes: hf_xet waits minutes for an answer to a shard, whatever its
        timeouts. The thread that waits for it calls `abandon` at the deadline, which frees it at once.

        A commit of at most 64 MiB that the store refuses (401, 403) is retried once with a new token.

        Args:
            sources: Bytes, or leases on memory that does not change until its lease is revoked.
            deadline: When to give up.
            upload: Handle by which a coordinator can abandon the upload.
            taken: Called once with each lease whose memory is no longer needed.

        Returns:
            The contents, in the order of the sources.

        Raises:
            HFBucketError: The store did not accept the commit; none of the contents can be relied on.
        """
        ticket = upload.ticket
        pieces = _Pieces([RevocableBuffer(memoryview(one)) if isinstance(one, bytes) else one for one in sources])
        for last in (False, True):
            session_lease = self._writing.borrow(deadline)
            ticket.session_lease = session_lease
            try:
                if ticket.abandoned:
                    raise DeadlineError("upload: abandoned before it began")
                with typed_errors("upload"):
                    return self._commit(session_lease.session, pieces, deadline, ticket, taken)
            except AccessDeniedError:
                self._writing.retire(session_lease)
                if last or not pieces.complete or ticket.abandoned or deadline.passed:
                    raise
            except ConfigError:  # about hf_xet's directories: the next session creates them again
                self._writing.retire(session_lease)
                raise
            except TransportError:
                self._writing.doubt(session_lease)
                raise
            finally:
                self._writing.give_back(session_lease)
        raise AssertionError("the last try returns or raises")

    def _commit(
        self,
        session: XetSession,
        pieces: _Pieces,
        deadline: Deadline,
        ticket: _Ticket,
        taken: Callable[[RevocableBuffer], None],
    ) -> list[ContentId]:
        commit = session.xet.new_upload_commit(**session.connection)
        contents = []
        try:
            for number, source in enumerate(pieces.sources):
                kept = number < pieces.kept
                # One after the other: hf_xet accepts a few streams at a time, and would otherwise wait for the end of one
                # that nothing writes to. It accepts no more than it is uploading.
                stream = commit.start_upload_stream(sha256=hf_xet.SKIP_SHA256)
                for piece in pieces.of(number, ticket):
                    deadline.check("upload")
                    stream.write(piece)
                info = stream.finish().xet_info
                contents.append(ContentId(info.hash, info.file_size))
                if not kept:
                    taken(source)
            commit.wait_to_finish()
        except BaseException:
            commit.abort()
            raise
        return contents

    def abandon(self, upload: Upload) -> None:
        """Abandon an upload: its thread is freed at once, and none of its contents will be named."""
        self._abandon(upload.ticket, self._writing)

    def close(self) -> None:
        """Abort all sessions and read threads."""
        self._workers.close()
        self._probes.close()
        self._reading.close()
        self._writing.close()
        if self._temp_dir is not None:
            self._temp_dir.close()


class _Pieces:
    """Input of an upload, copied until the store may have accepted some of it, for another attempt.

    hf_xet sends nothing before it has filled a unit of 64 MiB or the commit ends. Only then does the store refuse a
    token, and the memory of the sources has already been returned. Longer commits are not copied; the copy never
    exceeds what hf_xet itself keeps of them.

    Attributes:
        complete: Whether all input so far is kept.
    """

    def __init__(self, sources: Sequence[RevocableBuffer]) -> None:
        self.sources = sources
        self.complete = True
        self._kept: list[list[bytes]] = []
        self._bytes = 0

    @property
    def kept(self) -> int:
        """Number of sources that are kept completely; their memory is not read again."""
        return len(self._kept)

    def of(self, number: int, ticket: _Ticket) -> Iterator[bytes]:
        """Yield the bytes of a source in pieces, from the copy or from its memory.

        Raises:
            DeadlineError: The upload was abandoned.
            RevokedError: The memory of the source was revoked.
        """
        if number < len(self._kept):
            yield from self._kept[number]
            return
        kept: list[bytes] = []
        source = self.sources[number]
        for start, end in cut(source.size, _WRITE_PIECE):
            # `bytes`, never a view, which hf_xet copies byte by byte (64 MiB: 1.6 s with 100 ms stalls, not 0.06 s).
            piece = source.read(start, end)
            if ticket.abandoned:
                raise DeadlineError("upload: abandoned")
            if piece is None:
                raise RevokedError("upload: its memory was taken back")
            if self.complete:
                kept.append(piece)
                self._bytes += len(piece)
                if self._bytes > _UNIT_BYTES:
                    self.complete = False
                    kept, self._kept = [], []
            yield piece
        if self.complete:
            self._kept.append(kept)


class Upload:
    """Handle on one upload, created by the coordinator before the upload begins."""

    def __init__(self) -> None:
        self.ticket = _Ticket()

    @property
    def abandoned(self) -> bool:
        """Whether its caller has stopped waiting."""
        return self.ticket.abandoned


def _sample_error(part: _Part, future: Future[int]) -> HFBucketError | None:
    if part.read.error is None and (future.cancelled() or future.result() != part.end):
        part.read.fail(IntegrityError(f"sample: fewer than {part.end} bytes arrived"))
    return part.read.error


def _report_sample(part: _Part, ended: Callable[[ContentId, HFBucketError | None], None], future: Future[int]) -> None:
    ended(part.read.content, _sample_error(part, future))


def _late(part: _Part, *, never_began: bool = False) -> DeadlineError:
    """Return the error of a part that was not read in time."""
    name, secs = part.read.name, part.deadline.seconds
    if never_began or part.waited:
        return UnsentError(
            f"{name}: not read within {secs:g} s, most of which it waited for one of max_parallel_reads threads"
        )
    return DeadlineError(f"{name}: not read within {secs:g} s; the call was abandoned")


def _waited_for_a_thread(part: _Part) -> bool:
    return part.waited


def cut(size: int, largest: int) -> Iterator[tuple[int, int]]:
    """Split `size` bytes into ranges of `largest` bytes, the last one with the rest."""
    for start in range(0, size, largest):
        yield start, min(start + largest, size)


def xet_hashes(paths: Iterable[Path]) -> list[str]:
    """Return the Xet hashes of files, in order; they equal `xet_hash` in a listing if and only if the content does.

    Hashes 0.5 to 1.7 GB/s on two cores; one call for many small files is faster than one each.

    Raises:
        OSError: A file cannot be read.
    """
    return [info.hash for info in hf_xet.hash_files([str(path) for path in paths])]
