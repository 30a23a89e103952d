"""Checks of the fingerprint and of the key index."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, error, note, ok, warning
from hfbucket_plugin.core.concurrency import call_with_deadline
from hfbucket_plugin.core.units import age, count
from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.fingerprint.detect import as_configured
from hfbucket_plugin.fingerprint.model import as_text, differences, printable
from hfbucket_plugin.fingerprint.store import FingerprintStore
from hfbucket_plugin.index.format import FormatError
from hfbucket_plugin.index.refresh import SnapshotSource
from hfbucket_plugin.index.store import DIRECTORY, POINTER, IndexStore

if TYPE_CHECKING:
    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.fingerprint.model import Fingerprint
    from hfbucket_plugin.fingerprint.store import Claimed
    from hfbucket_plugin.hub.bucket import ObjectInfo
    from hfbucket_plugin.index.format import Pointer
    from hfbucket_plugin.index.store import IndexListing


FINGERPRINT: Final = "fingerprint"

_MODELS: Final = 50
_TOLD: Final = 5
"""Maximum number of complaints in one line."""

_ACCEPT: Final = (
    "`python -m jobs fingerprint show` tells all, and `accept` says which one is right; see docs/fingerprint.md"
)


def check_fingerprint(case: CheckContext) -> Finding:
    """Read the fingerprints of the first models, and compare them with the configuration and with each other.

    Raises:
        HFBucketError: If the fingerprints cannot be listed.
    """
    store = FingerprintStore(case.bucket, case.named.name)
    try:
        models = case.ask("tree", lambda _: [*itertools.islice(store.models(case.timeout_secs), _MODELS)])
        examined = [_of(case, store, model) for model in models]
    finally:
        store.close()
    differing = [words for one in examined for words in one.configured]
    agreeing = next((one.model for one in examined if one.comparable and not one.configured), None)
    rule_violations = [words for one in examined for words in one.wrong]
    if agreeing is None:
        rule_violations = differing + rule_violations
    if rule_violations:
        found = _together(rule_violations)
        enforced = case.settings.fingerprint == "enforce"
        return error(FINGERPRINT, found, _ACCEPT) if enforced else warning(FINGERPRINT, found, _ACCEPT)
    if not models:
        return ok(FINGERPRINT, "none is recorded yet")
    many = f"of {count(len(models), 'model')}"
    if agreeing is None:
        mode = "MP" if case.named.mode == "mp" else "classic"
        return ok(
            FINGERPRINT, f"{many}: nothing is recorded yet of {mode} engines, so there is nothing to compare with"
        )
    if differing:
        return note(
            FINGERPRINT,
            f"{many}: the configuration agrees with that of {agreeing}, and not with others: {_together(differing)}",
            "it names no model: nothing is wrong where other engines serve those",
        )
    return _agreement(case, many, next((one.unpinned for one in examined if one.unpinned), ""))


def _agreement(case: CheckContext, many: str, unpinned: str) -> Finding:
    said = f"{many}: the configuration agrees, as far as it says"
    if unpinned:
        drawn = f"{unpinned} was recorded by an engine whose PYTHONHASHSEED was not set to a number"
        return note(
            FINGERPRINT, f"{said}; {drawn}", "with vLLM each process then has keys of its own: set it for every engine"
        )
    if case.settings.fingerprint == "off":
        return note(FINGERPRINT, said, f"engines do not look at it: {case.named.setting('fingerprint')} is off")
    return ok(FINGERPRINT, said)


def _together(rule_violations: list[str]) -> str:
    more = f"; and {len(rule_violations) - _TOLD} more" if len(rule_violations) > _TOLD else ""
    return "; ".join(rule_violations[:_TOLD]) + more


@dataclass(slots=True)
class _Examined:
    """Recorded fingerprint of a model, compared with the configuration and with the claims beside it.

    Attributes:
        model: Name of the model.
        comparable: Whether there is a record for engines of the configuration's mode.
        configured: Differences of the configuration, which names no model, so it may be that of engines of another one.
        wrong: Other problems.
        unpinned: Key space whose hash seed is not set.
    """

    model: str
    comparable: bool = False
    configured: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unpinned: str = ""


def _of(case: CheckContext, store: FingerprintStore, model: str) -> _Examined:
    examined = _Examined(printable(model))
    try:
        found = case.ask("fingerprint", lambda deadline: store.read(model, deadline))
    except IntegrityError as caught:
        examined.wrong.append(str(caught))
        return examined
    claims = case.ask("fingerprint", lambda deadline: store.claims(model, deadline))
    record = found.record if found is not None else None
    claimed = store.first_claimed(claims, record)
    for recorded in (*(record.variants if record is not None else ()), *claimed):
        head = f"{examined.model} ({printable(str(recorded.space))}{', claimed and not recorded yet' if recorded in claimed else ''})"
        if recorded.hash_seed_pinned is False and recorded.mode == "classic":
            examined.unpinned = examined.unpinned or head
        here = as_configured(recorded, case.named)
        examined.comparable |= here is not None
        if here is not None and (wrong := differences(recorded, here)):
            examined.configured.append(f"{head}: {as_text(wrong, 'in this configuration')}")
        examined.wrong += [f"{head}: {words}" for claim in claims if (words := _fleet(recorded, claim))]
    examined.wrong += [claim.why for claim in claims if claim.fingerprint is None]
    return examined


def _fleet(recorded: Fingerprint, claim: Claimed) -> str:
    """Describe how another fleet differs from the recorded one."""
    theirs = claim.fingerprint
    if theirs is None or not (wrong := differences(recorded, theirs)):
        return ""
    who = f"{theirs.written_by or 'somebody'} at {theirs.recorded_at or 'some time'}"
    return f"two fleets are not alike, {recorded.written_by or 'the recorded one'} and {who}: {as_text(wrong, 'there')}"


INDEX: Final = "index"
_BUILD: Final = "run `python -m jobs index` on a schedule, see docs/index.md"
_LOAD_SECS: Final = 60.0
"""Minimum timeout in seconds, for a snapshot of hundreds of megabytes."""

_AS_WITHOUT: Final = "lookups ask the Hub, as without an index"


def check_index(case: CheckContext) -> Finding:
    """List the index, and read its pointer.

    Raises:
        HFBucketError: If the index or its pointer cannot be read.
    """
    store = IndexStore(case.bucket, "doctor")
    handle = case.bucket.handle
    try:
        listing = case.ask("tree", store.list)
        info = listing.pointer
        if info is None:
            return warning(INDEX, f"there is no snapshot below {handle.join(DIRECTORY)}: {_AS_WITHOUT}", _BUILD)
        pointer = case.ask("pointer", lambda deadline: store.read_pointer(info, deadline))
        unfit = _unfit(case, listing, pointer)
        if unfit is None:
            _load(case, store, listing, info, pointer)
    except FormatError as error:
        return warning(INDEX, f"{error}: {_AS_WITHOUT}", f"upgrade, or delete {handle.join(POINTER)} and rebuild it")
    finally:
        store.close()
    if unfit is not None:
        return unfit
    if listing.strangers and not listing.crowded:
        what = f"{_words(case, listing, pointer)}; {listing.strangers}"
        return warning(
            INDEX, what, f"delete what is not ours below {handle.join(DIRECTORY)}: each refresh costs a call more"
        )
    if listing.crowded:
        return warning(
            INDEX, f"not all journals are read: {listing.crowded}", f"delete what is not ours below {DIRECTORY}"
        )
    return ok(INDEX, _words(case, listing, pointer))


def _load(case: CheckContext, store: IndexStore, listing: IndexListing, info: ObjectInfo, pointer: Pointer) -> None:
    """Load the snapshot as an engine would, and discard it.

    Raises:
        FormatError: If an engine would refuse the snapshot.
        HFBucketError: If the snapshot cannot be read.
    """
    source = SnapshotSource(store, "", case.settings.index_max_bytes)
    call_with_deadline("snapshot", lambda _: source.load(info, pointer, listing), max(_LOAD_SECS, case.timeout_secs))


def _words(case: CheckContext, listing: IndexListing, pointer: Pointer) -> str:
    now = datetime.fromtimestamp(listing.date or case.now(), UTC)
    made, listed = (datetime.fromtimestamp(at, UTC) for at in (pointer.covers, pointer.full))
    journals = sum(journal.at >= pointer.covers for journal in listing.journals)
    return (
        f"{count(pointer.keys, 'key')}, brought up to date {age(made, now)} ago from a listing {age(listed, now)} old; "
        f"{count(journals, 'journal')} since"
    )


def _unfit(case: CheckContext, listing: IndexListing, pointer: Pointer) -> Finding | None:
    """Return why engines would not load the snapshot; None if they would."""
    settings = case.settings
    now = listing.date or case.now()
    found = _words(case, listing, pointer)
    if now - pointer.covers > settings.index_max_age_secs:
        return warning(INDEX, f"{found}: too old, so {_AS_WITHOUT}", f"{_BUILD}, or raise index_max_age_secs")
    if pointer.size + 8 * pointer.keys > settings.index_max_bytes:
        return warning(INDEX, f"{found}: too large, so {_AS_WITHOUT}", "raise index_max_bytes")
    return None
