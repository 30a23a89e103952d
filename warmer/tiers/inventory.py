"""Listing of chunks in LMCache directories, by the names of the files."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, NamedTuple

from hfbucket_plugin.errors import ConfigError
from warmer.tiers.naming import key_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hfbucket_plugin.core.keys import Key
    from warmer.tiers.declare import DirectoryDeclaration


class ChunkFile(NamedTuple):
    """File of a chunk, as listed in a directory.

    Attributes:
        key: Key, derived from the file's name.
        name: Name of the file.
        size: Size of the file in bytes.
        written: Time of the last write, in nanoseconds.
    """

    key: Key
    name: str
    size: int
    written: int


def chunk_files(declaration: DirectoryDeclaration, directory: Path) -> Iterator[ChunkFile]:
    """Yield the chunk files of a tier's directory that are where engines look for them.

    Raises:
        OSError: The directory cannot be read.
    """
    for file in listed(directory):
        if isinstance(file.key, declaration.takes) and declaration.directory(file.key) == directory:
            yield file


def directory_keys(directory: Path) -> Iterator[str]:
    """Yield the key strings of the chunks in a directory of either mode of LMCache.

    Every `-SEP-` in a name is read as `/`, as LMCache reads it. Files whose name is not that of a chunk are skipped.

    Raises:
        ConfigError: The directory cannot be read.
    """
    try:
        for file in listed(directory):
            yield str(file.key)
    except OSError as error:
        raise ConfigError(f"directory {str(directory)!r} cannot be read: {error.strerror}") from None


def listed(directory: Path) -> Iterator[ChunkFile]:
    """Yield the files of a directory whose name is that of a chunk.

    Raises:
        OSError: The directory cannot be read.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            key = key_of(entry.name)
            if key is None:
                continue
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(found.st_mode):
                    yield ChunkFile(key, entry.name, found.st_size, found.st_mtime_ns)
