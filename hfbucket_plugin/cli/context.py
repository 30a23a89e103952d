"""Context of the checks of one instance."""

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
    """Shared state of the checks of one instance.

    Attributes:
        named: The instance.
        bucket: Client of its bucket.
        timeout_secs: Timeout of each request.
        environ: Environment that contains the instance's token.
        now: Current time in Unix seconds.
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
        """Make one request, and wait for it until its deadline.

        Raises:
            HFBucketError: If the request fails, or is not answered in time.
        """
        return call_with_deadline(what, function, self.timeout_secs)
