"""Pages of keys against a model of the Hub's listing, and cursors that nobody gave out."""

import base64
import contextlib
import json
from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.engine.mp_tasks import key_string
from hfbucket_plugin.engine.mp_usage import list_page
from hfbucket_plugin.errors import HFBucketError
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.hub.connect import open_bucket
from tests.support.buckets import instance_settings, upload
from tests.support.hubs import Recorder
from tests.support.lmcache_mp import mp_key
from tests.support.models import any_text, untimed

NOW = datetime.now(UTC)
OTHERS = [
    "foreign",
    ".hfbucket/lock",
    "deep/" + encode_name("m@01000000@0@ab"),
    encode_name("m@1@0@ab@half"),
    "%zz",
    "A",
]
"""Objects that are no keys of MP mode, to be skipped."""


class Hub:
    """A bucket that is listed in the order of its paths, so many a page, from behind the last one told."""

    def __init__(self, page_size, names=()):
        self.handle = BucketHandle.parse("hf://buckets/o/b/v1")
        self.page_size = page_size
        self.paths = {self.handle.join(name) for name in names}

    def add(self, key):
        self.paths.add(self.handle.join(encode_name(key_string(key))))

    def remove(self, key):
        self.paths.discard(self.handle.join(encode_name(key_string(key))))

    def list_page(self, prefix, cursor, _deadline):
        left = sorted(path for path in self.paths if path.startswith(prefix) and (cursor is None or path > cursor))
        page = left[: self.page_size]
        infos = [ObjectInfo(path, ContentId("0" * 64, len(path)), NOW) for path in page]
        return infos, page[-1] if len(left) > len(page) else None


def pages(hub, page_size, between=lambda _number: None, model=None):
    """All keys that are told, page by page, with something going on in between."""
    reported, cursor, number = [], None, 0
    while True:
        page = list_page(hub, model, page_size, cursor)
        assert len(page.entries) <= page_size
        reported += [entry.key.to_object_key() for entry in page.entries]
        cursor = page.next_page_token
        if cursor is None:
            return reported
        assert len(page.entries) == page_size, "a page with another one behind it is full"
        assert isinstance(cursor, str)
        between(number)
        number += 1


def in_order(keys):
    return sorted(keys, key=lambda key: encode_name(key_string(key)))


numbers = st.sets(st.integers(0, 40), max_size=20)
sizes = st.integers(1, 25)


@untimed
@given(held=numbers, page_size=sizes, hub_page=sizes, others=st.sets(st.sampled_from(OTHERS)))
def test_pages_of_any_size_tell_every_key_once_in_the_order_of_the_paths(held, page_size, hub_page, others):
    hub = Hub(hub_page, others)
    keys = [mp_key(number) for number in held]
    for key in keys:
        hub.add(key)

    assert pages(hub, page_size) == in_order(keys)


@untimed
@given(held=numbers, page_size=sizes)
def test_a_full_last_page_promises_no_further_one(held, page_size):
    hub = Hub(3)
    for number in held:
        hub.add(mp_key(number))
    calls = []
    pages(hub, page_size, calls.append)

    assert len(calls) == max(0, -(-len(held) // page_size) - 1)


@untimed
@given(
    held=numbers,
    page_size=sizes,
    hub_page=sizes,
    changes=st.lists(st.lists(st.integers(-41, 40), max_size=5), max_size=20),
)
@example(held={1, 2, 3, 4, 5, 6}, page_size=2, hub_page=3, changes=[[-3]])
@example(held={1, 2, 3, 4, 5, 6}, page_size=2, hub_page=3, changes=[[-2 - 1, -1 - 1]])
@example(held={10, 11, 12, 13}, page_size=3, hub_page=3, changes=[[0, 1, 2]])
@example(held={10, 11, 12, 13}, page_size=2, hub_page=3, changes=[[0, 1], [2, 3]])
def test_what_comes_and_goes_between_pages_neither_hides_nor_repeats_a_key_that_stays(
    held, page_size, hub_page, changes
):
    hub = Hub(hub_page)
    for number in held:
        hub.add(mp_key(number))
    gone, came = set(), set()

    def change(number):
        for one in changes[number] if number < len(changes) else []:
            if one < 0:  # -1 deletes 0
                hub.remove(mp_key(-one - 1))
                gone.add(-one - 1)
            else:
                hub.add(mp_key(one))
                came.add(one)

    reported = [int.from_bytes(key.chunk_hash, "big") for key in pages(hub, page_size, change)]

    assert len(reported) == len(set(reported)), "no key is told twice"
    assert held - gone <= set(reported) <= held | came


MODELS = [
    "org/model",
    "org/model-2",
    "org/model2",
    "org/mode",
    "org/model@",
    "ORG/MODEL",
    "org/model/x",
    "o",
    "ü 模",
    "%",
    "%2F",
]


@pytest.mark.parametrize("hub_page", [1, 3, 100])
def test_only_the_model_asked_for_however_much_others_names_look_like_it(hub_page):
    models = [model for model in MODELS if "@" not in model]
    hub = Hub(hub_page, OTHERS)
    for model in models:
        for number in range(3):
            hub.add(mp_key(number, model=model))
            hub.add(mp_key(number, "salt", model=model))

    for model in MODELS:
        reported = pages(hub, 2, model=model)
        wanted = [mp_key(n, salt, model=model) for n in range(3) for salt in ("", "salt")] if model in models else []
        assert reported == in_order(wanted)
    assert len(pages(hub, 7)) == 6 * len(models)
    assert pages(hub, 7, model="") == []


@pytest.mark.parametrize("page_size", [0, -1, 10_001, True, False])
def test_a_page_of_no_possible_size_is_refused(page_size):
    with pytest.raises(ValueError, match="page_size must be 1 to 10000"):
        list_page(Hub(3), None, page_size, None)


def encoded(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "ü",
        "AAAA",
        "\x00",
        encoded(None),
        encoded(3),
        encoded("ab"),
        encoded({"a": 1, "b": 2}),
        encoded([]),
        encoded([None]),
        encoded(["a", None]),
        encoded([1, "b"]),
        encoded([None, "b", "c"]),
        encoded(["a", "b"]) + "!",
        "A" * 100_000,
        encoded(["a" * 20_000, "b"]),
        base64.urlsafe_b64encode(b"[" * 12_000).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
    ids=lambda cursor: repr(cursor[:20]),
)
def test_a_malformed_cursor_is_refused(cursor):
    with pytest.raises(ValueError, match="the cursor is not one that this adapter gave"):
        list_page(Hub(3), None, 10, cursor)


@untimed
@given(st.one_of(any_text, st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode())))
def test_whatever_is_given_as_a_cursor_is_refused_or_taken_and_never_crashes(cursor):
    with contextlib.suppress(ValueError):
        list_page(Hub(3), None, 10, cursor)


# --- cursors over the network ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder():
    with Recorder() as one, pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "hfbucket_plugin.hub.client._wait", lambda _state: 0.0
        )  # what cannot be sent is tried five times
        yield one


def bucket_client(endpoint):
    return open_bucket(instance_settings(endpoint, "o/b", "v1", token="hf_loopback"), "hfbucket", MemorySink(), 9.0)


places = st.one_of(
    any_text,
    st.sampled_from(
        [
            "http://127.0.0.1:9/evil",
            "//127.0.0.1:9/evil",
            "/api/whoami-v2",
            "../../../whoami-v2",
            "?x=1",
            "#fragment",
            "&recursive=false",
            "cursor=x#/../..",
            "a b",
            "a\r\nHost: evil\r\n\r\nGET /evil HTTP/1.1",
            "%2e%2e%2f",
            "@127.0.0.1:9",
            "\\\\127.0.0.1:9\\evil",
            "\ud800",
        ]
    ),
)


@untimed
@given(place=places, after=any_text)
def test_a_crafted_cursor_leads_nowhere_but_to_the_listing_of_this_bucket(recorder, place, after):
    bucket = bucket_client(recorder.endpoint)
    recorder.targets.clear()
    try:
        with contextlib.suppress(ValueError, HFBucketError):
            page = list_page(bucket, "org/model", 10, encoded([place, after]))
            assert page.entries == ()
    finally:
        bucket.close()

    assert len(recorder.targets) <= 5
    for target in recorder.targets:
        method, path = target.split(" ", 1)
        assert method == "GET"
        assert path.split("?")[0].split("#")[0] == "/api/buckets/o/b/tree/v1%2Forg%252Fmodel%2540"


def test_the_cursors_of_a_real_listing_are_taken_by_any_adapter_of_the_bucket(hub_factory):
    hub = hub_factory(page_size=2)
    from huggingface_hub import HfApi

    HfApi(endpoint=hub.endpoint, token=False).create_bucket("o/b")
    keys = in_order([mp_key(number, model="ü x/模 %") for number in range(7)])
    upload(hub.endpoint, "o/b", {f"v1/{encode_name(key_string(key))}": b"x" for key in keys})

    for page_size in (1, 2, 3, 7, 100):
        reported, cursor = [], None
        while True:
            bucket = bucket_client(hub.endpoint)
            try:
                page = list_page(bucket, "ü x/模 %", page_size, cursor)
            finally:
                bucket.close()
            reported += [entry.key.to_object_key() for entry in page.entries]
            assert {entry.size_bytes for entry in page.entries} == {1}
            if (cursor := page.next_page_token) is None:
                break
            assert hub.endpoint not in base64.urlsafe_b64decode(cursor).decode()
        assert reported == keys
