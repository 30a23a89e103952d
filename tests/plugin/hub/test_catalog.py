import itertools
from datetime import UTC, datetime, timedelta

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ClassicKey, MPKey, encode_name
from hfbucket_plugin.errors import AccessDeniedError
from hfbucket_plugin.hub.listing import list_chunks
from hfbucket_plugin.hub.transfer import Upload
from localhub.faults import Fault
from tests.support.buckets import opened, upload

KEYS = [
    "a/model@1@0@ab@bfloat16",
    "a/model@1@0@ac@bfloat16",
    "a/model@1@1@ab@bfloat16",
    "a/model@10@0@ab@bfloat16",
    "a/model-large@1@0@ab@half",
    "a/modül 模型@1@0@-ab@half@user%x%y",
    "b@00000001@0@ab",
    "b@1@0@ab@half@3",
]


@pytest.fixture
def bucket_client(hub, bucket):
    upload(hub.endpoint, bucket, {f"v1/{encode_name(key)}": key.encode() for key in KEYS})
    upload(
        hub.endpoint,
        bucket,
        {
            f"v10/{encode_name(KEYS[0])}": b"another prefix",
            f"v1/.hfbucket/{encode_name(KEYS[0])}": b"a record of ours",
            "v1/.hfbucket": b"no record",
            f"v1/deeper/{encode_name(KEYS[0])}": b"nested",
            "v1/README.md": b"foreign",
            f"v1/{KEYS[0].replace('/', '%2f').replace('@', '%40')}": b"encoded by somebody else",
            f"v1/{encode_name('a/model@1@0@AB@bfloat16')}": b"no key",
        },
    )
    with opened(hub.endpoint, bucket, "v1") as one:
        yield one


def texts(bucket_client, *prefixes):
    return [entry.text for entry in list_chunks(bucket_client, prefixes)]


def test_everything_and_nothing_else(bucket_client):
    assert sorted(texts(bucket_client, "")) == sorted(KEYS)
    assert texts(bucket_client) == []


@pytest.mark.parametrize(
    ("prefixes", "expected"),
    [
        (["a/model@"], KEYS[:4]),
        (["a/model@1@"], KEYS[:3]),
        (["a/model@1@0@"], KEYS[:2]),
        (["a/model@1@0@ab"], KEYS[:1]),
        (["a/model@1"], KEYS[:4]),
        (["a/mod"], KEYS[:6]),
        (["a/modü"], KEYS[5:6]),
        (["a/modül 模"], KEYS[5:6]),
        (["b@"], KEYS[6:]),
        (["nothing"], []),
        (["a/model@1@0@", "b@00000001@"], [*KEYS[:2], KEYS[6]]),
        (["a/model@1@0@", "a/model@1@", "a/model@1@0@ab", "a/model@1@"], KEYS[:3]),
        (["b@", ""], KEYS),
    ],
)
def test_what_begins_with_a_prefix_each_once(bucket_client, prefixes, expected):
    assert sorted(texts(bucket_client, *prefixes)) == sorted(expected)


def test_a_prefix_that_another_covers_costs_no_request(hub, bucket_client):
    hub.control.reset_counters()

    texts(bucket_client, "a/", "a/model@", "a/model@1@")

    assert hub.control.counters().route("tree").requests == 1


def test_an_entry_tells_all_that_a_plan_needs(bucket_client):
    before = datetime.now(UTC) - timedelta(days=1)
    entries = {entry.text: entry for entry in list_chunks(bucket_client, [""])}

    for key in KEYS:
        entry = entries[key]
        assert str(entry.key) == key
        assert isinstance(entry.key, MPKey if key == KEYS[6] else ClassicKey)
        assert entry.content.size == len(key.encode())
        assert len(entry.content.xet_hash) == 64
        assert entry.uploaded_at > before


def test_an_instance_without_a_prefix_lists_the_top_only(hub, bucket, bucket_client):
    upload(hub.endpoint, bucket, {encode_name(KEYS[0]): b"top"})
    with opened(hub.endpoint, bucket) as top:
        assert texts(top, "") == [KEYS[0]]


def test_listings_stream_and_a_page_that_does_not_come_is_an_error(hub_factory):
    hub = hub_factory(page_size=3, faults=True)
    with opened(hub.endpoint, "tests/catalog", "v1") as bucket_client:
        bucket_client.create(Deadline.after(30))
        content = bucket_client.transfer.upload([b"x"], Deadline.after(30), Upload())[0]
        names = {f"v1/{encode_name(f'm@1@0@{number:x}@half')}": content for number in range(1, 10)}
        assert bucket_client.add(names, Deadline.after(30)) == {}
        hub.control.reset_counters()

        entries = list_chunks(bucket_client, ["m@"])
        first = list(itertools.islice(entries, 3))
        assert hub.control.counters().route("tree").requests == 1
        hub.control.add_fault(Fault(route="tree", status=403))
        with pytest.raises(AccessDeniedError):
            next(entries)
        hub.control.clear_faults()

        assert len(first) == 3
        assert len(list(list_chunks(bucket_client, ["m@"]))) == 9
