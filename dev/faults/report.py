"""What callers saw and metrics say of the same; whether a trial kept its promise; the generated parts of docs/reliability.md.

`make docs` writes the promises into the page, `make faults` what was measured.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dev.faults.guarantees import BACK_SECS, FAILED, LATE_SECS, SERVED, SILENT, guarantee, table
from dev.generated import write
from tests.support.surface import chunks_counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dev.faults.guarantees import Guarantee
    from dev.faults.trial import Report
    from tests.support.surface import Surface


OPERATIONS: Final = ("lookup", "get", "put", "delete")


class Ledger:
    """Counts; thread-safe.

    Attributes:
        asked: Chunks of each operation.
        reported: Of lookups and gets, the chunks of which the engine was told yes.
        counted: What the metrics say: operation to outcome to chunks.
        calls: Of each operation.
        wrong: Chunks with wrong bytes.
        raised: What calls raised, in words.
        latest: Seconds by which the slowest call outlasted its deadline.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.reported: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.counted: dict[str, Counter[str]] = {}
        self.wrong = 0
        self.raised: list[str] = []
        self.latest = 0.0

    def note(self, operation: str, asked: int, reported: int, seconds_late: float, wrong: int = 0) -> None:
        """Note a call."""
        with self._lock:
            self.calls[operation] += 1
            self.asked[operation] += asked
            self.reported[operation] += reported
            self.wrong += wrong
            self.latest = max(self.latest, seconds_late)

    def note_raised(self, text: str) -> None:
        """Note that a call raised into the engine."""
        with self._lock:
            self.raised.append(text)

    def read_metrics(self, engines: Sequence[Surface]) -> None:
        """Take what the metrics of all engines say."""
        for operation in OPERATIONS:
            self.counted[operation] = Counter()
            for engine in engines:
                self.counted[operation] += chunks_counted(engine.instance, operation)


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


PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def parts() -> dict[str, str]:
    """The promises as they stand in the code."""
    return {"promises": table()}


if __name__ == "__main__":
    write(PAGE, parts())
