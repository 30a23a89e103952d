"""Applies faults to the ASGI messages of a request."""

import asyncio
import socket
import struct
from contextlib import suppress

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localhub.faults.rules import Fault, Injection, Rule

TRANSPORT = "localhub.transport"
"""Key of the connection's transport in the scope; `localhub.server` sets it."""

REFUSE = "localhub.refuse"
"""Key in the scope of the function that chooses the items of a batch that fail."""


class _CutError(Exception):
    """The connection was closed on purpose; nothing more can be sent."""


async def inject(injection: Injection, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Serve a request with `app` and apply `injection` to it."""
    if injection.delay_s:
        await asyncio.sleep(injection.delay_s)
    if injection.rule is None:
        await app(scope, receive, send)
        return
    fault = injection.rule.fault
    if fault.status is not None:
        await Response(fault.body, fault.status, fault.headers)(scope, receive, send)
    elif fault.reset:
        _reset(scope[TRANSPORT])
        await _disconnected(receive)
    elif fault.hang:
        held = await _hang(injection.rule, receive)
        if held is not None:
            await app(scope, held, send)
    else:
        if fault.items is not None:
            scope[REFUSE] = fault.refuses
        with suppress(_CutError):
            await app(scope, receive, _altered(fault, scope[TRANSPORT], receive, send))


def _reset(transport: asyncio.Transport) -> None:
    # With a linger time of zero, closing sends RST instead of FIN.
    connection: socket.socket = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _disconnected(receive: Receive) -> None:
    """Wait until the server notices that the connection is closed: it logs an error for an earlier return."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _hang(rule: Rule, receive: Receive) -> Receive | None:
    """Wait until the rule is cleared; return a `receive` that replays the request, or None when the client disconnects."""
    held: list[Message] = []
    cleared = asyncio.ensure_future(rule.cleared.wait())
    try:
        while not rule.cleared.is_set():
            message = asyncio.ensure_future(receive())
            await asyncio.wait({cleared, message}, return_when=asyncio.FIRST_COMPLETED)
            if not message.done():
                message.cancel()
                with suppress(asyncio.CancelledError):
                    held.append(await message)
            elif (got := message.result())["type"] == "http.disconnect":
                return None
            else:
                held.append(got)
    finally:
        cleared.cancel()
    return _replay(held, receive)


def _replay(held: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return held.pop(0) if held else await receive()

    return replayed


def _altered(fault: Fault, transport: asyncio.Transport, receive: Receive, send: Send) -> Send:
    """Return a `send` that applies `fault` to the body of the response."""
    position = 0

    async def altered(message: Message) -> None:
        nonlocal position
        if message["type"] != "http.response.body":
            await send(message)
            return
        body = bytes(message.get("body", b""))
        start, position = position, position + len(body)
        if fault.truncate_at is not None and position >= fault.truncate_at:
            await _truncate(body[: fault.truncate_at - start], transport, receive, send)
        elif fault.trickle_bytes is not None:
            await _trickle(message, body, fault, transport, send)
        elif fault.flip_at is not None or fault.flip_every is not None:
            await send({**message, "body": _flip(fault, body, start)})
        else:
            await send(message)

    return altered


async def _truncate(rest: bytes, transport: asyncio.Transport, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.body", "body": rest, "more_body": True})
    transport.close()
    await _disconnected(receive)
    raise _CutError


async def _trickle(message: Message, body: bytes, fault: Fault, transport: asyncio.Transport, send: Send) -> None:
    size = fault.trickle_bytes or 1
    for start in range(0, len(body), size):
        if transport.is_closing():
            raise _CutError
        await send({**message, "body": body[start : start + size], "more_body": True})
        await asyncio.sleep(fault.trickle_interval_s)
    await send({**message, "body": b""})


def _flip(fault: Fault, body: bytes, start: int) -> bytes:
    flipped = bytearray(body)
    if fault.flip_every is not None:
        first = (fault.flip_every - 1 - start) % fault.flip_every
        flipped[first :: fault.flip_every] = bytes(255 - byte for byte in flipped[first :: fault.flip_every])
    for offset in fault.flip_at or ():
        if start <= offset < start + len(body):
            flipped[offset - start] ^= 0xFF
    return bytes(flipped)
