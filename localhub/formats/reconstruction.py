"""Reconstructions: what a client fetches to read a range of a file, limited to the chunks that hold it."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from localhub.formats.hashing import to_hex
from localhub.formats.shards import Term, iter_terms
from localhub.formats.xorbs import ChunkTable

FindTable = Callable[[bytes], ChunkTable | None]
"""Returns a stored xorb's chunk table, or None."""

MakeUrl = Callable[[bytes], str]
"""Returns the URL of a xorb's bytes."""


@dataclass(frozen=True)
class Piece:
    """Consecutive chunks of one xorb that hold wanted bytes.

    Attributes:
        xorb: the xorb's hash.
        table: its chunk table.
        first: the first chunk.
        end: the chunk after the last.
        skip: unpacked bytes of the first chunk that precede the wanted ones.
    """

    xorb: bytes
    table: ChunkTable
    first: int
    end: int
    skip: int


class MissingXorbError(LookupError):
    """A file's xorb is not stored although its shard was accepted: the root was modified."""


def pieces(terms: bytes, start: int, stop: int, find: FindTable) -> Iterator[Piece]:
    """Yield, in order, the chunks that hold the bytes `start` to `stop` (exclusive) of a file.

    Args:
        terms: the file's terms as stored, 48 bytes each.
        start: first wanted byte.
        stop: end of the wanted bytes, at most the file's size.
        find: returns chunk tables.

    Raises:
        MissingXorbError: a xorb is missing.
    """
    offset = 0
    for term in iter_terms(terms):
        if offset >= stop:
            return
        if offset + term.unpacked_bytes > start:
            table = find(term.xorb)
            if table is None:
                raise MissingXorbError(to_hex(term.xorb))
            yield _narrow(term, table, max(start - offset, 0), min(stop - offset, term.unpacked_bytes))
        offset += term.unpacked_bytes


def describe(found: list[Piece], url: MakeUrl) -> dict[str, Any]:
    """Return the response to `GET /v1/reconstructions/{hash}`.

    Adjacent and overlapping runs of one xorb are fetched once.
    """
    return {
        **_terms(found),
        "fetch_info": {
            to_hex(xorb): [
                {"range": chunks, "url": url(xorb), "url_range": in_xorb} for chunks, in_xorb in _fetches(group)
            ]
            for xorb, group in _by_xorb(found).items()
        },
    }


def describe_v2(found: list[Piece], url: MakeUrl) -> dict[str, Any]:
    """Return the response to `GET /v2/reconstructions/{hash}`, which the client requests first.

    It holds the same as v1, by xorb: URLs, each with the ranges to fetch in one request. Here every URL has one range,
    so that clients never request several parts in one response.
    """
    return {
        **_terms(found),
        "xorbs": {
            to_hex(xorb): [
                {"url": url(xorb), "ranges": [{"chunks": chunks, "bytes": in_xorb}]}
                for chunks, in_xorb in _fetches(group)
            ]
            for xorb, group in _by_xorb(found).items()
        },
    }


def _terms(found: list[Piece]) -> dict[str, Any]:
    return {
        "offset_into_first_range": found[0].skip if found else 0,
        "terms": [
            {
                "hash": to_hex(piece.xorb),
                "unpacked_length": piece.table.unpacked_bytes(piece.first, piece.end),
                "range": {"start": piece.first, "end": piece.end},
            }
            for piece in found
        ],
    }


def _by_xorb(found: list[Piece]) -> dict[bytes, list[Piece]]:
    by_xorb: dict[bytes, list[Piece]] = {}
    for piece in found:
        by_xorb.setdefault(piece.xorb, []).append(piece)
    return by_xorb


def _narrow(term: Term, table: ChunkTable, start: int, stop: int) -> Piece:
    base = table.unpacked_start(term.first)
    first = bisect_right(table.unpacked_ends, base + start, term.first, term.end)
    end = bisect_left(table.unpacked_ends, base + stop, first, term.end) + 1
    return Piece(term.xorb, table, first, end, base + start - table.unpacked_start(first))


def _fetches(group: list[Piece]) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Yield what to fetch of one xorb: chunks (end exclusive) and their serialized bytes (end inclusive)."""
    table = group[0].table
    merged: list[tuple[int, int]] = []
    for first, end in sorted((piece.first, piece.end) for piece in group):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    for first, end in merged:
        yield {"start": first, "end": end}, {"start": table.start(first), "end": table.start(end) - 1}
