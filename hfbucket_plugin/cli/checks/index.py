"""The key index of an instance that goes by one: whether there is a snapshot that engines go by, and how old it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.bounded import bounded
from hfbucket_plugin.cli.findings import Finding, ok, warning
from hfbucket_plugin.cli.words import age, count
from hfbucket_plugin.index_format import FormatError
from hfbucket_plugin.index_sources import SnapshotSource
from hfbucket_plugin.index_store import DIRECTORY, POINTER, IndexStore

if TYPE_CHECKING:
    from hfbucket_plugin.bucket import ObjectInfo
    from hfbucket_plugin.cli.case import Case
    from hfbucket_plugin.index_format import Pointer
    from hfbucket_plugin.index_store import Shelf

NAME: Final = "index"
_BUILD: Final = "run `python -m jobs index` on a schedule, see docs/index.md"
_LOAD_SECS: Final = 60.0
"""For a snapshot of hundreds of megabytes, at least."""

_AS_WITHOUT: Final = "lookups ask the Hub, as without an index"


def check(case: Case) -> Finding:
    """List the index, and read its pointer.

    Raises:
        HFBucketError: One of them did not arrive.
    """
    store = IndexStore(case.bucket, "doctor")
    handle = case.bucket.handle
    try:
        shelf = case.ask("tree", store.list)
        info = shelf.pointer
        if info is None:
            return warning(NAME, f"there is no snapshot below {handle.join(DIRECTORY)}: {_AS_WITHOUT}", _BUILD)
        pointer = case.ask("pointer", lambda deadline: store.read_pointer(info, deadline))
        unfit = _unfit(case, shelf, pointer)
        if unfit is None:
            _load(case, store, shelf, info, pointer)
    except FormatError as error:
        return warning(NAME, f"{error}: {_AS_WITHOUT}", f"upgrade, or delete {handle.join(POINTER)} and build it anew")
    finally:
        store.close()
    if unfit is not None:
        return unfit
    if shelf.strangers and not shelf.crowded:
        what = f"{_words(case, shelf, pointer)}; {shelf.strangers}"
        return warning(
            NAME, what, f"delete what is not ours below {handle.join(DIRECTORY)}: each refresh costs a call more"
        )
    if shelf.crowded:
        return warning(
            NAME, f"not all journals are read: {shelf.crowded}", f"delete what is not ours below {DIRECTORY}"
        )
    return ok(NAME, _words(case, shelf, pointer))


def _load(case: Case, store: IndexStore, shelf: Shelf, info: ObjectInfo, pointer: Pointer) -> None:
    """Load the snapshot as an engine would, and forget it.

    Raises:
        FormatError: An engine would refuse it.
        HFBucketError: It did not arrive.
    """
    source = SnapshotSource(store, "", case.settings.index_max_bytes)
    bounded("snapshot", lambda _: source.load(info, pointer, shelf), max(_LOAD_SECS, case.timeout_secs))


def _words(case: Case, shelf: Shelf, pointer: Pointer) -> str:
    now = datetime.fromtimestamp(shelf.date or case.now(), UTC)
    made, listed = (datetime.fromtimestamp(at, UTC) for at in (pointer.covers, pointer.full))
    journals = sum(journal.at >= pointer.covers for journal in shelf.journals)
    return (
        f"{count(pointer.keys, 'key')}, brought up to date {age(made, now)} ago from a listing {age(listed, now)} old; "
        f"{count(journals, 'journal')} since"
    )


def _unfit(case: Case, shelf: Shelf, pointer: Pointer) -> Finding | None:
    """Why engines do not even load the snapshot."""
    settings = case.settings
    now = shelf.date or case.now()
    found = _words(case, shelf, pointer)
    if now - pointer.covers > settings.index_max_age_secs:
        return warning(NAME, f"{found}: too old, so {_AS_WITHOUT}", f"{_BUILD}, or raise index_max_age_secs")
    if pointer.size + 8 * pointer.keys > settings.index_max_bytes:
        return warning(NAME, f"{found}: too large, so {_AS_WITHOUT}", "raise index_max_bytes")
    return None
