"""Outcomes of chunks, and errors of the warmer."""

from __future__ import annotations

import errno
import sqlite3
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hfbucket_plugin.errors import HFBucketError, RefusedError

INTERRUPTED: Final = "interrupted"
"""Kind of a chunk that was given up because the run was stopped: neither present nor failed."""

NODE_LOST: Final = "node_lost"
"""Kind of a chunk whose node was lost before the chunk ended."""

NODE_START: Final = "node_start"
"""Kind of a chunk whose node never took part."""

MISSING: Final = "missing"
"""Kind of a chunk that the bucket no longer holds."""

NO_ROOM: Final = "no_room"
"""Kind of a chunk for which a tier had no room."""

ENGINE: Final = "engine"
"""Kind of a chunk whose engine did not answer in time, or did not load the chunk."""

TIER_KINDS: Final = frozenset({"tier", NO_ROOM, "key", ENGINE})
"""Kinds of chunks that a node's own tier did not accept."""

UNMOVED_KINDS: Final = frozenset({MISSING, NO_ROOM, "key"})
"""Kinds of chunks for which no bytes were requested."""

INTERNAL: Final = "internal"
"""Kind of a chunk that failed for an unexpected reason, which the message contains."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """Outcome of a chunk on a node.

    Attributes:
        key: Key string of the chunk.
        size: Actual or expected size in bytes.
    """

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Copied(_Ended):
    """The chunk was moved, verified, and is in the tier.

    Attributes:
        received: Whether the chunk came from another node, not from the Hub.
        reused: Whether the chunk came from another tier of the same node, not from the Hub or another node.
        seconds: Seconds from the node's first work on the chunk until it was in the tier, by the node's clock.
        asked: Bytes requested from the Hub, retries included; None if not counted.
        repaired: Tiers of the node that held other content in the chunk's place and are right now.
        left: Reasons why other tiers of the node still hold other content in the chunk's place.
    """

    received: bool = False
    reused: bool = False
    seconds: float = field(default=0.0, compare=False)
    asked: int | None = field(default=None, compare=False)
    repaired: tuple[str, ...] = field(default=(), compare=False)
    left: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Present(_Ended):
    """The tier already held the chunk with the right size."""


@dataclass(frozen=True, slots=True)
class Failed(_Ended):
    """The chunk is not in the tier.

    Attributes:
        kind: `kind` of the error, or one of this module's kinds.
        message: Reason in words.
        asked: Bytes requested from the Hub, retries included; None if not counted.
    """

    kind: str
    message: str
    asked: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Right(_Ended):
    """A check found the chunk in the tier as planned."""


@dataclass(frozen=True, slots=True)
class Wrong(_Ended):
    """A check found other content in the chunk's place, which an engine would serve or fail on.

    Attributes:
        message: What is wrong with the content.
    """

    message: str


@dataclass(frozen=True, slots=True)
class Missing(_Ended):
    """A check found no content in the chunk's place."""


Outcome = Copied | Present | Failed | Right | Wrong | Missing


class TierError(HFBucketError, OSError):
    """A local tier could not be read or written, for example because of permissions or a missing disk."""

    kind = "tier"


class TierFullError(TierError):
    """A local tier has no room for a chunk: because of its budget, its floor of free space, or its disk."""

    kind = NO_ROOM


class PlanLostError(HFBucketError):
    """A plan, or a file of prompts, became unreadable during a run."""

    kind = "plan"


class EngineError(HFBucketError, ConnectionError):
    """An engine, or the `lmcache server` of a node, does not answer or fails to execute a request."""

    kind = ENGINE


class ClusterError(HFBucketError, ConnectionError):
    """The configured Ray cluster does not answer, or denies access."""

    kind = "cluster"


class NothingToDoError(RefusedError):
    """No selected chunk fits the tiers, or there is no node to take part."""


_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def local_trouble(error: Exception) -> str:
    """Describe a local resource problem or an internal error in one line, without a traceback; empty for known errors."""
    if isinstance(error, HFBucketError):
        return ""
    if isinstance(error, MemoryError):
        return "there was not enough memory: stop others, or raise the limit of this process"
    if isinstance(error, (OSError, sqlite3.Error)):  # for example, a plan has no room or was removed
        return f"a file of this machine failed: {error}{_advice(error)}"
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f" at {Path(frame.filename).name}:{frame.lineno}" for frame in where)
    return f"this is a fault of the command itself; please report it: {type(error).__name__}{place}: {error}"


def _advice(error: Exception) -> str:
    """Return advice if the directory for temporary files is missing or full, which only the error's message shows."""
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
