"""Other names for copies: the start of a key is rewritten, and the result has to be a key of the same chunk. Pure.

What two chunks would be called after is found by `Names`, in memory that does not grow with their number.
"""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from hfbucket_plugin.errors import ConfigError, KeyFormatError, RefusedError
from hfbucket_plugin.keys import is_probe, parse_key

if TYPE_CHECKING:
    from collections.abc import Sequence

_DIGEST_BYTES: Final = 16
_CACHE_KIB: Final = 16 * 1024


class RenameError(RefusedError):
    """A copy cannot have the name that it would get: nothing is copied."""


@dataclass(frozen=True, slots=True)
class Rename:
    """One rule.

    Attributes:
        old: The start of a key.
        new: What takes its place.
    """

    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old}={self.new}"


@dataclass(frozen=True, slots=True)
class Renames:
    """Rules, the first that matches a key decides. Without any, every key stays as it is.

    Attributes:
        rules: In their order.
    """

    rules: tuple[Rename, ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Renames:
        """Read `old-model@=new-model@`, several of them.

        Raises:
            ConfigError: One is no such text, or two begin alike, so that the second would never be asked.
        """
        rules: list[Rename] = []
        for text in texts:
            old, found, new = text.partition("=")
            if not found or not old or not new or old == new or "=" in new:
                raise ConfigError(f"--rename {text!r}: must read OLD=NEW, two different starts of keys without '='")
            for rule in rules:
                if old.startswith(rule.old):
                    raise ConfigError(f"--rename {text!r} comes after {str(rule)!r}, which takes all of its keys")
            rules.append(Rename(old, new))
        return cls(tuple(rules))

    def texts(self) -> list[str]:
        """What `parse` reads."""
        return [str(rule) for rule in self.rules]

    def __call__(self, key: str) -> str:
        """The key of the copy of a chunk.

        Raises:
            RenameError: That would be no key, one of another kind or chunk, or LMCache's probe.
        """
        rule = next((rule for rule in self.rules if key.startswith(rule.old)), None)
        if rule is None:
            return key
        renamed = rule.new + key.removeprefix(rule.old)
        try:
            before, after = parse_key(key), parse_key(renamed)
        except KeyFormatError as error:
            raise RenameError(f"--rename {str(rule)!r}: {error}; nothing is copied. Mend the rule") from None
        if type(before) is not type(after) or before.chunk_hash != after.chunk_hash or is_probe(renamed):
            raise RenameError(
                f"--rename {str(rule)!r} would make {renamed!r} of {key!r}, which names another chunk or none; nothing is "
                "copied. Rewrite what stands before the hash, and keep its number of '@'"
            )
        return renamed


class Names:
    """Which names were given so far, as digests in a temporary file. Use it as a context manager.

    Args:
        directory: Where the file is made; None for the system's directory of temporary files.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="names-", dir=directory)
        self._base = sqlite3.connect(Path(self._directory.name, "names.sqlite"), isolation_level=None)
        self._base.executescript(
            f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -{_CACHE_KIB};"
            "CREATE TABLE names (digest BLOB PRIMARY KEY, key TEXT) WITHOUT ROWID; BEGIN"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()
        self._directory.cleanup()

    def give(self, name: str, key: str) -> None:
        """Give a name to the copy of a chunk.

        Raises:
            RenameError: Another chunk's copy has it.
        """
        digest = blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest()
        added = self._base.execute("INSERT OR IGNORE INTO names VALUES (?, ?)", (digest, key)).rowcount
        if added:
            return
        (other,) = self._base.execute("SELECT key FROM names WHERE digest = ?", (digest,)).fetchone()
        if other != key:  # a listing that shifted under its pages names a chunk twice
            raise RenameError(
                f"--rename: the copies of {other!r} and of {key!r} would both be {name!r}; nothing is copied. Mend the "
                "rules, or choose one of the two"
            )
