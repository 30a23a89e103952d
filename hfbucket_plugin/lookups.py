"""Looking chunks up: which are there, at the size of a full chunk, and can be served."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.errors import HFBucketError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hfbucket_plugin.content import Content
    from hfbucket_plugin.deadlines import Deadline
    from hfbucket_plugin.existence import Existence
    from hfbucket_plugin.guard import Guard
    from hfbucket_plugin.outcomes import Outcomes
    from hfbucket_plugin.quarantine import Quarantine

_HIT: Final = "hit"
_BEHIND_A_GAP: Final = "behind_a_gap"


class Lookups:
    """Answers lookups of one instance.

    Args:
        existence: What is there.
        outcomes: Where results are told.
        guard: While its `read` breaker is open nothing is a hit, since nothing would be served.
        quarantine: Contents that could not be served of late.
    """

    def __init__(
        self,
        existence: Existence,
        outcomes: Outcomes,
        guard: Guard,
        quarantine: Quarantine,
    ) -> None:
        self._existence = existence
        self._outcomes = outcomes
        self._guard = guard
        self._quarantine = quarantine

    def found(
        self, keys: Sequence[str], sizes: Sequence[int | None], deadline: Deadline, *, prefix_only: bool
    ) -> list[bool]:
        """For each key, whether it would be served; see `ChunkStore.found`."""
        started = time.monotonic()
        outcome, unknown = "ok", "missing"
        contents: Mapping[str, Content | None] = {}
        try:
            deadline.check("lookup")  # it may have waited for a thread: nobody's fault but ours
            self._guard.admit("read", keys)
            contents, failure = self._existence.answers(keys, deadline)
            if failure is not None:
                raise failure
        except HFBucketError as error:
            if self._guard.is_open("read"):
                contents = {}
            elif not contents:
                contents = self._existence.known(keys)
            if self._outcomes.excuses(error):
                unknown = "missing"
            else:
                unknown = outcome = error.kind
                self._outcomes.warn("lookup", error.kind, str(error))
        judged = [self._judge(key, contents, size, unknown) for key, size in zip(keys, sizes, strict=True)]
        if prefix_only:
            gap = next((index for index, word in enumerate(judged) if word != _HIT), len(judged))
            judged[gap:] = [_BEHIND_A_GAP if word == _HIT else word for word in judged[gap:]]
        for word, chunks in Counter(judged).items():
            self._outcomes.chunks("lookup", word, chunks)
        self._outcomes.ended("lookup", outcome, started)
        return [word == _HIT for word in judged]

    def _judge(self, key: str, contents: Mapping[str, Content | None], size: int | None, unknown: str) -> str:
        """What becomes of a key, in a word."""
        if key not in contents:
            return unknown
        content = contents[key]
        if content is None:
            return "missing"
        if not content.size or size not in (None, content.size):
            self._outcomes.warn_of_size("lookup", key, content.size, size)
            return "size"
        return "quarantined" if self._quarantine.holds(content.xet_hash) else _HIT
