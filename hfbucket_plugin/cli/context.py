"""One instance under examination."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from hfbucket_plugin.core.concurrency import call_with_deadline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.hub.bucket import Bucket

_T = TypeVar("_T")


@dataclass(frozen=True)
class CheckContext:
    """What the checks of one instance share.

    Attributes:
        named: The instance.
        bucket: The client of its bucket.
        timeout_secs: What each request may take.
        environ: The environment that the instance's token is taken from.
        now: Unix seconds.
    """

    named: InstanceConfig
    bucket: Bucket = field(repr=False)
    timeout_secs: float
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    now: Callable[[], float] = time.time

    @property
    def settings(self) -> InstanceSettings:
        """The instance's settings."""
        return self.named.settings

    def ask(self, what: str, function: Callable[[Deadline], _T]) -> _T:
        """Make one request, and wait for it up to the deadline.

        Raises:
            HFBucketError: It failed, or there was no answer in time.
        """
        return call_with_deadline(what, function, self.timeout_secs)
