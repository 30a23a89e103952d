"""The command fills the memory of real classic engines, each worker's with its own chunks, from a bucket."""

import contextlib
import json
import socket
from types import SimpleNamespace

import pytest
import torch

from tests.support.buckets import INSTANCE, SECRET, Warehouse, command
from tests.support.lmcache_engine import CpuEngine
from tests.support.waiting import free_ports

pytestmark = pytest.mark.engine

MODEL = "org/tiny model"
CHUNK = 64
CHUNKS = 5
WORKERS = (0, 1)
TOKENS = list(range(CHUNK * CHUNKS))


def yaml(directory, name, extra, **document):
    path = directory / f"{name}.yaml"
    settings = {"chunk_size": CHUNK, "save_unfull_chunk": False, "max_local_cpu_size": 0.1}
    path.write_text(json.dumps(settings | document | {"extra_config": {"save_chunk_meta": False} | extra}))
    return path


def engine(name, config, worker):
    return CpuEngine(f"{name}-{worker}-{config.parent.name}", config, model=MODEL, world_size=2, worker_id=worker)


@pytest.fixture(scope="module")
def produced(tmp_path_factory):
    """The chunks of a prompt that two workers have written, and the KV of each."""
    directory = tmp_path_factory.mktemp("produced")
    extra = {"remote_storage_plugin.fs.warm.base_path": str(directory / "files")}
    config = yaml(directory, "producer", extra, remote_storage_plugins=["fs.warm"], local_cpu=False)
    kv = {}
    for worker in WORKERS:
        one = engine("producer", config, worker)
        kv[worker] = one.random_kv(len(TOKENS), seed=worker)
        one.store(TOKENS, kv[worker])
        one.wait_written(TOKENS)
        one.close()
    return directory / "files", kv


@pytest.fixture
def warehouse(hub, bucket, tmp_path, produced):
    one = Warehouse(hub.endpoint, bucket, tmp_path)
    one.put(one.in_tier(produced[0]))
    assert len(one.chunks) == CHUNKS * len(WORKERS)
    return one


def free_range():
    """A port that is free, and those after it."""
    while True:
        (start,) = free_ports(1)
        with contextlib.suppress(OSError, OverflowError):
            for port in range(start + 1, start + 4):
                socket.create_server(("127.0.0.1", port)).close()
            return start


@pytest.fixture
def config(warehouse, tmp_path):
    """The YAML that engines and the warmer share."""
    head = "remote_storage_plugin."
    document = json.loads(warehouse.config.read_text())
    extra = document["extra_config"] | {f"{head}fs.stage.base_path": str(tmp_path / "stage")}
    return yaml(
        tmp_path,
        "engine",
        extra,
        remote_storage_plugins=["fs.warm", "fs.stage", INSTANCE],
        internal_api_server_enabled=True,
        internal_api_server_port_start=free_range(),
    )


@contextlib.contextmanager
def served(config, *workers):
    """Engines of this process that have memory and nothing else, each with LMCache's own internal API."""
    from lmcache.v1.internal_api_server.api_server import InternalAPIServer

    document = json.loads(config.read_text())
    del document["remote_storage_plugins"]
    (config.parent / "memory.yaml").write_text(json.dumps(document))
    engines, servers = {}, []
    try:
        for worker in workers:
            one = engines[worker] = engine("consumer", config.parent / "memory.yaml", worker)
            manager = SimpleNamespace(
                lmcache_engine=one.engine, lmcache_engine_metadata=one.metadata, config=one.config
            )
            servers.append(InternalAPIServer(manager))
            servers[-1].start()
        yield engines
    finally:
        for server in servers:
            server.stop()
        for one in engines.values():
            one.close()


@pytest.fixture
def warmer(cluster, config):
    def run(*arguments, nodes=("--node-selector", "pool=batch")):  # one that does not say whose chunks it takes
        given = ["run", "--lmcache-config", config, "--model", MODEL, "--address", cluster.address]
        ran = command(*map(str, [*given, *nodes, *arguments]), WARM_TEST_TOKEN=SECRET)
        assert SECRET not in ran.stdout + ran.stderr
        return ran

    return run


def data(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def everywhere(cluster):
    """All nodes, each with both workers: they are on one machine, and have one engine."""
    return [word for node in cluster.list_all_nodes() for word in ("--ranks", f"{node.node_id}=0-1")]


def test_each_worker_gets_its_chunks_and_retrieves_identical_kv(warehouse, produced, config, warmer, everywhere):
    with served(config, *WORKERS) as engines:
        ran = warmer("--tier", '{"type": "local_cpu", "staging": "fs.stage"}', nodes=everywhere)

        assert ran.code == 0, ran.stderr
        summary = ran.summary
        for one in summary["nodes"]:
            assert (one["ranks"], one["selected"], one["copied"]) == ("0-1", 2 * CHUNKS, 2 * CHUNKS)
            assert one["bytes"] == sum(map(len, warehouse.chunks.values()))
        # Once from the Hub, and from there to the others.
        assert (summary["fetched"], summary["received"]) == (2 * CHUNKS, 2 * 2 * CHUNKS)
        assert (summary["tier"], summary["present"], summary["for_nobody"]) == ("local_cpu", 0, 0)
        tmp_path = warehouse.directory
        assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["worker-0", "worker-1"]
        assert data(tmp_path / "stage") == []
        for worker, consumer in engines.items():
            hit, back = consumer.retrieve(TOKENS)
            assert hit == len(TOKENS)
            assert torch.equal(back, produced[1][worker])


def test_a_worker_that_is_missing_fails_alone_and_files_may_be_kept(warehouse, config, warmer, tmp_path):
    stage = json.dumps({"type": "local_cpu", "staging": f"{tmp_path}/own/{{worker}}/{{node_id}}", "keep_staging": True})
    with served(config, 1) as engines:
        ran = warmer("--tier", stage, "--wait-engine", "1s")

        # Only worker 1 answers, and says that worker 0 is beside it.
        assert ran.code == 3, ran.stderr
        assert (ran.summary["nodes"][0]["ranks"], ran.summary["for_nobody"]) == ("0-1", 0)
        assert (ran.summary["copied"], ran.summary["failed_by_kind"]) == (CHUNKS, {"engine": CHUNKS})
        assert all("worker 0 does not answer at http://127.0.0.1:" in one["message"] for one in ran.summary["failures"])
        assert engines[1].lookup(TOKENS) == len(TOKENS)
        (kept,) = (tmp_path / "own" / "1").iterdir()
        mine = {key: value for key, value in warehouse.chunks.items() if key.split("@")[2] == "1"}
        assert warehouse.in_tier(kept) == mine
        assert warehouse.leftovers(kept) == []


def test_an_engine_that_is_not_there_fails_its_node_and_names_every_chunk(warehouse, config, warmer, hub):
    hub.control.reset_counters()
    ran = warmer("--tier", '{"type": "local_cpu", "staging": "fs.stage"}', "--wait-engine", "0s")

    assert ran.code == 3, ran.stderr
    (one,) = ran.summary["nodes"]
    port = json.loads(config.read_text())["internal_api_server_port_start"]
    assert f"http://127.0.0.1:{port + 2}/meta" in one["error"]
    assert (one["failed"], ran.summary["failed_by_kind"]) == (2 * CHUNKS, {"engine": 2 * CHUNKS})
    assert {failure["key"] for failure in ran.summary["failures"]} == set(warehouse.chunks)
    assert hub.control.counters().route("xet-read-token").requests == 0  # nothing was fetched in vain


def test_chunks_of_an_engine_that_is_not_there_are_not_for_nobody(cluster, warmer):
    """Though the other node takes part, and takes none of them."""
    one, other, *_ = (node.node_id for node in cluster.list_all_nodes())
    ran = warmer(
        *("--tier", '{"type": "local_cpu", "staging": "fs.stage"}', "--wait-engine", "0s"),
        nodes=("--nodes", f"{one},{other}", "--ranks", f"{one}=0-1", "--ranks", f"{other}=5"),
    )
    assert ran.code == 3, ran.stderr
    assert (ran.summary["for_nobody"], ran.summary["failed_by_kind"]) == (0, {"engine": 2 * CHUNKS})
    assert "for no node" not in ran.stderr


def test_memory_is_not_filled_beyond_its_room(warehouse, config, warmer):
    size = len(next(iter(warehouse.chunks.values())))
    with served(config, 1) as engines:
        ran = warmer("--tier", '{"type": "local_cpu", "staging": "fs.stage"}', "--wait-engine", "1s", *("--workers", "1"),
                     *("--tier-max-bytes", str(2 * size)))  # fmt: skip
        assert ran.code == 3, ran.stderr
        assert (ran.summary["copied"], ran.summary["failed_by_kind"]) == (2, {"no_room": CHUNKS - 2})
        there = [
            key for key in engines[1].keys(TOKENS) if engines[1].engine.storage_manager.local_cpu_backend.contains(key)
        ]
        assert len(there) == 2
