"""What a user may ask of any directory tier, beside where it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from hfbucket_plugin.errors import ConfigError

_OWNER: Final = re.compile(r"[^:\s]*(:[^:\s]+)?")
_MODES: Final = 0o777


@dataclass(frozen=True, slots=True)
class TierOptions:
    """How a directory tier is filled.

    Attributes:
        fsync: Whether files are forced to the disk before they appear. Off by default: it costs a flush a chunk, and
            guards only against a power failure soon after the run.
        max_bytes: Bytes that the tier's chunk files may take, those that were there before included; None for no bound.
        min_free_bytes: Bytes that are to stay free on its file systems; 0 for no floor.
        evict: Whether the chunk files that were written longest ago may make room. Never one that this run wrote or
            found right.
        chown: Owner of the files, as `user`, `user:group`, `:group`, by name or number. None: the owner and group of
            the directory, as far as this process may give files away.
        chmod: Mode of the files. None: the mode that the engine's own files get, less this process's umask.

    Raises:
        ConfigError: A value is impossible.
    """

    fsync: bool = False
    max_bytes: int | None = None
    min_free_bytes: int = 0
    evict: bool = False
    chown: str | None = None
    chmod: int | None = None

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"max_bytes is {self.max_bytes}: a tier without room for a byte cannot be filled")
        if self.min_free_bytes < 0:
            raise ConfigError(f"min_free_bytes is {self.min_free_bytes}; it is a number of bytes")
        if self.chown is not None and (not self.chown or not _OWNER.fullmatch(self.chown)):
            raise ConfigError(f"chown is {self.chown!r}; it reads user, user:group or :group")
        if self.chmod is not None and not 0 <= self.chmod <= _MODES:
            raise ConfigError(f"chmod is {self.chmod:o}; it is a mode between 000 and 777, in octal")
