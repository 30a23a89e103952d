"""Requests to the Hub's API over huggingface_hub's shared connections, each with a deadline and typed errors.

huggingface_hub's own client has no timeout and retries for minutes. Changing that is process-wide
(`set_client_factory`), which a plugin inside an engine must not do. This module therefore uses the same client with a
timeout for each request, and reads bodies against the deadline. `answers` bounds and checks the responses.
"""

from __future__ import annotations

import os
import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urljoin, urlsplit
from urllib.request import proxy_bypass

import httpx2
import tenacity
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session

from hfbucket_plugin.core import forks, telemetry, texts
from hfbucket_plugin.core.concurrency import WorkerPool, result_of
from hfbucket_plugin.core.dates import http_date
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    ConfigError,
    DeadlineError,
    HFBucketError,
    RefusedError,
    ThrottledError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub import answers
from hfbucket_plugin.hub.rate_limit import RateLimiter, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from hfbucket_plugin.core.deadline import Deadline


_PROXIES: Final = ("http", "https", "all")
_CERTIFICATES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")

_lock = forks.ForkSafeLock()
_direct: httpx2.Client | None = None
_parents: httpx2.Client | None = None
"""The parent's client, kept alive in a forked child: closing it there would end the parent's TLS sessions."""


def session(endpoint: str) -> httpx2.Client:
    """Return the HTTP client for requests to a Hub.

    Args:
        endpoint: Address of the Hub.

    Raises:
        ConfigError: The environment's proxies or certificates are unusable; the message names the variable.
        OfflineModeIsEnabled: HF_HUB_OFFLINE is set.
    """
    try:
        return get_session()
    except (ImportError, ValueError) as error:  # ImportError: SOCKS without its package
        lacking = isinstance(error, ImportError)
    except OSError:
        names = [name for name in _CERTIFICATES if os.environ.get(name)]
        if not names:
            raise
        raise ConfigError(
            f"{names[0]} names {os.environ[names[0]]!r}, from which no certificates can be read; correct or unset it"
        ) from None
    host = urlsplit(endpoint).hostname or ""
    if _exempt(host):
        return _without_proxies()
    names = _proxy_variables()
    advice = "install the package socksio" if lacking else "correct it"
    why = "a SOCKS proxy, for which the package socksio is missing" if lacking else "a proxy that cannot be used"
    raise ConfigError(
        f"{' or '.join(names) or 'a proxy variable'} names {why}; {advice}, or put {host!r} into NO_PROXY"
    )


def _exempt(host: str) -> bool:
    """Return whether NO_PROXY exempts this host."""
    return bool(proxy_bypass(host))


def _proxy_variables() -> list[str]:
    """Return the names of set proxy variables, without their values, which may hold passwords."""
    return [name for name in os.environ if name.lower() in {f"{scheme}_proxy" for scheme in _PROXIES}]


def _without_proxies() -> httpx2.Client:
    global _direct  # noqa: PLW0603 - one connection pool per process, as in huggingface_hub
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    with _lock:
        if _direct is None:
            context = httpx2.create_ssl_context()
            _direct = httpx2.Client(verify=context, trust_env=False, follow_redirects=False, timeout=None)
        return _direct


def _forget() -> None:
    """Drop the parent's connections: a forked child that wrote to them would mix its requests with the parent's."""
    global _direct, _parents
    _parents, _direct = _direct, None


os.register_at_fork(after_in_child=_forget)


_PIECE_BYTES: Final = 64 * 1024
_SHORT_PAUSE_SECS: Final = 1.0
"""Minimum pause after a 429; a shorter one would repeat requests at once, without end."""

_BACKOFF: Final = tenacity.wait_random_exponential(multiplier=0.1, max=5)
_MOST_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_SAME_METHOD: Final = frozenset({307, 308})
"""Only these are followed; the others would turn a POST into a GET."""

_MAX_SERVER_WORDS: Final = 300
_THREADS: Final = 96
_BACKLOG: Final = 256
"""Maximum number of requests running or queued. Lookups have at most 64, puts about 20, reads one for a token, tools a
few more."""

_CLIENT_ERROR, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _REQUEST_TIMEOUT = 400, 401, 403, 404, 408
_TOO_MANY, _SERVER_ERROR = 429, 500
_QUOTES: Final = "\"'`"
_BUCKET_MISSING: Final = "RepoNotFound"


def token_problem(token: str) -> str | None:
    """Return why a text cannot be an access token; None if it can.

    Args:
        token: Value of a variable or of the setting `token`, stripped of whitespace.
    """
    if not (token.isascii() and token.isprintable()):
        return "holds line breaks or other characters that cannot be sent; is it the content of a file with more than the token?"
    if token[0] in _QUOTES or token[-1] in _QUOTES:
        return "has quotes around it, which `docker --env-file` and systemd's EnvironmentFile do not all take off: write it without"
    if token.lower().startswith("bearer"):
        return "begins with 'Bearer': leave that away, the client adds it"
    if "#" in token:
        return "has a comment behind it, which env files do not know: leave it away"
    if " " in token or "=" in token.rstrip("="):
        return "is more than the token: it holds blanks or an assignment"
    return None


@dataclass(frozen=True, slots=True)
class Answer:
    """Response of the Hub, with a status below 400 or one that the caller allowed."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    next_page: str | None

    room: answers.BodyLimit = answers.SMALL

    @property
    def date(self) -> datetime | None:
        """Time of the response to the second; None if it is missing."""
        return http_date(self.headers.get("date", ""))

    def json(self, what: str) -> Any:
        """Parse the body as one JSON value.

        Raises:
            TransportError: The body is not JSON, such as a proxy's page or a truncated response.
        """
        return answers.document(self.body, what, self.room)

    def records(self, what: str) -> list[dict[str, Any]]:
        """Parse the body as a list of records.

        Raises:
            TransportError: The body is not a list of records.
        """
        return answers.records(self.body, what, self.room)


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    address: str
    what: str
    deadline: Deadline
    patient: bool
    urgent: bool
    room: answers.BodyLimit
    body: dict[str, Any]
    sent: threading.Event


class HubClient:
    """Client of one Hub for one instance.

    Args:
        endpoint: Address of the Hub.
        instance: Name of the instance, for errors and metrics.
        token: Returns the access token, or None; called for each request.
        token_source: Description of the token's source for errors; never the token itself.
        sink: Metrics sink for requests.
        rate_limiter: Admits requests; by default one without a client-side limit.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        instance: str,
        token: Callable[[], str | None],
        token_source: str,
        sink: telemetry.Sink,
        rate_limiter: RateLimiter | None = None,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.instance = instance
        self._token = token
        self._token_source = token_source
        self._sink = sink
        self.rate_limiter = rate_limiter or RateLimiter(instance, None)
        self._threads = WorkerPool(f"hfbucket-hub-{instance}", _THREADS, _BACKLOG)

    def close(self) -> None:
        """Send no more requests; those in progress end by themselves."""
        self._threads.close()

    def headers(self) -> dict[str, str]:
        """Return the headers of a request, with authorization; never log them.

        Raises:
            ConfigError: The token cannot be sent. This is checked here because the HTTP client's error would show it.
        """
        token = self._token()
        if token is not None and (problem := token_problem(token)) is not None:
            raise ConfigError(f"instance {self.instance!r}: the token from {self._token_source} {problem}")
        # `False`, not None, because huggingface_hub would otherwise send any other token that it finds on the machine.
        return build_hf_headers(token=token or False, library_name="lmcache-hfbucket", library_version=_version())

    def request(
        self,
        method: str,
        url: str,
        *,
        route: str,
        deadline: Deadline,
        attempts: int = 1,
        patient: bool = True,
        urgent: bool = False,
        allow: frozenset[int] = frozenset(),
        room: answers.BodyLimit = answers.SMALL,
        sent: threading.Event | None = None,
        **body: Any,
    ) -> Answer:
        """Make one request, and retry transient failures.

        Args:
            method: HTTP method.
            url: Path on the Hub, or a full address on the same host.
            route: Short name for metrics and errors, such as ``paths-info``.
            deadline: When to give up, including retries.
            attempts: Maximum number of attempts after transport failures. An attempt that ended in a pause does not
                count.
            patient: Whether to wait, within the deadline, for a pause that the Hub requested or for the client-side
                limit.
            urgent: Whether to ignore pauses and the client-side limit: for the one call that unblocks others.
            allow: Statuses of 400 and above to return instead of raising.
            room: Limit of the response.
            sent: Set as soon as the request is sent to the Hub.
            **body: `json`, `content`, `params` or more `headers`.

        Raises:
            AccessDeniedError: 401 or 403.
            BucketMissingError: 404, and the Hub says that the bucket is missing.
            ConfigError: The token cannot be sent.
            RefusedError: Another 4xx: the request itself was wrong.
            ThrottledError: 429, or a pause is in effect; `BudgetError` if the client-side limit is used up.
            TransportError: No response, a 5xx, a truncated response, or a 404 from something that is not a Hub;
                `DeadlineError` if the deadline passed; `UnsentError` if it passed before the request was sent.
        """
        what = f"instance {self.instance!r}: {route}"
        request = _Request(
            method, self._address(url), what, deadline, patient, urgent, room, body, sent or threading.Event()
        )
        paused = 0

        def enough(state: tenacity.RetryCallState) -> bool:
            nonlocal paused
            paused += isinstance(state.outcome and state.outcome.exception(), ThrottledError)
            return state.attempt_number - paused >= attempts

        retrying = tenacity.Retrying(
            stop=enough,
            wait=lambda state: min(_wait(state), deadline.remaining()),
            retry=tenacity.retry_if_exception(lambda error: _worth_another_try(error, request)),
            sleep=self.rate_limiter.sleep,
            reraise=True,
        )
        try:
            return retrying(self._once, request, route, allow)
        except DeadlineError as error:
            if request.sent.is_set() or isinstance(error, UnsentError):
                raise
            raise UnsentError(f"{error} before it was sent") from None

    def _address(self, url: str) -> str:
        if url.startswith("/"):
            return self.endpoint + url
        try:
            elsewhere = urlsplit(url)[:2] != urlsplit(self.endpoint)[:2]
        except ValueError:
            elsewhere = True
        if elsewhere:  # a page link to another host gets no token
            raise TransportError(
                f"instance {self.instance!r}: the Hub's answer leads to another host: {self.clean(url)!r}"
            )
        return url

    def _once(self, request: _Request, route: str, allow: frozenset[int]) -> Answer:
        request.deadline.check(request.what)
        if not request.urgent:
            self.rate_limiter.admit(request.what, request.deadline, patient=request.patient)
        outcome = "ok"
        try:
            answer = self._send(request)
            self.rate_limiter.observe(answer.status, answer.headers)
            if answer.status >= _CLIENT_ERROR and answer.status not in allow:
                raise self._error(answer, request.what)
        except HFBucketError as error:
            outcome = error.kind
            raise
        finally:
            self._sink.count(telemetry.HUB_REQUESTS, instance=self.instance, route=route, outcome=outcome)
        return answer

    def _send(self, request: _Request) -> Answer:
        """Send in a separate thread, because a hanging name server or slowly arriving headers ignore timeouts."""
        try:
            answer = self._threads.submit(self._exchange, request)
        except RuntimeError as error:
            raise UnsentError(f"{request.what}: not sent: {error}") from None
        try:
            return result_of(answer, request.deadline, request.what)
        except DeadlineError:
            answer.cancel()
            raise

    def _exchange(self, request: _Request) -> Answer:
        address = request.address
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._answer(request, address)
            if answer.status not in _REDIRECTS:
                return answer
            address = self._redirected(request, answer, address)
        raise TransportError(f"{request.what}: {self.endpoint} redirects more than {_MOST_REDIRECTS} times")

    def _redirected(self, request: _Request, answer: Answer, address: str) -> str:
        """Return the target of a redirect, which must be on the same host: no other may answer for the Hub."""
        location = answer.headers.get("location", "")
        try:
            target = urljoin(address, location)
            same = urlsplit(target)[:2] == urlsplit(self.endpoint)[:2]
        except ValueError:
            same = False
        if not location or not same:
            raise TransportError(
                f"{request.what}: {self.endpoint} redirects to {self.clean(location)[:100]!r}, which is not asked; if the Hub is "
                "there, name it in endpoint or HF_ENDPOINT"
            )
        if request.method != "GET" and answer.status not in _SAME_METHOD:
            raise TransportError(f"{request.what}: {self.endpoint} answered {answer.status} to a {request.method}")
        return target

    def _answer(self, request: _Request, address: str) -> Answer:
        what = request.what
        # Only the encoding that is unpacked here, in pieces, is requested.
        headers = self.headers() | {"Accept-Encoding": "gzip"} | request.body.get("headers", {})
        body = {name: value for name, value in request.body.items() if name != "headers"}
        timeout = httpx2.Timeout(max(0.001, request.deadline.remaining()))
        request.sent.set()
        try:
            with session(self.endpoint).stream(
                request.method, address, headers=headers, timeout=timeout, follow_redirects=False, **body
            ) as response:
                content = _read(response, what, request.deadline, request.room)
                following = response.links.get("next", {}).get("url")
                return Answer(response.status_code, response.headers, content, following, request.room)
        except httpx2.TimeoutException:
            request.deadline.check(what)
            raise TransportError(f"{what}: the Hub at {self.endpoint} did not answer in time") from None
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, ssl.SSLError) as error:
            raise TransportError(f"{what}: the Hub at {self.endpoint} cannot be reached: {self.clean(error)}") from None
        except OfflineModeIsEnabled:
            raise TransportError(f"{what}: HF_HUB_OFFLINE is set, so nothing is asked of the Hub; unset it") from None
        except HFBucketError:
            raise
        except ValueError as error:  # for example UnicodeError of a host name that cannot be resolved
            raise ConfigError(
                f"{what}: endpoint {self.endpoint!r} is not a valid address ({self.clean(error)}); correct endpoint or "
                "HF_ENDPOINT"
            ) from None
        except RuntimeError as error:
            # httpx2 raises this directly if another thread of the process closed the shared client meanwhile.
            raise TransportError(f"{what}: the connection pool was closed under the request: {error}") from None

    def _error(self, answer: Answer, what: str) -> HFBucketError:
        words = self.clean(answer.headers.get("x-error-message") or answers.words(answer.body))
        status = answer.status
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            advice = "give it the right to do this" if status == _FORBIDDEN else "set one that is valid"
            return AccessDeniedError(
                f"{what}: the Hub answered {status} ({words}) to the token from {self._source()}; {advice}",
                status,
            )
        if status == _NOT_FOUND and answer.headers.get("x-error-code") == _BUCKET_MISSING:
            return BucketMissingError(
                f"{what}: the Hub answered 404 ({words}): the bucket does not exist, or may not be "
                f"seen with the token from {self._source()}. Create it, correct bucket_handle, or set "
                "create_bucket_if_missing"
            )
        if status == _TOO_MANY:
            after = retry_after(answer.headers)
            wait = f"; it asks to wait {after:g} s" if after is not None else ""
            return ThrottledError(f"{what}: the Hub answered 429, the quota of this token is used up{wait}", after)
        if status == _NOT_FOUND:  # from a proxy, or a wrong endpoint: it says nothing about the bucket
            return TransportError(
                f"{what}: {self.endpoint} answered 404 ({words}), and not as a Hub does for a missing bucket; check "
                "endpoint or HF_ENDPOINT"
            )
        if status >= _SERVER_ERROR or status == _REQUEST_TIMEOUT:
            return TransportError(f"{what}: the Hub answered {status} ({words})")
        return RefusedError(f"{what}: the Hub answered {status} ({words})")

    def _source(self) -> str:
        return self._token_source if self._token() else f"{self._token_source}: not set"

    def clean(self, words: object) -> str:
        """Return foreign text on one line, shortened, after removing the token if the text repeats it."""
        texts.know(self._token())
        return texts.shown(" ".join(str(words).split()))[:_MAX_SERVER_WORDS]


def _read(response: httpx2.Response, what: str, deadline: Deadline, room: answers.BodyLimit) -> bytes:
    """Read and unpack the body here, because the client would unpack a piece at once, whatever its size."""
    unpacking = answers.Unpacking(response.headers.get("content-encoding", ""), what)
    failed = response.status_code >= _CLIENT_ERROR or response.status_code in _REDIRECTS
    pieces, size = [], 0
    for raw in response.iter_raw(_PIECE_BYTES):
        for piece in unpacking.pieces(raw):
            deadline.check(what)  # a read timeout alone would allow a slow body to continue for ever
            size += len(piece)
            pieces.append(piece)
            if failed and size >= answers.WORDS:
                return b"".join(pieces)[: answers.WORDS]
            if size > room.nbytes:
                raise answers.TooLongError(
                    f"{what}: the Hub's answer is longer than {room.nbytes} bytes, more than was asked for"
                )
    unpacking.finish()
    return b"".join(pieces)


def _wait(state: tenacity.RetryCallState) -> float:
    error = state.outcome and state.outcome.exception()
    if isinstance(error, ThrottledError) and (error.retry_after is None or error.retry_after >= _SHORT_PAUSE_SECS):
        return 0.0  # the next attempt waits where all calls do
    return _BACKOFF(state)


def _worth_another_try(error: BaseException, request: _Request) -> bool:
    if isinstance(error, ThrottledError):
        return request.patient and not request.urgent and (error.retry_after or 0.0) < request.deadline.for_a_pause
    if isinstance(error, answers.TooLongError):  # the next response would be too long as well
        return False
    return isinstance(error, TransportError) and not request.deadline.passed


def _version() -> str:
    from hfbucket_plugin import __version__  # noqa: PLC0415 - the package imports this module

    return __version__
