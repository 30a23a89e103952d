import pytest
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from localhub.state.listing import after_prefix, encode_cursor
from tests.support.hubs import Raw, add_file

PATHS = ["a", "dir/1", "dir/2", "dir/sub/3", "dir/sub/4", "dir-x/5", "dir.txt", "v1/6", "v10/7", "v1", "z"]


def fill(endpoint: str, bucket: str, paths: list[str]) -> HfApi:
    api = HfApi(endpoint=endpoint, token=False)
    api.create_bucket(bucket, exist_ok=True)
    assert Raw(endpoint).batch(bucket, *map(add_file, paths)).status == 200
    return api


def listed(api: HfApi, bucket: str, prefix: str | None = None, *, recursive: bool | None = None) -> list[str]:
    entries = api.list_bucket_tree(bucket, prefix, recursive=recursive)
    return [entry.path + ("/" if entry.type == "directory" else "") for entry in entries]


@pytest.fixture(scope="module")
def small_pages(tmp_path_factory):
    from tests.support.hubs import start_on_fresh_port

    with start_on_fresh_port(tmp_path_factory.mktemp("small-pages"), page_size=2) as running:
        fill(running.endpoint, "list/all", PATHS)
        yield running


@pytest.mark.parametrize(
    ("prefix", "recursive", "expected"),
    [
        (None, True, sorted(PATHS)),
        (None, None, sorted(PATHS)),
        ("dir", True, ["dir-x/5", "dir.txt", "dir/1", "dir/2", "dir/sub/3", "dir/sub/4"]),
        ("dir/", True, ["dir/1", "dir/2", "dir/sub/3", "dir/sub/4"]),
        ("v1", True, ["v1", "v1/6", "v10/7"]),
        ("nothing", True, []),
        (None, False, ["a", "dir-x/", "dir.txt", "dir/", "v1", "v1/", "v10/", "z"]),
        ("dir", False, ["dir-x/", "dir.txt", "dir/1", "dir/2", "dir/sub/"]),
        ("dir/", False, ["dir/1", "dir/2", "dir/sub/"]),
        ("dir/sub/", False, ["dir/sub/3", "dir/sub/4"]),
    ],
)
def test_listings_over_several_pages(small_pages, prefix, recursive, expected):
    api = HfApi(endpoint=small_pages.endpoint, token=False)
    assert listed(api, "list/all", prefix, recursive=recursive) == expected


def test_a_page_is_no_longer_than_it_should_be(small_pages):
    answer = Raw(small_pages.endpoint).call("GET", "/api/buckets/list/all/tree?recursive=true")
    assert [entry["path"] for entry in answer.json] == ["a", "dir-x/5"]
    assert 'rel="next"' in answer.headers["Link"]


def test_directories_have_the_time_of_their_newest_file(small_pages):
    api = HfApi(endpoint=small_pages.endpoint, token=False)
    files = {entry.path: entry for entry in api.list_bucket_tree("list/all", recursive=True)}
    directories = [entry for entry in api.list_bucket_tree("list/all", recursive=False) if entry.type == "directory"]
    assert {entry.uploaded_at for entry in directories} == {files["dir/1"].uploaded_at}


def test_pages_are_consistent_while_files_come_and_go(small_pages):
    api = fill(small_pages.endpoint, "list/moving", ["b", "d", "f", "h"])
    entries = iter(api.list_bucket_tree("list/moving", recursive=True))
    assert [next(entries).path, next(entries).path] == ["b", "d"]
    fill(small_pages.endpoint, "list/moving", ["a", "c", "g"])
    api.batch_bucket_files("list/moving", delete=["d"])
    assert [entry.path for entry in entries] == ["f", "g", "h"]


def test_prefixes_of_every_kind_survive_paging(small_pages):
    paths = [f"ü ?#%+&/{name}" for name in ("ä", "ö", "\n", "€", "\U0010ffff", "=")]
    api = fill(small_pages.endpoint, "list/odd", paths)
    for recursive in (True, False):
        assert sorted(listed(api, "list/odd", "ü ?#%+&/", recursive=recursive)) == sorted(paths)


@pytest.mark.parametrize(
    "query",
    [
        *(f"?cursor={cursor}" for cursor in ("!!", "abc", "/w==", "%ED%A0%80", "%ff", "%F4%8F%BF%BF" * 300, "7aCA")),
        # Those of other listings, which would lead to entries outside the prefix.
        *(f"/v1/?recursive=true&cursor={encode_cursor(position)}" for position in ("a", "v10", "\U0010ffff")),
    ],
)
def test_other_cursors_are_refused(small_pages, query):
    answer = Raw(small_pages.endpoint).call("GET", "/api/buckets/list/all/tree" + query)
    assert (answer.status, "cursor" in answer.error) == (400, True)


@given(st.text(max_size=4), st.text(max_size=6))
def test_after_prefix_is_the_least_string_above(prefix, text):
    above = after_prefix(prefix)
    assert text.startswith(prefix) == (text >= prefix and (above is None or text < above))
