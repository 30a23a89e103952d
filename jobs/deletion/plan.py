"""What is to be deleted, as a JSONL file: a header, one object a line, and an end without which it is no plan.

A plan may be read, kept, and cut: lines taken out are objects that stay. It is applied by `jobs.batch.apply`, as often as wanted.
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
"""The job that deletes at a destination what the source of an export does not have."""

_LONGEST_AGE_SECS: Final = 100 * 365 * 86400.0
"""More is no less strict, and no date any more."""


@dataclass(frozen=True, slots=True)
class DeletionHeader:
    """What a plan is for.

    Attributes:
        job: `cleanup` or `rm`.
        instance: Whose objects.
        bucket: Its handle.
        endpoint: Its Hub.
        made_at: When it was planned.
        clock: Whose clock that is: `hub` or `local`.
        min_age: Nothing younger may be deleted.
        max_delete: Most that may be deleted.
        foreign: Whether objects that are no chunks may be deleted.
        config: The LMCache YAML that names the instance; None where it was named by an adapter's JSON.
        wanted: The policy, or what was asked for.
        heat: Whether it goes by what was read, see `jobs.retention.access.AccessStats.record`; empty in older plans.
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
        """For JSON."""
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
        """What only a plan has that was made with `--foreign delete` as it says: an edited flag does not fit it."""
        made = [self.job, self.instance, str(self.bucket), self.endpoint, self.made_at.isoformat(), self.foreign]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    @classmethod
    def from_record(cls, record: dict[str, Any], *, foreign: bool = False) -> DeletionHeader:
        """Read what `record` made.

        Args:
            record: The header.
            foreign: Whether objects that are no chunks may be deleted whatever the plan was made for.

        Raises:
            ValueError: It is no header, or of another version.
            RefusedError: It allows what the plan was not made for.
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
    """One object that is to go, if it is still the one that was listed.

    Attributes:
        path: From the root of the bucket.
        key: Its key; of what is no chunk, its name.
        xet_hash: Of its content.
        size: Bytes.
        uploaded_at: When the Hub took it.
        reason: Why it goes.
        last_used: When it was last put or read; None where reads are not known.
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
        """Whether it is a chunk: its name is that of its key. What is no chunk has its name in place of a key."""
        try:
            parse_key(self.key)
        except KeyFormatError:
            return False
        return not is_probe(self.key) and self.path.rpartition("/")[2] == encode_name(self.key)

    def record(self) -> dict[str, Any]:
        """For JSON."""
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
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing.
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
    """What was found while planning.

    Attributes:
        listed: The chunks of the instance.
        foreign: What is no chunk, and may be deleted: nothing but with `--foreign delete`.
        planned: Those that are to go.
        by_reason: Those, by model and reason. What is no chunk has no model.
        kept: Those that stay, by reason.
        passed_by: Objects that are none of the instance's, by kind.
        latest: By reason, when the last of those that are to go was put, and when the last one was used; None where reads
            are not known. Older plans do not say.
    """

    listed: Extent
    foreign: Extent
    planned: Extent
    by_reason: dict[tuple[str, str], Extent]
    kept: dict[str, Extent]
    passed_by: dict[str, Extent]
    latest: dict[str, tuple[datetime, datetime | None]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
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
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing.
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
    """Writes a plan, which appears under its name when it is whole. Use it as a context manager.

    Args:
        path: Of the plan.
        header: What it is for.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, header: DeletionHeader) -> None:
        super().__init__(path, header.record())
        self._planned = Extent()
        self._by_reason: defaultdict[tuple[str, str], Extent] = defaultdict(Extent)
        self._latest: dict[str, tuple[datetime, datetime | None]] = {}

    def add(self, item: Item, model: str) -> None:
        """Plan the deletion of an object."""
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
        """End the plan: from now on it is there. See `DeletionTotals`."""
        totals = DeletionTotals(listed, foreign, self._planned, dict(self._by_reason), kept, passed_by, self._latest)
        self._end(totals.record())


class DeletionPlanFile:
    """A plan on disk.

    Attributes:
        path: Of the file.
        header: What it is for.
        totals: What was found while planning.
        left: What is still in it: less than planned where lines were taken out.
        chunks_left: The chunks among it.
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
        """Read a plan, every line of it.

        Args:
            path: Of the plan.
            ours: Whether to refuse one that somebody else could have written.
            foreign: Whether `--foreign delete` was given again, for a plan that does not vouch for it.

        Raises:
            ConfigError: It cannot be read, is none, or is not whole.
            RefusedError: It names what is never deleted, or more than was planned; or it may be somebody else's.
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
        """Refuse it where it deletes more than limits allow.

        Shares are of chunks for chunks, and of everything for everything: what is no chunk lends chunks no room.

        Raises:
            SafetyError: It does.
        """
        listed = self.totals.listed
        limits.check(self.left, listed.and_(self.totals.foreign))
        limits.check(self.chunks_left, listed, "chunk")

    def items(self) -> Iterator[Item]:
        """What is to go, in the plan's order: what was in it when it was opened, whatever its file holds now.

        Raises:
            RefusedError: The file was changed since.
            OSError: It cannot be read any more.
        """
        return map(Item.from_record, self._reader.items())


def _expect_allowed(item: Item, header: DeletionHeader) -> None:
    """Refuse what no plan of ours would name."""
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
