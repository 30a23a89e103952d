import prometheus_client
import pytest

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.telemetry import MemorySink, PrometheusSink
from tests.support.waiting import in_threads

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
