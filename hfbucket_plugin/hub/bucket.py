"""The bucket client: look up, list, read, write, copy, delete. Knows nothing of LMCache.

Routes and fields follow `huggingface_hub` 2.x (`hf_api.py`, `_buckets.py`); they are asked here directly because
its own calls have no timeout, cannot be told to stop, and read into files only.
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
"""Most paths of one paths-info, and most operations of one batch, as in `huggingface_hub`."""

_CONFLICT, _UNPROCESSABLE = 409, 422
_REFUSALS: Final = frozenset(range(400, 500))
_LIST_ATTEMPTS: Final = 5
_PATIENT_ATTEMPTS: Final = 30
_MAX_SHOWN_PATH: Final = 200
_LONGEST_CURSOR: Final = 16 * 1024

_FIRST_LOOK: Final = 100
"""Pages after which a listing is first compared with what the bucket says it holds; then after twice as many."""

_LOOK_SECS: Final = 15.0
_MOST_IDLE_PAGES: Final = 16
"""Pages in a row that bring nothing new, before a listing is given up."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as the Hub lists it.

    Attributes:
        path: From the root of the bucket.
        content: Its hash and size.
        uploaded_at: When the Hub took it; falls back to the client's `mtime`. None when it says neither.
    """

    path: str
    content: ContentId
    uploaded_at: datetime | None


class ListingProgress:
    """Makes sure that a listing comes to an end: each page has a cursor of its own, and something new on it.

    Args:
        of: The prefix that is listed, for errors.
    """

    def __init__(self, of: str) -> None:
        self._of = of
        self._cursors: set[int] = set()
        self._firsts: set[int] = set()
        self._idle = 0

    def see(self, infos: Sequence[ObjectInfo], cursor: str | None) -> None:
        """Take note of a page.

        Args:
            infos: What is on it.
            cursor: Of the page that follows; None when it is the last.

        Raises:
            TransportError: The listing goes round in circles, or brings nothing new for many pages.
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
    """Compares how much a listing has shown with what the bucket says it holds, ever more seldom: one that goes on for ever ends.

    Args:
        bucket: That is listed.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._pages = self._shown = 0
        self._look_at = _FIRST_LOOK

    def see(self, shown: int) -> None:
        """Take note of a page.

        Args:
            shown: How many objects are on it.

        Raises:
            TransportError: There were far more than the bucket holds.
        """
        self._pages += 1
        self._shown += shown
        if self._pages < self._look_at:
            return
        self._look_at *= 2
        try:
            total = self._bucket.info(Deadline.patient(_LOOK_SECS)).get("totalFiles")
        except HFBucketError:  # asked again later; the listing itself says what is wrong
            return
        if isinstance(total, int) and self._shown > 2 * total + _FIRST_LOOK // 2:
            raise TransportError(
                f"tree: the Hub's pages show {self._shown} objects, and continue, but the bucket reports {total}: the listing is "
                "abandoned"
            )


class Bucket:
    """One bucket, through one instance's token.

    Args:
        hub: Makes the requests.
        handle: Which bucket; its prefix is left to callers, who pass whole paths.
        transfer: Moves the bytes.
    """

    def __init__(self, hub: HubClient, handle: BucketHandle, transfer: Transfer) -> None:
        self._hub = hub
        self.handle = handle
        self.transfer = transfer
        self._api = f"/api/buckets/{handle.bucket_id}"

    @property
    def paused_secs(self) -> float:
        """Seconds left of a pause that the Hub asked for; 0 when there is none."""
        return self._hub.rate_limiter.paused_secs

    @property
    def background_wait_secs(self) -> float:
        """Seconds until work in the background may call the Hub; see `RateLimiter.background_wait_secs`."""
        return self._hub.rate_limiter.background_wait_secs

    def refuse_in_pause(self, what: str) -> None:
        """Stop here while the Hub would not be asked, since it asked for a pause.

        Raises:
            ThrottledError: It would not; the message names `what`.
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
        """Look objects up, 1000 a request.

        Args:
            paths: From the root of the bucket.
            deadline: When to give up.
            patient: See `HubClient.request`.
            sent: See `HubClient.request`.

        Returns:
            What exists, by path. The Hub leaves out what is missing, and promises no order.

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
        """Look up to 1000 objects up by one request, and tell when the Hub answered it.

        Args:
            paths: From the root of the bucket.
            deadline: When to give up.
            patient: Whether pauses that the Hub asked for are waited out.

        Returns:
            What exists, by path, and the answer's `Date`, to the second; None where it has none.

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
            prefix: The start of a path; empty for all.
            page_secs: Most seconds a page may take, its retries included.
            each_page: Called before each page is asked for, empty ones too: what it raises ends the listing.

        Raises:
            HFBucketError: A page did not come; what was yielded before is no complete listing.
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
        """One page of the objects whose path starts with `prefix`, for callers that keep no state; see `list_objects`.

        Args:
            prefix: The start of a path; empty for all.
            cursor: Of the page before; None for the first page. It can lead to no other part of the Hub than this listing.
            deadline: When to give up, retries included.

        Returns:
            The objects, and the cursor of the next page, or None when this was the last.

        Raises:
            HFBucketError: The page did not come.
        """
        infos, following, _ = self.list_page_dated(prefix, cursor, deadline)
        return infos, following

    def list_page_dated(
        self, prefix: str, cursor: str | None, deadline: Deadline
    ) -> tuple[list[ObjectInfo], str | None, datetime | None]:
        """One page, see `list_page`, and when the Hub answered it, to the second; None where the answer has no `Date`.

        Raises:
            HFBucketError: The page did not come.
        """
        tree = urlsplit(self._tree(prefix))
        # A page on the way is worth more tries: all that came before it would be asked for again.
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
        """The cursor of the next page, whichever host the link names: only ours is asked, and only for this listing.

        A mirror passes links on as its upstream wrote them.
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
        """Name contents that were uploaded (`Transfer.upload`): only then are they in the bucket.

        Args:
            files: Path to content.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            What failed, by path; empty when all are there.

        Raises:
            HFBucketError: The request failed as a whole.
        """
        return self.replace((), files, deadline, once=once)

    def replace(
        self, old: Sequence[str], files: Mapping[str, ContentId], deadline: Deadline, *, once: bool = False
    ) -> dict[str, ItemFailure]:
        """Name contents, as `add`, and delete what they stand for, by the same call. A new one is named before an old one goes.

        Args:
            old: Paths to delete.
            files: Path to content.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            What failed, by path.

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
        """Copy contents of another bucket of the same storage region, by hash: no bytes move.

        Args:
            source: The bucket that holds them.
            files: Destination path to content.
            deadline: When to give up.
            once: See `delete`.

        Returns:
            What failed, by path.

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
        """Delete objects, at once and for ever: the Hub keeps no versions.

        Args:
            paths: From the root of the bucket.
            deadline: When to give up.
            once: Ask now or not at all, and never again: for callers that looked the objects up just before, and would
                have to do so again before another try.
            urgent: See `HubClient.request`.

        Returns:
            What failed, by path.

        Raises:
            HFBucketError: A request failed as a whole; earlier ones of 1000 paths were done.
        """
        return self._batch([{"type": "deleteFile", "path": path} for path in paths], deadline, once=once, urgent=urgent)

    def _batch(
        self, operations: Sequence[dict[str, Any]], deadline: Deadline, *, once: bool = False, urgent: bool = False
    ) -> dict[str, ItemFailure]:
        """Send operations, 1000 a request. A batch is no transaction: items fail one by one."""
        failures: dict[str, ItemFailure] = {}
        for start in range(0, len(operations), MAX_BATCH):
            batch = operations[start : start + MAX_BATCH]
            paths = {operation["path"] for operation in batch}
            answer = self._hub.request(
                "POST",
                f"{self._api}/batch",
                route="batch",
                deadline=deadline,
                attempts=1 if once else 2,  # adding, copying and deleting again changes nothing
                patient=not once,
                urgent=urgent,
                allow=frozenset({_UNPROCESSABLE}),
                room=answers.BodyLimit.for_records([*paths, *paths]),  # a reason may repeat the path
                content="".join(json.dumps(operation) + "\n" for operation in batch).encode(),
                headers={"Content-Type": "application/x-ndjson"},
            )
            for item in _failed_items(answer.json("batch"), answer.status):
                path, reason = item.get("path"), item.get("error", "no reason given")
                if (
                    not isinstance(path, str) or path not in paths
                ):  # then nothing is known of those that were asked for either
                    raise TransportError("batch: the Hub says that an item failed which was not in the batch")
                failures[path] = ItemFailure(path, "hub", self._hub.clean(reason))
        return failures

    def create(self, deadline: Deadline) -> None:
        """Create the bucket; one that exists is fine.

        Raises:
            HFBucketError: It could not be created, and is not there.
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
            # A token without the right to create may still use a bucket that is there.
            with contextlib.suppress(HFBucketError):
                self.info(deadline)
                return
            raise

    def info(self, deadline: Deadline) -> dict[str, Any]:
        """The bucket's own record: `id`, `private`, `size`, `totalFiles` and more.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        answer = self._hub.request("GET", self._api, route="info", deadline=deadline).json("info")
        if not isinstance(answer, dict):
            raise TransportError("info: the Hub's answer is not a record")
        counted = {name: answers.count_of(answer.get(name)) for name in ("size", "totalFiles")}
        return answer | {name: count for name, count in counted.items() if count is not None or name in answer}

    def settled(self, handle: BucketHandle, deadline: Deadline) -> BucketHandle:
        """A handle by the name that the Hub itself has for its bucket: one that was renamed answers to its old name, too.

        Args:
            handle: This bucket's, or another one's.
            deadline: When to give up.

        Returns:
            The handle as it is, where this token sees no such bucket.

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
        """What the Hub answers when asked for the bucket's record, a refusal included.

        For tools that look at the way to the Hub, and at its clock.

        Raises:
            HFBucketError: No answer, or a 5xx.
        """
        return self._hub.request("GET", self._api, route="info", deadline=deadline, allow=_REFUSALS)

    def time(self, deadline: Deadline) -> datetime | None:
        """What time it is at the Hub, to the second; None where its answer does not say.

        Raises:
            HFBucketError: See `HubClient.request`.
        """
        return self._paths_info([self.handle.join(RESERVED)], deadline, patient=True)[1].date

    def check_right(self, right: Literal["read", "write"], deadline: Deadline) -> None:
        """Ask the Hub whether the token has a right on the content of the bucket. Nothing is read or written.

        Raises:
            AccessDeniedError: It has not.
            HFBucketError: See `HubClient.request`.
        """
        fetch_access(self._hub, self.handle.bucket_id, right, deadline)

    def close(self) -> None:
        """End all transfers at once, and ask the Hub nothing more."""
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
