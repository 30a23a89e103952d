"""hf_xet sessions: configuration, sharing, and replacement when their threads stay blocked.

A blocked reader cannot be cancelled: `stream.cancel()` raises `Already borrowed`, and `group.abort()` frees it only
when the network returns. `XetSession.sigint_abort()` frees all readers of a session at once, and ends the session.
Readers therefore borrow a session. If one reader is abandoned, the session is retired: new readers get a new one, and
the old one is aborted as soon as no awaited reader uses it.

hf_xet does not refresh tokens: a session whose token is about to expire is replaced before it is lent, by a request of
`HubClient` (counted, rate-limited, with the current Hub token). See docs/decisions/0030.
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
from collections.abc import Iterator  # noqa: TC003 - contextmanager's return type is evaluated by Sphinx and here
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
"""Minimum seconds between renewals of failed sessions, because each renewal costs a Hub request."""

_FILES_OF_A_GROUP: Final = 1000
"""A group remembers every download until it ends, in about 1.2 KiB each, so that a new one must replace it. Creating
one takes 10 ms; connections belong to the session."""

_MAX_UNIX_SECS: Final = 2**40
_NEVER: Final = _MAX_UNIX_SECS
"""Expiry passed to hf_xet; this module decides when a token is replaced."""

_TOKEN_MARGIN_SECS: Final = 60.0
"""A session is not lent within this time in seconds before its token expires, or, if the token lives less than twice as
long, after half of its life."""

_SHARD_CACHE_BYTES: Final = 256 * 1024 * 1024
"""Maximum size of hf_xet's on-disk cache of uploads, in a directory that is removed with the process."""

_LOCAL: Final = re.compile(r"\bI/O error: .*\(os error (\d+)\)")
"""Message of hf_xet 1.8 for a disk error in its own directories."""
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
    """Return the configuration of sessions.

    Args:
        timeout_secs: Deadline of the operations in seconds; connect and read time out well before it, with time for a
            retry.
        streams: Maximum number of open streams. hf_xet by default starts with 4 concurrent downloads and adapts over
            seconds, which makes it slow with many small objects.
        piece_bytes: Size of the pieces that a stream requests from the store and returns.
        buffer_bytes: Maximum number of bytes that all streams of a session hold, from the request until they are
            returned.
        retries: Number of retries of a failed request.
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
            # It would cost a request to the store for each file before its upload. Contents that the bucket holds are
            # found by key, and foreign bytes never equal KV cache.
            "deduplication.global_dedup_query_enabled": False,
            "reconstruction.min_reconstruction_fetch_size": piece_bytes,
            "reconstruction.max_reconstruction_fetch_size": piece_bytes,
            "reconstruction.min_prefetch_buffer": buffer_bytes,
            # The whole buffer at once, and none in addition for each stream.
            "reconstruction.download_buffer_size": buffer_bytes,
            "reconstruction.download_buffer_perfile_size": 1,
            "reconstruction.download_buffer_limit": buffer_bytes,
            "telemetry.enabled": False,
        }
    )


@dataclass(frozen=True, slots=True)
class CasAccess:
    """Access to the content-addressed store, issued by the Hub.

    Attributes:
        url: Address of the store.
        token: Short-lived access token of the store, not the Hub's.
        expires: Expiry in Unix seconds.
    """

    url: str
    token: str
    expires: int

    def __repr__(self) -> str:
        return f"CasAccess(url={self.url!r}, expires={self.expires})"


def fetch_access(
    hub: HubClient, bucket_id: str, right: Literal["read", "write"], deadline: Deadline, *, patient: bool = True
) -> CasAccess:
    """Request access to a bucket's content from the Hub.

    Requested here rather than by hf_xet, so that the request has a deadline and typed errors.

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
        # Both are sent in hf_xet's own requests, so they must not contain line breaks or surrogates.
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
    """One hf_xet session and, for reading, its groups, with a count of its readers.

    Args:
        xet: hf_xet's session.
        group: Group for streams; None for writing.
        connection: Arguments that open a group or a commit.
        token_secs: Seconds until its token expires; infinite if unknown.
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
        """Return whether its token is valid for the time of an operation, and for at least a minute.

        A token that lives too briefly for any session is used for the first half of its life.

        Args:
            secs: Maximum time of the operation in seconds.
        """
        left = self.born + self._token_secs - time.monotonic()
        return left >= min(max(_TOKEN_MARGIN_SECS, secs), self._token_secs / 2)

    @contextlib.contextmanager
    def download(self, info: Any, path: Path) -> Iterator[Any]:
        """Start writing a file, and return its handle for the duration of a `with` block.

        Args:
            info: hf_xet's description of the object.
            path: Path of the file, which hf_xet creates.
        """
        group = self._file_group()  # kept alive while it is read from
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
        with self._renewing:  # `end` does not wait for this lock, whose holder may wait for the Hub
            if self._files is None or self._started >= _FILES_OF_A_GROUP:
                self._files, self._started = self.xet.new_file_download_group(**self.connection), 0
            self._started += 1
            return self._files

    def end(self) -> None:
        """Free its readers at once."""
        with self._lock:
            self._ended = True
            downloads = list(self._downloads)
        for handle in downloads:
            handle.cancel()
        if self._files is None:
            self.xet.sigint_abort()
        elif self.group is not None:
            # Aborting the session would wait, with the GIL held, for file-writing threads: for ever if a disk hangs.
            self.group.abort()


class SessionLease:
    """One reader's use of a session, ended once: by the reader, or by the code that gives the reader up."""

    def __init__(self, session: XetSession) -> None:
        self.session = session
        self.ended = False


class SessionPool:
    """Current session of one bucket for reading or writing, replaced when retired, refused, or inherited by a fork.

    Args:
        hub: Client that requests access tokens.
        bucket_id: `<namespace>/<bucket>`.
        right: Right of the sessions.
        config: Configuration of the sessions; see `xet_config`.
        patient: Whether token requests wait for pauses of the Hub; see `HubClient.request`.
        temp_dir: Directory of hf_xet's files; None for the places set by the environment.
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
        """Borrow the current session, creating one if there is none.

        Raises:
            HFBucketError: Access was refused, or did not arrive before the deadline.
        """
        if (session_lease := self._try_borrow(deadline)) is not None:
            return session_lease
        # One thread creates it, and the others wait, each up to its own deadline.
        building = self._building
        if not building.acquire(timeout=deadline.remaining()):
            raise DeadlineError(
                f"instance {self._hub.instance!r}: no session for {self._bucket_id} within {deadline.seconds:g} s"
            )
        try:
            if (session_lease := self._try_borrow(deadline)) is not None:
                return session_lease
            self._refuse_when_closed()  # before a token is requested: many readers may be queued at the close
            session = self._build(deadline)
            with self._lock:
                before, closed = self._current, self._closed
                if not closed:
                    self._current = session
                    self._live.add(session)
                    session.readers += 1
                idle = before is not None and before.readers == 0
                if before is not None:  # its token expires soon; its readers continue
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
        """Whether a session is available."""
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
            # Before the token request, which costs a Hub call.
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
        # By a very wrong clock it has already expired; then rely on the store to refuse it.
        return XetSession(xet, group, connection, lives if lives > 0 else math.inf)

    def _places(self) -> dict[str, Any]:
        """Return the places of hf_xet's files, set by its configuration and never by the engine's environment."""
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
        """Return a session after its reader has finished."""
        self._end(session_lease, retire=False)

    def give_up(self, session_lease: SessionLease) -> None:
        """Retire the session of an abandoned reader, which may be blocked."""
        self._end(session_lease, retire=True)

    def retire(self, session_lease: SessionLease) -> None:
        """Replace the session for later readers, such as after the store refused its token. This reader keeps it."""
        with self._lock:
            session_lease.session.retired = True

    def renew(self) -> None:
        """Replace the current session for later readers. Its present readers continue."""
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
        """Replace the session for later readers unless it is new, because the store may have moved since."""
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
        """Abort all sessions, including retired ones still in use; their readers get an error at once."""
        with self._lock:
            self._closed = True
            self._current = None
            live, self._live = self._live, set()
        for session in live:
            _abort(session)


def _usable(session: XetSession | None, secs: float) -> bool:
    """Return whether a session may be lent for an operation of at most `secs` seconds."""
    return session is not None and not session.retired and session.pid == os.getpid() and session.holds_for(secs)


def _abort(session: XetSession) -> None:
    # After a fork the session belongs to the parent; using it would hang.
    if session.pid != os.getpid():
        return
    with contextlib.suppress(Exception):  # the session is dropped either way
        session.end()


@contextlib.contextmanager
def typed_errors(what: str) -> Iterator[None]:
    """Convert hf_xet's exceptions into this package's errors.

    Raises:
        ObjectMissingError: The store does not hold the content.
        AccessDeniedError: The store refused the token.
        ConfigError: hf_xet cannot write to its own directories; `TempDirError` if their disk is full.
        ThrottledError: The store asks for a later retry.
        TransportError: Any other failure; `DeadlineError` if hf_xet timed out.
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
        # hf_xet raises KeyboardInterrupt in readers of a session that was aborted.
        raise _typed(what, error) from None


def _typed(what: str, error: BaseException) -> HFBucketError:
    """Return the typed error: hf_xet 1.8 raises one class for all responses, with the status only in the text."""
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
