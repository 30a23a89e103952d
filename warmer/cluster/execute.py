"""A plan carried out on a cluster: tier after tier, each on all the nodes that take part."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core.units import format_ranks
from hfbucket_plugin.errors import RefusedError
from warmer.cluster.engine_tiers import EngineRun
from warmer.cluster.placement import NodeSlots, assigned, unknown_ranks
from warmer.cluster.schedule_setup import TimeLimit, schedule_of, store_bytes, unassigned
from warmer.node.engine_memory import LoadConfig
from warmer.report.observers import EventDispatcher, observing
from warmer.report.outcomes import NothingToDoError, PlanLostError
from warmer.report.progress import NoDisplay, choose_display
from warmer.report.summary import RunReport, Share, TierRun, combined
from warmer.tiers import L1Declaration, LocalCPUDeclaration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.tools.signals import ShutdownSignal
    from warmer.cluster.actor import Config
    from warmer.cluster.placement import Assignment
    from warmer.plan.plan_file import WarmPlanFile
    from warmer.report.observers import Observer
    from warmer.report.summary import FailureLog
    from warmer.request.model import NodeOptions
    from warmer.request.resolve import ResolvedRequest
    from warmer.tiers import AnyTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyRun:
    """A plan that is to be copied.

    Attributes:
        resolved: From where to where.
        plan: What.
        observers: Who looks on, beside a display and the metrics of the Ray cluster.
        quiet: Whether progress is not shown.
    """

    resolved: ResolvedRequest
    plan: WarmPlanFile
    observers: Sequence[Observer] = ()
    quiet: bool = False

    def execute(self, failures: FailureLog, stop: ShutdownSignal) -> dict[str, Any]:
        """Copy it; returns the summary.

        Raises:
            ConfigError: The warm-up names a node that there is not.
            NothingToDoError: No node takes part, or none takes any of the chunks.
            ClusterError: The configured Ray cluster does not answer.
        """
        # Ray takes a second to import, which a refused command should not wait for.
        from warmer.cluster.ray import alive_nodes, joined  # noqa: PLC0415
        from warmer.report.metrics import RunMetrics  # noqa: PLC0415

        request = self.resolved.request
        with joined(request.address):
            stop.take_back()
            places = NodeSlots(taking_part(alive_nodes(), request.nodes), request.nodes)
            left_out = unassigned_chunks(self.plan, places.nodes)
            limit = TimeLimit(stop, request.limits.max_duration)
            observers = [RunMetrics(), *self.observers]
            reports: list[RunReport] = []
            for tier in self.resolved.tiers:
                # Who took a lost node's place for one tier does so for those that follow.
                nodes = places.nodes
                report = RunReport(
                    self._task(tier, left_out), [one.node for one in nodes], failures, self._shares(tier, nodes)
                )
                report.cut_short = reports[-1].cut_short if reports else None
                reports.append(report)
                if not limit.requested and report.cut_short is None:
                    report.begin()
                    with observing(observers, report), stop.orderly():
                        try:
                            self._fill(tier, places, report, limit, observers)
                        except NothingToDoError:
                            raise
                        except (RefusedError, PlanLostError) as error:
                            # What was copied is there, and is told: a summary as of any run that ended early.
                            report.cut_short = error
                            _log.error("%s", error)
                    report.end()
            return combined([report.summary(stopped=limit.requested) for report in reports])

    def _shares(self, tier: AnyTier, nodes: Sequence[Assignment]) -> dict[str, Share]:
        """What each node is to hold, as far as it is known before engines are asked."""
        return {} if isinstance(tier, L1Declaration) else shares(self.plan, nodes)

    def _task(self, tier: AnyTier, left_out: int) -> TierRun:
        prompts = self.resolved.prompt_file if isinstance(tier, L1Declaration) else None
        return TierRun(
            instance=self.resolved.instance.name,
            bucket=str(self.resolved.instance.settings.bucket_handle),
            tier=tier.name,
            choice=self.resolved.request.choose.model_dump(mode="json", exclude_defaults=True),
            selected=self.plan.chunks if prompts is None else prompts.chunks.total(),
            selected_bytes=self.plan.bytes if prompts is None else 0,
            skipped=dict(self.plan.header.get("skipped", {})),
            unassigned=left_out if prompts is None else 0,
        )

    def _fill(
        self, tier: AnyTier, places: NodeSlots, report: RunReport, limit: TimeLimit, observers: Sequence[Observer]
    ) -> None:
        """Fill one tier of all nodes."""
        display = NoDisplay() if self.quiet else choose_display()
        try:
            self._fill_shown(tier, places, EventDispatcher(report, display, observers), limit)
        finally:
            display.close()

    def _fill_shown(self, tier: AnyTier, places: NodeSlots, events: EventDispatcher, limit: TimeLimit) -> None:
        report = events.report
        engines = EngineRun(self.resolved, self.plan, places.nodes, events, limit)
        match tier:
            case L1Declaration():
                if self.resolved.prompt_file is not None:
                    engines.load_prompts(tier, self.resolved.prompt_file)
            case LocalCPUDeclaration():
                config, nodes = engines.search_workers(tier)
                if not nodes or limit.requested:
                    return
                report.task = replace(report.task, unassigned=unassigned_chunks(self.plan, _with_lost(places, nodes)))
                for node, share in shares(self.plan, nodes).items():
                    report.nodes[node].expect(share)
                self._copy(config, places.having(nodes), events, limit)
            case _:
                self._copy(self.resolved.node_config(tier), places, events, limit)

    def _copy(self, config: Config, places: NodeSlots, events: EventDispatcher, limit: TimeLimit) -> None:
        from warmer.cluster.driver import Driver, Replacing  # noqa: PLC0415 - as above
        from warmer.cluster.ray import alive_nodes  # noqa: PLC0415 - as above

        moving, wanted = self.resolved.request.moving, self.resolved.request.nodes
        replacing = Replacing(
            candidates=lambda: places.candidates(alive_nodes()),
            fits=places.fits,
            store_bytes=lambda node: store_bytes(moving, node),
        )
        schedule = schedule_of(moving, places.nodes, self.plan, self.resolved.bucket(), limit)
        events.report.counts = schedule.counts
        events.under_way = lambda: schedule.under_way
        events.take_place = places.take
        fleet = Driver(
            [one.node for one in places.nodes],
            config,
            events,
            limit,
            self._start_secs(config),
            chunk_secs=self.resolved.request.limits.chunk_timeout,
            replacing=replacing if wanted.replace else None,
            store_bytes=replacing.store_bytes,
        )
        fleet.run(schedule)

    def _start_secs(self, config: Config) -> float:
        """How long a node may take to take part: one that takes a lost one's place waits for its engine, too."""
        request = self.resolved.request
        waits = request.nodes.replace and isinstance(config, LoadConfig)
        return request.limits.node_timeout + (request.limits.wait_engine.total_seconds() if waits else 0.0)


def _with_lost(places: NodeSlots, there: Sequence[Assignment]) -> list[Assignment]:
    """Nodes whose engine came, with the workers that they turned out to have, and the others: their chunks fail there."""
    names = {one.node.id for one in there}
    return [*there, *(one for one in places.nodes if one.node.id not in names)]


def taking_part(alive: Sequence[Any], wanted: NodeOptions) -> list[Assignment]:
    """As `warmer.cluster.placement.assigned`, with a word about ranks that are given for nobody."""
    nodes = assigned(alive, wanted)
    absent = unknown_ranks(alive, wanted)
    if absent:
        _log.warning("ranks are given for %s: no such node is alive", ", ".join(absent))
    return nodes


def shares(plan: WarmPlanFile, nodes: Sequence[Assignment]) -> dict[str, Share]:
    """What of a plan each node is to hold, by its id."""
    return {
        one.node.id: Share(*plan.share(one.ranks), None if one.ranks is None else format_ranks(one.ranks))
        for one in nodes
    }


def unassigned_chunks(plan: WarmPlanFile, nodes: Sequence[Assignment]) -> int:
    """How many chunks of a plan no node takes, with a word about them.

    Raises:
        NothingToDoError: No node takes any.
    """
    count = unassigned(nodes, plan)
    if not count:
        return 0
    workers = sorted(worker for worker in plan.shares if worker is not None)
    taken = frozenset[int]().union(*(one.ranks or () for one in nodes))
    words = f"the plan has those of workers {format_ranks(workers)}, nodes take those of {format_ranks(taken)}"
    advice = "look at --ranks, --ranks-label and the nodes' labels"
    if count == plan.chunks:
        raise NothingToDoError(f"no node takes any of the {count} chunks: {words}; {advice}")
    _log.warning("%d of %d chunks are for no node: %s; %s", count, plan.chunks, words, advice)
    return count
