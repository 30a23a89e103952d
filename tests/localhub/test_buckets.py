import pytest
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import BucketNotFoundError, HfHubHTTPError

from tests.support.rawhub import Raw


def test_a_bucket_is_made_told_of_changed_and_deleted(hub):
    api = HfApi(endpoint=hub.endpoint, token=False)
    url = api.create_bucket("life/one", private=True, region="eu")
    assert (url.bucket_id, url.url) == ("life/one", f"{hub.endpoint}/buckets/life/one")
    info = api.bucket_info("life/one")
    assert (info.id, info.private, info.size, info.total_files, info.region) == ("life/one", True, 0, 0, "eu")
    assert info.created_at.microsecond % 1000 == 0
    api.update_bucket_settings("life/one", private=False)
    assert not api.bucket_info("life/one").private
    api.delete_bucket("life/one")
    with pytest.raises(BucketNotFoundError):
        api.bucket_info("life/one")
    with pytest.raises(BucketNotFoundError):
        api.delete_bucket("life/one")
    api.delete_bucket("life/one", missing_ok=True)


def test_making_a_bucket_twice(hub, bucket):
    api = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_bucket(bucket)
    assert refused.value.response.status_code == 409
    assert api.create_bucket(bucket, exist_ok=True).bucket_id == bucket


def test_a_bucket_made_again_after_its_deletion_is_empty(hub, bucket):
    api = HfApi(endpoint=hub.endpoint, token=False)
    api.batch_bucket_files(bucket, add=[(b"old", "old")])
    api.delete_bucket(bucket)
    api.create_bucket(bucket)
    assert list(api.list_bucket_tree(bucket, recursive=True)) == []
    assert api.bucket_info(bucket).size == 0


def test_a_name_without_namespace_is_ones_own(hub):
    api = HfApi(endpoint=hub.endpoint, token=False)
    assert api.create_bucket("of-mine").bucket_id == "local/of-mine"
    assert "local/of-mine" in [bucket.id for bucket in api.list_buckets()]


@pytest.mark.parametrize("name", ["-x", "x-", "a..b", "a b", "a" * 97, "ü"])
def test_names_that_cannot_be(hub, name):
    from urllib.parse import quote

    answer = Raw(hub.endpoint).call("POST", f"/api/buckets/names/{quote(name)}", {})
    assert answer.status == 400
    assert "invalid bucket name" in answer.error


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "Invalid JSON"),
        (b"[]", "object"),
        (b'{"region": "moon"}', "unknown region 'moon'"),
        (b'{"visibility": "hidden"}', "visibility"),
    ],
)
def test_orders_that_cannot_be(hub, body, complaint):
    answer = Raw(hub.endpoint).call("POST", "/api/buckets/orders/one", body)
    assert answer.status == 400
    assert complaint in answer.error


def test_buckets_are_listed_by_pages_and_searched(hub_factory):
    api = HfApi(endpoint=hub_factory(page_size=3).endpoint, token=False)
    for number in range(8):
        api.create_bucket(f"many/bucket-{number}")
    api.create_bucket("other/bucket-9")
    assert [bucket.id for bucket in api.list_buckets("many")] == [f"many/bucket-{number}" for number in range(8)]
    assert [bucket.id for bucket in api.list_buckets("many", search="KET-5")] == ["many/bucket-5"]
    assert list(api.list_buckets()) == []
    with pytest.raises(HfHubHTTPError) as refused:
        list(api.list_buckets("nobody"))
    assert refused.value.response.status_code == 404


def test_what_clients_probe_for_is_a_quick_404(hub):
    raw = Raw(hub.endpoint)
    for method, path in [
        ("GET", "/api/agent-harnesses"),
        ("POST", "/api/telemetry/x"),
        ("POST", "/v2/shards"),
        ("GET", "/"),
    ]:
        answer = raw.call(method, path)
        assert answer.status == 404
        assert path in answer.error
    assert hub.control.counters().route("unknown").requests == 4


def test_the_file_system_over_a_bucket(hub, bucket):
    api = HfApi(endpoint=hub.endpoint, token=False)
    api.batch_bucket_files(bucket, add=[(b"0123456789", "logs/a"), (b"b", "logs/deep/b"), (b"c", "logs.json")])
    files = HfFileSystem(endpoint=hub.endpoint, token=False, skip_instance_cache=True)
    root = f"buckets/{bucket}"
    assert sorted(entry["name"] for entry in files.ls(f"{root}/logs")) == [f"{root}/logs/a", f"{root}/logs/deep"]
    assert sorted(files.find(root)) == [f"{root}/logs.json", f"{root}/logs/a", f"{root}/logs/deep/b"]
    assert files.exists(f"{root}/logs/a")
    assert not files.exists(f"{root}/log")
    assert files.cat_file(f"{root}/logs/a", 2, 5) == b"234"
    files.rm(f"{root}/logs/a")
    assert not files.exists(f"{root}/logs/a")
