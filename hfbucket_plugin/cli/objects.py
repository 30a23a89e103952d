"""What the objects of an instance are: chunks of either kind, ours, or somebody else's."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.catalog import chunk_entry
from hfbucket_plugin.handle import RESERVED
from hfbucket_plugin.keys import ClassicKey, encode_name, is_probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfbucket_plugin.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.catalog import ChunkEntry


class Kind(StrEnum):
    """What an object is. The values are shown, and stand in JSON."""

    CLASSIC = "classic"
    MP = "mp"
    PROBE = "probe"  # with which LMCache's health monitor tests a backend
    OWN = "own"  # below `<prefix>/.hfbucket/`
    FOREIGN = "foreign"

    def counted(self, number: int) -> str:
        """A number of them, in words."""
        return f"{number:,} {_WORDS[self]}"


_WORDS: Final = {
    Kind.CLASSIC: "with classic keys",
    Kind.MP: "with MP keys",
    Kind.PROBE: "of LMCache's probe",
    Kind.OWN: f"below {RESERVED}/",
    Kind.FOREIGN: "foreign",
}


@dataclass(frozen=True, slots=True)
class Listed:
    """An object of a listing.

    Attributes:
        info: As the Hub lists it.
        kind: What it is.
        chunk: Its key, where it has one.
    """

    info: ObjectInfo
    kind: Kind
    chunk: ChunkEntry | None


def walk(bucket: Bucket, key_prefix: str, page_secs: float, *, model: str | None = None) -> Iterator[Listed]:
    """Stream the objects of an instance whose key starts with a text; an empty one is everything.

    Args:
        bucket: The instance's.
        key_prefix: Matched by the Hub, so that nothing else is listed.
        page_secs: Most seconds a page may take.
        model: Leave out the chunks of other models, whose names may go on after an `@`; None for those of all models.

    Raises:
        HFBucketError: A page did not come: what was yielded is no complete listing.
    """
    for info in bucket.list_objects(bucket.handle.join(encode_name(key_prefix)), page_secs):
        listed = classify(bucket, info)
        if model is None or listed.chunk is None or listed.chunk.key.model == model:
            yield listed


def classify(bucket: Bucket, info: ObjectInfo) -> Listed:
    """Say what an object of an instance is."""
    chunk = chunk_entry(bucket, info)
    if chunk is None:
        name = bucket.handle.relative(info.path) or ""
        return Listed(info, Kind.OWN if name.startswith(f"{RESERVED}/") else Kind.FOREIGN, None)
    if is_probe(chunk.text):
        return Listed(info, Kind.PROBE, chunk)
    return Listed(info, Kind.CLASSIC if isinstance(chunk.key, ClassicKey) else Kind.MP, chunk)
