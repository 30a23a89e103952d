"""Content of a node's tiers: found, hashed if requested, and repaired where it is wrong. Plain Python."""

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
"""Chunks remembered as having the right hash: a batch is looked up several times, but hashed once."""


class Holdings:
    """Which chunks a node's tier holds, and which chunks were found to be wrong on the node. Thread-safe.

    Args:
        tier: Tier that is filled.
        verify: Whether to hash present files; otherwise a file of the right length is assumed to be right.
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
        """Return the state of chunks in the tier, in order; None for a chunk that is absent or has wrong content."""
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
        """Return the identity of a chunk's file, without its time, which each lookup updates."""
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
        """Record that an earlier tier holds wrong content in the place of a chunk."""
        with self._lock:
            self._earlier.setdefault(key, []).append(tier)

    def wrong_about(self, key: str) -> str:
        """Describe what is known to be wrong in this node's tiers in the place of a chunk; empty if nothing is."""
        names = [tier.name for tier in self._earlier.get(key, ())]
        return "; ".join(filter(None, [self._own.get(key, ""), *(_held_wrongly(name) for name in names)]))

    def settled(self, chunk: ChunkRef, name: str) -> tuple[str, ...]:
        """Record that a right chunk was published in the filled tier; return the tier's name if it held wrong content."""
        return (name,) if self._own.pop(chunk.key, "") else ()

    def repair(self, chunk: ChunkRef, content: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Replace wrong content in the earlier tiers with a right chunk.

        Args:
            chunk: Right chunk.
            content: File that holds exactly the chunk's bytes.

        Returns:
            The names of the repaired tiers, and the reasons why other tiers were not repaired.
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
