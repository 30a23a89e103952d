"""Whether a trial kept its promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dev.faults.guarantees import BACK_SECS, FAILED, LATE_SECS, SERVED, SILENT, guarantee

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dev.faults.guarantees import Guarantee
    from dev.faults.trial import Report


def breaches(report: Report) -> list[str]:
    """What a trial did that was not promised, a line each; empty when all was kept."""
    if report.problem:
        return [f"the trial could not be made: {report.problem.strip().splitlines()[-1]}"]
    trial = report.trial
    one = guarantee(trial.fault, trial.operation, trial.route, trial.verify)
    return [*_outcomes(report, one), *_counts(report, one), *timing(report), *_safety(report, one)]


def timing(report: Report) -> list[str]:
    """Breaches that a busy machine may be to blame for."""
    found = []
    if report.late > LATE_SECS:
        found.append(f"a call ended {report.late:.2f} s after its deadline of {report.deadline:g} s")
    if report.back_secs is None or report.back_secs > BACK_SECS:
        took = "never" if report.back_secs is None else f"after {report.back_secs:.1f} s"
        found.append(f"service came back {took}, promised are {BACK_SECS:g} s")
    if report.repeated and (report.same_secs is None or report.same_secs > BACK_SECS):
        found.append(f"the chunks that failed were not served again within {BACK_SECS:g} s")
    return found


def _outcomes(report: Report, one: Guarantee) -> Iterator[str]:
    operation = report.trial.operation
    allowed = {one.word, SILENT} | ({SERVED[operation][0]} if one.some else set())
    for number, call in enumerate(report.calls, 1):
        words = set(call.words)
        if call.raised:
            words = {"error"} if operation == "list" else {f"raised {call.raised[:80]}"}
        if strange := words - allowed:
            yield f"call {number}: the engine was told {', '.join(sorted(strange))}, promised is {one.word}"


def _counts(report: Report, one: Guarantee) -> Iterator[str]:
    operation = report.trial.operation
    counted, asked = (report.operations, len(report.calls)) if operation == "list" else (report.chunks, report.asked)
    if sum(counted.values()) != asked:
        yield f"of {asked} the metrics count {sum(counted.values())}: {counted}"
    if strange := counted.keys() - one.allowed(operation):
        yield f"the metrics count {', '.join(sorted(strange))}, promised is {', '.join(one.kinds)}"
    if not counted.keys() & set(one.kinds):
        yield f"the metrics do not count {' or '.join(one.kinds)}: {counted}"
    succeeded = {SERVED[operation][1]}
    if one.word == FAILED[operation] and not one.some and counted.keys() & succeeded:
        yield "a failure is counted as a success"


def _safety(report: Report, one: Guarantee) -> Iterator[str]:
    if report.wrong and not one.wrong_bytes:
        yield f"{report.wrong} chunks came back with wrong bytes"
    if report.lost:
        yield f"{report.lost} chunks that were told or counted as stored are not there"
    if report.leaked:
        yield f"memory of {report.leaked} chunks did not come back to the engine"
    if not report.healthy:
        yield "LMCache's health check failed"
