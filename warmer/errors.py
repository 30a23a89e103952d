"""The warmer's own errors, beside those of `hfbucket_plugin.errors`: the same base, the same stable `kind`."""

from __future__ import annotations

import errno
import sqlite3
import tempfile
import traceback
from pathlib import Path
from typing import Final

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


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def local_trouble(error: Exception) -> str:
    """What this machine lacks, or a fault of our own, in one line and never as a traceback; empty for errors of ours."""
    if isinstance(error, HFBucketError):
        return ""
    if isinstance(error, MemoryError):
        return "there was not enough memory: stop others, or raise the limit of this process"
    if isinstance(error, (OSError, sqlite3.Error)):  # no room for a plan, or it went away
        return f"a file of this machine failed: {error}{_advice(error)}"
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in where)
    return f"this is a fault of the command itself; please report it: {type(error).__name__}{place}: {error}"


def _advice(error: Exception) -> str:
    """What to do where there is no directory for temporary files, or no room in it, which is said in words alone."""
    if "temporary directory" in str(error):
        return "; set TMPDIR to a directory that can be written"
    named = isinstance(error, OSError) and error.filename is not None
    full = isinstance(error, sqlite3.Error) or (isinstance(error, OSError) and error.errno in _FULL)
    if named or not full:
        return ""
    return (
        f"; temporary files go to {tempfile.gettempdir()!r}, or to download_tmp_dir of the instance: make room there, or set "
        "TMPDIR to another directory"
    )
