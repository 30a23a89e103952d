"""What an LMCache YAML says of a directory of its `fs` connector, classic mode.

Follows `lmcache/v1/storage_backend/connector/fs_connector.py` and `base_connector.py` of LMCache 0.5.6. Its other options
(`fs_connector_relative_tmp_dir`, `fs_connector_read_ahead_size`, `fs_connector_use_odirect`) change how it reads and
writes, and nothing of what a file is called or holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import ClassicKey
from warmer.tiers.declaration import DirectoryDeclaration, Layout, absolute_paths
from warmer.tiers.header import HeaderFormat, header_format

if TYPE_CHECKING:
    from hfbucket_plugin.engine_config import EngineConfig
    from warmer.tiers.options import TierOptions


def declared_fs(config: EngineConfig, name: str, options: TierOptions) -> DirectoryDeclaration:
    """Read the declaration of an `fs` plugin.

    Raises:
        ConfigError: It names no absolute directory, or its files have headers of which too little is known.
    """
    header = _header(config, name)
    setting = f"remote_storage_plugin.{name}.base_path"
    value = config.plugin_value(name, "base_path")
    if value is None:
        setting, value = f"{setting} (or fs_base_path)", config.extra.get("fs_base_path")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"tier {name!r}: {config.source} lacks {setting}; set it to a directory on the nodes")
    # As the connector reads it: only a list is stripped.
    values = [part.strip() for part in value.split(",")] if "," in value else [value]
    paths = absolute_paths(name, setting, values)
    return DirectoryDeclaration(name, paths, Layout(ClassicKey, header), options)


def _header(config: EngineConfig, name: str) -> HeaderFormat | None:
    """What stands before each chunk: with `save_chunk_meta`, the connector's default, LMCache's header."""
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
