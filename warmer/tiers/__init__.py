"""Local tiers that another process can fill, behind one protocol; tiers that cannot be filled are refused with a reason.

A tier is *declared* by the engine's configuration and read on the driver (`declared_tier`), and *opened* on each node
(`open_tier`) from that declaration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from hfbucket_plugin.errors import ConfigError
from warmer.tiers.declare import DirectoryDeclaration, TierOptions, declared_fs, declared_mp
from warmer.tiers.directory import DirectoryTier, HeldChunk
from warmer.tiers.engines import ENGINE_KINDS, L1Declaration, LocalCPUDeclaration, declared_engine, engine_spec
from warmer.tiers.inventory import directory_keys
from warmer.tiers.naming import NodeInfo

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hfbucket_plugin.config.lmcache_yaml import EngineConfig
    from hfbucket_plugin.core.buffers import RevocableBuffer

Declaration = DirectoryDeclaration
"""Declaration that the driver sends to the nodes."""

AnyTier = DirectoryDeclaration | L1Declaration | LocalCPUDeclaration
"""Tier that a run can fill: directories, or the memory of engines."""


class ChunkDraft(Protocol):
    """One chunk on its way into a tier. An engine sees nothing of it before `publish`."""

    @property
    def path(self) -> Path:
        """Path of a file with exactly the chunk's bytes before `publish`, for hashing."""

    @property
    def roomy(self) -> bool:
        """Whether another component may create the file at `path` itself, instead of writing through `lease`.

        Such a file is created without reserved blocks, so there must be room for everything in progress.
        """

    @property
    def lease(self) -> RevocableBuffer:
        """Buffer for the chunk's bytes. The first access creates the file, with its blocks reserved.

        Raises:
            TierFullError: There is no room.
            TierError: The file cannot be created.
        """

    def publish(self) -> None:
        """Publish the chunk atomically. Nothing may write into it any more.

        Raises:
            TierError: The chunk could not be published; nothing of it is visible.
        """

    def discard(self) -> None:
        """Remove all temporary files. May be called at any time, and repeatedly."""


class Tier(Protocol):
    """Tier of one node. Opened by one process, used by several of its threads."""

    def holds(self, key: str, size: int) -> bool:
        """Return whether the chunk is in the tier with `size` bytes.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            TierError: The tier cannot be read.
        """

    def draft(self, key: str, size: int) -> ChunkDraft:
        """Create a draft of a chunk of `size` bytes, with its room reserved.

        Raises:
            KeyFormatError: The key is not valid for the tier.
            TierFullError: There is no room.
            TierError: Permission is denied, or the chunk does not belong to the engine that uses the tier.
        """

    def inventory(self) -> Iterator[HeldChunk]:
        """Yield the chunks of the tier, in any order. Files that engines would not find are skipped.

        Raises:
            TierError: The tier cannot be read.
        """

    def close(self) -> None:
        """Remove the temporary and lock files of this process."""


_IMPOSSIBLE: Final = {
    "local_disk": "LMCache's local disk tier keeps its index in the engine's memory and cannot be filled from outside",
    "local_cpu": "an engine's memory is no directory",
    "l1": "the memory of `lmcache server` is no directory",
    "raw_block": "a raw block device has its index in the engine's memory and cannot be filled from outside",
    "dax": "a DAX device has its index in the engine's memory and cannot be filled from outside",
    "gds": "a GDS directory needs each chunk's dtype and shape in a side file, which is not supported yet",
}


def named_tier(config: EngineConfig | None, text: str, options: TierOptions = TierOptions()) -> AnyTier:  # noqa: B008 - frozen
    """Find a tier of a run: a directory tier (see `declared_tier`), or the memory of engines.

    Args:
        config: Configuration of the classic engine; None if there is none, as in MP mode.
        text: Text that `declared_tier` accepts; or `l1` or `local_cpu`, or a JSON object of that type.
        options: Options for filling the tier.

    Raises:
        ConfigError: The configuration declares no such tier, or the tier cannot be filled; the message has the reason and
            what to do.
    """
    spec = engine_spec(text)
    return declared_tier(config, text, options) if spec is None else declared_engine(config, spec, options)


def declared_tier(config: EngineConfig | None, text: str, options: TierOptions = TierOptions()) -> Declaration:  # noqa: B008 - frozen
    """Find a directory tier in the engine's configuration.

    Args:
        config: Configuration of the classic engine; None if there is none, as in MP mode.
        text: Name in its `remote_storage_plugins`, such as `fs.warm`; or a JSON object as `lmcache server
            --l2-adapter` accepts it.
        options: Options for filling the tier.

    Raises:
        ConfigError: The configuration declares no such tier, or the tier cannot be filled; the message has the reason and
            what to do.
    """
    if text.lstrip().startswith("{"):
        return declared_mp(text, options)
    kind = text.split(".", 1)[0]
    if kind == "fs_native":
        raise ConfigError(
            f"tier {text!r}: fs_native is a tier of `lmcache server` (MP mode), and no plugin of the classic engine, so it "
            "cannot be filled from outside by that name: give the JSON that --l2-adapter takes"
        )
    if kind in _IMPOSSIBLE:
        raise ConfigError(f"tier {text!r}: {_IMPOSSIBLE[kind]}; {_instead(config)}")
    if config is None:
        raise ConfigError(f"tier {text!r} is the name of a plugin, and no LMCache YAML is given; {_instead(config)}")
    if text not in config.plugins:
        declared = ", ".join(config.plugins) or "none"
        raise ConfigError(
            f"tier {text!r} is not in remote_storage_plugins of {config.source}, which declares {declared}; "
            "engines would not read it: add it there, before the bucket's instance"
        )
    if kind != "fs":
        raise ConfigError(
            f"tier {text!r} is of type {kind!r}, which is no directory on a node; only plugins of type fs can be "
            "filled, such as fs.warm"
        )
    return declared_fs(config, text, options)


def _instead(config: EngineConfig | None) -> str:
    if config is None:
        return 'give the JSON of an L2 adapter, such as {"type": "fs", "base_path": "/mnt/nvme/kv"}'
    return f"name an fs plugin of {config.source}, such as fs.warm"


def open_tier(declaration: Declaration, place: NodeInfo = NodeInfo()) -> Tier:  # noqa: B008 - frozen
    """Open a tier on this node.

    Args:
        declaration: Declaration from `declared_tier`.
        place: Identity of the node, for the placeholders in paths.

    Raises:
        ConfigError: This node has no value for a placeholder.
        TierError: A directory cannot be created or written.
    """
    return DirectoryTier(declaration.at(place))


__all__ = [
    "ENGINE_KINDS",
    "AnyTier",
    "ChunkDraft",
    "Declaration",
    "HeldChunk",
    "L1Declaration",
    "LocalCPUDeclaration",
    "NodeInfo",
    "Tier",
    "TierOptions",
    "declared_tier",
    "directory_keys",
    "named_tier",
    "open_tier",
]
