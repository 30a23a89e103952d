"""Storage of fingerprints in a bucket, and the protocol by which the first writer's becomes the record.

::

    <prefix>/.hfbucket/fingerprints/<model>.json             the record: a valid fingerprint for each space of the model
    <prefix>/.hfbucket/fingerprints/<model>/<digest>.json    a claim: the fingerprint of one engine, never written again

`<model>` is encoded as in keys. All paths are nested, so that LMCache's built-in backend ignores them.

The Hub has no conditional write. An engine that finds no record of its space therefore adds its claim, and then looks
for the claim of the space that the Hub received first: only that one becomes the record. Each claim exists before its
engine looks, so two engines that start together both see the earlier one, in whatever order their other calls run.
Finally the record is read back, and whatever it contains is valid.

Claims that lost stay, so that operators see the other engines; so does the claim of an engine that finds another's
record.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.core.keys import RESERVED, decode_name, encode_name
from hfbucket_plugin.errors import HFBucketError, IntegrityError, KeyFormatError, RefusedError, TransportError
from hfbucket_plugin.fingerprint.model import MAX_VARIANTS, Fingerprint, FingerprintClaim, Record, differences
from hfbucket_plugin.hub import records
from hfbucket_plugin.hub.records import RecordStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfbucket_plugin.core.deadline import Deadline
    from hfbucket_plugin.core.keys import ContentId
    from hfbucket_plugin.fingerprint.model import Space
    from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
    from hfbucket_plugin.hub.records import Bytes

DIRECTORY: Final = f"{RESERVED}/fingerprints"

MAX_CLAIMS: Final = 16
"""Maximum number of claims of one model. Without a pinned hash seed, each start of each process has another
fingerprint."""

MAX_BYTES: Final = 1024 * 1024
"""Maximum size in bytes of an object to read; this package writes no longer ones."""

_READ_TOGETHER: Final = 16
"""Maximum number of claims in memory: anyone with write access can put a thousand of the largest size, and engines read
them."""

_TRIES: Final = 4
"""Number of attempts to write a record and read it back, because others may write theirs meanwhile."""

_CLAIM: Final = re.compile(r"[0-9a-f]{16}\.json")
_EARLY: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """Record of a model in the bucket.

    Attributes:
        record: Parsed record.
        content: Content of its object, by which a reader detects changes.
    """

    record: Record
    content: ContentId


@dataclass(frozen=True, slots=True)
class Claimed:
    """Claim in the bucket.

    Attributes:
        path: Path of its object.
        uploaded_at: Upload time.
        fingerprint: Parsed fingerprint; None if it is unreadable.
        why: Why it is unreadable.
    """

    path: str
    uploaded_at: datetime | None
    fingerprint: Fingerprint | None
    why: str = ""


class FingerprintStore:
    """Reads and writes the fingerprints of one instance. Every call blocks its thread.

    Args:
        bucket: Bucket of the instance.
        name: Prefix of the thread names.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._own = RecordStore(bucket, f"fingerprint-{name}")

    def path(self, model: str) -> str:
        """Return the path of a model's record."""
        return self._bucket.handle.join(f"{DIRECTORY}/{_encoded(model)}.json")

    def claim_path(self, fingerprint: Fingerprint) -> str:
        """Return the path of an engine's claim."""
        return self._bucket.handle.join(f"{DIRECTORY}/{_encoded(fingerprint.model)}/{fingerprint.digest}.json")

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, model: str, deadline: Deadline, known: StoredRecord | None = None) -> StoredRecord | None:
        """Read the record of a model; return None if there is none.

        Args:
            model: Name of the model.
            deadline: When to give up.
            known: Previous result; the object is not read again if it has not changed.

        Raises:
            IntegrityError: The object is not a record.
            HFBucketError: The Hub did not answer.
        """
        path = self.path(model)
        info = self._bucket.stat([path], deadline, patient=False).get(path)
        if info is None:
            return None
        if known is not None and known.content == info.content:
            return known
        return StoredRecord(Record.from_json(self._content(info, deadline), model, path), info.content)

    def _content(self, info: ObjectInfo, deadline: Deadline) -> bytes:
        return _bytes(self._contents([info], deadline)[0])

    def _contents(self, infos: Sequence[ObjectInfo], deadline: Deadline) -> list[Bytes | HFBucketError]:
        fitting = [info for info in infos if info.content.size <= MAX_BYTES]
        read = iter(self._own.read([(info.path, info.content) for info in fitting], deadline) if fitting else [])
        return [
            next(read)
            if info.content.size <= MAX_BYTES
            else IntegrityError(f"{info.path}: {info.content.size} bytes are no fingerprint")
            for info in infos
        ]

    def claims(self, model: str, deadline: Deadline) -> list[Claimed]:
        """Return the claims of a model in upload order, at most 1,000.

        Raises:
            HFBucketError: The listing failed. An unreadable claim does not raise.
        """
        head = self._bucket.handle.join(f"{DIRECTORY}/{_encoded(model)}/")
        infos, _ = self._bucket.list_page(head, None, deadline)
        own = [info for info in infos if _CLAIM.fullmatch(info.path.removeprefix(head))]
        found = []
        for start in range(0, len(own), _READ_TOGETHER):
            together = own[start : start + _READ_TOGETHER]
            contents = self._contents(together, deadline)
            found += [_claimed(info, data, model) for info, data in zip(together, contents, strict=True)]
        return sorted(found, key=lambda claim: (claim.uploaded_at or _EARLY, claim.path))

    @staticmethod
    def first_claimed(claims: Sequence[Claimed], record: Record | None) -> list[Fingerprint]:
        """Return what the next engine that stores will record: the first claim of each space without a record.

        Such a claim remains if an engine ends while it records itself.

        Args:
            claims: Claims of one model, as returned by `claims`.
            record: Record of the model, if there is one.
        """
        first: dict[Space, Fingerprint] = {}
        for claim in claims:
            if claim.fingerprint is not None:
                first.setdefault(claim.fingerprint.space, claim.fingerprint)
        return [one for space, one in first.items() if record is None or record.of(space) is None]

    def models(self, page_secs: float) -> Iterator[str]:
        """Yield the models with a record or a claim, each once, in the order of their encoded names.

        Raises:
            HFBucketError: A page failed.
        """
        head = self._bucket.handle.join(f"{DIRECTORY}/")
        seen: set[str] = set()
        for info in self._bucket.list_objects(head, page_secs):
            name, is_claim, _ = info.path.removeprefix(head).partition("/")
            try:
                model = _decoded(name if is_claim else name.removesuffix(".json"))
            except KeyFormatError:
                continue  # foreign object
            if model and model not in seen:
                seen.add(model)
                yield model

    # --- writing --------------------------------------------------------------------------------------------------

    def record_first(self, mine: Fingerprint, deadline: Deadline) -> StoredRecord:
        """Record a fingerprint unless its space has one; see the module.

        Returns:
            The valid record. Its fingerprint of the space may be another engine's.

        Raises:
            IntegrityError: The object of the model is not a record; it is not overwritten.
            HFBucketError: The state of the record is unknown.
        """
        found = self.read(mine.model, deadline)
        there = found.record.of(mine.space) if found is not None else None
        if there is None:
            wanted = self._first_claim(mine, deadline)
        elif not differences(there, mine) and there.completed(mine) != there:
            wanted = there.completed(mine)
        else:
            wanted = there
        for _ in range(_TRIES):
            if found is not None and found.record.of(mine.space) == wanted:
                return found
            base = found.record if found is not None else Record(model=mine.model)
            if there is None and len(base.variants) >= MAX_VARIANTS:
                raise RefusedError(
                    f"{self.path(mine.model)}: holds {MAX_VARIANTS} fingerprints already, and no more: write it again with "
                    "`python -m jobs fingerprint accept --from-file`"
                )
            self.write(base.having(wanted), deadline)
            found = self.read(mine.model, deadline)
            if found is not None and found.record.of(mine.space) is not None:
                return found
        raise TransportError(
            f"{self.path(mine.model)}: was written {_TRIES} times, and was not there when it was read back"
        )

    def _first_claim(self, mine: Fingerprint, deadline: Deadline) -> Fingerprint:
        """Return the fingerprint of the space that was claimed first."""
        self.claim(mine, deadline)
        claims = self.claims(mine.model, deadline)
        of_space = [
            claim.fingerprint for claim in claims if claim.fingerprint and claim.fingerprint.space == mine.space
        ]
        return of_space[0] if of_space else mine

    def claim(self, mine: Fingerprint, deadline: Deadline) -> bool:
        """Add the claim of an engine, unless it exists or there are too many.

        Returns:
            Whether the claim exists now.

        Raises:
            HFBucketError: It was not written, or its state is unknown.
        """
        path = self.claim_path(mine)
        head = path[: path.rindex("/") + 1]
        infos, _ = self._bucket.list_page(head, None, deadline)
        if any(info.path == path for info in infos):
            return True
        if len(infos) >= MAX_CLAIMS:
            return False
        self._own.put(path, FingerprintClaim.to_json(mine), deadline)
        return True

    def write(self, record: Record, deadline: Deadline) -> None:
        """Replace the record.

        Raises:
            HFBucketError: It was not written, or its state is unknown.
        """
        self._own.put(self.path(record.model), record.to_json(), deadline)

    def remove(self, paths: Sequence[str], deadline: Deadline) -> None:
        """Delete claims.

        Raises:
            HFBucketError: Some still exist, or their state is unknown.
        """
        records.remove(self._bucket, paths, deadline)

    def close(self) -> None:
        """Stop writing."""
        self._own.close()


_DOTS: Final = {".": "%2E", "..": "%2E%2E"}
"""Encodings for models such as `.` (from `vllm serve .`), whose names are not valid path segments."""


def _encoded(model: str) -> str:
    name = encode_name(model)
    return _DOTS.get(name, name)


def _decoded(name: str) -> str:
    return next((model for model, dots in _DOTS.items() if dots == name), "") or decode_name(name)


def _claimed(info: ObjectInfo, data: Bytes | HFBucketError, model: str) -> Claimed:
    try:
        fingerprint = FingerprintClaim.from_json(_bytes(data), info.path)
        if fingerprint.model != model:
            raise IntegrityError(f"{info.path}: is of {fingerprint.model!r}")
    except HFBucketError as error:
        return Claimed(info.path, info.uploaded_at, None, str(error))
    return Claimed(info.path, info.uploaded_at, fingerprint)


def _bytes(data: Bytes | HFBucketError) -> bytes:
    if isinstance(data, HFBucketError):
        raise data
    return bytes(data)
