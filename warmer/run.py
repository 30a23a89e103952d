"""One run, from a configuration to a summary: select, join the cluster, copy, report."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfbucket_plugin import metrics
from hfbucket_plugin.engine_config import EngineConfig
from hfbucket_plugin.errors import ConfigError, RefusedError
from hfbucket_plugin.instance import open_bucket
from hfbucket_plugin.scratch import Scratch
from warmer.moving import Moving, TimeLimit
from warmer.node import CHUNK_TIMEOUT_SECS, NodeConfig
from warmer.progress import choose_display
from warmer.report import FailureLog, RunReport, Task
from warmer.selection import FreshPlan, select
from warmer.tiers import TierOptions, declared_tier

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence
    from pathlib import Path

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.settings import InstanceSettings
    from warmer.cluster import Node
    from warmer.interrupt import StopSwitch
    from warmer.outcomes import Outcome
    from warmer.plan import PlanFile
    from warmer.progress import Display

_log = logging.getLogger(__name__)

NODE_START_SECS = 60.0
"""Enough to start a worker process on a node that is busy loading a model."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for.

    Attributes:
        config: The LMCache YAML.
        instance: The bucket's instance in it.
        tier: The tier in it.
        prefixes: Starts of the keys to copy; at least one, none empty.
        address: Of the Ray cluster; None for the configured one, or a local one.
        report: File that names every failed chunk; None for none.
        fsync: Whether files are forced to the disk before they appear.
        chunk_timeout_secs: Most seconds that a chunk may take, retries included.
        node_start_secs: Most seconds that a node may take to take part.
        moving: How bytes move.
    """

    config: Path
    instance: str
    tier: str
    prefixes: tuple[str, ...]
    address: str | None = None
    report: Path | None = None
    fsync: bool = False
    chunk_timeout_secs: float = CHUNK_TIMEOUT_SECS
    node_start_secs: float = NODE_START_SECS
    moving: Moving = field(default_factory=Moving)


class NothingToDoError(RefusedError):
    """Nothing is selected that the tier can take, or no node is alive."""


def run(order: Order, stop: StopSwitch) -> dict[str, Any]:
    """Carry out an order.

    Args:
        order: What was asked for.
        stop: Whether to stop.

    Returns:
        The summary, its `exit_code` included.

    Raises:
        ConfigError: The configuration is wrong, or asks for what is not supported.
        NothingToDoError: There is nothing to do, or nowhere.
        ClusterError: The configured Ray cluster does not answer.
        HFBucketError: The selection could not be listed.
        Interrupted: Told to stop before copying began.
    """
    config = EngineConfig.read(order.config)
    settings = config.instance(order.instance)
    tier = declared_tier(config, order.tier, TierOptions(fsync=order.fsync))
    nodes = NodeConfig(
        instance=order.instance,
        settings=_without_token(settings, order.instance),
        tier=tier,
        token_expected=settings.resolve_token() is not None,
        chunk_timeout_secs=order.chunk_timeout_secs,
        verify=order.moving.verify,
    )
    failures = _failure_log(order.report)
    summary = None
    scratch = Scratch(settings.download_tmp_dir)
    try:
        with scratch.file() as path:
            bucket = open_bucket(settings, order.instance, metrics.Tally(), order.chunk_timeout_secs)
            plan, skipped = select(bucket, order.prefixes, tier.takes, path)
            _check_selection(order, plan, skipped)
            summary = _Run(order, nodes, bucket, plan, skipped).carry_out(failures, stop)
    finally:
        failures.close(summary)
        scratch.close()
    return summary


def _without_token(settings: InstanceSettings, instance: str) -> InstanceSettings:
    """The settings as they may leave this process."""
    bare = settings.model_copy(update={"token": None})
    if settings.resolve_token() is not None and bare.resolve_token() is None:
        raise ConfigError(
            f"instance {instance!r}: remote_storage_plugin.{instance}.token is written into the configuration; it "
            f"would have to travel through Ray to the nodes, which is never done. Set the environment variable "
            f"{settings.token_env} on all nodes (token_env names it), and leave the token out"
        )
    return bare


def _failure_log(report: Path | None) -> FailureLog:
    try:
        return FailureLog(report)
    except OSError as error:
        raise ConfigError(f"--report {str(report)!r} cannot be written: {error.strerror}") from None


def _check_selection(order: Order, plan: PlanFile, skipped: Counter[str]) -> None:
    other = skipped["other_kind"]
    if other and not plan.chunks:
        raise NothingToDoError(
            f"nothing selected that tier {order.tier!r} can take: all {other} chunks have keys of MP mode "
            "(`lmcache server`), and a classic fs directory holds keys of the classic engine only"
        )
    if not plan.chunks:
        raise NothingToDoError(
            f"nothing selected: instance {order.instance!r} holds no chunk whose key starts with "
            + " or ".join(map(repr, order.prefixes))
        )
    if other:
        _log.info("%d chunks with keys of MP mode are passed by: tier %r takes classic keys only", other, order.tier)


@dataclass(frozen=True, slots=True)
class _Watch:
    """The fleet's witness: the report, and a display of it."""

    report: RunReport
    display: Display

    def ended(self, node: str, outcome: Outcome) -> None:
        self.report.ended(node, outcome)

    def lost(self, node: str, kind: str, message: str) -> None:
        _log.warning("node %s: %s: %s", self.report.nodes[node].name, kind, message)
        self.report.lost(node, kind, message)

    def replaced(self, node: str, by: Node) -> None:
        _log.warning("node %s: %s takes its place", self.report.nodes[node].name, by.name)
        self.report.replaced(node, by)

    def tick(self) -> None:
        self.display.show(self.report)


@dataclass(frozen=True, slots=True)
class _Run:
    """A selection that is to be copied."""

    order: Order
    config: NodeConfig
    bucket: Bucket
    plan: PlanFile
    skipped: Counter[str]

    def carry_out(self, failures: FailureLog, stop: StopSwitch) -> dict[str, Any]:
        # Ray takes a second to import, which a refused command should not wait for.
        from warmer.cluster import alive_nodes, joined  # noqa: PLC0415

        with joined(self.order.address):
            stop.take_back()
            nodes = alive_nodes()
            if not nodes:
                raise NothingToDoError("the Ray cluster has no node that is alive")
            report = RunReport(self._task(), nodes, failures)
            limit = TimeLimit(stop, self.order.moving.max_secs)
            self._copy(nodes, report, limit, stop)
            return report.summary(stopped=limit.requested)

    def _task(self) -> Task:
        return Task(
            instance=self.order.instance,
            bucket=str(self.bucket.handle),
            tier=self.order.tier,
            prefixes=self.order.prefixes,
            selected=self.plan.chunks,
            selected_bytes=self.plan.bytes,
            skipped=dict(self.skipped),
        )

    def _copy(self, nodes: Sequence[Node], report: RunReport, limit: TimeLimit, stop: StopSwitch) -> None:
        from warmer.cluster import alive_nodes  # noqa: PLC0415 - as above
        from warmer.fleet import Fleet, Replacing  # noqa: PLC0415 - as above

        display = choose_display()
        moving = self.order.moving
        # What a lost node will never get needs no lookup.
        schedule = moving.schedule(nodes, FreshPlan(self.plan, self.bucket).chunks, self.plan.chunks_from)
        replacing = Replacing(alive_nodes, moving.store_bytes) if moving.replace_nodes else None
        watch = _Watch(report, display)
        fleet = Fleet(nodes, self.config, watch, limit, self.order.node_start_secs, replacing=replacing)
        try:
            with stop.orderly():
                fleet.run(schedule)
        finally:
            display.close()
            report.counts = schedule.counts
