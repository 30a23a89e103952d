"""The fault matrix without its clock: each fault on each operation once, on the surfaces in turn.

What is told, what is counted, no wrong bytes, nothing lost, LMCache's check, and that service comes back: all of it but how
long it takes. `make faults` measures that, on every route of both surfaces.
"""

import itertools

import pytest

from dev.faults import report as reports
from dev.faults.guarantees import TITLES, guarantee
from dev.faults.injections import FAULTS, OPERATIONS, routes
from dev.faults.matrix import SURFACES, tables, trials
from dev.faults.trial import Bench, Call, Report, Trial
from dev.generated import filled
from tests.support.hubs import start_on_fresh_port
from tests.support.lmcache_classic import running_loop
from tests.support.surface import Limits

PATIENT = Limits(lookup=10, get=15, put=30)
"""For faults that are answered: however slow the machine is, the answer comes first."""

PAUSED = Limits(lookup=10, get=15, put=4)
"""For pauses, which a put waits out until its time is over."""

SHORT = Limits(lookup=0.4, get=0.8, put=1.0)
"""For faults that are not."""

UNANSWERED = {"hang", "trickled"}

SPARED = {("429-after", "list"), *(("429-long", operation) for operation in OPERATIONS[1:])}
"""Which wait out whole seconds, and show what others of their row and column show."""


def one_of_each():
    surfaces = itertools.cycle(SURFACES)
    for fault in FAULTS:
        for operation in OPERATIONS:
            if (fault, operation) in SPARED:
                continue
            # A delete in MP mode has 10 s whatever is configured.
            surface = "classic" if fault in UNANSWERED and operation == "delete" else next(surfaces)
            for route in routes(surface, fault, operation)[-1:]:
                verify = "hash" if fault == "flipped" else "size"
                yield Trial(surface, fault, operation, route, verify=verify, calls=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    with start_on_fresh_port(directory / "hub", faults=True) as hub, running_loop() as loop:
        yield Bench(hub, loop, directory, to_the_end=False)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """After a 429 that does not say how long; and between looks whether a long one is over."""
    monkeypatch.setattr("hfbucket_plugin.hub.rate_limit._FIRST_PAUSE_SECS", 0.1)
    monkeypatch.setattr("hfbucket_plugin.hub.rate_limit._SCOUT_SECS", 1.0)


@pytest.mark.parametrize("trial", one_of_each(), ids=lambda t: f"{t.fault}-{t.operation}-{t.surface}")
def test_a_fault_does_what_is_promised(bench, trial):
    limits = SHORT if trial.fault in UNANSWERED else PAUSED if trial.fault.startswith("429") else PATIENT
    report = bench.run(trial, limits)

    assert [breach for breach in reports.breaches(report) if breach not in reports.timing(report)] == []
    assert report.back_secs is not None, "service did not come back"


# --- the judge ---------------------------------------------------------------------------------------------------------

LOOKUP = Trial("mp", "500", "lookup", "paths-info", calls=1)
GET = Trial("mp", "flipped", "get", "xorb-data", calls=1)


def kept(trial=LOOKUP, word="miss", kind="transport", seconds=0.1, **values):
    calls = [Call({word: 2}, seconds)]
    fields = {"asked": 2, "chunks": {kind: 2}, "operations": {kind: 1}, "back_secs": 1.0, "deadline": 0.5}
    return Report(trial, calls=calls, **(fields | values))


def test_what_keeps_its_promise_is_passed():
    assert reports.breaches(kept()) == []
    assert reports.breaches(kept(chunks={"breaker": 1, "transport": 1})) == []
    assert reports.breaches(kept(GET, "wrong", "hit", wrong=2)) == [], "as `size` promises"


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (kept(word="hit"), "the engine was told hit"),
        (kept(chunks={"missing": 2}), "the metrics count missing"),
        (kept(chunks={"breaker": 2}), "do not count transport"),
        (kept(chunks={"transport": 1}), "of 2 the metrics count 1"),
        (kept(chunks={}), "of 2 the metrics count 0"),
        (kept(seconds=1.1), "0.60 s after its deadline"),
        (kept(back_secs=31.0), "came back after 31.0 s"),
        (kept(back_secs=None), "came back never"),
        (kept(repeated=True), "not served again within 30 s"),
        (kept(repeated=True, same_secs=31.0), "not served again within 30 s"),
        (kept(wrong=1), "1 chunks came back with wrong bytes"),
        (kept(lost=1), "1 chunks that were told"),
        (kept(leaked=3), "memory of 3 chunks did not come back"),
        (kept(healthy=False), "health check failed"),
        (kept(problem="Boom: no"), "could not be made: Boom: no"),
        (kept(Trial("mp", "flipped", "get", "xorb-data", "hash"), "wrong", "hit", wrong=2), "wrong bytes"),
    ],
)
def test_what_does_not_is_found(report, words):
    assert any(words in breach for breach in reports.breaches(report)), reports.breaches(report)
    assert "✗" in tables([report])


def test_a_call_that_raises_is_told():
    report = kept()
    report.calls[0] = Call({}, 0.1, "ValueError: no")

    assert any("raised ValueError" in breach for breach in reports.breaches(report))


def test_a_report_survives_its_way_between_processes():
    report = kept()

    assert Report.of(report.record()) == report


# --- the plan and the page ---------------------------------------------------------------------------------------------


def test_every_fault_is_tried_on_every_operation_of_both_surfaces_on_each_of_its_routes():
    made = {(trial.surface, trial.fault, trial.operation, trial.route) for trial in trials()}

    for surface, fault, operation in itertools.product(SURFACES, FAULTS, OPERATIONS):
        for route in routes(surface, fault, operation):
            assert (surface, fault, operation, route) in made
            assert guarantee(fault, operation, route).kinds
    assert set(TITLES) == set(FAULTS)


def test_the_promises_on_the_page_are_those_of_the_code():
    page = reports.PAGE.read_text(encoding="utf-8")

    assert filled(page, reports.parts()) == page, "run `make docs`"


def test_what_the_page_says_was_measured_kept_its_promises():
    page = reports.PAGE.read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- measured: ")
    measured, ended, _ = rest.partition("<!-- /measured -->")

    assert ended
    assert "Every promise was kept." in measured
    assert "✗" not in measured
