"""Status of an instance: content, growth, and the effect of the next cleanup. Read-only."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import SafetyError
from hfbucket_plugin.index.access.table import AccessUnknownError
from hfbucket_plugin.index.store import DIRECTORY as INDEX
from hfbucket_plugin.tools.inventory import Classifier
from jobs import report
from jobs.deletion.guards import MaxDelete, check_listing
from jobs.index import inventory
from jobs.index.inventory import IndexState
from jobs.lock import clock as server_clock
from jobs.lock.clock import ServerClock
from jobs.retention.access import AccessStats, dropped_of, open_access_stats
from jobs.retention.order import Reason, decide

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.tools.inventory import ListedObject, RetentionEntry
    from jobs.report import LastRun
    from jobs.retention.policy import Policy

AGES: Final = (
    ("1h", timedelta(hours=1)),
    ("1d", timedelta(days=1)),
    ("7d", timedelta(days=7)),
    ("14d", timedelta(days=14)),
    ("30d", timedelta(days=30)),
    ("90d", timedelta(days=90)),
)
"""Upper age limits of the histogram's bins; each bin starts at the limit before."""

READ_WITHIN: Final = (("1d", timedelta(days=1)), ("7d", timedelta(days=7)), ("30d", timedelta(days=30)))
"""Upper limits of the time since the last read; each bin starts at the limit before."""

LONGER: Final = "longer"
NEVER: Final = "never"

OLDER: Final = "older"
UNKNOWN: Final = "unknown"

_DAY: Final = timedelta(days=1)


@dataclass
class InstanceCensus:
    """Counts of a listing.

    Attributes:
        now: Time of the Hub, if known.
        chunks: All chunks.
        seen: All objects.
        models: Chunks by model.
        workers: Chunks by model, world size and worker.
        ages: Chunks by age.
        passed_by: Objects that are not chunks, by kind.
        has_index: Whether there are objects of a key index.
        reads: Chunks by time since the last read; `never` counts from the start of the recording. Empty if reads are
            not known.
    """

    now: datetime
    chunks: Extent = field(default_factory=Extent)
    seen: int = 0
    models: defaultdict[str, Extent] = field(default_factory=lambda: defaultdict(Extent))
    workers: defaultdict[tuple[str, int, int], Extent] = field(default_factory=lambda: defaultdict(Extent))
    ages: defaultdict[str, Extent] = field(default_factory=lambda: defaultdict(Extent))
    passed_by: defaultdict[str, Extent] = field(default_factory=lambda: defaultdict(Extent))
    has_index: bool = False
    reads: defaultdict[str, Extent] = field(default_factory=lambda: defaultdict(Extent))

    def read(self, entries: Iterable[RetentionEntry]) -> Iterator[RetentionEntry]:
        """Count chunks by their last reads, and pass them on."""
        for entry in entries:
            hit = entry.last_hit
            name = NEVER
            if hit is not None:
                name = next((name for name, bound in READ_WITHIN if self.now - hit <= bound), LONGER)
            self.reads[name] = self.reads[name].plus(entry.size)
            yield entry

    def entries(self, listing: Iterable[ListedObject]) -> Iterator[RetentionEntry]:
        """Count a listing, and pass its chunks on."""
        for one in listing:
            self.seen += 1
            entry = one.entry
            if not one.kind.is_chunk or one.chunk is None:
                self.passed_by[str(one.kind)] = self.passed_by[str(one.kind)].plus(entry.size)
                self.has_index = self.has_index or one.name.startswith(f"{INDEX}/")
                continue
            key, size = one.chunk.key, entry.size
            self.chunks = self.chunks.plus(size)
            self.models[key.model] = self.models[key.model].plus(size)
            worker = (key.model, key.world_size, key.worker_id)
            self.workers[worker] = self.workers[worker].plus(size)
            age = self._age(entry.uploaded_at)
            self.ages[age] = self.ages[age].plus(size)
            yield entry

    def _age(self, uploaded_at: datetime | None) -> str:
        if uploaded_at is None:
            return UNKNOWN
        age = self.now - uploaded_at
        return next((name for name, bound in AGES if age < bound), OLDER)


@dataclass(frozen=True, slots=True)
class Outlook:
    """Effect of the next cleanup.

    Attributes:
        planned: Objects that would be deleted.
        by_reason: Objects that would be deleted, by model and reason.
        kept: Objects that would stay, by reason.
        refused: Why the cleanup would be refused; empty if it would not.
    """

    planned: Extent
    by_reason: dict[tuple[str, str], Extent]
    kept: dict[str, Extent]
    refused: str

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "planned": self.planned.record(),
            "by_reason": [
                {"model": model, "reason": reason} | extent.record()
                for (model, reason), extent in sorted(self.by_reason.items())
            ],
            "kept": {reason: extent.record() for reason, extent in sorted(self.kept.items())},
            "refused": self.refused,
        }


@dataclass(frozen=True, slots=True)
class Status:
    """Status of an instance.

    Attributes:
        instance: Name of the instance.
        bucket: Handle of its bucket.
        census: The counts.
        last: The last run that left a report, if any.
        trouble: Why that report cannot be read; empty if it can.
        outlook: Effect of the next cleanup; None without a policy.
        index: State of its key index, or why it is unknown; None if there is no index.
        heat: Whether reads are known, and since when, or why not (`jobs.retention.access.AccessStats.record`).
    """

    instance: str
    bucket: str
    census: InstanceCensus
    last: LastRun | None
    trouble: str
    outlook: Outlook | None
    index: IndexState | str | None = None
    heat: dict[str, Any] = field(default_factory=dict)

    @property
    def chunks(self) -> Extent:
        """All chunks."""
        return self.census.chunks

    @property
    def by_model(self) -> dict[str, Extent]:
        """Chunks by model."""
        return dict(self.census.models)

    @property
    def access_rows(self) -> list[tuple[str, Extent]]:
        """Labels and extents of the hot and the idle share, for display; empty if reads are not known."""
        words = {LONGER: f"not read within {READ_WITHIN[-1][0]}", NEVER: "never read"}
        order = [name for name, _ in READ_WITHIN] + [LONGER, NEVER]
        reads = self.census.reads
        return [(words.get(name, f"read within {name}"), reads[name]) for name in order if name in reads]

    @property
    def access_line(self) -> str:
        """Line that says since when reads are known, or why they are not."""
        if self.heat.get("known"):
            return f"reads are known since {self.heat['since']}{dropped_of(self.heat)}"
        return f"reads are not known: {self.heat['why']}" if self.heat.get("why") else ""

    @property
    def index_line(self) -> str:
        """Line with the state of the key index; empty if there is none."""
        if isinstance(self.index, IndexState):
            return self.index.line(self.census.now)
        return f"nothing is known of the key index: {self.index}" if self.index else ""

    @property
    def growth(self) -> dict[str, float] | None:
        """Growth since the last run; None if there was none."""
        if self.last is None:
            return None
        since = self.census.now - self.last.at
        nbytes = self.census.chunks.bytes - self.last.left.bytes
        days = since / _DAY
        return {
            "objects": self.census.chunks.objects - self.last.left.objects,
            "bytes": nbytes,
            "seconds": round(since.total_seconds(), 3),
            "bytes_per_day": round(nbytes / days) if days > 0 else 0,
        }

    def record(self) -> dict[str, Any]:
        """Return the fields for JSON, described in `docs/retention.md`."""
        census, last = self.census, self.last
        order = [name for name, _ in AGES] + [OLDER, UNKNOWN]
        return {
            "instance": self.instance,
            "bucket": self.bucket,
            "now": census.now.isoformat(timespec="seconds"),
            "chunks": census.chunks.record(),
            "by_model": [{"model": model} | extent.record() for model, extent in sorted(census.models.items())],
            "by_worker": [
                {"model": model, "world_size": world, "worker": worker} | extent.record()
                for (model, world, worker), extent in sorted(census.workers.items())
            ],
            "ages": [{"younger_than": name} | census.ages[name].record() for name in order if name in census.ages],
            "heat": self.heat,
            "reads": [
                {"read_within": name} | census.reads[name].record()
                for name in [name for name, _ in READ_WITHIN] + [LONGER, NEVER]
                if name in census.reads
            ],
            "passed_by": {kind: extent.record() for kind, extent in sorted(census.passed_by.items())},
            "last_run": None
            if last is None
            else {"job": last.job, "at": last.at.isoformat(timespec="seconds"), "left": last.left.record()},
            "last_run_trouble": self.trouble,
            "growth": self.growth,
            "next_cleanup": None if self.outlook is None else self.outlook.record(),
            "index": self.index.record(census.now.timestamp()) if isinstance(self.index, IndexState) else None,
            "index_trouble": self.index if isinstance(self.index, str) else "",
        }


def examine(
    instance: str,
    bucket: Bucket,
    policy: Policy | None,
    limits: MaxDelete,
    *,
    request_secs: float,
    page_secs: float,
    without_heat: bool = False,
) -> Status:
    """Determine the status of an instance with one listing.

    Args:
        instance: Name of the instance.
        bucket: Client of its bucket.
        policy: Policy of the next cleanup; None to leave the cleanup out.
        limits: Limits of that cleanup.
        request_secs: Timeout of a request, in seconds.
        page_secs: Timeout of a listing page, in seconds.
        without_heat: Whether to use upload times even if reads are known; the index is then not read.

    Raises:
        HFBucketError: If the listing is incomplete.
    """
    clock = ServerClock()
    server_clock.ask(bucket, clock, request_secs)
    now = clock.earliest() if clock.known else datetime.now(UTC)
    census = InstanceCensus(now)
    last, trouble = None, ""
    try:
        last = report.last_run(bucket, request_secs)
    except SafetyError as error:
        trouble = str(error)
    unreadable = ""
    with contextlib.ExitStack() as stack:
        try:
            heat = stack.enter_context(open_access_stats(bucket, now, request_secs, without=without_heat))
        except AccessUnknownError as error:
            unreadable, heat = str(error), AccessStats(None, str(error))
        entries = heat.warmed(census.entries(Classifier(bucket).walk(page_secs)))
        if heat.table is not None:
            entries = census.read(entries)
        outlook = None
        if policy is None:
            for _ in entries:
                pass
        else:
            outlook = _outlook(policy, entries, census, limits, last, heat=heat)
            if unreadable and policy.goes_by_use:
                outlook = replace(outlook, refused=unreadable)
    index = inventory.state(bucket, page_secs, request_secs) if census.has_index else None
    return Status(instance, str(bucket.handle), census, last, trouble, outlook, index, heat.record())


def _outlook(
    policy: Policy,
    entries: Iterable[RetentionEntry],
    census: InstanceCensus,
    limits: MaxDelete,
    last: LastRun | None,
    *,
    heat: AccessStats,
) -> Outlook:
    planned, refused = Extent(), ""
    by_reason: defaultdict[tuple[str, str], Extent] = defaultdict(Extent)
    kept: defaultdict[str, Extent] = defaultdict(Extent)
    for decision in decide(policy, entries, census.now):
        entry, reason = decision.entry, str(decision.reason)
        if decision.delete:
            planned = planned.plus(entry.size)
            by_reason[entry.model, reason] = by_reason[entry.model, reason].plus(entry.size)
            if decision.reason is Reason.OVER_BUDGET and not refused:
                refused = heat.why_no_order(entry.last_used, census.now)
        else:
            kept[reason] = kept[reason].plus(entry.size)
    try:
        check_listing(census.chunks, census.seen, in_bucket=None, last=None if last is None else last.left)
        limits.check(planned, census.chunks)
    except SafetyError as error:
        refused = refused or str(error)
    return Outlook(planned, dict(by_reason), dict(kept), refused)
