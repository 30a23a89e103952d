"""hf_xet sessions: how they are configured, shared, and given up when their threads stay blocked.

A blocked reader cannot be told to stop: `stream.cancel()` raises `Already borrowed` and `group.abort()` frees it only
when the network returns. `XetSession.sigint_abort()` frees all readers of a session at once, and the session is dead.
So readers borrow a session, and one whose reader was abandoned is retired: new readers get a new one, and as soon as
nobody who is still waited for reads from the old one, it is aborted.

hf_xet refreshes no token by itself: a session whose token is about to end is replaced before it is lent, by a request of
`HubClient` (counted, paced, with the Hub token of that moment). See docs/decisions/0030.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator  # noqa: TC003 - contextmanager's return type is evaluated by Sphinx and by us
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

import hf_xet

from hfbucket_plugin.core import forks
from hfbucket_plugin.errors import (
    AccessDeniedError,
    ConfigError,
    DeadlineError,
    HFBucketError,
    ObjectMissingError,
    TempDirError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub import xet_home

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.files import TempDir
    from hfbucket_plugin.hub.client import HubClient

_log = logging.getLogger(__name__)

_RENEWAL_SECS: Final = 30.0
"""A session that failed is renewed, but no more often than this: each renewal costs the Hub a request."""

_FILES_OF_A_GROUP: Final = 1000
"""A group remembers every download until it ends, in about 1.2 KiB each: a new one has to follow. Making one takes 10 ms, and
connections belong to the session."""

_MAX_UNIX_SECS: Final = 2**40
_NEVER: Final = _MAX_UNIX_SECS
"""The expiry that hf_xet is told of: when a token is replaced is decided here."""

_TOKEN_MARGIN_SECS: Final = 60.0
"""A session whose token ends within this time is not lent any more; of a token that lives less than twice as long, half."""

_SHARD_CACHE_BYTES: Final = 256 * 1024 * 1024
"""What hf_xet may keep on disk of what it uploaded, in a directory that goes with the process."""

_LOCAL: Final = re.compile(r"\bI/O error: .*\(os error (\d+)\)")
"""How hf_xet 1.8 tells what the disk of its own directories refused."""
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_UNWRITABLE: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP}
)

_STATUS = re.compile(r"HTTP status client error \((\d{3})\b")
_STATUS_UNAUTHORIZED, _STATUS_NOT_FOUND, _STATUS_TOO_MANY = 401, 404, 429
_STATUS_DENIED = frozenset({_STATUS_UNAUTHORIZED, 403})


def xet_config(
    timeout_secs: float, streams: int, piece_bytes: int, buffer_bytes: int, retries: int = 1
) -> hf_xet.XetConfig:
    """The configuration of our sessions.

    Args:
        timeout_secs: The deadline of the operations; connect and read time out well before it, and one retry fits.
        streams: Streams that may be open at once. hf_xet starts with 4 downloads at a time and adapts over seconds,
            which is why it is slow with many small objects.
        piece_bytes: What a stream asks the store for at a time, and hands over at a time.
        buffer_bytes: What all streams of a session may hold together, from the moment that it is asked for until it is
            handed over.
        retries: How often a request that failed is repeated.
    """
    patience = timedelta(seconds=max(0.2, timeout_secs * 0.4))
    return hf_xet.XetConfig().with_config(
        {
            "client.connect_timeout": patience,
            "client.read_timeout": patience,
            "client.retry_max_attempts": retries,
            "client.retry_base_delay": timedelta(milliseconds=100),
            "client.retry_max_duration": timedelta(seconds=max(0.2, timeout_secs * 0.8)),
            "client.ac_initial_download_concurrency": max(4, streams),
            "client.ac_max_download_concurrency": max(64, streams),
            "data.max_concurrent_file_downloads": streams,
            # One question to the store for every file, before its upload: what a bucket holds already is found by its
            # key, and other people's bytes are never KV of ours.
            "deduplication.global_dedup_query_enabled": False,
            "reconstruction.min_reconstruction_fetch_size": piece_bytes,
            "reconstruction.max_reconstruction_fetch_size": piece_bytes,
            "reconstruction.min_prefetch_buffer": buffer_bytes,
            # All of it at once, none more for each stream.
            "reconstruction.download_buffer_size": buffer_bytes,
            "reconstruction.download_buffer_perfile_size": 1,
            "reconstruction.download_buffer_limit": buffer_bytes,
            "telemetry.enabled": False,
        }
    )


@dataclass(frozen=True, slots=True)
class CasAccess:
    """What the Hub hands out to reach the content-addressed store.

    Attributes:
        url: Address of the store.
        token: Short-lived access token; not the Hub's.
        expires: Unix seconds.
    """

    url: str
    token: str
    expires: int

    def __repr__(self) -> str:
        return f"CasAccess(url={self.url!r}, expires={self.expires})"


def fetch_access(
    hub: HubClient, bucket_id: str, right: Literal["read", "write"], deadline: Deadline, *, patient: bool = True
) -> CasAccess:
    """Ask the Hub for access to a bucket's content.

    Asked here and not by hf_xet, so that it has our deadline and its refusals are typed.

    Raises:
        HFBucketError: See `HubClient.request`.
    """
    route = f"xet-{right}-token"
    answer = hub.request(
        "GET", _token_path(bucket_id, right), route=route, deadline=deadline, attempts=2, patient=patient
    )
    fields = answer.json(route)
    try:
        access = CasAccess(str(fields["casUrl"]), str(fields["accessToken"]), int(fields["exp"]))
        # Both travel in requests of hf_xet's own: no line breaks, no half characters.
        sendable = all(text.isascii() and text.isprintable() for text in (access.url, access.token))
        usable = sendable and urlsplit(access.url).scheme in {"http", "https"} and 0 <= access.expires < _MAX_UNIX_SECS
    except (KeyError, TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise TransportError(
            f"instance {hub.instance!r}: {route}: the Hub's answer lacks a usable casUrl, accessToken or exp"
        )
    return access


def _token_path(bucket_id: str, right: str) -> str:
    return f"/api/buckets/{bucket_id}/xet-{right}-token"


class XetSession:
    """One hf_xet session and, for reading, its groups; counts who reads from it.

    Args:
        xet: The session.
        group: For streams; None where it is for writing.
        connection: The arguments that open a group or a commit.
        token_secs: Seconds for which its token holds; infinite where that is not known.
    """

    def __init__(self, xet: Any, group: Any, connection: Mapping[str, Any], token_secs: float = math.inf) -> None:
        self.xet = xet
        self.group = group
        self.connection = connection
        self.retired = False
        self.readers = 0
        self.pid = os.getpid()
        self.born = time.monotonic()
        self._token_secs = token_secs
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._files: Any = None
        self._started = 0
        self._downloads: set[Any] = set()
        self._ended = False

    def holds_for(self, secs: float) -> bool:
        """Return whether its token holds for the time that an operation may take, and a minute at least.

        Of a token that lives so briefly that no session would ever do, the first half is used.

        Args:
            secs: What the operation may take.
        """
        left = self.born + self._token_secs - time.monotonic()
        return left >= min(max(_TOKEN_MARGIN_SECS, secs), self._token_secs / 2)

    @contextlib.contextmanager
    def download(self, info: Any, path: Path) -> Iterator[Any]:
        """Have a file written; the handle on it, for the length of a `with` block.

        Args:
            info: Of the object.
            path: Of the file, which hf_xet makes.
        """
        group = self._file_group()  # as long as it is read from
        handle = group.start_download_file(info, str(path))
        with self._lock:
            ended = self._ended
            self._downloads.add(handle)
        try:
            if ended:
                handle.cancel()
                raise TransportError(f"{path}: the session has ended")
            yield handle
        finally:
            with self._lock:
                self._downloads.discard(handle)

    def _file_group(self) -> Any:
        with self._renewing:  # which `end` does not wait for: it may wait for the Hub
            if self._files is None or self._started >= _FILES_OF_A_GROUP:
                self._files, self._started = self.xet.new_file_download_group(**self.connection), 0
            self._started += 1
            return self._files

    def end(self) -> None:
        """Free its readers, at once."""
        with self._lock:
            self._ended = True
            downloads = list(self._downloads)
        for handle in downloads:
            handle.cancel()
        if self._files is None:
            self.xet.sigint_abort()
        elif self.group is not None:
            # To abort the session would wait for the threads that write files, with the GIL held: on a disk that hangs, for ever.
            self.group.abort()


class SessionLease:
    """One reader's hold on a session, ended once: by the reader itself, or by the code that gives the reader up."""

    def __init__(self, session: XetSession) -> None:
        self.session = session
        self.ended = False


class SessionPool:
    """The current session of one bucket for one direction, replaced when it is retired, refused or inherited by a fork.

    Args:
        hub: For access tokens.
        bucket_id: `<namespace>/<bucket>`.
        right: What the sessions may do.
        config: See `xet_config`.
        patient: Whether asking for a token waits for the Hub's pauses, see `HubClient.request`.
        temp_dir: Where hf_xet keeps its files; None for the places that the environment gives it.
    """

    def __init__(
        self,
        hub: HubClient,
        bucket_id: str,
        right: Literal["read", "write"],
        config: hf_xet.XetConfig,
        *,
        patient: bool = True,
        temp_dir: TempDir | None = None,
    ) -> None:
        self._hub = hub
        self._bucket_id = bucket_id
        self._right = right
        self._config = config
        self._patient = patient
        self._temp_dir = temp_dir
        self._renew_locks()
        forks.reset_in_child(self._renew_locks)
        self._current: XetSession | None = None
        self._live: set[XetSession] = set()
        self._closed = False

    def _renew_locks(self) -> None:
        self._building = threading.Lock()
        self._lock = threading.Lock()

    def borrow(self, deadline: Deadline) -> SessionLease:
        """Take a hold on the current session, building one if there is none.

        Raises:
            HFBucketError: No access, or no answer before the deadline.
        """
        if (session_lease := self._try_borrow(deadline)) is not None:
            return session_lease
        # One thread builds, the others wait for it, each up to its own deadline.
        building = self._building
        if not building.acquire(timeout=deadline.remaining()):
            raise DeadlineError(
                f"instance {self._hub.instance!r}: no session for {self._bucket_id} within {deadline.seconds:g} s"
            )
        try:
            if (session_lease := self._try_borrow(deadline)) is not None:
                return session_lease
            self._refuse_when_closed()  # before a token is asked for: many readers may be queued when it closes
            session = self._build(deadline)
            with self._lock:
                before, closed = self._current, self._closed
                if not closed:
                    self._current = session
                    self._live.add(session)
                    session.readers += 1
                idle = before is not None and before.readers == 0
                if before is not None:  # its token ends soon: its readers read on
                    before.retired = True
                    self._discard_if_dead(before)
            if before is not None and idle:
                _abort(before)
            if closed:
                _abort(session)
                self._refuse_when_closed()
            return SessionLease(session)
        finally:
            building.release()

    def _discard_if_dead(self, session: XetSession) -> None:
        if session.retired and session.readers == 0:
            self._live.discard(session)
            if self._current is session:
                self._current = None

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise TransportError(f"instance {self._hub.instance!r} is closed")

    @property
    def ready(self) -> bool:
        """Whether there is a session to borrow."""
        with self._lock:
            return _usable(self._current, 0.0)

    def _try_borrow(self, deadline: Deadline) -> SessionLease | None:
        with self._lock:
            session = self._current
            if session is None or not _usable(session, deadline.remaining()):
                return None
            session.readers += 1
            return SessionLease(session)

    def _build(self, deadline: Deadline) -> XetSession:
        what = f"instance {self._hub.instance!r}: session"
        try:
            # Before a token is asked for, which costs a call.
            xet_home.expect_usable(None if self._temp_dir is None else self._temp_dir.root)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from None
        config = self._config.with_config(self._places())
        access = fetch_access(self._hub, self._bucket_id, self._right, deadline, patient=self._patient)
        connection = {"endpoint": access.url, "token": access.token, "token_expiry_unix_secs": _NEVER}
        with typed_errors(what):
            xet = hf_xet.XetSession(config=config)
            group = xet.new_download_stream_group(**connection) if self._right == "read" else None
        lives = access.expires - time.time()
        # By a clock that is far off it has ended already: then the store says when it does.
        return XetSession(xet, group, connection, lives if lives > 0 else math.inf)

    def _places(self) -> dict[str, Any]:
        """Where hf_xet keeps its files: by its configuration, never by the environment of the engine that it runs in."""
        if self._temp_dir is None:
            return {}
        try:
            directory = self._temp_dir.directory()
        except ConfigError as error:
            _log.warning("[%s] hf_xet keeps its files in %s: %s", self._hub.instance, xet_home.cache_root()[0], error)
            return {}
        return {
            "data.staging_subdir": str(directory / "staging"),
            "shard.cache_subdir": str(directory / "shards"),
            "shard.cache_size_limit": _SHARD_CACHE_BYTES,
        }

    def give_back(self, session_lease: SessionLease) -> None:
        """The reader is done with its session."""
        self._end(session_lease, retire=False)

    def give_up(self, session_lease: SessionLease) -> None:
        """Nobody waits for this reader any more, and it may be blocked: retire its session."""
        self._end(session_lease, retire=True)

    def retire(self, session_lease: SessionLease) -> None:
        """Replace the session for those who come next, such as after the store refused its token. The loan goes on."""
        with self._lock:
            session_lease.session.retired = True

    def renew(self) -> None:
        """Replace the current session for those who come next. Its readers read on."""
        with self._lock:
            session = self._current
            if session is None:
                return
            session.retired = True
            idle = session.readers == 0
            self._discard_if_dead(session)
        if idle:
            _abort(session)

    def doubt(self, session_lease: SessionLease) -> None:
        """Replace the session for those who come next if it is not new: the store may have moved since."""
        if time.monotonic() - session_lease.session.born >= _RENEWAL_SECS:
            self.retire(session_lease)

    def _end(self, session_lease: SessionLease, *, retire: bool) -> None:
        with self._lock:
            if session_lease.ended:
                return
            session_lease.ended = True
            session = session_lease.session
            session.readers -= 1
            session.retired = session.retired or retire
            dead = session.retired and session.readers == 0
            self._discard_if_dead(session)
        if dead:
            _abort(session)

    def close(self) -> None:
        """Abort all sessions, retired ones that are still read from too; their readers get an error at once."""
        with self._lock:
            self._closed = True
            self._current = None
            live, self._live = self._live, set()
        for session in live:
            _abort(session)


def _usable(session: XetSession | None, secs: float) -> bool:
    """Whether a session may be lent for an operation that takes up to so many seconds."""
    return session is not None and not session.retired and session.pid == os.getpid() and session.holds_for(secs)


def _abort(session: XetSession) -> None:
    # After a fork the session belongs to the parent; touching it would hang.
    if session.pid != os.getpid():
        return
    with contextlib.suppress(Exception):  # it is given up either way
        session.end()


@contextlib.contextmanager
def typed_errors(what: str) -> Iterator[None]:
    """Turn what hf_xet raises into our errors.

    Raises:
        ObjectMissingError: The store does not hold the content.
        AccessDeniedError: The store refused the token.
        ConfigError: hf_xet cannot write to its own directories; `TempDirError` where their disk is full.
        ThrottledError: The store asks to come again later.
        TransportError: Anything else; `DeadlineError` where hf_xet timed out.
    """
    try:
        yield
    except HFBucketError:
        raise
    except hf_xet.XetObjectNotFoundError as error:
        raise ObjectMissingError(f"{what}: the store does not hold it: {_short(error)}") from None
    except hf_xet.XetAuthenticationError as error:
        raise AccessDeniedError(
            f"{what}: the store refused the access token: {_short(error)}", _STATUS_UNAUTHORIZED
        ) from None
    except TimeoutError as error:
        raise DeadlineError(f"{what}: the store did not answer in time: {_short(error)}") from None
    except (OSError, RuntimeError, ValueError, KeyboardInterrupt) as error:
        # KeyboardInterrupt: what hf_xet raises in readers of a session that was aborted under them.
        raise _typed(what, error) from None


def _typed(what: str, error: BaseException) -> HFBucketError:
    """hf_xet 1.8 raises one class for every answer of the store: the status is in its text only."""
    message = f"{what}: {type(error).__name__}: {_short(error)}"
    number = int(local[1]) if isinstance(error, OSError) and (local := _LOCAL.search(str(error))) else 0
    if number in _FULL:
        return TempDirError(
            f"{what}: no space for hf_xet's files: {os.strerror(number)}; make room in download_tmp_dir"
        )
    if number in _UNWRITABLE:
        root, variable = xet_home.cache_root()
        return ConfigError(
            f"{what}: hf_xet cannot write its files: {os.strerror(number)}; download_tmp_dir and {str(root)!r} ({variable}, or "
            "HF_XET_CACHE) must be writable"
        )
    found = _STATUS.search(str(error))
    status = int(found[1]) if found else 0
    if status == _STATUS_NOT_FOUND:
        return ObjectMissingError(message)
    if status in _STATUS_DENIED:
        return AccessDeniedError(message, status)
    return ThrottledError(message) if status == _STATUS_TOO_MANY else TransportError(message)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
