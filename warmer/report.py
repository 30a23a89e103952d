"""What happened, as numbers and names. Pure but for the file of failures.

A summary is one JSON record. It names up to `NAMED_FAILURES` failed chunks; a file names them all, one a line.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from warmer import exits
from warmer.orders import Counts
from warmer.outcomes import INTERRUPTED, Copied, Failed, Present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.cluster import Node
    from warmer.outcomes import Outcome

NAMED_FAILURES: Final = 1000
"""Failed chunks in a summary: about 300 kB, which a job's log still passes on as one line."""


@dataclass(slots=True)
class NodeReport:
    """What happened on one node.

    Attributes:
        id: Ray's.
        name: For people.
        copied: Chunks moved, verified and now in the tier.
        received: Of those, the chunks that came from another node and not from the Hub.
        present: Chunks that were there before.
        failed: Chunks that are not there.
        bytes: Bytes of the chunks copied.
        present_bytes: Bytes of the chunks that were there before.
        error: Why the node took no part, or was lost; None when it was neither.
        replaced_by: The id of the node that took its place when it was lost; None when none did.
    """

    id: str
    name: str
    copied: int = 0
    received: int = 0
    present: int = 0
    failed: int = 0
    bytes: int = 0
    present_bytes: int = 0
    error: str | None = None
    replaced_by: str | None = None

    def add(self, outcome: Outcome) -> None:
        """Count a chunk."""
        match outcome:
            case Copied():
                self.copied += 1
                self.received += outcome.received
                self.bytes += outcome.size
            case Present():
                self.present += 1
                self.present_bytes += outcome.size
            case Failed():
                self.failed += 1

    @property
    def ended(self) -> int:
        """Chunks that have ended, well or not."""
        return self.copied + self.present + self.failed


@dataclass(frozen=True, slots=True)
class Task:
    """What a run was asked to do.

    Attributes:
        instance: Name of the bucket's instance.
        bucket: Its handle.
        tier: Name of the tier.
        prefixes: Starts of the keys selected.
        selected: Chunks selected, which every node is to hold.
        selected_bytes: The sum of their sizes.
        skipped: Chunks passed by, by reason (see `warmer.plan.Planner`).
    """

    instance: str
    bucket: str
    tier: str
    prefixes: tuple[str, ...]
    selected: int
    selected_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)


class RunReport:
    """Collects what happens; the `Witness` of a fleet.

    Args:
        task: What was asked.
        nodes: Who was to do it.
        failures: Where failed chunks are named.

    Attributes:
        counts: What the schedule had to do; set when it is over.
    """

    def __init__(self, task: Task, nodes: Sequence[Node], failures: FailureLog) -> None:
        self.task = task
        self.nodes = {node.id: NodeReport(node.id, node.name) for node in nodes}
        self.kinds: Counter[str] = Counter()
        self._failures = failures
        self.counts = Counts()
        self._started = time.monotonic()

    def ended(self, node: str, outcome: Outcome) -> None:
        """Count a chunk; one that was given up because the run was told to stop is left as unfinished."""
        if isinstance(outcome, Failed):
            if outcome.kind == INTERRUPTED:
                return
            self.kinds[outcome.kind] += 1
            self._failures.add(self.nodes[node], outcome)
        self.nodes[node].add(outcome)

    def lost(self, node: str, kind: str, message: str) -> None:
        """Note why a node takes no part any more."""
        self.nodes[node].error = f"{kind}: {message}"

    def replaced(self, node: str, by: Node) -> None:
        """Note that a node took the place of a lost one, which is not waited for any more."""
        self.nodes[node].replaced_by = by.id
        self.nodes[by.id] = NodeReport(by.id, by.name)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._started

    @property
    def expected(self) -> int:
        """Chunks to end, over all nodes; those of a node that was replaced count as far as they ended there."""
        return sum(self.task.selected if node.replaced_by is None else node.ended for node in self.nodes.values())

    def total(self, name: str) -> int:
        """A number of `NodeReport`, over all nodes."""
        return sum(getattr(node, name) for node in self.nodes.values())

    def summary(self, *, stopped: bool) -> dict[str, Any]:
        """The summary, ready for JSON; its fields are described in `docs/warm.md`."""
        unfinished = self.expected - self.total("ended")
        failed = self.total("failed")
        code = exits.INTERRUPTED if stopped and unfinished else exits.FAILED if failed else exits.COMPLETE
        return {
            "event": "summary",
            "result": _RESULTS[code],
            "exit_code": code,
            "instance": self.task.instance,
            "bucket": self.task.bucket,
            "tier": self.task.tier,
            "prefixes": list(self.task.prefixes),
            "selected": self.task.selected,
            "selected_bytes": self.task.selected_bytes,
            "skipped": self.task.skipped,
            "copied": self.total("copied"),
            "received": self.total("received"),
            "present": self.total("present"),
            "failed": failed,
            "unfinished": unfinished,
            "bytes": self.total("bytes"),
            "fetched": self.counts.fetched,
            "fetched_bytes": self.counts.fetched_bytes,
            "refetched": self.counts.refetched,
            "fetched_alone": self.counts.own,
            "seconds": round(self.seconds, 3),
            "failed_by_kind": dict(self.kinds),
            "nodes": [asdict(node) for node in self.nodes.values()],
            "failures": self._failures.named,
            "failures_file": str(self._failures.path) if self._failures.path else None,
        }


_RESULTS: Final = {exits.COMPLETE: "complete", exits.FAILED: "failed", exits.INTERRUPTED: "interrupted"}


class FailureLog:
    """Names failed chunks: the first in memory, all of them in a file.

    Args:
        report: The file that the user asked for; None writes one in the temporary directory, and only when there are
            more failures than a summary names.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, report: Path | None) -> None:
        self.named: list[dict[str, Any]] = []
        self.path = report
        self._out: IO[str] | None = report.open("w", encoding="utf-8") if report else None

    def add(self, node: NodeReport, failed: Failed) -> None:
        """Name a chunk."""
        record = {
            "node": node.id,
            "node_name": node.name,
            "key": failed.key,
            "kind": failed.kind,
            "message": failed.message,
        }
        if len(self.named) < NAMED_FAILURES:
            self.named.append(record)
        elif self._out is None:
            self._spill()
        self._write({"event": "failure", **record})

    def _spill(self) -> None:
        self._out = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed by `close`
            "w", encoding="utf-8", prefix="warmer-failures-", suffix=".jsonl", delete=False
        )
        self.path = Path(self._out.name)
        for record in self.named:
            self._write({"event": "failure", **record})

    def _write(self, record: dict[str, Any]) -> None:
        if self._out is not None:
            self._out.write(json.dumps(record) + "\n")

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """End the file with the summary, without the failures that the file names already."""
        if self._out is None:
            return
        if summary is not None:
            self._write({name: value for name, value in summary.items() if name != "failures"})
        self._out.close()
        self._out = None
