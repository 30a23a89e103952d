"""The one reader of what the Hub answers: bounded before it is unpacked and before it is parsed, and checked field by field.

An answer of 60 kB may unpack to gigabytes, nest deep enough to end the interpreter, or take the GIL for seconds while it is
parsed; its numbers and dates may be any. The caller says how much an answer may hold; more than that is refused unread.
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
"""Largest size of an object or a bucket, in bytes, and largest count: what any JSON reader holds exactly."""

_KIB: Final = 1024
_RECORD_BYTES: Final = 512
"""Of a record, beside its path. The Hub's have about 200."""

_RECORD_TOKENS: Final = 256
_PIECE_BYTES: Final = 64 * _KIB
_MAX_DEPTH: Final = 16
_MAX_DIGITS: Final = 19
_MAX_PATH: Final = 4 * _KIB
_HASH = re.compile(r"[0-9a-f]{64}")
_UP_TO_A_SIGN = re.compile(r'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([\[\]{},]?)', re.DOTALL)
"""Texts and other things, and then what opens, closes or parts items. It never looks at a character twice."""

_FLAT = re.compile(r'\{[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+\}', re.DOTALL)
"""A record in which nothing nests, as those of the Hub are."""

_OPENED = re.compile(r"[ \t\n\r]*+\[[ \t\n\r]*+")
_SPACE = re.compile(r"[ \t\n\r]*+")


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """How much an answer may hold.

    Attributes:
        nbytes: Most bytes, unpacked.
        records: Most records, each of which may have some dozens of fields.
    """

    nbytes: int
    records: int

    @classmethod
    def for_records(cls, paths: Iterable[str]) -> BodyLimit:
        """For one record of each path, however the Hub escapes it."""
        lengths = [len(json.dumps(path)) + _RECORD_BYTES for path in paths]
        return cls(4 * _KIB + sum(lengths), len(lengths))


SMALL: Final = BodyLimit(64 * _KIB, 16)
"""For one record: that of a bucket, a token."""

WORDS: Final = 16 * _KIB
"""Bytes of an error's body that are read: only its first words are shown."""

PAGE: Final = BodyLimit(4 * _KIB * _KIB, 10_000)
"""For a page of a listing. The Hub's have 1,000 records, of 250 bytes each where the names are those of chunks."""


class TooLongError(TransportError):
    """An answer is longer than what was asked for could be."""


class Unpacking:
    """Unpacks a body as it arrives, in pieces that never hold the GIL for long.

    Args:
        encoding: The header `ContentId-Encoding`.
        what: Names the request in errors.

    Raises:
        TransportError: The encoding is one that was not asked for.
    """

    def __init__(self, encoding: str, what: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "deflate"):
            raise TransportError(f"{what}: the Hub's answer is packed as {encoding[:32]!r}, which was not asked for")
        self._what = what
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding in ("gzip", "deflate") else None

    def pieces(self, raw: bytes) -> Iterator[bytes]:
        """What some more raw bytes unpack to.

        Raises:
            TransportError: They are not packed as the header says.
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
        """Expect that nothing is missing.

        Raises:
            TransportError: The packed body breaks off.
        """
        if self._inflater is not None and not self._inflater.eof:
            raise TransportError(f"{self._what}: the Hub's answer cannot be unpacked: it breaks off")


def document(body: bytes, what: str, room: BodyLimit = SMALL) -> Any:
    """Parse an answer that holds one JSON value.

    Raises:
        TransportError: It holds none, or more than there is room for.
    """
    text = _text(body, what, room)
    end = _bounded_end(text, 0, what, (room.records + 1) * _RECORD_TOKENS, len(text))
    value, stopped = _value(text, _space(text, 0), what)
    if stopped > end or _SPACE.fullmatch(text, stopped) is None:
        _refuse(what, "is not JSON: something follows its end")
    return value


def records(body: bytes, what: str, room: BodyLimit) -> list[dict[str, Any]]:
    """Parse an answer that holds a list of records, one after the other: no other thread waits for all of them.

    Raises:
        TransportError: It is none, or holds more than there is room for.
    """
    text = _text(body, what, room)
    if not (opened := _OPENED.match(text)):
        document(body[:WORDS], what)  # which says where it is no JSON at all
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
    """What an error's body says, for people: its field `error`, or the body itself."""
    try:
        answer = document(body[:WORDS], "", SMALL)
    except TransportError:
        answer = None
    if isinstance(answer, dict) and isinstance(answer.get("error"), (str, int)):
        return str(answer["error"])
    return body[:WORDS].decode(errors="replace") or "no reason given"


def count_of(value: Any) -> int | None:
    """A size or a number of objects; None where that is no whole number from 0 to 2^53."""
    return value if type(value) is int and 0 <= value <= MAX_SIZE else None


def content_of(record: dict[str, Any]) -> ContentId:
    """The hash and size of a record.

    Raises:
        ValueError: One of them is missing or cannot be.
    """
    size = count_of(record.get("size"))
    xet_hash = record.get("xetHash")
    if size is None:
        raise ValueError(f"size is not an integer from 0 to {MAX_SIZE}")
    if not isinstance(xet_hash, str) or not _HASH.fullmatch(xet_hash):
        raise ValueError("xetHash is not 64 hexadecimal digits")
    return ContentId(xet_hash, size)


def path_of(record: dict[str, Any]) -> str:
    """The path of a record.

    Raises:
        ValueError: It has none that could be asked for.
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
    """When the Hub took an object, or the client's `mtime`; None when the record says neither.

    Raises:
        ValueError: It says something that is no date.
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
    """Where the value ends that begins at a place; refused where it nests too deep, or holds or is too much."""
    depth = tokens = 0
    while True:
        match = _UP_TO_A_SIGN.match(text, place, min(place + _PIECE_BYTES, most))
        sign = match[1]  # type: ignore[index]  # it matches anything
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
    return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # it matches anything


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
