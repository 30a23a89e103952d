"""Deletion plans: JSONL files with a header, a line per object, and an end line without which a plan is invalid.

A plan may be read, kept and shortened: objects whose lines are removed stay. `jobs.batch.apply` may apply it
repeatedly.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.keys import BucketHandle, decode_name, encode_name, is_probe, parse_key
from hfbucket_plugin.core.units import NOTHING, Extent
from hfbucket_plugin.errors import KeyFormatError, RefusedError
from hfbucket_plugin.tools.inventory import is_reserved, readable
from hfbucket_plugin.tools.plan_file import PlanOutput, PlanReader
from jobs.deletion.guards import MaxDelete

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hfbucket_plugin.tools.plan_file import Record


VERSION: Final = 1

MIRROR: Final = "mirror"
"""Job that deletes, at a destination, chunks that the source of an export does not hold."""

_LONGEST_AGE_SECS: Final = 100 * 365 * 86400.0
"""Maximum minimum age; a larger one is no stricter, and overflows the range of dates."""


@dataclass(frozen=True, slots=True)
class DeletionHeader:
    """Header of a deletion plan.

    Attributes:
        job: `cleanup`, `rm` or `mirror`.
        instance: Name of the instance.
        bucket: Handle of its bucket.
        endpoint: URL of its Hub.
        made_at: Time of the plan.
        clock: Clock of that time: `hub` or `local`.
        min_age: Minimum age of the objects to delete.
        max_delete: Limits of the deletes.
        foreign: Whether objects that are not chunks may be deleted.
        config: LMCache YAML with the instance; None where an adapter's JSON defines it.
        wanted: The policy, or the requested keys and prefixes.
        heat: Whether the plan depends on reads, see `jobs.retention.access.AccessStats.record`; empty in older plans.
    """

    job: str
    instance: str
    bucket: BucketHandle
    endpoint: str
    made_at: datetime
    clock: str
    min_age: timedelta
    max_delete: MaxDelete
    foreign: bool = False
    config: str | None = None
    wanted: dict[str, Any] = field(default_factory=dict)
    heat: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "record": "plan",
            "version": VERSION,
            "job": self.job,
            "instance": self.instance,
            "bucket": str(self.bucket),
            "endpoint": self.endpoint,
            "made_at": self.made_at.isoformat(),
            "clock": self.clock,
            "min_age_seconds": self.min_age.total_seconds(),
            "max_delete": self.max_delete.record(),
            "foreign": self.foreign,
            "foreign_seal": self._foreign_seal(),
            "config": self.config,
            "wanted": self.wanted,
            "heat": self.heat,
        }

    def _foreign_seal(self) -> str:
        """Return the seal of a plan made with `--foreign delete`: a plan whose flag was edited does not have it."""
        made = [self.job, self.instance, str(self.bucket), self.endpoint, self.made_at.isoformat(), self.foreign]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    @classmethod
    def from_record(cls, record: dict[str, Any], *, foreign: bool = False) -> DeletionHeader:
        """Parse the result of `record`.

        Args:
            record: The header's JSON object.
            foreign: Whether objects that are not chunks may be deleted even if the plan was made without that
                permission.

        Raises:
            ValueError: If the record is not a valid header, or has another version.
            RefusedError: If the header permits deletes that the plan was not made for.
        """
        if record.get("record") != "plan" or record.get("version") != VERSION:
            raise ValueError(f"this is no plan of version {VERSION}")
        texts = [record.get(name) for name in ("job", "instance", "bucket", "endpoint", "made_at", "clock")]
        config = record.get("config")
        if not all(isinstance(text, str) for text in texts) or not isinstance(config, str | None):
            raise ValueError("a plan's header needs job, instance, bucket, endpoint, made_at and clock, as texts")
        header = cls(
            record["job"],
            record["instance"],
            BucketHandle.parse(record["bucket"]),
            record["endpoint"],
            _moment(record["made_at"]),
            record["clock"],
            _age(record["min_age_seconds"]),
            MaxDelete.from_record(record.get("max_delete")),
            record.get("foreign") is True,
            config,
            record.get("wanted", {}),
            record["heat"] if isinstance(record.get("heat"), dict) else {},
        )
        if header.foreign and not foreign and record.get("foreign_seal") != header._foreign_seal():
            raise RefusedError(
                "the plan was not made with --foreign delete, or its header was edited since: nothing is deleted. If objects "
                "that are not chunks are to go, give --foreign delete again, or plan again"
            )
        return header


@dataclass(frozen=True, slots=True)
class Item:
    """Object to delete, if it is still the listed one.

    Attributes:
        path: Path from the root of the bucket.
        key: Its key, or its name if it is not a chunk.
        xet_hash: Xet hash of its content.
        size: Size in bytes.
        uploaded_at: Upload time by the Hub's clock.
        reason: Why it is deleted.
        last_used: Time of its last put or read; None where reads are not known.
    """

    path: str
    key: str
    xet_hash: str
    size: int
    uploaded_at: datetime
    reason: str
    last_used: datetime | None = None

    @property
    def is_chunk(self) -> bool:
        """Whether the object is a chunk, with the name of its key. Other objects have their name in place of a key."""
        try:
            parse_key(self.key)
        except KeyFormatError:
            return False
        return not is_probe(self.key) and self.path.rpartition("/")[2] == encode_name(self.key)

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "path": self.path,
            "key": self.key,
            "xet_hash": self.xet_hash,
            "size": self.size,
            "uploaded_at": self.uploaded_at.isoformat(),
            "last_used": None if self.last_used is None else self.last_used.isoformat(),
            "reason": self.reason,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Item:
        """Parse the result of `record`.

        Raises:
            ValueError: If the record is invalid.
        """
        texts = [record.get(name) for name in ("path", "key", "xet_hash", "uploaded_at", "reason")]
        nbytes = record.get("size")
        if not all(isinstance(text, str) for text in texts) or type(nbytes) is not int or nbytes < 0:
            raise ValueError("an object of a plan needs path, key, xet_hash, size, uploaded_at and reason")
        at, used = _moment(record["uploaded_at"]), record.get("last_used")
        last = None if used is None else _moment(used)
        return cls(record["path"], record["key"], record["xet_hash"], nbytes, at, record["reason"], last)


@dataclass(frozen=True, slots=True)
class DeletionTotals:
    """Counts of a planning run.

    Attributes:
        listed: Chunks of the instance.
        foreign: Other objects that may be deleted; none without `--foreign delete`.
        planned: Objects to delete.
        by_reason: Objects to delete, by model and reason. Those that are not chunks have no model.
        kept: Objects that stay, by reason.
        passed_by: Objects that do not belong to the instance, by kind.
        latest: By reason, the latest put and the latest use among the objects to delete; the use is None where reads
            are not known. Missing in older plans.
    """

    listed: Extent
    foreign: Extent
    planned: Extent
    by_reason: dict[tuple[str, str], Extent]
    kept: dict[str, Extent]
    passed_by: dict[str, Extent]
    latest: dict[str, tuple[datetime, datetime | None]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "listed": self.listed.record(),
            "foreign": self.foreign.record(),
            "planned": self.planned.record(),
            "by_reason": [
                {"model": model, "reason": reason} | extent.record()
                for (model, reason), extent in sorted(self.by_reason.items())
            ],
            "kept": {reason: extent.record() for reason, extent in sorted(self.kept.items())},
            "passed_by": {kind: extent.record() for kind, extent in sorted(self.passed_by.items())},
            "latest": {
                reason: {"put": put.isoformat(), "used": None if used is None else used.isoformat()}
                for reason, (put, used) in sorted(self.latest.items())
            },
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> DeletionTotals:
        """Parse the result of `record`.

        Raises:
            ValueError: If the record is invalid.
        """
        named = {(one["model"], one["reason"]): Extent.from_record(one) for one in record["by_reason"]}
        kept, passed_by = (
            {name: Extent.from_record(one) for name, one in record[part].items()} for part in ("kept", "passed_by")
        )
        listed, foreign, planned = (Extent.from_record(record[part]) for part in ("listed", "foreign", "planned"))
        latest = {
            reason: (_moment(one["put"]), None if one["used"] is None else _moment(one["used"]))
            for reason, one in record.get("latest", {}).items()
        }
        return cls(listed, foreign, planned, named, kept, passed_by, latest)


def _age(seconds: Any) -> timedelta:
    if type(seconds) not in (int, float) or not 0 <= seconds <= timedelta.max.total_seconds():
        raise ValueError(f"min_age_seconds is {seconds!r}, and no number of seconds")
    return timedelta(seconds=min(float(seconds), _LONGEST_AGE_SECS))


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment


class DeletionPlanWriter(PlanOutput):
    """Writer of a plan, which appears under its name once it is complete. Use it as a context manager.

    Args:
        path: Path of the plan.
        header: Header of the plan.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, header: DeletionHeader) -> None:
        super().__init__(path, header.record())
        self._planned = Extent()
        self._by_reason: defaultdict[tuple[str, str], Extent] = defaultdict(Extent)
        self._latest: dict[str, tuple[datetime, datetime | None]] = {}

    def add(self, item: Item, model: str) -> None:
        """Add the deletion of an object."""
        self._write(item.record())
        self._planned = self._planned.plus(item.size)
        group = (model, item.reason)
        self._by_reason[group] = self._by_reason[group].plus(item.size)
        put, used = self._latest.get(item.reason, (item.uploaded_at, item.last_used))
        later = used if item.last_used is None else item.last_used if used is None else max(used, item.last_used)
        self._latest[item.reason] = max(put, item.uploaded_at), later

    def finish(
        self, listed: Extent, kept: dict[str, Extent], passed_by: dict[str, Extent], foreign: Extent = NOTHING
    ) -> None:
        """Complete the plan, so that it appears under its name. The arguments are fields of `DeletionTotals`."""
        totals = DeletionTotals(listed, foreign, self._planned, dict(self._by_reason), kept, passed_by, self._latest)
        self._end(totals.record())


class DeletionPlanFile:
    """Deletion plan on disk.

    Attributes:
        path: Path of the file.
        header: Header of the plan.
        totals: Counts of the planning run.
        left: Objects in the file; fewer than planned if lines were removed.
        chunks_left: Chunks among those objects.
    """

    def __init__(
        self,
        path: Path,
        header: DeletionHeader,
        totals: DeletionTotals,
        left: Extent,
        *,
        chunks_left: Extent,
        reader: PlanReader[DeletionHeader, DeletionTotals],
    ) -> None:
        self.path = path
        self.header = header
        self.totals = totals
        self.left = left
        self.chunks_left = chunks_left
        self._reader = reader

    @classmethod
    def open(cls, path: Path, *, ours: bool = False, foreign: bool = False) -> DeletionPlanFile:
        """Read a plan, and check every line.

        Args:
            path: Path of the plan.
            ours: Whether to refuse a file that another user could have written.
            foreign: Whether `--foreign delete` was given again, for a plan without a valid seal of it.

        Raises:
            ConfigError: If the file cannot be read, is not a plan, or is incomplete.
            RefusedError: If the plan names protected objects or more than was planned, or another user may have written
                it.
        """
        left = chunks_left = Extent()

        def take(header: DeletionHeader, record: Record) -> None:
            nonlocal left, chunks_left
            item = Item.from_record(record)
            _expect_allowed(item, header)
            left = left.plus(item.size)
            if item.is_chunk:
                chunks_left = chunks_left.plus(item.size)

        reader: PlanReader[DeletionHeader, DeletionTotals] = PlanReader(path, ours=ours)
        header, totals = reader.read(
            lambda record: DeletionHeader.from_record(record, foreign=foreign), take, DeletionTotals.from_record
        )
        if left.objects > totals.planned.objects:
            raise RefusedError(f"plan {str(path)!r} names more objects than were planned: nothing is deleted")
        return cls(path, header, totals, left, chunks_left=chunks_left, reader=reader)

    def check(self, limits: MaxDelete) -> None:
        """Refuse the plan if it exceeds limits.

        Percentages are checked twice, of chunks and of all objects, so that other objects do not raise the limit of
        chunks.

        Raises:
            SafetyError: If the plan exceeds a limit.
        """
        listed = self.totals.listed
        limits.check(self.left, listed.and_(self.totals.foreign))
        limits.check(self.chunks_left, listed, "chunk")

    def items(self) -> Iterator[Item]:
        """Stream the objects to delete in the plan's order, as the file was when it was opened.

        Raises:
            RefusedError: If the file has changed since.
            OSError: If the file can no longer be read.
        """
        return map(Item.from_record, self._reader.items())


def _expect_allowed(item: Item, header: DeletionHeader) -> None:
    """Refuse an item that no valid plan contains."""
    name = header.bucket.relative(item.path)
    if name is None or is_reserved(name):
        raise RefusedError(f"{item.path!r} is never deleted: nothing is")
    try:
        text = decode_name(name)
        parse_key(text)
    except KeyFormatError:
        text = None
    chunk = text is not None and text == item.key and not is_probe(text)
    if header.foreign:
        if not chunk and not (text is not None and is_probe(text)) and readable(name.rpartition("/")[2]):
            raise RefusedError(f"{item.path!r} may be the chunk of another instance or version: nothing is deleted")
        return
    if not chunk:
        raise RefusedError(
            f"{item.path!r} is no chunk of that key, and --foreign delete was not given: nothing is deleted"
        )
