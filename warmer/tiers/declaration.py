"""A directory tier as the engine's configuration declares it: read on the driver, opened on the nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import ClassicKey
from warmer.tiers import place as places
from warmer.tiers.file_names import file_name, unambiguous
from warmer.tiers.options import TierOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.keys import Key
    from warmer.tiers.header import HeaderFormat
    from warmer.tiers.place import Place


@dataclass(frozen=True, slots=True)
class Layout:
    """What a chunk's file holds, and which chunks there are.

    Attributes:
        takes: The kind of key.
        header: What stands before a chunk's bytes; None for nothing.
        alignment: A file is a multiple of that many bytes, zeros at its end.
        mode: With which LMCache makes its own files, less the umask.
    """

    takes: type[Key] = ClassicKey
    header: HeaderFormat | None = None
    alignment: int = 1
    mode: int = 0o666

    def stored(self, size: int) -> int:
        """Bytes of the file of a chunk."""
        head = self.header.size if self.header else 0
        return -(-(head + size) // self.alignment) * self.alignment

    def head(self, key: Key, size: int) -> bytes:
        """What stands before the bytes of a chunk in its file; nothing where files hold these alone."""
        return self.header.bytes_for(key, size) if self.header and isinstance(key, ClassicKey) else b""

    def content(self, stored: int) -> int | None:
        """Bytes of the chunk in a file, padding included; None when it is too short to be one."""
        size = stored - (self.header.size if self.header else 0)
        return size if size >= 0 else None


@dataclass(frozen=True, slots=True)
class DirectoryDeclaration:
    """A tier of files in one or more directories.

    Attributes:
        name: For people: the plugin's name, or the adapter's type and path.
        base_paths: The directories, which may hold placeholders; several share the chunks out by their hash.
        layout: What the files hold.
        options: How it is filled.
    """

    name: str
    base_paths: tuple[Path, ...]
    layout: Layout = Layout()
    options: TierOptions = field(default_factory=TierOptions)

    @property
    def takes(self) -> type[Key]:
        """The kind of key that the tier takes."""
        return self.layout.takes

    def at(self, place: Place) -> DirectoryDeclaration:
        """The same on one node, without placeholders.

        Raises:
            ConfigError: The node has no value for one.
        """
        paths = tuple(Path(place.expand(str(path))) for path in self.base_paths)
        return DirectoryDeclaration(self.name, paths, self.layout, self.options)

    def file(self, text: str) -> Path:
        """The file of a chunk.

        Raises:
            KeyFormatError: The text is no key of the tier's kind, or another key has the same file.
        """
        key = unambiguous(text, self.takes)
        return self.directory(key) / file_name(key)

    def directory(self, key: Key) -> Path:
        """The directory in which LMCache looks for a chunk."""
        if len(self.base_paths) == 1:
            return self.base_paths[0]
        return self.base_paths[abs(int(key.chunk_hash, 16)) % len(self.base_paths)]


def absolute_paths(tier: str, setting: str, values: Sequence[str]) -> tuple[Path, ...]:
    """Directories that mean the same to every process of a node.

    Args:
        tier: Names it in errors.
        setting: Where the paths were found, for errors.
        values: The paths.

    Raises:
        ConfigError: One is not absolute, or holds an unknown placeholder.
    """
    for value in values:
        if not Path(value).is_absolute():
            raise ConfigError(
                f"tier {tier!r}: {setting} has {value!r}, which is not absolute: engines and the warmer run in "
                "different directories and would not mean the same one"
            )
        places.check(value)
    return tuple(Path(value) for value in values)
