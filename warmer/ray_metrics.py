"""Metrics of a command on a Ray cluster, which each node's metrics agent serves with the prefix `ray_`.

Needs no cluster to be made, and one that is joined to go anywhere. What is counted reaches the agent every few seconds
(`RAY_metrics_report_interval_ms`), and once more when the cluster is left (`ray.shutdown`), so that a command of a second
is told as well. The agent goes on serving counters afterwards; gauges of a process that has ended it drops in half a minute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ray.util.metrics import Counter

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX: Final = "ray_"
"""What Ray puts before each name; and `_total` after those of counters."""


class CountedBytes:
    """How many things there were, and of how many bytes: two counters with the same tags.

    Args:
        things: The name of the first.
        bytes_name: The name of the second.
        what: The things, in words.
        tags: Names of the tags.
    """

    def __init__(self, things: str, bytes_name: str, what: str, tags: tuple[str, ...]) -> None:
        self._things = Counter(things, what, tags)
        self._bytes = Counter(bytes_name, f"{what}: their bytes", tags)

    def add(self, count: int, size: int, tags: Mapping[str, str]) -> None:
        """Count some; none and no bytes are counted as nothing.

        Args:
            count: How many.
            size: Their bytes.
            tags: A value for each.
        """
        if count:
            self._things.inc(count, dict(tags))
        if size:
            self._bytes.inc(size, dict(tags))
