"""Whether the chunks are those of engines of this configuration, and whether all who came by were alike."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, error, note, ok, warning
from hfbucket_plugin.cli.words import count
from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.fingerprint import differences, in_words
from hfbucket_plugin.fingerprint_config import as_configured
from hfbucket_plugin.fingerprint_store import FingerprintStore

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        unpinned: list[str] = []
        complaints = list(itertools.chain.from_iterable(_of(case, store, model, unpinned) for model in models))
    finally:
        store.close()
    if complaints:
        more = f"; and {len(complaints) - _TOLD} more" if len(complaints) > _TOLD else ""
        found = "; ".join(complaints[:_TOLD]) + more
        enforced = case.settings.fingerprint == "enforce"
        return error(NAME, found, _ACCEPT) if enforced else warning(NAME, found, _ACCEPT)
    if not models:
        return ok(NAME, "none is recorded yet")
    said = f"of {count(len(models), 'model')}: the configuration agrees, as far as it says"
    if unpinned:
        drawn = f"{unpinned[0]} was recorded by an engine whose PYTHONHASHSEED was not set to a number"
        return note(
            NAME, f"{said}; {drawn}", "with vLLM each process then has keys of its own: set it for every engine"
        )
    if case.settings.fingerprint == "off":
        return note(NAME, said, f"engines do not look at it: {case.named.setting('fingerprint')} is off")
    return ok(NAME, said)


def _of(case: Case, store: FingerprintStore, model: str, unpinned: list[str]) -> Iterator[str]:
    """What is wrong with a model; and, added to a list, those whose hash seed nobody set."""
    try:
        found = case.ask("fingerprint", lambda deadline: store.read(model, deadline))
    except IntegrityError as caught:
        yield str(caught)
        return
    claims = case.ask("fingerprint", lambda deadline: store.claims(model, deadline))
    for recorded in found.record.variants if found is not None else ():
        head = f"{model} ({recorded.space})"
        if recorded.hash_seed_pinned is False and recorded.mode == "classic":
            unpinned.append(head)
        here = as_configured(recorded, case.named)
        if here is not None and (wrong := differences(recorded, here)):
            yield f"{head}: {in_words(wrong, 'in this configuration')}"
        yield from (f"{head}: {words}" for claim in claims if (words := _fleet(recorded, claim)))
    yield from (claim.why for claim in claims if claim.fingerprint is None)


def _fleet(recorded: Fingerprint, claim: Claimed) -> str:
    """How another fleet differs from that which was recorded."""
    theirs = claim.fingerprint
    if theirs is None or not (wrong := differences(recorded, theirs)):
        return ""
    who = f"{theirs.written_by or 'somebody'} at {theirs.recorded_at or 'some time'}"
    return (
        f"two fleets are not alike, {recorded.written_by or 'the recorded one'} and {who}: {in_words(wrong, 'there')}"
    )
