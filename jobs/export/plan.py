"""Plan of an export."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, Self

from hfbucket_plugin.core.keys import BucketHandle, encode_name, is_probe, parse_key, same_endpoint
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import ConfigError, KeyFormatError, RefusedError
from hfbucket_plugin.tools.external_sort import open_temporary
from hfbucket_plugin.tools.plan_file import PlanOutput, PlanReader, Sealed
from jobs.export.endpoint import EndpointObject
from jobs.export.manifest import ManifestLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.tools.plan_file import Record


_DIGEST_BYTES: Final = 16
_CACHE_KIB: Final = 16 * 1024


class RenameError(RefusedError):
    """The name of a copy is not usable; nothing is copied."""


@dataclass(frozen=True, slots=True)
class Rename:
    """Rule that renames a key prefix.

    Attributes:
        old: Prefix of a key.
        new: Its replacement.
    """

    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old}={self.new}"


@dataclass(frozen=True, slots=True)
class Renames:
    """Ordered rename rules; the first that matches a key applies. Keys without a match are unchanged.

    Attributes:
        rules: Rules in order.
    """

    rules: tuple[Rename, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Renames:
        """Parse rules such as `old-model@=new-model@`.

        Raises:
            ConfigError: If a text is not a rule, or a rule is shadowed by an earlier one.
        """
        rules: list[Rename] = []
        for text in texts:
            old, found, new = text.partition("=")
            if not found or not old or not new or old == new or "=" in new:
                raise ConfigError(f"--rename {text!r}: must read OLD=NEW, two different starts of keys without '='")
            for rule in rules:
                if old.startswith(rule.old):
                    raise ConfigError(f"--rename {text!r} comes after {str(rule)!r}, which takes all of its keys")
            rules.append(Rename(old, new))
        return cls(tuple(rules))

    def texts(self) -> list[str]:
        """Return the rules in the format of `parse`."""
        return [str(rule) for rule in self.rules]

    def __call__(self, key: str) -> str:
        """Return the key of the copy of a chunk.

        Raises:
            RenameError: If the result is not a key, is a key of another kind or chunk, or is LMCache's probe.
        """
        rule = next((rule for rule in self.rules if key.startswith(rule.old)), None)
        if rule is None:
            return key
        renamed = rule.new + key.removeprefix(rule.old)
        try:
            before, after = parse_key(key), parse_key(renamed)
        except KeyFormatError as error:
            raise RenameError(f"--rename {str(rule)!r}: {error}; nothing is copied. Fix the rule") from None
        if type(before) is not type(after) or before.chunk_hash != after.chunk_hash or is_probe(renamed):
            raise RenameError(
                f"--rename {str(rule)!r} would make {renamed!r} of {key!r}, which names another chunk or none; nothing is "
                "copied. Rewrite what stands before the hash, and keep its number of '@'"
            )
        return renamed


class NewNames:
    """Set of assigned names, as digests in a temporary file. Use it as a context manager."""

    def __init__(self) -> None:
        self._base = open_temporary(cache_kib=_CACHE_KIB)
        self._base.executescript("CREATE TABLE names (digest BLOB PRIMARY KEY, key TEXT) WITHOUT ROWID; BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()

    def give(self, name: str, key: str) -> None:
        """Assign a name to the copy of a chunk.

        Raises:
            RenameError: If the copy of another chunk has the name.
        """
        digest = blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest()
        added = self._base.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (digest, key)).rowcount
        if added:
            return
        (other,) = self._base.execute("SELECT key FROM names WHERE digest = ?", (digest,)).fetchone()
        if other != key:  # a listing whose pages shifted may name a chunk twice
            raise RenameError(
                f"--rename: the copies of {other!r} and of {key!r} would both be {name!r}; nothing is copied. Fix the "
                "rules, or choose one of the two"
            )


VERSION: Final = 1
JOB: Final = "export"
NEW, REPLACED, CONFLICT = "new", "replaced", "conflict"


@dataclass(frozen=True, slots=True)
class EndpointRef:
    """Reference to an endpoint in a plan.

    Attributes:
        instance: Name of the instance; None for a directory.
        where: Handle of its bucket, or path of the directory.
        endpoint: URL of the bucket's Hub; None for a directory.
    """

    instance: str | None
    where: str
    endpoint: str | None = None

    @property
    def name(self) -> str:
        """Name of the endpoint in messages."""
        return self.instance or self.where

    def same_as(self, other: EndpointRef) -> bool:
        """Return whether both refer to the same place, regardless of spelling and of the names of instances."""
        if self.endpoint is None or other.endpoint is None:
            return (self.endpoint, self.where) == (other.endpoint, other.where)
        same = BucketHandle.parse(self.where) == BucketHandle.parse(other.where)
        return same and same_endpoint(self.endpoint, other.endpoint)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"instance": self.instance, "where": self.where, "endpoint": self.endpoint}

    @classmethod
    def from_record(cls, record: Any) -> EndpointRef:
        """Read what `record` made.

        Raises:
            ValueError: If the record is invalid.
        """
        if not isinstance(record, dict) or not isinstance(record.get("where"), str):
            raise ValueError("an end needs instance and where")  # noqa: TRY004 - every fault of a record is a ValueError
        instance, endpoint = record.get("instance"), record.get("endpoint")
        if not isinstance(instance, str | None) or not isinstance(endpoint, str | None):
            raise ValueError("the instance and the endpoint of an end are texts")  # noqa: TRY004 - as above
        return cls(instance, record["where"], endpoint)


@dataclass(frozen=True, slots=True)
class ExportHeader:
    """Header of an export plan.

    Attributes:
        source: Endpoint to copy from.
        destination: Endpoint to copy to.
        made_at: Time of the plan.
        mode: `auto`, `copy` or `stream`.
        renames: Rename rules of the copies.
        believe_files: Whether a directory without a manifest was listed.
        config: LMCache YAML with the instances, if any.
        wanted: The requested selection.
    """

    source: EndpointRef
    destination: EndpointRef
    made_at: datetime
    mode: str
    renames: Renames = field(default_factory=Renames)
    believe_files: bool = False
    config: str | None = None
    wanted: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "record": "plan",
            "version": VERSION,
            "job": JOB,
            "from": self.source.record(),
            "to": self.destination.record(),
            "made_at": self.made_at.isoformat(),
            "mode": self.mode,
            "rename": self.renames.texts(),
            "believe_files": self.believe_files,
            "config": self.config,
            "wanted": self.wanted,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ExportHeader:
        """Read what `record` made.

        Raises:
            ValueError: If the record is not a valid header, or has another version.
        """
        if record.get("record") != "plan" or record.get("job") != JOB or record.get("version") != VERSION:
            raise ValueError(f"this is no plan of an export, version {VERSION}")
        config, mode = record.get("config"), record.get("mode")
        if not isinstance(config, str | None) or mode not in ("auto", "copy", "stream"):
            raise ValueError("a plan's config is a text, its mode auto, copy or stream")
        made_at = datetime.fromisoformat(record["made_at"])
        source, destination = EndpointRef.from_record(record.get("from")), EndpointRef.from_record(record.get("to"))
        renames = Renames.parse(record["rename"])
        believes = record.get("believe_files") is True
        return cls(source, destination, made_at, mode, renames, believes, config, record.get("wanted", {}))


@dataclass(frozen=True, slots=True)
class CopyItem:
    """Chunk to copy, if the destination is still as it was when the copy was planned.

    Attributes:
        key: Key at the source.
        to: Key at the destination.
        content: Its hash and size.
        uploaded_at: Upload time by the Hub's clock; None if unknown.
        replaces: Content that the copy replaces; None if there is none.
    """

    key: str
    to: str
    content: ContentId
    uploaded_at: datetime | None
    replaces: EndpointObject | None = None

    @property
    def path(self) -> str:
        """Name at the destination."""
        return encode_name(self.to)

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.content.size

    @property
    def reason(self) -> str:
        """Reason for the copy."""
        return NEW if self.replaces is None else REPLACED

    def record(self, reason: str | None = None) -> dict[str, Any]:
        """For JSON."""
        line = ManifestLine(self.key, self.content, self.uploaded_at).record()
        if self.replaces is not None:
            held = self.replaces
            line["there"] = ManifestLine(self.to, held.content, held.uploaded_at).record()
        return {"reason": reason or self.reason} | line

    @classmethod
    def from_record(cls, record: dict[str, Any], renames: Renames) -> CopyItem:
        """Read what `record` made.

        Raises:
            ValueError: If the record is invalid.
        """
        own = {name: value for name, value in record.items() if name not in ("reason", "there")}
        line = ManifestLine.from_record(own)
        there = None if record.get("there") is None else ManifestLine.from_record(record["there"])
        to = renames(line.key)
        if there is not None and there.key != to:
            raise ValueError("what it replaces bears another key")
        replaces = None if there is None else EndpointObject(there.content, there.uploaded_at)
        if (record.get("reason") in (REPLACED, CONFLICT)) != (replaces is not None):
            raise ValueError("a chunk replaces what is there, or is new")
        return cls(line.key, to, line.content, line.uploaded_at, replaces)


@dataclass(frozen=True, slots=True)
class ExportTotals:
    """Counts of a planning run.

    Attributes:
        chosen: Selected chunks.
        planned: Chunks to copy, by reason.
        same: Chunks that the destination already holds.
        conflicts: Chunks whose key holds other content at the destination, which is kept.
        skipped: Number of skipped objects, by reason.
    """

    chosen: Extent
    planned: dict[str, Extent]
    same: Extent
    conflicts: Extent
    skipped: dict[str, int]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "chosen": self.chosen.record(),
            "planned": {reason: extent.record() for reason, extent in sorted(self.planned.items())},
            "same": self.same.record(),
            "conflicts": self.conflicts.record(),
            "skipped": self.skipped,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> ExportTotals:
        """Read what `record` made.

        Raises:
            ValueError: If the record is invalid.
        """
        planned = {reason: Extent.from_record(one) for reason, one in record["planned"].items()}
        chosen, same, conflicts = (Extent.from_record(record[name]) for name in ("chosen", "same", "conflicts"))
        return cls(chosen, planned, same, conflicts, dict(record["skipped"]))


class ExportPlanWriter(PlanOutput):
    """Writer of a plan, which appears under its name once it is complete. Use it as a context manager.

    Args:
        path: Path of the plan.
        header: Header of the plan.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path, header: ExportHeader) -> None:
        super().__init__(path, header.record())
        self.planned: defaultdict[str, Extent] = defaultdict(Extent)

    def add(self, copy_item: CopyItem) -> None:
        """Add a copy."""
        self._write(copy_item.record())
        self.planned[copy_item.reason] = self.planned[copy_item.reason].plus(copy_item.size)

    def name_conflict(self, copy_item: CopyItem) -> None:
        """Record a chunk that is not copied because its key holds other content at the destination."""
        self._write(copy_item.record(CONFLICT))

    def finish(self, totals: ExportTotals) -> None:
        """Complete the plan, so that it appears under its name."""
        self._end(totals.record())


class ExportPlanFile:
    """Export plan on disk.

    Attributes:
        path: Path of the file.
        header: Header of the plan.
        totals: Counts of the planning run.
        left: Copies in the file by reason; fewer than planned if lines were removed.
    """

    def __init__(
        self,
        path: Path,
        header: ExportHeader,
        totals: ExportTotals,
        left: dict[str, Extent],
        reader: PlanReader[ExportHeader, ExportTotals],
    ) -> None:
        self.path = path
        self.header = header
        self.totals = totals
        self.left = left
        self._reader = reader

    @property
    def items_left(self) -> Extent:
        """Return all copies that are left."""
        kinds = [self.left[reason] for reason in (NEW, REPLACED) if reason in self.left]
        return Extent(sum(one.objects for one in kinds), sum(one.bytes for one in kinds))

    @classmethod
    def open(cls, path: Path, *, ours: bool = False) -> ExportPlanFile:
        """Read a plan, and check every line.

        Args:
            path: Path of the plan.
            ours: Whether to refuse a file that another user could have written.

        Raises:
            ConfigError: If the file cannot be read, is not a plan, or is incomplete.
            RefusedError: If another user may have written the file.
        """
        left: defaultdict[str, Extent] = defaultdict(Extent)

        def take(header: ExportHeader, record: Record) -> None:
            reason = str(record.get("reason"))
            left[reason] = left[reason].plus(CopyItem.from_record(record, header.renames).size)

        reader: PlanReader[ExportHeader, ExportTotals] = PlanReader(path, ours=ours)
        header, totals = reader.read(ExportHeader.from_record, take, ExportTotals.from_record)
        return cls(path, header, totals, dict(left), reader)

    def copy_items(self, *reasons: str) -> Iterator[CopyItem]:
        """Stream the copies, or other lines, in the plan's order.

        Args:
            reasons: Reasons of the lines; without any, the lines of copies.

        Raises:
            RefusedError: If the file has changed since it was opened.
            OSError: If the file can no longer be read.
        """
        wanted = reasons or (NEW, REPLACED)
        for record in self._reader.items():
            if record.get("reason") in wanted:
                yield CopyItem.from_record(record, self.header.renames)


def is_export(path: Path) -> bool:
    """Return whether a plan is an export plan, by its first line.

    Raises:
        ConfigError: If the file cannot be read.
    """
    lines = Sealed(path, "plan")
    try:
        return bool(json.loads(next(lines.lines(), b"")).get("job") == JOB)
    except OSError as error:
        raise ConfigError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError):
        return False


class OnConflict(StrEnum):
    """Action for a chunk whose key holds other content at the destination."""

    SKIP = "skip"
    NEWER = "newer"
    OVERWRITE = "overwrite"


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """Settings of an export.

    Attributes:
        until: Deadline of the whole command.
        mode: `auto`, `copy` or `stream`.
        on_conflict: Action for chunks whose key holds other content at the destination.
        renames: Rename rules of the copies.
        believe_files: Whether to import a directory without a manifest.
        dry_run: Whether only to plan.
        yes: Whether to replace without asking.
        ask: Asks whether to apply a plan that replaces; None if there is nobody to ask.
        plan_dir: Directory of plans; None for a directory of temporary files.
        local: Whether bytes pass through this process, even if a Ray cluster is configured.
        address: Address of the Ray cluster; None for the configured one.
        parallel: Maximum number of concurrent batches.
        window_bytes: Maximum memory of bytes in transit, over all batches.
        config: LMCache YAML, recorded in plans.
        quiet: Whether to hide progress.
    """

    until: Deadline
    mode: str = "auto"
    on_conflict: OnConflict = OnConflict.SKIP
    renames: Renames = field(default_factory=Renames)
    believe_files: bool = False
    dry_run: bool = False
    yes: bool = False
    ask: Callable[[ExportPlanFile], bool] | None = None
    plan_dir: Path | None = None
    local: bool = True
    address: str | None = None
    parallel: int = 4
    window_bytes: int = 512 * 1024 * 1024
    config: str | None = None
    quiet: bool = False
