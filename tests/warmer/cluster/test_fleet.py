"""The command on a Ray cluster of several raylets."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from localhub.faults import Fault
from tests.support.buckets import (
    INSTANCE,
    KEY_PREFIX,
    SECRET,
    Ran,
    arguments,
    classic_key,
    content,
    environment,
    mp_key,
    warm,
)
from tests.support.ray_cluster import node_options

NODES = 3


@pytest.fixture
def stocked(warehouse):
    warehouse.put({classic_key(n): content(n, 20_000 + n) for n in range(150)})
    return warehouse


@pytest.fixture
def on_cluster(cluster):
    """Runs the command on the cluster, and makes sure that it does not give the token away."""

    def run(config, *more):
        ran = warm(config, "--address", cluster.address, *more, WARM_TEST_TOKEN=SECRET)
        assert SECRET not in ran.stdout + ran.stderr
        return ran

    return run


def begin(cluster, config):
    """Start the command and leave it running."""
    return subprocess.Popen(
        [*arguments(config), "--address", cluster.address],
        env=environment(WARM_TEST_TOKEN=SECRET),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, timeout=90):
    stdout, stderr = process.communicate(timeout=timeout)
    return Ran(process.returncode, stdout, stderr)


def all_nodes_copy(hub, number, nodes):
    """Wait until a fault holds up chunks and every node has opened its session."""
    while not hub.control.hits(number) or hub.control.counters().route("xet-read-token").requests < nodes:
        time.sleep(0.05)


def test_every_node_ends_every_chunk_and_a_second_run_moves_nothing(hub, cluster, stocked, on_cluster):
    first = on_cluster(stocked.config)
    assert first.code == 0, first.stderr
    summary = first.summary
    assert summary["result"] == "complete"
    assert summary["selected"] == 150
    assert summary["copied"] + summary["present"] == 150 * NODES
    assert summary["failed"] == summary["unfinished"] == 0
    assert len(summary["nodes"]) == NODES
    assert all(node["copied"] + node["present"] == 150 for node in summary["nodes"])
    assert stocked.in_tier() == stocked.chunks
    assert stocked.leftovers() == []

    hub.control.reset_counters()
    again = on_cluster(stocked.config).summary
    assert (again["copied"], again["present"], again["bytes"]) == (0, 150 * NODES, 0)
    assert hub.control.counters().route("xorb-data").requests == 0
    # Listed once, and looked up once more for all nodes together; and a question for the model's fingerprint.
    assert hub.control.counters().route("paths-info").requests == 2

    # Nothing in the cluster knows the token.
    session = Path(cluster.head_node.get_session_dir_path())
    logs = [path for path in session.rglob("*") if path.is_file() and not path.is_symlink()]
    assert logs
    assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []


def test_several_prefixes_the_other_kind_of_key_and_a_path_that_differs_from_node_to_node(stocked, on_cluster):
    stocked.put({classic_key(1, "org/other"): b"other", mp_key(1): b"mp", classic_key(1, "org/third"): b"third"})
    path = "{node_name}/{node_id}/{label:ray.io/node-id}"
    stocked.extra = {"remote_storage_plugin.fs.warm.base_path": f"{stocked.tier}/{path}"}

    ran = on_cluster(stocked.config, "--prefix", "org/other@", "--prefix", "org/model")

    assert ran.code == 0, ran.stderr
    assert ran.summary["skipped"] == {"other_kind": 1}
    assert "1 chunks have keys of MP mode (`lmcache server`) and are skipped" in ran.stderr
    expected = {key for key in stocked.chunks if not key.startswith("org/third") and key != mp_key(1)}
    nodes = {node["id"]: node["name"] for node in ran.summary["nodes"]}
    assert len(nodes) == NODES
    for node, name in nodes.items():
        assert set(stocked.in_tier(stocked.tier / name / node / node)) == expected


def test_a_node_without_a_label_that_the_path_asks_for_says_so(on_cluster, stocked):
    stocked.extra = {"remote_storage_plugin.fs.warm.base_path": f"{stocked.tier}/{{label:no-such-label}}"}

    ran = on_cluster(stocked.config)

    assert ran.code == 3
    assert all("no value for {label:no-such-label}" in node["error"] for node in ran.summary["nodes"])


def test_failed_chunks_are_named_in_the_summary_and_the_report(hub, stocked, on_cluster):
    hub.control.add_fault(Fault(route="xorb-data", flip_at=(2000,)))
    report = stocked.directory / "report.jsonl"
    ran = on_cluster(stocked.config, "--report", str(report))
    assert ran.code == 3
    summary = ran.summary
    assert summary["failed"] == 150 * NODES
    assert summary["failed_by_kind"] == {"integrity": 150 * NODES}
    assert {failure["key"] for failure in summary["failures"]} == set(stocked.chunks)
    assert summary["failures_file"] == str(report)
    lines = report.read_text().splitlines()
    assert len(lines) == 150 * NODES + 1
    assert '"event": "summary"' in lines[-1]
    assert stocked.in_tier() == {}


def test_a_node_without_the_token_says_which_variable_it_lacks(cluster, stocked, on_cluster):
    bare = cluster.add_node(**node_options(WARM_TEST_TOKEN=""))
    try:
        ran = on_cluster(stocked.config)
    finally:
        cluster.remove_node(bare)
        cluster.wait_for_nodes()  # until the cluster knows, so that the next run is not given it
    assert ran.code == 3
    by_id = {node["id"]: node for node in ran.summary["nodes"]}
    assert "WARM_TEST_TOKEN" in by_id[bare.node_id]["error"]
    assert by_id[bare.node_id]["failed"] == 150
    assert all(node["error"] is None for name, node in by_id.items() if name != bare.node_id)
    assert "WARM_TEST_TOKEN" in ran.stderr
    assert stocked.in_tier() == stocked.chunks


def test_told_to_stop_it_leaves_nothing_half_done(hub, cluster, stocked, on_cluster):
    number = hub.control.add_fault(Fault(route="xorb-data", hang=True))
    process = begin(cluster, stocked.config)
    all_nodes_copy(hub, number, NODES)
    process.send_signal(signal.SIGTERM)
    ran = end(process)
    assert ran.code == 5, ran.stderr
    assert ran.summary["result"] == "interrupted"
    assert ran.summary["unfinished"] == 150 * NODES
    assert ran.summary["failed"] == 0
    assert stocked.in_tier() == {}

    hub.control.clear_faults()
    assert on_cluster(stocked.config).code == 0
    assert stocked.in_tier() == stocked.chunks


def test_told_to_stop_while_it_lists(hub, cluster, stocked):
    number = hub.control.add_fault(Fault(route="tree", hang=True))
    process = begin(cluster, stocked.config)
    while not hub.control.hits(number):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ran = end(process)
    assert (ran.code, ran.stdout) == (5, "")
    assert ran.stderr.startswith("warmer: told to stop")


def test_without_a_cluster_a_local_ray_is_started_and_ended(stocked):
    ran = warm(stocked.config, WARM_TEST_TOKEN=SECRET)
    assert ran.code == 0, ran.stderr
    assert ran.summary["copied"] == 150
    assert "a local Ray is started" in ran.stderr
    assert SECRET not in ran.stdout + ran.stderr
    assert stocked.in_tier() == stocked.chunks
    assert ran.summary["choice"] == {"prefix": [KEY_PREFIX]}


class RunListener:
    def __init__(self):
        self.outcomes, self.errors = [], {}

    def ended(self, _node, outcome):
        self.outcomes.append(outcome)

    def started(self, node, start_secs, open_secs):
        assert start_secs + open_secs >= 0 <= open_secs

    def lost(self, node, kind, message):
        self.errors[node] = (kind, message)

    def replaced(self, node, by):
        pass

    def tick(self):
        pass


@pytest.fixture
def fleet_of(cluster, stocked):
    """Runs a fleet, in this process, whose nodes are told of a tier that is none of ours; returns its witness."""
    import ray

    from hfbucket_plugin.tools.signals import ShutdownSignal
    from warmer.cluster.driver import Driver
    from warmer.cluster.ray import alive_nodes, joined
    from warmer.node.worker import NodeConfig
    from warmer.schedule.cohort import PlanSection
    from warmer.schedule.scheduler import Scheduler

    def run(tier):
        settings = EngineConfig.read(stocked.config).instance(INSTANCE)
        plan, listener = stocked.plan(), RunListener()
        with joined(cluster.address):
            nodes = alive_nodes()
            with joined(None):  # it is in a cluster already, and stays there
                pass
            assert ray.is_initialized()
            config = NodeConfig(INSTANCE, settings, tier, token_expected=True)
            schedule = Scheduler({node.id: 10**7 for node in nodes}, [PlanSection(lambda start: iter(plan[start:]))])
            Driver(nodes, config, listener, ShutdownSignal(), 60.0).run(schedule)
        assert not ray.is_initialized()
        assert len(listener.outcomes) == len(nodes) * len(plan)
        return listener

    return run


def test_a_node_that_cannot_read_its_orders_takes_no_part(fleet_of):
    class Unreadable:
        def __reduce__(self):
            return _refuse_elsewhere, ()

    def _refuse_elsewhere():
        raise ImportError("no such module on this node")

    listener = fleet_of(Unreadable())
    assert {outcome.kind for outcome in listener.outcomes} == {"node_start"}
    assert {kind for kind, _ in listener.errors.values()} == {"node_start"}
