"""What lies in the bucket below the prefix, as far as its first page tells."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, note, ok, warning
from hfbucket_plugin.cli.objects import Kind, Listed, walk
from hfbucket_plugin.cli.words import count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.catalog import ChunkEntry
    from hfbucket_plugin.cli.case import Case
    from hfbucket_plugin.named import NamedInstance

NAME: Final = "listing"

FIRST: Final = 1000
"""Objects looked at: a page of the Hub."""

MAX_SAMPLE_BYTES: Final = 256 * 1024 * 1024
"""Largest chunk that is read for a test."""

_OWN: Final = {"classic": Kind.CLASSIC, "mp": Kind.MP}
_ENGINES: Final = {Kind.CLASSIC: "the classic engine", Kind.MP: "MP mode (lmcache server)"}
_EARLIEST: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class Seen:
    """A listing in numbers.

    Attributes:
        by_kind: Objects of each kind.
        foreign: The path of the first object that is neither a key's nor ours.
        sample: A chunk to read for a test: one of the engine's own kind, and then the newest.
        more: Whether there is more than was looked at.
    """

    by_kind: dict[Kind, int]
    foreign: str | None = None
    sample: ChunkEntry | None = None
    more: bool = False


def check(case: Case) -> tuple[Finding, ChunkEntry | None]:
    """List the first objects.

    Returns:
        What was found, and a chunk to test reading with, if there is any.

    Raises:
        HFBucketError: A page did not come.
    """
    listed = case.ask("tree", lambda _: [*itertools.islice(walk(case.bucket, "", case.timeout_secs), FIRST)])
    seen = look(listed, _OWN[case.named.mode])
    return judge(case.named, seen), seen.sample


def look(listed: Iterable[Listed], own: Kind) -> Seen:
    """Count what was listed.

    Args:
        listed: The objects.
        own: The kind of the keys that the engine writes.
    """
    best = (False, _EARLIEST, 0)
    seen = Seen(dict.fromkeys(Kind, 0))
    for one in listed:
        seen.by_kind[one.kind] += 1
        if one.kind is Kind.FOREIGN and seen.foreign is None:
            seen.foreign = one.info.path
        if one.chunk is not None and one.kind is not Kind.PROBE and one.info.content.size <= MAX_SAMPLE_BYTES:
            rank = (one.kind is own, one.chunk.uploaded_at or _EARLIEST, one.chunk.content.size)
            if seen.sample is None or rank > best:
                seen.sample, best = one.chunk, rank
    seen.more = sum(seen.by_kind.values()) >= FIRST
    return seen


def judge(named: NamedInstance, seen: Seen) -> Finding:
    """Whether what was found is what the engines of this configuration look for."""
    own = _OWN[named.mode]
    other = Kind.MP if own is Kind.CLASSIC else Kind.CLASSIC
    total = sum(seen.by_kind.values())
    if not total:
        return ok(NAME, "no objects yet")
    told = [kind.counted(number) for kind, number in seen.by_kind.items() if number]
    found = f"{'the first ' if seen.more else ''}{count(total, 'object')}: {', '.join(told)}"
    if seen.by_kind[other] and not seen.by_kind[own]:
        return warning(
            NAME,
            f"{found}: these are keys of {_ENGINES[other]}, and this configuration is one of {_ENGINES[own]}, which "
            "looks for others",
            f"look at {named.setting('bucket_handle')}: a prefix of its own for each kind keeps them apart",
        )
    if seen.foreign is not None:
        return note(NAME, f"{found}; the first foreign one is {seen.foreign!r}", "engines pass them by")
    return ok(NAME, found)
