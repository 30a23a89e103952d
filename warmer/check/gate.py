"""The `check` of a warm-up: how warm each tier of each node is, read-only, and whether that passes the required share."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.tools import exit_codes
from warmer.check.canary import ask_engines
from warmer.check.node import CheckConfig
from warmer.cluster.engine_tiers import checkable
from warmer.cluster.placement import shares, taking_part, unassigned_chunks
from warmer.cluster.schedule_setup import TimeLimit, direct_schedule
from warmer.report.outcomes import INTERRUPTED, Failed, Missing, Right, Wrong
from warmer.tiers import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfbucket_plugin.tools.signals import ShutdownSignal
    from warmer.check.canary import Canary
    from warmer.cluster.placement import Assignment
    from warmer.cluster.ray import Node
    from warmer.plan.plan_file import WarmPlanFile
    from warmer.report.outcomes import Outcome
    from warmer.report.summary import Share
    from warmer.request.resolve import ResolvedRequest

_log = logging.getLogger(__name__)

NAMED: Final = 1000
"""Maximum number of chunks named for each reason."""

_PROVEN: Final = {
    exit_codes.COMPLETE: "warm",
    exit_codes.FAILED: "cold",
    exit_codes.USAGE: "unproven",
    exit_codes.INTERRUPTED: "interrupted",
}
"""Results of the engines' answers after the tiers passed, by exit code."""


@dataclass(slots=True)
class NodeCheck:
    """Findings of a check in one tier of one node.

    Attributes:
        tier: Name of the tier.
        id: Ray's id of the node.
        name: Name of the node.
        selected: Number of chunks that the node should hold.
        ranks: Workers whose chunks these are; None for all.
        right: Number of chunks that are present as planned.
        wrong: Number of chunks in whose place there is other content.
        missing: Number of chunks that are absent.
        unknown: Number of chunks that could not be checked.
        error: Why the node took no part or was lost; None if neither.
    """

    tier: str
    id: str
    name: str
    selected: int
    ranks: str | None = None
    right: int = 0
    wrong: int = 0
    missing: int = 0
    unknown: int = 0
    error: str | None = None

    def add(self, outcome: Outcome) -> None:
        """Count a chunk."""
        match outcome:
            case Right():
                self.right += 1
            case Wrong():
                self.wrong += 1
            case Missing():
                self.missing += 1
            case Failed():
                self.unknown += 1

    @property
    def share(self) -> float:
        """Right chunks as a share of the chunks that the node should hold; 1 if it should hold none."""
        return self.right / self.selected if self.selected else 1.0


class CheckReport:
    """Collects the findings of a check.

    Args:
        require: Share of right chunks that each tier of each node must have.
        unassigned: Number of chunks that no node gets; the check fails if there are any.
        compared_with: Source of the expected contents, ready for JSON.
    """

    def __init__(self, require: float, unassigned: int = 0, compared_with: dict[str, Any] | None = None) -> None:
        self.compared_with = compared_with
        self.require = require
        self.unassigned = unassigned
        self.found: list[NodeCheck] = []
        self.named: dict[str, list[dict[str, str]]] = {"wrong": [], "unknown": []}

    def watch(self, tier: str, nodes: Iterable[Assignment], expected: dict[str, Share]) -> TierWatch:
        """Return the listener for a driver that checks one tier."""
        checks = {}
        for one in nodes:
            share = expected[one.node.id]
            checks[one.node.id] = NodeCheck(tier, one.node.id, one.node.name, share.chunks, share.ranks)
        self.found += checks.values()
        return TierWatch(checks, self.named)

    def record(self, *, stopped: bool) -> dict[str, Any]:
        """Return the report, ready for JSON; its fields are described in `docs/warm.md`."""
        least = min((check.share for check in self.found), default=0.0)
        seen = all(check.right + check.wrong + check.missing + check.unknown == check.selected for check in self.found)
        if stopped and not seen:
            result, code = "interrupted", exit_codes.INTERRUPTED
        elif least >= self.require and not self.unassigned and all(check.error is None for check in self.found):
            result, code = "warm", exit_codes.COMPLETE
        else:
            result, code = "cold", exit_codes.FAILED
        return {
            "event": "check",
            "result": result,
            "exit_code": code,
            "compared_with": self.compared_with,
            "require": self.require,
            "share": round(least, 6),
            "for_nobody": self.unassigned,
            "canary": None,
            "nodes": [asdict(check) | {"share": round(check.share, 6)} for check in self.found],
            **self.named,
        }


@dataclass(frozen=True, slots=True)
class TierWatch:
    """Listener for a driver that checks one tier."""

    checks: dict[str, NodeCheck]
    named: dict[str, list[dict[str, str]]]

    def ended(self, node: str, outcome: Outcome) -> None:
        """Count a chunk, and name it if it is not right."""
        if isinstance(outcome, Failed) and outcome.kind == INTERRUPTED:
            return
        check = self.checks[node]
        check.add(outcome)
        if isinstance(outcome, (Wrong, Failed)):
            names = self.named["wrong" if isinstance(outcome, Wrong) else "unknown"]
            if len(names) < NAMED:
                names.append({"tier": check.tier, "node": node, "key": outcome.key, "message": outcome.message})

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """Ignore the event: a check does not report the start times of nodes."""

    def lost(self, node: str, kind: str, message: str) -> None:
        """Record why a node takes no part any more."""
        _log.warning("node %s: %s: %s", self.checks[node].name, kind, message)
        self.checks[node].error = f"{kind}: {message}"

    def replaced(self, node: str, by: Node) -> None:
        """Ignore the event: a check replaces no nodes."""

    def tick(self) -> None:
        """Ignore the event: a check shows no progress."""


def check(
    resolved: ResolvedRequest,
    plan: WarmPlanFile,
    stop: ShutdownSignal,
    *,
    require: float,
    hashes: bool,
    compared_with: dict[str, Any],
    canary: Canary | None = None,
) -> dict[str, Any]:
    """Check every tier of every node that takes part.

    Args:
        resolved: Resolved warm-up with the tiers.
        plan: Plan of the expected chunks.
        stop: Whether to stop.
        require: Share of right chunks that each tier must have.
        hashes: Whether to hash contents.
        compared_with: Source of the plan: an earlier time, or the bucket's present state.
        canary: Canary for the engines, run once the tiers pass; None for none.

    Returns:
        The report, including its `exit_code`.

    Raises:
        ConfigError: The warm-up names a node that does not exist, or a tier that cannot be checked.
        NothingToDoError: No node takes part, or no node gets any of the chunks.
        ClusterError: The configured Ray cluster does not answer.
    """
    from warmer.cluster.driver import Driver  # noqa: PLC0415
    from warmer.cluster.ray import alive_nodes, joined  # noqa: PLC0415 - Ray takes a second to import

    tiers = checkable(resolved.tiers)
    with joined(resolved.request.address):
        stop.take_back()
        nodes = taking_part(alive_nodes(), resolved.request.nodes)
        report = CheckReport(require, unassigned_chunks(plan, nodes), compared_with)
        limit = TimeLimit(stop, resolved.request.limits.max_duration)
        expected = shares(plan, nodes)
        watches = [report.watch(tier.name, nodes, expected) for tier in tiers]
        for tier, watch in zip(tiers, watches, strict=True):
            if limit.requested:
                break
            schedule = direct_schedule(nodes, plan)
            config = CheckConfig(tier, hashes=hashes)
            limits = resolved.request.limits
            fleet = Driver(
                [one.node for one in nodes],
                config,
                watch,
                limit,
                limits.node_timeout,
                chunk_secs=limits.chunk_timeout,
            )
            with stop.orderly():
                fleet.run(schedule)
        record = report.record(stopped=limit.requested)
        _advise(record)
        if canary is None:
            return record
        if record["exit_code"] != exit_codes.COMPLETE:
            _log.warning("engines are not asked: what is not there is no hit, and asking would have them compute it")
            return record
        with stop.orderly():
            places = [NodeInfo(one.node.name, one.node.id, one.node.labels) for one in nodes]
            return proven(record, ask_engines(canary, places, limit))


def _advise(record: dict[str, Any]) -> None:
    """Log what wrong chunks were compared with, and what replaces them."""
    wrong = sum(node["wrong"] for node in record["nodes"])
    if not wrong:
        return
    compared = record["compared_with"]
    if compared["with"] == "plan":
        _log.warning(
            "%d chunks are wrong by the plan of %s: of those that were rewritten in the bucket since, the tier may hold the "
            "later content. Check without the plan to compare with the bucket as it is now",
            wrong,
            compared["at"] or "an unknown time",
        )
    _log.warning(
        "%d chunks are wrong: `warmer run --verify-present` with the same choice replaces what differs from the bucket",
        wrong,
    )


def proven(record: dict[str, Any], canary: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a passed check, extended with the result of the canary."""
    code = canary.pop("exit_code")
    return record | {"result": _PROVEN[code], "exit_code": code, "canary": canary}
