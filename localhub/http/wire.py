"""Reading requests and writing responses: bounded bodies, JSON, byte ranges, absolute URLs."""

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from localhub.errors import HubError, bad_request, problems

Model = TypeVar("Model", bound=BaseModel)

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Largest JSON or NDJSON body."""

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")
_OTHER_NAME = {"127.0.0.1": "localhost", "localhost": "127.0.0.1"}


class Json(Response):
    """A compact JSON response."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, separators=(",", ":")).encode()


async def read_body(request: Request, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the body of a request.

    Raises:
        HubError: 413 when the body is longer than `limit` bytes.
    """
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise HubError(413, f"the body exceeds the limit of {limit} bytes")
    return bytes(body)


async def read_model(request: Request, model: type[Model]) -> Model:
    """Return the JSON object of a request's body as a model; an empty body stands for an empty object.

    Raises:
        HubError: 400 when the body does not match the model, 413 when it is too long.
    """
    body = await read_body(request)
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise bad_request(problems(error)[0]) from error


def base_url(request: Request) -> str:
    """Return the scheme, host and port at which the client reached this server, without a trailing slash."""
    return f"{request.url.scheme}://{request.url.netloc}"


def other_host(request: Request) -> str:
    """Return the URL of this server under another host name: clients do not follow redirects away from the Hub's host."""
    host = request.url.hostname or "127.0.0.1"
    return f"{request.url.scheme}://{_OTHER_NAME.get(host, 'localhost')}:{request.url.port or 80}"


def byte_range(request: Request, size: int) -> tuple[int, int] | None:
    """Return the start and the end (exclusive) of the requested bytes, or None for all of them.

    A header that is not a single byte range is ignored, as RFC 9110 allows.

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
