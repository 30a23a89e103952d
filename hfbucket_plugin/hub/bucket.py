"""Bucket client: look up, list, read, write, copy and delete objects; independent of LMCache.

Routes and fields follow `huggingface_hub` 2.x (`hf_api.py`, `_buckets.py`). They are called directly because its own
functions have no timeout, cannot be cancelled, and read into files only.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote, unquote, urlsplit

from hfbucket_plugin.core.deadline import Deadline, expect_time
from hfbucket_plugin.core.keys import RESERVED
from hfbucket_plugin.errors import AccessDeniedError, BucketMissingError, HFBucketError, ItemFailure, TransportError
from hfbucket_plugin.hub import answers
from hfbucket_plugin.hub.xet_session import fetch_access

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from hfbucket_plugin.core.keys import BucketHandle, ContentId
    from hfbucket_plugin.hub.client import Answer, HubClient
    from hfbucket_plugin.hub.transfer import Transfer

MAX_BATCH: Final = 1000
"""Maximum number of paths of one paths-info and of operations of one batch, as in `huggingface_hub`."""

_CONFLICT, _UNPROCESSABLE = 409, 422
_REFUSALS: Final = frozenset(range(400, 500))
_LIST_ATTEMPTS: Final = 5
_PATIENT_ATTEMPTS: Final = 30
_MAX_SHOWN_PATH: Final = 200
_LONGEST_CURSOR: Final = 16 * 1024

_FIRST_LOOK: Final = 100
"""Number of pages after which a listing is first compared with the bucket's object count; doubled after each
comparison."""

_LOOK_SECS: Final = 15.0
_MOST_IDLE_PAGES: Final = 16
"""Number of consecutive pages without new objects after which a listing fails."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Object as listed by the Hub.

    Attributes:
        path: Path from the root of the bucket.
        content: Hash and size.
        uploaded_at: Upload time, or else the client's `mtime`; None if the Hub returned neither.
    """

    path: str
    content: ContentId
    uploaded_at: datetime | None


class ListingProgress:
    """Ensures that a listing terminates: each page must have a new cursor and new objects.

    Args:
        of: Prefix that is listed, for errors.
    """

    def __init__(self, of: str) -> None:
        self._of = of
        self._cursors: set[int] = set()
        self._firsts: set[int] = set()
        self._idle = 0

    def see(self, infos: Sequence[ObjectInfo], cursor: str | None) -> None:
        """Record a page.

        Args:
            infos: Objects on the page.
            cursor: Cursor of the following page; None for the last page.

        Raises:
            TransportError: The listing repeats a cursor, or many pages brought nothing new.
        """
        if cursor is None:
            return
        if hash(cursor) in self._cursors:
            raise TransportError(f"tree: the Hub's pages below {self._of!r} lead back to one that was there")
        self._cursors.add(hash(cursor))
        first = hash(infos[0].path) if infos else None
        self._idle = self._idle + 1 if first is None or first in self._firsts else 0
        if self._idle >= _MOST_IDLE_PAGES:
            raise TransportError(
                f"tree: the last {self._idle} of the Hub's pages below {self._of!r} bring nothing new, and another one always "
                "follows: the listing is abandoned"
            )
        if first is not None:
            self._firsts.add(first)


class ListingBound:
    """Compares the length of a listing with the bucket's object count, ever less often, so that an endless one fails.

    Args:
        bucket: Bucket that is listed.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._pages = self._shown = 0
        self._look_at = _FIRST_LOOK

    def see(self, shown: int) -> None:
        """Record a page.

        Args:
            shown: Number of objects on the page.

        Raises:
            TransportError: The listing returned far more objects than the bucket holds.
        """
        self._pages += 1
        self._shown += shown
        if self._pages < self._look_at:
            return
        self._look_at *= 2
        try:
            total = self._bucket.info(Deadline.patient(_LOOK_SECS)).get("totalFiles")
        except HFBucketError:  # retried later; the listing itself reports the problem
            return
        if isinstance(total, int) and self._shown > 2 * total + _FIRST_LOOK // 2:
            raise TransportError(
                f"tree: the Hub's pages show {self._shown} objects, and continue, but the bucket reports {total}: the listing is "
                "abandoned"
            )


class Bucket:
    """One bucket, accessed with the token of one instance.

    Args:
        hub: Client that makes the requests.
        handle: Bucket to access. Its prefix is not applied: callers pass whole paths.
        transfer: Transfer of contents.
    """

    def __init__(self, hub: HubClient, handle: BucketHandle, transfer: Transfer) -> None:
        self._hub = hub
        self.handle = handle
        self.transfer = transfer
        self._api = f"/api/buckets/{handle.bucket_id}"

    @property
    def paused_secs(self) -> float:
        """Seconds left of a pause that the Hub requested; 0 without a pause."""
        return self._hub.rate_limiter.paused_secs

    @property
    def background_wait_secs(self) -> float:
        """Seconds until background work may call the Hub; see `RateLimiter.background_wait_secs`."""
        return self._hub.rate_limiter.background_wait_secs

    def refuse_in_pause(self, what: str) -> None:
        """Raise if a call would be refused because of a pause that the Hub requested.

        Raises:
            ThrottledError: A pause is in effect; the message names `what`.
        """
        self._hub.rate_limiter.refuse_in_pause(what)

    def stat(
        self,
        paths: Sequence[str],
        deadline: Deadline,
        *,
        patient: bool = True,
        sent: threading.Event | None = None,
    ) -> dict[str, ObjectInfo]:
        """Look up objects, 1,000 in a request.

        Args:
            paths: Paths from the root of the bucket.
            deadline: When to give up.
            patient: See `HubClient.request`.
            sent: See `HubClient.request`.

        Returns:
            The existing objects, by path, in no particular order. The Hub omits missing ones.

        Raises:
            HFBucketError: See `HubClient.request`; nothing is known about any path then.
        """
        found: dict[str, ObjectInfo] = {}
        for start in range(0, len(paths), MAX_BATCH):
            found |= self._paths_info(paths[start : start + MAX_BATCH], deadline, patient=patient, sent=sent)[0]
        return found

    def stat_dated(
        self, paths: Sequence[str], deadline: Deadline, *, patient: bool = False
    ) -> tuple[dict[str, ObjectInfo], datetime | None]:
        """Look up at most 1,000 objects in one request, and return the time of the response.

        Args:
            paths: Paths from the root of the bucket.
            deadline: When to give up.
            patient: Whether to wait for the end of pauses that the Hub requested.

        Returns:
            The existing objects, by path, and the response's `Date` to the second; None without that header.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        found, answer = self._paths_info(paths, deadline, patient=patient)
        return found, answer.date

    def _paths_info(
        self, paths: Sequence[str], deadline: Deadline, *, patient: bool, sent: threading.Event | None = None
    ) -> tuple[dict[str, ObjectInfo], Answer]:
        answer = self._hub.request(
            "POST",
            f"{self._api}/paths-info",
            route="paths-info",
            deadline=deadline,
            attempts=2,
            patient=patient,
            room=answers.BodyLimit.for_records(paths),
            sent=sent,
            json={"paths": list(paths)},
        )
        asked = set(paths)
        infos = [_object_info(item, "paths-info") for item in answer.records("paths-info")]
        return {info.path: info for info in infos if info.path in asked}, answer

    def list_objects(
        self, prefix: str, page_secs: float, each_page: Callable[[], None] = lambda: None
    ) -> Iterator[ObjectInfo]:
        """Stream the objects whose path starts with `prefix`, page by page.

        The Hub matches lexically: `v1` also lists `v10/…`.

        Args:
            prefix: Start of a path; empty for all.
            page_secs: Maximum time for a page in seconds, including retries.
            each_page: Called before each page is requested, including empty ones; an exception ends the listing.

        Raises:
            HFBucketError: A page failed; the objects yielded before are not a complete listing.
        """
        progress, amount, cursor = ListingProgress(prefix), ListingBound(self), None
        while True:
            each_page()
            expect_time(f"listing {prefix!r}")
            infos, cursor = self.list_page(prefix, cursor, Deadline.patient(page_secs))
            progress.see(infos, cursor)
            if cursor is not None:
                amount.see(len(infos))
            yield from infos
            if cursor is None:
                return

    def list_page(self, prefix: str, cursor: str | None, deadline: Deadline) -> tuple[list[ObjectInfo], str | None]:
        """Return one page of the objects whose path starts with `prefix`, for stateless callers; see `list_objects`.

        Args:
            prefix: Start of a path; empty for all.
            cursor: Cursor from the previous page; None for the first page. It can only lead to this listing.
            deadline: When to give up, including retries.

        Returns:
            The objects, and the cursor of the next page; None after the last page.

        Raises:
            HFBucketError: The page failed.
        """
        infos, following, _ = self.list_page_dated(prefix, cursor, deadline)
        return infos, following

    def list_page_dated(
        self, prefix: str, cursor: str | None, deadline: Deadline
    ) -> tuple[list[ObjectInfo], str | None, datetime | None]:
        """Return one page, as `list_page`, and the time of the response to the second; None without a `Date` header.

        Raises:
            HFBucketError: The page failed.
        """
        tree = urlsplit(self._tree(prefix))
        # A later page deserves more attempts, because a failure loses all pages before it.
        attempts = _LIST_ATTEMPTS if cursor is None or deadline.pauses is None else _PATIENT_ATTEMPTS
        answer = self._hub.request(
            "GET",
            tree._replace(query=cursor or tree.query).geturl(),
            route="tree",
            deadline=deadline,
            attempts=attempts,
            room=answers.PAGE,
        )
        infos = [_object_info(item, "tree") for item in answer.records("tree") if item.get("type") == "file"]
        return infos, self._cursor(answer.next_page, tree.path), answer.date

    def _cursor(self, link: str | None, path: str) -> str | None:
        """Return the cursor of the next page, whichever host the link names.

        A mirror passes links on as its upstream wrote them; only the configured Hub is requested, for this listing.

        Raises:
            TransportError: The link leads to another listing, or its cursor cannot be sent.
        """
        if link is None:
            return None
        try:
            parts = urlsplit(link)
            elsewhere = not unquote(parts.path).endswith(unquote(path)) or not parts.query
        except ValueError:
            elsewhere = True
        if elsewhere:
            raise TransportError(f"tree: the Hub's next page belongs to another listing: {self._hub.clean(link)!r}")
        if len(parts.query) > _LONGEST_CURSOR or not (parts.query.isascii() and parts.query.isprintable()):
            raise TransportError(
                f"tree: the Hub's next page has a cursor that cannot be sent ({len(parts.query)} characters)"
            )
        return parts.query

    def _tree(self, prefix: str) -> str:
        return f"{self._api}/tree" + (f"/{quote(prefix, safe='')}" if prefix else "") + "?recursive=true"

    def add(self, files: Mapping[str, ContentId], deadline: Deadline, *, once: bool = False) -> dict[str, ItemFailure]:
        """Name uploaded contents (see `Transfer.upload`); only then are they in the bucket.

        Args:
            files: Contents by path.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            The failures, by path; empty if all succeeded.

        Raises:
            HFBucketError: The request failed as a whole.
        """
        return self.replace((), files, deadline, once=once)

    def replace(
        self, old: Sequence[str], files: Mapping[str, ContentId], deadline: Deadline, *, once: bool = False
    ) -> dict[str, ItemFailure]:
        """Name contents, then delete the objects that they replace, in one call.

        Args:
            old: Paths to delete.
            files: Contents by path.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            The failures, by path.

        Raises:
            HFBucketError: The request failed as a whole.
        """
        now = int(time.time() * 1000)
        return self._batch(
            [
                {"type": "addFile", "path": path, "xetHash": content.xet_hash, "mtime": now}
                for path, content in files.items()
            ]
            + [{"type": "deleteFile", "path": path} for path in old],
            deadline,
            once=once,
        )

    def copy(
        self, source: BucketHandle, files: Mapping[str, ContentId], deadline: Deadline, *, once: bool = False
    ) -> dict[str, ItemFailure]:
        """Copy contents from another bucket in the same storage region, by hash and without moving bytes.

        Args:
            source: Bucket that holds the contents.
            files: Contents by destination path.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            The failures, by path.

        Raises:
            HFBucketError: The request failed as a whole.
        """
        now = int(time.time() * 1000)
        return self._batch(
            [
                {
                    "type": "copyFile",
                    "path": path,
                    "xetHash": content.xet_hash,
                    "mtime": now,
                    "sourceRepoType": "bucket",
                    "sourceRepoId": source.bucket_id,
                }
                for path, content in files.items()
            ],
            deadline,
            once=once,
        )

    def delete(
        self, paths: Sequence[str], deadline: Deadline, *, once: bool = False, urgent: bool = False
    ) -> dict[str, ItemFailure]:
        """Delete objects immediately and permanently; the Hub keeps no versions.

        Args:
            paths: Paths from the root of the bucket.
            deadline: When to give up.
            once: Whether to send the request only now, without a retry: for callers that have just looked up the
                objects, and would have to do so again before another attempt.
            urgent: See `HubClient.request`.

        Returns:
            The failures, by path.

        Raises:
            HFBucketError: A request failed as a whole; earlier requests, of 1,000 paths each, were carried out.
        """
        return self._batch([{"type": "deleteFile", "path": path} for path in paths], deadline, once=once, urgent=urgent)

    def _batch(
        self, operations: Sequence[dict[str, Any]], deadline: Deadline, *, once: bool = False, urgent: bool = False
    ) -> dict[str, ItemFailure]:
        """Send operations, 1,000 in a request. A batch is not a transaction: items fail individually."""
        failures: dict[str, ItemFailure] = {}
        for start in range(0, len(operations), MAX_BATCH):
            batch = operations[start : start + MAX_BATCH]
            paths = {operation["path"] for operation in batch}
            answer = self._hub.request(
                "POST",
                f"{self._api}/batch",
                route="batch",
                deadline=deadline,
                attempts=1 if once else 2,  # adding, copying and deleting are idempotent
                patient=not once,
                urgent=urgent,
                allow=frozenset({_UNPROCESSABLE}),
                room=answers.BodyLimit.for_records([*paths, *paths]),  # a failure message may repeat the path
                content="".join(json.dumps(operation) + "\n" for operation in batch).encode(),
                headers={"Content-Type": "application/x-ndjson"},
            )
            for item in _failed_items(answer.json("batch"), answer.status):
                path, reason = item.get("path"), item.get("error", "no reason given")
                if (
                    not isinstance(path, str) or path not in paths
                ):  # the results of the requested paths are then unknown too
                    raise TransportError("batch: the Hub says that an item failed which was not in the batch")
                failures[path] = ItemFailure(path, "hub", self._hub.clean(reason))
        return failures

    def create(self, deadline: Deadline) -> None:
        """Create the bucket unless it exists.

        Raises:
            HFBucketError: The bucket does not exist and could not be created.
        """
        try:
            self._hub.request(
                "POST",
                self._api,
                route="create",
                deadline=deadline,
                attempts=2,
                allow=frozenset({_CONFLICT}),
                json={},
            )
        except AccessDeniedError:
            # A token that may not create buckets may still use an existing one.
            with contextlib.suppress(HFBucketError):
                self.info(deadline)
                return
            raise

    def info(self, deadline: Deadline) -> dict[str, Any]:
        """Return the bucket's record: `id`, `private`, `size`, `totalFiles` and more.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        answer = self._hub.request("GET", self._api, route="info", deadline=deadline).json("info")
        if not isinstance(answer, dict):
            raise TransportError("info: the Hub's answer is not a record")
        counted = {name: answers.count_of(answer.get(name)) for name in ("size", "totalFiles")}
        return answer | {name: count for name, count in counted.items() if count is not None or name in answer}

    def settled(self, handle: BucketHandle, deadline: Deadline) -> BucketHandle:
        """Return a handle with the current name of the bucket, because a renamed bucket also answers to its old name.

        Args:
            handle: Handle of this or of another bucket.
            deadline: When to give up.

        Returns:
            The renamed handle, or the given one if this token cannot see the bucket.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        url = f"/api/buckets/{handle.bucket_id}"
        try:
            answer = self._hub.request("GET", url, route="info", deadline=deadline, attempts=2).json("info")
        except (AccessDeniedError, BucketMissingError):
            return handle
        name = answer.get("id") if isinstance(answer, dict) else None
        return handle.within(name) if isinstance(name, str) else handle

    def greet(self, deadline: Deadline) -> Answer:
        """Request the bucket's record and return the response, including a refusal.

        For tools that check the connection to the Hub and its clock.

        Raises:
            HFBucketError: No response, or a 5xx.
        """
        return self._hub.request("GET", self._api, route="info", deadline=deadline, allow=_REFUSALS)

    def time(self, deadline: Deadline) -> datetime | None:
        """Return the time of the Hub to the second; None if its response has no `Date` header.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        return self._paths_info([self.handle.join(RESERVED)], deadline, patient=True)[1].date

    def check_right(self, right: Literal["read", "write"], deadline: Deadline) -> None:
        """Check that the token has a right on the bucket's content, without reading or writing.

        Raises:
            AccessDeniedError: The token does not have the right.
            HFBucketError: See `HubClient.request`.
        """
        fetch_access(self._hub, self.handle.bucket_id, right, deadline)

    def close(self) -> None:
        """Abort all transfers, and make no more requests."""
        self.transfer.close()
        self._hub.close()


def _object_info(item: dict[str, Any], what: str) -> ObjectInfo:
    try:
        return ObjectInfo(answers.path_of(item), answers.content_of(item), answers.uploaded_at(item))
    except ValueError as error:
        path = ascii(item.get("path"))[:_MAX_SHOWN_PATH]
        raise TransportError(f"{what}: the Hub's record of {path} is not valid: {error}") from None


def _failed_items(value: Any, status: int) -> list[dict[str, Any]]:
    failed = value.get("failed") if isinstance(value, dict) else None
    if failed is None and status != _UNPROCESSABLE:
        return []
    if not failed and status == _UNPROCESSABLE:
        raise TransportError("batch: the Hub refused the batch (422) and did not say which items")
    if not isinstance(failed, list) or not all(isinstance(item, dict) for item in failed):
        raise TransportError("batch: the Hub's answer is not a list of records")
    return failed
