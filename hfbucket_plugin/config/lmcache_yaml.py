"""Reader of an engine's LMCache YAML for tools that run beside engines.

Values have LMCache's meaning: its own converters are applied, and `LMCACHE_*` variables override the file, as in an
engine. LMCache takes seconds to import, so it is imported only for values that its converters would change.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.config import settings
from hfbucket_plugin.config.yaml_file import read_yaml
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from hfbucket_plugin.config.settings import InstanceSettings


VARIABLE_HEAD: Final = "LMCACHE_"
NO_SETTINGS: Final = frozenset(
    {"LMCACHE_CONFIG_FILE", "LMCACHE_LOG_LEVEL", "LMCACHE_TRACK_USAGE", "LMCACHE_USE_EXPERIMENTAL"}
)
"""LMCache variables that are not engine settings."""

_TEXTS: Final = frozenset(
    {"remote_serde", "remote_url", "cache_policy", "lmcache_instance_id", "pre_caching_hash_algorithm"}
)
"""Settings with text values, which need no converter for a text."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Parts of an engine's configuration that tools need.

    Attributes:
        source: Path of the file, for errors.
        plugins: `remote_storage_plugins`, in order.
        extra: `extra_config`. It may hold an inline token, so it is excluded from the `repr`.
        layerwise: `use_layerwise`: LMCache's connectors then put a header before each chunk, whatever
            `save_chunk_meta` says.
        engine: Settings of the engine itself, all but `extra_config`, as LMCache reads them. Addresses among them may
            hold passwords, so they are excluded from the `repr` too.
        overrides: `LMCACHE_*` variables that override values of the file.
    """

    source: str
    plugins: tuple[str, ...]
    extra: dict[str, Any] = field(repr=False)
    layerwise: bool = False
    engine: dict[str, Any] = field(default_factory=dict, repr=False)
    overrides: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Read an LMCache YAML file and the variables that override it.

        Args:
            path: Path of the file.
            environ: Source of the `LMCACHE_*` variables; by default the environment of the process.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or is not an LMCache configuration.
        """
        document = read_yaml(path, "LMCache configuration")
        if not isinstance(document, dict):
            raise ConfigError(f"LMCache configuration {str(path)!r} is not a mapping of settings")
        document, overrides = _as_lmcache_reads(document, os.environ if environ is None else environ, path)
        return cls(
            str(path),
            _plugins(document, path),
            _extra(document, path),
            bool(document.get("use_layerwise")),
            {str(name): value for name, value in document.items() if name != "extra_config"},
            overrides,
        )

    def instance(self, name: str) -> InstanceSettings:
        """Return the settings of a bucket instance.

        Raises:
            ConfigError: The file does not declare the instance, or its settings are invalid.
        """
        if name not in self.plugins:
            declared = ", ".join(self.plugins) or "none"
            raise ConfigError(
                f"{self.source}: {name!r} is not in remote_storage_plugins, which declares {declared}; "
                "name one of these, or add it there"
            )
        return settings.load(self.extra, name, self.plugins)

    def plugin_value(self, plugin: str, setting: str) -> Any:
        """Return `remote_storage_plugin.<plugin>.<setting>` of any plugin, or None."""
        return self.extra.get(f"{settings.KEY_ROOT}{plugin}.{setting}")


def _as_lmcache_reads(
    document: dict[str, Any], environ: Mapping[str, str], path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a file's values as LMCache converts and overrides them, and the names of the overriding variables."""
    variables = sorted(name for name in environ if name.startswith(VARIABLE_HEAD) and name not in NO_SETTINGS)
    if not variables and all(_is_plain(name, value) for name, value in document.items()):
        return document, ()
    definitions, aliases, unquoted = _lmcaches_own()
    read = dict(document)
    for name, value in document.items():
        if value is None or name not in definitions:
            continue
        try:
            read[name] = definitions[name]["env_converter"](value)
        except (ValueError, TypeError, OverflowError):
            if name in _OURS:
                raise ConfigError(f"{path}: {name} must be {_OURS[name]}") from None
            read[name] = None  # as in LMCache
    heeded = []
    for variable in variables:
        written = variable.removeprefix(VARIABLE_HEAD).lower()
        name = aliases.get(written, written)
        if variable != f"{VARIABLE_HEAD}{written.upper()}" or name not in definitions:
            continue
        try:
            read[name] = definitions[name]["env_converter"](unquoted(environ[variable]))
        except (ValueError, TypeError, OverflowError):
            if name in _OURS:
                raise ConfigError(
                    f"{variable} must be {_OURS[name]}; correct it or unset it: LMCache ignores it"
                ) from None
            continue  # as in LMCache: the file's value stays
        heeded.append(variable)
    return read, tuple(heeded)


def _is_plain(name: str, value: Any) -> bool:
    """Return whether LMCache's converter certainly leaves a value unchanged."""
    if isinstance(value, str):
        return name in _TEXTS
    # 0 and 1 may mean false and true, and a whole number of seconds may be a float.
    return not isinstance(value, float) and not (type(value) is int and value in {0, 1})


_OURS: Final = {
    "extra_config": "a mapping of settings, or one as JSON",
    "remote_storage_plugins": 'a list of names, such as ["hfbucket"], or names with commas between them',
}
"""Required settings of an instance, and their required values."""


def _lmcaches_own() -> tuple[dict[str, dict[str, Any]], dict[str, str], Callable[[str], str]]:
    """Return LMCache's definitions of its settings, their former names, and its function that unquotes variables."""
    with _quiet():
        from lmcache.v1 import config  # noqa: PLC0415 - it loads PyTorch, which takes seconds
        from lmcache.v1.config_base import _parse_quoted_string  # noqa: PLC0415 - loads PyTorch as well
    return config._CONFIG_DEFINITIONS, config._CONFIG_ALIASES, _parse_quoted_string  # noqa: SLF001 - no public name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the line that LMCache logs on import, which must not appear in a tool's output."""
    if "LMCACHE_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["LMCACHE_LOG_LEVEL"] = "ERROR"
    try:
        yield
    finally:
        del os.environ["LMCACHE_LOG_LEVEL"]


def _plugins(document: dict[str, Any], path: Path) -> tuple[str, ...]:
    plugins = document.get("remote_storage_plugins") or []
    if isinstance(plugins, str):  # LMCache accepts a comma-separated text too
        plugins = [name.strip() for name in plugins.split(",") if name.strip()]
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f'{path}: remote_storage_plugins must be a list of names, such as ["hfbucket"]')
    return tuple(plugins)


def _extra(document: dict[str, Any], path: Path) -> dict[str, Any]:
    extra = document.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise ConfigError(f"{path}: extra_config must be a mapping of settings")
    return {str(key): value for key, value in extra.items()}


def rule_violations(*, save_unfull_chunk: bool, save_chunk_meta: bool, use_layerwise: bool, serde: object) -> list[str]:
    """Return what prevents a bucket from serving an engine, one sentence each; empty if nothing does.

    Args:
        save_unfull_chunk: LMCache setting.
        save_chunk_meta: `extra_config.save_chunk_meta`.
        use_layerwise: LMCache setting.
        serde: `remote_serde`; None means LMCache's default, `naive`.
    """
    wrong = {
        "save_unfull_chunk must be false: only full chunks are stored": save_unfull_chunk,
        "extra_config.save_chunk_meta must be false or left out: objects hold no chunk metadata": save_chunk_meta,
        "use_layerwise must be false: chunks of single layers are not full chunks": use_layerwise,
        f"remote_serde must be naive, not {serde!r}: other serdes change the size of a chunk": (
            serde not in (None, "naive")
        ),
    }
    return [text for text, is_wrong in wrong.items() if is_wrong]
