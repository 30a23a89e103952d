"""Summary of an export: counts, lines for the terminal, and JSON. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import typer

from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.tools import exit_codes
from jobs.export.copy import CopyMethod, CopyOutcome
from jobs.export.plan import JOB, REPLACED

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

    from jobs.export.copy import Method
    from jobs.export.plan import CopyItem, EndpointRef, ExportPlanFile

NAMED_CONFLICTS: Final = 1000
"""Maximum number of conflicts that a summary names; the plan names all."""

_TOLD_CONFLICTS: Final = 10


def conflict_record(copy_item: CopyItem) -> dict[str, Any]:
    """Return the report line of a chunk that is not copied because its key holds other content at the destination."""
    there = copy_item.replaces
    return {
        "key": copy_item.key,
        "to": copy_item.to,
        "xet_hash": copy_item.content.xet_hash,
        "there_xet_hash": "" if there is None else there.content.xet_hash,
    }


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """Summary of an export.

    Attributes:
        source: Endpoint copied from.
        destination: Endpoint copied to.
        code: The exit code.
        applied: Whether the plan was to be applied; false for a plan that is only shown.
        message: Why the export failed; empty if it did not.
        plan: The plan, if there is one.
        method: Copy method, and the reason for it; None if nothing was copied.
        ended: Chunks and bytes by outcome.
        failures: The first chunks that failed.
        conflicts: The first chunks that were not copied because their keys hold other content at the destination.
        in_manifest: Number of chunks in the manifest of the destination directory; None for an instance.
        seconds: Duration of the export.
    """

    source: EndpointRef
    destination: EndpointRef
    code: int
    applied: bool
    message: str = ""
    plan: ExportPlanFile | None = None
    method: Method | None = None
    ended: dict[StrEnum, Extent] = field(default_factory=dict)
    failures: tuple[dict[str, str], ...] = ()
    conflicts: tuple[dict[str, Any], ...] = ()
    in_manifest: int | None = None
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 0, 2, 3, 4 or 5."""
        return self.code

    @property
    def result(self) -> str:
        """`complete`, `planned`, `error`, `failed`, `refused` or `interrupted`."""
        return exit_codes.RESULTS[self.code] if self.applied or self.code else "planned"

    @property
    def job(self) -> str:
        """Name of the job."""
        return JOB

    @property
    def instance(self) -> str:
        """The destination, which is what the job changes."""
        return self.destination.name

    @property
    def how(self) -> str | None:
        """Copy method, if anything was copied."""
        if self.method is None:
            return None
        mixed = self.method.how is CopyMethod.COPY_OR_STREAM
        return str(CopyMethod.COPY if mixed and CopyOutcome.STREAMED not in self.ended else self.method.how)

    @property
    def planned(self) -> Extent:
        """Chunks and bytes that the plan copies."""
        return Extent() if self.plan is None else self.plan.items_left

    @property
    def moved(self) -> Extent:
        """Chunks and bytes that were copied, by either method."""
        kinds = [self.ended[one] for one in (CopyOutcome.COPIED, CopyOutcome.STREAMED) if one in self.ended]
        return Extent(sum(one.objects for one in kinds), sum(one.bytes for one in kinds))

    @property
    def unfinished(self) -> Extent:
        """Planned chunks without an outcome."""
        if self.plan is None or not self.applied:
            return Extent()
        left = self.plan.items_left
        for extent in self.ended.values():
            left = left.minus(extent)
        return left

    def lines(self) -> Iterator[str]:
        """Lines of the summary for the terminal."""
        if self.message:
            yield f"{exit_codes.RESULTS[self.code]}: {self.message}"
        if self.plan is None:
            return
        totals = self.plan.totals
        yield f"chosen: {totals.chosen}; there already: {totals.same}"
        if totals.conflicts.objects:
            yield from self._reported_conflicts(totals.conflicts)
        if not self.applied:
            if not self.code:  # a refused plan would be refused again
                yield (
                    f"nothing was copied: this was only planned ({self.plan.items_left}). To carry it out: python -m jobs apply "
                    f"{self.plan.path} --yes"
                )
            return
        if self.method is not None:
            yield f"{self.how}, since {self.method.why}"
        if self.ended:
            yield ", ".join(f"{outcome}: {extent}" for outcome, extent in self.ended.items())
        if self.code in (exit_codes.FAILED, exit_codes.INTERRUPTED):
            yield f"to go on: python -m jobs apply {self.plan.path} --yes"

    def _reported_conflicts(self, conflicts: Extent) -> Iterator[str]:
        yield f"not copied, since something else is there under the same key: {conflicts} (--on-conflict says what to do)"
        for one in self.conflicts[:_TOLD_CONFLICTS]:
            yield f"conflict: {one['to']}"
        if conflicts.objects > _TOLD_CONFLICTS and self.plan is not None:
            yield f"and {conflicts.objects - _TOLD_CONFLICTS} more, all in {self.plan.path}"

    def gauges(self) -> dict[str, float]:
        """Gauges for the metrics file, by name."""
        failed = self.ended.get(CopyOutcome.FAILED, Extent())
        return {
            "copied_objects": self.moved.objects,
            "copied_bytes": self.moved.bytes,
            "failed_objects": failed.objects,
            "unfinished_objects": self.unfinished.objects,
        }

    def record(self) -> dict[str, Any]:
        """Fields for JSON, described in `docs/export.md`."""
        record: dict[str, Any] = {
            "record": "summary",
            "job": self.job,
            "from": self.source.record(),
            "to": self.destination.record(),
            "result": self.result,
            "exit_code": self.code,
            "message": self.message,
            "seconds": round(self.seconds, 3),
            "how": self.how,
            "reason": None if self.method is None else self.method.why,
            "why": None if self.method is None else self.method.why,  # its name in release 0.1
        }
        if self.plan is not None:
            # `same` counts copies that were planned; those already present during planning are not in the plan.
            record |= {"plan": str(self.plan.path)} | self.plan.totals.record()
            record |= {"there_already": record.pop("same"), "unfinished": self.unfinished.record()}
        record |= {str(outcome): self.ended.get(outcome, Extent()).record() for outcome in CopyOutcome}
        if self.in_manifest is not None:
            record["in_manifest"] = self.in_manifest
        return record | {"failures": list(self.failures), "conflicting": list(self.conflicts)}


def ask_to_replace(shown: ExportPlanFile) -> bool:
    """Ask whether to apply an export that replaces; without an answer, return False."""
    replaced, destination = shown.left[REPLACED], shown.header.destination.where
    try:
        return typer.confirm(f"Replace {replaced} in {destination}, for ever?", default=False, err=True)
    except typer.Abort:
        return False
