"""Fingerprints in MP mode, where one adapter serves engines of several models, known from keys and layouts."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core import forks
from hfbucket_plugin.core.telemetry import RateLimitedLogger
from hfbucket_plugin.fingerprint import detect
from hfbucket_plugin.fingerprint.model import ChunkLayout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
    from lmcache.v1.memory_management import MemoryObj

    from hfbucket_plugin.config.l2 import L2Settings
    from hfbucket_plugin.fingerprint.model import Fingerprint
    from hfbucket_plugin.fingerprint.watch import FingerprintWatch

_log = logging.getLogger(__name__)

_WORLD: Final = 0xFF00FF00
"""Mask of the world size and local world size in a `kv_rank`. LMCache keeps one layout for all ranks of a model's
world."""


MAX_ENGINES: Final = 1024
"""Maximum number of watched models and worlds; the least recently used are dropped, and added again when used."""


class _Engine:
    """Engines of one model and world."""

    def __init__(self, watch: FingerprintWatch, settings: L2Settings, key: ObjectKey) -> None:
        self._settings = settings
        self._key = key
        self._layout: ChunkLayout | None = None
        self.subject = watch.add(key.model_name, self._facts)

    def _facts(self) -> Fingerprint:
        key = self._key
        return detect.mp(self._settings, key.model_name, key.kv_rank, len(key.chunk_hash), self._layout)

    def learn(self, layout: ChunkLayout) -> None:
        """Merge the groups of a request into the known layout, because each request names only its own groups.

        The engine's facts change only with a group that is new or has another layout than before.
        """
        merged = layout if self._layout is None else layout.completed(self._layout)
        if merged != self._layout:
            self._layout = merged
            self.subject.changed()

    def learn_group(self, index: int, memory_obj: MemoryObj) -> None:
        """Add the layout of an object to store, if lookups have not reported it."""
        known = self._layout.groups if self._layout is not None else ()
        if any(group.object_group == index for group in known):
            return
        metadata = memory_obj.metadata
        shapes = metadata.shapes or [metadata.shape]
        dtypes = metadata.dtypes or [metadata.dtype]
        new = [detect.mp_group(index, shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.learn(ChunkLayout(groups=tuple(sorted((*known, *new), key=lambda group: group.object_group))))


class L2Fingerprints:
    """Check of an L2 adapter's keys against fingerprints.

    The keys of a task belong to one model and world (LMCache groups them so). Each method returns the outcome label if
    the keys may not be used, or None; see `EngineHandle.refusal`.

    Args:
        watch: Watch of the instance.
        settings: Settings of the adapter.
    """

    def __init__(self, watch: FingerprintWatch, settings: L2Settings) -> None:
        self._watch = watch
        self._settings = settings
        self._on = settings.fingerprint != "off"
        self._limited = RateLimitedLogger(_log, 3600.0)
        self._lock = forks.ForkSafeLock()
        self._engines: OrderedDict[tuple[str, int], _Engine] = OrderedDict()

    def of_lookup(self, keys: Sequence[ObjectKey], descs: Mapping[int, MemoryLayoutDesc]) -> str | None:
        """Check keys to look up, with the layouts that LMCache passes with them."""
        if self._on and keys:
            with self._without_raising():
                if (layout := detect.mp_layout(descs)) is not None:
                    for engine in self._of(keys):
                        engine.learn(layout)
        return self._refusal(keys)

    def of_store(self, keys: Sequence[ObjectKey], objects: Sequence[MemoryObj]) -> str | None:
        """Check objects to store."""
        if self._on:
            groups = {(_world(key), key.object_group_id): (key, obj) for key, obj in zip(keys, objects, strict=True)}
            with self._without_raising():
                for key, memory_obj in groups.values():
                    self._engine(key).learn_group(key.object_group_id, memory_obj)
        return self._refusal(keys, storing=True)

    def of_load(self, keys: Sequence[ObjectKey]) -> str | None:
        """Check keys to read or delete."""
        return self._refusal(keys)

    @contextlib.contextmanager
    def _without_raising(self) -> Iterator[None]:
        """Ignore errors in layouts, which are optional: a change in LMCache must not stop the engine."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - on any error the layout is unknown and not compared
            self._limited.warning(
                "layout",
                f"[{self._settings.name}] fingerprint: a layout is not understood: {type(error).__name__}: {error}",
            )

    def _refusal(self, keys: Sequence[ObjectKey], *, storing: bool = False) -> str | None:
        if not self._on:
            return None
        reasons = [engine.subject.refusal(storing=storing) for engine in self._of(keys)]
        return next((why for why in reasons if why), None)

    def _of(self, keys: Sequence[ObjectKey]) -> list[_Engine]:
        return [self._engine(key) for key in {_world(key): key for key in keys}.values()]

    def status(self) -> list[str]:
        """Return the problems as text; see `FingerprintWatch.status`."""
        return self._watch.status()

    def finish(self, secs: float) -> None:
        """Let records in progress be written; see `FingerprintWatch.finish`."""
        self._watch.finish(secs)

    def close(self) -> None:
        """Stop looking."""
        self._watch.close()

    def _engine(self, key: ObjectKey) -> _Engine:
        world = _world(key)
        with self._lock:
            engine = self._engines.get(world)
            if engine is None:
                engine = self._engines[world] = _Engine(self._watch, self._settings, key)
                if len(self._engines) > MAX_ENGINES:
                    self._watch.drop(self._engines.popitem(last=False)[1].subject)
            else:
                self._engines.move_to_end(world)
            return engine


def _world(key: ObjectKey) -> tuple[str, int]:
    return key.model_name, key.kv_rank & _WORLD
