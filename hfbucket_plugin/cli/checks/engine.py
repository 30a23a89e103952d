"""Checks of the engine's configuration and of its temporary directory."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.cli.findings import Finding, error, note, ok, warning
from hfbucket_plugin.config.instances import OUR_MODULE
from hfbucket_plugin.config.lmcache_yaml import rule_violations
from hfbucket_plugin.core.files import TempDir
from hfbucket_plugin.core.units import size
from hfbucket_plugin.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.lmcache_yaml import EngineConfig


CONFIG: Final = "config"
ENGINE: Final = "engine"
HASH_SEED: Final = "hash seed"

_DEFAULT_BLOCKING_SECS: Final = 10.0
_UNFULL: Final = ("save_unfull_chunk", "enable_blending", "enable_pd")
"""The last two settings make LMCache enable the first one."""


def check_engine(named: InstanceConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check the configuration. Values that the settings' own model rejects never reach this check."""
    settings = named.settings
    yield ok(CONFIG, f"{settings.bucket_handle} on {settings.endpoint}, {named.mode}, role {settings.role}")
    if named.engine is None:
        return
    yield _engine(named, named.engine)
    yield _hash_seed(environ)


def _engine(named: InstanceConfig, engine: EngineConfig) -> Finding:
    """Check the engine's own settings as the connector does when it starts."""
    if wrong := [*refused(engine), *_timeouts(named, engine)]:
        return error(ENGINE, "; ".join(wrong), f"fix it in {engine.source}: LMCache would run without the instance")
    if engine.plugin_value(named.name, "module_path") != OUR_MODULE:
        return note(
            ENGINE,
            "LMCache's built-in backend serves this instance",
            f"set {named.setting('module_path')} to {OUR_MODULE} for this package to serve it",
        )
    return ok(ENGINE, "full chunks without metadata; timeouts fit")


def refused(engine: EngineConfig) -> list[str]:
    """Return why the connector would refuse an engine: each setting, and the reason."""
    own = engine.engine
    return rule_violations(
        save_unfull_chunk=any(_truth(own.get(name)) for name in _UNFULL),
        save_chunk_meta=bool(engine.extra.get("save_chunk_meta", False)),
        use_layerwise=_truth(own.get("use_layerwise")),
        serde=own.get("remote_serde", "naive"),
    )


def _timeouts(named: InstanceConfig, engine: EngineConfig) -> list[str]:
    own = named.settings.get_timeout_secs
    blocking = blocking_secs(engine)
    if own is None or own < blocking:
        return []
    setting = named.setting("get_timeout_secs")
    late = f"{setting} ({own:g}) must end before LMCache's blocking_timeout_secs ({blocking:g})"
    return [f"{late}, which throws away whatever has arrived by then"]


def blocking_secs(engine: EngineConfig) -> float:
    """Return `blocking_timeout_secs` as LMCache reads it: whole seconds, or the default for an invalid number."""
    try:
        return float(int(engine.engine.get("blocking_timeout_secs", 0))) or _DEFAULT_BLOCKING_SECS
    except (TypeError, ValueError, OverflowError):
        return _DEFAULT_BLOCKING_SECS


def _truth(value: Any) -> bool:
    """Return whether LMCache reads a value of the YAML as true."""
    return str(value).strip().lower() in {"true", "1"}


def _hash_seed(environ: Mapping[str, str]) -> Finding:
    value = environ.get("PYTHONHASHSEED", "")
    if value.isdecimal():
        return ok(HASH_SEED, f"PYTHONHASHSEED is {value} here; every engine needs the same")
    return warning(
        HASH_SEED,
        f"PYTHONHASHSEED is {value or 'not set'} here: LMCache's keys then differ from process to process, and no "
        "engine finds what another one stored",
        "set PYTHONHASHSEED to the same number for every engine of the instance, and where doctor runs",
    )


NAME: Final = "temp dir"


def check_temp_dir(named: InstanceConfig) -> Finding:
    """Check the temporary directory by writing and removing a file."""
    settings = named.settings
    if settings.verify != "hash":
        return ok(NAME, f"not needed: verify is {settings.verify}")
    temp_dir = TempDir(settings.download_tmp_dir)
    try:
        with temp_dir.file() as path:
            path.write_bytes(b"doctor")
            free = shutil.disk_usage(path).free
    except (ConfigError, OSError) as caught:
        advice = (
            f"name another directory with {named.setting('download_tmp_dir')}, or set {named.setting('verify')} to size"
        )
        return error(NAME, f"every get is a miss with verify: hash: {caught}", advice)
    finally:
        temp_dir.close()
    return ok(NAME, f"{settings.download_tmp_dir} can be written, {size(free)} free")
