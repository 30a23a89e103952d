"""Check of one node's tier, without writing: which chunks are right, wrong or missing. Plain Python."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from hfbucket_plugin.core.keys import parse_key
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.transfer import xet_hashes
from warmer.node.reuse import open_chunk
from warmer.report.outcomes import INTERRUPTED, Failed, Missing, Right, TierError, Wrong

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.tools.selection import ChunkRef
    from warmer.report.outcomes import Outcome
    from warmer.tiers import Declaration, NodeInfo

_PIECE: Final = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """Configuration of a node for a check. It names no bucket, because the plan determines what is right.

    Attributes:
        tier: Declaration of the tier to check.
        hashes: Whether to hash contents; otherwise a file of the right length is assumed to be right.
    """

    tier: Declaration
    hashes: bool = True

    def open(self, place: NodeInfo) -> NodeChecker:
        """Open the checker of a node; runs on that node.

        Raises:
            ConfigError: This node has no value for a placeholder in a path.
        """
        return NodeChecker(self.tier.at(place), hashes=self.hashes)


class NodeChecker:
    """Work of one node in a check. Thread-safe.

    Args:
        declaration: Declaration of the tier, without placeholders. Its directories need not exist.
        hashes: See `CheckConfig`.
    """

    def __init__(self, declaration: Declaration, *, hashes: bool = True) -> None:
        self._declaration = declaration
        self._hashes = hashes
        self._stopped = threading.Event()

    def copy(self, chunks: Sequence[ChunkRef]) -> list[Outcome]:
        """Check chunks; named for the protocol of node workers, as nothing is copied.

        A failure of a single chunk does not raise.

        Returns:
            The finding for each chunk, in order.
        """
        with contextlib.ExitStack() as opened:
            looks = [self._look(chunk, opened) for chunk in chunks]
            self._hash([look for look in looks if look.path is not None])
        return [look.outcome for look in looks]

    def _look(self, chunk: ChunkRef, opened: contextlib.ExitStack) -> _Look:
        look = _Look(chunk, Right(chunk.key, chunk.size))
        if self._stopped.is_set():
            look.outcome = Failed(chunk.key, chunk.size, INTERRUPTED, f"{chunk.key}: the check was told to stop")
            return look
        with look.failing():
            wrong = self._wrong_outside(chunk)
            if wrong is not None:
                look.is_wrong(wrong)
            elif self._hashes:
                self._look_inside(look, opened)
        return look

    def _wrong_outside(self, chunk: ChunkRef) -> str | None:
        """Return what is wrong with a chunk's file, as far as this shows without reading the file."""
        found, stored = self._declaration.file(chunk.key).stat(), self._declaration.layout.stored(chunk.size)
        if not stat.S_ISREG(found.st_mode):
            return "what lies there is no file"
        return None if found.st_size == stored else f"its file has {found.st_size} bytes, not {stored}"

    def _look_inside(self, look: _Look, opened: contextlib.ExitStack) -> None:
        chunk, layout = look.chunk, self._declaration.layout
        file, header = self._declaration.file(chunk.key), layout.head(parse_key(chunk.key), chunk.size)
        source = opened.enter_context(open_chunk(file, follow=True))
        if source.read(len(header)) != header:
            look.is_wrong("its header is not that of this chunk")
            return
        whole = layout.stored(chunk.size) == chunk.size
        # By descriptor: the owner of the tier may replace the file by one on which a reader would block.
        content = Path(f"/proc/self/fd/{source.fileno()}")
        look.path = content if whole else opened.enter_context(_content(source, chunk.size))

    @staticmethod
    def _hash(looks: list[_Look]) -> None:
        """Hash all files in one call, which is faster; one by one if one of them cannot be read."""
        paths = [look.path for look in looks if look.path is not None]
        try:
            hashes = xet_hashes(paths) if paths else []
        except (OSError, RuntimeError):
            for look in looks:
                with look.failing():
                    look.has(_hash_of(look.path))
            return
        for look, actual in zip(looks, hashes, strict=True):
            look.has(actual)

    def stop(self) -> None:
        """Stop checking chunks."""
        self._stopped.set()

    def close(self) -> None:
        """Do nothing: a check leaves no files behind."""
        self.stop()


def _hash_of(path: Path | None) -> str:
    if path is None:
        raise ValueError("nothing to hash")
    try:
        return xet_hashes([path])[0]
    except (OSError, RuntimeError):
        path.stat()  # raises if the file is gone, which the hasher's errors do not show
        raise


@dataclass(slots=True)
class _Look:
    """State of one chunk that is checked.

    Attributes:
        chunk: Chunk to check.
        outcome: Finding so far.
        path: File with exactly the chunk's bytes, if they are to be hashed.
    """

    chunk: ChunkRef
    outcome: Outcome
    path: Path | None = None

    def is_wrong(self, reason: str) -> None:
        self.outcome = Wrong(self.chunk.key, self.chunk.size, f"{self.chunk.key}: {reason}")

    def has(self, actual: str) -> None:
        if actual != self.chunk.xet_hash:
            self.is_wrong(f"it has the hash {actual}, the plan says {self.chunk.xet_hash}")

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Record an error in the block as this chunk's finding."""
        key, size = self.chunk.key, self.chunk.size
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            self.outcome = Missing(key, size)
        except HFBucketError as error:
            self.outcome = Failed(key, size, error.kind, str(error))
        except (OSError, ValueError, RuntimeError) as error:
            self.outcome = Failed(key, size, TierError.kind, f"{key}: it cannot be looked at: {error}")


@contextlib.contextmanager
def _content(source: BinaryIO, size: int) -> Iterator[Path]:
    """Provide the chunk's bytes as an in-memory file for the hasher, without the padding and the header, which was read."""
    descriptor = os.memfd_create("hfbucket-check")
    try:
        left = size
        while left and (piece := source.read(min(left, _PIECE))):
            left -= len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
