import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmcache.v1.storage_backend.connector.hfbucket_connector import parse_hfbucket_handle

from hfbucket_plugin.core.keys import RESERVED, BucketHandle, same_endpoint
from hfbucket_plugin.errors import ConfigError
from tests.support.models import untimed

VALID = {
    "hf://buckets/my-org/lmcache-kv": ("my-org", "lmcache-kv", ""),
    "hf://buckets/my-org/lmcache-kv/": ("my-org", "lmcache-kv", ""),
    "hf://buckets/my-org/lmcache-kv/prod": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets/my-org/lmcache-kv/prod/": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets//my-org///lmcache-kv//a//b//": ("my-org", "lmcache-kv", "a/b"),
    "  hf://buckets/my-org/lmcache-kv/prod \n": ("my-org", "lmcache-kv", "prod"),
    "hf://buckets/A_1/b.c-d/v1": ("A_1", "b.c-d", "v1"),
    "hf://buckets/o/b/with space/ü%2F#?": ("o", "b", "with space/ü%2F#?"),
    "hf://buckets/o/b/.hidden": ("o", "b", ".hidden"),
}

INVALID = [
    "",
    "my-org/lmcache-kv",
    "hf://my-org/lmcache-kv",
    "hf:/buckets/my-org/lmcache-kv",
    "https://huggingface.co/buckets/my-org/lmcache-kv",
    "HF://buckets/o/b",
    "hf://buckets",
    "hf://buckets/",
    "hf://buckets//",
    "hf://buckets/only-a-namespace",
    "hf://buckets/o/b?x=1",
    "hf://buckets/o/b#x",
    "hf://buckets/o o/b",
    "hf://buckets/o/-b",
    "hf://buckets/o/b-",
    "hf://buckets/o/.b",
    "hf://buckets/o/a--b",
    "hf://buckets/o/a..b",
    "hf://buckets/../b",
    "hf://buckets/o/" + "b" * 97,
    "hf://buckets/o/ü",
    "hf://buckets/o/b/..",
    "hf://buckets/o/b/a/../c",
    "hf://buckets/o/b/./c",
    f"hf://buckets/o/b/{RESERVED}",
    f"hf://buckets/o/b/prod/{RESERVED}/x",
    "hf://buckets/o/b/a\nb",
    "hf://buckets/o/b/a\x00",
]

prefixes = st.lists(
    st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1).filter(
        lambda part: part not in {".", "..", RESERVED}
    ),
    max_size=3,
).map("/".join)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize(("text", "parts"), VALID.items())
def test_a_valid_handle_is_read_as_lmcache_reads_it(text, parts):
    handle = BucketHandle.parse(text)
    theirs = parse_hfbucket_handle(text)

    assert (handle.namespace, handle.bucket, handle.prefix) == parts
    assert (handle.bucket_id, handle.prefix) == (theirs.bucket_id, theirs.object_prefix)
    assert BucketHandle.parse(str(handle)) == handle


@pytest.mark.parametrize("text", INVALID)
def test_what_is_no_handle_is_refused_with_a_message_that_quotes_it(text):
    with pytest.raises(ConfigError) as refused:
        BucketHandle.parse(text)

    assert repr(text) in str(refused.value)
    assert "\n" not in str(refused.value)


@untimed
@given(prefixes, names)
def test_relative_undoes_join(prefix, name):
    handle = BucketHandle("o", "b", prefix)

    assert handle.relative(handle.join(name)) == name
    assert BucketHandle.parse(str(handle)) == handle


@untimed
@given(prefixes.filter(bool), names)
def test_relative_never_takes_a_longer_or_shorter_prefix_for_its_own(prefix, name):
    handle = BucketHandle("o", "b", prefix)

    assert handle.relative(f"{prefix}0/{name}") is None
    assert handle.relative(prefix) is None
    assert handle.relative(f"x{prefix}/{name}") is None


def test_v1_is_not_v10():
    v1 = BucketHandle.parse("hf://buckets/o/b/v1")
    v10 = BucketHandle.parse("hf://buckets/o/b/v10")

    assert v1.relative(v10.join("k")) is None
    assert v10.relative(v1.join("k")) is None
    assert v1.relative("v1/k") == "k"
    assert v1.relative("v1") is None


def test_without_a_prefix_every_path_is_below():
    handle = BucketHandle.parse("hf://buckets/o/b")

    assert handle.join("k") == "k"
    assert handle.relative("a/b") == "a/b"


def test_the_case_of_namespaces_and_buckets_does_not_matter_that_of_prefixes_does():
    one, other = (BucketHandle.parse(f"hf://buckets/{text}") for text in ("Acme/KV-1/eu", "acme/kv-1/eu"))

    assert one == other
    assert len({one, other}) == 1
    assert str(one) != str(other), "what was written is shown"
    assert one != BucketHandle.parse("hf://buckets/acme/kv-1/EU")
    assert one != "hf://buckets/acme/kv-1/eu"
    assert one.same_bucket(BucketHandle.parse("hf://buckets/ACME/kv-1"))
    assert not one.same_bucket(BucketHandle.parse("hf://buckets/acme/kv-2/eu"))


def test_a_handle_in_a_bucket_of_another_name_keeps_its_prefix():
    assert str(BucketHandle.parse("hf://buckets/a/b/eu/x").within("c/d")) == "hf://buckets/c/d/eu/x"
    with pytest.raises(ConfigError):
        BucketHandle.parse("hf://buckets/a/b/eu").within("../x")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://huggingface.co", "https://HuggingFace.co/", True),
        ("https://huggingface.co", "https://huggingface.co:443", True),
        ("HTTP://hub.example.", "http://hub.example:80//", True),
        ("http://[::1]:8080/hub/", "http://[::1]:8080/hub", True),
        ("https://huggingface.co", "http://huggingface.co", False),
        ("https://huggingface.co", "https://huggingface.co:8443", False),
        ("https://huggingface.co", "https://hub.huggingface.co", False),
        ("http://proxy/one", "http://proxy/two", False),
    ],
)
def test_addresses_of_one_hub(one, other, same):
    assert same_endpoint(one, other) is same
