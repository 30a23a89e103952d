"""`check`: how warm every node is, tier by tier, without writing anything; and the gate that it is."""

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
"""Chunks that are named at most for each reason."""

_PROVEN: Final = {
    exit_codes.COMPLETE: "warm",
    exit_codes.FAILED: "cold",
    exit_codes.USAGE: "unproven",
    exit_codes.INTERRUPTED: "interrupted",
}
"""What engines make of tiers that are warm, by the exit code that their answers stand for."""


@dataclass(slots=True)
class NodeCheck:
    """What a check found in one tier of one node.

    Attributes:
        tier: Its name.
        id: The node's, Ray's.
        name: The node's, for people.
        selected: Chunks that the node is to hold.
        ranks: The workers whose chunks these are; None for all.
        right: Chunks that are there as the plan has them.
        wrong: Chunks in whose place is something else.
        missing: Chunks that are not there.
        unknown: Chunks that could not be looked at.
        error: Why the node took no part, or was lost; None when it was neither.
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
        """Of the chunks that the node is to hold, the part that is right; of none, all of it."""
        return self.right / self.selected if self.selected else 1.0


class CheckReport:
    """Collects what a check finds.

    Args:
        require: The share of right chunks that each tier of each node must have.
        unassigned: How many chunks no node takes: with any, the nodes are not warm.
        compared_with: What says which contents are right, ready for JSON.
    """

    def __init__(self, require: float, unassigned: int = 0, compared_with: dict[str, Any] | None = None) -> None:
        self.compared_with = compared_with
        self.require = require
        self.unassigned = unassigned
        self.found: list[NodeCheck] = []
        self.named: dict[str, list[dict[str, str]]] = {"wrong": [], "unknown": []}

    def watch(self, tier: str, nodes: Iterable[Assignment], expected: dict[str, Share]) -> TierWatch:
        """The listener of a driver that looks into one tier."""
        checks = {}
        for one in nodes:
            share = expected[one.node.id]
            checks[one.node.id] = NodeCheck(tier, one.node.id, one.node.name, share.chunks, share.ranks)
        self.found += checks.values()
        return TierWatch(checks, self.named)

    def record(self, *, stopped: bool) -> dict[str, Any]:
        """The report, ready for JSON; its fields are described in `docs/warm.md`."""
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
    """The listener of a driver that looks into one tier."""

    checks: dict[str, NodeCheck]
    named: dict[str, list[dict[str, str]]]

    def ended(self, node: str, outcome: Outcome) -> None:
        """Count a chunk, and name it when something is wrong with it."""
        if isinstance(outcome, Failed) and outcome.kind == INTERRUPTED:
            return
        check = self.checks[node]
        check.add(outcome)
        if isinstance(outcome, (Wrong, Failed)):
            names = self.named["wrong" if isinstance(outcome, Wrong) else "unknown"]
            if len(names) < NAMED:
                names.append({"tier": check.tier, "node": node, "key": outcome.key, "message": outcome.message})

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        """A check does not tell how long nodes took to begin."""

    def lost(self, node: str, kind: str, message: str) -> None:
        """Note why a node takes no part any more."""
        _log.warning("node %s: %s: %s", self.checks[node].name, kind, message)
        self.checks[node].error = f"{kind}: {message}"

    def replaced(self, node: str, by: Node) -> None:
        """Nobody takes another's place in a check."""

    def tick(self) -> None:
        """Nothing is shown meanwhile."""


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
    """Look into every tier of every node that takes part.

    Args:
        resolved: Which tiers.
        plan: What they are to hold.
        stop: Whether to stop.
        require: The share that each must hold.
        hashes: Whether contents are hashed.
        compared_with: What the plan is: that of a time, or the bucket as it is now.
        canary: What engines are asked, when the tiers are as warm as required; None for nothing.

    Returns:
        The report, its `exit_code` included.

    Raises:
        ConfigError: The warm-up names a node that there is not, or a tier that cannot be looked into.
        NothingToDoError: No node takes part, or none takes any of the chunks.
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
    """Say what wrong chunks were compared with, and what replaces them."""
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
    """The record of a check whose tiers are warm, with what engines said of it."""
    code = canary.pop("exit_code")
    return record | {"result": _PROVEN[code], "exit_code": code, "canary": canary}
