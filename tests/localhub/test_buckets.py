import pytest
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import BucketNotFoundError, HfHubHTTPError


def test_a_bucket_is_created_described_changed_and_deleted(hub, api):
    url = api.create_bucket("life/one", private=True, region="eu")
    assert (url.bucket_id, url.url) == ("life/one", f"{hub.endpoint}/buckets/life/one")
    info = api.bucket_info("life/one")
    assert (info.id, info.private, info.size, info.total_files, info.region) == ("life/one", True, 0, 0, "eu")
    assert info.created_at.microsecond % 1000 == 0
    api.update_bucket_settings("life/one", private=False)
    assert not api.bucket_info("life/one").private
    api.delete_bucket("life/one")
    for ask in (api.bucket_info, api.delete_bucket):
        with pytest.raises(BucketNotFoundError):
            ask("life/one")
    api.delete_bucket("life/one", missing_ok=True)


def test_creating_a_bucket_twice(api, bucket):
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_bucket(bucket)
    assert refused.value.response.status_code == 409
    assert api.create_bucket(bucket, exist_ok=True).bucket_id == bucket


def test_a_bucket_created_after_its_deletion_is_empty(api, bucket):
    api.batch_bucket_files(bucket, add=[(b"old", "old")])
    api.delete_bucket(bucket)
    api.create_bucket(bucket)
    assert list(api.list_bucket_tree(bucket, recursive=True)) == []
    assert api.bucket_info(bucket).size == 0


def test_a_name_without_namespace_is_the_callers_own(api):
    assert api.create_bucket("of-mine").bucket_id == "local/of-mine"
    assert "local/of-mine" in [bucket.id for bucket in api.list_buckets()]


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


def test_the_file_system_over_a_bucket(hub, api, bucket):
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
