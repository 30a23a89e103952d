"""Tiers in the memory of engines, as a run names them: read on the driver, reached on the nodes.

Follows `lmcache/v1/config.py`, `internal_api_server/api_server.py` and `multiprocess/config.py` of LMCache 0.5.6.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.config.settings import KEY_ROOT
from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.core.texts import did_you_mean
from hfbucket_plugin.errors import ConfigError
from warmer.tiers import naming as places
from warmer.tiers.declare import declared_fs
from warmer.tiers.local_cpu import worker_address

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfbucket_plugin.config.lmcache_yaml import EngineConfig
    from hfbucket_plugin.core.keys import Key
    from warmer.tiers.declare import DirectoryDeclaration, TierOptions
    from warmer.tiers.naming import NodeInfo

L1: Final = "l1"
LOCAL_CPU: Final = "local_cpu"
ENGINE_KINDS: Final = frozenset({L1, LOCAL_CPU})
"""Names of the tiers in the memory of engines in `--tier`."""

SERVER_HTTP: Final = "http://127.0.0.1:8080"
"""Default HTTP address of `lmcache server`, without `--http-host` and `--http-port`."""

WORKER: Final = "{worker}"
"""Placeholder in the path of a staging directory for the number of the worker whose chunks are there."""

_STAND_IN: Final = "@worker@"
"""Substitute for `WORKER` while a path is parsed by code that knows only the placeholders of nodes."""

_API_PORT: Final = 6999
_LOOPBACK: Final = "127.0.0.1"
_ANYWHERE: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - to recognize addresses that cannot be connected to
_L1_FIELDS: Final = frozenset({"type", "http"})
_CPU_FIELDS: Final = frozenset({"type", "staging", "keep_staging", "host", "kv_shape", "kv_dtype"})


@dataclass(frozen=True, slots=True)
class L1Declaration:
    """L1 of the `lmcache server` of each node, which loads itself from its own L2 tiers.

    Attributes:
        name: Name in messages.
        http: HTTP address of the server; it may hold placeholders.
    """

    name: str
    http: str

    @property
    def takes(self) -> type[Key]:
        """Kind of key that the tier holds."""
        return MPKey

    def address(self, place: NodeInfo) -> str:
        """Return the address of one node's server.

        Raises:
            ConfigError: The node has no value for a placeholder.
        """
        return place.expand(self.http)


@dataclass(frozen=True, slots=True)
class LocalCPUDeclaration:
    """Memory of the classic engine's workers on each node; each worker loads from a staging directory of its own.

    Attributes:
        name: Name in messages.
        staging: Format and location of the staged files; its only path may hold placeholders and holds `{worker}`.
        host: Host of the workers' internal API, as their node reaches it; it may hold placeholders.
        port_start: `internal_api_server_port_start`.
        keep_staging: Whether files stay in the staging directories after they are loaded.
    """

    name: str
    staging: DirectoryDeclaration
    host: str = _LOOPBACK
    port_start: int = _API_PORT
    keep_staging: bool = False

    @property
    def takes(self) -> type[Key]:
        """Kind of key that the tier holds."""
        return ClassicKey

    def address(self, place: NodeInfo, worker: int) -> str:
        """Return the address of a worker's internal API on one node.

        Raises:
            ConfigError: The node has no value for a placeholder.
        """
        return worker_address(place.expand(self.host), self.port_start, worker)

    def staging_of(self, place: NodeInfo, worker: int) -> DirectoryDeclaration:
        """Return the declaration of a worker's staging directory on one node.

        Raises:
            ConfigError: The node has no value for a placeholder.
        """
        path = Path(str(self.staging.base_paths[0]).replace(WORKER, str(worker)))
        return replace(self.staging, base_paths=(path,)).at(place)


EngineDeclaration = L1Declaration | LocalCPUDeclaration


def engine_spec(text: str) -> dict[str, Any] | None:
    """Parse a tier's text as the specification of an engine's memory; return None if it names another tier."""
    if text in ENGINE_KINDS:
        return {"type": text}
    try:
        spec = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None  # the reader of adapters reports the error
    kind = spec.get("type") if isinstance(spec, dict) else None
    return spec if isinstance(kind, str) and kind in ENGINE_KINDS else None


def declared_engine(
    config: EngineConfig | None, spec: Mapping[str, Any], options: TierOptions
) -> L1Declaration | LocalCPUDeclaration:
    """Read the declaration of a tier in an engine's memory.

    Args:
        config: Configuration of the classic engine; None if there is none.
        spec: Specification from `engine_spec`.
        options: Options for filling staging directories.

    Raises:
        ConfigError: A field is unknown or invalid, or the engine's configuration does not permit loads into its memory.
    """
    return _l1(spec) if spec["type"] == L1 else _local_cpu(config, spec, options)


def _l1(spec: Mapping[str, Any]) -> L1Declaration:
    _expect_known(spec, _L1_FIELDS)
    http = spec.get("http", SERVER_HTTP)
    if not isinstance(http, str) or not http.startswith(("http://", "https://")):
        raise ConfigError(
            f"tier {L1!r}: http must be the address of the server's HTTP, such as {SERVER_HTTP}, not {http!r}"
        )
    places.check(http)
    return L1Declaration(f"{L1}:{http}", http)


def _local_cpu(config: EngineConfig | None, spec: Mapping[str, Any], options: TierOptions) -> LocalCPUDeclaration:
    _expect_known(spec, _CPU_FIELDS)
    if config is None:
        raise ConfigError(
            f"tier {LOCAL_CPU!r} is the memory of the classic engine, and no LMCache YAML is given: give --lmcache-config; "
            f"the memory of `lmcache server` is the tier {L1!r}"
        )
    _expect_loadable(config)
    keep = spec.get("keep_staging", False)
    if not isinstance(keep, bool):
        raise ConfigError(f"tier {LOCAL_CPU!r}: keep_staging must be true or false")
    staging = _staging(config, spec, options)
    host = spec.get("host", config.engine.get("internal_api_server_host", _LOOPBACK))
    port = config.engine.get("internal_api_server_port_start", _API_PORT)
    if type(port) is not int or not isinstance(host, str):
        raise ConfigError(
            f"tier {LOCAL_CPU!r}: internal_api_server_port_start must be a number in {config.source}, and "
            "internal_api_server_host (or host) a text"
        )
    host = _LOOPBACK if host in _ANYWHERE else host
    places.check(host)
    return LocalCPUDeclaration(LOCAL_CPU, staging, host, port, keep)


def _expect_loadable(config: EngineConfig) -> None:
    """Check that the engine's configuration permits loads into its memory."""
    engine, where = config.engine, f"tier {LOCAL_CPU!r}: {{}} in {config.source}"
    if engine.get("internal_api_server_enabled") is not True:
        raise ConfigError(
            where.format("internal_api_server_enabled is not true")
            + ", so engines cannot be asked to load anything: set it, and restart them"
        )
    if engine.get("local_cpu", True) is not True:
        raise ConfigError(where.format("local_cpu is off") + ": engines keep no chunks in memory")
    if engine.get("internal_api_server_socket_path_prefix"):
        raise ConfigError(
            where.format("internal_api_server_socket_path_prefix is set")
            + ": engines then listen on no port; leave it out"
        )


def _staging(config: EngineConfig, spec: Mapping[str, Any], options: TierOptions) -> DirectoryDeclaration:
    """Return the declaration of the staging directories: below a plugin's directory, or at a configured path."""
    given = spec.get("staging")
    if given is None:
        given = _only_fs(config)
    if not isinstance(given, str) or not given:
        raise ConfigError(
            f"tier {LOCAL_CPU!r}: staging must be an absolute path, or the name of an fs plugin of {config.source}"
        )
    if given in config.plugins and given.split(".", 1)[0] == "fs":
        config, name = _shaped(config, given, spec), given
    else:
        name = LOCAL_CPU
        config = _shaped(config, name, {**spec, "base_path": given.replace(WORKER, _STAND_IN)})
    declared = declared_fs(config, name, options)
    if len(declared.base_paths) > 1:
        raise ConfigError(f"tier {LOCAL_CPU!r}: staging {given!r} has several directories; name one path")
    path = str(declared.base_paths[0]).replace(_STAND_IN, WORKER)
    if WORKER not in path:
        path = f"{path}/worker-{WORKER}"
    return replace(declared, name=f"{LOCAL_CPU} staging {given}", base_paths=(Path(path),))


def _only_fs(config: EngineConfig) -> str:
    """Return the only directory that engines and the warmer are known to share."""
    found = [name for name in config.plugins if name.split(".", 1)[0] == "fs"]
    if len(found) != 1:
        raise ConfigError(
            f"tier {LOCAL_CPU!r}: {config.source} declares {len(found)} fs plugins, so nothing says where files for the engine "
            f'can be put: give {{"type": "{LOCAL_CPU}", "staging": "/dev/shm/staging"}}, a directory that the engine reads too'
        )
    return found[0]


def _shaped(config: EngineConfig, name: str, values: Mapping[str, Any]) -> EngineConfig:
    """Return the configuration with the file format of the tier's own text; whole headers stay the engine's setting."""
    fields = ("base_path", "kv_shape", "kv_dtype")
    given = {f"{KEY_ROOT}{name}.{field}": values[field] for field in fields if field in values}
    return replace(config, extra=config.extra | given)


def _expect_known(spec: Mapping[str, Any], known: frozenset[str]) -> None:
    for name in spec:
        if name not in known:
            raise ConfigError(f"tier {spec['type']!r}: unknown option {name!r}{did_you_mean(name, known, 0.6)}")
