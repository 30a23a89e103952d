"""Rules for injected faults: which requests they match and what they do. `localhub.faults.injection` applies them."""

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import regex
from pydantic import BaseModel, Field, field_validator, model_validator

_ACTIONS = ("status", "truncate_at", "trickle_bytes", "flip_at", "flip_every", "hang", "reset", "items")

_SEARCH_SECONDS = 0.1
"""A longer search would block every request of the Hub."""

_log = logging.getLogger("localhub")

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Fault(BaseModel, extra="forbid", frozen=True):
    """One fault: which requests it matches, and a delay, an action, or both.

    Attributes:
        route: name of a route (see `docs/localhub.md`), or `*` for every route.
        method: HTTP method; None for every method.
        path: text that the decoded path of the request contains.
        path_regex: regular expression to search in the decoded path; ignored once a search takes over 0.1 s.
        times: number of requests that the fault affects; None for all.
        delay_s: seconds to wait before anything else. Delays of several faults add up.
        status: respond with this HTTP status instead of serving the request.
        headers: headers of that response.
        body: body of that response.
        truncate_at: send this many bytes of the response's body, then close the connection.
        trickle_bytes: send the response's body in pieces of this many bytes.
        trickle_interval_s: seconds between those pieces.
        flip_at: invert the bytes at these offsets of the response's body; its length stays the same.
        flip_every: invert every n-th byte of the response's body; its length stays the same.
        hang: do not respond until the fault is cleared (then serve the request) or the client disconnects.
        reset: reset the TCP connection instead of serving the request.
        items: fail the items of a batch whose path contains this text; serve the others. Empty for all items.
        items_regex: limits `items` to paths in which this regular expression is found.
        items_error: the error of those items.
    """

    route: str = "*"
    method: str | None = None
    path: str | None = None
    path_regex: str | None = None
    times: Positive | None = None
    delay_s: Annotated[float, Field(ge=0)] = 0.0
    status: Annotated[int, Field(ge=200, le=599)] | None = None
    headers: dict[str, str] = {}
    body: str = ""
    truncate_at: NotNegative | None = None
    trickle_bytes: Positive | None = None
    trickle_interval_s: Annotated[float, Field(ge=0)] = 0.1
    flip_at: tuple[NotNegative, ...] | None = None
    flip_every: Positive | None = None
    hang: bool = False
    reset: bool = False
    items: str | None = None
    items_regex: str | None = None
    items_error: str = "injected fault"

    @field_validator("path_regex", "items_regex")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            regex.compile(pattern or "")
        except regex.error as error:
            raise ValueError(f"invalid regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        actions = self.actions()
        if len(actions) > 1:
            raise ValueError(f"a fault has one action, not {', '.join(actions)}")
        if not actions and not self.delay_s:
            raise ValueError(f"a fault needs delay_s or one of {', '.join(_ACTIONS)}")
        return self

    def actions(self) -> list[str]:
        """Return the names of the fields that make the fault do more than delay."""
        # Falsy values count: truncating at 0 and failing the items that contain "" are actions.
        return [name for name in _ACTIONS if getattr(self, name) is not None and getattr(self, name) is not False]

    def matches(self, route: str, method: str, path: str) -> bool:
        """Whether the fault matches a request."""
        return (
            self.route in ("*", route)
            and (self.method is None or self.method.upper() == method)
            and (self.path is None or self.path in path)
            and (self.path_regex is None or _is_found(self.path_regex, path))
        )

    def refuses(self, path: str) -> str | None:
        """Return the error of an item of a batch, or None to serve it."""
        matches = self.items is not None and self.items in path
        if matches and self.items_regex is not None:
            matches = _is_found(self.items_regex, path)
        return self.items_error if matches else None


_too_slow: set[str] = set()


def _is_found(pattern: str, text: str) -> bool:
    """Search for a pattern; after a search that takes too long, the pattern matches nothing."""
    if pattern in _too_slow:
        return False
    try:
        return regex.search(pattern, text, timeout=_SEARCH_SECONDS) is not None
    except TimeoutError:
        _too_slow.add(pattern)
        _log.warning("ignoring the regular expression %r: a search took over %s s", pattern, _SEARCH_SECONDS)
        return False


@dataclass
class Rule:
    """A fault in effect.

    Attributes:
        number: its id on the control routes.
        fault: the fault.
        hits: number of requests that the fault affected.
        cleared: set when the fault is cleared; releases the requests that hang.
    """

    number: int
    fault: Fault
    hits: int = 0
    cleared: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def spent(self) -> bool:
        """Whether the fault affected as many requests as it is for."""
        return self.fault.times is not None and self.hits >= self.fault.times

    def describe(self) -> dict[str, Any]:
        """Return the rule as JSON."""
        return {"id": self.number, "hits": self.hits, "fault": self.fault.model_dump(exclude_defaults=True)}


@dataclass(frozen=True)
class Injection:
    """What to do to one request.

    Attributes:
        delay_s: seconds to wait first.
        rule: the rule whose action to apply, if any.
    """

    delay_s: float
    rule: Rule | None


class FaultBook:
    """The rules in the order in which they were added."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._numbers = itertools.count(1)

    def add(self, fault: Fault) -> Rule:
        """Add a fault."""
        rule = Rule(next(self._numbers), fault)
        self._rules.append(rule)
        return rule

    def clear(self, number: int | None = None) -> int:
        """Clear one rule, or all; return how many were cleared."""
        cleared = [rule for rule in self._rules if number in (None, rule.number)]
        for rule in cleared:
            rule.cleared.set()
            self._rules.remove(rule)
        return len(cleared)

    def rules(self) -> list[Rule]:
        """Return the rules, including spent ones, whose hits show what happened."""
        return list(self._rules)

    def choose(self, route: str, method: str, path: str) -> Injection | None:
        """Return what to do to a request, and count it; None for nothing.

        The first matching rule with an action is applied. The delays of matching rules without an action are added.
        """
        delay_s = 0.0
        acting: Rule | None = None
        for rule in self._rules:
            if rule.spent or (acting and rule.fault.actions()) or not rule.fault.matches(route, method, path):
                continue
            rule.hits += 1
            delay_s += rule.fault.delay_s
            if rule.fault.actions():
                acting = rule
        return Injection(delay_s, acting) if delay_s or acting else None
