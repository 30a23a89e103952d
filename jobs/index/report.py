"""Summary of a build of a key index, or of its verification."""

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
    """Result of a build.

    Attributes:
        how: Source of the snapshot: `listing` or `journals`.
        why: Why a listing was used; empty if the snapshot was built from the previous one and journals.
        keys: Indexed objects, and their bytes.
        pointer: Pointer to the snapshot once published; None before, and for a dry run.
        file_bytes: Size of the snapshot in bytes.
        same: Whether nothing had changed, so that the previous snapshot stays in use.
        journals: Number of journals read in addition to the previous snapshot.
        garbage: Number of those that are invalid, and were skipped.
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
    """Summary of an index job on one instance.

    Attributes:
        instance: Name of the instance.
        bucket: Handle of its bucket.
        code: The exit code.
        dry_run: Whether the job was to write nothing.
        message: Why the job failed; empty if it did not.
        made: Result of the build, if any.
        differences: Result of a verification; None if none was requested, or it did not complete.
        spare: Old snapshots and journals that are no longer needed.
        ended: Those by outcome.
        failures: The first objects that failed.
        strange: Number of objects below `.hfbucket/index/` that do not belong to an index; they stay.
        seconds: Duration of the job.
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
        """Name of the job."""
        return INDEX

    @property
    def unfinished(self) -> Extent:
        """Objects to delete without an outcome."""
        left = Extent() if self.dry_run else self.spare
        for extent in self.ended.values():
            left = left.minus(extent)
        return left

    def lines(self) -> Iterator[str]:
        """Lines of the summary for the terminal."""
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
        """Gauges for the metrics file, by name."""
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
        """Fields for JSON, described in `docs/index.md`."""
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
