"""Objects proven bad: told, and recorded in the bucket for operators. Never deleted: that is a human's decision.

The record of an object lies at `<prefix>/.hfbucket/bad/<xet hash>.json`, nested, so that LMCache's built-in backend passes
it by.
"""

from __future__ import annotations

import json
import logging
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin import metrics
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.handle import RESERVED
from hfbucket_plugin.own_objects import OwnObjects
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.content import Content
    from hfbucket_plugin.settings import InstanceSettings

_log = logging.getLogger(__name__)

BAD_DIRECTORY: Final = f"{RESERVED}/bad"
_RECORD_SECS: Final = 30.0
_BACKLOG: Final = 100


class BadObjects:
    """Records objects that are proven bad, in the background.

    Args:
        bucket: Where.
        settings: The instance's: without the right to write, they are told and not recorded.
        instance: Its name.
        sink: Where they are counted.
    """

    def __init__(self, bucket: Bucket, settings: InstanceSettings, instance: str, sink: metrics.Sink) -> None:
        self._bucket = bucket
        self._settings = settings
        self._instance = instance
        self._sink = sink
        self._threads = WorkerPool(f"hfbucket-bad-{instance}", 1, _BACKLOG)
        self._own = OwnObjects(bucket, f"bad-{instance}")

    def record(self, key: str, content: Content, why: str) -> None:
        """Tell of an object whose content failed its hash in two independent fetches."""
        self._sink.count(metrics.BAD_OBJECTS, instance=self._instance)
        _log.error(
            "[%s] %s is proven bad: two fetches failed its hash. It is not served; delete it, or let it be. Storing it "
            "again may be deduplicated onto the same bad bytes. %s", self._instance, key, why,
        )  # fmt: skip
        if self._settings.writes:
            try:
                self._threads.submit(self._write, key, content, why)
            except RuntimeError as error:
                _log.warning("[%s] %s: no record was written: %s", self._instance, key, error)

    def _write(self, key: str, content: Content, why: str) -> None:
        record = {
            "key": key,
            "xet_hash": content.xet_hash,
            "size": content.size,
            "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": platform.node(),
            "why": why,
        }
        deadline = Deadline.after(_RECORD_SECS)
        path = self._bucket.handle.join(f"{BAD_DIRECTORY}/{content.xet_hash}.json")
        try:
            stored = self._own.upload(json.dumps(record).encode(), deadline)
            failed = self._bucket.add({path: stored}, deadline)
        except HFBucketError as error:
            _log.warning("[%s] %s: no record was written: %s", self._instance, key, error)
            return
        for failure in failed.values():
            _log.warning("[%s] %s: no record was written: %s", self._instance, key, failure.message)

    def close(self) -> None:
        """Record nothing any more."""
        self._threads.close()
        self._own.close()
