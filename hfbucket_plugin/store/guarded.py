"""Access to an instance's bucket for chunk reads and writes, with settings, circuit breakers and read priority."""

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
    """Bucket of one instance, with what its readers and writers share.

    Attributes:
        bucket: Client of the bucket, with its own deadlines, retries and rate limit.
        settings: Settings of the instance.
        instance: Name of the instance, for errors and metrics.
        breakers: Circuit breakers of lookups, reads and writes.
        read_priority: Counter of reads in progress, for which writes wait.
        temp_dir: Temporary space for hashing.
    """

    bucket: Bucket
    settings: InstanceSettings
    instance: str
    breakers: CircuitBreakers
    read_priority: ReadPriority
    temp_dir: TempDir
