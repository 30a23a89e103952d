"""An instance's bucket as what reads and writes chunks uses it: with its settings, its circuit breakers, and reads first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.concurrency import ReadPriority
    from hfbucket_plugin.core.files import TempDir
    from hfbucket_plugin.hub.bucket import Bucket
    from hfbucket_plugin.hub.circuit_breaker import CircuitBreakers


@dataclass(frozen=True, slots=True)
class GuardedBucket:
    """One instance's bucket.

    Attributes:
        bucket: The client; its deadlines, retries and rate limit are its own.
        settings: The instance's.
        instance: Its name, for errors and metrics.
        breakers: Of lookups, reads and writes.
        read_priority: Counts the reads in progress, so that writes let them go first.
        temp_dir: Space for hashing.
    """

    bucket: Bucket
    settings: InstanceSettings
    instance: str
    breakers: CircuitBreakers
    read_priority: ReadPriority
    temp_dir: TempDir
