"""hf_xet sessions: how they are configured, shared, and given up when their threads stay blocked.

A blocked reader cannot be told to stop: `stream.cancel()` raises `Already borrowed` and `group.abort()` frees it only
when the network returns. `XetSession.sigint_abort()` frees all readers of a session at once, and the session is dead.
So readers borrow a session, and one whose reader was abandoned is retired: new readers get a new one, and as soon as
nobody who is still waited for reads from the old one, it is aborted.
"""

from __future__ import annotations

import contextlib
import logging
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

from hfbucket_plugin.errors import (
    AccessDeniedError,
    DeadlineError,
    HFBucketError,
    ObjectMissingError,
    ThrottledError,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hfbucket_plugin.deadlines import Deadline
    from hfbucket_plugin.hub import HubClient

_log = logging.getLogger(__name__)

_RENEWAL_SECS: Final = 30.0
"""A session that failed is renewed, but no more often than this: each renewal costs the Hub a request."""

_FILES_OF_A_GROUP: Final = 1000
"""A group remembers every download until it ends, in about 1.2 KiB each: a new one has to follow. Making one takes 10 ms, and
connections belong to the session."""

_MAX_UNIX_SECS: Final = 2**40
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
        usable = urlsplit(access.url).scheme in {"http", "https"} and 0 <= access.expires < _MAX_UNIX_SECS
    except (KeyError, TypeError, ValueError, OverflowError):
        usable = False
    if not usable:
        raise TransportError(
            f"instance {hub.instance!r}: {route}: the Hub's answer lacks a usable casUrl, accessToken or exp"
        )
    return access


def _token_path(bucket_id: str, right: str) -> str:
    return f"/api/buckets/{bucket_id}/xet-{right}-token"


class Session:
    """One hf_xet session and, for reading, its groups; counts who reads from it.

    Args:
        xet: The session.
        group: For streams; None where it is for writing.
        connection: The arguments that open a group or a commit.
    """

    def __init__(self, xet: Any, group: Any, connection: Mapping[str, Any]) -> None:
        self.xet = xet
        self.group = group
        self.connection = connection
        self.retired = False
        self.readers = 0
        self.pid = os.getpid()
        self.born = time.monotonic()
        self._lock = threading.Lock()
        self._renewing = threading.Lock()
        self._files: Any = None
        self._started = 0
        self._downloads: set[Any] = set()
        self._ended = False

    @contextlib.contextmanager
    def download(self, info: Any, path: Path) -> Iterator[Any]:
        """Have a file written; the handle on it, for the length of a `with` block.

        Args:
            info: Of the object.
            path: Of the file, which hf_xet makes.
        """
        group = self._file_group()  # as long as somebody reads from it
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
            expired = time.time() >= self.connection["token_expiry_unix_secs"]
            if self._files is None or self._started >= _FILES_OF_A_GROUP:
                # A group asks for a token by itself where that of the session has expired, and so would all that follow.
                self.retired = self.retired or (self._files is not None and expired)
                self._files, self._started = self.xet.new_file_download_group(**self.connection), 0
            self._started += 1
            return self._files

    def end(self) -> None:
        """Free whoever reads from it, at once."""
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


class Loan:
    """One reader's hold on a session, ended once: by the reader itself, or by whoever gives the reader up."""

    def __init__(self, session: Session) -> None:
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
    """

    def __init__(
        self,
        hub: HubClient,
        bucket_id: str,
        right: Literal["read", "write"],
        config: hf_xet.XetConfig,
        *,
        patient: bool = True,
    ) -> None:
        self._hub = hub
        self._bucket_id = bucket_id
        self._right = right
        self._config = config
        self._patient = patient
        self._building = threading.Lock()
        self._lock = threading.Lock()
        self._current: Session | None = None
        self._closed = False

    def borrow(self, deadline: Deadline) -> Loan:
        """Take a hold on the current session, building one if there is none.

        Raises:
            HFBucketError: No access, or no answer before the deadline.
        """
        if (loan := self._try_borrow()) is not None:
            return loan
        # One thread builds, the others wait for it, each up to its own deadline.
        if not self._building.acquire(timeout=deadline.remaining()):
            raise DeadlineError(
                f"instance {self._hub.instance!r}: no session for {self._bucket_id} within {deadline.seconds:g} s"
            )
        try:
            if (loan := self._try_borrow()) is not None:
                return loan
            self._refuse_when_closed()  # before a token is asked for: many readers may be queued when it closes
            session = self._build(deadline)
            with self._lock:
                self._refuse_when_closed()
                self._current = session
                session.readers += 1
                return Loan(session)
        finally:
            self._building.release()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise TransportError(f"instance {self._hub.instance!r} is closed")

    @property
    def ready(self) -> bool:
        """Whether there is a session to borrow."""
        with self._lock:
            return _usable(self._current)

    def _try_borrow(self) -> Loan | None:
        with self._lock:
            session = self._current
            if session is None or not _usable(session):
                return None
            session.readers += 1
            return Loan(session)

    def _build(self, deadline: Deadline) -> Session:
        access = fetch_access(self._hub, self._bucket_id, self._right, deadline, patient=self._patient)
        connection = self._connection(access, self._hub.headers())
        with typed_errors(f"instance {self._hub.instance!r}: session"):
            xet = hf_xet.XetSession(config=self._config)
            group = xet.new_download_stream_group(**connection) if self._right == "read" else None
        return Session(xet, group, connection)

    def _connection(self, access: CasAccess, headers: dict[str, str]) -> dict[str, Any]:
        """The arguments that open a group or a commit: seeded with a token, and able to refresh it."""
        return {
            "endpoint": access.url,
            "token": access.token,
            "token_expiry_unix_secs": access.expires,
            "token_refresh_url": self._hub.endpoint + _token_path(self._bucket_id, self._right),
            "token_refresh_headers": headers,
        }

    def give_back(self, loan: Loan) -> None:
        """The reader is done with its session."""
        self._end(loan, retire=False)

    def give_up(self, loan: Loan) -> None:
        """Nobody waits for this reader any more, and it may be blocked: retire its session."""
        self._end(loan, retire=True)

    def retire(self, loan: Loan) -> None:
        """Replace the session for those who come next, such as after the store refused its token. The loan goes on."""
        with self._lock:
            loan.session.retired = True

    def renew(self) -> None:
        """Replace the current session for those who come next. Whoever reads from it reads on."""
        with self._lock:
            session = self._current
            if session is None:
                return
            session.retired = True
            idle = session.readers == 0
            if idle:
                self._current = None
        if idle:
            _abort(session)

    def doubt(self, loan: Loan) -> None:
        """Replace the session for those who come next if it is not new: the store may have moved since."""
        if time.monotonic() - loan.session.born >= _RENEWAL_SECS:
            self.retire(loan)

    def _end(self, loan: Loan, *, retire: bool) -> None:
        with self._lock:
            if loan.ended:
                return
            loan.ended = True
            session = loan.session
            session.readers -= 1
            session.retired = session.retired or retire
            dead = session.retired and session.readers == 0
            if dead and self._current is session:
                self._current = None
        if dead:
            _abort(session)

    def close(self) -> None:
        """Abort the current session; whoever reads from it gets an error at once."""
        with self._lock:
            self._closed = True
            session, self._current = self._current, None
        if session is not None:
            _abort(session)


def _usable(session: Session | None) -> bool:
    return session is not None and not session.retired and session.pid == os.getpid()


def _abort(session: Session) -> None:
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
    told = f"{what}: {type(error).__name__}: {_short(error)}"
    found = _STATUS.search(str(error))
    status = int(found[1]) if found else 0
    if status == _STATUS_NOT_FOUND:
        return ObjectMissingError(told)
    if status in _STATUS_DENIED:
        return AccessDeniedError(told, status)
    return ThrottledError(told) if status == _STATUS_TOO_MANY else TransportError(told)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
