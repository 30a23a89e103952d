"""A plan carried out on a cluster: tier after tier, each on all the nodes that take part."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfbucket_plugin.core.units import format_ranks
from hfbucket_plugin.errors import RefusedError
from warmer.cluster.engine_tiers import EngineRun
from warmer.cluster.placement import Places, assigned, unknown_ranks
from warmer.cluster.schedule_setup import TimeLimit, for_nobody, schedule_of, store_bytes
from warmer.node.engine_memory import LoadConfig
from warmer.report.observers import Looks, looking_on
from warmer.report.outcomes import NothingToDoError, PlanLostError
from warmer.report.progress import choose_display
from warmer.report.summary import RunReport, Share, Task, combined
from warmer.tiers import L1Declaration, LocalCPUDeclaration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.tools.signals import StopSwitch
    from warmer.cluster.actor import Config
    from warmer.cluster.placement import Assigned
    from warmer.cluster.ray import Node
    from warmer.plan.plan_file import PlanFile
    from warmer.report.observers import Onlooker
    from warmer.report.outcomes import Outcome
    from warmer.report.summary import FailureLog
    from warmer.request.model import Nodes
    from warmer.request.resolve import Bound
    from warmer.tiers import AnyTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CopyRun:
    """A plan that is to be copied.

    Attributes:
        bound: From where to where.
        plan: What.
        onlookers: Who looks on, beside a display and the metrics of the Ray cluster.
    """

    bound: Bound
    plan: PlanFile
    onlookers: Sequence[Onlooker] = ()

    def carry_out(self, failures: FailureLog, stop: StopSwitch) -> dict[str, Any]:
        """Copy it; returns the summary.

        Raises:
            ConfigError: The warm-up names a node that there is not.
            NothingToDoError: No node takes part, or none takes any of the chunks.
            ClusterError: The configured Ray cluster does not answer.
        """
        # Ray takes a second to import, which a refused command should not wait for.
        from warmer.cluster.ray import alive_nodes, joined  # noqa: PLC0415
        from warmer.report.metrics import RunMetrics  # noqa: PLC0415

        warm_up = self.bound.warm_up
        with joined(warm_up.address):
            stop.take_back()
            places = Places(taking_part(alive_nodes(), warm_up.nodes), warm_up.nodes)
            left_out = chunks_for_nobody(self.plan, places.nodes)
            limit = TimeLimit(stop, warm_up.limits.max_duration)
            onlookers = [RunMetrics(), *self.onlookers]
            reports: list[RunReport] = []
            for tier in self.bound.tiers:
                # Who took a lost node's place for one tier does so for those that follow.
                nodes = places.nodes
                report = RunReport(
                    self._task(tier, left_out), [one.node for one in nodes], failures, self._shares(tier, nodes)
                )
                report.cut_short = reports[-1].cut_short if reports else None
                reports.append(report)
                if not limit.requested and report.cut_short is None:
                    report.begin()
                    with looking_on(onlookers, report), stop.orderly():
                        try:
                            self._fill(tier, places, report, limit, onlookers)
                        except NothingToDoError:
                            raise
                        except (RefusedError, PlanLostError) as error:
                            # What was copied is there, and is told: a summary as of any run that ended early.
                            report.cut_short = error
                            _log.error("%s", error)
                    report.end()
            return combined([report.summary(stopped=limit.requested) for report in reports])

    def _shares(self, tier: AnyTier, nodes: Sequence[Assigned]) -> dict[str, Share]:
        """What each node is to hold, as far as it is known before engines are asked."""
        return {} if isinstance(tier, L1Declaration) else shares(self.plan, nodes)

    def _task(self, tier: AnyTier, left_out: int) -> Task:
        prompts = self.bound.prompt_file if isinstance(tier, L1Declaration) else None
        return Task(
            instance=self.bound.instance.name,
            bucket=str(self.bound.instance.settings.bucket_handle),
            tier=tier.name,
            choice=self.bound.warm_up.choose.model_dump(mode="json", exclude_defaults=True),
            selected=self.plan.chunks if prompts is None else prompts.chunks.total(),
            selected_bytes=self.plan.bytes if prompts is None else 0,
            skipped=dict(self.plan.header.get("skipped", {})),
            for_nobody=left_out if prompts is None else 0,
        )

    def _fill(
        self, tier: AnyTier, places: Places, report: RunReport, limit: TimeLimit, onlookers: Sequence[Onlooker]
    ) -> None:
        """Fill one tier of all nodes."""
        display = choose_display()
        try:
            self._fill_shown(tier, places, Looks(report, display, onlookers), limit)
        finally:
            display.close()

    def _fill_shown(self, tier: AnyTier, places: Places, looks: Looks, limit: TimeLimit) -> None:
        report = looks.report
        engines = EngineRun(self.bound, self.plan, places.nodes, looks, limit)
        match tier:
            case L1Declaration():
                if self.bound.prompt_file is not None:
                    engines.load_prompts(tier, self.bound.prompt_file)
            case LocalCPUDeclaration():
                config, nodes = engines.search_workers(tier)
                if not nodes or limit.requested:
                    return
                report.task = replace(report.task, for_nobody=chunks_for_nobody(self.plan, _with_lost(places, nodes)))
                for node, share in shares(self.plan, nodes).items():
                    report.nodes[node].expect(share)
                self._copy(config, places.having(nodes), looks, limit)
            case _:
                self._copy(self.bound.node_config(tier), places, looks, limit)

    def _copy(self, config: Config, places: Places, looks: Looks, limit: TimeLimit) -> None:
        from warmer.cluster.driver import Fleet, Replacing  # noqa: PLC0415 - as above
        from warmer.cluster.ray import alive_nodes  # noqa: PLC0415 - as above

        moving, wanted = self.bound.warm_up.moving, self.bound.warm_up.nodes
        replacing = Replacing(
            candidates=lambda: places.candidates(alive_nodes()),
            fits=places.fits,
            store_bytes=lambda node: store_bytes(moving, node),
        )
        schedule = schedule_of(moving, places.nodes, self.plan, self.bound.bucket(), limit)
        looks.report.counts = schedule.counts
        looks.under_way = lambda: schedule.under_way
        watch = _Watch(looks, places)
        fleet = Fleet(
            [one.node for one in places.nodes],
            config,
            watch,
            limit,
            self._start_secs(config),
            chunk_secs=self.bound.warm_up.limits.chunk_timeout,
            replacing=replacing if wanted.replace else None,
            store_bytes=replacing.store_bytes,
        )
        fleet.run(schedule)

    def _start_secs(self, config: Config) -> float:
        """How long a node may take to take part: one that takes a lost one's place waits for its engine, too."""
        warm_up = self.bound.warm_up
        waits = warm_up.nodes.replace and isinstance(config, LoadConfig)
        return warm_up.limits.node_timeout + (warm_up.limits.wait_engine.total_seconds() if waits else 0.0)


def _with_lost(places: Places, there: Sequence[Assigned]) -> list[Assigned]:
    """Nodes whose engine came, with the workers that they turned out to have, and the others: their chunks fail there."""
    names = {one.node.id for one in there}
    return [*there, *(one for one in places.nodes if one.node.id not in names)]


def taking_part(alive: Sequence[Any], wanted: Nodes) -> list[Assigned]:
    """As `warmer.cluster.placement.assigned`, with a word about ranks that are given for nobody."""
    nodes = assigned(alive, wanted)
    absent = unknown_ranks(alive, wanted)
    if absent:
        _log.warning("ranks are given for %s: no such node is alive", ", ".join(absent))
    return nodes


def shares(plan: PlanFile, nodes: Sequence[Assigned]) -> dict[str, Share]:
    """What of a plan each node is to hold, by its id."""
    return {
        one.node.id: Share(*plan.share(one.ranks), None if one.ranks is None else format_ranks(one.ranks))
        for one in nodes
    }


def chunks_for_nobody(plan: PlanFile, nodes: Sequence[Assigned]) -> int:
    """How many chunks of a plan no node takes, with a word about them.

    Raises:
        NothingToDoError: No node takes any.
    """
    count = for_nobody(nodes, plan)
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


@dataclass(slots=True)
class _Watch:
    """The fleet's witness: the report, a display of it, and whoever else looks on."""

    looks: Looks
    places: Places

    def ended(self, node: str, outcome: Outcome) -> None:
        self.looks.ended(node, outcome)

    def started(self, node: str, start_secs: float, open_secs: float) -> None:
        self.looks.report.started(node, start_secs, open_secs)

    def lost(self, node: str, kind: str, message: str) -> None:
        self.looks.lost(node, kind, message)

    def replaced(self, node: str, by: Node) -> None:
        report = self.looks.report
        _log.warning("node %s: %s takes its place", report.nodes[node].name, by.name)
        report.replaced(node, by)
        self.places.take(node, by)

    def tick(self) -> None:
        self.looks()
