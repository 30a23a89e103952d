"""Memory of a classic engine's worker (LocalCPU) as a tier: the engine loads it from a staging directory.

Follows `lmcache/v1/internal_api_server/vllm/load_fs_chunks_api.py` of LMCache 0.5.6. The engine's YAML needs
`internal_api_server_enabled: true` and `local_cpu: true`. Each worker listens on its own port and loads every file of a
directory, also other workers' chunks: so the directory is checked first. A full engine evicts, just loaded chunks included,
so there must be room for all. Whether files have headers depends on the engine's `save_chunk_meta`, not on the request.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ClassicKey
from hfbucket_plugin.errors import ConfigError
from warmer.report.outcomes import EngineError, TierError, TierFullError
from warmer.tiers.engine_http import START_IT, WAIT_SECS, EngineHTTP, NotReadyError, once_more, when_ready
from warmer.tiers.inventory import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from warmer.tiers.declare import DirectoryDeclaration

_GIB: Final = 1024**3
_SHARE: Final = 0.8
"""Part of the engine's memory that may be loaded; the rest stays free for its work."""

_NAMED: Final = 1000
_LEAST_SECS: Final = 1.0
"""Minimum seconds that the last attempt of a load waits for its answer."""

_URL_MARKS: Final = frozenset("?#,;%")
"""Characters that a path in LMCache's `remote_url` must not contain."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Result of loading a staging directory.

    Attributes:
        chunks: Number of chunks that were loaded, or present before.
        files: Number of files in the directory.
        failed: Keys that were not loaded, at most 1000.
    """

    chunks: int
    files: int
    failed: tuple[str, ...]


def worker_address(host: str, port_start: int, worker_id: int) -> str:
    """Return the address of a worker's internal API.

    Args:
        host: Host of the node; `127.0.0.1` unless `internal_api_server_host` differs.
        port_start: `internal_api_server_port_start`, 6999 by default.
        worker_id: Global number of the worker.
    """
    return f"http://{host}:{port_start + 1 + worker_id}"


@dataclass(frozen=True, slots=True)
class EngineWorker:
    """A worker of a classic engine, as its internal API describes it.

    Attributes:
        id: Number of the worker in the engine.
        world_size: Workers of the engine.
        beside: Numbers of the workers on the same node, this one included.
        meta: All metadata that the worker reports.
        room: Bytes of chunks that may be loaded into the worker.
    """

    id: int
    world_size: int
    beside: frozenset[int]
    meta: dict[str, Any]
    room: int

    def reads(self, key: object) -> bool:
        """Return whether the worker looks up a chunk in its memory. With MLA, all workers read the chunks of the first."""
        return _belongs(key, self.meta) and (getattr(key, "world_size", 0) == self.world_size or self.id == 0)


def find_workers(
    address: Callable[[int], str],
    wanted: Iterable[int],
    ends: Deadline,
    *,
    all_of_them: bool,
    pause: Callable[[float], object] = time.sleep,
) -> dict[int, EngineWorker]:
    """Wait for workers of one node.

    Args:
        address: Returns the address of a worker's internal API, given its number.
        wanted: Numbers of workers.
        ends: Deadline.
        all_of_them: Whether all wanted workers are on this node. If not, the first that answers reports which ones are.
        pause: Waits for a number of seconds. It may raise to give up.

    Returns:
        The workers that answered in time, by number; at least one.

    Raises:
        EngineError: No worker answers in time, or an answer is not that of a worker's API.
        ConfigError: An address is invalid.
    """
    missing, found = sorted(set(wanted)), dict[int, EngineWorker]()
    while missing:
        reason: NotReadyError | None = None
        for number in missing:
            try:
                found[number] = _asked(address(number))
            except NotReadyError as error:
                reason = error
        if found and not all_of_them:
            beside = next(iter(found.values())).beside
            missing = [number for number in missing if number in beside]
        missing = [number for number in missing if number not in found]
        if missing and ends.passed:
            if found:
                break
            raise EngineError(f"waited in vain for worker {', '.join(map(str, missing))}: {reason}; {START_IT}")
        if missing:
            pause(min(WAIT_SECS, ends.remaining()))
    return found


def _asked(http: str) -> EngineWorker:
    with EngineHTTP(http) as engine:
        meta, conf = engine.ask("GET", "/meta"), engine.ask("GET", "/conf")
    try:
        number, first = int(meta["worker_id"]), int(meta["worker_id"]) - int(meta["local_worker_id"])
        beside = frozenset(range(first, first + int(meta["local_world_size"]))) | {number}
        return EngineWorker(number, int(meta["world_size"]), beside, meta, _room(conf))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"GET {http}/meta: this is no worker of LMCache: {type(error).__name__} {error}") from None


def _room(conf: dict[str, Any]) -> int:
    return int(float(conf.get("max_local_cpu_size", 0)) * _GIB * _SHARE)


def load(
    http: str,
    staging: DirectoryDeclaration,
    *,
    wait_secs: float = 600.0,
    load_secs: float = 3600.0,
    pause: Callable[[float], object] = time.sleep,
) -> Loaded:
    """Make one worker load a staging directory.

    Args:
        http: Address of the worker; see `worker_address`.
        staging: A classic `fs` tier of one directory on the worker's node, without placeholders, that holds only the
            worker's chunks; with headers if the engine uses them.
        wait_secs: Maximum seconds to wait for the worker.
        load_secs: Maximum seconds of the load.
        pause: Waits for a number of seconds. It may raise to give up.

    Raises:
        EngineError: The worker does not answer in time, or fails to load.
        ConfigError: The directory holds other workers' chunks or another format than the engine reads, or the engine keeps
            no chunks in memory.
        TierFullError: There is no room for all chunks.
        TierError: The directory cannot be read or written.
    """
    with EngineHTTP(http) as engine:
        meta = when_ready(lambda: engine.ask("GET", "/meta"), Deadline.after(wait_secs), pause)
        ends = Deadline.after(load_secs)
        conf = once_more(lambda: engine.ask("GET", "/conf"), ends, pause)
        directory = _directory(staging, conf)
        _check(directory, meta, conf)
        path = directory / f".hfbucket-load-{secrets.token_hex(8)}.yaml"
        try:
            path.write_text(json.dumps(_config(directory)), encoding="utf-8")  # JSON is YAML
            body = {"config_path": str(path), "max_failed_keys": _NAMED}
            # Idempotent: a second request finds what the first one loaded.
            answer = once_more(
                lambda: engine.ask("POST", "/cache/load-fs-chunks", body, max(ends.remaining(), _LEAST_SECS)),
                ends,
                pause,
            )
        except OSError as error:
            if isinstance(error, ConnectionError):  # EngineError is one
                raise
            raise TierError(f"staging directory {str(directory)!r}: {error.strerror}") from None
        finally:
            path.unlink(missing_ok=True)
    try:
        return Loaded(int(answer["loaded_chunks"]), int(answer["total_files"]), tuple(answer["failed_keys"]))
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(
            f"POST {http}/cache/load-fs-chunks: the answer is not that of LMCache: {type(error).__name__} {error}"
        ) from None


def _config(directory: Path) -> dict[str, Any]:
    """Return the configuration for the request: only the location of the chunks; the engine's own supplies the rest."""
    return {"remote_url": f"fs://localhost:0{directory}"}


def _directory(staging: DirectoryDeclaration, conf: dict[str, Any]) -> Path:
    """Return the staging directory after a check that the engine can read it."""
    paths = [str(path) for path in staging.base_paths]
    if len(paths) != 1 or staging.takes is not ClassicKey or _URL_MARKS & set(paths[0]):
        raise ConfigError(
            f"staging tier {staging.name!r} must be one directory of the classic engine, and its path hold none of "
            f"{' '.join(sorted(_URL_MARKS))}: LMCache is told of it in a URL"
        )
    if not conf.get("local_cpu", True):
        raise ConfigError("local_cpu is off in the engine's configuration: it keeps no chunks in memory")
    if conf.get("use_layerwise"):
        raise ConfigError("use_layerwise is on in the engine's configuration: it keeps no whole chunks")
    headers = bool((conf.get("extra_config") or {}).get("save_chunk_meta", True))
    if headers != (staging.layout.header is not None):
        raise ConfigError(
            f"extra_config.save_chunk_meta is {'on' if headers else 'off'} in the engine's configuration, and the files "
            f"of {staging.name!r} have {'no' if headers else 'a'} header; fill it by the YAML that the engine uses"
        )
    return staging.base_paths[0]


def _check(staging: Path, meta: dict[str, Any], conf: dict[str, Any]) -> None:
    """Check that the directory holds only the worker's chunks, and that there is room for all of them."""
    path = str(staging)
    size = 0
    try:
        for file in listed(staging):
            if not _belongs(file.key, meta):
                raise ConfigError(
                    f"staging directory {path!r} holds {str(file.key)!r}, which is no chunk of worker "
                    f"{meta['worker_id']} of {meta['world_size']} of {meta['model_name']!r}; it would load it all the same"
                )
            size += file.size
    except OSError as error:
        raise TierError(f"staging directory {path!r} cannot be read: {error.strerror}") from None
    room = _room(conf)
    if size > room:
        raise TierFullError(
            f"staging directory {path!r} holds {size} bytes, and the engine has room for {room} ({_SHARE:.0%} of "
            "max_local_cpu_size): it would evict what it loads first"
        )


def _belongs(key: object, meta: dict[str, Any]) -> bool:
    if not isinstance(key, ClassicKey) or key.layer_id is not None:
        return False
    # With MLA, all workers share the chunks that the first one wrote.
    whose = [(meta["world_size"], meta["worker_id"])] + ([(1, 0)] if meta.get("use_mla") else [])
    return key.model == meta["model_name"] and (key.world_size, key.worker_id) in whose
