import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketBatchError, EntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.hubs import EMPTY, add_file, upload_by_hand


def read(api: HfApi, bucket: str, tmp_path: Path, *paths: str) -> dict[str, bytes]:
    target = tmp_path / "read"
    api.download_bucket_files(bucket, [(path, target / str(at)) for at, path in enumerate(paths)])
    return {path: (target / str(at)).read_bytes() for at, path in enumerate(paths)}


def test_bytes_and_files_go_up_and_come_back(api, bucket, tmp_path):
    contents = {"noise": os.urandom(3_000_000), "text": b"again and again " * 50_000, "one": b"1", "none": b""}
    source = tmp_path / "source"
    source.write_bytes(contents["noise"])
    before = datetime.now(UTC)
    added = [(contents[name], name) for name in ("text", "one", "none")]
    api.batch_bucket_files(bucket, add=[(source, "noise"), *added])
    assert read(api, bucket, tmp_path, *contents) == contents
    info = api.bucket_info(bucket)
    assert (info.total_files, info.size) == (4, sum(len(content) for content in contents.values()))
    files = {file.path: file for file in api.list_bucket_tree(bucket, recursive=True)}
    for name, content in contents.items():
        assert files[name].size == len(content)
        assert files[name].uploaded_at.microsecond % 1000 == 0
        assert files[name].uploaded_at.timestamp() >= int(before.timestamp() * 1000) / 1000
    assert files["noise"].mtime.timestamp() == pytest.approx(source.stat().st_mtime, abs=0.002)


def test_the_empty_file_has_the_hash_of_zeros(api, bucket, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    api.batch_bucket_files(bucket, add=[(b"", "bytes"), (empty, "file")])
    assert {(file.size, file.xet_hash) for file in api.list_bucket_tree(bucket)} == {(0, EMPTY)}
    assert read(api, bucket, tmp_path, "bytes", "file") == {"bytes": b"", "file": b""}
    assert api.get_bucket_file_metadata(bucket, "bytes").size == 0


def test_overwriting_and_deleting_update_the_totals(api, bucket):
    api.batch_bucket_files(bucket, add=[(b"12345", "a"), (b"123", "b")])
    api.batch_bucket_files(bucket, add=[(b"1234567", "a")], delete=["b", "was never there"])
    assert (api.bucket_info(bucket).total_files, api.bucket_info(bucket).size) == (1, 7)
    api.batch_bucket_files(bucket, delete=["a"])
    assert (api.bucket_info(bucket).total_files, api.bucket_info(bucket).size) == (0, 0)


def test_paths_info_omits_missing_paths_and_keeps_no_order(api, raw, bucket):
    paths = [f"{number:04}" for number in range(1500)]
    added = raw.batch(bucket, *map(add_file, paths)).json
    assert added == {"success": True, "processed": 1500, "succeeded": 1500, "failed": []}
    found = [file.path for file in api.get_bucket_paths_info(bucket, [*paths, "missing", "00", "0000"])]
    assert found[:500] != paths[:500]
    assert sorted(set(found)) == paths
    answer = raw.call("POST", f"/api/buckets/{bucket}/paths-info", {"paths": ["0001", "0001", "x"]})
    assert [entry["path"] for entry in answer.json] == ["0001"]


def test_copies_move_no_bytes(hub, api, new_bucket, tmp_path):
    source, target = new_bucket(), new_bucket()
    content = os.urandom(200_000)
    api.batch_bucket_files(source, add=[(content, "from")])
    digest = next(iter(api.get_bucket_paths_info(source, ["from"]))).xet_hash
    hub.control.reset_counters()
    api.batch_bucket_files(target, copy=[("bucket", source, digest, "to")])
    assert set(hub.control.counters().routes) == {"batch"}
    api.delete_bucket(source)
    assert read(api, target, tmp_path, "to") == {"to": content}


def test_impossible_copies_fail(api, new_bucket):
    source, target, abroad = new_bucket(), new_bucket(), new_bucket(region="eu")
    api.batch_bucket_files(source, add=[(b"content", "from")])
    digest = next(iter(api.get_bucket_paths_info(source, ["from"]))).xet_hash
    api.batch_bucket_files(abroad, add=[(b"content", "from")])
    copies = [
        ("bucket", source, digest, "fine"),
        ("bucket", source, "0" * 63 + "1", "unknown hash"),
        ("bucket", "no/bucket", digest, "unknown bucket"),
        ("bucket", abroad, digest, "other region"),
        ("model", "some/model", digest, "no bucket"),
        ("bucket", target, digest, "not in there yet"),
    ]
    with pytest.raises(BucketBatchError) as failed:
        api.batch_bucket_files(target, copy=copies[1:2] + copies[2:5])
    assert failed.value.response.status_code == 422
    with pytest.raises(BucketBatchError) as failed:
        api.batch_bucket_files(target, copy=[copies[5], *copies[:5]])
    assert failed.value.response.status_code == 200
    reasons = {failure["path"]: failure["error"] for failure in failed.value.failures}
    expected = {
        "unknown hash": "not in",
        "unknown bucket": "Bucket not found",
        "other region": "region eu",
        "no bucket": "buckets only",
        "not in there yet": "",
    }
    assert {path for path, reason in reasons.items() if expected[path] in reason} == set(reasons) == set(expected)
    assert [file.path for file in api.list_bucket_tree(target)] == ["fine"]


@pytest.mark.parametrize("digest", ["f" * 64, "short"])
def test_adding_what_was_never_uploaded_fails(raw, bucket, digest):
    answer = raw.batch(bucket, add_file("x", digest), add_file("y"))
    (failure,) = answer.json.pop("failed")
    assert (answer.status, failure["path"]) == (200, "x")
    assert answer.json == {"success": False, "processed": 2, "succeeded": 1, "failed": [failure]}


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
def test_sync_both_ways(api, bucket, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    contents = {"a.txt": b"a", "deep/b.bin": os.urandom(100_000), "empty": b""}
    for name, content in contents.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    api.sync_bucket(str(source), f"hf://buckets/{bucket}/kept", quiet=True)
    api.sync_bucket(f"hf://buckets/{bucket}/kept", str(target), quiet=True)
    assert {
        str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()
    } == contents
    (source / "a.txt").unlink()
    plan = api.sync_bucket(str(source), f"hf://buckets/{bucket}/kept", delete=True, quiet=True)
    assert plan.summary()["deletes"] == 1
    assert plan.summary()["uploads"] == 0


def test_responses_of_resolve(hub, api, raw, bucket):
    api.batch_bucket_files(bucket, add=[(b"0123456789", "some dir/näme")])
    answer = raw.call("HEAD", f"/buckets/{bucket}/resolve/some%20dir%2Fn%C3%A4me")
    assert answer.status == 302
    assert answer.headers["X-Linked-Size"] == "10"
    assert answer.headers["X-Xet-Refresh-Route"] == f"{hub.endpoint}/api/buckets/{bucket}/xet-read-token"
    location = answer.headers["Location"]
    assert location.startswith(f"http://localhost:{hub.port}/")
    path = location.removeprefix(f"http://localhost:{hub.port}")
    assert raw.call("GET", path).body == b"0123456789"
    partial = raw.call("GET", path, headers={"Range": "bytes=3-5"})
    assert (partial.status, partial.headers["Content-Range"], partial.body) == (206, "bytes 3-5/10", b"345")
    assert raw.call("GET", path, headers={"Range": "bytes=10-"}).status == 416
    assert raw.call("GET", path[:-1] + ("A" if path[-1] != "A" else "B")).status == 403
    missing = raw.call("HEAD", f"/buckets/{bucket}/resolve/missing")
    assert (missing.status, missing.headers["X-Error-Code"]) == (404, "EntryNotFound")
    odd = raw.call("HEAD", f"/buckets/{bucket}/resolve/a%0D%0Ab%00%C3%A9")
    assert (odd.status, odd.headers["X-Error-Message"]) == (404, "Entry not found: a??b??")
    with pytest.raises(EntryNotFoundError):
        api.get_bucket_file_metadata(bucket, "missing")


def test_a_long_file_unpacks_over_http(hub, api, raw, bucket):
    content = os.urandom(1_000_000) + b"pattern!" * 300_000 + os.urandom(1_000_000)
    api.batch_bucket_files(bucket, add=[(content, "long")])
    location = raw.call("HEAD", f"/buckets/{bucket}/resolve/long").headers["Location"]
    path = location.partition(f":{hub.port}")[2]
    assert raw.call("GET", path).body == content
    for start, stop in [(0, 1), (999_999, 1_000_001), (1_234_567, 3_456_789), (len(content) - 1, len(content))]:
        assert raw.call("GET", path, headers={"Range": f"bytes={start}-{stop - 1}"}).body == content[start:stop]
    assert raw.call("GET", path, headers={"Range": "bytes=-5"}).body == content[-5:]


names = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=8).filter(
        lambda name: name not in {".", ".."}
    ),
    min_size=1,
    max_size=3,
).map("/".join)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(names, min_size=1, max_size=4, unique=True))
def test_names_of_every_kind(api, raw, bucket, paths):
    assert raw.batch(bucket, *map(add_file, paths)).json["failed"] == []
    assert {file.path for file in api.list_bucket_tree(bucket, recursive=True)} == set(paths)
    assert {file.path for file in api.get_bucket_paths_info(bucket, paths)} == set(paths)
    for path in paths:
        assert api.get_bucket_file_metadata(bucket, path).size == 0
        assert path in {file.path for file in api.list_bucket_tree(bucket, path, recursive=True)}
    api.batch_bucket_files(bucket, delete=paths)
    assert list(api.list_bucket_tree(bucket)) == []


@pytest.mark.parametrize(
    "name", ["a b", "100%", "a+b", "ü/é", "q?x=1&y#z", "m@1@0@ab@half", "%2F", "\\", "tab\t", "日本/語"]
)
def test_files_of_odd_names_go_up_and_come_back(api, bucket, tmp_path, name):
    api.batch_bucket_files(bucket, add=[(name.encode(), name)])
    assert read(api, bucket, tmp_path, name) == {name: name.encode()}


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_every_compression_comes_back(api, raw, bucket, tmp_path, scheme):
    chunks = [bytes([scheme, one]) * 5_000 + b"odd"[: one % 4] for one in range(9)]
    assert raw.batch(bucket, add_file("x", upload_by_hand(raw, bucket, chunks, scheme))).json["success"]
    assert read(api, bucket, tmp_path, "x") == {"x": b"".join(chunks)}
