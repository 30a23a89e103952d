"""The memory of a real classic engine, loaded from a staging directory through its internal API."""

import contextlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.errors import ConfigError
from tests.support.buckets import Warehouse
from tests.support.lmcache_engine import CpuEngine
from tests.support.waiting import free_ports
from warmer.node.worker import NodeWarmer
from warmer.report.outcomes import EngineError, TierError, TierFullError
from warmer.tiers import declared_tier, open_tier
from warmer.tiers.local_cpu import load, worker_address

pytestmark = pytest.mark.engine

MODEL = "org/tiny model"
CHUNK = 64
CHUNKS = 10
TOKENS = list(range(CHUNK * CHUNKS))
WORKER = 1


def yaml(directory, name, **document):
    path = directory / f"{name}.yaml"
    settings = {"chunk_size": CHUNK, "save_unfull_chunk": False, "max_local_cpu_size": 0.1}
    path.write_text(json.dumps(settings | document))
    return path


def engine(directory, name, **document):
    return CpuEngine(
        f"{name}-{directory.name}", yaml(directory, name, **document), model=MODEL, world_size=2, worker_id=WORKER
    )


@pytest.fixture(scope="module")
def produced(tmp_path_factory):
    """Chunks that an engine has written, and their KV."""
    directory = tmp_path_factory.mktemp("produced")
    extra = {"save_chunk_meta": False, "remote_storage_plugin.fs.warm.base_path": str(directory / "files")}
    producer = engine(directory, "producer", remote_storage_plugins=["fs.warm"], extra_config=extra, local_cpu=False)
    kv = producer.random_kv(len(TOKENS), seed=3)
    producer.store(TOKENS, kv)
    producer.wait_written(TOKENS)
    producer.close()
    return directory / "files", kv


def declared(directory, **settings):
    where = "remote_storage_plugin.fs.warm."
    extra = {"save_chunk_meta": False, f"{where}base_path": str(directory)}
    extra |= {(name if name == "save_chunk_meta" else where + name): value for name, value in settings.items()}
    return declared_tier(EngineConfig("staging", ("fs.warm",), extra), "fs.warm")


HEADERS = {"save_chunk_meta": True, "kv_shape": f"4,2,{CHUNK},1,128"}


@pytest.fixture
def staged(produced, hub, bucket, tmp_path):
    """Staging directories that the warmer fills from a bucket."""

    def fill(**settings):
        warehouse = Warehouse(hub.endpoint, bucket, tmp_path)
        warehouse.put(warehouse.in_tier(produced[0]))
        staging = declared(tmp_path / "staging", **settings)
        warmer = NodeWarmer(warehouse.open(), open_tier(staging))
        warmer.copy(warehouse.plan(f"{MODEL}@2@{WORKER}@"))
        warmer.close()
        return staging

    return fill


@pytest.fixture
def staging(staged):
    return staged()


def files(staging):
    return sorted(staging.base_paths[0].iterdir())


@contextlib.contextmanager
def served(one, port):
    """An engine of this process with LMCache's own internal API."""
    from lmcache.v1.internal_api_server.api_server import InternalAPIServer

    manager = SimpleNamespace(lmcache_engine=one.engine, lmcache_engine_metadata=one.metadata, config=one.config)
    server = InternalAPIServer(manager)
    server.start()
    try:
        yield worker_address("127.0.0.1", port, WORKER)
    finally:
        server.stop()


@contextlib.contextmanager
def consuming(directory, **document):
    """An engine that has its memory and nothing else, and its address."""
    (port,) = free_ports(1)
    api = {"internal_api_server_enabled": True, "internal_api_server_port_start": port - 1 - WORKER}
    one = engine(directory, "consumer", **api, **document)
    with served(one, port - 1 - WORKER) as address:
        yield one, address
    one.close()


RAW = {"save_chunk_meta": False}


@pytest.fixture
def consumer(tmp_path):
    with consuming(tmp_path, extra_config=RAW) as pair:
        yield pair


@pytest.mark.parametrize("headers", [False, True])
def test_an_engine_hits_on_every_loaded_chunk_and_the_kv_is_identical(staged, produced, tmp_path, headers):
    import torch

    staging = staged(**HEADERS) if headers else staged()
    with consuming(tmp_path, extra_config={} if headers else RAW) as (one, address):
        assert one.lookup(TOKENS) == 0

        loaded = load(address, staging, wait_secs=60)

        assert (loaded.chunks, loaded.files, loaded.failed) == (CHUNKS, CHUNKS, ())
        for file in files(staging):
            assert file.suffix == ".data"  # nothing of ours is left
            file.unlink()
        hit, back = one.retrieve(TOKENS)
        assert hit == len(TOKENS)
        assert torch.equal(back, produced[1])


def test_a_file_that_the_engine_does_not_take_is_named(consumer, staging):
    file = files(staging)[0]
    file.write_bytes(b"short")

    loaded = load(consumer[1], staging, wait_secs=60)

    assert (loaded.chunks, loaded.files) == (CHUNKS - 1, CHUNKS)
    assert loaded.failed == (file.stem.replace("-SEP-", "/"),)


@pytest.mark.parametrize(
    ("document", "settings", "words"),
    [
        ({"extra_config": RAW}, HEADERS, "save_chunk_meta is off"),
        ({}, {}, "save_chunk_meta is on"),
        ({"extra_config": RAW, "local_cpu": False}, {}, "local_cpu is off"),
    ],
)
def test_an_engine_that_reads_another_form_or_keeps_nothing_is_refused(tmp_path, document, settings, words):
    with (
        consuming(tmp_path, **document) as (_, address),
        pytest.raises(ConfigError, match=words),
    ):
        load(address, declared(tmp_path, **settings), wait_secs=60)


@pytest.mark.parametrize(
    "key",
    [f"{MODEL}@2@0@1f@bfloat16", f"{MODEL}@4@1@1f@bfloat16", "org/other@2@1@1f@bfloat16", f"{MODEL}@2@1@1f@bfloat16@3"],
)
def test_chunks_of_others_are_not_loaded_into_a_worker(consumer, staging, key):
    (staging.base_paths[0] / f"{key.replace('/', '-SEP-')}.data").write_bytes(b"x")
    with pytest.raises(ConfigError, match="no chunk of worker 1 of 2"):
        load(consumer[1], staging, wait_secs=60)
    assert consumer[0].lookup(TOKENS) == 0


def test_more_than_there_is_room_for_is_not_loaded(consumer, staging):
    os.truncate(files(staging)[0], 100 * 1024 * 1024)
    with pytest.raises(TierFullError, match="max_local_cpu_size"):
        load(consumer[1], staging, wait_secs=60)


def test_a_directory_that_is_none_is_an_error(consumer, tmp_path):
    with pytest.raises(TierError, match="No such file"):
        load(consumer[1], declared(tmp_path / "nowhere"), wait_secs=60)
    for path in ("/mnt/a,/mnt/b", "/mnt/50%"):
        with pytest.raises(ConfigError, match="staging tier"):
            load(consumer[1], declared(path), wait_secs=60)


def test_a_worker_that_is_not_there_is_an_error(tmp_path):
    (port,) = free_ports(1)
    with pytest.raises(EngineError, match="waited in vain"):
        load(f"http://127.0.0.1:{port}", declared(tmp_path), wait_secs=0)
    assert worker_address("node", 6999, 3) == "http://node:7003"


def test_a_standalone_engine_takes_them_too(staging, tmp_path):
    (port,) = free_ports(1)
    config = yaml(
        tmp_path,
        "standalone",
        internal_api_server_enabled=True,
        internal_api_server_port_start=port - 1 - WORKER,
        extra_config=RAW,
    )
    command = [
        sys.executable, "-m", "lmcache.v1.standalone", "--config", str(config), "--model-name", MODEL,
        "--world-size", "2", "--worker-id", str(WORKER), "--kv-dtype", "bfloat16", "--kv-shape", f"4,2,{CHUNK},1,128",
        "--kvcache-shape-spec", "(2,4,64,1,128):bfloat16:4",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            loaded = load(f"http://127.0.0.1:{port}", staging, wait_secs=120)
        finally:
            process.kill()
    assert (loaded.chunks, loaded.failed) == (CHUNKS, ()), (tmp_path / "log").read_text()[-3000:]
