"""Checks of the bucket: existence, listing, records, throughput."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.cli.findings import Finding, error, note, ok, warning
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.core.units import age, count, size
from hfbucket_plugin.errors import BucketMissingError, IntegrityError
from hfbucket_plugin.hub.records import fetch
from hfbucket_plugin.store.quarantine import BAD_DIRECTORY
from hfbucket_plugin.tools.inventory import Classifier, ListedObject, ObjectKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.hub.bucket import ObjectInfo
    from hfbucket_plugin.hub.listing import ChunkEntry


BUCKET: Final = "bucket"


def check_bucket(case: CheckContext) -> tuple[Finding, bool]:
    """Request the bucket's record.

    Returns:
        The finding, and whether the bucket exists.

    Raises:
        HFBucketError: If the bucket does not exist or is not visible.
    """
    settings = case.settings
    try:
        record = case.ask("info", case.bucket.info)
    except BucketMissingError:
        if not (settings.create_bucket_if_missing and settings.writes):
            raise
        found = f"{settings.bucket_handle.bucket_id} does not exist, or this token may not see it"
        advice = f"the first put creates it ({case.named.setting('create_bucket_if_missing')}), if the token may"
        return warning(BUCKET, found, advice), False
    return describe(settings.bucket_handle.bucket_id, record), True


def describe(bucket_id: str, record: Mapping[str, Any]) -> Finding:
    """Describe the record in words. Fields that the Hub does not send are left out."""
    private, region, amount, files = (record.get(name) for name in ("private", "region", "size", "totalFiles"))
    parts = [f"{bucket_id} exists"]
    if isinstance(private, bool):
        parts.append("private" if private else "public")
    if isinstance(region, str) and region:
        parts.append(f"region {region}")
    if isinstance(amount, int) and isinstance(files, int):
        parts.append(f"{size(amount)} in {count(files, 'object')}")
    found = ", ".join(parts)
    if private is False:
        return note(BUCKET, found, "anyone who knows its name can read it, and KV chunks tell what prompts said")
    return ok(BUCKET, found)


LISTING: Final = "listing"

FIRST: Final = 1000
"""Maximum number of objects to list: one page of the Hub."""

MAX_SAMPLE_BYTES: Final = 256 * 1024 * 1024
"""Maximum size in bytes of the chunk that is read as a test."""

_OWN: Final = {"classic": ObjectKind.CLASSIC, "mp": ObjectKind.MP}
_ENGINES: Final = {ObjectKind.CLASSIC: "the classic engine", ObjectKind.MP: "MP mode (lmcache server)"}
_EARLIEST: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class ListingSample:
    """Counts of a partial listing.

    Attributes:
        by_kind: Number of objects by kind.
        foreign: Path of the first object that is neither a key's nor a metadata record.
        sample: Chunk to read as a test: of the engine's own kind if possible, then the newest.
        more: Whether the listing has more objects.
    """

    by_kind: dict[ObjectKind, int]
    foreign: str | None = None
    sample: ChunkEntry | None = None
    more: bool = False


def check_listing(case: CheckContext) -> tuple[Finding, ChunkEntry | None]:
    """List the first objects of the instance.

    Returns:
        The finding, and a chunk for a read test, if there is one.

    Raises:
        HFBucketError: If a page cannot be listed.
    """
    listed = case.ask("tree", lambda _: [*itertools.islice(Classifier(case.bucket).walk(case.timeout_secs), FIRST)])
    seen = look(listed, _OWN[case.named.mode])
    return judge(case.named, seen), seen.sample


def look(listed: Iterable[ListedObject], own: ObjectKind) -> ListingSample:
    """Count listed objects.

    Args:
        listed: The objects.
        own: Kind of the keys that the engine writes.
    """
    best = (False, _EARLIEST, 0)
    seen = ListingSample(dict.fromkeys(ObjectKind, 0))
    for one in listed:
        kind = one.shown_kind
        seen.by_kind[kind] += 1
        if kind is ObjectKind.FOREIGN and seen.foreign is None:
            seen.foreign = one.info.path
        if one.chunk is not None and kind is not ObjectKind.PROBE and one.info.content.size <= MAX_SAMPLE_BYTES:
            rank = (kind is own, one.chunk.uploaded_at or _EARLIEST, one.chunk.content.size)
            if seen.sample is None or rank > best:
                seen.sample, best = one.chunk, rank
    seen.more = sum(seen.by_kind.values()) >= FIRST
    return seen


def judge(named: InstanceConfig, seen: ListingSample) -> Finding:
    """Check that the listed objects are those that engines of this configuration look for."""
    own = _OWN[named.mode]
    other = ObjectKind.MP if own is ObjectKind.CLASSIC else ObjectKind.CLASSIC
    total = sum(seen.by_kind.values())
    if not total:
        return ok(LISTING, "no objects yet")
    parts = [kind.counted(number) for kind, number in seen.by_kind.items() if number]
    found = f"{'the first ' if seen.more else ''}{count(total, 'object')}: {', '.join(parts)}"
    if seen.by_kind[other] and not seen.by_kind[own]:
        return warning(
            LISTING,
            f"{found}: these are keys of {_ENGINES[other]}, and this configuration is one of {_ENGINES[own]}, which "
            "looks for others",
            f"look at {named.setting('bucket_handle')}: a prefix of its own for each kind keeps them apart",
        )
    if seen.foreign is not None:
        return note(LISTING, f"{found}; the first foreign one is {seen.foreign!r}", "engines pass them by")
    return ok(LISTING, found)


RECORDS: Final = "records"
BAD: Final = f"{BAD_DIRECTORY}/"
PROBES: Final = f"{RESERVED}/probe/"

_FIRST: Final = 1000


def check_records(case: CheckContext) -> Finding:
    """List the objects below the two metadata prefixes.

    Raises:
        HFBucketError: If a page cannot be listed.
    """
    bad, probes = (_list(case, name) for name in (BAD, PROBES))
    handle = case.bucket.handle
    if bad:
        newest = max(bad, key=lambda info: info.uploaded_at or datetime.min.replace(tzinfo=UTC))
        when = age(newest.uploaded_at, datetime.fromtimestamp(case.now(), UTC))
        return warning(
            RECORDS,
            f"{'at least ' if len(bad) == _FIRST else ''}{count(len(bad), 'record')} of bad objects below {handle.join(BAD)}, the newest {when} old: {newest.path}",
            "each says which object failed its hash, and why: delete the object or let it be, then delete the record",
        )
    if probes:
        found = f"{count(len(probes), 'object')} of --probe-write below {handle.join(PROBES)}, such as {probes[0].path}"
        return note(RECORDS, found, "unless one runs at this moment it was killed: delete them")
    return ok(RECORDS, "no records of bad objects")


def _list(case: CheckContext, name: str) -> Sequence[ObjectInfo]:
    path = case.bucket.handle.join(name)
    return case.ask("tree", lambda _: [*itertools.islice(case.bucket.list_objects(path, case.timeout_secs), _FIRST)])


THROUGHPUT: Final = "throughput"


def check_throughput(case: CheckContext, chunk: ChunkEntry) -> Finding:
    """Read one chunk and compare its Xet hash.

    Raises:
        HFBucketError: If the chunk cannot be read.
    """
    try:
        fetched = case.ask(THROUGHPUT, lambda deadline: fetch(case.bucket, chunk.text, chunk.content, deadline))
    except IntegrityError as caught:
        verify = case.named.setting("verify")
        advice = (
            f"set {verify} to hash" if case.settings.verify != "hash" else f"{verify} is hash, so it is never served"
        )
        return error(
            THROUGHPUT,
            f"the bytes of a chunk are not what was stored: {caught}",
            f"{advice}; if it stays so, delete the object",
        )
    speed = size(chunk.content.size / max(fetched.seconds, 1e-6))
    return ok(THROUGHPUT, f"{size(chunk.content.size)} in {fetched.seconds:.2f} s, {speed}/s, hash right: {chunk.text}")
