"""Who takes part in a run, and who takes the place of whom. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfbucket_plugin.errors import ConfigError
from warmer.nodes import eligible, ranks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from warmer.cluster import Node
    from warmer.nodes import Assigned
    from warmer.warmup import Nodes


class Places:
    """The nodes of a run. A lost one's place may be taken by one that joins, which is then to have all its chunks.

    Args:
        nodes: Who takes part at first.
        wanted: What was said of nodes; it holds for those that join, too.
    """

    def __init__(self, nodes: Sequence[Assigned], wanted: Nodes) -> None:
        self._held = {one.node.id: one for one in nodes}
        self._wanted = wanted
        self._whole: Places | None = None

    @property
    def nodes(self) -> list[Assigned]:
        """Who takes part now; a lost one whose place nobody took does."""
        return list(self._held.values())

    def having(self, nodes: Sequence[Assigned]) -> Places:
        """Some of these places, with the workers that their nodes turned out to have; who is replaced there is so here too."""
        some = Places(nodes, self._wanted)
        some._whole = self
        return some

    def candidates(self, alive: Sequence[Node]) -> list[Node]:
        """Those among some nodes that may take part. First those that take certain workers' chunks: others fit anywhere."""
        return sorted(eligible(alive, self._wanted), key=lambda node: self._ranks(node) is None)

    def _ranks(self, node: Node) -> frozenset[int] | None:
        """Whose chunks a node says that it takes; None for all, or where it cannot be read."""
        try:
            return ranks_of(node, self._wanted)
        except ConfigError:
            return None

    def fits(self, lost: str, node: Node) -> bool:
        """Whether a node may take the place of a lost one: it takes the same workers' chunks, or does not say whose."""
        try:
            ranks = ranks_of(node, self._wanted)
        except ConfigError:
            return False
        return ranks is None or ranks == self._held[lost].ranks

    def take(self, lost: str, by: Node) -> None:
        """A node takes the place of a lost one."""
        if self._whole is not None:
            self._whole.take(lost, by)
        self._held = {
            by.id if name == lost else name: replace(one, node=by) if name == lost else one
            for name, one in self._held.items()
        }
