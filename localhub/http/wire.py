"""Reading requests and writing answers: bounded bodies, JSON, byte ranges, absolute addresses."""

import asyncio
import json
import re
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from localhub.errors import HubError, bad_request

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Largest JSON or NDJSON body."""

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
_OTHER_NAME = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


class Json(Response):
    """A compact JSON answer."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, separators=(",", ":")).encode()


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return a body.

    Raises:
        HubError: 413 when it is longer than `limit` bytes.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HubError(413, f"the body is over the limit of {limit} bytes")
    return bytes(body)


async def read_model(request: Request, model: type[Model]) -> Model:
    """Return the JSON object of a body as a model; an empty body stands for an empty object.

    Raises:
        HubError: 400 when it is not what the model describes, 413 when it is too long.
    """
    body = await read_body(request)
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise bad_request(first_problem(error)) from error


def first_problem(error: ValidationError) -> str:
    """Return the first thing that is wrong, with its place, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def base_url(request: Request) -> str:
    """Return scheme, host and port under which the client reached this server, without a trailing slash."""
    return f"{request.url.scheme}://{request.url.netloc}"


def other_host(request: Request) -> str:
    """Return the same server under another host name: the clients stop at redirects that leave the Hub's host."""
    host = request.url.hostname or "127.0.0.1"
    return f"{request.url.scheme}://{_OTHER_NAME.get(host, 'localhost')}:{request.url.port or 80}"


def byte_range(request: Request, size: int) -> tuple[int, int] | None:
    """Return start and end (not included) of the wanted bytes, or None when all are wanted.

    A header that is not one single range of bytes is ignored, as RFC 9110 allows.

    Raises:
        HubError: 416 when the range lies outside the `size` bytes.
    """
    header = request.headers.get("range")
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(size - int(last), 0), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
    if start >= stop:
        raise HubError(416, f"the range {header} lies outside the {size} bytes")
    return start, stop


async def run_in(executor: Executor, work: Callable[[], Result]) -> Result:
    """Return what blocking work returns, done in a thread."""
    return await asyncio.get_running_loop().run_in_executor(executor, work)
