"""One instance under examination."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from hfbucket_plugin.core.concurrency import bounded
from hfbucket_plugin.core.telemetry import Tally
from hfbucket_plugin.hub.connect import open_bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from hfbucket_plugin.config.instances import NamedInstance
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.hub.bucket import Bucket

_T = TypeVar("_T")


@dataclass(frozen=True)
class Case:
    """What the checks of one instance share.

    Attributes:
        named: The instance.
        bucket: The door to its bucket.
        timeout_secs: What each request may take.
        environ: The environment that the instance's token is taken from.
        now: Unix seconds.
    """

    named: NamedInstance
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
        return bounded(what, function, self.timeout_secs)


@contextlib.contextmanager
def opened(named: NamedInstance, timeout_secs: float, *, few_calls: bool = False) -> Iterator[Bucket]:
    """The door to an instance's bucket, closed at the end.

    Args:
        named: The instance.
        timeout_secs: Most seconds of a request. hf_xet's own patience follows the deadlines of an instance.
        few_calls: Whether no more than some dozen calls will be made: `max_hub_calls_per_minute`, which keeps engines
            from using a quota up, is then not heeded.
    """
    own: dict[str, Any] = {"put_timeout_secs": timeout_secs}
    if few_calls:
        own["max_hub_calls_per_minute"] = None
    settings = named.settings.model_copy(update=own)
    bucket = open_bucket(settings, named.name, Tally(), timeout_secs)
    try:
        yield bucket
    finally:
        bucket.close()
