import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead

import pytest
from huggingface_hub.errors import BucketBatchError
from pydantic import ValidationError

from localhub.client import ControlError
from localhub.faults.rules import Fault, FaultBook
from localhub.state.counters import RouteCounters
from tests.support.hubs import add_file, upload_by_hand


@pytest.fixture
def xorb(raw, bucket):
    """Path of a xorb's bytes, and those bytes."""
    path = raw.xorb_link(bucket, upload_by_hand(raw, bucket, [bytes([one]) * 10_000 for one in range(100)]))
    return path, raw.call("GET", path).body


@pytest.mark.parametrize("field", ["path_regex", "items_regex"])
def test_an_expression_that_takes_too_long_is_ignored(field, caplog):
    slow = Fault(items="", **{field: rf"^(\w|\w\w|{field})*$"})
    path = "a" * 60 + "!"

    for _ in range(2):
        assert not (slow.matches("tree", "GET", path) and slow.refuses(path))

    pattern = slow.path_regex or slow.items_regex
    assert caplog.messages == [f"ignoring the regular expression {pattern!r}: a search took over 0.1 s"]


@pytest.mark.parametrize(
    ("request_", "matches"),
    [
        (("tree", "GET", "/api/buckets/ns/name/tree/v1"), True),
        (("batch", "GET", "/api/buckets/ns/name/tree/v1"), False),
        (("tree", "HEAD", "/api/buckets/ns/name/tree/v1"), False),
        (("tree", "GET", "/api/buckets/other/name/tree/v1"), False),
        (("tree", "GET", "/api/buckets/ns/name/tree/v1/x"), False),
    ],
)
def test_which_requests_a_fault_matches(request_, matches):
    fault = Fault(route="tree", method="get", path="/ns/", path_regex="v1.?$", reset=True)
    assert fault.matches(*request_) == matches
    assert Fault(delay_s=1).matches(*request_)


def test_the_first_fault_wins_and_delays_add_up():
    book = FaultBook()
    first = book.add(Fault(status=500, times=2))
    every = book.add(Fault(delay_s=0.5))
    second = book.add(Fault(status=404, delay_s=0.25))
    chosen = [book.choose("tree", "GET", "/") for _ in range(3)]
    assert [(one.delay_s, one.rule) for one in chosen] == [(0.5, first), (0.5, first), (0.75, second)]
    assert (first.hits, every.hits, second.hits) == (2, 3, 1)
    assert book.clear(second.number) == 1
    assert book.choose("tree", "GET", "/").rule is None
    assert book.clear() == 2
    assert book.choose("tree", "GET", "/") is None


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({}, "needs delay_s or one of"),
        ({"status": 500, "reset": True}, "one action, not status, reset"),
        ({"path_regex": "(", "reset": True}, "invalid regular expression"),
        ({"status": 99}, "status"),
        ({"times": 0, "reset": True}, "times"),
        ({"delay_s": -1}, "delay_s"),
        ({"delays": 1}, "delays"),
    ],
)
def test_invalid_faults_are_refused(raw, fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        Fault(**fields)
    answer = raw.call("POST", "/_control/faults", fields)
    assert (answer.status, complaint in answer.error) == (400, True)


def test_a_status_with_headers_and_body_for_some_requests(hub, raw, bucket):
    number = hub.control.add_fault(
        Fault(route="bucket-info", times=2, status=429, headers={"Retry-After": "7"}, body='{"error": "slow down"}')
    )
    for _ in range(2):
        answer = raw.info(bucket)
        assert (answer.status, answer.headers["Retry-After"], answer.error) == (429, "7", "slow down")
    assert raw.info(bucket).status == 200
    assert hub.control.hits(number) == 2
    assert hub.control.counters().route("bucket-info").statuses == {"429": 2, "200": 1}


def test_delays_overlap(hub, raw, bucket):
    hub.control.add_fault(Fault(delay_s=0.3))
    start = time.monotonic()
    with ThreadPoolExecutor(50) as threads:
        assert {answer.status for answer in threads.map(raw.info, [bucket] * 50)} == {200}
    # One after the other they would take 15 s.
    assert 0.3 <= time.monotonic() - start < 14


@pytest.mark.parametrize("at", [0, 1, 600_000])
def test_a_body_is_cut(hub, raw, xorb, at):
    path, body = xorb
    hub.control.add_fault(Fault(route="xorb-data", truncate_at=at, times=1))
    with pytest.raises(IncompleteRead) as cut:
        raw.call("GET", path)
    assert cut.value.partial == body[:at]
    assert raw.call("GET", path).body == body


def test_a_body_shorter_than_the_cut_is_whole(hub, raw, bucket):
    hub.control.add_fault(Fault(truncate_at=10_000))
    assert raw.info(bucket).status == 200


def test_a_body_trickles(hub, raw, xorb):
    path, body = xorb
    hub.control.add_fault(Fault(route="xorb-data", trickle_bytes=50_000, trickle_interval_s=0.01))
    start = time.monotonic()
    assert raw.call("GET", path).body == body
    assert time.monotonic() - start >= 20 * 0.01


@pytest.mark.parametrize(
    ("fields", "offsets"),
    [
        ({"flip_at": (0, 9, 700_000, 99_999_999)}, [0, 9, 700_000]),
        ({"flip_every": 1000}, list(range(999, 1_000_800, 1000))),
    ],
)
def test_bytes_are_flipped(hub, raw, xorb, fields, offsets):
    path, body = xorb
    hub.control.add_fault(Fault(route="xorb-data", **fields))
    flipped = raw.call("GET", path).body
    assert len(flipped) == len(body) == 1_000_800
    assert [at for at in range(len(body)) if flipped[at] != body[at]] == offsets


def test_a_request_hangs_until_the_fault_is_cleared(hub, raw, bucket):
    number = hub.control.add_fault(Fault(route="batch", hang=True))
    answered = threading.Event()

    def add(name: str) -> int:
        status = raw.batch(bucket, *[add_file(name)] * 2000).status
        answered.set()
        return status

    with ThreadPoolExecutor(2) as threads:
        statuses = threads.map(add, ["a", "b"])
        while hub.control.hits(number) < 2:
            time.sleep(0.01)
        assert not answered.wait(0.2)
        hub.control.clear_fault(number)
        assert list(statuses) == [200, 200]
    assert raw.info(bucket).json["totalFiles"] == 2


def test_a_client_that_disconnects_is_released(hub, hub_factory):
    running = hub_factory(faults=True)
    number = running.control.add_fault(Fault(hang=True))
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        while running.control.hits(number) < 1:
            time.sleep(0.01)
    assert running.stop() == 0


def test_a_connection_is_reset(hub, raw, bucket):
    hub.control.add_fault(Fault(reset=True, times=1))
    with pytest.raises((ConnectionResetError, HTTPException)) as reset:
        raw.info(bucket)
    # `RemoteDisconnected`, which follows an orderly close, is both.
    assert (isinstance(reset.value, ConnectionResetError), isinstance(reset.value, HTTPException)) == (True, False)
    assert raw.info(bucket).status == 200


def test_chosen_items_of_a_batch_fail(hub, api, bucket):
    hub.control.add_fault(Fault(route="batch", items="bad", items_regex="d[0-9]$", items_error="no luck", times=2))
    with pytest.raises(BucketBatchError) as failed:
        api.batch_bucket_files(bucket, add=[(b"1", "bad1"), (b"2", "bad"), (b"3", "good3")])
    assert failed.value.failures == [{"path": "bad1", "error": "no luck"}]
    assert {file.path for file in api.list_bucket_tree(bucket)} == {"bad", "good3"}
    with pytest.raises(BucketBatchError) as failed:
        api.batch_bucket_files(bucket, add=[(b"1", "bad1")])
    assert failed.value.response.status_code == 422
    api.batch_bucket_files(bucket, add=[(b"1", "bad1")])


def test_every_item_of_a_batch_fails(hub, raw, bucket):
    hub.control.add_fault(Fault(items=""))
    answer = raw.batch(bucket, {"type": "deleteFile", "path": "x"})
    assert (answer.status, answer.json["failed"]) == (422, [{"path": "x", "error": "injected fault"}])


def test_faults_over_http(hub, raw, bucket):
    added = raw.call("POST", "/_control/faults", [{"status": 500}, {"route": "tree", "delay_s": 0.5}])
    assert added.status == 201
    numbers = [rule["id"] for rule in added.json]
    assert raw.info(bucket).status == 500
    shown = raw.call("GET", "/_control/faults").json
    assert shown == [
        {"id": numbers[0], "hits": 1, "fault": {"status": 500}},
        {"id": numbers[1], "hits": 0, "fault": {"route": "tree", "delay_s": 0.5}},
    ]
    assert raw.call("DELETE", f"/_control/faults/{numbers[0]}").json == {"cleared": 1}
    assert raw.info(bucket).status == 200
    assert raw.call("DELETE", f"/_control/faults/{numbers[0]}").status == 404
    replaced = raw.call("PUT", "/_control/faults", {"status": 404, "times": 1})
    assert [rule["fault"] for rule in replaced.json] == [{"status": 404, "times": 1}]
    assert raw.call("DELETE", "/_control/faults").json == {"cleared": 1}


def test_a_hub_without_faults_refuses_them(hub_factory):
    with pytest.raises(ControlError, match="404"):
        hub_factory().control.add_fault(Fault(reset=True))


def test_counters(hub, raw, bucket, xorb):
    path, _ = xorb
    hub.control.reset_counters()
    assert hub.control.counters().total.requests == 0
    raw.call("GET", path, headers={"Range": "bytes=0-999"})
    raw.call("POST", f"/api/buckets/{bucket}/paths-info", b'{"paths": []}')
    raw.call("GET", f"/api/buckets/{bucket}/resolve")
    counters = hub.control.counters()
    assert counters.route("xorb-data") == RouteCounters(1, 0, 1000, {"206": 1})
    assert counters.route("paths-info").bytes_in == 13
    assert counters.route("unknown").statuses == {"404": 1}
    assert counters.route("never asked") == RouteCounters()
    assert counters.total == sum(counters.routes.values(), RouteCounters())
    assert (counters.total.requests, counters.total.statuses) == (3, {"200": 1, "206": 1, "404": 1})
    hub.control.add_fault(Fault(route="xorb-data", truncate_at=10))
    with pytest.raises(IncompleteRead):
        raw.call("GET", path)
    assert hub.control.counters().route("xorb-data").bytes_out == 1010
