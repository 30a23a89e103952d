"""What happened to the objects of an instance: counted, and named in a JSONL file. Pure but for that file."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final, Protocol

import prometheus_client

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.files import OutputFile, write_whole
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.tools import console, exit_codes
from jobs.batch.model import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from enum import StrEnum
    from pathlib import Path

    from jobs.batch.model import ItemOutcome


NAMED_FAILURES: Final = 1000
"""Failed objects that a summary names; the report file names all."""


def note(text: str) -> None:
    """Write one line for people to stderr: stdout is for programs."""
    console.print_error(text, "jobs")


_TERMINAL_SECS: Final = 5.0
_LOG_SECS: Final = 60.0


class ProgressLog:
    """Counts what has ended, and says so now and then.

    Args:
        all_of_it: What there is to do.
        name: For people.
        clock: Seconds, monotonic; tests hand in their own.
    """

    def __init__(self, all_of_it: Extent, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._all = all_of_it
        self._name = name
        self._clock = clock
        self._every = _TERMINAL_SECS if console.at_terminal() else _LOG_SECS
        self._last = clock()
        self._done = Extent()

    def add(self, nbytes: int) -> None:
        """Count one object."""
        self._done = self._done.plus(nbytes)
        if self._clock() - self._last >= self._every:
            self._last = self._clock()
            note(f"{self._name}: {self._done} of {self._all}")


class ReportFile:
    """The file that `--report` names: for each instance a header, a line an object, and a summary; thread-safe.

    What cannot be written any more holds nothing up: the jobs go on, and `problem` says so. The file takes the place of an
    earlier report when it is closed. Where all jobs were refused before they touched an object, the last report stays.

    Args:
        path: Of the file; None for none.

    Attributes:
        problem: Why it is not whole; empty while it is.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.problem = ""
        self._path = path
        self._lock = threading.Lock()
        self._done = False
        self._out = OutputFile(path, "--report") if path else None

    def write(self, record: dict[str, Any]) -> None:
        """Add a line."""
        with self._lock:
            if self._out is None or self.problem:
                return
            refused = record.get("record") == "summary" and record.get("exit_code") in {
                exit_codes.USAGE,
                exit_codes.REFUSED,
            }
            self._done = self._done or not (refused or record.get("record") == "report")
            try:
                self._out.write(texts.as_json(record) + "\n")
                self._out.flush()
            except OSError as error:
                self._failed(error)

    def close(self) -> None:
        """End the file; further calls do nothing."""
        out, self._out = self._out, None
        if out is None:
            return
        if not self._done:
            out.discard()
            return
        try:
            out.commit()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        self.problem = self.problem or f"--report {str(self._path)!r} is not whole: {error.strerror}"


class OutcomeTally:
    """Counts the objects of one plan as they end.

    Args:
        file: Where each is named.

    Attributes:
        ended: How much ended, by outcome.
        failures: The first objects that failed.
    """

    def __init__(self, file: ReportFile) -> None:
        self.ended: defaultdict[StrEnum, Extent] = defaultdict(Extent)
        self.failures: list[dict[str, str]] = []
        self._file = file

    def add(self, ended: ItemOutcome[Any]) -> None:
        """Count an object."""
        item = ended.item
        self.ended[ended.outcome] = self.ended[ended.outcome].plus(item.size)
        reported = {"message": ended.message} if ended.message else {}
        self._file.write(
            {"record": "object", "path": item.path, "key": item.key, "size": item.size, "reason": item.reason}
            | {"outcome": str(ended.outcome)}
            | reported
        )
        if ended.outcome == Outcome.FAILED and len(self.failures) < NAMED_FAILURES:
            self.failures.append({"path": item.path, "message": ended.message})

    @property
    def all_ended(self) -> Extent:
        """How much ended, well or not."""
        extents = self.ended.values()
        return Extent(sum(one.objects for one in extents), sum(one.bytes for one in extents))


GAUGES: Final = {
    "hfbucket_jobs_objects": "Chunks of the instance after the last run",
    "hfbucket_jobs_bytes": "Bytes of the chunks of the instance after the last run",
    "hfbucket_jobs_deleted_objects": "Objects deleted by the last run",
    "hfbucket_jobs_deleted_bytes": "Bytes deleted by the last run",
    "hfbucket_jobs_copied_objects": "Objects copied by the last run, by the Hub or as bytes",
    "hfbucket_jobs_copied_bytes": "Bytes copied by the last run",
    "hfbucket_jobs_failed_objects": "Objects that the last run failed to delete or copy",
    "hfbucket_jobs_unfinished_objects": "Objects that the last run did not reach",
    "hfbucket_jobs_index_covers_timestamp_seconds": "Time until which journals are in the snapshot that the last build published",
    "hfbucket_jobs_index_listed_timestamp_seconds": "Start of the listing on which the published snapshot is based",
    "hfbucket_jobs_index_differences": "Differences between index and listing found by the last verification",
    "hfbucket_jobs_exit_code": "Exit code of the last run",
    "hfbucket_jobs_last_run_timestamp_seconds": "End of the last run",
}


def write_metrics(path: Path, summaries: Iterable[JobSummary], now: float, least: int = exit_codes.COMPLETE) -> None:
    """Write the file that Prometheus' textfile collector reads; it appears whole.

    Args:
        path: Of the file.
        summaries: Of the jobs.
        now: The time, in seconds since 1970.
        least: How the command ends however well its jobs did.

    Raises:
        ConfigError: It cannot be written.
    """
    registry = prometheus_client.CollectorRegistry()
    gauges = {
        name: prometheus_client.Gauge(name, text, ("instance", "job_name"), registry=registry)
        for name, text in GAUGES.items()
    }
    for summary in summaries:
        values = summary.gauges() | {
            "exit_code": exit_codes.worst([summary.code, least]),
            "last_run_timestamp_seconds": now,
        }
        for name, value in values.items():
            gauges[f"hfbucket_jobs_{name}"].labels(instance=summary.instance, job_name=summary.job).set(value)
    write_whole(path, prometheus_client.generate_latest(registry).decode(), "--metrics-textfile")


class JobSummary(Protocol):
    """What came of one job."""

    @property
    def code(self) -> int:
        """The exit code."""

    @property
    def job(self) -> str:
        """Which job."""

    @property
    def instance(self) -> str:
        """What it was about, for people and for metrics."""

    def record(self) -> dict[str, Any]:
        """For JSON."""

    def lines(self) -> Iterator[str]:
        """For people."""

    def gauges(self) -> dict[str, float]:
        """For metrics, by the names in `jobs.report.GAUGES`."""
