import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc

import httpx2
import pytest

from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.errors import (
    AccessDeniedError,
    BucketMissingError,
    ConfigError,
    DeadlineError,
    HFBucketError,
    RefusedError,
    ThrottledError,
    TransportError,
    UnsentError,
)
from hfbucket_plugin.hub.answers import BodyLimit
from hfbucket_plugin.hub.client import HubClient, retry_after
from localhub.faults import Fault
from tests.support.buckets import SECRET, everything_reported
from tests.support.hubs import Recorder
from tests.support.waiting import in_threads, unused_port

SHORT, LONG = 0.5, 60.0
BOUND = 15.0
"""A call with the SHORT deadline ends before this many seconds, however slow the machine is."""

NO_BUCKET = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Bucket not found: tests/none"}


def client(endpoint, token=None, sink=None):
    return HubClient(
        endpoint,
        instance="hfbucket.test",
        token=lambda: token,
        token_source="the environment variable HF_TEST (token_env)",
        sink=sink or MemorySink(),
    )


def ask(one, bucket, seconds=LONG, **options):
    options = {"route": "paths-info", "attempts": 2, "json": {"paths": ["a"]}} | options
    return one.request("POST", f"/api/buckets/{bucket}/paths-info", deadline=Deadline.after(seconds), **options)


def failure(one, bucket, seconds=LONG, **options):
    with pytest.raises(HFBucketError) as failed:
        ask(one, bucket, seconds, **options).json("paths-info")
    return failed.value


def requests(hub, route="paths-info"):
    return hub.control.counters().route(route).requests


# --- the right error for what happens at the wire ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected", "asked"),
    [
        ({"status": 400}, RefusedError, 1),
        ({"status": 401}, AccessDeniedError, 1),
        ({"status": 403}, AccessDeniedError, 1),
        ({"status": 404, "headers": NO_BUCKET}, BucketMissingError, 1),
        ({"status": 404, "body": "<h1>nginx</h1>"}, TransportError, 2),
        ({"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}}, TransportError, 2),
        ({"status": 408}, TransportError, 2),
        ({"status": 409}, RefusedError, 1),
        ({"status": 413}, RefusedError, 1),
        ({"status": 422}, RefusedError, 1),
        ({"status": 429, "headers": {"Retry-After": "3600"}}, ThrottledError, 1),
        ({"status": 500}, TransportError, 2),
        ({"status": 502, "body": "<html>Bad gateway</html>"}, TransportError, 2),
        ({"status": 503}, TransportError, 2),
        ({"status": 599}, TransportError, 2),
        ({"truncate_at": 0}, TransportError, 2),
        ({"truncate_at": 1}, TransportError, 2),
        ({"reset": True}, TransportError, 2),
        ({"status": 200, "body": "not json"}, TransportError, 1),
        ({"status": 200, "body": ""}, TransportError, 1),
        ({"status": 200, "body": "<!doctype html><html>Sign in to the hotel</html>"}, TransportError, 1),
        ({"status": 200, "body": "[{", "headers": {"Content-Encoding": "gzip"}}, TransportError, 2),
        ({"status": 302, "headers": {"Location": "http://["}}, TransportError, 2),
        ({"status": 302, "headers": {"Location": "gopher://a"}}, TransportError, 2),
    ],
    ids=str,
)
def test_a_fault_is_told_as_what_it_is(hub, bucket, fault, expected, asked):
    hub.control.add_fault(Fault(route="paths-info", **fault))
    tally = MemorySink()

    error = failure(client(hub.endpoint, sink=tally), bucket)

    assert type(error) is expected
    assert "instance 'hfbucket.test': paths-info" in str(error) or "paths-info: the Hub's answer" in str(error)
    assert requests(hub) == asked
    if fault.get("status") != 200 or "headers" in fault:
        assert tally.get(telemetry.HUB_REQUESTS, instance="hfbucket.test", route="paths-info") == asked
        assert tally.get(telemetry.HUB_REQUESTS, outcome=error.kind) == asked


def test_denials_carry_their_status_and_name_where_the_token_came_from(hub, bucket):
    for status in (401, 403):
        hub.control.add_fault(Fault(route="paths-info", status=status, times=1))
        error = failure(client(hub.endpoint, token=SECRET), bucket)
        assert error.status == status
        assert "token_env" in str(error)
        assert "not set" not in str(error)
    hub.control.add_fault(Fault(route="paths-info", status=401))
    assert "HF_TEST (token_env): not set" in str(failure(client(hub.endpoint), bucket))


def test_a_redirect_loop_ends(hub, bucket):
    hub.control.add_fault(
        Fault(route="paths-info", status=307, headers={"Location": f"/api/buckets/{bucket}/paths-info"})
    )

    assert isinstance(failure(client(hub.endpoint), bucket, attempts=1), TransportError)


def test_a_missing_bucket_says_what_to_do(hub):
    error = failure(client(hub.endpoint), "tests/no-such-bucket")

    assert type(error) is BucketMissingError
    assert "create_bucket_if_missing" in str(error)
    assert "bucket_handle" in str(error)


@pytest.mark.parametrize("fault", [{"status": 500}, {"reset": True}, {"truncate_at": 1}], ids=str)
def test_what_fails_once_is_tried_again(hub, bucket, fault):
    hub.control.add_fault(Fault(route="paths-info", times=1, **fault))
    tally = MemorySink()

    assert ask(client(hub.endpoint, sink=tally), bucket).json("paths-info") == []
    assert tally.get(telemetry.HUB_REQUESTS, outcome="transport") == 1
    assert tally.get(telemetry.HUB_REQUESTS, outcome="ok") == 1


def test_one_attempt_is_one_attempt(hub, bucket):
    hub.control.add_fault(Fault(route="paths-info", times=1, status=500))

    failure(client(hub.endpoint), bucket, attempts=1)

    assert requests(hub) == 1


@pytest.mark.parametrize(
    "fault",
    [{"hang": True}, {"trickle_bytes": 1, "trickle_interval_s": 0.3}, {"delay_s": 30.0}],
    ids=str,
)
@pytest.mark.parametrize("attempts", [1, 5])
def test_a_call_ends_at_its_deadline(hub, bucket, fault, attempts):
    hub.control.add_fault(Fault(route="bucket-info", **fault))
    started = time.monotonic()

    with pytest.raises(HFBucketError) as failed:
        client(hub.endpoint).request(
            "GET", f"/api/buckets/{bucket}", route="info", deadline=Deadline.after(SHORT), attempts=attempts
        )

    error = failed.value
    assert time.monotonic() - started < BOUND
    assert type(error) is DeadlineError
    assert "within 0.5 s" in str(error)


def test_headers_that_trickle_in_for_ever_are_not_waited_for():
    def trickle(connection):
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while True:
                connection.sendall(b"x")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: trickle(server.accept()[0]), daemon=True).start()
        one = client(f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        assert isinstance(failure(one, "tests/none", SHORT), DeadlineError)
        assert time.monotonic() - started < BOUND


def test_a_closed_client_sends_nothing(hub, bucket):
    one = client(hub.endpoint)
    one.close()

    assert "is closed" in str(failure(one, bucket))
    assert requests(hub) == 0


def test_a_call_whose_deadline_is_over_asks_nothing(hub, bucket):
    assert type(failure(client(hub.endpoint), bucket, 0)) is UnsentError
    assert requests(hub) == 0


def test_nobody_listens():
    error = failure(client(f"http://127.0.0.1:{unused_port()}"), "a/b")

    assert type(error) is TransportError
    assert "cannot be reached" in str(error)


def test_no_such_host():
    error = failure(client("http://no-such-host.invalid"), "a/b", attempts=1)

    assert type(error) is TransportError


def test_an_answer_without_end_is_not_read_for_ever(hub, bucket, monkeypatch):
    hub.control.add_fault(Fault(route="paths-info", status=200, body="[" + " " * 2000 + "]"))

    error = failure(client(hub.endpoint), bucket, attempts=3, room=BodyLimit(1000, 1))

    assert "longer than 1000 bytes" in str(error)
    assert requests(hub) == 1, "the next answer would be as long"


@contextlib.contextmanager
def raw_server(answer):
    """A server that gives everybody the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def packed(body, status="200 OK", encoding="gzip"):
    data = gzip.compress(body) if encoding == "gzip" else body
    head = (
        f"HTTP/1.1 {status}\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + data


@pytest.mark.parametrize("status", ["200 OK", "500 Oops", "403 No"])
@pytest.mark.parametrize("body", [b"[" + b"{}," * 20_000_000 + b"{}]", b"[" * 60_000_000], ids=["items", "nesting"])
def test_what_is_packed_is_unpacked_no_further_than_was_asked_for(body, status):
    tracemalloc.start()
    try:
        with raw_server(packed(body, status)) as endpoint:
            tracemalloc.reset_peak()
            failure(client(endpoint), "a/b", attempts=1)
            peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < len(body) + 5_000_000, "the body is the test's own"


def test_answers_that_are_packed_are_read():
    with raw_server(packed(b'[{"path": "a"}]')) as endpoint:
        assert ask(client(endpoint), "a/b").json("x") == [{"path": "a"}]
    with raw_server(packed(b"[]")[:-3]) as endpoint:
        assert isinstance(failure(client(endpoint), "a/b", attempts=1), TransportError)
    with raw_server(packed(b"[]", encoding="br")) as endpoint:
        assert "which was not asked for" in str(failure(client(endpoint), "a/b", attempts=1))


@pytest.mark.parametrize("status", [401, 403, 404, 500])
@pytest.mark.parametrize("body", ["[" * 100_000 + "]" * 100_000, '{"error":' * 50_000, '{"error": "' + "x" * 100_000])
def test_errors_with_bodies_of_any_nesting_are_told_as_what_they_are(hub, bucket, status, body):
    hub.control.add_fault(Fault(route="paths-info", status=status, body=body))

    error = failure(client(hub.endpoint), bucket, attempts=1)

    assert str(status) in str(error)
    assert len(str(error)) < 1000


BAD_HOSTS = (
    "http://xn--a-\u0378.com",
    f"http://{'a' * 64}.com",
    "http://\u2e3a.example",
    "http://a..b",
    "http://[::1",
    "http://a:99999",
)


@pytest.mark.parametrize("host", BAD_HOSTS, ids=ascii)
def test_hosts_that_are_none_are_one_line(hub, bucket, monkeypatch, host):
    resolve = socket.getaddrinfo

    def no_name_server(name, *arguments, **more):
        if name == "127.0.0.1":
            return resolve(name, *arguments, **more)
        name.encode("idna")  # as the real one does
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    error = failure(client(host), "a/b", attempts=1)
    assert isinstance(error, (ConfigError, TransportError))
    assert "\n" not in str(error)

    if host.isascii():
        hub.control.add_fault(Fault(route="paths-info", status=307, headers={"Location": f"{host}/x"}))
        assert "redirects to" in str(failure(client(hub.endpoint), bucket, attempts=1))


def test_a_redirect_on_the_same_host_is_followed_with_its_method(hub, bucket):
    path = f"/api/buckets/{bucket}/paths-info"
    hub.control.add_fault(Fault(route="paths-info", status=308, times=1, headers={"Location": path}))
    assert ask(client(hub.endpoint), bucket).json("paths-info") == []

    hub.control.add_fault(Fault(route="paths-info", status=302, times=1, headers={"Location": path}))
    assert "answered 302 to a POST" in str(failure(client(hub.endpoint), bucket, attempts=1))


@pytest.mark.parametrize(
    ("variable", "value", "reported"),
    [
        ("ALL_PROXY", "socks5://user:secret-of-mine@127.0.0.1:9", "ALL_PROXY names a SOCKS proxy"),
        ("https_proxy", "foo://secret-of-mine", "https_proxy names a proxy that cannot be used"),
        ("SSL_CERT_FILE", "/opt/gone/cacert.pem", "SSL_CERT_FILE names '/opt/gone/cacert.pem'"),
    ],
)
def test_an_environment_that_forbids_requests_is_told_by_its_variable(  # noqa: PLR0917 - fixtures and parameters
    hub, bucket, monkeypatch, variable, value, reported
):
    def no_client():
        if variable == "ALL_PROXY":
            raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed")
        return httpx2.Client()

    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("hfbucket_plugin.hub.client.get_session", no_client)

    error = failure(client(hub.endpoint), bucket, attempts=1)

    assert type(error) is ConfigError
    assert reported in str(error)
    assert "secret-of-mine" not in everything_reported(error)
    if "PROXY" in variable.upper():
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert ask(client(hub.endpoint), bucket).json("paths-info") == []


def test_attempts_that_end_in_a_pause_are_none(hub, bucket):
    hub.control.add_fault(Fault(route="paths-info", status=429, times=4, headers={"Retry-After": "0"}))

    assert ask(client(hub.endpoint), bucket, attempts=1).json("paths-info") == []
    assert requests(hub) == 5


def test_an_urgent_call_is_made_in_a_pause(hub, bucket):
    one = client(hub.endpoint)
    one.rate_limiter.observe(429, {"retry-after": "300"})

    assert type(failure(one, bucket, patient=False)) is ThrottledError
    assert ask(one, bucket, urgent=True).json("paths-info") == []


def test_offline_mode_is_told(hub, bucket, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert "HF_HUB_OFFLINE" in str(failure(client(hub.endpoint), bucket, attempts=1))


def test_a_client_that_was_closed_under_the_request_is_no_crash(hub, bucket, monkeypatch):
    closed = httpx2.Client()
    closed.close()
    monkeypatch.setattr("hfbucket_plugin.hub.client.get_session", lambda: closed)

    assert type(failure(client(hub.endpoint), bucket, attempts=1)) is TransportError


def test_a_status_that_is_allowed_is_an_answer(hub, bucket):
    hub.control.add_fault(Fault(route="paths-info", status=409, body="{}"))
    tally = MemorySink()

    answer = ask(client(hub.endpoint, sink=tally), bucket, allow=frozenset({409}))

    assert answer.status == 409
    assert tally.get(telemetry.HUB_REQUESTS, outcome="ok") == 1


# --- throttling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 7 "}, 7),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "1.5"}, None),
        ({"Retry-After": "\xb2"}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "7"}, 55),
        ({"RateLimit": '"api";r=3;t=55', "Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"RateLimit": "nonsense"}, None),
    ],
    ids=str,
)
def test_what_a_429_asks_to_wait(headers, seconds):
    assert retry_after({name.lower(): value for name, value in headers.items()}) == seconds


def test_throttling_beyond_the_deadline_is_told_at_once(hub, bucket):
    hub.control.add_fault(Fault(route="paths-info", status=429, headers={"Retry-After": "3600"}))

    error = failure(client(hub.endpoint), bucket, LONG, attempts=5)

    assert error.retry_after == 3600
    assert "it asks to wait 3600 s" in str(error)
    assert requests(hub) == 1


def test_throttling_within_the_deadline_is_waited_for(hub, bucket):
    hub.control.add_fault(Fault(route="paths-info", status=429, times=1, headers={"Retry-After": "1"}))
    started = time.monotonic()

    assert ask(client(hub.endpoint), bucket).json("paths-info") == []
    assert time.monotonic() - started >= 1
    assert requests(hub) == 2


# --- tokens --------------------------------------------------------------------------------------------------------------


def test_the_token_is_sent_and_asked_for_each_time():
    tokens = iter(["first", "second", None])
    with Recorder() as somebody:
        one = client(somebody.endpoint)
        one._token = lambda: next(tokens)
        for _ in range(3):
            one.request("GET", "/x", route="x", deadline=Deadline.after(LONG))

    assert [headers.get("authorization") for headers in somebody.seen] == ["Bearer first", "Bearer second", None]


def test_no_token_of_the_machine_is_sent_instead(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "token").write_text("hf_of_the_machine")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_machine")
    with Recorder() as somebody:
        client(somebody.endpoint).request("GET", "/x", route="x", deadline=Deadline.after(LONG))

    assert "authorization" not in somebody.seen[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_host_is_not_followed(hub, bucket, status):
    with Recorder() as somebody:
        hub.control.add_fault(
            Fault(route="paths-info", status=status, headers={"Location": f"{somebody.endpoint}/caught"})
        )
        error = failure(client(hub.endpoint, token=SECRET), bucket, attempts=1)

    assert somebody.seen == []
    assert "name it in endpoint or HF_ENDPOINT" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "{other}/api",
        "//{other_host}/api",
        "http://[",
        "{hub}@{other_host}/api",
        "{hub}.evil.invalid/api",
        "https://{hub_host}/api",
        "file:///etc/passwd",
        "",
        "api/buckets",
        "{hub_host}/api",
    ],
)
def test_an_address_on_another_host_is_not_asked(hub, url):
    with Recorder() as somebody:
        names = {
            "other": somebody.endpoint,
            "other_host": somebody.endpoint.removeprefix("http://"),
            "hub": hub.endpoint,
            "hub_host": hub.endpoint.removeprefix("http://"),
        }
        with pytest.raises(HFBucketError):
            client(hub.endpoint, token=SECRET).request(
                "GET", url.format(**names), route="tree", deadline=Deadline.after(LONG)
            )

    assert somebody.seen == []


# Where in the answer a server repeats the token.
ECHOES = {
    "body": {"body": f"who is {SECRET}?"},
    "long body": {"body": "x" * 280 + SECRET},
    "longer body": {"body": "x" * 299 + SECRET},
    "json": {"body": json.dumps({"error": f"bad token {SECRET}"})},
    "long json": {"body": json.dumps({"error": "y" * 270 + f" {SECRET} " + SECRET})},
    "header": {"headers": {"X-Error-Message": f"bad token {SECRET}"}},
    "long header": {"headers": {"X-Error-Message": "z" * 275 + SECRET}},
    "code": {"headers": {"X-Error-Code": SECRET}},
    "html": {"body": f"<pre>Authorization: Bearer {SECRET}</pre>"},
}


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_a_token_that_the_server_repeats_is_in_no_error(hub, bucket, status, echo):
    hub.control.add_fault(Fault(route="paths-info", status=status, **echo))

    reported = everything_reported(failure(client(hub.endpoint, token=SECRET), bucket, attempts=1, patient=False))

    assert SECRET[:10] not in reported


@pytest.mark.parametrize(
    "token",
    [
        f"{SECRET}\nX-Injected: yes",
        f"{SECRET}\n{SECRET}",
        f"{SECRET}\x00",
        f"{SECRET}\x7f",
        f"{SECRET}ü",
        f"{SECRET}\u2028",
        f"“{SECRET}”",
    ],
)
def test_a_token_that_no_header_takes_is_told_and_not_shown(hub, bucket, token):
    error = failure(client(hub.endpoint, token=token), bucket)

    assert type(error) is ConfigError
    assert "HF_TEST (token_env)" in str(error)
    assert SECRET not in everything_reported(error)
    assert requests(hub) == 0


def test_a_client_does_not_show_its_token(hub):
    one = client(hub.endpoint, token=SECRET)

    assert SECRET not in repr(one)
    assert SECRET not in str(vars(one))


def test_many_threads_share_a_client(hub, bucket):
    one = client(hub.endpoint)

    answers = in_threads(16, lambda _number: ask(one, bucket).json("paths-info"))

    assert answers == [[]] * 16
