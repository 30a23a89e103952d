import textwrap

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketBatchError, BucketNotFoundError, HfHubHTTPError

from localhub.http.access import TokensError, load_tokens
from tests.support.hubs import EMPTY, Raw, add_file, make_shard, make_xorb, upload_by_hand

TOKENS = """
tokens:
  - token: hf_owner
    user: my-org
    buckets: {"my-org/*": write, "other/*": write}
  - token: hf_reader
    buckets: {"my-org/*": read, "my-org/scratch": write}
  - token: hf_stranger
    buckets: {"elsewhere/*": write}
"""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    from tests.support.hubs import start_on_fresh_port

    root = tmp_path_factory.mktemp("guarded")
    (root / "tokens.yaml").write_text(TOKENS)
    with start_on_fresh_port(root / "hub", tokens=root / "tokens.yaml") as running:
        owner = HfApi(endpoint=running.endpoint, token="hf_owner")
        for name, private in [("my-org/private", True), ("my-org/public", False), ("my-org/scratch", True)]:
            owner.create_bucket(name, private=private)
            owner.batch_bucket_files(name, add=[(name.encode(), "name")])
        owner.create_bucket("other/one", private=True)
        yield running


def status(guarded, token: str | None, method: str, path: str, body: object = None) -> tuple[int, str | None]:
    answer = Raw(guarded.endpoint, token).call(method, path, body)
    return answer.status, answer.headers["X-Error-Code"]


FINE, HIDDEN, ANONYMOUS, UNKNOWN = (200, None), (404, "RepoNotFound"), (401, "RepoNotFound"), (401, None)
READS = ["", "/tree", "/xet-read-token"]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    ("token", "private", "public"),
    [
        ("hf_owner", FINE, FINE),
        ("hf_reader", FINE, FINE),
        ("hf_stranger", HIDDEN, FINE),
        (None, ANONYMOUS, FINE),
        ("hf_made_up", UNKNOWN, UNKNOWN),
    ],
)
def test_who_may_read(guarded, token, private, public, read):
    assert status(guarded, token, "GET", f"/api/buckets/my-org/private{read}") == private
    assert status(guarded, token, "GET", f"/api/buckets/my-org/public{read}") == public
    missing = status(guarded, token, "GET", f"/api/buckets/my-org/missing{read}")
    assert missing == (private if private != FINE else HIDDEN)


@pytest.mark.parametrize(
    ("token", "private", "public", "scratch"),
    [
        ("hf_owner", FINE, FINE, FINE),
        ("hf_reader", (403, None), (403, None), FINE),
        ("hf_stranger", HIDDEN, (403, None), HIDDEN),
        (None, ANONYMOUS, (401, None), ANONYMOUS),
        ("hf_made_up", UNKNOWN, UNKNOWN, UNKNOWN),
    ],
)
def test_who_may_write(guarded, token, private, public, scratch):
    for name, expected in [("private", private), ("public", public), ("scratch", scratch)]:
        path = f"/api/buckets/my-org/{name}"
        assert status(guarded, token, "GET", f"{path}/xet-write-token") == expected
        assert status(guarded, token, "POST", f"{path}/batch", add_file("empty")) == expected
        assert status(guarded, token, "PUT", f"{path}/settings", {"private": name != "public"}) == expected


def test_who_may_create_and_delete(guarded):
    for token, method, expected in [
        ("hf_reader", "POST", 403),
        (None, "POST", 401),
        ("hf_owner", "POST", 200),
        ("hf_reader", "DELETE", 403),
        ("hf_owner", "DELETE", 204),
    ]:
        assert status(guarded, token, method, "/api/buckets/my-org/new", {}) == (expected, None)


def test_refusals_as_the_clients_raise_them(guarded):
    for token, error, text in [
        ("hf_stranger", BucketNotFoundError, None),
        (False, BucketNotFoundError, None),
        ("hf_made_up", HfHubHTTPError, "Invalid credentials in Authorization header"),
    ]:
        with pytest.raises(error, match=text):
            HfApi(endpoint=guarded.endpoint, token=token).bucket_info("my-org/private")
    reader = HfApi(endpoint=guarded.endpoint, token="hf_reader")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden: this token has no write access to my-org/public"):
        reader.batch_bucket_files("my-org/public", delete=["name"])
    assert reader.create_bucket("my-org/public", exist_ok=True).bucket_id == "my-org/public"


def test_lists_show_the_buckets_that_the_caller_may_see(guarded):
    everything = ["my-org/private", "my-org/public", "my-org/scratch"]
    for token, namespace, expected in [
        ("hf_owner", None, everything),
        ("hf_reader", "my-org", everything),
        ("hf_reader", None, []),
        ("hf_stranger", "my-org", ["my-org/public"]),
        (False, "my-org", ["my-org/public"]),
    ]:
        shown = HfApi(endpoint=guarded.endpoint, token=token).list_buckets(namespace)
        assert [bucket.id for bucket in shown] == expected


def test_copies_need_a_right_on_the_source(guarded):
    owner, reader = (HfApi(endpoint=guarded.endpoint, token=token) for token in ("hf_owner", "hf_reader"))
    owner.batch_bucket_files("other/one", add=[(b"secret content", "secret")])
    (digest,) = (file.xet_hash for file in owner.get_bucket_paths_info("other/one", ["secret"]))
    with pytest.raises(BucketBatchError, match="Bucket not found: other/one"):
        reader.batch_bucket_files("my-org/scratch", copy=[("bucket", "other/one", digest, "stolen")])
    owner.batch_bucket_files("my-org/private", copy=[("bucket", "other/one", digest, "given")])
    reader.batch_bucket_files("my-org/scratch", copy=[("bucket", "my-org/private", digest, "taken")])


def test_a_hash_gives_no_access_to_the_bytes_of_others(guarded):
    owner, reader = Raw(guarded.endpoint, "hf_owner"), Raw(guarded.endpoint, "hf_reader")
    chunks = [b"another secret content"]
    digest = upload_by_hand(owner, "other/one", chunks)
    assert owner.reconstruct(digest, owner.storage_token("other/one", "read")).status == 200
    mine = reader.storage_token("my-org/scratch")

    def statuses() -> tuple[int, int]:
        add = reader.batch("my-org/scratch", add_file("stolen", digest))
        return add.status, reader.reconstruct(digest, mine).status

    assert statuses() == (422, 404)
    # A caller that has the content may use the hash.
    upload_by_hand(reader, "my-org/scratch", chunks)
    assert statuses() == (200, 200)


def test_storage_tokens_are_scoped_and_cannot_be_forged(guarded):
    raw = Raw(guarded.endpoint, "hf_owner")
    body, xorb = make_xorb([b"scoped"])
    read, write = raw.storage_token("other/one", "read"), raw.storage_token("other/one", "write")
    for headers in (read, write):
        assert "hf_owner" not in headers["Authorization"]
    assert raw.post_xorb(xorb, body, read).status == 403
    assert raw.call("POST", "/v1/shards", make_shard(xorb, [b"scoped"])[0], read).status == 403
    forged = {"Authorization": write["Authorization"][:-1] + ("A" if write["Authorization"][-1] != "A" else "B")}
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer hf_owner"}, {"Authorization": "Bearer ü"}, forged):
        assert raw.post_xorb(xorb, body, headers).status == 401
        assert raw.reconstruct(EMPTY, headers).status == 401
        assert raw.call("GET", f"/v1/chunks/default/{EMPTY}", headers=headers).status == 401
    assert raw.post_xorb(xorb, body, write).status == 200
    assert raw.call("GET", f"/v1/chunks/default/{EMPTY}", headers=read).status == 404


def test_storage_tokens_and_links_expire(hub_factory):
    raw = Raw(hub_factory(cas_token_ttl_s=-10).endpoint)
    raw.call("POST", "/api/buckets/short/lived", {})
    answer = raw.call("GET", "/api/buckets/short/lived/xet-read-token")
    assert answer.headers["X-Xet-Access-Token"] == answer.json["accessToken"]
    assert answer.headers["X-Xet-Token-Expiration"] == str(answer.json["exp"])
    assert answer.headers["X-Xet-Cas-Url"] == answer.json["casUrl"] == raw.endpoint
    expired = raw.reconstruct(EMPTY, raw.storage_token("short/lived"))
    assert (expired.status, "expired" in expired.error) == (401, True)
    raw.batch("short/lived", add_file("x"))
    location = raw.call("HEAD", "/buckets/short/lived/resolve/x").headers["Location"]
    link = raw.call("GET", "/file-data/" + location.rpartition("/")[2])
    assert (link.status, "expired" in link.error) == (403, True)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "tokens.yaml: Input should be a valid dictionary"),
        ("tokens: {", "is not valid YAML: line"),
        ("tokens: " + "[" * 5000, "is not valid YAML"),
        ("tokens: [{token: a, buckets: {x/y: read, x/y: write}}]", "is not valid YAML: line 1, column 42"),
        ("tokens: !!int zzz", "is not valid YAML"),
        ("token: []", "tokens: Field required; token: Extra inputs"),
        ("tokens: [{token: a}]", r"tokens\[0\].buckets: Field required"),
        ("tokens: [{token: '', buckets: {}}]", r"tokens\[0\].token"),
        ("tokens: [{token: a, buckets: {}, rights: 1}]", r"tokens\[0\].rights: Extra inputs"),
        ("tokens: [{token: a, buckets: {}}, {token: b, buckets: {x/y: all}}]", r"tokens\[1\].buckets.x/y: .*'write'"),
        ("tokens: [{token: a, buckets: {x: read}}]", r"tokens\[0\].buckets: .*'x' is not of the form namespace/name"),
        ("tokens: [{token: a, buckets: {}}, {token: a, buckets: {}}]", r"tokens\[1\]: duplicate token"),
    ],
)
def test_a_wrong_tokens_file_names_the_entry(tmp_path, content, complaint):
    path = tmp_path / "tokens.yaml"
    path.write_text(content)
    with pytest.raises(TokensError, match=complaint) as refused:
        load_tokens(path)
    assert str(path) in str(refused.value)


def test_secrets_stay_out_of_messages_and_reprs(tmp_path):
    path = tmp_path / "tokens.yaml"
    for content in ("tokens: [{token: hf_secret, buckets: {x: read}}]", 'tokens: [{token: "hf_secret]'):
        path.write_text(content)
        with pytest.raises(TokensError) as refused:
            load_tokens(path)
        assert "hf_secret" not in str(refused.value)
    path.write_text(textwrap.dedent(TOKENS))
    assert "hf_owner" not in repr(load_tokens(path)["hf_owner"])
