import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import hf_xet
import pytest
from huggingface_hub import HfApi

from localhub.faults import Fault
from localhub.formats.hashing import to_hex
from tests.support.hubs import add_file, make_shard, make_xorb, upload_by_hand

MIB = 1024 * 1024


def stream_group(endpoint: str, bucket: str, **settings: object):
    url = f"{endpoint}/api/buckets/{bucket}/xet-read-token"
    config = hf_xet.XetConfig().with_config({f"client.{name}": value for name, value in settings.items()})
    return hf_xet.XetSession(config=config).new_download_stream_group(token_refresh_url=url, token_refresh_headers={})


def stored(api: HfApi, bucket: str, content: bytes) -> hf_xet.XetFileInfo:
    """Upload a file and return what hf_xet needs to read it."""
    api.batch_bucket_files(bucket, add=[(content, "x")])
    (file,) = api.get_bucket_paths_info(bucket, ["x"])
    return hf_xet.XetFileInfo(file.xet_hash, file.size)


@pytest.mark.parametrize("version", [1, 2])
def test_streams_of_ranges_fetch_little_more_than_they_need(hub, api, bucket, version):
    content = os.urandom(20 * MIB)
    info = stored(api, bucket, content)
    group = stream_group(hub.endpoint, bucket, reconstruction_api_version=version)
    end = len(content)
    for start, stop in [(0, 1), (5 * MIB, 5 * MIB + 100_000), (end - 10, end), (MIB - 1, 3 * MIB + 1)]:
        hub.control.reset_counters()
        assert b"".join(group.download_stream(info, start, stop)) == content[start:stop]
        # Chunks are at most 128 KiB, so the two ends cost less than two of them.
        assert hub.control.counters().route("xorb-data").bytes_out < stop - start + 300_000
    assert b"".join(group.download_stream(info)) == content
    assert hub.control.counters().route("unknown").requests == 0


def test_hf_xet_recovers_from_faults_except_wrong_bytes(hub, api, bucket):
    content = os.urandom(MIB)
    info = stored(api, bucket, content)
    group = stream_group(hub.endpoint, bucket, retry_base_delay=timedelta(milliseconds=1))
    for fault in (
        Fault(route="xorb-data", truncate_at=1000, times=1),
        Fault(route="xorb-data", reset=True, times=1),
        Fault(route="xorb-data", status=503, times=1),
        Fault(route="xorb-data", trickle_bytes=100_000, trickle_interval_s=0.001, times=1),
        Fault(route="reconstruction", status=500, times=1),
    ):
        number = hub.control.add_fault(fault)
        assert b"".join(group.download_stream(info)) == content
        assert hub.control.hits(number) == 1
    # Chunks of a xorb are at least 8 KiB long: offset 2000 is always content, never a header, which the decoder would refuse.
    hub.control.add_fault(Fault(route="xorb-data", flip_at=(2000,)))
    received = b"".join(group.download_stream(info))
    assert (len(received), received != content) == (len(content), True)


def test_many_streams_at_once(hub, api, bucket):
    contents = {f"file-{number}": os.urandom(300_000 + number) for number in range(24)}
    api.batch_bucket_files(bucket, add=[(content, name) for name, content in contents.items()])
    files = {file.path: file for file in api.list_bucket_tree(bucket, recursive=True)}
    group = stream_group(hub.endpoint, bucket)

    def fetch(name: str) -> bool:
        info = hf_xet.XetFileInfo(files[name].xet_hash, files[name].size)
        return b"".join(group.download_stream(info)) == contents[name]

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(fetch, contents))


def test_the_same_content_from_many_threads_and_processes(hub, api, bucket, tmp_path):
    path = tmp_path / "content"
    path.write_bytes(os.urandom(2 * MIB))
    script = (
        "import sys; from huggingface_hub import HfApi; "
        "HfApi(endpoint=sys.argv[1], token=False)"
        ".batch_bucket_files(sys.argv[2], add=[(sys.argv[3], sys.argv[4]), (sys.argv[3], 'shared')])"
    )
    command = [sys.executable, "-c", script, hub.endpoint, bucket, str(path)]
    processes = [
        subprocess.Popen([*command, f"process-{number}"], env=os.environ | {"HF_HOME": str(tmp_path / str(number))})
        for number in range(3)
    ]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: api.batch_bucket_files(bucket, add=[(path, f"thread-{at}")]), range(16)))
    assert [process.wait() for process in processes] == [0, 0, 0]
    files = list(api.list_bucket_tree(bucket, recursive=True))
    assert len(files) == 16 + 3 + 1
    assert len({file.xet_hash for file in files}) == 1
    assert (api.bucket_info(bucket).total_files, api.bucket_info(bucket).size) == (20, 20 * 2 * MIB)


@pytest.fixture
def write(raw, bucket):
    return raw.storage_token(bucket)


def test_a_xorb_goes_in_once(raw, write):
    body, digest = make_xorb([os.urandom(1000)])
    for inserted in (True, False):
        answer = raw.post_xorb(digest, body, write)
        assert (answer.status, answer.json) == (200, {"was_inserted": inserted})


def test_a_xorb_must_be_the_one_that_its_hash_names(raw, write):
    chunks = [os.urandom(1000), os.urandom(1000)]
    body, digest = make_xorb(chunks)
    for wrong in (make_xorb(chunks[::-1])[0], body[:-1] + bytes([body[-1] ^ 1]), body[:1008]):
        answer = raw.post_xorb(digest, wrong, write)
        assert (answer.status, "the content hashes to" in answer.error) == (400, True)
    assert raw.post_xorb(digest, body[:-1], write).status == 400
    assert raw.call("POST", "/v1/xorbs/default/xyz", body, write).status == 400
    shard, _ = make_shard(digest, chunks)
    assert raw.call("POST", "/v1/shards", shard, write).status == 400
    assert raw.post_xorb(digest, body, write).json == {"was_inserted": True}
    assert raw.call("POST", "/v1/shards", shard, write).json == {"result": 1}


def test_a_shard_that_contradicts_its_xorb_leaves_nothing_behind(raw, write, bucket):
    chunks = [os.urandom(1000), os.urandom(1000)]
    body, xorb = make_xorb(chunks)
    assert raw.post_xorb(xorb, body, write).status == 200
    shard, digest = make_shard(xorb, chunks, terms=[(1999, 0, 2)])
    answer = raw.call("POST", "/v1/shards", shard, write)
    assert (answer.status, "has 1999 bytes" in answer.error) == (400, True)
    assert raw.batch(bucket, add_file("x", to_hex(digest))).status == 422
    assert raw.reconstruct(to_hex(digest), write).status == 404


@pytest.mark.parametrize(
    ("wanted", "chunks"),
    [
        (None, (0, 0, 3)),
        ("bytes=0-299", (0, 0, 3)),
        ("bytes=99-99", (99, 0, 1)),
        ("bytes=100-199", (0, 1, 2)),
        ("bytes=150-200", (50, 1, 3)),
        ("bytes=250-", (50, 2, 3)),
        ("bytes=250-9999999", (50, 2, 3)),
        ("bytes=-1", (99, 2, 3)),
        ("lines=1-2", (0, 0, 3)),
    ],
)
def test_ranges_of_a_reconstruction(raw, bucket, wanted, chunks):
    digest = upload_by_hand(raw, bucket, [b"a" * 100, b"b" * 100, b"c" * 100])
    read = raw.storage_token(bucket, "read")
    answer = raw.reconstruct(digest, read | ({"Range": wanted} if wanted else {})).json
    (term,) = answer["terms"]
    assert (answer["offset_into_first_range"], *term["range"].values()) == chunks
    assert raw.reconstruct(digest, {**read, "Range": "bytes=300-"}).status == 416
    assert raw.reconstruct("0" * 63 + "1", read).status == 404


def test_xorb_bytes_by_range(raw, bucket):
    chunks = [os.urandom(100_000) for _ in range(20)]
    path = raw.xorb_link(bucket, upload_by_hand(raw, bucket, chunks))
    body, _ = make_xorb(chunks)
    for wanted, status, start, stop in [
        (None, 200, 0, len(body)),
        ("bytes=5-1500000", 206, 5, 1_500_001),
        (f"bytes=0-{len(body) - 1}", 206, 0, len(body)),
    ]:
        answer = raw.call("GET", path, headers={"Range": wanted} if wanted else {})
        assert (answer.status, answer.body) == (status, body[start:stop])
        assert answer.headers["Content-Range"] == (wanted and f"bytes {start}-{stop - 1}/{len(body)}")
    assert raw.call("HEAD", path).headers["Content-Length"] == str(len(body))
    assert raw.call("GET", path, headers={"Range": f"bytes={len(body)}-"}).status == 416
    assert raw.call("GET", path.replace("expires=1", "expires=2")).status == 403
    assert raw.call("GET", path.partition("?")[0]).status == 403


def test_a_hub_that_lost_its_data_refuses_shards_of_missing_xorbs(hub_factory, tmp_path):
    first = hub_factory(tmp_path / "root")
    endpoint, content = first.endpoint, os.urandom(500_000)
    api = HfApi(endpoint=endpoint, token=False)
    api.create_bucket("lost/one")
    api.batch_bucket_files("lost/one", add=[(content, "x")])
    first.stop()
    for path in sorted((tmp_path / "root").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    first.restart()
    assert first.endpoint == endpoint
    api.create_bucket("lost/one")
    # hf_xet remembers that this endpoint has the xorb and sends the shard alone.
    with pytest.raises(Exception, match="400"):
        api.batch_bucket_files("lost/one", add=[(content, "x")])
    assert list(api.list_bucket_tree("lost/one")) == []
