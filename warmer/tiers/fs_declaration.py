"""What an LMCache YAML says of a directory of its `fs` connector, classic mode.

Follows `lmcache/v1/storage_backend/connector/fs_connector.py` and `base_connector.py` of LMCache 0.5.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.keys import ClassicKey, parse_key

if TYPE_CHECKING:
    from hfbucket_plugin.engine_config import EngineConfig


@dataclass(frozen=True, slots=True)
class FsDeclaration:
    """A classic `fs` tier.

    Attributes:
        name: The plugin's name.
        base_paths: Its directories; several share the chunks out by their hash.
        fsync: Whether files are forced to the disk before they appear. Off by default: it costs a flush a chunk, and
            guards only against a power failure soon after the run.
    """

    name: str
    base_paths: tuple[Path, ...]
    fsync: bool = False

    @property
    def takes(self) -> type[ClassicKey]:
        """The kind of key that the tier takes."""
        return ClassicKey

    def file(self, key: str) -> Path:
        """The file of a chunk, as LMCache's connector names it.

        Raises:
            KeyFormatError: The text is no key of the classic engine.
        """
        return self._base_path(key) / f"{key.replace('/', '-SEP-')}.data"

    def _base_path(self, key: str) -> Path:
        if len(self.base_paths) == 1:
            return self.base_paths[0]
        parsed = parse_key(key)
        return self.base_paths[abs(int(parsed.chunk_hash, 16)) % len(self.base_paths)]


def declared_fs(config: EngineConfig, name: str, *, fsync: bool = False) -> FsDeclaration:
    """Read the declaration of an `fs` plugin.

    Raises:
        ConfigError: It names no absolute directory, or its files would need LMCache's header.
    """
    _refuse_header(config, name)
    setting = f"remote_storage_plugin.{name}.base_path"
    value = config.plugin_value(name, "base_path")
    if value is None:
        setting, value = f"{setting} (or fs_base_path)", config.extra.get("fs_base_path")
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"tier {name!r}: {config.source} lacks {setting}; set it to a directory on the nodes")
    # As the connector reads it: only a list is stripped.
    base_paths = tuple(Path(part.strip()) for part in value.split(",")) if "," in value else (Path(value),)
    for path in base_paths:
        if not path.is_absolute():
            raise ConfigError(
                f"tier {name!r}: {setting} has {str(path)!r}, which is not absolute: engines and the warmer run in "
                "different directories and would not mean the same one"
            )
    return FsDeclaration(name, base_paths, fsync)


def _refuse_header(config: EngineConfig, name: str) -> None:
    """With `save_chunk_meta`, the connector's default, each file begins with a header that we cannot write yet."""
    if config.extra.get("save_chunk_meta", True):
        given = "is on" if "save_chunk_meta" in config.extra else "is not set, and on by default"
        reason, advice = f"extra_config.save_chunk_meta {given}", "save_chunk_meta: false below extra_config"
    elif config.layerwise:
        reason, advice = "use_layerwise is on", "use_layerwise: false"
    else:
        return
    raise ConfigError(
        f"tier {name!r}: {reason} in {config.source}, so engines expect a header in each file, which is not supported "
        f"yet; set {advice}, for all engines that share the directory"
    )
