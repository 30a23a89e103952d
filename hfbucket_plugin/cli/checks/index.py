"""The key index of an instance that goes by one: whether there is a snapshot, and how old it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, ok, warning
from hfbucket_plugin.cli.words import age, count
from hfbucket_plugin.index_format import FormatError
from hfbucket_plugin.index_store import DIRECTORY, POINTER, IndexStore

if TYPE_CHECKING:
    from hfbucket_plugin.cli.case import Case
    from hfbucket_plugin.index_format import Pointer
    from hfbucket_plugin.index_store import Shelf

NAME: Final = "index"
_BUILD: Final = "run `python -m jobs index` on a schedule, see docs/index.md"
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
    except FormatError as error:
        return warning(NAME, f"{error}: {_AS_WITHOUT}", f"upgrade, or delete {handle.join(POINTER)} and build it anew")
    finally:
        store.close()
    return _judge(case, shelf, pointer)


def _judge(case: Case, shelf: Shelf, pointer: Pointer) -> Finding:
    settings = case.settings
    now = datetime.fromtimestamp(shelf.date or case.now(), UTC)
    made, listed = (datetime.fromtimestamp(at, UTC) for at in (pointer.covers, pointer.full))
    journals = sum(journal.at >= pointer.covers for journal in shelf.journals)
    found = (
        f"{count(pointer.keys, 'key')}, brought up to date {age(made, now)} ago from a listing {age(listed, now)} old; "
        f"{count(journals, 'journal')} since"
    )
    if (now - made).total_seconds() > settings.index_max_age_secs:
        return warning(NAME, f"{found}: too old, so {_AS_WITHOUT}", f"{_BUILD}, or raise index_max_age_secs")
    if pointer.size + 8 * pointer.keys > settings.index_max_bytes:
        return warning(NAME, f"{found}: too large, so {_AS_WITHOUT}", "raise index_max_bytes")
    return ok(NAME, found)
