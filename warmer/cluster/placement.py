"""Choice of the nodes that take part, and of the chunks that each of them gets."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.units import format_ranks, parse_ranks
from hfbucket_plugin.errors import ConfigError
from warmer.plan.plan_file import PlanPart, is_for
from warmer.report.outcomes import NothingToDoError
from warmer.report.summary import Share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from warmer.cluster.ray import Node
    from warmer.plan.plan_file import WarmPlanFile
    from warmer.request.model import NodeOptions


_log = logging.getLogger(__name__)

_SELECTOR: Final = re.compile(r"\s*([^=\s!]+)\s*=\s*(!?)\s*(?:in\(([^()]*)\)|([^,()!\s]+))\s*")
_NAMED: Final = 20


@dataclass(frozen=True, slots=True)
class Assignment:
    """A node that takes part.

    Attributes:
        node: The node.
        ranks: Ranks of the workers whose chunks the node gets; None for all.
    """

    node: Node
    ranks: frozenset[int] | None = None


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition on a label, in Ray's syntax.

    Attributes:
        label: Name of the label.
        values: Values, of which the label must have one.
        negated: Whether the label must have none of the values; a node without the label then matches too.
    """

    label: str
    values: frozenset[str]
    negated: bool

    @classmethod
    def parse(cls, text: str) -> Selector:
        """Parse `pool=serving`, `pool=!serving`, `pool=in(a,b)` or `pool=!in(a,b)`.

        Raises:
            ConfigError: The text is not a condition.
        """
        match = _SELECTOR.fullmatch(text)
        values = (
            [value.strip() for value in (match[3] if match[3] is not None else match[4]).split(",")] if match else []
        )
        if match is None or not all(values):
            raise ConfigError(
                f"--node-selector {text!r} reads LABEL=VALUE, LABEL=!VALUE, LABEL=in(A,B) or LABEL=!in(A,B); give several "
                "conditions one by one"
            )
        return cls(match[1], frozenset(values), bool(match[2]))

    def fits(self, labels: Mapping[str, str]) -> bool:
        """Return whether a node with these labels matches."""
        return (labels.get(self.label) in self.values) != self.negated


def assigned(alive: Sequence[Node], wanted: NodeOptions) -> list[Assignment]:
    """Return the nodes that take part.

    Args:
        alive: Nodes of the cluster that are alive.
        wanted: Options that select nodes, and assign workers' chunks to them.

    Raises:
        ConfigError: A name is not that of a live node, or a condition or label is invalid.
        NothingToDoError: No node takes part.
    """
    if not alive:
        raise NothingToDoError("the Ray cluster has no node that is alive")
    _expect_known(alive, wanted.names)
    chosen = eligible(alive, wanted)
    if not chosen:
        raise NothingToDoError(
            f"no node has the labels {', '.join(wanted.selector)}; there are {_described(alive, labels=True)}"
        )
    return [Assignment(node, ranks_of(node, wanted)) for node in chosen]


def eligible(alive: Sequence[Node], wanted: NodeOptions) -> list[Node]:
    """Return the nodes that have the requested labels and names.

    Raises:
        ConfigError: A condition is invalid.
    """
    selectors = [Selector.parse(text) for text in wanted.selector]
    return [
        node
        for node in alive
        if all(selector.fits(node.labels) for selector in selectors)
        and (not wanted.names or node.name in wanted.names or node.id in wanted.names)
    ]


def ranks_of(node: Node, wanted: NodeOptions) -> frozenset[int] | None:
    """Return the ranks of the workers whose chunks a node gets; None for all.

    Raises:
        ConfigError: The value of the node's label is not a list of ranks.
    """
    for name in (node.id, node.name):
        if name in wanted.ranks:
            return wanted.ranks[name]
    text = node.labels.get(wanted.ranks_label)
    if not text:
        return None
    try:
        return parse_ranks(text.replace("_", ","))
    except ValueError as error:
        raise ConfigError(f"node {node.name} ({node.id}): label {wanted.ranks_label}: {error}") from None


def unknown_ranks(alive: Sequence[Node], wanted: NodeOptions) -> list[str]:
    """Return the names for which ranks are given but that no live node has: such a node may be down."""
    known = {name for node in alive for name in (node.name, node.id)}
    return sorted(wanted.ranks.keys() - known)


def _expect_known(alive: Sequence[Node], names: Sequence[str]) -> None:
    known = {name for node in alive for name in (node.name, node.id)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"--nodes {', '.join(unknown)}: no such node is alive; there are {_described(alive)}")


def _described(nodes: Sequence[Node], *, labels: bool = False) -> str:
    """Describe nodes by name, id and labels, without Ray's own labels."""
    words = []
    for node in nodes[:_NAMED]:
        own = [f"{name}={value}" for name, value in sorted(node.labels.items()) if not name.startswith("ray.io/")]
        words.append(f"{node.name} ({node.id}{': ' + ', '.join(own) if labels and own else ''})")
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(words) + more


class NodeSlots:
    """Nodes of a run. A node that joins may replace a lost one, and then gets all chunks of the lost node.

    Args:
        nodes: Nodes that take part at first.
        wanted: Options for nodes, which also apply to those that join.
    """

    def __init__(self, nodes: Sequence[Assignment], wanted: NodeOptions) -> None:
        self._held = {one.node.id: one for one in nodes}
        self._wanted = wanted
        self._whole: NodeSlots | None = None

    @property
    def nodes(self) -> list[Assignment]:
        """Nodes that take part now, including lost ones that no node has replaced."""
        return list(self._held.values())

    def having(self, nodes: Sequence[Assignment]) -> NodeSlots:
        """Return some of these nodes, with the workers found on them; a replacement in the result applies here too."""
        some = NodeSlots(nodes, self._wanted)
        some._whole = self
        return some

    def candidates(self, alive: Sequence[Node]) -> list[Node]:
        """Return nodes that may take part; those that get only certain workers' chunks first, as others fit anywhere."""
        return sorted(eligible(alive, self._wanted), key=lambda node: self._ranks(node) is None)

    def _ranks(self, node: Node) -> frozenset[int] | None:
        """Return the ranks that a node declares; None for all, or if they are invalid."""
        try:
            return ranks_of(node, self._wanted)
        except ConfigError:
            return None

    def fits(self, lost: str, node: Node) -> bool:
        """Return whether a node may replace a lost one: it declares the same ranks, or none."""
        try:
            ranks = ranks_of(node, self._wanted)
        except ConfigError:
            return False
        return ranks is None or ranks == self._held[lost].ranks

    def take(self, lost: str, by: Node) -> None:
        """Replace a lost node by another one."""
        if self._whole is not None:
            self._whole.take(lost, by)
        self._held = {
            by.id if name == lost else name: replace(one, node=by) if name == lost else one
            for name, one in self._held.items()
        }


def taking_part(alive: Sequence[Any], wanted: NodeOptions) -> list[Assignment]:
    """Return the nodes that take part, like `assigned`; log a warning about ranks given for nodes that are not alive."""
    nodes = assigned(alive, wanted)
    absent = unknown_ranks(alive, wanted)
    if absent:
        _log.warning("ranks are given for %s: no such node is alive", ", ".join(absent))
    return nodes


def shares(plan: WarmPlanFile, nodes: Sequence[Assignment]) -> dict[str, Share]:
    """Return the share of a plan that each node should hold, by node id."""
    return {
        one.node.id: Share(*plan.share(one.ranks), None if one.ranks is None else format_ranks(one.ranks))
        for one in nodes
    }


def unassigned_chunks(plan: WarmPlanFile, nodes: Sequence[Assignment]) -> int:
    """Count the chunks of a plan that no node gets; log a warning if there are any.

    Raises:
        NothingToDoError: No node gets any chunk.
    """
    count = sum(
        chunks for worker, (chunks, _) in plan.shares.items() if not any(is_for(worker, one.ranks) for one in nodes)
    )
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


def parts_of(nodes: Sequence[Assignment], plan: WarmPlanFile) -> dict[frozenset[str], PlanPart]:
    """Split a plan into parts by the set of nodes that get the chunks; chunks that no node gets are in no part."""
    workers: defaultdict[frozenset[str], set[int | None]] = defaultdict(set)
    for worker in plan.shares:
        workers[frozenset(one.node.id for one in nodes if is_for(worker, one.ranks))].add(worker)
    return {names: PlanPart(plan, chosen) for names, chosen in workers.items() if names}
