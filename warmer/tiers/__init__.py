"""Local tiers that another process can fill, behind one protocol; what cannot be filled is refused with the reason.

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
"""What the driver hands to the nodes."""

AnyTier = DirectoryDeclaration | L1Declaration | LocalCPUDeclaration
"""What a run may fill: directories, and the memory of engines."""


class ChunkDraft(Protocol):
    """One chunk on its way into a tier. Nothing of it is visible to an engine before `publish`."""

    @property
    def path(self) -> Path:
        """Where the bytes are meanwhile, and nothing else, for hashing."""

    @property
    def roomy(self) -> bool:
        """Whether somebody else may make the file at `path` in one go, in place of writing through `lease`.

        It is made without its blocks being reserved first, so there has to be room enough for all that is in progress.
        """

    @property
    def lease(self) -> RevocableBuffer:
        """Where a reader writes. Asking for it makes the file, with its blocks reserved.

        Raises:
            TierFullError: There is no room.
            TierError: The file cannot be made.
        """

    def publish(self) -> None:
        """Let the chunk appear, whole and at once. Nothing writes into it any more.

        Raises:
            TierError: It could not appear; nothing of it is visible.
        """

    def discard(self) -> None:
        """Leave nothing behind. May be called after anything, any number of times."""


class Tier(Protocol):
    """One node's tier. Opened by one process, used by several of its threads."""

    def holds(self, key: str, size: int) -> bool:
        """Whether the chunk is there at that size, in bytes.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            TierError: The tier cannot be looked into.
        """

    def draft(self, key: str, size: int) -> ChunkDraft:
        """Begin a chunk of that many bytes, with the room for it reserved.

        Raises:
            KeyFormatError: The tier can hold no chunk of that key.
            TierFullError: There is no room.
            TierError: There is no right; or the chunk is none of the engine's that uses the tier.
        """

    def inventory(self) -> Iterator[HeldChunk]:
        """Stream what the tier holds, in any order. What engines would not find there is skipped.

        Raises:
            TierError: The tier cannot be read.
        """

    def close(self) -> None:
        """Leave nothing of this process's own behind."""


_IMPOSSIBLE: Final = {
    "local_disk": "LMCache's local disk tier keeps its index in the engine's memory and cannot be filled from outside",
    "local_cpu": "an engine's memory is no directory",
    "l1": "the memory of `lmcache server` is no directory",
    "raw_block": "a raw block device has its index in the engine's memory and cannot be filled from outside",
    "dax": "a DAX device has its index in the engine's memory and cannot be filled from outside",
    "gds": "a GDS directory needs each chunk's dtype and shape in a side file, which is not supported yet",
}


def named_tier(config: EngineConfig | None, text: str, options: TierOptions = TierOptions()) -> AnyTier:  # noqa: B008 - frozen
    """Find a tier of a run: a directory, see `declared_tier`, or the memory of engines.

    Args:
        config: The classic engine's; None where there is none, as in MP mode.
        text: As `declared_tier` has it; or `l1` or `local_cpu`, or a JSON object of that type.
        options: How the tier is filled.

    Raises:
        ConfigError: The configuration declares no such tier, or it is one that cannot be filled; the message has the
            reason and what to do.
    """
    spec = engine_spec(text)
    return declared_tier(config, text, options) if spec is None else declared_engine(config, spec, options)


def declared_tier(config: EngineConfig | None, text: str, options: TierOptions = TierOptions()) -> Declaration:  # noqa: B008 - frozen
    """Find a tier of directories in the engine's configuration.

    Args:
        config: The classic engine's; None where there is none, as in MP mode.
        text: A name in its `remote_storage_plugins`, such as `fs.warm`; or a JSON object as `lmcache server
            --l2-adapter` takes it.
        options: How the tier is filled.

    Raises:
        ConfigError: The configuration declares no such tier, or it is one that cannot be filled; the message has the
            reason and what to do.
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
        declaration: From `declared_tier`.
        place: Which node this is, for the placeholders in paths.

    Raises:
        ConfigError: This node has no value for a placeholder.
        TierError: Its directories cannot be made or written.
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
