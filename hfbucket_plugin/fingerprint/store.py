"""Where fingerprints lie in a bucket, and how the first writer's comes to count.

::

    <prefix>/.hfbucket/fingerprints/<model>.json             the record: what counts, for each space of the model
    <prefix>/.hfbucket/fingerprints/<model>/<digest>.json    a claim: what one engine is, never written again

`<model>` is encoded as in keys. Everything is nested, so that LMCache's built-in backend passes it by.

The Hub has no conditional write. So an engine that finds no record of its space adds its claim first, and then looks which
claim of the space the Hub took first: only that one becomes the record. A claim is there before its engine looks, so of two
that begin at the same time both see the earlier one, whichever order their other calls have. Afterwards the record is
read back: whatever is there counts.

A claim that lost stays, so that operators see who else was there; and so does that of an engine which finds the record of
another.
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
"""Claims of one model: an engine that would add one more does not. Where the hash seed is not pinned, each start of each
process is another fingerprint."""

MAX_BYTES: Final = 1024 * 1024
"""Largest that is read: what is longer was not written by us."""

_READ_TOGETHER: Final = 16
"""Claims in memory at one time: anyone who may write can put a thousand of the largest size there, and engines read them."""

_TRIES: Final = 4
"""To write a record so that it is there when it is read back; others write theirs meanwhile."""

_CLAIM: Final = re.compile(r"[0-9a-f]{16}\.json")
_EARLY: Final = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """The record of a model, as it lies in the bucket.

    Attributes:
        record: What it says.
        content: Of its object, by which a reader knows that nothing changed.
    """

    record: Record
    content: ContentId


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claim, as it lies in the bucket.

    Attributes:
        path: Of its object.
        uploaded_at: When the Hub took it.
        fingerprint: What it says; None where it cannot be read.
        why: Why not.
    """

    path: str
    uploaded_at: datetime | None
    fingerprint: Fingerprint | None
    why: str = ""


class FingerprintStore:
    """Reads and writes the fingerprints of one instance. Every call blocks its thread.

    Args:
        bucket: The instance's.
        name: Names threads.
    """

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket = bucket
        self._own = RecordStore(bucket, f"fingerprint-{name}")

    def path(self, model: str) -> str:
        """Where the record of a model lies."""
        return self._bucket.handle.join(f"{DIRECTORY}/{_encoded(model)}.json")

    def claim_path(self, fingerprint: Fingerprint) -> str:
        """Where the claim of an engine lies."""
        return self._bucket.handle.join(f"{DIRECTORY}/{_encoded(fingerprint.model)}/{fingerprint.digest}.json")

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, model: str, deadline: Deadline, known: StoredRecord | None = None) -> StoredRecord | None:
        """The record of a model, or None when there is none.

        Args:
            model: Its name.
            deadline: When to give up.
            known: What was read before: it is not read again where its object is still the same.

        Raises:
            IntegrityError: The object holds no record.
            HFBucketError: The Hub did not say.
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
        """The claims of a model, those first that the Hub took first. No more than 1000.

        Raises:
            HFBucketError: The Hub did not say which there are. One that cannot be read raises nothing.
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
        """What the next engine that stores will record: the first claim of each space of which nothing is recorded.

        An engine that ends while it records itself leaves such a claim.

        Args:
            claims: Of one model, in the order of `claims`.
            record: Of that model, if there is one.
        """
        first: dict[Space, Fingerprint] = {}
        for claim in claims:
            if claim.fingerprint is not None:
                first.setdefault(claim.fingerprint.space, claim.fingerprint)
        return [one for space, one in first.items() if record is None or record.of(space) is None]

    def models(self, page_secs: float) -> Iterator[str]:
        """The models of which there is a record or a claim, each once, in the order of their names' encodings.

        Raises:
            HFBucketError: A page did not come.
        """
        head = self._bucket.handle.join(f"{DIRECTORY}/")
        seen: set[str] = set()
        for info in self._bucket.list_objects(head, page_secs):
            name, is_claim, _ = info.path.removeprefix(head).partition("/")
            try:
                model = _decoded(name if is_claim else name.removesuffix(".json"))
            except KeyFormatError:
                continue  # not one of ours
            if model and model not in seen:
                seen.add(model)
                yield model

    # --- writing --------------------------------------------------------------------------------------------------

    def record_first(self, mine: Fingerprint, deadline: Deadline) -> StoredRecord:
        """Record a fingerprint unless there is one of its space; see the module.

        Returns:
            The record that counts. Its fingerprint of the space may be another's.

        Raises:
            IntegrityError: The object of the model holds no record: it is not overwritten.
            HFBucketError: Nothing is known about the record now.
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
        """Which fingerprint of the space was claimed first."""
        self.claim(mine, deadline)
        claims = self.claims(mine.model, deadline)
        of_space = [
            claim.fingerprint for claim in claims if claim.fingerprint and claim.fingerprint.space == mine.space
        ]
        return of_space[0] if of_space else mine

    def claim(self, mine: Fingerprint, deadline: Deadline) -> bool:
        """Add the claim of an engine, unless it is there, or there are too many.

        Returns:
            Whether it is there now.

        Raises:
            HFBucketError: It is not, or its state is unknown.
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
        """Put a record in the place of what is there.

        Raises:
            HFBucketError: It is not there, or its state is unknown.
        """
        self._own.put(self.path(record.model), record.to_json(), deadline)

    def remove(self, paths: Sequence[str], deadline: Deadline) -> None:
        """Delete claims.

        Raises:
            HFBucketError: Some are still there, or their state is unknown.
        """
        records.remove(self._bucket, paths, deadline)

    def close(self) -> None:
        """Write nothing any more."""
        self._own.close()


_DOTS: Final = {".": "%2E", "..": "%2E%2E"}
"""`vllm serve .` serves the model `.`, whose name would be no segment of a path."""


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
