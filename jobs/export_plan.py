"""What is to be copied, as a JSONL file: a header, a chunk a line, and an end without which it is no plan.

Names of objects and files are not in it: they come from keys, and keys from the header's rules, whoever wrote the plan.
Lines may be taken out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.handle import BucketHandle, same_endpoint
from hfbucket_plugin.keys import encode_name
from jobs.ends import Held
from jobs.guards import Extent
from jobs.manifest import Line
from jobs.plan_output import PlanOutput
from jobs.rename import Renames
from jobs.sealed import Sealed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hfbucket_plugin.content import Content

VERSION: Final = 1
JOB: Final = "export"
NEW, REPLACED, CONFLICT = "new", "replaced", "conflict"


@dataclass(frozen=True, slots=True)
class Place:
    """One of the two ends, as a plan names it.

    Attributes:
        instance: The name of the instance; None for a directory.
        where: The handle of its bucket, or the path of the directory.
        endpoint: The Hub of the bucket; None for a directory.
    """

    instance: str | None
    where: str
    endpoint: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.instance or self.where

    def same_as(self, other: Place) -> bool:
        """Whether both are one place, however it is spelled; names of instances do not matter."""
        if self.endpoint is None or other.endpoint is None:
            return (self.endpoint, self.where) == (other.endpoint, other.where)
        same = BucketHandle.parse(self.where) == BucketHandle.parse(other.where)
        return same and same_endpoint(self.endpoint, other.endpoint)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"instance": self.instance, "where": self.where, "endpoint": self.endpoint}

    @classmethod
    def from_record(cls, record: Any) -> Place:
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing.
        """
        if not isinstance(record, dict) or not isinstance(record.get("where"), str):
            raise ValueError("an end needs instance and where")  # noqa: TRY004 - worded like every other fault
        instance, endpoint = record.get("instance"), record.get("endpoint")
        if not isinstance(instance, str | None) or not isinstance(endpoint, str | None):
            raise ValueError("the instance and the endpoint of an end are texts")  # noqa: TRY004 - as above
        return cls(instance, record["where"], endpoint)


@dataclass(frozen=True, slots=True)
class Header:
    """What a plan is for.

    Attributes:
        source: Where chunks come from.
        destination: Where they go.
        made_at: When it was planned.
        mode: `auto`, `copy` or `stream`.
        renames: What the copies are called.
        believe_files: Whether a directory was listed that has no manifest.
        config: The LMCache YAML that names the instances; None where none does.
        wanted: What was asked for.
    """

    source: Place
    destination: Place
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
    def from_record(cls, record: dict[str, Any]) -> Header:
        """Read what `record` made.

        Raises:
            ValueError: It is no header, or of another version.
        """
        if record.get("record") != "plan" or record.get("job") != JOB or record.get("version") != VERSION:
            raise ValueError(f"this is no plan of an export, version {VERSION}")
        config, mode = record.get("config"), record.get("mode")
        if not isinstance(config, str | None) or mode not in ("auto", "copy", "stream"):
            raise ValueError("a plan's config is a text, its mode auto, copy or stream")
        made_at = datetime.fromisoformat(record["made_at"])
        source, destination = Place.from_record(record.get("from")), Place.from_record(record.get("to"))
        renames = Renames.parse(record["rename"])
        believes = record.get("believe_files") is True
        return cls(source, destination, made_at, mode, renames, believes, config, record.get("wanted", {}))


@dataclass(frozen=True, slots=True)
class Move:
    """One chunk that is to be copied, if the destination still is as it was when that was planned.

    Attributes:
        key: Its key at the source.
        to: Its key at the destination.
        content: Its hash and size.
        uploaded_at: When the Hub took it; None where that is not known.
        replaces: What it replaces; None where there was nothing.
    """

    key: str
    to: str
    content: Content
    uploaded_at: datetime | None
    replaces: Held | None = None

    @property
    def path(self) -> str:
        """Its name at the destination."""
        return encode_name(self.to)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.content.size

    @property
    def reason(self) -> str:
        """Why it is copied."""
        return NEW if self.replaces is None else REPLACED

    def record(self, reason: str | None = None) -> dict[str, Any]:
        """For JSON."""
        line = Line(self.key, self.content, self.uploaded_at).record()
        if self.replaces is not None:
            held = self.replaces
            line["there"] = Line(self.to, held.content, held.uploaded_at).record()
        return {"reason": reason or self.reason} | line

    @classmethod
    def from_record(cls, record: dict[str, Any], renames: Renames) -> Move:
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing.
        """
        own = {name: value for name, value in record.items() if name not in ("reason", "there")}
        line = Line.from_record(own)
        there = None if record.get("there") is None else Line.from_record(record["there"])
        to = renames(line.key)
        if there is not None and there.key != to:
            raise ValueError("what it replaces bears another key")
        replaces = None if there is None else Held(there.content, there.uploaded_at)
        if (record.get("reason") in (REPLACED, CONFLICT)) != (replaces is not None):
            raise ValueError("a chunk replaces what is there, or is new")
        return cls(line.key, to, line.content, line.uploaded_at, replaces)


@dataclass(frozen=True, slots=True)
class Totals:
    """What was found while planning.

    Attributes:
        chosen: The chunks of the choice.
        planned: Those that are to be copied, by reason.
        same: Those that the destination has.
        conflicts: Those under whose key the destination has, and keeps, something else.
        skipped: How many others were passed by, by reason.
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
    def from_record(cls, record: dict[str, Any]) -> Totals:
        """Read what `record` made.

        Raises:
            ValueError: It is no such thing.
        """
        planned = {reason: Extent.from_record(one) for reason, one in record["planned"].items()}
        chosen, same, conflicts = (Extent.from_record(record[name]) for name in ("chosen", "same", "conflicts"))
        return cls(chosen, planned, same, conflicts, dict(record["skipped"]))


class PlanWriter(PlanOutput):
    """Writes a plan, which appears under its name when it is whole. Use it as a context manager.

    Args:
        path: Of the plan.
        header: What it is for.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header.record())
        self.planned: defaultdict[str, Extent] = defaultdict(Extent)

    def add(self, move: Move) -> None:
        """Plan a copy."""
        self._write(move.record())
        self.planned[move.reason] = self.planned[move.reason].plus(move.size)

    def name_conflict(self, move: Move) -> None:
        """Name a chunk that is not copied, since the destination has something else under its key."""
        self._write(move.record(CONFLICT))

    def finish(self, totals: Totals) -> None:
        """End the plan: from now on it is there."""
        self._end(totals.record())


class PlanFile:
    """A plan on disk.

    Attributes:
        path: Of the file.
        header: What it is for.
        totals: What was found while planning.
        left: What is still in it, by reason: less than planned where lines were taken out.
    """

    def __init__(self, path: Path, header: Header, totals: Totals, left: dict[str, Extent], lines: Sealed) -> None:
        self.path = path
        self.header = header
        self.totals = totals
        self.left = left
        self._lines = lines

    @property
    def moves_left(self) -> Extent:
        """All that is still to be copied."""
        kinds = [self.left[reason] for reason in (NEW, REPLACED) if reason in self.left]
        return Extent(sum(one.objects for one in kinds), sum(one.bytes for one in kinds))

    @classmethod
    def open(cls, path: Path, *, ours: bool = False) -> PlanFile:
        """Read a plan, every line of it.

        Args:
            path: Of the plan.
            ours: Whether to refuse one that somebody else could have written.

        Raises:
            ConfigError: It cannot be read, is none, or is not whole.
            RefusedError: It may be somebody else's.
        """
        left: defaultdict[str, Extent] = defaultdict(Extent)
        header, totals, number = None, None, 0
        lines = Sealed(path, "plan")
        if ours:
            lines.expect_ours()
        try:
            for number, line in enumerate(lines.lines(), 1):  # noqa: B007 - it is told in the error
                record = json.loads(line)
                if totals is not None:
                    raise ValueError("there is more after its end")  # noqa: TRY301 - worded below
                if header is None:
                    header = Header.from_record(record)
                elif record.get("record") == "end":
                    totals = Totals.from_record(record)
                else:
                    reason = str(record.get("reason"))
                    left[reason] = left[reason].plus(Move.from_record(record, header.renames).size)
        except OSError as error:
            raise ConfigError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            kind = RefusedError if isinstance(error, RefusedError) else ConfigError
            raise kind(f"plan {str(path)!r}, line {number}: {error}") from None
        if header is None or totals is None:
            raise ConfigError(f"plan {str(path)!r} has no end: it was not written whole; plan anew")
        return cls(path, header, totals, dict(left), lines)

    def moves(self, *reasons: str) -> Iterator[Move]:
        """What is to be copied, or other lines of the plan, in its order.

        Args:
            reasons: Of the lines; none for what is to be copied.

        Raises:
            RefusedError: The file was changed since it was opened.
            OSError: It cannot be read any more.
        """
        wanted = reasons or (NEW, REPLACED)
        lines = self._lines.lines_again()
        next(lines)
        for line in lines:
            record = json.loads(line)
            if record.get("reason") in wanted:
                yield Move.from_record(record, self.header.renames)


def is_export(path: Path) -> bool:
    """Whether a plan is of an export, as its first line says.

    Raises:
        ConfigError: It cannot be read.
    """
    lines = Sealed(path, "plan")
    try:
        return bool(json.loads(next(lines.lines(), b"")).get("job") == JOB)
    except OSError as error:
        raise ConfigError(f"plan {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError):
        return False
