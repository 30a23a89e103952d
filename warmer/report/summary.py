"""What happened, as numbers and names. Pure but for the file of failures.

A summary is one JSON record. It names up to `NAMED_FAILURES` failed chunks; a file names them all, one a line.
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
"""Failed chunks in a summary: about 300 kB, which a job's log still passes on as one line."""

_SAID: Final = 100
"""Wrong chunks that stderr names; the summary counts all of them."""


@dataclass(slots=True)
class NodeReport:
    """What happened on one node.

    Attributes:
        id: Ray's.
        name: For people.
        copied: Chunks moved, verified and now in the tier.
        received: Of those, the chunks that came from another node and not from the Hub.
        reused: Of those, the chunks that came from a tier of the same node that was filled before.
        present: Chunks that were there before.
        failed: Chunks that are not there.
        selected: Chunks that the node is to hold.
        selected_bytes: The sum of their sizes.
        ranks: The workers whose chunks these are; None for all.
        bytes: Bytes of the chunks copied.
        present_bytes: Bytes of the chunks that were there before.
        error: Why the node took no part, or was lost; None when it was neither.
        replaced_by: The id of the node that took its place when it was lost; None when none did.
        start_secs: Seconds until it had a process: those of Ray and of Python's imports. None where it never took part.
        open_secs: Seconds from then on until its tier was open and its access to the bucket there.
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
        """Note what the node is to hold."""
        self.selected, self.selected_bytes, self.ranks = share.chunks, share.bytes, share.ranks

    @property
    def ended(self) -> int:
        """Chunks that have ended, well or not."""
        return self.copied + self.present + self.failed


@dataclass(frozen=True, slots=True)
class TierRun:
    """What a run was asked to do.

    Attributes:
        instance: Name of the bucket's instance.
        bucket: Its handle.
        tier: Name of the tier.
        choice: What of it was chosen (`hfbucket_plugin.tools.selection.Selection`), ready for JSON.
        selected: Chunks selected, which every node is to hold, as far as they are for its workers.
        selected_bytes: The sum of their sizes.
        skipped: Chunks skipped, by reason (see `warmer.plan.build.PlanBuilder`).
        unassigned: Of those selected, the chunks of workers whose chunks no node takes.
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
    """What one node is to hold.

    Attributes:
        chunks: How many.
        bytes: The sum of their sizes.
        ranks: The workers whose chunks these are; None for all.
    """

    chunks: int
    bytes: int
    ranks: str | None = None


_NO_SHARES: Final[Mapping[str, Share]] = {}


class RunReport:
    """Collects what happens; the `RunListener` of a fleet.

    Args:
        task: What was asked.
        nodes: Who was to do it.
        failures: Where failed chunks are named.
        shares: Of the chunks selected, how many each node is to hold, their bytes, and whose; by its id. All of them
            where it says nothing.

    Attributes:
        counts: What the schedule had to do; set when it is over.
        repaired: In how many places, in this tier and those filled before it, something else than the chunk was found and replaced.
        left_wrong: In how many such places it is still found by engines.
        cut_short: Why the run ended before its end, where its plan was changed or lost meanwhile; None where it was not.
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
        """The first chunk is about to be copied."""
        self._started = time.monotonic()

    def end(self) -> None:
        """No chunk will be copied any more."""
        self._ended = time.monotonic()

    def ended(self, node: str, outcome: Outcome) -> None:
        """Count a chunk; one that was given up because the run was told to stop is left as unfinished."""
        if isinstance(outcome, Failed):
            if outcome.kind == INTERRUPTED:
                return
            self.kinds[outcome.kind] += 1
            self._failures.add(self.task.tier, self.nodes[node], outcome)
        if isinstance(outcome, Copied):
            self._log_wrong(self.nodes[node], outcome)
        self.nodes[node].add(outcome)

    def _log_wrong(self, node: NodeReport, outcome: Copied) -> None:
        """Report what was found in the place of a chunk: engines were served it."""
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
            node: Where.
            copied: Those that were loaded.
            present: Those that were there.
            size: Bytes of those loaded.
        """
        one = self.nodes[node]
        one.copied, one.present, one.bytes = one.copied + copied, one.present + present, one.bytes + size

    def lacking(self, node: str, chunks: int, kind: str, message: str) -> None:
        """Count chunks that an engine did not load, all for one reason. They are named together: their keys are its own."""
        if chunks:
            self.kinds[kind] += chunks
            self.nodes[node].failed += chunks
            self._failures.add(self.task.tier, self.nodes[node], Failed("", 0, kind, message))

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """Note that a node takes part, and how long that took."""
        one = self.nodes[node]
        one.start_secs, one.open_secs = round(start_secs, 3), round(open_secs, 3)

    def lost(self, node: str, kind: str, message: str) -> None:
        """Note why a node takes no part any more."""
        self.nodes[node].error = f"{kind}: {message}"

    def replaced(self, node: str, by: Node) -> None:
        """Note that a node took the place of a lost one, which is not waited for any more."""
        lost = self.nodes[node]
        lost.replaced_by = by.id
        self.nodes[by.id] = NodeReport(
            by.id, by.name, selected=lost.selected, selected_bytes=lost.selected_bytes, ranks=lost.ranks
        )

    @property
    def seconds(self) -> float:
        """Since the run began, until it ended; 0 before."""
        if self._started is None:
            return 0.0
        return (self._ended if self._ended is not None else time.monotonic()) - self._started

    @property
    def expected(self) -> int:
        """Chunks to end, over all nodes; those of a node that was replaced count as far as they ended there."""
        nodes = self.nodes.values()
        return sum(node.selected if node.replaced_by is None else node.ended for node in nodes)

    @property
    def expected_bytes(self) -> int:
        """Their bytes."""
        nodes = self.nodes.values()
        return sum(
            node.selected_bytes if node.replaced_by is None else node.bytes + node.present_bytes for node in nodes
        )

    @property
    def unfinished(self) -> int:
        """Chunks that have not ended, over all nodes."""
        return self.expected - self.total("ended")

    def total(self, name: str) -> int:
        """A number of `NodeReport`, over all nodes."""
        return sum(getattr(node, name) for node in self.nodes.values())

    def summary(self, *, stopped: bool) -> dict[str, Any]:
        """The summary, ready for JSON; its fields are described in `docs/warm.md`."""
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
"""What the exit codes of a run that began mean, in a word."""


class FailureLog:
    """Names failed chunks: the first in memory, all of them in a file.

    Args:
        report: The file that the user asked for; None writes one in the temporary directory, and only when there are
            more failures than a summary names.

    The file takes the place of an earlier report when it is closed, and only when there is something in it: a run that is
    refused leaves the last report as it is.

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
        """Name a chunk."""
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
        """Name a chunk in whose place a tier held something else; the first ones also to people."""
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
        """The disk is full, say: the run goes on, and names no more than its summary does."""
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
        """End the file with the summary, without the failures that the file names already. Further calls do nothing."""
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
    """The summary of a run from those of its tiers.

    Args:
        summaries: Of `RunReport.summary`, in the order of the tiers; at least one.

    Returns:
        Of one tier, its summary as it is. Of several, sums, and below `tiers` what is each one's own.
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
