"""Outcomes of the objects of an instance: counted, and listed in a JSONL file. Pure except for that file."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

import prometheus_client

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.files import OutputFile, write_whole
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import (
    HFBucketError,
    IntegrityError,
    Interrupted,
    RefusedError,
    SafetyError,
    TempDirError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub import records
from hfbucket_plugin.tools import console, exit_codes
from jobs.batch.model import Outcome
from jobs.lock.lock import LockLapsedError
from warmer.report.outcomes import local_trouble

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from enum import StrEnum
    from pathlib import Path

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.signals import Stop
    from jobs.batch.apply import ApplyResult
    from jobs.batch.model import ItemOutcome


NAMED_FAILURES: Final = 1000
"""Maximum number of failed objects that a summary names; the report file names all."""


def note(text: str) -> None:
    """Write one line to stderr; stdout is reserved for programs."""
    console.print_error(text, "jobs")


_TERMINAL_SECS: Final = 5.0
_LOG_SECS: Final = 60.0


class ProgressLog:
    """Progress counter that periodically logs its count.

    Args:
        all_of_it: Total work.
        name: Name of the work in messages.
        clock: Returns monotonic seconds; tests inject their own.
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
    """File of `--report`: per instance a header, a line per object, and a summary; thread-safe.

    A failed write does not stop the jobs; `problem` then says why. The file replaces an earlier report when it is
    closed,
    unless all jobs were refused before they touched an object: then the last report stays.

    Args:
        path: Path of the file; None to write no file.

    Attributes:
        problem: Why the report is incomplete; empty while it is complete.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.problem = ""
        self._path = path
        self._lock = threading.Lock()
        self._done = False
        self._out = OutputFile(path, "--report") if path else None

    def write(self, record: dict[str, Any]) -> None:
        """Write a line."""
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
        """Close the file; further calls do nothing."""
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
    """Tally of the objects of one plan by outcome.

    Args:
        file: Report file, with a line for each object.

    Attributes:
        ended: Objects and bytes by outcome.
        failures: The first objects that failed.
    """

    def __init__(self, file: ReportFile) -> None:
        self.ended: defaultdict[StrEnum, Extent] = defaultdict(Extent)
        self.failures: list[dict[str, str]] = []
        self._file = file

    def add(self, ended: ItemOutcome[Any]) -> None:
        """Count the outcome of an object."""
        item = ended.item
        self.ended[ended.outcome] = self.ended[ended.outcome].plus(item.size)
        more = {"message": ended.message} if ended.message else {}
        self._file.write(
            {"record": "object", "path": item.path, "key": item.key, "size": item.size, "reason": item.reason}
            | {"outcome": str(ended.outcome)}
            | more
        )
        if ended.outcome == Outcome.FAILED and len(self.failures) < NAMED_FAILURES:
            self.failures.append({"path": item.path, "message": ended.message})

    @property
    def all_ended(self) -> Extent:
        """Objects and bytes with any outcome."""
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
    """Write the file for Prometheus' textfile collector atomically.

    Args:
        path: Path of the file.
        summaries: Summaries of the jobs.
        now: Current time, in seconds since 1970.
        least: Minimum exit code of the command, even if all jobs succeed.

    Raises:
        ConfigError: If the file cannot be written.
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
    """Summary of one job."""

    @property
    def code(self) -> int:
        """The exit code."""

    @property
    def job(self) -> str:
        """Name of the job."""

    @property
    def instance(self) -> str:
        """Target of the job, for messages and metrics."""

    def record(self) -> dict[str, Any]:
        """Fields for JSON."""

    def lines(self) -> Iterator[str]:
        """Lines of the summary for the terminal."""

    def gauges(self) -> dict[str, float]:
        """Gauges for the metrics file, by the names in `jobs.report.GAUGES`."""


_LIMIT: Final = "--max-duration"


def failure_of(error: Exception | Interrupted, stop: Stop, until: Deadline) -> tuple[int, str]:
    """Return the exit code of a job that an error ended, and why it ended.

    After a stop request, any error counts as an interruption: the request is raised wherever the main thread is,
    possibly inside a client that treats it as a failure.

    Args:
        error: Error that ended the job.
        stop: Signal that requests a stop.
        until: Deadline of the job, up to which pauses of the Hub were waited out.
    """
    if isinstance(error, Interrupted):
        return exit_codes.INTERRUPTED, "told to stop"
    code, message = exit_code_of(error), str(error) if isinstance(error, HFBucketError) else as_text(error)
    if isinstance(error, ThrottledError):  # all pauses except the last one were waited out
        message = f"{message}; {_LIMIT} would be over before"
    if message and code == exit_codes.FAILED and stop.requested:
        return exit_codes.INTERRUPTED, f"told to stop; {message}"
    if message and until.passed and _LIMIT not in message:
        return code, f"{message}; {_LIMIT} was over"  # which may be why a request had no answer
    return code, message


def verdict_of(end: ApplyResult, unfinished: int, noun: str, *, failures: bool) -> tuple[int, str]:
    """Return the exit code of a job whose plan was applied, and why it failed; an empty text adds no reason.

    Args:
        end: How the application of the plan ended.
        unfinished: Number of planned items without an outcome.
        noun: What the items are called, in the plural.
        failures: Whether any item failed.
    """
    if end.why is not None:
        return exit_code_of(end.why), str(end.why)
    if end.stopped and unfinished:
        return exit_codes.INTERRUPTED, "told to stop"
    if unfinished:
        return exit_codes.FAILED, f"{_LIMIT} was over before all was done: {unfinished} {noun} are left"
    return (exit_codes.FAILED if failures else exit_codes.COMPLETE), ""


def as_text(error: Exception) -> str:
    """Return the message of any error as one line, never a traceback."""
    return local_trouble(error) or str(error)


def exit_code_of(error: Exception) -> int:
    """Return the exit code of an error."""
    if isinstance(error, LockLapsedError):  # caused by a pause of the Hub, say, not by another holder
        return exit_codes.FAILED
    if isinstance(error, RefusedError):
        return exit_codes.REFUSED
    if not isinstance(error, HFBucketError) or isinstance(
        error, (TransportError, ThrottledError, IntegrityError, TempDirError)
    ):
        return exit_codes.FAILED
    return exit_codes.USAGE


DIRECTORY: Final = f"{RESERVED}/reports"
_DELETING: Final = ("cleanup", "rm", "mirror")
INDEX: Final = "index"
"""Name of the job that builds the key index."""


class SavedSummary(Protocol):
    """Part of a summary that is stored in the bucket."""

    @property
    def job(self) -> str:
        """Name of the job."""

    def record(self) -> dict[str, Any]:
        """Fields for JSON."""


@dataclass(frozen=True, slots=True)
class LastRun:
    """Report of the last run.

    Attributes:
        job: Name of the job.
        at: Upload time of the report.
        left: Chunks that the run left in the instance.
        record: The whole report.
    """

    job: str
    at: datetime
    left: Extent
    record: dict[str, Any]


def last_run(bucket: Bucket, request_secs: float, *, builds: bool = False) -> LastRun | None:
    """Return the newest report of a deletion job, or None if there is none; other objects there are ignored.

    Args:
        bucket: Client of the instance's bucket.
        request_secs: Timeout of a request, in seconds.
        builds: Whether to include builds of the key index.

    Raises:
        GuardError: If a report cannot be read, so that the expected content is unknown.
        HFBucketError: If the Hub does not answer.
    """
    prefix = bucket.handle.join(f"{DIRECTORY}/")
    oldest = datetime.min.replace(tzinfo=UTC)
    jobs = (*_DELETING, INDEX) if builds else _DELETING
    wanted = {f"{prefix}{job}.json" for job in jobs}
    listed = (info for info in bucket.list_objects(prefix, request_secs) if info.path in wanted)
    infos = sorted(listed, key=lambda info: info.uploaded_at or oldest)
    if not infos:
        return None
    newest = infos[-1]
    record = records.read_json(bucket, newest, Deadline.patient(request_secs))
    try:
        left = Extent.from_record(record.get("left"))
        _expect_consistent(record, left, newest.path.rpartition("/")[2])
    except ValueError as error:
        raise SafetyError(
            f"{newest.path} is no report of ours ({error}): nothing is deleted. Delete it, and give --accept-shrunk once"
        ) from None
    return LastRun(str(record.get("job")), newest.uploaded_at or oldest, left, record)


def _expect_consistent(record: dict[str, Any], left: Extent, name: str) -> None:
    """Refuse an inconsistent report: the next listing is checked against what it says was left.

    Raises:
        ValueError: If the report's job differs from its name, or it leaves less than it listed and did not delete.
    """
    if record.get("job", name.removesuffix(".json")) != name.removesuffix(".json"):
        raise ValueError(f"it says that it is of job {str(record.get('job'))[:40]!r}")
    if record.get("listed") is None or name == f"{INDEX}.json":
        return
    listed = Extent.from_record(record["listed"])
    gone = sum(Extent.from_record(record[part]).objects for part in ("deleted", "gone") if part in record)
    if left.objects < listed.objects - gone:
        raise ValueError(f"it leaves {left.objects} of {listed.objects} objects, and {gone} were deleted")


def keep(bucket: Bucket, summary: SavedSummary, left: Extent, request_secs: float) -> None:
    """Store a report in the bucket, and replace the last one of its kind.

    Args:
        bucket: Client of the instance's bucket.
        summary: Summary of the run.
        left: Chunks of the instance, against which the next run checks its listing.
        request_secs: Timeout of a request, in seconds.

    Raises:
        HFBucketError: If the report is not stored.
    """
    # The plan's path is local to the machine of the run, and of no use to readers of the bucket.
    record = {name: value for name, value in summary.record().items() if name != "plan"}
    record["left"] = left.record()
    record["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    deadline = Deadline.patient(request_secs)
    content = records.upload(bucket, texts.as_json(record).encode(), deadline)
    records.put(bucket, f"{DIRECTORY}/{summary.job}.json", content, deadline)
