"""The LMCache YAML of an engine, read by tools that run beside engines: the same file, as it is.

Values mean what they mean to LMCache: its own converters are applied, and its variables `LMCACHE_*` come before the file,
as in an engine. LMCache is imported for that where it is needed alone, since that takes seconds: plain values, such as a number
for a number, are what its converters make of them.
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
"""Variables of LMCache's that are no setting of an engine."""

_TEXTS: Final = frozenset(
    {"remote_serde", "remote_url", "cache_policy", "lmcache_instance_id", "pre_caching_hash_algorithm"}
)
"""Settings whose values are texts: a text needs no converter there."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the tools need of an engine's configuration.

    Attributes:
        source: The file, for errors.
        plugins: `remote_storage_plugins`, in their order.
        extra: `extra_config`. It may hold an inline token, so it stays out of the `repr`.
        layerwise: `use_layerwise`: LMCache's connectors then put a header before each chunk, whatever
            `save_chunk_meta` says.
        engine: The settings of the engine itself: all but `extra_config`, as LMCache reads them. Addresses among them may hold
            passwords, so they stay out of the `repr` too.
        overrides: The variables `LMCACHE_*` whose values came before those of the file.
    """

    source: str
    plugins: tuple[str, ...]
    extra: dict[str, Any] = field(repr=False)
    layerwise: bool = False
    engine: dict[str, Any] = field(default_factory=dict, repr=False)
    overrides: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, environ: Mapping[str, str] | None = None) -> EngineConfig:
        """Read an LMCache YAML file, and the variables that LMCache puts before it.

        Args:
            path: The file.
            environ: Where the variables `LMCACHE_*` are; the environment of the process by default.

        Raises:
            ConfigError: The file cannot be read, is no YAML, or is no LMCache configuration.
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


def _as_lmcache_reads(
    document: dict[str, Any], environ: Mapping[str, str], path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A file's values as LMCache converts them, below those of its variables; and the names of those variables."""
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
            read[name] = None  # as LMCache has it
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
            continue  # as LMCache has it: the file's value stays
        heeded.append(variable)
    return read, tuple(heeded)


def _is_plain(name: str, value: Any) -> bool:
    """Whether LMCache's converter of a setting makes of a value what it is already; not sure where it is not."""
    if isinstance(value, str):
        return name in _TEXTS
    # 0 and 1 may stand for false and true, and a whole number of seconds may be written with a point.
    return not isinstance(value, float) and not (type(value) is int and value in {0, 1})


_OURS: Final = {
    "extra_config": "a mapping of settings, or one as JSON",
    "remote_storage_plugins": 'a list of names, such as ["hfbucket"], or names with commas between them',
}
"""Settings without which there is no instance, and what they have to be."""


def _lmcaches_own() -> tuple[dict[str, dict[str, Any]], dict[str, str], Callable[[str], str]]:
    """LMCache's definitions of its settings, its former names of them, and how it takes quotes off variables."""
    with _quiet():
        from lmcache.v1 import config  # noqa: PLC0415 - it loads PyTorch, which takes seconds
        from lmcache.v1.config_base import _parse_quoted_string  # noqa: PLC0415 - the very same function
    return config._CONFIG_DEFINITIONS, config._CONFIG_ALIASES, _parse_quoted_string  # noqa: SLF001 - it has no other name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """LMCache logs a line when it is imported, which is none of a tool's."""
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


def rule_violations(*, save_unfull_chunk: bool, save_chunk_meta: bool, use_layerwise: bool, serde: object) -> list[str]:
    """What is wrong with an engine, a sentence each; nothing when a bucket can serve it.

    Args:
        save_unfull_chunk: LMCache's setting of that name.
        save_chunk_meta: `extra_config.save_chunk_meta`.
        use_layerwise: LMCache's setting of that name.
        serde: `remote_serde`; None is LMCache's default, `naive`.
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
