"""Listings of chunks, page by page and several pages at a time."""

import itertools
import random
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import ClassicKey, MPKey, encode_name
from hfbucket_plugin.errors import AccessDeniedError
from hfbucket_plugin.hub.listing import encoded_shards, list_chunks, list_chunks_ahead, shards, whole_key
from hfbucket_plugin.hub.transfer import Upload
from localhub.faults import Fault
from tests.support.buckets import opened, upload
from tests.support.hubs import start_on_fresh_port
from tests.support.waiting import eventually

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


MANY = 1 << 40

hashes = st.text("0123456789abcdef", min_size=2, max_size=6)
classic = st.builds(
    "org/m@{}@{}@{}{}@half".format, st.integers(1, 12), st.integers(0, 3), st.sampled_from(["", "-"]), hashes
)
mp = st.builds(
    "org/m@{:08x}@{:x}@{}".format, st.integers(0, 1 << 33), st.integers(0, 20), hashes.map(lambda text: text * 2)
)
keys = st.one_of(classic, mp, mp.map("{}@salt".format))


@given(st.lists(keys, min_size=1, max_size=40, unique=True), st.data())
def test_each_longer_key_starts_with_one_part(texts, data):
    texts.sort(key=encode_name)
    cut = data.draw(st.integers(len("org/m"), len(texts[0])))
    prefix = texts[0][:cut]
    listed = [text for text in texts if text.startswith(prefix)]
    page = listed[: data.draw(st.integers(1, len(listed)))]

    parts = shards(prefix, page, MANY)

    if parts:
        for text in listed:
            assert sum(text.startswith(part) for part in parts) == (text != prefix)
            assert text != prefix or whole_key(prefix)
        assert parts == sorted(parts, key=encode_name)
        assert not any(one != two and one.startswith(two) for one, two in itertools.permutations(parts, 2))


any_models = st.builds(
    "org/m{}{}".format, st.sampled_from(["", "@v2", "@8", "@1@0@ü", "@ 模"]), keys.map(lambda text: text[5:])
)


@given(st.lists(any_models, min_size=1, max_size=40, unique=True), st.data())
def test_where_the_model_is_not_known_each_longer_key_starts_with_one_part_too(texts, data):
    texts.sort(key=encode_name)
    cut = data.draw(st.integers(len("org/m"), len(texts[0])))
    prefix = texts[0][:cut]
    listed = [text for text in texts if text.startswith(prefix)]
    page = listed[: data.draw(st.integers(1, len(listed)))]

    parts = encoded_shards(prefix, page, MANY)

    if parts:
        for text in listed:
            assert sum(encode_name(text).startswith(part) for part in parts) == (text != prefix)
        assert parts == sorted(parts)


@pytest.mark.parametrize(
    ("prefix", "page", "pages", "first"),
    [
        ("m@1@0@", ["m@1@0@00a@half", "m@1@0@00b@half"], 200, "m@1@0@-"),
        ("m@1@0@", ["m@1@0@00a@half", "m@1@0@00b@half"], 100, None),  # two digits cost 36 requests
        ("m@1@0@", ["m@1@0@0a@half", "m@1@0@1a@half"], MANY, None),  # the first page reaches two parts
        ("m", ["m@1@0@0a@half"], MANY, None),  # names of models hold any character
        ("m@1@0@0a@h", ["m@1@0@0a@half"], MANY, None),  # behind the hash
        ("m@1@0@0a", ["m@1@0@0a@half"], MANY, None),
        ("m@1@0@", [], MANY, None),
    ],
)
def test_listings_that_are_worth_cutting(prefix, page, pages, first):
    parts = shards(prefix, page, pages)
    assert (parts[1] if parts else None) == first


# --- on a Hub ------------------------------------------------------------------------------------------------------------

DICE = random.Random(5)
MANY_KEYS = [f"m@2@0@{DICE.getrandbits(64):016x}@half" for _ in range(300)]
MANY_KEYS += [f"m@2@1@{DICE.getrandbits(64):016x}@half" for _ in range(20)]
ODD = [f"m@{model}@2@0@{DICE.getrandbits(64):016x}@half" for model in ("v2", "2b", "2@0@x", "2@0@ü", "2@0@0.1")]
MANY_KEYS += [f"m@02000200@0@{DICE.getrandbits(64):016x}" for _ in range(40)] + [
    "m@02000200@0@ab",
    "m@02000200@0@abab@salt",
]


@pytest.fixture(scope="module")
def paged(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    with (
        start_on_fresh_port(root, page_size=2, faults=True) as hub,
        opened(hub.endpoint, "tests/shards", "v1") as bucket_client,
    ):
        bucket_client.create(Deadline.after(30))
        content = bucket_client.transfer.upload([b"x"], Deadline.after(30), Upload())[0]
        assert bucket_client.add({f"v1/{encode_name(key)}": content for key in MANY_KEYS}, Deadline.after(30)) == {}
        yield hub, bucket_client


@pytest.fixture(scope="module")
def odd(paged):
    """A client of another place in the bucket, with chunks of models that hold `@`."""
    hub, _ = paged
    with opened(hub.endpoint, "tests/shards", "v2") as bucket_client:
        content = bucket_client.transfer.upload([b"x"], Deadline.after(30), Upload())[0]
        files = {f"v2/{encode_name(key)}": content for key in [*MANY_KEYS[:40], *ODD]}
        assert bucket_client.add(files, Deadline.after(30)) == {}
        yield bucket_client


@pytest.mark.parametrize(
    "prefixes",
    [
        ["m@2@0@"],
        ["m@2@"],
        ["m@"],
        ["m"],
        [""],
        ["m@2@0@", "m@2@1@", "m@02"],
        ["m@02000200@0@ab"],
        ["m@2@1@", "m@9@"],
        [],
    ],
    ids=" ".join,
)
def test_the_same_chunks_in_the_same_order(paged, prefixes):
    _, bucket_client = paged
    expected = [entry for prefix in prefixes for entry in list_chunks(bucket_client, [prefix])]
    expected.sort(
        key=lambda entry: next(number for number, one in enumerate(sorted(prefixes)) if entry.text.startswith(one))
    )

    assert list(list_chunks_ahead(bucket_client, prefixes)) == expected


@pytest.mark.parametrize("prefixes", [["m@2@0@"], ["m@2@"], ["m@"], ["m@2@0@00"]], ids=" ".join)
def test_chunks_of_models_that_go_on_after_the_prefix_are_listed_where_they_are_wanted(odd, prefixes, monkeypatch):
    """However many pages there are: these are few."""
    monkeypatch.setattr("hfbucket_plugin.hub.listing._Listing._objects", lambda _: MANY)
    expected = list(list_chunks(odd, prefixes))

    found = list(list_chunks_ahead(odd, prefixes, any_model=True))

    assert found == expected
    assert {entry.text for entry in found} >= {text for text in ODD if text.startswith(prefixes[0])}


def test_other_parts_are_listed_while_one_is_waited_for(paged):
    hub, bucket_client = paged
    first = bucket_client.handle.join(encode_name("m@2@0@0"))
    number = hub.control.add_fault(Fault(route="tree", path=first, hang=True))
    found = []
    listing = threading.Thread(target=lambda: found.extend(list_chunks_ahead(bucket_client, ["m@2@0@"])), daemon=True)
    hub.control.reset_counters()
    try:
        listing.start()
        eventually(lambda: hub.control.counters().route("tree").requests >= 25)
        assert hub.control.hits(number) == 1
        assert not found
    finally:
        hub.control.clear_faults()
    listing.join(60)
    assert [entry.text for entry in found] == sorted(MANY_KEYS[:300])


@pytest.mark.parametrize("before", [0, 3, 40])
def test_a_page_that_does_not_come_is_an_error(paged, before):
    hub, bucket_client = paged
    chunks = list_chunks_ahead(bucket_client, ["m@2@0@"])
    for _ in range(before):
        next(chunks)
    hub.control.add_fault(Fault(route="tree", status=403))
    try:
        with pytest.raises(AccessDeniedError):
            list(chunks)
    finally:
        hub.control.clear_faults()


def test_a_hub_that_does_not_tell_how_much_there_is_is_listed_page_by_page(paged):
    hub, bucket_client = paged
    hub.control.add_fault(Fault(route="bucket-info", status=500))
    hub.control.add_fault(Fault(route="tree", path=bucket_client.handle.join(encode_name("m@2@0@0")), status=403))
    try:
        found = [entry.text for entry in list_chunks_ahead(bucket_client, ["m@2@0@"])]
    finally:
        hub.control.clear_faults()
    assert found == sorted(MANY_KEYS[:300])
