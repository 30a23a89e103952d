"""Checks of the connection to the Hub: reachability, latency, clock."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hfbucket_plugin.cli.findings import Finding, from_error, note, ok, warning
from hfbucket_plugin.core.dates import http_date
from hfbucket_plugin.core.units import count
from hfbucket_plugin.errors import HFBucketError, TransportError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfbucket_plugin.cli.context import CheckContext
    from hfbucket_plugin.config.instances import InstanceConfig
    from hfbucket_plugin.core.deadline import Deadline

NAME: Final = "endpoint"
CLOCK: Final = "clock"

MAX_SKEW_SECS: Final = 30.0
"""Maximum clock difference in seconds. The Hub's time has whole seconds, and an answer takes a while."""

_ROUNDS: Final = 3
_MILLI: Final = 1000


@dataclass(frozen=True, slots=True)
class Greeting:
    """Answer of the Hub.

    Attributes:
        seconds: Duration of the request.
        date: The Hub's `Date` header; empty if it sends none.
        at: Local time halfway through the request, in Unix seconds.
    """

    seconds: float
    date: str
    at: float


def check(case: CheckContext) -> tuple[Finding, Greeting | None]:
    """Send a few requests. The first one also opens the connection, and is left out of the median.

    Returns:
        The finding, and an answer for the clock check; None if the Hub does not answer.

    Raises:
        ConfigError: If the token cannot be sent.
    """
    try:
        first = _greet(case)
    except TransportError as caught:
        finding = from_error(NAME, caught, case.named)
        return replace(finding, found=f"{case.settings.endpoint} does not answer: {finding.found}"), None
    rounds: list[Greeting] = []
    try:
        while len(rounds) < _ROUNDS:
            rounds.append(_greet(case))
    except HFBucketError as caught:
        found = f"answered {count(len(rounds) + 1, 'time')}, and then: {caught}"
        return warning(NAME, found, f"look at the network, and at {case.named.setting('endpoint')}"), first
    return judge_way(case.named, first.seconds, [one.seconds for one in rounds]), rounds[-1]


def _greet(case: CheckContext) -> Greeting:
    def ask(deadline: Deadline) -> Greeting:
        started, at = time.monotonic(), case.now()
        answer = case.bucket.greet(deadline)
        seconds = time.monotonic() - started
        return Greeting(seconds, answer.headers.get("date", ""), at + seconds / 2)

    return case.ask(f"the Hub at {case.settings.endpoint}", ask)


def judge_way(named: InstanceConfig, first: float, rounds: Sequence[float]) -> Finding:
    """Check that lookups can be answered within their timeout.

    Args:
        named: The instance.
        first: Duration of the first request in seconds, connection included.
        rounds: Durations of the others in seconds.
    """
    median = statistics.median(rounds)
    settings = named.settings
    found = (
        f"{settings.endpoint} answers in {median * _MILLI:.0f} ms (median of {len(rounds)}; the first took "
        f"{first * _MILLI:.0f} ms)"
    )
    if settings.reads and median >= settings.lookup_timeout_secs:
        return warning(
            NAME,
            f"{found}, later than a lookup waits ({settings.lookup_timeout_secs:g} s): every lookup is a miss",
            f"raise {named.setting('lookup_timeout_secs')}, or use a Hub that is nearer",
        )
    return ok(NAME, found)


def judge_clock(greeting: Greeting) -> Finding:
    """Check that the local clock agrees with the Hub's: storage tokens expire by it."""
    moment = http_date(greeting.date)
    if moment is None:
        return note(CLOCK, "the Hub's answers tell no time to compare ours with")
    ahead = greeting.at - moment.timestamp()
    if abs(ahead) <= MAX_SKEW_SECS:
        return ok(CLOCK, f"within {MAX_SKEW_SECS:g} s of the Hub's")
    return warning(
        CLOCK,
        f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the Hub's: access tokens of the storage expire by it",
        "set this machine's clock, as by NTP",
    )
