"""Local tiers that another process can fill, behind one protocol; what cannot be filled is refused with the reason.

A tier is *declared* by the engine's configuration and read on the driver (`declared_tier`), and *opened* on each node
(`open_tier`) from that declaration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from hfbucket_plugin.errors import ConfigError
from warmer.tiers.fs import FsTier
from warmer.tiers.fs_declaration import FsDeclaration, declared_fs

if TYPE_CHECKING:
    from pathlib import Path

    from hfbucket_plugin.engine_config import EngineConfig
    from hfbucket_plugin.leases import Lease

Declaration = FsDeclaration
"""What the driver hands to the nodes; more kinds of tier will be alternatives here."""


class Draft(Protocol):
    """One chunk on its way into a tier. Nothing of it is visible to an engine before `publish`."""

    @property
    def path(self) -> Path:
        """Where the bytes are meanwhile, for hashing."""

    @property
    def lease(self) -> Lease:
        """Where a reader writes."""

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
            TierError: The tier cannot be looked into.
        """

    def draft(self, key: str, size: int) -> Draft:
        """Begin a chunk of that many bytes, with the room for it reserved.

        Raises:
            TierError: There is no room, or no right.
        """

    def close(self) -> None:
        """Leave nothing of this process's own behind."""


_IMPOSSIBLE: Final = {
    "local_disk": "LMCache's local disk tier keeps its index in the engine's memory and cannot be filled from outside",
    "local_cpu": "filling an engine's memory from outside is not supported yet",
    "raw_block": "a raw block device has its index in the engine's memory and cannot be filled from outside",
    "dax": "a DAX device has its index in the engine's memory and cannot be filled from outside",
    "gds": "a GDS directory needs each chunk's dtype and shape in a side file, which is not supported yet",
    "fs_native": "fs_native is a tier of `lmcache server` (MP mode), which is not supported yet",
}


def declared_tier(config: EngineConfig, name: str, *, fsync: bool = False) -> Declaration:
    """Find a tier in the engine's configuration.

    Args:
        config: The engine's.
        name: As `remote_storage_plugins` has it, such as `fs.warm`.
        fsync: Whether files are forced to the disk before they appear.

    Raises:
        ConfigError: The configuration declares no such tier, or it is one that cannot be filled; the message has the
            reason and what to do.
    """
    kind = name.split(".", 1)[0]
    if kind in _IMPOSSIBLE:
        raise ConfigError(f"tier {name!r}: {_IMPOSSIBLE[kind]}; name an fs plugin of {config.source}, such as fs.warm")
    if name not in config.plugins:
        declared = ", ".join(config.plugins) or "none"
        raise ConfigError(
            f"tier {name!r} is not in remote_storage_plugins of {config.source}, which declares {declared}; "
            "engines would not read it: add it there, before the bucket's instance"
        )
    if kind != "fs":
        raise ConfigError(
            f"tier {name!r} is of type {kind!r}, which is no directory on a node; only plugins of type fs can be "
            "filled, such as fs.warm"
        )
    return declared_fs(config, name, fsync=fsync)


def open_tier(declaration: Declaration) -> Tier:
    """Open a tier on this node.

    Raises:
        TierError: Its directories cannot be made or written.
    """
    return FsTier(declaration)


__all__ = ["Declaration", "Draft", "Tier", "declared_tier", "open_tier"]
