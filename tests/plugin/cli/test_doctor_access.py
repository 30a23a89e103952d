"""`doctor` and tokens: none, wrong ones, and those that may only read."""

import pytest
from huggingface_hub import HfApi

from localhub.faults import Fault
from tests.support.buckets import CHECKS, HEAD, NEEDS_HUB, PREFIX, SECRET, TOKEN_ENV, Desk, well_kept


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A Hub where one token may write, one may read, and nobody else may do anything."""
    from tests.support.hubs import start_on_fresh_port

    root = tmp_path_factory.mktemp("guarded")
    (root / "tokens.yaml").write_text(
        "tokens:\n"
        f"- {{token: {SECRET}, buckets: {{'org/*': write}}}}\n"
        "- {token: hf_the-reader-of-it, buckets: {'org/*': read}}\n"
        "- {token: hf_a-stranger-to-it, buckets: {'other/*': write}}\n"
    )
    with start_on_fresh_port(root / "hub", tokens=root / "tokens.yaml") as running:
        api = HfApi(endpoint=running.endpoint, token=SECRET)
        api.create_bucket("org/private", private=True)
        api.batch_bucket_files("org/private", add=[(b"x" * 100, f"{PREFIX}/org%2Fmodel%402%400%40ab%40half")])
        yield running


@pytest.fixture
def private(guarded, tmp_path):
    return Desk(guarded.endpoint, "org/private", tmp_path)


def test_the_right_token(private):
    ran = private.doctor()

    assert ran.code == 0
    assert ran.severities() == dict.fromkeys(CHECKS, "ok") | {"clock": "note"}


def test_no_token(private, monkeypatch):
    monkeypatch.delenv(TOKEN_ENV)
    ran = private.doctor()

    assert ran.code == 3
    assert ran.reported("token") == (
        f"warning: no token: the environment variable {TOKEN_ENV} is not set here; only public buckets can be read; "
        f"set {TOKEN_ENV}, or name another variable with {HEAD}token_env"
    )
    assert ran.findings["endpoint"]["severity"] == "ok"
    assert ran.reported("bucket").startswith("error: info: the Hub answered 401")
    assert f"{HEAD}token_env" in ran.reported("bucket")
    assert ran.skipped == {"right to read", "right to write", "listing", "throughput", "records", "fingerprint"}


def test_a_wrong_token(private, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, "hf_this-one-is-wrong")
    ran = private.doctor()

    assert ran.code == 3
    assert "hf_this-one-is-wrong" not in ran.stdout
    assert ran.findings["token"]["severity"] == "ok"
    assert "401" in ran.reported("bucket")
    assert f"{TOKEN_ENV} (token_env); set one that is valid" in ran.reported("bucket")


def test_a_token_that_may_not_see_the_bucket(private, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, "hf_a-stranger-to-it")
    ran = private.doctor()

    assert ran.code == 3
    assert "404" in ran.reported("bucket")
    assert f"look at {HEAD}bucket_handle, and at what its token may see" in ran.reported("bucket")


def test_a_token_that_may_only_read(private, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, "hf_the-reader-of-it")
    ran = private.doctor("--probe-write")

    assert ran.code == 3
    assert ran.severities() == dict.fromkeys(CHECKS, "ok") | {
        "clock": "note",
        "right to write": "error",
        "probe": "note",
    }
    reported = ran.reported("right to write")
    assert "denied, so nothing can be stored" in reported
    assert "403" in reported
    assert (
        f"give the token of {TOKEN_ENV} ({HEAD}token_env) the right to write, or set {HEAD}role to read-only"
        in reported
    )
    assert ran.findings["probe"]["found"] == "skipped: the right to write is not there"


def test_a_token_that_may_only_read_and_need_not_write(private, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, "hf_the-reader-of-it")
    private.settings["role"] = "read-only"
    ran = private.doctor()

    assert ran.code == 0
    assert ran.reported("right to write") == "ok: not granted, and not needed: role is read-only; "


def test_a_token_that_cannot_be_sent(private, monkeypatch):
    monkeypatch.setenv(TOKEN_ENV, f"{SECRET}\n{SECRET}")
    ran = private.doctor("--probe-write")

    assert ran.code == 3
    assert "cannot be sent" in ran.reported("token")
    assert ran.skipped == {*NEEDS_HUB, "probe"}


def test_a_token_in_the_configuration(private, monkeypatch):
    monkeypatch.delenv(TOKEN_ENV)
    private.settings["token"] = SECRET
    ran = private.doctor()

    assert ran.code == 1
    assert ran.findings["token"]["severity"] == "warning"
    assert f"{HEAD}token: LMCache logs its configuration" in ran.reported("token")


def test_a_server_that_repeats_the_token_is_not_repeated(hub, bucket, tmp_path):
    desk = Desk(hub.endpoint, bucket, tmp_path)
    hub.control.add_fault(Fault(route="tree", status=403, body=f"you sent {SECRET}"))
    ran = desk.doctor()  # `run` looks for the token in everything

    assert "***" in ran.reported("listing")
