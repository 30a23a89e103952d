"""Construction of an instance's client, transfer and bucket from its settings, without opening a connection."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin.config.settings import MIB, PIECE_BYTES
from hfbucket_plugin.core.concurrency import FairPool
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.files import TempDir
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.hub.client import HubClient
from hfbucket_plugin.hub.rate_limit import RateLimiter
from hfbucket_plugin.hub.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.config.settings import InstanceSettings
    from hfbucket_plugin.core import telemetry


_BACKGROUND_SHARE: Final = 4
"""In an engine, reads of the index, journals and fingerprints hold at most one in this many threads."""

_BULK_STREAMS: Final = 64
_BULK_RANGE_BYTES: Final = 32 * MIB
_BULK_PIECE_BYTES: Final = 16 * MIB
_BULK_BUFFER_BYTES: Final = 128 * MIB
_BOUND_RANGE_BYTES: Final = 8 * MIB
_BOUND_PIECE_BYTES: Final = 4 * MIB
"""Piece size for an instance that limits the bytes in flight, so that several pieces fit into the limit."""


@dataclass(frozen=True, slots=True)
class ReadProfile:
    """Concurrency and sizes of reads.

    Attributes:
        streams: Maximum number of open streams, and of threads that read from them.
        range_bytes: Size of the ranges of larger objects, each read in a stream of its own.
        piece_bytes: Size of the pieces that a stream requests and returns.
        buffer_bytes: Maximum number of bytes that all streams hold together.
    """

    streams: int
    range_bytes: int
    piece_bytes: int
    buffer_bytes: int

    @classmethod
    def online(cls, settings: InstanceSettings) -> ReadProfile:
        """Return the profile for an engine: little memory, and pieces too small to hold the GIL for long."""
        return cls(
            settings.max_parallel_reads,
            settings.range_bytes,
            min(PIECE_BYTES, settings.range_bytes),
            settings.buffer_bytes,
        )

    @classmethod
    def bulk(cls, settings: InstanceSettings) -> ReadProfile:
        """Return the profile for a bulk reader: twice the streams, and pieces eight times as large, as in an engine.

        With 40 ms a request, 64 streams read objects of 1 MiB 1.7 times as fast as 32, and more were no faster on two
        cores. A large piece costs both ends less than several small ones (docs/decisions/0013). The instance's own
        `max_parallel_reads` and `max_inflight_bytes` take precedence.
        """
        said = settings.model_fields_set
        streams = settings.max_parallel_reads if "max_parallel_reads" in said else _BULK_STREAMS
        if "max_inflight_bytes" not in said:
            return cls(streams, _BULK_RANGE_BYTES, _BULK_PIECE_BYTES, _BULK_BUFFER_BYTES)
        range_bytes = min(_BOUND_RANGE_BYTES, settings.max_inflight_bytes)
        return cls(streams, range_bytes, min(_BOUND_PIECE_BYTES, range_bytes), settings.buffer_bytes)


def open_bucket(
    settings: InstanceSettings,
    instance: str,
    sink: telemetry.Sink,
    read_timeout_secs: float,
    *,
    online: bool = False,
    bulk: bool = False,
    counted: bool = False,
) -> Bucket:
    """Create the client of an instance's bucket.

    Args:
        settings: Settings of the instance.
        instance: Name of the instance, for errors and metrics.
        sink: Metrics sink for requests.
        read_timeout_secs: Deadline of reads in seconds; hf_xet's own timeouts are set below it.
        online: Whether an engine waits for reads: they then fail at once during a pause of the Hub, which tools wait
            for.
        bulk: Whether a process of its own reads a great many objects; see `ReadProfile.bulk`.
        counted: Whether every requested byte must be counted: hf_xet then makes no retries of its own.
    """
    reading = ReadProfile.bulk(settings) if bulk else ReadProfile.online(settings)
    hub = HubClient(
        settings.endpoint,
        instance=instance,
        token=settings.resolve_token,
        token_source=f"the environment variable {settings.token_env} (token_env)",
        sink=sink,
        rate_limiter=RateLimiter(instance, settings.max_hub_calls_per_minute),
    )
    transfer = Transfer(
        hub,
        settings.bucket_handle.bucket_id,
        read_workers=FairPool(
            f"hfbucket-read-{instance}", reading.streams, reading.streams // _BACKGROUND_SHARE if online else None
        ),
        range_bytes=reading.range_bytes,
        piece_bytes=reading.piece_bytes,
        buffer_bytes=reading.buffer_bytes,
        read_timeout_secs=read_timeout_secs,
        write_timeout_secs=settings.put_timeout_secs,
        streams=reading.streams,
        patient=not online,
        read_retries=0 if counted else 1,
        temp_dir=TempDir(settings.download_tmp_dir),
    )
    return Bucket(hub, settings.bucket_handle, transfer)


@contextlib.contextmanager
def opened(named: InstanceConfig, timeout_secs: float, *, few_calls: bool = False) -> Iterator[Bucket]:
    """Open the client of an instance's bucket for a `with` block.

    Args:
        named: Instance to open.
        timeout_secs: Maximum time of a request in seconds. hf_xet's own timeouts follow the deadlines of an instance.
        few_calls: Whether at most some dozen calls will be made: `max_hub_calls_per_minute`, which keeps engines from
            using up a quota, is then ignored.
    """
    own: dict[str, Any] = {"put_timeout_secs": timeout_secs}
    if few_calls:
        own["max_hub_calls_per_minute"] = None
    settings = named.settings.model_copy(update=own)
    bucket = open_bucket(settings, named.name, MemorySink(), timeout_secs)
    try:
        yield bucket
    finally:
        bucket.close()


PAGE_SECS: Final = 60.0
"""Maximum time for a page of a listing in seconds, without pauses that the Hub requests."""


REQUEST_SECS: Final = 60.0


LISTING_SECS: Final = 3600.0
"""Maximum time in seconds that read-only commands without `--max-duration` wait for pauses of the Hub."""


def files_in(bucket: Bucket) -> int | None:
    """Return the number of objects that the bucket reports; None if it reports none."""
    total = bucket.info(Deadline.patient(REQUEST_SECS)).get("totalFiles")
    return total if type(total) is int else None
