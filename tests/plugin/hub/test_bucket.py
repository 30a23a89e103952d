import itertools
import json
from datetime import UTC, datetime, timedelta

import pytest

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import BucketHandle, ContentId
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    DeadlineError,
    HFBucketError,
    RefusedError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub.bucket import MAX_BATCH, Bucket, ObjectInfo
from hfbucket_plugin.hub.listing import list_chunks_ahead
from hfbucket_plugin.hub.transfer import Upload
from localhub.faults import Fault
from tests.support.buckets import SECRET, download, everything_reported, noise, opened, paths, upload
from tests.support.hubs import Recorder

MISSING = "tests/no-such-bucket"


def soon():
    return Deadline.after(60)


def taken(bucket, data):
    """The content of bytes that the store has taken, and that no path names yet."""
    return bucket.transfer.upload([data], soon(), Upload())[0]


@pytest.fixture
def bucket_client(hub, bucket):
    with opened(hub.endpoint, bucket) as one:
        yield one


# --- stat ----------------------------------------------------------------------------------------------------------------


def test_stat_says_what_is_there_by_path(hub, bucket_client):
    upload(hub.endpoint, bucket_client.handle.bucket_id, {"a": b"first", "b/ü %2F": b"second one", "b/x": b"first"})
    before = datetime.now(UTC) - timedelta(days=1)

    found = bucket_client.stat(["b/ü %2F", "none", "a", "b", "b/x"], soon())

    assert {path: info.content.size for path, info in found.items()} == {"a": 5, "b/x": 5, "b/ü %2F": 10}
    assert all(path == info.path for path, info in found.items())
    assert found["a"].content == found["b/x"].content != found["b/ü %2F"].content
    assert all(info.uploaded_at > before for info in found.values())


def test_stat_of_nothing_asks_nothing(hub, bucket_client):
    hub.control.reset_counters()

    assert bucket_client.stat([], soon()) == {}
    assert hub.control.counters().total.requests == 0


def test_stat_asks_a_thousand_at_a_time(hub, bucket_client):
    content = taken(bucket_client, b"x")
    assert bucket_client.add({f"p/{number}": content for number in range(0, 2001, 2)}, soon()) == {}
    hub.control.reset_counters()

    found = bucket_client.stat([f"p/{number}" for number in range(2001)], soon())

    assert set(found) == {f"p/{number}" for number in range(0, 2001, 2)}
    assert hub.control.counters().route("paths-info").requests == 3
    assert MAX_BATCH == 1000


def test_stat_of_a_missing_bucket(hub):
    with opened(hub.endpoint, MISSING) as bucket_client, pytest.raises(BucketMissingError):
        bucket_client.stat(["a"], soon())


BAD_SIZES = ("1e400", "-1", str(-(2**63)), str(2**63), str(2**64), str(10**30), "NaN", "1.5", "true", '"1"', "9" * 5000)
BAD_HASHES = ("0" * 63, "g" * 64, 5, "../" + "0" * 61, "0" * 64 + "\n", "F" * 64, None)
BAD_DATES = (
    '"0001-01-01T00:00:00+23:59"',
    '"9999-12-31T23:59:59-23:59"',
    '"2026-13-01"',
    '"99999-01-01T00:00:00"',
    "1e308",
    '"' + "2" * 100_000 + '"',
)


@pytest.mark.parametrize(
    "body",
    [
        "{}",
        "null",
        "5",
        '"text"',
        "[1]",
        "[null]",
        '[{"path": 5}]',
        '[{"path": "a"}]',
        '[{"path": "a", "size": 1}]',
        '[{"path": "a", "xetHash": "00"}]',
        '[{"path": "a", "size": "many", "xetHash": "00"}]',
        '[{"path": "a", "size": null, "xetHash": "00"}]',
        '[{"path": "a", "size": [1], "xetHash": "00"}]',
        *(f'[{{"path": "a", "size": {size}, "xetHash": "{"0" * 64}"}}]' for size in BAD_SIZES),
        *(f'[{{"path": "a", "size": 1, "xetHash": {json.dumps(one)}}}]' for one in BAD_HASHES),
        *(f'[{{"path": "a", "size": 1, "xetHash": "{"0" * 64}", "uploadedAt": {one}}}]' for one in BAD_DATES),
        *(
            f'[{{"path": {one}, "size": 1, "xetHash": "{"0" * 64}"}}]'
            for one in ('""', '"\\ud800"', "[1]", '"' + "x" * 5000 + '"')
        ),
        '[{"path": "a", "size": 1, "xetHash": "00", "uploadedAt": "yesterday"}]',
        '[{"path": "a", "size": 1, "xetHash": "00", "uploadedAt": 5}]',
        '[{"path": "a", "size": 1, "xetHash": "00", "uploadedAt": {"a": 1}}]',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("route", ["paths-info", "tree"])
def test_records_that_are_none_are_a_transport_error(hub, bucket_client, route, body):
    hub.control.add_fault(Fault(route=route, status=200, body=body.replace('"path"', '"type": "file", "path"')))

    with pytest.raises(TransportError, match=route):
        bucket_client.stat(["a"], soon()) if route == "paths-info" else list(bucket_client.list_objects("", 60))


def test_records_without_a_time_of_upload_fall_back_to_the_clients(hub, bucket_client):
    record = '{"type": "file", "path": "%s", "size": 1, "xetHash": "' + "0" * 64 + '"%s}'
    records = [
        record % ("none", ""),
        record % ("mtime", ', "mtime": "2026-01-02T03:04:05.000Z"'),
        record % ("no zone", ', "uploadedAt": "2026-01-02T03:04:05"'),
    ]
    hub.control.add_fault(Fault(route="paths-info", status=200, body=f"[{','.join(records)}]"))

    found = bucket_client.stat(["none", "mtime", "no zone"], soon())

    assert found["none"].uploaded_at is None
    assert found["mtime"].uploaded_at == found["no zone"].uploaded_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


# --- list ----------------------------------------------------------------------------------------------------------------


def test_listings_come_page_by_page(hub_factory):
    hub = hub_factory(page_size=4, faults=True)
    with opened(hub.endpoint, "tests/pages") as bucket_client:
        bucket_client.create(soon())
        content = taken(bucket_client, b"x")
        names = {f"v1/{number:02}" for number in range(10)} | {"v10/a", "v2/a", "v1"}
        assert bucket_client.add(dict.fromkeys(names, content), soon()) == {}
        hub.control.reset_counters()

        listed = bucket_client.list_objects("v1", 60)
        first = list(itertools.islice(listed, 4))
        assert hub.control.counters().route("tree").requests == 1
        rest = list(listed)

        assert {info.path for info in first + rest} == names - {"v2/a"}, "the prefix is lexical, as the Hub's"
        assert len(first + rest) == 12
        assert hub.control.counters().route("tree").requests == 3
        assert {info.content for info in first + rest} == {content}

        assert [info.path for info in bucket_client.list_objects("v2/", 60)] == ["v2/a"]
        assert list(bucket_client.list_objects("nothing", 60)) == []
        assert len(list(bucket_client.list_objects("", 60))) == 13


def test_a_page_that_fails_once_is_asked_again_and_one_that_fails_for_good_is_an_error(hub_factory):
    hub = hub_factory(page_size=2, faults=True)
    with opened(hub.endpoint, "tests/failing-pages") as bucket_client:
        bucket_client.create(soon())
        assert bucket_client.add(dict.fromkeys("abcdef", taken(bucket_client, b"x")), soon()) == {}
        listed = bucket_client.list_objects("", 60)
        got = [next(listed), next(listed)]

        hub.control.add_fault(Fault(route="tree", status=500, times=1))
        got += [next(listed), next(listed)]
        assert sorted(info.path for info in got) == list("abcd")

        hub.control.add_fault(Fault(route="tree", status=403))
        with pytest.raises(AccessDeniedError):
            next(listed)


@pytest.mark.parametrize("prefix", ["a b/ü", "%2F", "?#&=", "100%", "a+b", "'\"<>"])
def test_prefixes_of_any_characters_are_matched_as_they_are(hub, bucket_client, prefix):
    content = taken(bucket_client, b"x")
    wanted = {f"{prefix}{tail}" for tail in ("/k", "k%2Fl", "é")}
    assert bucket_client.add(dict.fromkeys([*wanted, "other", prefix[:-1] + "zz"], content), soon()) == {}

    assert {info.path for info in bucket_client.list_objects(prefix, 60)} == wanted


def test_pages_whose_links_name_another_host_are_asked_of_ours(hub_factory):
    hub = hub_factory(page_size=2, faults=True)
    with opened(hub.endpoint, "tests/mirrored", token=SECRET) as bucket_client, Recorder() as upstream:
        bucket_client.create(soon())
        assert bucket_client.add(dict.fromkeys("abc", taken(bucket_client, b"x")), soon()) == {}
        _, cursor = bucket_client.list_page("", None, soon())
        link = f"{upstream.endpoint}/mirror/api/buckets/tests/mirrored/tree?{cursor}"
        first = [{"type": "file", "path": path, "size": 1, "xetHash": "0" * 64} for path in "ab"]
        hub.control.add_fault(
            Fault(route="tree", status=200, body=json.dumps(first), times=1, headers={"Link": f'<{link}>; rel="next"'})
        )

        assert [info.path for info in bucket_client.list_objects("", 60)] == ["a", "b", "c"]

    assert upstream.seen == []


@pytest.mark.parametrize("records", [[], [{"type": "file", "path": "a", "size": 1, "xetHash": "0" * 64}]])
def test_a_listing_that_makes_no_progress_is_given_up(hub, bucket, records):
    """Fresh cursors for ever, with empty pages or the same file on each."""
    with opened(hub.endpoint, bucket) as bucket_client:
        for number in range(40):
            link = f"{hub.endpoint}/api/buckets/{bucket}/tree?cursor={number}"
            headers = {"Link": f'<{link}>; rel="next"'}
            hub.control.add_fault(Fault(route="tree", status=200, body=json.dumps(records), times=1, headers=headers))
        with pytest.raises(TransportError, match="bring nothing new"):
            list(bucket_client.list_objects("", 60))
        hub.control.clear_faults()


def test_a_listing_of_more_than_the_bucket_holds_is_given_up(hub, bucket, monkeypatch):
    """Another name on each page, for ever."""
    pages = []

    def endless(_self, prefix, _cursor, _deadline):
        pages.append(prefix)
        assert len(pages) < 2000, "it goes on for ever"
        return [ObjectInfo(f"{len(pages)}", ContentId("0" * 64, 1), None)], str(len(pages)), None

    with opened(hub.endpoint, bucket) as bucket_client:
        bucket_client.create(soon())
        monkeypatch.setattr(Bucket, "list_page_dated", endless)
        with pytest.raises(TransportError, match="but the bucket reports 0"):
            list(bucket_client.list_objects("", 60))
        with pytest.raises(TransportError, match="but the bucket reports 0"):
            list(list_chunks_ahead(bucket_client, [""]))


@pytest.mark.parametrize("link", ["{other}/api/x", "//{other_host}/x", "http://[", "https://{hub_host}/api/x"])
def test_a_next_page_on_another_host_gets_no_token(hub, bucket, link):
    with Recorder() as somebody, opened(hub.endpoint, bucket, token=SECRET) as bucket_client:
        link = link.format(
            other=somebody.endpoint,
            other_host=somebody.endpoint.removeprefix("http://"),
            hub_host=hub.endpoint.removeprefix("http://"),
        )
        hub.control.add_fault(
            Fault(route="tree", status=200, body="[]", times=1, headers={"Link": f'<{link}>; rel="next"'})
        )
        with pytest.raises(HFBucketError) as failed:
            list(bucket_client.list_objects("", 60))

    assert somebody.seen == []
    assert SECRET not in everything_reported(failed.value)


def test_a_listing_ends_when_its_page_does_not_come(hub, bucket_client):
    hub.control.add_fault(Fault(route="tree", hang=True))

    with pytest.raises(DeadlineError):
        list(bucket_client.list_objects("", 0.3))


# --- add, copy, delete ---------------------------------------------------------------------------------------------------


def test_what_was_added_is_there_for_everybody(hub, bucket_client):
    data = noise(300_000)

    assert bucket_client.add({"a/ü b": taken(bucket_client, data)}, soon()) == {}

    assert download(hub.endpoint, bucket_client.handle.bucket_id, "a/ü b") == data
    assert bucket_client.stat(["a/ü b"], soon())["a/ü b"].content.size == 300_000


def test_batches_are_cut_at_a_thousand_and_told_item_by_item(hub, bucket_client):
    content = taken(bucket_client, b"x")
    files = {f"{number:04}": content for number in range(1500)}
    hub.control.add_fault(Fault(route="batch", items="", items_regex=r"^(0007|1234|0999)$", items_error="no luck"))

    failed = bucket_client.add(files, soon())

    assert {path: (failure.item, failure.kind, failure.message) for path, failure in failed.items()} == {
        path: (path, "hub", "no luck") for path in ("0007", "0999", "1234")
    }
    assert hub.control.counters().route("batch").requests == 2
    hub.control.clear_faults()
    assert len(bucket_client.stat(list(files), soon())) == 1497


def test_a_batch_whose_items_all_fail_is_told_item_by_item_too(hub, bucket_client):
    hub.control.add_fault(Fault(route="batch", items="", items_error="no luck"))

    failed = bucket_client.add(dict.fromkeys("ab", taken(bucket_client, b"x")), soon())

    assert hub.control.counters().route("batch").statuses == {"422": 1}
    assert set(failed) == {"a", "b"}


def test_content_that_the_store_never_took_fails_by_item(bucket_client):
    failed = bucket_client.add({"good": taken(bucket_client, b"x"), "bad": ContentId("ab" * 32, 5)}, soon())

    assert set(failed) == {"bad"}
    assert failed["bad"].kind == "hub"
    assert "upload" in failed["bad"].message
    assert set(bucket_client.stat(["good", "bad"], soon())) == {"good"}


def test_deleting_is_told_item_by_item(hub, bucket_client):
    content = taken(bucket_client, b"x")
    assert bucket_client.add(dict.fromkeys("abcd", content), soon()) == {}
    hub.control.add_fault(Fault(route="batch", items="c", items_error="locked"))

    failed = bucket_client.delete(["a", "c", "never there"], soon())

    assert {path: failure.message for path, failure in failed.items()} == {"c": "locked"}
    assert paths(hub.endpoint, bucket_client.handle.bucket_id) == ["b", "c", "d"]


def test_copies_move_no_bytes(hub, bucket_client, new_bucket):
    source = BucketHandle.parse(f"hf://buckets/{new_bucket()}")
    data = noise(200_000)
    upload(hub.endpoint, source.bucket_id, {"from": data})
    with opened(hub.endpoint, source.bucket_id) as there:
        content = there.stat(["from"], soon())["from"].content
    hub.control.reset_counters()

    failed = bucket_client.copy(source, {"to/a": content, "to/b": ContentId("cd" * 32, 4)}, soon())

    assert set(failed) == {"to/b"}
    assert hub.control.counters().route("xorb-upload").requests == 0
    assert download(hub.endpoint, bucket_client.handle.bucket_id, "to/a") == data


def test_a_copy_from_a_bucket_of_another_region_fails_by_item(hub, bucket_client, new_bucket):
    source = BucketHandle.parse(f"hf://buckets/{new_bucket(region='eu')}")
    upload(hub.endpoint, source.bucket_id, {"from": b"x"})
    with opened(hub.endpoint, source.bucket_id) as there:
        content = there.stat(["from"], soon())["from"].content

    failed = bucket_client.copy(source, {"to": content}, soon())

    assert "region" in failed["to"].message


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"status": 401}, AccessDeniedError),
        ({"status": 403}, AccessDeniedError),
        ({"status": 409}, RefusedError),
        ({"status": 413}, RefusedError),
        ({"status": 422, "body": "{}"}, TransportError),
        ({"status": 422, "body": '{"failed": []}'}, TransportError),
        ({"status": 422, "body": '{"error": "no"}'}, TransportError),
        ({"status": 422, "body": "[]"}, TransportError),
        ({"status": 422, "body": "not json"}, TransportError),
        ({"status": 200, "body": "not json"}, TransportError),
        ({"status": 200, "body": '{"failed": 5}'}, TransportError),
        ({"status": 200, "body": '{"failed": ["a"]}'}, TransportError),
        ({"status": 200, "body": '{"failed": [null]}'}, TransportError),
        ({"status": 200, "body": '{"failed": [{}]}'}, TransportError),
        ({"status": 422, "body": '{"failed": [{"path": "/a", "error": "x"}]}'}, TransportError),
        ({"status": 500}, TransportError),
        ({"truncate_at": 3}, TransportError),
        ({"reset": True}, TransportError),
    ],
    ids=str,
)
def test_a_batch_that_fails_as_a_whole_is_an_error(hub, bucket_client, fault, expected):
    content = taken(bucket_client, b"x")
    hub.control.add_fault(Fault(route="batch", **fault))

    with pytest.raises(expected):
        bucket_client.add({"a": content}, soon())


def test_what_failed_is_told_without_a_token_that_the_hub_repeats(hub, bucket):
    with opened(hub.endpoint, bucket, token=SECRET) as bucket_client:
        content = taken(bucket_client, b"x")
        hub.control.add_fault(Fault(route="batch", items="", items_error="y" * 280 + f" Bearer {SECRET}"))
        failed = bucket_client.add({"a": content}, soon())

    assert SECRET[:10] not in str(failed)
    assert len(failed["a"].message) < 400


# --- create, info --------------------------------------------------------------------------------------------------------


def test_a_bucket_is_created_once_and_again(hub, new_bucket):
    bucket_id = new_bucket() + "-made"
    tally = MemorySink()
    with opened(hub.endpoint, bucket_id, sink=tally) as bucket_client:
        with pytest.raises(BucketMissingError):
            bucket_client.info(soon())
        bucket_client.create(soon())
        bucket_client.create(soon())
        record = bucket_client.info(soon())

    assert record["id"] == bucket_id
    assert record["totalFiles"] == 0
    assert tally.get(telemetry.HUB_REQUESTS, route="create", outcome="ok") == 2


def test_a_token_that_may_not_create_may_use_what_is_there(hub, bucket_client):
    hub.control.add_fault(Fault(route="bucket-create", status=403))

    bucket_client.create(soon())


def test_a_token_that_may_not_create_is_told_so(hub):
    hub.control.add_fault(Fault(route="bucket-create", status=403))

    with opened(hub.endpoint, MISSING) as bucket_client, pytest.raises(AccessDeniedError):
        bucket_client.create(soon())


@pytest.mark.parametrize("body", ["[]", "null", "5"])
def test_a_record_of_a_bucket_that_is_none(hub, bucket_client, body):
    hub.control.add_fault(Fault(route="bucket-info", status=200, body=body))

    with pytest.raises(TransportError, match="info"):
        bucket_client.info(soon())


# --- rights, as a Hub with access control gives them ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A Hub where one token may write, one may read, and nobody else may do anything."""
    from tests.support.hubs import start_on_fresh_port

    root = tmp_path_factory.mktemp("guarded")
    (root / "tokens.yaml").write_text(
        "tokens:\n"
        "- {token: hf_writer, buckets: {'org/*': write}}\n"
        "- {token: hf_reader, buckets: {'org/*': read}}\n"
        "- {token: hf_stranger, buckets: {'other/*': write}}\n"
    )
    with start_on_fresh_port(root / "hub", tokens=root / "tokens.yaml") as hub:
        from huggingface_hub import HfApi

        HfApi(endpoint=hub.endpoint, token="hf_writer").create_bucket("org/private", private=True)
        yield hub


def test_who_may_write(guarded):
    with opened(guarded.endpoint, "org/private", token="hf_writer") as bucket_client:
        assert bucket_client.add({"a": taken(bucket_client, b"x")}, soon()) == {}
        assert set(bucket_client.stat(["a"], soon())) == {"a"}


def test_who_may_only_read(guarded):
    with opened(guarded.endpoint, "org/private", token="hf_reader") as bucket_client:
        bucket_client.stat(["a"], soon())
        bucket_client.create(soon())
        with pytest.raises(AccessDeniedError) as denied:
            taken(bucket_client, b"x")
        assert denied.value.status == 403
        with pytest.raises(AccessDeniedError):
            bucket_client.delete(["a"], soon())


def test_who_may_not_know_of_it(guarded):
    with (
        opened(guarded.endpoint, "org/private", token="hf_stranger") as bucket_client,
        pytest.raises(BucketMissingError),
    ):
        bucket_client.stat(["a"], soon())


@pytest.mark.parametrize("token", ["hf_unknown", None])
def test_who_is_nobody(guarded, token):
    with (
        opened(guarded.endpoint, "org/private", token=token) as bucket_client,
        pytest.raises(AccessDeniedError) as denied,
    ):
        bucket_client.stat(["a"], soon())

    assert denied.value.status == 401
    assert ("not set" in str(denied.value)) == (token is None)


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"truncate_at": 3}, {"status": 429, "headers": {"Retry-After": "0"}}]
)
def test_a_delete_that_is_asked_once_is_not_repeated(hub, bucket, fault):
    upload(hub.endpoint, bucket, {"a": b"x"})
    hub.control.reset_counters()
    hub.control.add_fault(Fault(route="batch", times=1, **fault))
    with opened(hub.endpoint, bucket) as one:
        with pytest.raises((TransportError, ThrottledError)):
            one.delete(["a"], soon(), once=True)
        assert hub.control.counters().route("batch").requests == 1
        assert one.delete(["a"], soon(), once=True) == {}
    assert paths(hub.endpoint, bucket) == []
