"""Questions to the HTTP servers of engines: JSON there and back, a deadline always."""

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
"""Most seconds in which a server that was there may answer nothing, or that it is busy, before a load fails for that."""

FAILURES: Final = 3
"""Loads that fail one after the other before a server is given up."""

_NOT_NOW: Final = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})
WAIT_SECS: Final = 1.0
"""How often somebody who is not there is asked again."""

_FIRST_PAUSE_SECS: Final = 0.05
_MOST_BYTES: Final = 16 * 1024 * 1024
"""Of an answer, unpacked. The longest are configurations and lists of models, of some hundred KiB."""

_SHOWN: Final = 300
START_IT: Final = "start the engine, look at the address, or wait longer (--wait-engine)"
"""What to do about one who does not come."""

_Answer = TypeVar("_Answer")


class NotReadyError(EngineError):
    """It answers nothing yet, or that it is not ready: worth another try."""


class EngineHTTP:
    """A client of one server. Use it as a context manager.

    Args:
        address: Such as `http://127.0.0.1:8080`.
        key: What it asks for as `Authorization: Bearer`; None for nothing.

    Raises:
        ConfigError: The address is none.
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
        """Ask, and return the answer.

        Args:
            method: Of HTTP.
            path: Such as `/status`.
            body: Sent as JSON, unless None.
            secs: Most seconds that the answer may take.

        Raises:
            NotReadyError: Nobody answers there, or 502, 503 or 504.
            ConfigError: It refuses what was asked for: 400 or 422.
            EngineError: It answers what cannot be used.
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
    """The body of an answer, unpacked.

    Raises:
        NotReadyError: It did not end in time.
        EngineError: It is longer than any that an engine gives.
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
    """Ask a server that was there, again where a connection breaks or it is busy for a moment.

    Args:
        ask: What is asked; asking twice must do no harm.
        ends: When what it is for has to be done.
        pause: Waits; given the seconds.

    Raises:
        NotReadyError: It was so until `ends`, or for `HICCUP_SECS`.
        EngineError: It answers what cannot be used.
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
    """Ask until it is ready.

    Args:
        ask: Raises `NotReadyError` until it is.
        ends: When to give up.
        pause: Waits; given the seconds.

    Raises:
        EngineError: It was not ready in time.
    """
    while True:
        try:
            return ask()
        except NotReadyError as error:
            if ends.passed:
                raise EngineError(f"waited in vain: {error}; {START_IT}") from None
            pause(min(WAIT_SECS, ends.remaining()))
