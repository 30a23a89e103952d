"""A warm-up for programs, by the example of `docs/python.md` and beside it."""

import logging
import signal
import threading

import pytest

import warmer
from hfbucket_plugin import ConfigError, TransportError
from tests.docs.examples import example
from tests.support.buckets import INSTANCE, MODEL, SECRET, classic_key, content
from tests.support.ray_cluster import actors
from tests.support.waiting import eventually

CHUNKS = 20


def handlers():
    return [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]


def loggers():
    named = (logging.getLogger(name) for name in (None, "hfbucket_plugin", "warmer", "jobs", "matplotlib"))
    return [(list(one.handlers), one.level) for one in named]


@pytest.fixture
def request_of(monkeypatch, warehouse):
    """Makes requests about a bucket with chunks."""
    monkeypatch.setenv("WARM_TEST_TOKEN", SECRET)
    for variable in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)
    warehouse.put({classic_key(n): content(n, 1000) for n in range(CHUNKS)})

    def make(**more):
        return warmer.WarmRequest(
            **{
                "source": warmer.SourceOptions(lmcache_config=warehouse.config, instance=INSTANCE),
                "choose": warmer.Selection(model=(MODEL,)),
                "tiers": ("fs.warm",),
            }
            | more
        )

    return make


def test_the_example_of_a_warm_up(cluster, request_of, warehouse, monkeypatch, capfd):
    warehouse.extra["remote_storage_plugin.fs.warm.base_path"] = f"{warehouse.tier}/{{node_id}}"
    monkeypatch.chdir(warehouse.config.parent)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    before, variables = (handlers(), loggers()), {}

    exec(example("Warm nodes"), variables)  # noqa: S102 - the documentation's own code

    summary = variables["summary"]
    assert capfd.readouterr().out == f"{3 * CHUNKS} chunks copied, 0 were there, on 3 nodes\n"
    assert (handlers(), loggers()) == before
    assert (summary.result, summary.exit_code, summary.failed, summary.failures) == ("complete", 0, 0, ())
    assert (summary.selected, summary.selected_bytes, summary.bytes) == (CHUNKS, 1000 * CHUNKS, 3000 * CHUNKS)
    assert [(node.copied, node.error) for node in summary.nodes] == [(CHUNKS, None)] * 3
    assert all(len(warehouse.in_tier(warehouse.tier / node.id)) == CHUNKS for node in summary.nodes)
    assert summary.record["event"] == "summary"


def test_a_failed_chunk_is_named_and_a_second_call_copies_what_is_missing(cluster, request_of, warehouse):
    tier = warehouse.tier
    page, before = warehouse.directory / "page.html", loggers()
    request = request_of(address=cluster.address, nodes=warmer.NodeOptions(selector=("pool=batch",)), report_html=page)
    in_the_way = tier / f"{classic_key(3).replace('/', '-SEP-')}.data"
    in_the_way.mkdir(parents=True)

    first = warmer.warm_up(request)
    in_the_way.rmdir()
    second = warmer.warm_up(request)

    assert (first.result, first.exit_code, first.copied, first.failed) == ("failed", 3, CHUNKS - 1, 1)
    assert "<svg" in page.read_text()
    assert loggers() == before
    (failure,) = first.failures
    assert (failure.key, failure.kind, failure.tier) == (classic_key(3), "tier", "fs.warm")
    assert (second.result, second.copied, second.present) == ("complete", 1, CHUNKS - 1)


def test_a_warm_up_that_is_told_to_stop_tells_what_is_left(cluster, request_of):
    stop = threading.Event()
    stop.set()

    summary = warmer.warm_up(request_of(address=cluster.address), stop=stop)

    assert (summary.result, summary.exit_code, summary.copied) == ("interrupted", 5, 0)
    assert summary.unfinished == 3 * CHUNKS


def test_an_interrupt_passes_and_leaves_nothing_behind(cluster, request_of, warehouse, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("warmer.report.observers.EventDispatcher.ended", interrupt)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = handlers()

    with pytest.raises(KeyboardInterrupt):
        warmer.warm_up(request_of(address=cluster.address, report=tmp_path / "report.jsonl"))

    import ray

    assert not ray.is_initialized()
    assert handlers() == before
    assert [path.name for path in tmp_path.rglob("*") if "report" in path.name] == []
    eventually(lambda: not actors(cluster))
    assert [name for name in warehouse.leftovers() if name.endswith(".part")] == []


def test_what_cannot_be_done_is_raised_in_the_words_of_the_command(request_of, tmp_path, capfd):
    with pytest.raises(ConfigError, match="--tier: name the tier to fill"):
        warmer.warm_up(request_of(tiers=()))
    with pytest.raises(ConfigError, match="nothing says which chunks"):
        warmer.warm_up(request_of(choose=warmer.Selection()))
    with pytest.raises(warmer.NothingToDoError, match="holds no chunk"):
        warmer.warm_up(request_of(choose=warmer.Selection(model=("org/none",))))
    with pytest.raises(warmer.ClusterError, match=r"127\.0\.0\.1:1 does not answer"):
        warmer.warm_up(request_of(address="127.0.0.1:1"))
    assert capfd.readouterr().out == ""


def test_no_error_or_summary_holds_a_token(request_of, monkeypatch):
    def refuse(*_, **__):
        raise TransportError(f"the store repeats {SECRET}")

    monkeypatch.setattr("warmer.run.run", refuse)

    with pytest.raises(TransportError, match=r"the store repeats \*\*\*$"):
        warmer.warm_up(request_of())


def test_a_report_never_replaces_what_is_read(request_of, warehouse):
    with pytest.raises(ConfigError, match="would be overwritten"):
        warmer.warm_up(request_of(report=warehouse.config))


def test_a_request_is_read_from_its_file(tmp_path):
    path = tmp_path / "warm.yaml"
    path.write_text("source: {lmcache_config: lmcache.yaml}\nchoose: {all: true}\ntiers: fs.warm\n")

    assert warmer.read_request(path).tiers == ("fs.warm",)
    path.write_text("sauce: {}\n")
    with pytest.raises(ConfigError, match="unknown setting sauce"):
        warmer.read_request(path)
