"""What a job on a Ray cluster has done so far, as its metrics `ray_jobs_objects_total` and `ray_jobs_bytes_total`.

They are those of the driver: see `warmer.ray_metrics` for how long they are served. How a run ended is told by its summary
and `--metrics-textfile`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from jobs.guards import Extent
from warmer.ray_metrics import CountedBytes

if TYPE_CHECKING:
    from jobs.batch import Result

_TAGS = ("instance", "outcome")


class RayCounts:
    """Counters of one run.

    Args:
        instance: That is changed.
    """

    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._objects = CountedBytes("jobs_objects", "jobs_bytes", "Objects that a job is done with, by outcome", _TAGS)

    def add(self, result: Result[Any]) -> None:
        """Count what has ended with a try."""
        ended: defaultdict[str, Extent] = defaultdict(Extent)
        for one in result.ended:
            ended[str(one.outcome)] = ended[str(one.outcome)].plus(one.item.size)
        for outcome, extent in ended.items():
            tags = {"instance": self._instance, "outcome": outcome}
            self._objects.add(extent.objects, extent.bytes, tags)
