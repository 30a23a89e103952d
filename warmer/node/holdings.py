"""What a node's tiers hold: looked at, hashed where that was asked for, and put right where it is something else. Plain Python."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import HFBucketError
from warmer.check.node import NodeChecker
from warmer.report.outcomes import Failed, Present, Right, Wrong
from warmer.tiers.directory import DirectoryTier

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.node.reuse import EarlierTier
    from warmer.tiers import Tier

_REMEMBERED: Final = 4096
"""Chunks whose hash is known to be right: a batch is looked at several times, and hashed once."""


class Holdings:
    """What one node's tier holds of some chunks, and what was found wrong on this node. May be used by several threads.

    Args:
        tier: The tier that is filled.
        verify: Whether what is there is hashed; otherwise a file of the right length is taken for right.
    """

    def __init__(self, tier: Tier, *, verify: bool = False) -> None:
        self._tier = tier
        self._directories = tier if verify and isinstance(tier, DirectoryTier) else None
        self._checker = None if self._directories is None else NodeChecker(self._directories.declaration)
        self._right: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._own: dict[str, str] = {}
        self._earlier: dict[str, list[EarlierTier]] = {}
        self._lock = threading.Lock()

    def look(self, chunks: Sequence[ChunkRef]) -> list[Present | Failed | None]:
        """What the tier holds of some chunks, in their order; None for one that is not there, or is something else."""
        found = [self._held(chunk) for chunk in chunks]
        if self._checker is None:
            return found
        unsure = [
            index
            for index, one in enumerate(found)
            if isinstance(one, Present) and self._right.get(chunks[index].key) != self._identity(chunks[index])
        ]
        before = [self._identity(chunks[index]) for index in unsure]
        outcomes = self._checker.copy([chunks[index] for index in unsure])
        for index, identity, outcome in zip(unsure, before, outcomes, strict=True):
            key = chunks[index].key
            if isinstance(outcome, Right):
                self._remember(key, identity)
            else:
                found[index] = outcome if isinstance(outcome, Failed) else None
            if isinstance(outcome, Wrong):
                self._own[key] = outcome.message
        return found

    def _held(self, chunk: ChunkRef) -> Present | Failed | None:
        try:
            return Present(chunk.key, chunk.size) if self._tier.holds(chunk.key, chunk.size) else None
        except HFBucketError as error:
            return Failed(chunk.key, chunk.size, error.kind, str(error))

    def _identity(self, chunk: ChunkRef) -> tuple[int, int] | None:
        """Which file it is. Not by its time, which is that of the last look."""
        if self._directories is not None:
            with contextlib.suppress(OSError, HFBucketError):
                there = self._directories.lstat(self._directories.declaration.file(chunk.key))
                return None if there is None else (there.st_ino, there.st_size)
        return None

    def _remember(self, key: str, identity: tuple[int, int] | None) -> None:
        if identity is None:
            return
        with self._lock:
            self._right[key] = identity
            self._right.move_to_end(key)
            if len(self._right) > _REMEMBERED:
                self._right.popitem(last=False)

    def wrong_in(self, key: str, tier: EarlierTier) -> None:
        """Note that an earlier tier holds something else in the place of a chunk."""
        with self._lock:
            self._earlier.setdefault(key, []).append(tier)

    def wrong_about(self, key: str) -> str:
        """What is known to be wrong in this node's tiers in the place of a chunk, for people; empty for nothing."""
        names = [tier.name for tier in self._earlier.get(key, ())]
        return "; ".join(filter(None, [self._own.get(key, ""), *(_held_wrongly(name) for name in names)]))

    def settled(self, chunk: ChunkRef, name: str) -> tuple[str, ...]:
        """A right chunk has replaced what was in its place in the tier that is filled; returns that tier, where it was wrong."""
        return (name,) if self._own.pop(chunk.key, "") else ()

    def repair(self, chunk: ChunkRef, content: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Put a chunk into the earlier tiers that hold something else in its place.

        Args:
            chunk: Which.
            content: A file with its bytes alone.

        Returns:
            The tiers that are right now; and why others are not.
        """
        with self._lock:
            tiers = self._earlier.pop(chunk.key, [])
        repaired, left = [], []
        for tier in tiers:
            try:
                tier.repair(chunk, content)
                repaired.append(tier.name)
            except HFBucketError as error:
                left.append(f"{_held_wrongly(tier.name)}, and this cannot be repaired: {error}")
        return tuple(repaired), tuple(left)


def _held_wrongly(name: str) -> str:
    return f"tier {name!r} holds something else in its place"
