"""Whether the chunks of a choice are those that the configured engines would ask for, as far as fingerprints tell."""

from __future__ import annotations

import itertools
import logging
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from hfbucket_plugin import fingerprint_facts
from hfbucket_plugin.deadlines import Deadline
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.fingerprint import differences, in_words, printable
from hfbucket_plugin.fingerprint_config import as_configured
from hfbucket_plugin.fingerprint_store import FingerprintStore
from hfbucket_plugin.keys import ClassicKey
from warmer.errors import NothingToDoError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hfbucket_plugin.bucket import Bucket
    from hfbucket_plugin.fingerprint import Fingerprint
    from warmer.planning import Choosing
    from warmer.sources import Bound

_log = logging.getLogger(__name__)

_MODELS: Final = 20
"""Models whose fingerprints are looked at: each costs a call."""

_SECS: Final = 30.0

_AFTER_MODEL: Final = re.compile(r"[0-9]{1,7}|[0-9a-f]{8,}")
"""A world size, or a rank of MP mode."""


@dataclass(slots=True)
class Compared:
    """What fingerprints tell of a choice.

    Attributes:
        facts: For the header of a plan: for each fingerprint the model, whose keys it is of, its digest, all that it says,
            and how the configuration differs.
        agree: Fingerprints from which it does not.
        conflicts: In words, those from which it does.
    """

    facts: list[dict[str, Any]] = field(default_factory=list)
    agree: int = 0
    conflicts: list[str] = field(default_factory=list)


def compare(bound: Bound, choosing: Choosing, bucket: Bucket) -> Compared:
    """Compare what is recorded of the chosen models with the configuration; with prompts, with the hashes made here too.

    What differs is a warning; where no engine of the configuration would be served, and `fingerprint` is `enforce`, it is
    refused.

    Raises:
        NothingToDoError: Refused.
        HFBucketError: The fingerprints cannot be read, which under `enforce` is refused too.
    """
    mode = bound.instance.settings.fingerprint
    compared = Compared()
    if mode == "off":
        return compared
    try:
        _read(bound, choosing, bucket, compared)
    except HFBucketError as error:
        if mode == "enforce":
            raise
        _log.warning("the fingerprints of the chosen models are not known: %s", error)
    for words in compared.conflicts:
        _log.warning("%s", words)
    if mode == "enforce" and compared.conflicts and not compared.agree:
        raise NothingToDoError(
            f"the engines of this configuration would be served none of it (fingerprint: enforce): {compared.conflicts[0]}; see "
            "docs/fingerprint.md"
        )
    return compared


def _read(bound: Bound, choosing: Choosing, bucket: Bucket, compared: Compared) -> None:
    store = FingerprintStore(bucket, bound.instance.name)
    try:
        for model in itertools.islice(_models(choosing, store), _MODELS):
            found = store.read(model, Deadline.patient(_SECS))
            known = _of_mode(bound, found.record.variants if found is not None else ())
            if not known:  # an engine that ended right after its first store left a claim and no record
                known = _of_mode(bound, store.first_claimed(store.claims(model, Deadline.patient(_SECS)), None))
            for recorded in known:
                _judge(bound, choosing, recorded, compared)
    finally:
        store.close()


def _of_mode(bound: Bound, fingerprints: Iterable[Fingerprint]) -> list[Fingerprint]:
    return [one for one in fingerprints if (one.mode == "classic") is (bound.takes is ClassicKey)]


def _models(choosing: Choosing, store: FingerprintStore) -> list[str]:
    choice, prompts = choosing.choice, choosing.prompts
    if choice.model:
        return list(choice.model)
    if prompts is not None and prompts.models is not None:
        return sorted(prompts.models)
    if choice.prefix and all("@" in prefix for prefix in choice.prefix):
        return sorted({model for prefix in choice.prefix for model in _possible_models(prefix)})
    return list(itertools.islice(store.models(_SECS), _MODELS))


def _possible_models(prefix: str) -> Iterator[str]:
    """The models whose keys may start with a text that holds an `@`, as far as the text tells: a model may hold `@` itself."""
    fields = prefix.split("@")
    for place in range(1, len(fields)):
        yield "@".join(fields[:place])
        if _AFTER_MODEL.fullmatch(fields[place]):
            return


def _judge(bound: Bound, choosing: Choosing, recorded: Fingerprint, compared: Compared) -> None:
    here = as_configured(recorded, bound.instance)
    if choosing.prompts is not None:
        here = _as_hashed(bound, recorded, here)
    wrong = differences(recorded, here) if here is not None else []
    where = "where this command runs" if choosing.prompts is not None else "in this configuration"
    if wrong:
        who = f"{printable(recorded.model)} ({printable(str(recorded.space))})"
        compared.conflicts.append(f"the fingerprint of {who}: {in_words(wrong, where)}")
    else:
        compared.agree += 1
    compared.facts.append(
        {"model": recorded.model, "of": str(recorded.space), "digest": recorded.digest}
        | recorded.facts()
        | ({"differs": in_words(wrong, where)} if wrong else {})
    )


def _as_hashed(bound: Bound, recorded: Fingerprint, here: Fingerprint | None) -> Fingerprint | None:
    """What an engine would be that hashes as the prompts were hashed here."""
    choice = bound.warm_up.choose
    if recorded.mode == "classic":
        algorithm = here.hash_algorithm if here is not None else None
        return here and here.model_copy(update={"hash_check": algorithm and fingerprint_facts.classic_check(algorithm)})
    base = here or recorded.model_copy(update={"layout": None, "model_revision": None, "hash_bytes": None})
    return base.model_copy(
        update={
            "chunk_size": choice.chunk_size,
            "hash_algorithm": choice.hash_algorithm,
            "hash_check": fingerprint_facts.mp_check(choice.hash_algorithm),
        }
    )
