"""Whether the chunks are those of engines of this configuration, and whether all who came by were alike."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, error, note, ok, warning
from hfbucket_plugin.cli.words import count
from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.fingerprint import differences, in_words, printable
from hfbucket_plugin.fingerprint_config import as_configured
from hfbucket_plugin.fingerprint_store import FingerprintStore

if TYPE_CHECKING:
    from hfbucket_plugin.cli.case import Case
    from hfbucket_plugin.fingerprint import Fingerprint
    from hfbucket_plugin.fingerprint_store import Claimed

NAME: Final = "fingerprint"

_MODELS: Final = 50
_TOLD: Final = 5
"""Complaints that one line holds."""

_ACCEPT: Final = (
    "`python -m jobs fingerprint show` tells all, and `accept` says which one is right; see docs/fingerprint.md"
)


def check(case: Case) -> Finding:
    """Read the fingerprints of the first models, and compare them with the configuration and with each other.

    Raises:
        HFBucketError: The Hub did not say which there are.
    """
    store = FingerprintStore(case.bucket, case.named.name)
    try:
        models = case.ask("tree", lambda _: [*itertools.islice(store.models(case.timeout_secs), _MODELS)])
        examined = [_of(case, store, model) for model in models]
    finally:
        store.close()
    differing = [words for one in examined for words in one.configured]
    agreeing = next((one.model for one in examined if one.comparable and not one.configured), None)
    complaints = [words for one in examined for words in one.wrong]
    if agreeing is None:
        complaints = differing + complaints
    if complaints:
        found = _together(complaints)
        enforced = case.settings.fingerprint == "enforce"
        return error(NAME, found, _ACCEPT) if enforced else warning(NAME, found, _ACCEPT)
    if not models:
        return ok(NAME, "none is recorded yet")
    many = f"of {count(len(models), 'model')}"
    if agreeing is None:
        mode = "MP" if case.named.mode == "mp" else "classic"
        return ok(NAME, f"{many}: nothing is recorded yet of {mode} engines, so there is nothing to compare with")
    if differing:
        return note(
            NAME,
            f"{many}: the configuration agrees with that of {agreeing}, and not with others: {_together(differing)}",
            "it names no model: nothing is wrong where other engines serve those",
        )
    return _agreement(case, many, next((one.unpinned for one in examined if one.unpinned), ""))


def _agreement(case: Case, many: str, unpinned: str) -> Finding:
    said = f"{many}: the configuration agrees, as far as it says"
    if unpinned:
        drawn = f"{unpinned} was recorded by an engine whose PYTHONHASHSEED was not set to a number"
        return note(
            NAME, f"{said}; {drawn}", "with vLLM each process then has keys of its own: set it for every engine"
        )
    if case.settings.fingerprint == "off":
        return note(NAME, said, f"engines do not look at it: {case.named.setting('fingerprint')} is off")
    return ok(NAME, said)


def _together(complaints: list[str]) -> str:
    more = f"; and {len(complaints) - _TOLD} more" if len(complaints) > _TOLD else ""
    return "; ".join(complaints[:_TOLD]) + more


@dataclass(slots=True)
class _Examined:
    """What is recorded of a model, against the configuration and the claims beside it.

    Attributes:
        model: Its name.
        comparable: Whether something is recorded of engines of the configuration's mode.
        configured: How the configuration differs. It names no model, and so may be that of engines of another one.
        wrong: What else is wrong.
        unpinned: Of which space nobody set the hash seed.
    """

    model: str
    comparable: bool = False
    configured: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unpinned: str = ""


def _of(case: Case, store: FingerprintStore, model: str) -> _Examined:
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
            examined.configured.append(f"{head}: {in_words(wrong, 'in this configuration')}")
        examined.wrong += [f"{head}: {words}" for claim in claims if (words := _fleet(recorded, claim))]
    examined.wrong += [claim.why for claim in claims if claim.fingerprint is None]
    return examined


def _fleet(recorded: Fingerprint, claim: Claimed) -> str:
    """How another fleet differs from that which was recorded."""
    theirs = claim.fingerprint
    if theirs is None or not (wrong := differences(recorded, theirs)):
        return ""
    who = f"{theirs.written_by or 'somebody'} at {theirs.recorded_at or 'some time'}"
    return (
        f"two fleets are not alike, {recorded.written_by or 'the recorded one'} and {who}: {in_words(wrong, 'there')}"
    )
