"""The warmer's own errors, beside those of `hfbucket_plugin.errors`: the same base, the same stable `kind`."""

from __future__ import annotations

from hfbucket_plugin.errors import HFBucketError, RefusedError
from warmer.outcomes import ENGINE, NO_ROOM


class TierError(HFBucketError, OSError):
    """A local tier could not be read or written: no right, no such disk."""

    kind = "tier"


class TierFullError(TierError):
    """A local tier has no room for a chunk: its budget, its floor of free space, or its disk."""

    kind = NO_ROOM


class PlanLostError(HFBucketError):
    """A plan, or a file of prompts, cannot be read any more in the middle of a run."""

    kind = "plan"


class EngineError(HFBucketError, ConnectionError):
    """An engine, or the `lmcache server` of a node, does not answer, or does not do what it was asked for."""

    kind = ENGINE


class ClusterError(HFBucketError, ConnectionError):
    """The Ray cluster that is configured does not answer, or does not let us in."""

    kind = "cluster"


class NothingToDoError(RefusedError):
    """Nothing is selected that the tiers can take, or no node is there to take it."""


class Interrupted(BaseException):
    """SIGTERM or SIGINT came while there was nothing under way that would have to be ended in order.

    An order and no error: as with KeyboardInterrupt, no handler of errors may eat it.
    """
