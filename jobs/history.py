"""The last report of each kind of job, kept in the bucket: a submitted job has no disk of its own.

It lies at `<prefix>/.hfbucket/reports/<job>.json`. What deletes is judged by what others that delete left: builds of the key
index, which may run every few minutes and know of other objects than chunks, are passed over unless they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import SafetyError
from hfbucket_plugin.hub import records

if TYPE_CHECKING:
    from hfbucket_plugin.hub.bucket import Bucket

DIRECTORY: Final = f"{RESERVED}/reports"
_DELETING: Final = ("cleanup", "rm", "mirror")
INDEX: Final = "index"
"""The job that builds the key index."""


class SavedSummary(Protocol):
    """A summary, as far as it is kept."""

    @property
    def job(self) -> str:
        """Which job."""

    def record(self) -> dict[str, Any]:
        """For JSON."""


@dataclass(frozen=True, slots=True)
class LastRun:
    """What the last run told.

    Attributes:
        job: Which.
        at: When the Hub took its report.
        left: What it left of the instance.
        record: All of it.
    """

    job: str
    at: datetime
    left: Extent
    record: dict[str, Any]


def last_run(bucket: Bucket, request_secs: float, *, builds: bool = False) -> LastRun | None:
    """The newest report of a job that deletes, or None when there is none; what else lies there is nobody's report.

    Args:
        bucket: The instance's.
        request_secs: Most seconds of a request.
        builds: Whether builds of the key index count.

    Raises:
        GuardError: There is one that cannot be read: nobody knows then what there should be.
        HFBucketError: The Hub did not tell.
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
    """Refuse a report that contradicts itself: by what it says was left the next listing is judged.

    Raises:
        ValueError: It is of another job than its name says, or leaves less than it listed and did not delete.
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
    """Keep a report in the bucket, in place of the last one of its kind.

    Args:
        bucket: The instance's.
        summary: What came of the run.
        left: The chunks of the instance, by which the next run judges its listing.
        request_secs: Most seconds of a request.

    Raises:
        HFBucketError: It is not kept.
    """
    # The plan's place is on the machine of the run, and no concern of those who read the bucket.
    record = {name: value for name, value in summary.record().items() if name != "plan"}
    record["left"] = left.record()
    record["finished_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    deadline = Deadline.patient(request_secs)
    content = records.upload(bucket, texts.as_json(record).encode(), deadline)
    records.put(bucket, f"{DIRECTORY}/{summary.job}.json", content, deadline)
