"""Whether one chunk arrives whole and right, and how fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, error, ok
from hfbucket_plugin.cli.reading import fetch
from hfbucket_plugin.cli.words import size
from hfbucket_plugin.errors import IntegrityError

if TYPE_CHECKING:
    from hfbucket_plugin.catalog import ChunkEntry
    from hfbucket_plugin.cli.case import Case

NAME: Final = "throughput"


def check(case: Case, chunk: ChunkEntry) -> Finding:
    """Read one chunk and compare its Xet hash.

    Raises:
        HFBucketError: It did not arrive.
    """
    try:
        fetched = case.ask(NAME, lambda deadline: fetch(case.bucket, chunk.text, chunk.content, deadline))
    except IntegrityError as caught:
        verify = case.named.setting("verify")
        advice = (
            f"set {verify} to hash" if case.settings.verify != "hash" else f"{verify} is hash, so it is never served"
        )
        return error(
            NAME,
            f"the bytes of a chunk are not what was stored: {caught}",
            f"{advice}; if it stays so, delete the object",
        )
    speed = size(chunk.content.size / max(fetched.seconds, 1e-6))
    return ok(NAME, f"{size(chunk.content.size)} in {fetched.seconds:.2f} s, {speed}/s, hash right: {chunk.text}")
