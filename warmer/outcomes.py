"""How a chunk ended on a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

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
class Copied:
    """The chunk was moved, verified, and is in the tier.

    Attributes:
        key: Its key string.
        size: Bytes.
        received: Whether it came from another node, and not from the Hub.
        reused: Whether it came from another tier of the same node, and neither from the Hub nor from another node.
        seconds: From when its node turned to it until it was in the tier, by the clock of that node.
        asked: Bytes that the Hub was asked for, each try counted; None where nobody counted.
        repaired: The tiers of the node in whose place of it something else was found, which is right now.
        left: Why something else is still in its place in other tiers of the node.
    """

    key: str
    size: int
    received: bool = False
    reused: bool = False
    seconds: float = field(default=0.0, compare=False)
    asked: int | None = field(default=None, compare=False)
    repaired: tuple[str, ...] = field(default=(), compare=False)
    left: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Present:
    """The tier held the chunk already, at the right size.

    Attributes:
        key: Its key string.
        size: Bytes.
    """

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The chunk is not in the tier.

    Attributes:
        key: Its key string.
        size: Bytes.
        kind: The `kind` of the error, or one of this module's.
        message: What was wrong, in words.
        asked: Bytes that the Hub was asked for, each try counted; None where nobody counted.
    """

    key: str
    size: int
    kind: str
    message: str
    asked: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Right:
    """A check found the chunk in the tier, as the plan has it.

    Attributes:
        key: Its key string.
        size: Bytes.
    """

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Wrong:
    """A check found something else in the chunk's place: an engine would serve it, or stumble over it.

    Attributes:
        key: Its key string.
        size: Bytes that the chunk should have.
        message: What is wrong with it.
    """

    key: str
    size: int
    message: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A check found nothing in the chunk's place.

    Attributes:
        key: Its key string.
        size: Bytes that the chunk should have.
    """

    key: str
    size: int


Outcome = Copied | Present | Failed | Right | Wrong | Missing
