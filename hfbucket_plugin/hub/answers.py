"""Parser of Hub responses: bounds their size before unpacking and before parsing, and checks each field.

A response of 60 kB may unpack to gigabytes, nest deeply enough to crash the interpreter, or hold the GIL for seconds
while it is parsed; its numbers and dates may have any value. The caller sets the limit, and larger responses are
rejected unread.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from hfbucket_plugin.core.dates import iso_date
from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

MAX_SIZE: Final = 2**53
"""Maximum size of an object or a bucket in bytes, and maximum count: the largest integer that any JSON reader holds
exactly."""

_KIB: Final = 1024
_RECORD_BYTES: Final = 512
"""Bytes allowed for a record, without its path. Records of the Hub have about 200."""

_RECORD_TOKENS: Final = 256
_PIECE_BYTES: Final = 64 * _KIB
_MAX_DEPTH: Final = 16
_MAX_DIGITS: Final = 19
_MAX_PATH: Final = 4 * _KIB
_HASH = re.compile(r"[0-9a-f]{64}")
_UP_TO_A_SIGN = re.compile(r'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{},]?)', re.DOTALL)
"""Strings and scalars up to the next character that opens, closes or separates items, without backtracking."""

_FLAT = re.compile(r'\{[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+\}', re.DOTALL)
"""A record without nested values, such as those of the Hub."""

_OPENED = re.compile(r"[ \t\n\r]*+\[[ \t\n\r]*+")
_SPACE = re.compile(r"[ \t\n\r]*+")


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """Limits of a response.

    Attributes:
        nbytes: Maximum number of unpacked bytes.
        records: Maximum number of records, each of which may have some dozens of fields.
    """

    nbytes: int
    records: int

    @classmethod
    def for_records(cls, paths: Iterable[str]) -> BodyLimit:
        """Return the limit for one record per path, however the Hub escapes the path."""
        lengths = [len(json.dumps(path)) + _RECORD_BYTES for path in paths]
        return cls(4 * _KIB + sum(lengths), len(lengths))


SMALL: Final = BodyLimit(64 * _KIB, 16)
"""Limit for a single record, such as a bucket or a token."""

WORDS: Final = 16 * _KIB
"""Bytes read of an error's body, of which only the first words are shown."""

PAGE: Final = BodyLimit(4 * _KIB * _KIB, 10_000)
"""Limit for a page of a listing. Pages of the Hub have 1,000 records, of 250 bytes each for chunk names."""


class TooLongError(TransportError):
    """A response exceeds the limit of its request."""


class Unpacking:
    """Unpacks a body as it arrives, in pieces too small to hold the GIL for long.

    Args:
        encoding: Value of the `Content-Encoding` header.
        what: Name of the request, for errors.

    Raises:
        TransportError: The encoding was not requested.
    """

    def __init__(self, encoding: str, what: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "deflate"):
            raise TransportError(f"{what}: the Hub's answer is packed as {encoding[:32]!r}, which was not asked for")
        self._what = what
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None

    def pieces(self, raw: bytes) -> Iterator[bytes]:
        """Yield the unpacked bytes of further raw bytes.

        Raises:
            TransportError: The bytes are not packed as the header says.
        """
        if self._inflater is None:
            yield raw
            return
        while raw and not self._inflater.eof:
            try:
                piece = self._inflater.decompress(raw, _PIECE_BYTES)
            except zlib.error:
                raise TransportError(f"{self._what}: the Hub's answer cannot be unpacked") from None
            raw = self._inflater.unconsumed_tail
            if piece:
                yield piece

    def finish(self) -> None:
        """Check that the body is complete.

        Raises:
            TransportError: The packed body is truncated.
        """
        if self._inflater is not None and not self._inflater.eof:
            raise TransportError(f"{self._what}: the Hub's answer cannot be unpacked: it breaks off")


def document(body: bytes, what: str, room: BodyLimit = SMALL) -> Any:
    """Parse a response that holds one JSON value.

    Raises:
        TransportError: The body is not JSON, or exceeds the limit.
    """
    text = _text(body, what, room)
    end = _bounded_end(text, 0, what, (room.records + 1) * _RECORD_TOKENS, len(text))
    value, stopped = _value(text, _space(text, 0), what)
    if stopped > end or _SPACE.fullmatch(text, stopped) is None:
        _refuse(what, "is not JSON: something follows its end")
    return value


def records(body: bytes, what: str, room: BodyLimit) -> list[dict[str, Any]]:
    """Parse a response that holds a list of records one by one, so that other threads can run in between.

    Raises:
        TransportError: The body is not a list of records, or exceeds the limit.
    """
    text = _text(body, what, room)
    if not (opened := _OPENED.match(text)):
        document(body[:WORDS], what)  # raises the right error for a body that is not JSON
        _refuse(what, "is not a list of records")
    found: list[dict[str, Any]] = []
    place = opened.end()
    sign = text[place : place + 1]
    if sign == "]":
        place += 1
    while sign != "]":
        if len(found) == room.records:
            _refuse(what, f"holds more than {room.records} records, more than was asked for")
        flat = _FLAT.match(text, place, place + _PIECE_BYTES)
        end = flat.end() if flat else _bounded_end(text, place, what, _RECORD_TOKENS, place + _PIECE_BYTES)
        value, place = _value(text, place, what)
        if place > end or not isinstance(value, dict):
            _refuse(what, "is not a list of records")
        found.append(value)
        place = _space(text, place)
        sign = text[place : place + 1]
        if sign not in ("]", ","):
            _refuse(what, "is not JSON: a list does not end")
        place = _space(text, place + 1)
    if _SPACE.fullmatch(text, place) is None:
        _refuse(what, "is not JSON: something follows its end")
    return found


def words(body: bytes) -> str:
    """Return the readable message of an error body: its field `error`, or else the body itself."""
    try:
        answer = document(body[:WORDS], "", SMALL)
    except TransportError:
        answer = None
    if isinstance(answer, dict) and isinstance(answer.get("error"), (str, int)):
        return str(answer["error"])
    return body[:WORDS].decode(errors="replace") or "no reason given"


def count_of(value: Any) -> int | None:
    """Return a size or a count; None unless the value is an integer from 0 to 2^53."""
    return value if type(value) is int and 0 <= value <= MAX_SIZE else None


def content_of(record: dict[str, Any]) -> ContentId:
    """Return the hash and size of a record.

    Raises:
        ValueError: One of them is missing or invalid.
    """
    size = count_of(record.get("size"))
    xet_hash = record.get("xetHash")
    if size is None:
        raise ValueError(f"size is not an integer from 0 to {MAX_SIZE}")
    if not isinstance(xet_hash, str) or not _HASH.fullmatch(xet_hash):
        raise ValueError("xetHash is not 64 hexadecimal digits")
    return ContentId(xet_hash, size)


def path_of(record: dict[str, Any]) -> str:
    """Return the path of a record.

    Raises:
        ValueError: The path is missing or cannot be requested.
    """
    path = record.get("path")
    if not isinstance(path, str) or not 0 < len(path) <= _MAX_PATH:
        raise ValueError(f"path is not a text of 1 to {_MAX_PATH} characters")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError("path holds half of a surrogate pair") from None
    return path


def uploaded_at(record: dict[str, Any]) -> datetime | None:
    """Return the upload time of an object, or the client's `mtime`; None if the record has neither.

    Raises:
        ValueError: The value is not a date.
    """
    text = record.get("uploadedAt") or record.get("mtime")
    return iso_date(text) if text else None


def _text(body: bytes, what: str, room: BodyLimit) -> str:
    if len(body) > room.nbytes:
        raise TooLongError(f"{what}: the Hub's answer is longer than {room.nbytes} bytes, more than was asked for")
    try:
        return body.decode()
    except UnicodeDecodeError:
        _refuse(what, f"is not JSON ({len(body)} bytes): it is not UTF-8")


def _bounded_end(text: str, place: int, what: str, most_tokens: int, most: int) -> int:
    """Return the end of the value that begins at a position; reject values that are too deep or too large."""
    depth = tokens = 0
    while True:
        match = _UP_TO_A_SIGN.match(text, place, min(place + _PIECE_BYTES, most))
        sign = match[1]  # type: ignore[index]  # the pattern matches any text
        place = match.end()  # type: ignore[union-attr]
        if not sign:
            if depth or place < min(most, len(text)):
                _refuse(what, f"is not JSON ({len(text)} characters): it breaks off, or an item is too long")
            return place
        depth += (sign in "[{") - (sign in "]}")
        if depth > _MAX_DEPTH:
            _refuse(what, f"nests deeper than {_MAX_DEPTH} levels, as no Hub's does")
        if depth <= 0:
            return place
        tokens += 1
        if tokens > most_tokens:
            _refuse(what, "holds more than was asked for")


def _space(text: str, place: int) -> int:
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # the pattern matches any text


def _value(text: str, place: int, what: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, place)
    except ValueError as error:
        _refuse(what, f"is not JSON ({len(text)} characters)" + (f": {error}" if type(error) is ValueError else ""))


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS + 1:
        raise ValueError("a number is out of range")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is out of range")
    return value


def _constant(_name: str) -> NoReturn:
    raise ValueError("a number is not valid JSON")


_DECODER: Final = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _refuse(what: str, why: str) -> NoReturn:
    raise TransportError(f"{what}: the Hub's answer {why}")
