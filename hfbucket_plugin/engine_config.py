"""The LMCache YAML of an engine, read by tools that run beside engines: the same file, as it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hfbucket_plugin import settings
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.yaml_file import read_yaml

if TYPE_CHECKING:
    from pathlib import Path

    from hfbucket_plugin.settings import InstanceSettings


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the tools need of an engine's configuration.

    Attributes:
        source: The file, for errors.
        plugins: `remote_storage_plugins`, in their order.
        extra: `extra_config`. It may hold an inline token, so it stays out of the `repr`.
        layerwise: `use_layerwise`: LMCache's connectors then put a header before each chunk, whatever
            `save_chunk_meta` says.
        engine: The settings of the engine itself: all but `extra_config`, as written. Addresses among them may hold
            passwords, so they stay out of the `repr` too.
    """

    source: str
    plugins: tuple[str, ...]
    extra: dict[str, Any] = field(repr=False)
    layerwise: bool = False
    engine: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> EngineConfig:
        """Read an LMCache YAML file.

        Raises:
            ConfigError: The file cannot be read, is no YAML, or is no LMCache configuration.
        """
        document = read_yaml(path, "LMCache configuration")
        if not isinstance(document, dict):
            raise ConfigError(f"LMCache configuration {str(path)!r} is no mapping of settings")
        return cls(
            str(path),
            _plugins(document, path),
            _extra(document, path),
            bool(document.get("use_layerwise")),
            {str(name): value for name, value in document.items() if name != "extra_config"},
        )

    def instance(self, name: str) -> InstanceSettings:
        """The settings of a bucket instance.

        Raises:
            ConfigError: The file declares no such instance, or its settings are wrong.
        """
        if name not in self.plugins:
            declared = ", ".join(self.plugins) or "none"
            raise ConfigError(
                f"{self.source}: {name!r} is not in remote_storage_plugins, which declares {declared}; "
                "name one of these, or add it there"
            )
        return settings.load(self.extra, name, self.plugins)

    def plugin_value(self, plugin: str, setting: str) -> Any:
        """A setting of any plugin, `remote_storage_plugin.<plugin>.<setting>`, or None."""
        return self.extra.get(f"{settings.KEY_ROOT}{plugin}.{setting}")


def _plugins(document: dict[str, Any], path: Path) -> tuple[str, ...]:
    plugins = document.get("remote_storage_plugins") or []
    if isinstance(plugins, str):  # LMCache takes a comma-separated text too
        plugins = [name.strip() for name in plugins.split(",") if name.strip()]
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f'{path}: remote_storage_plugins must be a list of names, such as ["hfbucket"]')
    return tuple(plugins)


def _extra(document: dict[str, Any], path: Path) -> dict[str, Any]:
    extra = document.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise ConfigError(f"{path}: extra_config must be a mapping of settings")
    return {str(key): value for key, value in extra.items()}
