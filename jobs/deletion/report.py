"""Display of a deletion plan, and the summary of its application."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from hfbucket_plugin.core.units import NOTHING, Extent, age, printable, size
from hfbucket_plugin.tools import console as tables
from hfbucket_plugin.tools import exit_codes
from jobs.batch.model import Outcome
from jobs.report import note
from jobs.retention.access import line_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

    from jobs.deletion.plan import DeletionHeader, DeletionPlanFile


@dataclass(frozen=True, slots=True)
class DeletionSummary:
    """Summary of a deletion job on one instance.

    Attributes:
        job: `cleanup`, `rm` or `mirror`.
        instance: Name of the instance.
        bucket: Handle of its bucket.
        code: The exit code.
        applied: Whether the plan was to be applied; false for a plan that is only shown.
        message: Why the job failed; empty if it did not.
        plan: The plan, if there is one.
        ended: Objects and bytes by outcome.
        chunks_gone: Chunks that no longer exist.
        failures: The first objects that failed.
        seconds: Duration of the job.
        absent: The first requested keys that do not exist.
        absent_count: Number of requested keys that do not exist.
    """

    job: str
    instance: str
    bucket: str
    code: int
    applied: bool
    message: str = ""
    plan: DeletionPlanFile | None = None
    ended: dict[StrEnum, Extent] = field(default_factory=dict)
    chunks_gone: Extent = NOTHING
    failures: tuple[dict[str, str], ...] = ()
    seconds: float = 0.0
    absent: tuple[str, ...] = ()
    absent_count: int = 0

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, 2, 3, 4 or 5."""
        return self.code

    @property
    def result(self) -> str:
        """`complete`, `planned`, `error`, `failed`, `refused` or `interrupted`."""
        return exit_codes.RESULTS[self.code] if self.applied or self.code else "planned"

    @property
    def unfinished(self) -> Extent:
        """Planned objects without an outcome."""
        if self.plan is None or not self.applied:
            return Extent()
        left = self.plan.left
        for extent in self.ended.values():
            left = left.minus(extent)
        return left

    @property
    def planned(self) -> Extent:
        """Objects and bytes that the plan deletes."""
        return Extent() if self.plan is None else self.plan.left

    @property
    def deleted(self) -> Extent:
        """Objects and bytes that were deleted."""
        return self.ended.get(Outcome.DELETED, NOTHING)

    @property
    def left(self) -> Extent:
        """Chunks that the instance holds now, as far as this job knows."""
        return Extent() if self.plan is None else self.plan.totals.listed.minus(self.chunks_gone)

    def lines(self) -> Iterator[str]:
        """Lines of the summary for the terminal."""
        if self.message:
            yield f"{exit_codes.RESULTS[self.code]}: {self.message}"
        if self.absent:
            yield f"{self.absent_count} keys that were asked for are not there, such as {self.absent[0]!r}"
        if self.plan is not None and not self.applied:
            if not self.code:  # a refused plan would be refused again
                yield f"nothing was deleted: this was only planned. To carry it out: python -m jobs apply {self.plan.path} --yes"
            return
        if self.ended:
            yield ", ".join(f"{outcome}: {extent}" for outcome, extent in self.ended.items())
        if self.plan is not None and self.code in (exit_codes.FAILED, exit_codes.INTERRUPTED):
            yield f"to go on: python -m jobs apply {self.plan.path} --yes"

    def gauges(self) -> dict[str, float]:
        """Gauges for the metrics file, by name."""
        deleted, failed = (self.ended.get(outcome, Extent()) for outcome in (Outcome.DELETED, Outcome.FAILED))
        known: dict[str, float] = {} if self.plan is None else {"objects": self.left.objects, "bytes": self.left.bytes}
        return known | {
            "deleted_objects": deleted.objects,
            "deleted_bytes": deleted.bytes,
            "failed_objects": failed.objects,
            "unfinished_objects": self.unfinished.objects,
        }

    def record(self) -> dict[str, Any]:
        """Fields for JSON, described in `docs/retention.md`."""
        code = self.code
        record: dict[str, Any] = {
            "record": "summary",
            "job": self.job,
            "instance": self.instance,
            "bucket": self.bucket,
            "result": self.result,
            "exit_code": code,
            "message": self.message,
            "seconds": round(self.seconds, 3),
        }
        if self.plan is not None:
            record |= {"plan": str(self.plan.path), "heat": self.plan.header.heat} | self.plan.totals.record()
            record |= {"left": self.left.record(), "unfinished": self.unfinished.record()}
        record |= {str(outcome): self.ended.get(outcome, Extent()).record() for outcome in Outcome}
        return record | {
            "failures": list(self.failures),
            "absent": list(self.absent),
            "absent_count": self.absent_count,
        }


def header_record(header: DeletionHeader) -> dict[str, Any]:
    """Return the first line of an instance's section of a report."""
    return header.record() | {"record": "report"}


_HEADER = ("model", "reason", "objects", "bytes")


def show_plan(shown: DeletionPlanFile) -> None:
    """Print objects and bytes by model and reason, the data that the plan depends on, and both ages."""
    totals, name = shown.totals, shown.header.instance
    rows = [
        (printable(model) if model else "(no chunk)", reason, f"{extent.objects:,}", size(extent.bytes))
        for (model, reason), extent in sorted(totals.by_reason.items())
    ]
    kept = [("", f"kept: {reason}", f"{e.objects:,}", size(e.bytes)) for reason, e in sorted(totals.kept.items())]
    passed = [
        ("", f"not ours: {kind}", f"{e.objects:,}", size(e.bytes)) for kind, e in sorted(totals.passed_by.items())
    ]
    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        rows.append(("", "to be deleted", f"{shown.left.objects:,}", size(shown.left.bytes)))
        title = f"{name}  {shown.header.bucket}: {shown.header.job}"
        console.print(tables.columns(title, _HEADER, rows + kept + passed))
        _ages(shown)
        return
    for model, reason, objects, nbytes in rows + kept + passed:
        note(f"{name}: {model + ': ' if model else ''}{reason}: {objects} objects, {nbytes}")
    _ages(shown)
    note(f"{name}: to be deleted: {shown.left}, of {totals.listed}")


def _ages(shown: DeletionPlanFile) -> None:
    name, now = shown.header.instance, shown.header.made_at
    for reason, (put, used) in sorted(shown.totals.latest.items()):
        read = "" if used is None else f", and used {age(used, now)} ago"
        note(f"{name}: {reason}: the last of these was put {age(put, now)} ago{read}")
    if line := line_of(shown.header.heat):
        note(f"{name}: {line}")


def ask_to_delete(shown: DeletionPlanFile) -> bool:
    """Ask whether to apply a plan; without an answer, return False."""
    try:
        return typer.confirm(f"Delete {shown.left} from {shown.header.bucket}, for ever?", default=False, err=True)
    except typer.Abort:
        return False
