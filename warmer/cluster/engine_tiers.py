"""Filling of tiers in the memory of engines: find the engines, load each one's chunks, and record the results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.errors import ConfigError
from warmer.cluster.placement import parts_of
from warmer.node.engine_memory import LoadConfig, WorkerSearch
from warmer.node.prompts import BATCH_PROMPTS, L1Task, PromptLoad
from warmer.plan.plan_file import is_for
from warmer.report.outcomes import ENGINE, NODE_LOST, Failed
from warmer.report.summary import Share
from warmer.tiers import L1Declaration, LocalCPUDeclaration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from hfbucket_plugin.tools.signals import Stop
    from warmer.cluster.actor_pool import ActorPool, ActorTask, Failure
    from warmer.cluster.placement import Assignment
    from warmer.node.prompts import PromptFile
    from warmer.plan.plan_file import WarmPlanFile
    from warmer.report.observers import EventDispatcher
    from warmer.request.resolve import ResolvedRequest
    from warmer.tiers import AnyTier, Declaration

_SPARE_SECS: Final = 60.0
"""Seconds beyond a node's own waiting time before the node is considered hung."""


def checkable(tiers: Iterable[AnyTier]) -> list[Declaration]:
    """Return the tiers if all of them can be checked without changing them.

    Raises:
        ConfigError: A tier cannot be checked.
    """
    found = []
    for tier in tiers:
        if isinstance(tier, L1Declaration):
            raise ConfigError(
                f"tier {tier.name!r} cannot be checked: `lmcache server` tells what its L1 holds only of what it is asked to "
                "load. `run` counts what was there as present; name other tiers with --tier to check those"
            )
        if isinstance(tier, LocalCPUDeclaration):
            raise ConfigError(
                f"tier {tier.name!r} cannot be checked: a classic engine does not tell which chunks are in its memory; name "
                "other tiers with --tier to check those"
            )
        found.append(tier)
    return found


@dataclass(frozen=True, slots=True)
class EngineRun:
    """Filling of one tier in the memory of engines, on all nodes that take part.

    Attributes:
        resolved: Resolved warm-up, with the source and the tiers.
        plan: Plan of the chunks.
        nodes: Nodes that take part, with their workers.
        events: Receives the events.
        stop: Whether to stop.
    """

    resolved: ResolvedRequest
    plan: WarmPlanFile
    nodes: Sequence[Assignment]
    events: EventDispatcher
    stop: Stop

    def search_workers(self, tier: LocalCPUDeclaration) -> tuple[LoadConfig, list[Assignment]]:
        """Wait for the workers of classic engines. Nodes without a worker take no part: their chunks fail.

        Returns:
            The configuration of the loads, and the nodes that take part, with the workers that they have.
        """
        needed = frozenset(0 if worker is None else worker for worker in self.plan.shares)
        wait = self.resolved.request.limits.wait_engine.total_seconds()
        wanted = {one.node.id: needed if one.ranks is None else needed & one.ranks for one in self.nodes}
        found = self._begun(
            {
                one: WorkerSearch(tier, wanted[one.node.id], all_of_them=one.ranks is not None, wait_secs=wait)
                for one in self.nodes
            },
            wait,
        )
        there = []
        for one in self.nodes:
            workers = found.get(one.node.id)
            if isinstance(workers, frozenset):
                there.append(one if one.ranks is not None else replace(one, ranks=workers))
            elif workers is not None:
                self._fail_chunks(one, workers)
        ranks = {one.node.id: (one.ranks or frozenset()) & needed for one in there}
        return LoadConfig(self.resolved.node_config(tier), tier, ranks, needed, wait), there

    def _begun(self, tasks: Mapping[Assignment, ActorTask], wait: float) -> dict[str, Any]:
        from warmer.cluster.actor_pool import ActorPool  # noqa: PLC0415 - Ray takes a second to import

        with ActorPool({one.node: task for one, task in tasks.items()}, self.stop, self.events.tick) as running:
            return running.begin(self._start_secs(wait))

    def _start_secs(self, wait: float) -> float:
        return self.resolved.request.limits.node_timeout + wait + _SPARE_SECS

    def _fail_chunks(self, one: Assignment, failure: Failure) -> None:
        """Report all chunks of a node as failed because the node's engine did not answer."""
        self.events.lost(one.node.id, failure.kind, failure.message)
        for part in parts_of([one], self.plan).values():
            for chunk in part.chunks_from(0):
                if self.stop.requested:
                    return
                message = f"{chunk.key}: not loaded: {failure.message}"
                self.events.ended(one.node.id, Failed(chunk.key, chunk.size, failure.kind, message))

    def load_prompts(self, tier: L1Declaration, prompts: PromptFile) -> None:
        """Make the server of each node load the prompts of the models that it serves."""
        from warmer.cluster.actor_pool import ActorPool, Failure  # noqa: PLC0415 - as above

        limits, choice = self.resolved.request.limits, self.resolved.request.choose
        wait, world_size = limits.wait_engine.total_seconds(), choice.world_size or 1
        task = L1Task(
            tier,
            tuple(prompts.chunks),
            world_size,
            choice.chunk_size,
            choice.hash_algorithm,
            wait,
            limits.chunk_timeout,
        )
        able = []
        for one in self.nodes:
            if all(is_for(worker, one.ranks) for worker in range(world_size)):
                able.append(one)
            else:
                words = (
                    f"a server loads the chunks of all {world_size} workers at once, and this node takes those of some"
                )
                self._fail_prompts(one.node.id, Failure(ConfigError.kind, words))
        with ActorPool({one.node: task for one in able}, self.stop, self.events.tick) as running:
            self._share_out(running.begin(self._start_secs(wait)), prompts)
            secs = limits.chunk_timeout * BATCH_PROMPTS + _SPARE_SECS
            running.work(prompts.batch, prompts.batches, self._take, secs)
            self._expect_alive(running)

    def _share_out(self, found: Mapping[str, Any], prompts: PromptFile) -> None:
        """Record what each node should hold: the prompts of the models that it serves, or that no node serves."""
        served = {node: models for node, models in found.items() if isinstance(models, frozenset)}
        nowhere = set(prompts.chunks).difference(*served.values())
        for node, models in found.items():
            if not isinstance(models, frozenset):
                self._fail_prompts(node, models)
                continue
            chunks = sum(prompts.chunks[model] for model in prompts.chunks if model in models or model in nowhere)
            self.events.report.nodes[node].expect(Share(chunks, 0))
            for model in sorted(nowhere):
                words = f"no engine of so many workers has registered the model {model!r} with the server of any node"
                self.events.lacking(node, prompts.chunks[model], ENGINE, words)

    def _fail_prompts(self, node: str, failure: Failure) -> None:
        self.events.lost(node, failure.kind, failure.message)
        one = self.events.report.nodes[node]
        self.events.lacking(node, one.selected - one.ended, failure.kind, f"not loaded: {failure.message}")

    def _take(self, node: str, _: int, result: Any) -> None:
        if not isinstance(result, list):
            self._fail_prompts(node, result)
            return
        for load in result:
            self._count(node, load)

    def _count(self, node: str, load: PromptLoad) -> None:
        self.events.loaded(node, copied=load.copied, present=load.present, size=load.bytes)
        words = f"prompt in line {load.line}: {load.lacking} of {load.chunks} chunks are not in memory: {load.message}"
        self.events.lacking(node, load.lacking, load.ended, words)

    def _expect_alive(self, running: ActorPool) -> None:
        """Check that nodes that have finished are still alive: the memory of a dead node is lost."""
        from warmer.cluster.actor_pool import Failure  # noqa: PLC0415 - as above
        from warmer.cluster.ray import alive_nodes  # noqa: PLC0415 - as above

        alive = {node.id for node in alive_nodes()}
        for node in running.nodes:
            if node not in alive:
                self._fail_prompts(node, Failure(NODE_LOST, "lost after it had ended its part"))
