"""Metrics, rate-limited logs, and errors."""

import copy
import inspect
import logging
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import prometheus_client
import pytest
from ray import cloudpickle

from hfbucket_plugin import errors
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.telemetry import MemorySink, PrometheusSink, RateLimitedLogger
from hfbucket_plugin.errors import HFBucketError, ItemFailure
from tests.support.waiting import Clock, in_threads

# Dashboards and alerts are built on these: they are only ever added to.
NAMES = {
    telemetry.OPERATIONS: ("hfbucket_operations_total", ["instance", "operation", "outcome"]),
    telemetry.CHUNKS: ("hfbucket_chunks_total", ["instance", "operation", "outcome"]),
    telemetry.BYTES: ("hfbucket_bytes_total", ["instance", "direction"]),
    telemetry.SECONDS: ("hfbucket_seconds", ["instance", "operation"]),
    telemetry.HUB_REQUESTS: ("hfbucket_hub_requests_total", ["instance", "route", "outcome"]),
}


def labels_of(name):
    return {label: f"some-{label}" for label in NAMES[name][1]}


def test_names_are_pinned():
    assert {name: written for name, (written, _) in NAMES.items()} == {name: name for name in NAMES}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {telemetry.SECONDS}))
def test_counters_arrive_in_prometheus_under_their_name_and_labels(name):
    registry = prometheus_client.CollectorRegistry()
    sink = PrometheusSink(registry)

    sink.count(name, **labels_of(name))
    sink.count(name, 2.5, **labels_of(name))

    assert registry.get_sample_value(name, labels_of(name)) == 3.5
    assert f"# TYPE {name} counter".replace("_total", "") in prometheus_client.generate_latest(
        registry
    ).decode().replace("_total", "")


def test_durations_arrive_in_prometheus():
    registry = prometheus_client.CollectorRegistry()
    sink = PrometheusSink(registry)
    labels = labels_of(telemetry.SECONDS)

    sink.observe(telemetry.SECONDS, 0.25, **labels)
    sink.observe(telemetry.SECONDS, 100, **labels)

    assert registry.get_sample_value("hfbucket_seconds_count", labels) == 2
    assert registry.get_sample_value("hfbucket_seconds_sum", labels) == 100.25
    assert registry.get_sample_value("hfbucket_seconds_bucket", labels | {"le": "0.5"}) == 1
    assert registry.get_sample_value("hfbucket_seconds_bucket", labels | {"le": "+Inf"}) == 2


def test_the_process_has_one_sink_however_often_it_is_asked_for():
    sinks = in_threads(8, lambda _number: telemetry.default_sink())

    assert len({id(sink) for sink in sinks}) == 1
    before = prometheus_client.REGISTRY.get_sample_value(telemetry.BYTES, {"instance": "once", "direction": "read"})
    sinks[0].count(telemetry.BYTES, 7, instance="once", direction="read")
    after = prometheus_client.REGISTRY.get_sample_value(telemetry.BYTES, {"instance": "once", "direction": "read"})
    assert (before, after) == (None, 7)


def test_a_tally_adds_up_by_any_labels():
    tally = MemorySink()
    tally.count(telemetry.CHUNKS, 3, instance="a", operation="get", outcome="hit")
    tally.count(telemetry.CHUNKS, 1, instance="a", operation="get", outcome="missing")
    tally.count(telemetry.CHUNKS, 5, instance="b", operation="get", outcome="hit")
    tally.count(telemetry.BYTES, 9, instance="a", direction="read")
    tally.observe(telemetry.SECONDS, 0.5, instance="a", operation="get")
    tally.observe(telemetry.SECONDS, 1.5, instance="a", operation="get")

    assert tally.get(telemetry.CHUNKS) == 9
    assert tally.get(telemetry.CHUNKS, instance="a") == 4
    assert tally.get(telemetry.CHUNKS, outcome="hit") == 8
    assert tally.get(telemetry.CHUNKS, instance="b", outcome="missing") == 0
    assert tally.get(f"{telemetry.SECONDS}_count", operation="get") == 2
    assert tally.get(f"{telemetry.SECONDS}_sum", operation="get") == 2.0
    assert tally.get("nothing") == 0


def test_a_tally_loses_nothing_between_threads():
    tally = MemorySink()

    in_threads(8, lambda _number: [tally.count("x", instance="a") for _ in range(1000)])

    assert tally.get("x") == 8000


@pytest.fixture
def lines():
    heard = []
    log = logging.Logger("limited")  # noqa: LOG001 - one of its own, so that no other handler hears it
    handler = logging.Handler()
    handler.emit = lambda record: heard.append((record.levelname, record.getMessage()))
    log.addHandler(handler)
    return log, heard


def test_one_line_a_kind_and_interval_and_how_many_were_left_out(lines):
    log, heard = lines
    clock = Clock()
    limited = RateLimitedLogger(log, 30, clock)

    assert limited.warning("get denied", "first")
    assert [limited.warning("get denied", f"repeated {n}") for n in range(5)] == [False] * 5
    assert limited.warning("get transport", "another kind")
    clock.now += 29.9
    assert not limited.warning("get denied", "too soon")
    clock.now += 0.2
    assert limited.warning("get denied", "again")
    clock.now += 31
    assert limited.warning("get denied", "after silence")

    assert heard == [
        ("WARNING", "first"),
        ("WARNING", "another kind"),
        ("WARNING", "again (6 more like this since the last one)"),
        ("WARNING", "after silence"),
    ]


def test_a_message_is_no_format(lines):
    log, heard = lines

    RateLimitedLogger(log).warning("k", "100 %s of %d %")

    assert heard == [("WARNING", "100 %s of %d %")]


def test_threads_do_not_get_around_it(lines):
    log, heard = lines
    limited = RateLimitedLogger(log, 30, Clock())

    logged = in_threads(16, lambda number: [limited.warning("k", f"{number}") for _ in range(50)])

    assert sum(sum(one) for one in logged) == len(heard) == 1


# Kinds label metrics and reports that outlive a release: one that changes here breaks somebody's dashboard.
TREE = {
    "HFBucketError": ((Exception,), "error"),
    "ConfigError": ((HFBucketError, ValueError), "config"),
    "KeyFormatError": ((HFBucketError, ValueError), "key"),
    "RefusedError": ((HFBucketError, ValueError), "refused"),
    "SafetyError": ((errors.RefusedError,), "refused"),
    "MissingError": ((HFBucketError, LookupError), "missing"),
    "ObjectMissingError": ((errors.MissingError,), "missing"),
    "BucketMissingError": ((errors.MissingError,), "bucket_missing"),
    "AccessDeniedError": ((HFBucketError, PermissionError), "denied"),
    "ThrottledError": ((HFBucketError,), "throttled"),
    "BudgetError": ((errors.ThrottledError,), "budget"),
    "BreakerOpenError": ((HFBucketError,), "breaker"),
    "TransportError": ((HFBucketError, ConnectionError), "transport"),
    "DeadlineError": ((errors.TransportError, TimeoutError), "deadline"),
    "UnsentError": ((errors.DeadlineError,), "deadline"),
    "RevokedError": ((HFBucketError,), "revoked"),
    "IntegrityError": ((HFBucketError,), "integrity"),
    "HashMismatchError": ((errors.IntegrityError,), "integrity"),
    "TempDirError": ((HFBucketError,), "scratch"),
    "LocalFileError": ((HFBucketError, OSError), "file"),
    "PartialFailureError": ((HFBucketError,), "partial"),
}

FIELDS = {
    "LocalFileError": {"number": 28},
    "AccessDeniedError": {"status": 403},
    "ThrottledError": {"retry_after": 12.5},
    "PartialFailureError": {"failures": (ItemFailure("a", "hub", "no"), ItemFailure("b", "deadline", "late"))},
}

EXAMPLES = [getattr(errors, name)(f"what {name} says: ü", **FIELDS.get(name, {})) for name in TREE]


def _unpickled(data):
    return pickle.loads(data)  # noqa: S301 - what this test pickled


def _raise_example(number):
    raise EXAMPLES[number]


def test_the_tree_and_its_kinds_are_what_handlers_rely_on():
    found = {
        name: (cls.__bases__, cls.kind)
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, HFBucketError)
    }

    assert found == TREE


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "copied",
    [
        lambda error: _unpickled(pickle.dumps(error)),
        lambda error: _unpickled(pickle.dumps(error, protocol=0)),
        lambda error: _unpickled(cloudpickle.dumps(error)),
        copy.copy,
        copy.deepcopy,
    ],
    ids=["pickle", "protocol-0", "cloudpickle", "copy", "deepcopy"],
)
def test_every_error_comes_back_with_its_fields(error, copied):
    back = copied(error)

    assert type(back) is type(error)
    assert str(back) == str(error) == error.message
    assert back.args == error.args
    assert vars(back) == vars(error)
    assert back.kind == error.kind


def test_notes_and_subclasses_with_fields_of_their_own_survive_too():
    class OwnError(errors.RefusedError):
        def __init__(self, *, key: str, size: int) -> None:
            super().__init__(f"{key}: {size}")
            self.key, self.size = key, size

    error = OwnError(key="k", size=3)
    error.add_note("seen by worker 4")

    back = _unpickled(cloudpickle.dumps(error))

    assert (back.key, back.size, str(back), back.__notes__) == ("k", 3, "k: 3", ["seen by worker 4"])


def test_errors_cross_a_process_border_as_themselves():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        raised = [processes.submit(_raise_example, number).exception() for number in range(len(EXAMPLES))]

    assert [(type(error), str(error)) for error in raised] == [(type(error), str(error)) for error in EXAMPLES]
    assert [vars(error) for error in raised] == [vars(error) for error in EXAMPLES]


def test_handlers_of_the_standard_library_catch_them():
    with pytest.raises(TimeoutError):
        raise errors.DeadlineError("late")
    with pytest.raises(ConnectionError):
        raise errors.DeadlineError("late")
    with pytest.raises(PermissionError):
        raise errors.AccessDeniedError("no", 401)
    with pytest.raises(LookupError):
        raise errors.BucketMissingError("none")
