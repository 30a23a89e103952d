"""Faults on order: which requests they meet and what they do. `localhub.faults.injection` carries them out."""

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import regex
from pydantic import BaseModel, Field, field_validator, model_validator

_ACTIONS = ("status", "truncate_at", "trickle_bytes", "flip_at", "flip_every", "hang", "reset", "items")

_SEARCH_SECONDS = 0.1
"""A search that takes longer would hold up every request of the Hub."""

_log = logging.getLogger("localhub")

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Fault(BaseModel, extra="forbid", frozen=True):
    """One rule. It holds a delay, or one action, or both.

    Attributes:
        route: name of the route that it meets (see `docs/localhub.md`), or `*` for every one.
        method: HTTP method that it meets; None for every one.
        path: text that the decoded path of the request contains.
        path_regex: regular expression that is found in the decoded path; one whose search takes over 0.1 s is dropped.
        times: how many requests it meets before it is spent; None for all.
        delay_s: seconds to wait before anything else. Delays of several rules add up.
        status: answer with this HTTP status instead of serving the request.
        headers: headers of that answer.
        body: body of that answer.
        truncate_at: send this many bytes of the answer's body, then close the connection.
        trickle_bytes: send the answer's body in pieces of this many bytes.
        trickle_interval_s: seconds between those pieces.
        flip_at: invert the bytes at these offsets of the answer's body; its length stays.
        flip_every: invert every n-th byte of the answer's body; its length stays.
        hang: do not answer until the rule is cleared (then serve the request) or the client goes away.
        reset: reset the TCP connection instead of serving the request.
        items: fail the items of a batch whose path contains this text; the others are served. Empty for all.
        items_regex: narrows `items` to paths in which this regular expression is found.
        items_error: the error text of those items.
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
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _does_one_thing(self) -> Self:
        actions = self._actions()
        if len(actions) > 1:
            raise ValueError(f"a fault has one action, this one has {', '.join(actions)}")
        if not actions and not self.delay_s:
            raise ValueError(f"a fault needs delay_s or one of {', '.join(_ACTIONS)}")
        return self

    @property
    def acts(self) -> bool:
        """Whether it does more than delay."""
        return bool(self._actions())

    def _actions(self) -> list[str]:
        # Not by truth: to truncate at 0 and to fail the items that contain "" are actions.
        return [name for name in _ACTIONS if getattr(self, name) is not None and getattr(self, name) is not False]

    def meets(self, route: str, method: str, path: str) -> bool:
        """Whether a request is one that this rule is for."""
        return (
            self.route in ("*", route)
            and (self.method is None or self.method.upper() == method)
            and (self.path is None or self.path in path)
            and (self.path_regex is None or _is_found(self.path_regex, path))
        )

    def refuses(self, path: str) -> str | None:
        """Return the error text for an item of a batch, or None if it is to be served."""
        if self.items is None or self.items not in path:
            return None
        if self.items_regex is not None and not _is_found(self.items_regex, path):
            return None
        return self.items_error


_too_slow: set[str] = set()


def _is_found(pattern: str, text: str) -> bool:
    """Search for a pattern of an order; one that once took too long is found nowhere from then on."""
    if pattern in _too_slow:
        return False
    try:
        return regex.search(pattern, text, timeout=_SEARCH_SECONDS) is not None
    except TimeoutError:
        _too_slow.add(pattern)
        _log.warning("the regular expression %r took over %s s and is not used any more", pattern, _SEARCH_SECONDS)
        return False


@dataclass
class Rule:
    """A fault that was ordered.

    Attributes:
        number: names it on the control route.
        fault: what was ordered.
        hits: how many requests it met.
        cleared: set once it is taken back; lets go of those that hang.
    """

    number: int
    fault: Fault
    hits: int = 0
    cleared: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def spent(self) -> bool:
        """Whether it met as many requests as it was for."""
        return self.fault.times is not None and self.hits >= self.fault.times

    def describe(self) -> dict[str, Any]:
        """Return the rule as JSON."""
        return {"id": self.number, "hits": self.hits, "fault": self.fault.model_dump(exclude_defaults=True)}


@dataclass(frozen=True)
class Injection:
    """What is to happen to one request.

    Attributes:
        delay_s: seconds to wait first.
        rule: the rule whose action is carried out, if any.
    """

    delay_s: float
    rule: Rule | None


class FaultBook:
    """The rules in the order in which they were added."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._numbers = itertools.count(1)

    def add(self, fault: Fault) -> Rule:
        """Order a fault."""
        rule = Rule(next(self._numbers), fault)
        self._rules.append(rule)
        return rule

    def clear(self, number: int | None = None) -> int:
        """Take back one rule, or all; return how many those were."""
        gone = [rule for rule in self._rules if number in (None, rule.number)]
        for rule in gone:
            rule.cleared.set()
        self._rules = [rule for rule in self._rules if rule not in gone]
        return len(gone)

    def rules(self) -> list[Rule]:
        """Return the rules, spent ones too: their hits tell what happened."""
        return list(self._rules)

    def choose(self, route: str, method: str, path: str) -> Injection | None:
        """Return what is to happen to a request, counting it as met; None for nothing.

        The first rule with an action that meets it acts; the delays of rules that only delay add up with its own.
        """
        delay_s = 0.0
        acting: Rule | None = None
        for rule in self._rules:
            if rule.spent or (acting and rule.fault.acts) or not rule.fault.meets(route, method, path):
                continue
            rule.hits += 1
            delay_s += rule.fault.delay_s
            if rule.fault.acts:
                acting = rule
        return Injection(delay_s, acting) if delay_s or acting else None
