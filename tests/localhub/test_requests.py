"""Requests that the Hub refuses, whatever it holds."""

import pytest

from localhub.http.storage_routes import MAX_XORB_BODY_BYTES
from tests.support.hubs import EMPTY, add_file

NEW, BATCH, PATHS, FAULTS = (
    "/api/buckets/orders/one",
    "/api/buckets/{}/batch",
    "/api/buckets/{}/paths-info",
    "/_control/faults",
)


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        (NEW, b"{", "Invalid JSON"),
        (NEW, b"[]", "object"),
        (NEW, b'{"region": "moon"}', "unknown region 'moon'"),
        (NEW, b'{"visibility": "hidden"}', "visibility"),
        *(
            (f"/api/buckets/names/{name}", {}, "invalid bucket name")
            for name in ("-x", "x-", "a..b", "a%20b", "a" * 97, "%C3%BC")
        ),
        *((PATHS, body, "paths") for body in ({}, {"paths": "a"}, {"paths": [1]}, {"paths": ["a"] * 1001})),
        (BATCH, b"", "no operation"),
        (BATCH, b"\n \n", "no operation"),
        (BATCH, b"{", "line 1 of the batch: Invalid JSON"),
        (BATCH, b'{"type": "deleteFile", "path": "x"}\n7', "line 2 of the batch"),
        (BATCH, b'{"type": "moveFile", "path": "x"}', "line 1 of the batch"),
        (BATCH, b'{"type": "addFile", "path": "x"}', "xetHash"),
        (BATCH, b'{"type": "addFile", "path": 1, "xetHash": ""}', "path"),
        (BATCH, b'{"type": "addFile", "path": "\\ud800", "xetHash": ""}', "hex escape"),
        (BATCH, b'{"type": "addFile", "path": "x", "xetHash": "", "mtime": 1e30}', "mtime"),
        (BATCH, b"\xff", "line 1 of the batch: Invalid JSON"),
        (FAULTS, b"{", "Invalid JSON"),
    ],
)
def test_malformed_requests_are_refused_whole(raw, bucket, path, body, complaint):
    raw.batch(bucket, add_file("x"))
    answer = raw.call("POST", path.format(bucket), body)
    assert (answer.status, complaint in answer.error) == (400, True)
    assert raw.info(bucket).json["totalFiles"] == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "segment ''"),
        ("/absolute", "segment ''"),
        ("a//b", "segment ''"),
        ("a/", "segment ''"),
        ("../up", "segment '..'"),
        ("a/../../b", "segment '..'"),
        ("a/./b", "segment '.'"),
        ("nul\0", "NUL"),
        ("x" * 1025, "1025 bytes"),
        ("ü" * 513, "1026 bytes"),
    ],
)
def test_invalid_paths_are_refused(raw, bucket, path, reason):
    answer = raw.batch(bucket, add_file(path))
    assert (answer.status, answer.json["succeeded"]) == (422, 0)
    assert reason in answer.json["failed"][0]["error"]


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        (f"/v1/xorbs/default/{EMPTY}", MAX_XORB_BODY_BYTES),
        ("/v1/shards", 64 * 1024 * 1024),
        (BATCH, 16 * 1024 * 1024),
        (PATHS, 16 * 1024 * 1024),
    ],
)
def test_bodies_that_are_too_long(raw, bucket, path, limit):
    answer = raw.call("POST", path.format(bucket), bytes(limit + 1), raw.storage_token(bucket))
    assert answer.status == 413
    assert f"limit of {limit} bytes" in answer.error


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/api/agent-harnesses"), ("POST", "/api/telemetry/x"), ("POST", "/v2/shards"), ("GET", "/")],
)
def test_what_clients_probe_for_is_a_quick_404(hub, raw, method, path):
    answer = raw.call(method, path)
    assert (answer.status, path in answer.error) == (404, True)
    assert hub.control.counters().route("unknown").requests == 1
