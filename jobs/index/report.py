"""What came of a build of a key index, or of its verification."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core.units import NOTHING, Extent, count, size
from hfbucket_plugin.tools import exit_codes
from jobs.batch.model import Outcome
from jobs.report import INDEX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

    from hfbucket_plugin.index.format import Pointer
    from jobs.index.verify import Differences


@dataclass(frozen=True, slots=True)
class IndexBuild:
    """What a build made.

    Attributes:
        how: `listing` or `journals`: of what the snapshot was made.
        why: Why of a listing; empty where it was made of the snapshot before and of journals.
        keys: The objects that it knows, and their bytes.
        pointer: To it, once it is published; None before, and where nothing was to be.
        file_bytes: Of the snapshot.
        same: Whether nothing had changed, so that the object of the snapshot before serves on.
        journals: How many there were beside the snapshot before.
        garbage: Of these, how many are none, and were passed over.
    """

    how: str
    why: str
    keys: Extent
    pointer: Pointer | None
    file_bytes: int
    same: bool
    journals: int
    garbage: int


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """What came of it for one instance.

    Attributes:
        instance: Which.
        bucket: Its handle.
        code: The exit code.
        dry_run: Whether nothing was to be written.
        message: Why it did not end well; empty where it did.
        made: What was made, if anything.
        differences: What a verification found; None where none was asked for, or it did not come to an end.
        spare: Old snapshots and journals that nobody needs any more.
        ended: What became of these, by outcome.
        failures: The first objects that failed.
        strange: Objects below `.hfbucket/index/` that are none of an index; they stay.
        seconds: How long it took.
    """

    instance: str
    bucket: str
    code: int
    dry_run: bool = False
    message: str = ""
    made: IndexBuild | None = None
    differences: Differences | None = None
    spare: Extent = NOTHING
    ended: dict[StrEnum, Extent] = field(default_factory=dict)
    failures: tuple[dict[str, str], ...] = ()
    strange: int = 0
    seconds: float = 0.0

    @property
    def job(self) -> str:
        """Which job."""
        return INDEX

    @property
    def unfinished(self) -> Extent:
        """What was to be deleted and has not ended."""
        left = Extent() if self.dry_run else self.spare
        for extent in self.ended.values():
            left = left.minus(extent)
        return left

    def lines(self) -> Iterator[str]:
        """For people."""
        if self.message:
            yield f"{exit_codes.RESULTS[self.code]}: {self.message}"
        if self.made is not None:
            yield self._of_made(self.made)
        if self.differences is not None:
            yield from self.differences.lines()
        if self.ended:
            yield "old snapshots and journals: " + ", ".join(
                f"{outcome}: {extent}" for outcome, extent in self.ended.items()
            )
        if self.strange:
            yield f"{count(self.strange, 'object')} below .hfbucket/index/ are none of an index, and stay"

    def _of_made(self, made: IndexBuild) -> str:
        source = f"a listing, since {made.why}" if made.how == "listing" else count(made.journals, "journal")
        done = "published" if made.pointer is not None else "not published"
        garbage = f"; {count(made.garbage, 'journal')} passed over that are none" if made.garbage else ""
        same = "; nothing had changed" if made.same else ""
        return f"{done}: {count(made.keys.objects, 'key')} ({size(made.file_bytes)}), made of {source}{same}{garbage}"

    def gauges(self) -> dict[str, float]:
        """For metrics."""
        deleted, failed = (self.ended.get(outcome, Extent()) for outcome in (Outcome.DELETED, Outcome.FAILED))
        known: dict[str, float] = {
            "deleted_objects": deleted.objects,
            "deleted_bytes": deleted.bytes,
            "failed_objects": failed.objects,
            "unfinished_objects": self.unfinished.objects,
        }
        if self.made is not None and self.made.pointer is not None:
            known |= {"objects": self.made.keys.objects, "bytes": self.made.keys.bytes}
            known |= {"index_covers_timestamp_seconds": self.made.pointer.covers}
            known |= {"index_listed_timestamp_seconds": self.made.pointer.full}
        if self.differences is not None:
            known |= {"index_differences": self.differences.total}
        return known

    def record(self) -> dict[str, Any]:
        """For JSON; the fields are described in `docs/index.md`."""
        record: dict[str, Any] = {
            "record": "summary",
            "job": self.job,
            "instance": self.instance,
            "bucket": self.bucket,
            "result": "planned" if self.dry_run and not self.code else exit_codes.RESULTS[self.code],
            "exit_code": self.code,
            "message": self.message,
            "seconds": round(self.seconds, 3),
        }
        if self.made is not None:
            record |= self._record_of(self.made)
        if self.differences is not None:
            record["differences"] = self.differences.record()
        record |= {"planned": self.spare.record(), "unfinished": self.unfinished.record()}
        record |= {str(outcome): self.ended.get(outcome, Extent()).record() for outcome in Outcome}
        return record | {"strange": self.strange, "failures": list(self.failures)}

    def _record_of(self, made: IndexBuild) -> dict[str, Any]:
        pointer = made.pointer
        return {
            "made_of": made.how,
            "reason": made.why,
            "why": made.why,  # its name in release 0.1
            "left": made.keys.record(),
            "published": pointer is not None,
            "snapshot": None if pointer is None else pointer.snapshot,
            "snapshot_bytes": made.file_bytes,
            "covers": None if pointer is None else _formatted(pointer.covers),
            "listed": None if pointer is None else _formatted(pointer.full),
            "heat_since": None if pointer is None or not pointer.heat.known else _formatted(pointer.heat_since),
            "heat_told": None if pointer is None or not pointer.heat_told else _formatted(pointer.heat_told),
            "heat_lost": 0 if pointer is None else pointer.heat_lost,
            "heat_lost_at": None if pointer is None or not pointer.heat_lost_at else _formatted(pointer.heat_lost_at),
            "unchanged": made.same,
            "journals": made.journals,
            "garbage": made.garbage,
        }


def _formatted(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
