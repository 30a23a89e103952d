"""Declarations of tiers, read from the configuration of the engine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.core.texts import did_you_mean
from hfbucket_plugin.errors import ConfigError
from warmer.tiers import naming as places
from warmer.tiers.header import HeaderFormat, header_format
from warmer.tiers.naming import file_name, unambiguous

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hfbucket_plugin.config.lmcache_yaml import EngineConfig
    from hfbucket_plugin.core.keys import Key
    from warmer.tiers.naming import NodeInfo


_OWNER: Final = re.compile(r"[^:\s]*(:[^:\s]+)?")
_MODES: Final = 0o777


@dataclass(frozen=True, slots=True)
class TierOptions:
    """Options for filling a directory tier.

    Attributes:
        fsync: Whether files are flushed to the disk before they appear. Off by default: it costs a flush a chunk, and
            guards only against a power failure soon after the run.
        max_bytes: Maximum bytes of the tier's chunk files, including those that were there before; None for no limit.
        min_free_bytes: Bytes that must stay free on the tier's file systems; 0 for no floor.
        evict: Whether the chunk files written longest ago may be removed to make room; never one that this run wrote or
            found right.
        chown: Owner of the files, as `user`, `user:group`, `:group`, by name or number. None: the owner and group of
            the directory, as far as this process may change them.
        chmod: Mode of the files. None: the mode of the engine's own files, less this process's umask.

    Raises:
        ConfigError: A value is invalid.
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


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Format of a chunk's file, and the kind of its key.

    Attributes:
        takes: Kind of key.
        header: Format of the header before a chunk's bytes; None for no header.
        alignment: Unit of the file size in bytes; files are padded with zeros at the end.
        mode: Mode of the files that LMCache creates, before the umask.
    """

    takes: type[Key] = ClassicKey
    header: HeaderFormat | None = None
    alignment: int = 1
    mode: int = 0o666

    def stored(self, size: int) -> int:
        """Return the file size of a chunk of `size` bytes."""
        head = self.header.size if self.header else 0
        return -(-(head + size) // self.alignment) * self.alignment

    def head(self, key: Key, size: int) -> bytes:
        """Return the header of a chunk; empty if files have none."""
        return self.header.bytes_for(key, size) if self.header and isinstance(key, ClassicKey) else b""

    def content(self, stored: int) -> int | None:
        """Return the bytes of the chunk in a file, padding included; None if the file is too short to be a chunk."""
        size = stored - (self.header.size if self.header else 0)
        return size if size >= 0 else None


@dataclass(frozen=True, slots=True)
class DirectoryDeclaration:
    """A tier of files in one or more directories.

    Attributes:
        name: Name in messages: the plugin's name, or the adapter's type and path.
        base_paths: Directories, which may hold placeholders; chunks are distributed among several by their hash.
        layout: Format of the files.
        options: Options for filling the tier.
    """

    name: str
    base_paths: tuple[Path, ...]
    layout: FileLayout = FileLayout()
    options: TierOptions = field(default_factory=TierOptions)

    @property
    def takes(self) -> type[Key]:
        """Kind of key that the tier accepts."""
        return self.layout.takes

    def at(self, place: NodeInfo) -> DirectoryDeclaration:
        """Return the declaration for one node, with its placeholders replaced.

        Raises:
            ConfigError: The node has no value for a placeholder.
        """
        paths = tuple(Path(place.expand(str(path))) for path in self.base_paths)
        return DirectoryDeclaration(self.name, paths, self.layout, self.options)

    def file(self, text: str) -> Path:
        """Return the path of a chunk's file.

        Raises:
            KeyFormatError: The text is not a key of the tier's kind, or another key has the same file.
        """
        key = unambiguous(text, self.takes)
        return self.directory(key) / file_name(key)

    def directory(self, key: Key) -> Path:
        """Return the directory in which LMCache looks up a chunk."""
        if len(self.base_paths) == 1:
            return self.base_paths[0]
        return self.base_paths[abs(int(key.chunk_hash, 16)) % len(self.base_paths)]


def absolute_paths(tier: str, setting: str, values: Sequence[str]) -> tuple[Path, ...]:
    """Parse directories whose paths mean the same to every process of a node.

    Args:
        tier: Name of the tier, for errors.
        setting: Setting that holds the paths, for errors.
        values: Paths.

    Raises:
        ConfigError: A path is not absolute, or holds an unknown placeholder.
    """
    for value in values:
        if not Path(value).is_absolute():
            raise ConfigError(
                f"tier {tier!r}: {setting} has {value!r}, which is not absolute: engines and the warmer run in "
                "different directories and would not mean the same one"
            )
        places.check(value)
    return tuple(Path(value) for value in values)


def declared_fs(config: EngineConfig, name: str, options: TierOptions) -> DirectoryDeclaration:
    """Read the declaration of an `fs` plugin.

    Raises:
        ConfigError: It names no absolute directory, or its files have headers whose format is not fully configured.
    """
    header = _header(config, name)
    setting = f"remote_storage_plugin.{name}.base_path"
    value = config.plugin_value(name, "base_path")
    if value is None:
        setting, value = f"{setting} (or fs_base_path)", config.extra.get("fs_base_path")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"tier {name!r}: {config.source} lacks {setting}; set it to a directory on the nodes")
    # The connector strips the parts of a list, but not a single path.
    values = [part.strip() for part in value.split(",")] if "," in value else [value]
    paths = absolute_paths(name, setting, values)
    return DirectoryDeclaration(name, paths, FileLayout(ClassicKey, header), options)


def _header(config: EngineConfig, name: str) -> HeaderFormat | None:
    """Return the format of the header before each chunk: LMCache's with `save_chunk_meta`, the connector's default."""
    if config.layerwise:
        raise ConfigError(
            f"tier {name!r}: use_layerwise is on in {config.source}: engines then store each layer by itself, with a "
            "header, and read no whole chunks; set use_layerwise: false, for all engines that share the directory"
        )
    if not config.extra.get("save_chunk_meta", True):
        return None
    shape = config.plugin_value(name, "kv_shape")
    where = f"remote_storage_plugin.{name}."
    if shape is None:
        given = "is on" if "save_chunk_meta" in config.extra else "is not set, and on by default"
        raise ConfigError(
            f"tier {name!r}: extra_config.save_chunk_meta {given} in {config.source}, so engines expect a header with "
            "the shape of the KV in each file, and nothing there tells the shape. Either set save_chunk_meta: false "
            f"below extra_config, for all engines that share the directory, or set {where}kv_shape to "
            '"layers,2,chunk_size,kv_heads,head_size" of one worker (1 instead of 2 for MLA), as the engine logs it in '
            "its metadata"
        )
    return header_format(name, where, shape, config.plugin_value(name, "kv_dtype"))


L1_ALIGNMENT: Final = 4096
"""Default of `--l1-align-bytes` of `lmcache server`, which the JSON does not contain."""

_BESIDE: Final = frozenset({"type", "eviction", "serde", "shared", "affinity_tag", "persist_enabled"})
"""Fields that LMCache reads itself, besides those of the adapter."""

_BUCKETS: Final = frozenset({"hfbucket", "plugin"})
_IMPOSSIBLE: Final = {
    "raw_block": "a raw block device has its index in the server's memory and cannot be filled from outside",
    "dax": "a DAX device has its index in the server's memory and cannot be filled from outside",
    "nixl_store": "NIXL keeps its index in the server's memory and cannot be filled from outside",
    "nixl_store_dynamic": "NIXL names its files by itself, and they cannot be filled from outside",
    "nixl_native": "NIXL keeps its index in the server's memory and cannot be filled from outside",
    "hf3fs": "3FS is written through its own client, and cannot be filled from outside",
    "mock": "the mock adapter lives in the server's memory and cannot be filled from outside",
    "fault_inject": "the fault-injecting adapter is for tests; name the adapter that it wraps",
    "p2p": "p2p reads the memory of other servers, and cannot be filled from outside",
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_Fields = dict[str, tuple["Callable[[Any], bool]", str]]
_FS: Final[_Fields] = {
    "base_path": (_is_path, "a non-empty text"),
    "relative_tmp_dir": (_or_none(_is_text), "a text"),
    "read_ahead_size": (_or_none(_is_positive), "a positive integer"),
    "use_odirect": (_is_flag, "true or false"),
}
_FIELDS: Final[dict[str, _Fields]] = {
    "fs": _FS,
    "fs_native": _FS
    | {
        "relative_tmp_dir": (_is_text, "a text"),
        "num_workers": (_is_positive, "a positive integer"),
        "max_capacity_gb": (_is_size, "a number, 0 or more"),
    },
}


def declared_mp(text: str, options: TierOptions) -> DirectoryDeclaration:
    """Read the JSON of an L2 adapter.

    Raises:
        ConfigError: The text is not the JSON of an adapter, the adapter's type cannot be filled from outside, or a field
            makes that impossible.
    """
    spec = _object(text)
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ConfigError(_no_directory(kind))
    _check(kind, spec)
    if spec.get("serde") is not None:
        raise ConfigError(
            f"tier of type {kind!r}: with serde the server keeps its chunks in another form, and whether the bucket's "
            "objects have that form nothing tells; leave serde out of the local tier"
        )
    name = f"{kind}:{spec['base_path']}"
    odirect = spec.get("use_odirect", False)
    layout = FileLayout(
        takes=MPKey,
        alignment=L1_ALIGNMENT if odirect and kind == "fs_native" else 1,
        mode=0o644 if odirect or kind == "fs_native" else 0o666,
    )
    return DirectoryDeclaration(name, absolute_paths(name, "base_path", [spec["base_path"]]), layout, options)


def _object(text: str) -> dict[str, Any]:
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            "tier: this is no JSON; give the very text that `lmcache server --l2-adapter` takes"
        ) from None
    if not isinstance(spec, dict):
        raise ConfigError('tier: must be a JSON object, such as {"type": "fs", "base_path": "/mnt/nvme/kv"}')
    return spec


def _no_directory(kind: Any) -> str:
    known = "those that can be are fs and fs_native"
    if not isinstance(kind, str):
        return f'tier: the JSON lacks "type", or it is no text; {known}'
    if kind in _IMPOSSIBLE:
        return f"tier of type {kind!r}: {_IMPOSSIBLE[kind]}; {known}"
    if kind in _BUCKETS:
        return f"tier of type {kind!r}: a bucket, or a class of somebody's, is no directory on a node; {known}"
    return f"tier of type {kind!r}: it is not known to be a directory that another process can fill; {known}"


def _check(kind: str, spec: dict[str, Any]) -> None:
    """Check that LMCache would accept the adapter and that all fields are known: a new option may change the file format."""
    fields = _FIELDS[kind]
    problems = []
    for name, value in spec.items():
        if name in fields:
            fits, words = fields[name]
            if not fits(value):
                problems.append(f"{name} must be {words}")
        elif name not in _BESIDE:
            problems.append(f"unknown option {name!r}{did_you_mean(name, [*fields, *_BESIDE], 0.6)}")
    if "base_path" not in spec:
        problems.append("base_path is required")
    temporary = spec.get("relative_tmp_dir")
    if kind == "fs" and isinstance(temporary, str):
        path = PurePosixPath(temporary)
        if path.is_absolute() or ".." in path.parts:
            problems.append("relative_tmp_dir must lie below base_path")
    if problems:
        raise ConfigError(f"tier of type {kind!r}: {'; '.join(problems)}")
