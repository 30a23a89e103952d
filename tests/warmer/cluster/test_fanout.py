"""Chunks on their way through a cluster: once from the Hub, and through the object stores to all others."""

import contextlib
import fcntl
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from huggingface_hub import HfApi

from tests.support.buckets import MODEL, SECRET, Ran, Warehouse, arguments, classic_key, command, content, environment
from tests.support.ray_cluster import STORE_BYTES, actors, as_it_was, memory_bytes, node_options, raylet, raylets

MIB = 1024 * 1024
CHUNKS = 256
NODES = 4


@pytest.fixture(scope="module")
def four_raylets():
    with raylets([None] * NODES) as one:
        yield one


@pytest.fixture
def cluster(four_raylets):
    with as_it_was(four_raylets) as one:
        yield one


@pytest.fixture(scope="module")
def contents():
    return {classic_key(n): content(n, MIB) for n in range(CHUNKS)}


@pytest.fixture(scope="module")
def store(session_hub, contents, tmp_path_factory):
    """A bucket with 256 MiB in it, and some of them again under another prefix."""
    bucket = "tests/fanout"
    HfApi(endpoint=session_hub.endpoint, token=False).create_bucket(bucket)
    directory = tmp_path_factory.mktemp("fanout")
    Warehouse(session_hub.endpoint, bucket, directory, "all").put(contents)
    few = dict(list(contents.items())[: CHUNKS // 8])
    Warehouse(session_hub.endpoint, bucket, directory, "few").put(few)
    return bucket


@pytest.fixture
def stocked(hub, store, contents, tmp_path):
    """A warehouse of the 256 chunks whose tiers differ from node to node."""
    return warehouse_of(hub, store, tmp_path, "all", contents)


@pytest.fixture
def few(hub, store, contents, tmp_path):
    """The same of 32 chunks."""
    return warehouse_of(hub, store, tmp_path, "few", dict(list(contents.items())[: CHUNKS // 8]))


def warehouse_of(hub, bucket, directory, prefix, chunks):
    path = {"remote_storage_plugin.fs.warm.base_path": str(directory / "{node_id}" / "tier")}
    return Warehouse(hub.endpoint, bucket, directory, prefix, chunks=chunks, extra=path)


def tier(warehouse, node_id):
    return warehouse.directory / node_id / "tier"


def holdings(warehouse, node_id):
    return warehouse.in_tier(tier(warehouse, node_id))


def begin(cluster, config, *more):
    return subprocess.Popen(
        [*arguments(config, *more), "--address", cluster.address],
        env=environment(WARM_TEST_TOKEN=SECRET),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def apply(cluster, plan, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "warmer", "apply", plan, *more, "--address", cluster.address],
        env=environment(WARM_TEST_TOKEN=SECRET),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    stdout, stderr = process.communicate(timeout=120)
    return Ran(process.returncode, stdout, stderr)


def run(cluster, config, *more):
    return end(begin(cluster, config, *more))


def watch(cluster, process):
    """The largest memory of any actor, its peak and its own, until the command ends; and that of the command."""
    actor, driver = [0, 0], [0, 0]
    # Its summary names what failed: more than a pipe holds that nobody reads.
    pipe = process.stdout.fileno()
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, MIB)
    while process.poll() is None:
        for most, processes in ((driver, [process]), (actor, actors(cluster))):
            for one in processes:
                with contextlib.suppress(OSError):
                    most[:] = map(max, most, memory_bytes(one))
        time.sleep(0.1)
    return driver, actor


def spilled(cluster):
    """What Ray wrote from its stores to disk."""
    session = Path(cluster.head_node.get_session_dir_path())
    return [path for path in session.glob("ray_spilled_objects*/*") if path.is_file()]


def ids(cluster):
    return [node.node_id for node in cluster.list_all_nodes()]


def alive(cluster):
    """The nodes that the cluster believes to be there."""
    return {node["NodeID"] for node in cluster.global_state.node_table() if node["Alive"]}


def wait_for(condition):
    while not condition():
        time.sleep(0.05)


def test_each_chunk_leaves_the_hub_once(hub, cluster, stocked):
    process = begin(cluster, stocked.config)
    driver, actor = watch(cluster, process)
    ran = end(process)
    assert ran.code == 0, ran.stderr
    summary = ran.summary
    assert (summary["copied"], summary["failed"], summary["unfinished"]) == (CHUNKS * NODES, 0, 0)
    assert summary["received"] == CHUNKS * (NODES - 1)
    assert (summary["fetched"], summary["refetched"], summary["fetched_alone"]) == (CHUNKS, 0, 0)
    for node_id in ids(cluster):
        assert holdings(stocked, node_id) == stocked.chunks
        assert stocked.leftovers(tier(stocked, node_id)) == []
    once = CHUNKS * MIB
    assert once <= hub.control.counters().total.bytes_out <= 1.05 * once
    # Every node did some of the fetching.
    assert all(node["received"] < CHUNKS for node in summary["nodes"])
    # An actor that kept what went through it would have 256 MiB more than the 100 MiB that it has before the first chunk.
    assert max(driver) < 200 * MIB
    assert actor[1] < 350 * MIB
    assert actor[0] < 350 * MIB + STORE_BYTES + 50 * MIB
    assert spilled(cluster) == []


def test_directly_each_node_asks_the_hub(hub, cluster, few):
    ran = run(cluster, few.config, "--direct", "--verify", "length")
    assert ran.code == 0, ran.stderr
    assert ran.summary["received"] == 0
    assert all(holdings(few, node_id) == few.chunks for node_id in ids(cluster))
    assert hub.control.counters().total.bytes_out >= 3.8 * len(few.chunks) * MIB


def test_time_is_up_and_the_next_run_goes_on(hub, cluster, few):
    ran = run(cluster, few.config, "--max-bandwidth", "4MiB", "--max-duration", "3")
    assert ran.code == 5, ran.stderr
    assert ran.summary["result"] == "interrupted"
    assert ran.summary["unfinished"] > 0
    missing = missing_in(few, cluster)
    hub.control.reset_counters()
    again = run(cluster, few.config)
    assert again.code == 0, again.stderr
    reported = again.summary
    most = (
        len(missing) + reported["refetched"] + reported["fetched_alone"]
    )  # more only where the machine is so slow that nodes lag
    assert len(missing) * MIB <= reported["fetched_bytes"] <= most * MIB
    assert hub.control.counters().total.bytes_out <= 1.05 * most * MIB + MIB
    assert all(holdings(few, node_id) == few.chunks for node_id in ids(cluster))


def missing_in(few, cluster):
    """Chunks that one node at least does not hold; no node holds anything else, nor half of one."""
    for node_id in ids(cluster):
        assert holdings(few, node_id).items() <= few.chunks.items()
    return {key for key in few.chunks for node_id in ids(cluster) if key not in holdings(few, node_id)}


def test_a_killed_apply_is_resumed_by_another_of_the_same_plan(cluster, few):
    plan = str(few.directory / "plan.jsonl")
    chosen = ["--lmcache-config", str(few.config), "--model", MODEL, "--tier", "fs.warm", "--out", plan]
    assert command("plan", *chosen, WARM_TEST_TOKEN=SECRET).code == 0
    process = apply(cluster, plan, "--max-bandwidth", "8MiB")
    wait_for(lambda: all(len(list(tier(few, node_id).glob("*.data"))) >= 12 for node_id in ids(cluster)))
    process.kill()
    end(process)
    psutil.wait_procs(actors(cluster))
    missing = missing_in(few, cluster)
    assert missing
    again = end(apply(cluster, plan))
    assert again.code == 0, again.stderr
    # Those that hold a chunk neither fetch nor receive it; who lacks it fetches it once for all that lack it.
    reported = again.summary
    again_or_alone = (
        reported["refetched"] + reported["fetched_alone"]
    )  # none, but where the machine is so slow that nodes lag
    assert len(missing) <= reported["fetched"] <= len(missing) + again_or_alone
    assert len(missing) < len(few.chunks)
    assert missing_in(few, cluster) == set()
    assert all(few.leftovers(tier(few, node_id)) == [] for node_id in ids(cluster))


def test_those_with_the_same_workers_share_their_chunks_and_no_others(hub, cluster, store, tmp_path):
    of_workers = {
        worker: {classic_key(n, "org/two", worker, 2): content(n, MIB) for n in range(8)} for worker in (0, 1)
    }
    warehouse = warehouse_of(hub, store, tmp_path, "two", {})
    warehouse.put(of_workers[0] | of_workers[1])
    first, second, third, fourth = ids(cluster)
    ranks = {first: 0, second: 1, third: 0, fourth: "0-1"}
    hub.control.reset_counters()
    ran = run(
        cluster, warehouse.config, "--prefix", "org/two@", *(f"--ranks={name}={of}" for name, of in ranks.items())
    )
    assert ran.code == 0, ran.stderr
    for name, of in ranks.items():
        assert holdings(warehouse, name) == (warehouse.chunks if of == "0-1" else of_workers[of])
    assert (ran.summary["fetched"], ran.summary["received"], ran.summary["copied"]) == (16, 24, 40)
    assert hub.control.counters().total.bytes_out <= 1.05 * 16 * MIB


def lose_in_mid_run(cluster, few, *more):
    """Begin a run, and kill one of its raylets when some of the chunks are there."""
    doomed = cluster.add_node(**node_options(WARM_TEST_TOKEN=SECRET))
    process = begin(cluster, few.config, "--max-bandwidth", "8MiB", *more)
    wait_for(lambda: len(list(tier(few, doomed.node_id).glob("*.data"))) >= 4)
    lose(cluster, doomed)
    return doomed.node_id, process


def lose(cluster, node):
    """End a raylet and its workers, as on a node that is gone; they would outlive it for a moment."""
    workers = psutil.Process(raylet(node).pid).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            worker.kill()


def test_a_node_that_joins_takes_the_place_of_a_lost_one_in_every_tier(cluster, few):
    few.tiers = ("fs.warm", "fs.second")
    second = few.directory / "second"
    few.extra["remote_storage_plugin.fs.second.base_path"] = str(second / "{node_id}")
    before = set(ids(cluster))
    dead, process = lose_in_mid_run(cluster, few, "--replace-nodes", "--tier", "fs.warm", "--tier", "fs.second")
    joined = cluster.add_node(**node_options(WARM_TEST_TOKEN=SECRET))
    ran = end(process)
    assert ran.code == 0, ran.stderr
    first, other = ran.summary["tiers"]
    assert (first["tier"], other["tier"]) == ("fs.warm", "fs.second")
    by_id = {node["id"]: node for node in first["nodes"]}
    assert by_id[dead]["replaced_by"] == joined.node_id
    assert by_id[joined.node_id]["copied"] == len(few.chunks)
    assert ran.summary["failed"] == 0, ran.summary["failures"][:3]
    assert {node["id"]: node["copied"] for node in other["nodes"]} == {
        node_id: len(few.chunks) for node_id in [*before, joined.node_id]
    }
    for node_id in [*before, joined.node_id]:
        assert holdings(few, node_id) == few.in_tier(second / node_id) == few.chunks
    assert not (second / dead).exists()


def test_a_node_killed_in_mid_run_is_told_apart_and_a_new_one_is_filled_later(hub, cluster, few):
    known = set(ids(cluster))
    dead, process = lose_in_mid_run(cluster, few)
    ran = end(process)
    assert ran.code == 3, ran.stderr
    by_id = {node["id"]: node for node in ran.summary["nodes"] if node["id"] in known | {dead}}
    lost = by_id.pop(dead)
    assert lost["error"].startswith("node_lost: ")
    assert lost["copied"] + lost["failed"] == len(few.chunks)
    named = {failure["key"] for failure in ran.summary["failures"] if failure["node"] == dead}
    assert [failure for failure in ran.summary["failures"] if failure["node"] in known] == []
    assert len(named) == lost["failed"] > 0
    assert all(node["copied"] == len(few.chunks) for node in by_id.values())
    assert all(holdings(few, node_id) == few.chunks for node_id in by_id)

    joined = cluster.add_node(**node_options(WARM_TEST_TOKEN=SECRET))
    try:
        hub.control.reset_counters()
        again = run(cluster, few.config)
        done = {node["id"]: node for node in again.summary["nodes"] if node["id"] != dead}
        assert done[joined.node_id]["copied"] == len(few.chunks)
        assert again.summary["copied"] == again.summary["fetched"] == len(few.chunks)
        assert hub.control.counters().total.bytes_out <= 1.05 * len(few.chunks) * MIB
    finally:
        cluster.remove_node(joined, allow_graceful=False)
