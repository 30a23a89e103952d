"""From a file's terms to what a client fetches: narrowed to the chunks that the wanted bytes touch."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from localhub.hashing import to_hex
from localhub.shards import Term, iter_terms
from localhub.xorbs import ChunkTable

FindTable = Callable[[bytes], ChunkTable | None]
"""Returns a stored xorb's chunk table, or None."""

MakeUrl = Callable[[bytes], str]
"""Returns the address at which a xorb's bytes are served."""


@dataclass(frozen=True)
class Piece:
    """Consecutive chunks of one xorb that hold wanted bytes.

    Attributes:
        xorb: the xorb's hash.
        table: its chunk table.
        first: the first chunk.
        end: the chunk after the last.
        skip: unpacked bytes of the first chunk that come before the wanted ones.
    """

    xorb: bytes
    table: ChunkTable
    first: int
    end: int
    skip: int

    @property
    def unpacked_bytes(self) -> int:
        """Unpacked bytes of the whole chunks."""
        return self.table.unpacked_bytes(self.first, self.end)


class MissingXorbError(LookupError):
    """A file's xorb is not stored, although its shard was taken: the root was tampered with."""


def pieces(terms: bytes, start: int, stop: int, find: FindTable) -> Iterator[Piece]:
    """Yield, in order, the chunks that hold the bytes `start` to `stop` of a file, the latter not included.

    Args:
        terms: the file's terms as stored, 48 bytes each.
        start: first wanted byte.
        stop: end of the wanted bytes, at most the file's size.
        find: gives the chunk tables.

    Raises:
        MissingXorbError: a xorb is gone.
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
    """Return the answer of `GET /v1/reconstructions/{hash}`.

    Runs of one xorb that touch or overlap are fetched once.
    """
    by_xorb: dict[bytes, list[Piece]] = {}
    for piece in found:
        by_xorb.setdefault(piece.xorb, []).append(piece)
    return {
        "offset_into_first_range": found[0].skip if found else 0,
        "terms": [
            {
                "hash": to_hex(piece.xorb),
                "unpacked_length": piece.unpacked_bytes,
                "range": {"start": piece.first, "end": piece.end},
            }
            for piece in found
        ],
        "fetch_info": {to_hex(xorb): _fetches(group, url(xorb)) for xorb, group in by_xorb.items()},
    }


def _narrow(term: Term, table: ChunkTable, start: int, stop: int) -> Piece:
    base = table.unpacked_start(term.first)
    first = bisect_right(table.unpacked_ends, base + start, term.first, term.end)
    end = bisect_left(table.unpacked_ends, base + stop, first, term.end) + 1
    return Piece(term.xorb, table, first, end, base + start - table.unpacked_start(first))


def _fetches(group: list[Piece], url: str) -> list[dict[str, Any]]:
    table = group[0].table
    merged: list[tuple[int, int]] = []
    for first, end in sorted((piece.first, piece.end) for piece in group):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((first, end))
    return [
        {
            "range": {"start": first, "end": end},
            "url": url,
            "url_range": {"start": table.start(first), "end": table.start(end) - 1},
        }
        for first, end in merged
    ]
