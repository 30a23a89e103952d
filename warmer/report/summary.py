"""Summary of a run: counts, and names of failed chunks. Pure, except for the file of failures.

A summary is one JSON record. It names up to `NAMED_FAILURES` failed chunks; a file names all, one a line.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from hfbucket_plugin.core import texts
from hfbucket_plugin.core.files import OutputFile
from hfbucket_plugin.errors import RefusedError
from hfbucket_plugin.tools import exit_codes
from warmer.report.outcomes import INTERRUPTED, NO_ROOM, Copied, Failed, Present
from warmer.schedule.tasks import Counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfbucket_plugin.errors import HFBucketError
    from warmer.cluster.ray import Node
    from warmer.report.outcomes import Outcome


_log = logging.getLogger(__name__)

NAMED_FAILURES: Final = 1000
"""Maximum failed chunks in a summary: about 300 kB, which a job's log still forwards as one line."""

_SAID: Final = 100
"""Maximum wrong chunks named on stderr; the summary counts all of them."""


@dataclass(slots=True)
class NodeReport:
    """Result on one node.

    Attributes:
        id: Ray's id.
        name: Name in messages.
        copied: Number of chunks that were moved, verified and are now in the tier.
        received: Number of copied chunks that came from another node, not from the Hub.
        reused: Number of copied chunks that came from an earlier tier of the same node.
        present: Number of chunks that were present before.
        failed: Number of chunks that are absent.
        selected: Number of chunks that the node should hold.
        selected_bytes: Bytes of these chunks.
        ranks: Ranks of the workers whose chunks these are; None for all.
        bytes: Bytes of the copied chunks.
        present_bytes: Bytes of the chunks that were present before.
        error: Why the node took no part or was lost; None if neither.
        replaced_by: Id of the node that replaced this node when it was lost; None if none did.
        start_secs: Seconds until the node had a process, imports of Ray and Python included; None if it never took part.
        open_secs: Seconds from then until its tier was open and its access to the bucket confirmed.
    """

    id: str
    name: str
    copied: int = 0
    received: int = 0
    reused: int = 0
    present: int = 0
    failed: int = 0
    bytes: int = 0
    present_bytes: int = 0
    selected: int = 0
    selected_bytes: int = 0
    ranks: str | None = None
    error: str | None = None
    replaced_by: str | None = None
    start_secs: float | None = None
    open_secs: float | None = None

    def add(self, outcome: Outcome) -> None:
        """Count a chunk."""
        match outcome:
            case Copied():
                self.copied += 1
                self.received += outcome.received
                self.reused += outcome.reused
                self.bytes += outcome.size
            case Present():
                self.present += 1
                self.present_bytes += outcome.size
            case Failed():
                self.failed += 1

    def expect(self, share: Share) -> None:
        """Record what the node should hold."""
        self.selected, self.selected_bytes, self.ranks = share.chunks, share.bytes, share.ranks

    @property
    def ended(self) -> int:
        """Number of chunks that have ended, successfully or not."""
        return self.copied + self.present + self.failed


@dataclass(frozen=True, slots=True)
class TierRun:
    """Task of a run for one tier.

    Attributes:
        instance: Name of the bucket's instance.
        bucket: Handle of the instance.
        tier: Name of the tier.
        choice: Criteria of the choice (`hfbucket_plugin.tools.selection.Selection`), ready for JSON.
        selected: Number of selected chunks; each node should hold those that are for its workers.
        selected_bytes: Bytes of the selected chunks.
        skipped: Number of skipped chunks, by reason (see `warmer.plan.build.PlanBuilder`).
        unassigned: Number of selected chunks of workers whose chunks no node gets.
    """

    instance: str
    bucket: str
    tier: str
    choice: dict[str, Any]
    selected: int
    selected_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)
    unassigned: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Chunks that one node should hold.

    Attributes:
        chunks: Number of chunks.
        bytes: Bytes of the chunks.
        ranks: Ranks of the workers whose chunks these are; None for all.
    """

    chunks: int
    bytes: int
    ranks: str | None = None


_NO_SHARES: Final[Mapping[str, Share]] = {}


class RunReport:
    """Collects the events of a run for one tier; a `RunListener`.

    Args:
        task: Task of the run.
        nodes: Nodes of the run.
        failures: Log of the failed chunks.
        shares: Share of the selected chunks that each node should hold, by node id; all chunks for a node without an entry.

    Attributes:
        counts: Counters of the schedule; set at the end of the schedule.
        repaired: Number of places, in this tier and earlier ones, in which other content was found and replaced.
        left_wrong: Number of such places in which engines still find other content.
        cut_short: Error of a plan that changed or was lost, which ended the run early; None otherwise.
    """

    def __init__(
        self, task: TierRun, nodes: Sequence[Node], failures: FailureLog, shares: Mapping[str, Share] = _NO_SHARES
    ) -> None:
        self.task = task
        whole = Share(task.selected, task.selected_bytes)
        self.nodes = {}
        for node in nodes:
            share = shares.get(node.id, whole)
            self.nodes[node.id] = NodeReport(
                node.id, node.name, selected=share.chunks, selected_bytes=share.bytes, ranks=share.ranks
            )
        self.kinds: Counter[str] = Counter()
        self._failures = failures
        self.repaired = self.left_wrong = 0
        self.counts = Counts()
        self.cut_short: HFBucketError | None = None
        self._started: float | None = None
        self._ended: float | None = None

    def begin(self) -> None:
        """Record that the first chunk is about to be copied."""
        self._started = time.monotonic()

    def end(self) -> None:
        """Record that no more chunks will be copied."""
        self._ended = time.monotonic()

    def ended(self, node: str, outcome: Outcome) -> None:
        """Count a chunk; one that was given up because the run was stopped remains unfinished."""
        if isinstance(outcome, Failed):
            if outcome.kind == INTERRUPTED:
                return
            self.kinds[outcome.kind] += 1
            self._failures.add(self.task.tier, self.nodes[node], outcome)
        if isinstance(outcome, Copied):
            self._log_wrong(self.nodes[node], outcome)
        self.nodes[node].add(outcome)

    def _log_wrong(self, node: NodeReport, outcome: Copied) -> None:
        """Report other content that was found in the place of a chunk, because engines were served this content."""
        self.repaired += len(outcome.repaired)
        self.left_wrong += len(outcome.left)
        for tier in outcome.repaired:
            words = f"{outcome.key}: tier {tier!r} held something else in its place, which was replaced"
            self._failures.add_wrong(tier, node, outcome.key, words, repaired=True)
        for message in outcome.left:
            self._failures.add_wrong(self.task.tier, node, outcome.key, f"{outcome.key}: {message}", repaired=False)

    def loaded(self, node: str, *, copied: int, present: int, size: int) -> None:
        """Count chunks that an engine loaded by itself, and those that it held before.

        Args:
            node: Id of the node.
            copied: Number of chunks loaded.
            present: Number of chunks held before.
            size: Bytes of the loaded chunks.
        """
        one = self.nodes[node]
        one.copied, one.present, one.bytes = one.copied + copied, one.present + present, one.bytes + size

    def lacking(self, node: str, chunks: int, kind: str, message: str) -> None:
        """Count chunks that an engine did not load, for one reason; one entry names them all, as only the engine has keys."""
        if chunks:
            self.kinds[kind] += chunks
            self.nodes[node].failed += chunks
            self._failures.add(self.task.tier, self.nodes[node], Failed("", 0, kind, message))

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """Record that a node takes part, and the seconds until its process ran and until it was ready."""
        one = self.nodes[node]
        one.start_secs, one.open_secs = round(start_secs, 3), round(open_secs, 3)

    def lost(self, node: str, kind: str, message: str) -> None:
        """Record why a node takes no part any more."""
        self.nodes[node].error = f"{kind}: {message}"

    def replaced(self, node: str, by: Node) -> None:
        """Record that a node replaced a lost one, whose remaining chunks are not awaited any more."""
        lost = self.nodes[node]
        lost.replaced_by = by.id
        self.nodes[by.id] = NodeReport(
            by.id, by.name, selected=lost.selected, selected_bytes=lost.selected_bytes, ranks=lost.ranks
        )

    @property
    def seconds(self) -> float:
        """Seconds from the start of the run to its end, or until now; 0 before the start."""
        if self._started is None:
            return 0.0
        return (self._ended if self._ended is not None else time.monotonic()) - self._started

    @property
    def expected(self) -> int:
        """Number of chunks that should end, over all nodes; for a replaced node, only chunks that ended there count."""
        nodes = self.nodes.values()
        return sum(node.selected if node.replaced_by is None else node.ended for node in nodes)

    @property
    def expected_bytes(self) -> int:
        """Bytes of the expected chunks."""
        nodes = self.nodes.values()
        return sum(
            node.selected_bytes if node.replaced_by is None else node.bytes + node.present_bytes for node in nodes
        )

    @property
    def unfinished(self) -> int:
        """Number of chunks that have not ended, over all nodes."""
        return self.expected - self.total("ended")

    def total(self, name: str) -> int:
        """Return the sum of a field of `NodeReport` over all nodes."""
        return sum(getattr(node, name) for node in self.nodes.values())

    def summary(self, *, stopped: bool) -> dict[str, Any]:
        """Return the summary, ready for JSON; its fields are described in `docs/warm.md`."""
        failed = self.total("failed")
        code = self._code(stopped=stopped)
        return {
            "event": "summary",
            "result": RESULTS[code],
            "exit_code": code,
            "message": "" if self.cut_short is None else str(self.cut_short),
            "instance": self.task.instance,
            "bucket": self.task.bucket,
            "tier": self.task.tier,
            "choice": self.task.choice,
            "selected": self.task.selected,
            "selected_bytes": self.task.selected_bytes,
            "skipped": self.task.skipped,
            "for_nobody": self.task.unassigned,
            "copied": self.total("copied"),
            "received": self.total("received"),
            "reused": self.total("reused"),
            "present": self.total("present"),
            "failed": failed,
            "unfinished": self.unfinished,
            "bytes": self.total("bytes"),
            "fetched": self.counts.fetched,
            "fetched_bytes": self.counts.fetched_bytes,
            "refetched": self.counts.refetched,
            "fetched_alone": self.counts.own,
            "seconds": round(self.seconds, 3),
            "failed_by_kind": dict(self.kinds),
            "nodes": [asdict(node) for node in self.nodes.values()],
            "repaired": self.repaired,
            "left_wrong": self.left_wrong,
            "wrong": self._failures.wrong,
            "failures": self._failures.named,
            "failures_file": str(self._failures.path) if self._failures.path else None,
        }

    def _code(self, *, stopped: bool) -> int:
        if self.cut_short is not None:
            return exit_codes.REFUSED if isinstance(self.cut_short, RefusedError) else exit_codes.FAILED
        if stopped and self.unfinished:
            return exit_codes.INTERRUPTED
        if any(node.error is not None and node.replaced_by is None for node in self.nodes.values()):
            return exit_codes.FAILED
        if self.kinds.keys() == {NO_ROOM} and not self.total("copied"):
            return exit_codes.REFUSED
        return exit_codes.FAILED if self.kinds or self.unfinished or self.left_wrong else exit_codes.COMPLETE


RESULTS: Final = {
    exit_codes.COMPLETE: "complete",
    exit_codes.FAILED: "failed",
    exit_codes.REFUSED: "refused",
    exit_codes.INTERRUPTED: "interrupted",
}
"""Result of a run that began, by exit code."""


class FailureLog:
    """Log of failed chunks: the first ones in memory, all of them in a file.

    The file replaces an earlier report when it is closed, and only if it is not empty: a run that is refused leaves the
    previous report unchanged.

    Args:
        report: Path of the file that the user requested; None to write one in the temporary directory, and only if there
            are more failures than a summary names.

    Raises:
        ConfigError: The file cannot be written.
    """

    def __init__(self, report: Path | None) -> None:
        self.named: list[dict[str, Any]] = []
        self.wrong: list[dict[str, Any]] = []
        self.path = report
        self._broken = False
        self._written = False
        self._out: IO[str] | OutputFile | None = OutputFile(report, "--report") if report else None

    def add(self, tier: str, node: NodeReport, failed: Failed) -> None:
        """Log a failed chunk."""
        record = {
            "tier": tier,
            "node": node.id,
            "node_name": node.name,
            "key": failed.key or None,
            "kind": failed.kind,
            "message": failed.message,
        }
        if len(self.named) < NAMED_FAILURES:
            self.named.append(record)
        elif self._out is None:
            self._spill()
        self._write({"event": "failure", **record})

    def add_wrong(self, tier: str, node: NodeReport, key: str, message: str, *, repaired: bool) -> None:
        """Log a chunk in whose place a tier held other content; the first ones are also reported on stderr."""
        record = {
            "tier": tier,
            "node": node.id,
            "node_name": node.name,
            "key": key,
            "repaired": repaired,
            "message": message,
        }
        if len(self.wrong) < NAMED_FAILURES:
            self.wrong.append(record)
        if len(self.wrong) <= _SAID:
            _log.warning("node %s: %s", node.name, message)
        self._write({"event": "wrong", **record})

    def _spill(self) -> None:
        if self._broken:
            return
        try:
            self._begin()
        except OSError as error:
            self._give_up(error)

    def _begin(self) -> None:
        self._out = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed by `close`
            "w", encoding="utf-8", prefix="warmer-failures-", suffix=".jsonl", delete=False
        )
        self.path = Path(self._out.name)
        for record in self.named:
            self._write({"event": "failure", **record})

    def _write(self, record: dict[str, Any]) -> None:
        if self._out is not None:
            try:
                self._out.write(texts.as_json(record) + "\n")
                self._written = True
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Stop writing the file, for example when the disk is full: the run continues with the failures in its summary only."""
        _log.warning("the file of failures cannot be written any more: %s", error)
        self._broken, self.path = True, None
        self._shut()

    def _shut(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            try:
                if not isinstance(out, OutputFile):
                    out.close()
                elif self._written:
                    out.commit()
                else:
                    out.discard()
            except OSError as error:
                if not self._broken:
                    self._give_up(error)

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End the file with the summary, without the failures that the file already names. Further calls do nothing."""
        if self._out is None:
            return
        if summary is not None:
            self._write({name: value for name, value in summary.items() if name != "failures"})
        self._shut()


_SUMS: Final = (
    "copied", "received", "reused", "present", "failed", "unfinished", "bytes",
    "fetched", "fetched_bytes", "refetched", "fetched_alone", "repaired", "left_wrong",
)  # fmt: skip
_OF_A_TIER: Final = ("tier", "result", "exit_code", *_SUMS, "seconds", "failed_by_kind", "nodes")


def combined(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the summaries of a run's tiers into the summary of the run.

    Args:
        summaries: Results of `RunReport.summary`, in the order of the tiers; at least one.

    Returns:
        For one tier, its summary unchanged. For several, sums, and the values of each tier below `tiers`.
    """
    first = summaries[0]
    if len(summaries) == 1:
        return first
    cut_short = [summary for summary in summaries if summary["message"]]
    code = cut_short[0]["exit_code"] if cut_short else _code({summary["exit_code"] for summary in summaries})
    kinds: Counter[str] = Counter()
    for summary in summaries:
        kinds.update(summary["failed_by_kind"])
    sums = {name: sum(summary[name] for summary in summaries) for name in _SUMS}
    own = [{name: summary[name] for name in _OF_A_TIER} for summary in summaries]
    return first | sums | {
        "result": RESULTS[code],
        "exit_code": code,
        "message": cut_short[0]["message"] if cut_short else "",
        "tier": [summary["tier"] for summary in summaries],
        "seconds": round(sum(summary["seconds"] for summary in summaries), 3),
        "failed_by_kind": dict(kinds),
        "nodes": [node for summary in summaries for node in summary["nodes"]],
        "tiers": own,
    }  # fmt: skip


def _code(codes: set[int]) -> int:
    if len(codes) == 1:
        return next(iter(codes))
    return exit_codes.INTERRUPTED if exit_codes.INTERRUPTED in codes else exit_codes.FAILED
