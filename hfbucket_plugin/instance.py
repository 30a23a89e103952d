"""One configured instance, put together: settings → client, transfer and bucket. Opens no connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfbucket_plugin.bucket import Bucket
from hfbucket_plugin.hub import HubClient
from hfbucket_plugin.pacing import Pacing
from hfbucket_plugin.settings import PIECE_BYTES
from hfbucket_plugin.transfer import Transfer
from hfbucket_plugin.workers import WorkerPool

if TYPE_CHECKING:
    from hfbucket_plugin import metrics
    from hfbucket_plugin.settings import InstanceSettings


def open_bucket(
    settings: InstanceSettings, instance: str, sink: metrics.Sink, read_timeout_secs: float, *, online: bool = False
) -> Bucket:
    """Make the door to an instance's bucket.

    Args:
        settings: The instance's.
        instance: Its name, for errors and metrics.
        sink: Where requests are counted.
        read_timeout_secs: The deadline that reads will have; hf_xet's own timeouts are set below it.
        online: Whether an engine waits for reads: they then fail at once where tools wait for the Hub's pauses.
    """
    hub = HubClient(
        settings.endpoint,
        instance=instance,
        token=settings.resolve_token,
        token_source=f"the environment variable {settings.token_env} (token_env)",
        sink=sink,
        pacing=Pacing(instance, settings.max_hub_calls_per_minute),
    )
    transfer = Transfer(
        hub,
        settings.bucket_handle.bucket_id,
        read_workers=WorkerPool(f"hfbucket-read-{instance}", settings.max_parallel_reads),
        range_bytes=settings.range_bytes,
        piece_bytes=min(PIECE_BYTES, settings.range_bytes),
        buffer_bytes=settings.buffer_bytes,
        read_timeout_secs=read_timeout_secs,
        write_timeout_secs=settings.put_timeout_secs,
        streams=settings.max_parallel_reads,
        patient=not online,
    )
    return Bucket(hub, settings.bucket_handle, transfer)
