"""HTTP client of engines: JSON requests and answers, always with a deadline."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import httpx2

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.errors import ConfigError
from warmer.report.outcomes import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_ANSWER_SECS: Final = 30.0
HICCUP_SECS: Final = 30.0
"""Maximum seconds in which a server that was there may not answer or be busy, before a load fails."""

FAILURES: Final = 3
"""Consecutive failed loads before a server is given up."""

_NOT_NOW: Final = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
WAIT_SECS: Final = 1.0
"""Seconds between two requests to a server that does not answer yet."""

_FIRST_PAUSE_SECS: Final = 0.05
_MOST_BYTES: Final = 16 * 1024 * 1024
"""Maximum size of an answer, decompressed. The longest are configurations and lists of models, some hundred KiB."""

_SHOWN: Final = 300
START_IT: Final = "start the engine, look at the address, or wait longer (--wait-engine)"
"""Advice for an engine that does not answer in time."""

_Answer = TypeVar("_Answer")


class NotReadyError(EngineError):
    """The server does not answer yet, or reports that it is not ready; a retry may succeed."""


class EngineHTTP:
    """Client of one server. Use it as a context manager.

    Args:
        address: Address such as `http://127.0.0.1:8080`.
        key: Key sent as `Authorization: Bearer`; None for none.

    Raises:
        ConfigError: The address is invalid.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self.address = address.rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(f"engine address {address!r} does not read http://<host>:<port>")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx2.Client(trust_env=False, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, secs: float = _ANSWER_SECS
    ) -> dict[str, Any]:
        """Send a request, and return the answer.

        Args:
            method: HTTP method.
            path: Path such as `/status`.
            body: Body, sent as JSON; None for none.
            secs: Maximum seconds until the whole answer has arrived.

        Raises:
            NotReadyError: No server answers, or the status is 502, 503 or 504.
            ConfigError: The server refuses the request with 400 or 422.
            EngineError: The answer cannot be used.
        """
        what = f"{method} {self.address}{path}"
        try:
            with self._client.stream(method, self.address + path, json=body, timeout=secs) as response:
                content = _content(response, what, Deadline.after(secs))
        except httpx2.TransportError as error:
            raise NotReadyError(f"{what}: no answer: {str(error) or type(error).__name__}") from None
        except httpx2.RequestError as error:
            raise EngineError(f"{what}: the answer cannot be read: {error}") from None
        except httpx2.InvalidURL as error:
            raise ConfigError(f"{what}: {error}") from None
        words = f"{what}: {response.status_code} {' '.join(content.decode(errors='replace').split())[:_SHOWN]}"
        if response.status_code in _NOT_NOW:
            raise NotReadyError(words)
        if response.status_code in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
            raise ConfigError(words)
        if not response.is_success:
            raise EngineError(words)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{what}: the answer is no JSON object")
        return answer


def _content(response: httpx2.Response, what: str, ends: Deadline) -> bytes:
    """Return the decompressed body of an answer.

    Raises:
        NotReadyError: The answer did not end in time.
        EngineError: The answer is longer than any engine's.
    """
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > _MOST_BYTES:
            raise EngineError(
                f"{what}: the answer is longer than {_MOST_BYTES} bytes; is this the address of an engine?"
            )
        if ends.passed:
            raise NotReadyError(f"{what}: no answer: it did not end within {ends.seconds:g} s")
    return bytes(content)


def once_more(ask: Callable[[], _Answer], ends: Deadline, pause: Callable[[float], object]) -> _Answer:
    """Send a request to a server that was there, and retry while a connection breaks or the server is busy for a moment.

    Args:
        ask: Sends the request, which must be idempotent.
        ends: Deadline of the work that needs the answer.
        pause: Waits for a number of seconds.

    Raises:
        NotReadyError: The server was not ready until `ends`, or for `HICCUP_SECS`.
        EngineError: The answer cannot be used.
    """
    hiccup: Deadline | None = None
    wait = _FIRST_PAUSE_SECS
    while True:
        try:
            return ask()
        except NotReadyError:
            hiccup = hiccup or Deadline.after(min(HICCUP_SECS, ends.remaining()))
            if hiccup.passed or ends.passed:
                raise
            pause(min(wait, hiccup.remaining()))
            wait = min(2 * wait, WAIT_SECS)


def when_ready(ask: Callable[[], _Answer], ends: Deadline, pause: Callable[[float], object]) -> _Answer:
    """Send a request until the server is ready.

    Args:
        ask: Sends the request; raises `NotReadyError` until the server is ready.
        ends: Deadline.
        pause: Waits for a number of seconds.

    Raises:
        EngineError: The server was not ready in time.
    """
    while True:
        try:
            return ask()
        except NotReadyError as error:
            if ends.passed:
                raise EngineError(f"waited in vain: {error}; {START_IT}") from None
            pause(min(WAIT_SECS, ends.remaining()))
