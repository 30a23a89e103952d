"""What the Hub answers, whatever it is: taken as what it says, or refused as a `TransportError`, in bounded time."""

import json
import time
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hfbucket_plugin.core.dates import EARLIEST, LATEST, http_date, iso_date
from hfbucket_plugin.errors import TransportError
from hfbucket_plugin.hub import answers
from hfbucket_plugin.hub.answers import PAGE, SMALL, BodyLimit, Unpacking, document, records, words

few = settings(max_examples=60)

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=5,
)
LIKE_JSON = st.text(alphabet='[]{}",:\\ \n0123456789.eE+-truefalsnu\x00é\ud800', max_size=80).map(
    lambda text: text.encode(errors="replace")
)


@few
@given(ANY)
def test_a_document_is_read_as_json_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert document(text.encode(), "x") == json.loads(text)


@few
@given(st.lists(st.dictionaries(st.text(max_size=8), ANY, max_size=4), max_size=5))
def test_a_list_of_records_is_read_as_json_reads_it(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert records(text.encode(), "x", PAGE) == json.loads(text)


@few
@given(st.binary(max_size=200) | LIKE_JSON)
@example(b'[{"a": "}')
@example(b'[{"a": 1}, ]')
@example(b'"\\')
@example(b"[{}]x")
def test_any_bytes_are_taken_as_json_takes_them_or_refused(body):
    for read in (lambda: document(body, "x"), lambda: records(body, "x", SMALL), lambda: [words(body)]):
        try:
            found = read()
        except TransportError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right
            continue
        if found != [words(body)]:
            assert found == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 4_000_000,
        b'{"a":' * 800_000,
        b'"' + b'\\"' * 2_000_000,
        b'[{"a": "' + b"x" * 4_000_000 + b'"}]',
        b"[" + b"{}," * 1_300_000 + b"{}]",
        b"[" + b"1," * 2_000_000 + b"1]",
        b"[{" + b'"a":[],' * 500_000 + b'"b":1}]',
        b'{"a": 1' + b"0" * 4_000_000,
        b" " * 4_100_000,
        b'[{"a":"b"},' * 300_000,
    ],
    ids=lambda body: body[:12],
)
def test_bodies_that_would_cost_much_are_refused_before_they_are_parsed(body):
    began = time.thread_time()
    with pytest.raises(TransportError):
        records(body, "x", PAGE)
    with pytest.raises(TransportError):
        document(body, "x")
    assert time.thread_time() - began < 1.0, "seconds of a processor; parsing takes several"


def test_a_record_more_than_was_asked_for_is_refused():
    room = BodyLimit.for_records(["a", "b"])

    assert len(records(b"[{}, {}]", "x", room)) == 2
    with pytest.raises(TransportError, match="more than 2 records"):
        records(b"[{}, {}, {}]", "x", room)


@few
@given(st.text(max_size=300), st.booleans())
def test_there_is_room_for_the_record_of_any_path(path, escaped):
    record = {
        "type": "file",
        "path": path,
        "size": 2**53,
        "xetHash": "f" * 64,
        "uploadedAt": "2026-01-02T03:04:05.000Z",
    }
    body = json.dumps([record | {"mtime": "2026-01-02T03:04:05.000Z"}], ensure_ascii=escaped).encode(errors="replace")

    assert len(records(body, "x", BodyLimit.for_records([path]))) == 1


def test_numbers_out_of_range_are_refused():
    for number in ("1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "1" + "0" * 20):
        with pytest.raises(TransportError):
            document(f'{{"a": {number}}}'.encode(), "x")
    assert [answers.count_of(one) for one in (0, 2**53, 2**53 + 1, -1, True, 1.0, "1", None)] == [0, 2**53] + [None] * 6


@few
@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", " GZIP ", "", "identity", "br", "gzip, gzip"]))
def test_any_bytes_are_unpacked_or_refused(raw, encoding):
    try:
        unpacking = Unpacking(encoding, "x")
        pieces = list(unpacking.pieces(raw))
        unpacking.finish()
    except TransportError:
        return
    assert b"".join(pieces) == raw or "gzip" in encoding.lower() or encoding == "deflate"


@few
@given(st.text(max_size=80) | st.datetimes().map(str) | st.integers() | st.none() | st.floats())
@example("0001-01-01T00:00:00+23:59")
@example("9999-12-31T23:59:59-23:59")
@example("2" * 100_000)
def test_any_value_is_a_date_in_range_or_a_value_error(value):
    try:
        moment = iso_date(value)
    except ValueError:
        return
    assert EARLIEST <= moment < LATEST
    assert moment.utcoffset().total_seconds() == 0


@few
@given(
    st.text(max_size=80)
    | st.builds(
        "{}, {} {} {} {}:{}:{} {}".format,
        st.text(max_size=4),
        *[st.integers()] * 6,
        st.sampled_from(["GMT", "+1400", "-9999"]),
    )
    | st.builds(
        "Mon, 02 Jan {} 03:04:05 {}".format,
        st.integers(0, 10**20),
        st.sampled_from(["GMT", "+1400", "-2359", "+9999", ""]),
    )
)
@example("Mon, 02 Jan " + "9" * 20 + " 03:04:05 GMT")
@example("Mon, 02 Jan 0001 03:04:05 +1400")
def test_any_header_is_a_date_in_range_or_none(text):
    moment = http_date(text)
    assert moment is None or EARLIEST <= moment < LATEST


def test_dates_are_read_as_they_are():
    assert iso_date("2026-01-02T03:04:05.678Z") == datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    assert iso_date("2026-01-02T03:04:05+02:00") == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert http_date("Fri, 02 Jan 2026 03:04:05 GMT") == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
