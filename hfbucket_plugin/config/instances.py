"""Instances that a tool works on, named by the same classic or MP configuration that engines use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from hfbucket_plugin.config import l2
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.config.settings import KEY_ROOT
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core.keys import BucketHandle

_BUILT_IN_TYPE: Final = "hfbucket"
OUR_MODULE: Final = "hfbucket_plugin.adapter"
"""`module_path` of the instances that this package serves."""


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """One instance of a configuration.

    Attributes:
        name: `hfbucket.us`, or the `name` in an L2 adapter's JSON.
        settings: Settings of the instance.
        mode: Engine mode of the configuration, which determines the kind of its objects' keys.
        engine: Rest of a classic engine's configuration; None in MP mode, whose server has no file.
    """

    name: str
    settings: InstanceSettings
    mode: Literal["classic", "mp"]
    engine: EngineConfig | None = None

    def setting(self, name: str) -> str:
        """Return the full name of a setting as users write it."""
        return f"{KEY_ROOT}{self.name}.{name}" if self.mode == "classic" else f"adapter_params.{name}"


def named_instances(
    lmcache_config: Path | None = None, instances: Sequence[str] = (), l2_adapters: Sequence[str] = ()
) -> list[InstanceConfig]:
    """Return the instances that options name.

    Args:
        lmcache_config: LMCache YAML of a classic engine.
        instances: Names in the file; empty for all bucket instances that it declares.
        l2_adapters: JSON texts as for `lmcache server --l2-adapter`.

    Raises:
        ConfigError: Nothing is named, a file cannot be read, or settings are invalid.
    """
    if lmcache_config is None and not l2_adapters:
        raise ConfigError(
            "name a configuration: --lmcache-config FILE, or --l2-adapter JSON as lmcache server takes it"
        )
    if instances and lmcache_config is None:
        raise ConfigError("--instance names an instance of an LMCache YAML: give --lmcache-config FILE with it")
    found = _classic(EngineConfig.read(lmcache_config), instances) if lmcache_config is not None else []
    for text in l2_adapters:
        settings = l2.from_json(text)
        found.append(InstanceConfig(settings.name, settings, "mp"))
    return found


def _classic(config: EngineConfig, instances: Sequence[str]) -> list[InstanceConfig]:
    names = list(instances) or [name for name in config.plugins if _is_bucket(config, name)]
    if not names:
        declared = ", ".join(config.plugins) or "none"
        raise ConfigError(
            f"{config.source}: remote_storage_plugins declares no bucket instance; it declares {declared}"
        )
    return [InstanceConfig(name, config.instance(name), "classic", config) for name in names]


def _is_bucket(config: EngineConfig, plugin: str) -> bool:
    return (
        plugin.split(".", maxsplit=1)[0] == _BUILT_IN_TYPE or config.plugin_value(plugin, "module_path") == OUR_MODULE
    )


def handles_of(instances: Iterable[InstanceConfig]) -> tuple[BucketHandle, ...]:
    """Return the distinct handles of instances."""
    return tuple(dict.fromkeys(one.settings.bucket_handle for one in instances))
