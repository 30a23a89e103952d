"""Outcomes of chunks and the errors of the warmer."""

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
"""The kind of a chunk that was given up because the run was told to stop: neither there nor failed."""

NODE_LOST: Final = "node_lost"
"""The kind of a chunk whose node was lost before it ended there."""

NODE_START: Final = "node_start"
"""The kind of a chunk whose node never took part."""

MISSING: Final = "missing"
"""The kind of a chunk that the bucket holds no longer."""

NO_ROOM: Final = "no_room"
"""The kind of a chunk for which a tier had no room."""

ENGINE: Final = "engine"
"""The kind of a chunk that an engine did not take: it was not there in time, or did not load it."""

TIER_KINDS: Final = frozenset({"tier", NO_ROOM, "key", ENGINE})
"""The kinds of chunks that a node's own tier did not take."""

UNMOVED_KINDS: Final = frozenset({MISSING, NO_ROOM, "key"})
"""The kinds of chunks of which no byte was asked for."""

INTERNAL: Final = "internal"
"""The kind of a chunk that failed for a reason that nobody foresaw; the message has it."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a chunk ended on a node.

    Attributes:
        key: Its key string.
        size: Bytes that it has, or should have.
    """

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Copied(_Ended):
    """The chunk was moved, verified, and is in the tier.

    Attributes:
        received: Whether it came from another node, and not from the Hub.
        reused: Whether it came from another tier of the same node, and neither from the Hub nor from another node.
        seconds: From when its node turned to it until it was in the tier, by the clock of that node.
        asked: Bytes that the Hub was asked for, each try counted; None where nobody counted.
        repaired: The tiers of the node in whose place of it something else was found, which is right now.
        left: Why something else is still in its place in other tiers of the node.
    """

    received: bool = False
    reused: bool = False
    seconds: float = field(default=0.0, compare=False)
    asked: int | None = field(default=None, compare=False)
    repaired: tuple[str, ...] = field(default=(), compare=False)
    left: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Present(_Ended):
    """The tier held the chunk already, at the right size."""


@dataclass(frozen=True, slots=True)
class Failed(_Ended):
    """The chunk is not in the tier.

    Attributes:
        kind: The `kind` of the error, or one of this module's.
        message: What was wrong, in words.
        asked: Bytes that the Hub was asked for, each try counted; None where nobody counted.
    """

    kind: str
    message: str
    asked: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Right(_Ended):
    """A check found the chunk in the tier, as the plan has it."""


@dataclass(frozen=True, slots=True)
class Wrong(_Ended):
    """A check found something else in the chunk's place: an engine would serve it, or stumble over it.

    Attributes:
        message: What is wrong with it.
    """

    message: str


@dataclass(frozen=True, slots=True)
class Missing(_Ended):
    """A check found nothing in the chunk's place."""


Outcome = Copied | Present | Failed | Right | Wrong | Missing


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
