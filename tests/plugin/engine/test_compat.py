"""What LMCache's built-in backend wrote ours reads, and the reverse: both run here, over one Hub."""

import pytest
import yaml
from huggingface_hub import HfApi
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.hfbucket_l2_adapter import _object_key_to_bucket_path, _object_key_to_string
from lmcache.v1.storage_backend.connector.hfbucket_connector import (
    HFBucketClient,
    parse_hfbucket_handle,
)
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketConnector as BuiltIn

from hfbucket_plugin.core.keys import BucketHandle, MPKey, decode_name, encode_name, parse_key
from hfbucket_plugin.engine.classic import HFBucketConnector
from tests.support.buckets import download, upload
from tests.support.buckets import paths as all_paths
from tests.support.indexes import build
from tests.support.lmcache_classic import OURS, Rig, engine_config, key, running_loop, taken
from tests.support.waiting import eventually

KEYS = [
    key(1),
    key(-0x520F),
    key(2**255 + 7),
    key(3, model="a model/with spaces/ü 模型%2F"),
    key(4, user="50%=x y%", team="ü/模"),
]


@pytest.fixture(scope="module")
def loop():
    with running_loop() as one:
        yield one


INDEXED = {"index": "snapshot", "index_miss": "ask", "index_refresh_secs": 3600, "index_journal_secs": 3600}
"""`ask`, since the built-in tells nobody of what it writes before it is listed."""


with_and_without_an_index = pytest.mark.parametrize("own", [{}, INDEXED], ids=["no index", "index"], indirect=True)


@pytest.fixture
def own(request):
    """More settings of ours."""
    return getattr(request, "param", {})


@pytest.fixture
def place(hub, bucket):
    return hub, bucket


@pytest.fixture
def both(place, own, loop, tmp_path, monkeypatch):
    """Ours and the built-in, on one prefix of one bucket. Each is in an engine of its own."""
    hub, bucket = place
    if own:
        build(hub.endpoint, bucket, "v1/ü")
    # The built-in knows no other Hub than the one of HF_ENDPOINT, which is read when a process starts.
    monkeypatch.setattr(
        HFBucketClient, "__init__", lambda self, token: setattr(self, "_api", HfApi(endpoint=hub.endpoint, token=False))
    )
    made = []
    for more in (OURS | {"endpoint": hub.endpoint} | own, {}):
        values = {
            "bucket_handle": f"hf://buckets/{bucket}/v1/ü",
            "metadata_cache_ttl_secs": 0,
            "download_tmp_dir": str(tmp_path / "tmp"),
        } | more
        document = {
            "local_cpu": False,
            "max_local_cpu_size": 0.05,
            "save_unfull_chunk": False,
            "remote_storage_plugins": ["hfbucket"],
            "extra_config": {f"remote_storage_plugin.hfbucket.{name}": value for name, value in values.items()},
        }
        config = engine_config(tmp_path / f"lmcache-{len(made)}.yaml", yaml.safe_dump(document))
        made.append(Rig(config, "hfbucket", loop))
    assert [type(rig.remote.connection._connector) for rig in made] == [HFBucketConnector, BuiltIn]
    if own:
        index = made[0].connector._store.index
        eventually(lambda: index.status()["state"] == "usable")
    yield made
    for rig in made:
        rig.close()


@pytest.fixture(params=["built-in writes", "ours writes"])
def writer_and_reader(request, both):
    ours, theirs = both
    return (theirs, ours) if request.param == "built-in writes" else (ours, theirs)


def chunk_of(rig, content):
    """Memory with a content that both engines agree on."""
    memory_obj = rig.memory.allocate(
        rig.metadata.get_shapes(), rig.metadata.get_dtypes(), rig.remote.connection._connector.meta_fmt
    )
    memory_obj.byte_array.cast("B")[:] = content
    return memory_obj


def paths(endpoint, bucket):
    return [path for path in all_paths(endpoint, bucket) if "/.hfbucket/" not in path]


def content(number):
    return bytes((number + at) % 251 for at in range(16384))


@with_and_without_an_index
def test_one_reads_what_the_other_wrote(hub, bucket, writer_and_reader):
    writer, reader = writer_and_reader
    writer.run(writer.connection.batched_put(KEYS, [chunk_of(writer, content(number)) for number in range(len(KEYS))]))

    assert reader.connection.batched_contains(KEYS) == len(KEYS)
    assert reader.remote.contains(KEYS[3])
    assert taken(reader.remote.batched_get_blocking([*KEYS, key(99)])) == [
        *(content(number) for number in range(len(KEYS))),
        None,
    ]
    names = sorted(one.to_string() for one in KEYS)
    assert sorted(reader.run(reader.connection.list())) == names
    assert sorted(writer.run(writer.connection.list())) == names
    assert paths(hub.endpoint, bucket) == sorted(f"v1/ü/{encode_name(name)}" for name in names)
    assert download(hub.endpoint, bucket, f"v1/ü/{encode_name(KEYS[0].to_string())}") == content(0)


def test_one_deletes_what_the_other_wrote(hub, bucket, writer_and_reader):
    writer, reader = writer_and_reader
    writer.run(writer.connection.put(KEYS[0], chunk_of(writer, content(0))))

    assert reader.remote.remove(KEYS[0])

    assert paths(hub.endpoint, bucket) == []
    assert not writer.remote.contains(KEYS[0])


@with_and_without_an_index
def test_one_writes_over_what_the_other_wrote_only_at_another_size(hub, bucket, both):
    ours, theirs = both
    path = f"v1/ü/{encode_name(KEYS[0].to_string())}"
    theirs.run(theirs.connection.put(KEYS[0], chunk_of(theirs, content(0))))
    ours.run(ours.connection.put(KEYS[0], chunk_of(ours, content(1))))
    assert download(hub.endpoint, bucket, path) == content(0)

    upload(hub.endpoint, bucket, {path: b"of another layout"})
    ours.run(ours.connection.put(KEYS[0], chunk_of(ours, content(1))))
    assert taken([theirs.remote.get_blocking(KEYS[0])]) == [content(1)]


@with_and_without_an_index
def test_the_built_in_passes_our_own_records_by(hub, bucket, both):
    ours, theirs = both
    ours.run(ours.connection.put(KEYS[0], chunk_of(ours, content(0))))
    upload(hub.endpoint, bucket, {"v1/ü/.hfbucket/lock": b"ours", f"v1/ü/.hfbucket/{encode_name('a@b')}": b"ours"})

    assert theirs.run(theirs.connection.list()) == ours.run(ours.connection.list()) == [KEYS[0].to_string()]


@pytest.mark.parametrize("own", [INDEXED], indirect=True)
def test_what_the_built_in_wrote_is_in_the_next_snapshot_and_what_ours_wrote_in_its_journal(hub, bucket, both):
    ours, theirs = both
    index = ours.connector._store.index
    theirs.run(theirs.connection.put(KEYS[0], chunk_of(theirs, content(0))))
    ours.run(ours.connection.put(KEYS[1], chunk_of(ours, content(1))))
    assert index.flush()

    build(hub.endpoint, bucket, "v1/ü")
    index.refresh()
    hub.control.reset_counters()

    assert ours.connection.batched_contains(KEYS[:2]) == 2
    assert hub.control.counters().route("paths-info").requests == 0
    assert taken(theirs.remote.batched_get_blocking(KEYS[:2])) == [content(0), content(1)]
    assert sorted(theirs.run(theirs.connection.list())) == sorted(one.to_string() for one in KEYS[:2])
    assert any("/.hfbucket/index/journal/" in path for path in all_paths(hub.endpoint, bucket))


@pytest.mark.parametrize("prefix", ["", "/prod", "/a/b ü"])
def test_names_of_mp_mode_are_those_of_the_built_in_adapter(prefix):
    for mp_key in (
        ObjectKey(b"\x00\xab", "org/model", 0x01000000),
        ObjectKey(b"\xff" * 32, "ü 模型/x y", 8 << 24 | 3 << 16, 17, "user%=ü"),
    ):
        text = f"hf://buckets/o/b{prefix}"
        handle = BucketHandle.parse(text)
        path = _object_key_to_bucket_path(mp_key, parse_hfbucket_handle(text))

        assert handle.join(encode_name(_object_key_to_string(mp_key))) == path
        parsed = parse_key(decode_name(handle.relative(path)))
        assert isinstance(parsed, MPKey)
        assert str(parsed) == _object_key_to_string(mp_key)
