from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.core.units import format_duration, format_ranks, parse_bytes, parse_duration, parse_ranks


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("50GiB", 50 * 2**30),
        (" 1.5 MiB ", 3 * 2**19),
        ("64KiB", 2**16),
        ("2TiB", 2**41),
        ("3PiB", 3 * 2**50),
        ("50GB", 50 * 10**9),
        ("1.5 TB", 1500 * 10**9),
        ("0.3KiB", 307),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50G", "did you mean GiB"),
        ("50gib", "did you mean GiB"),
        ("50mi", "did you mean MiB"),
        ("5 parsecs", "known are KiB"),
        ("", "invalid size"),
        ("-1GiB", "invalid size"),
        ("1e9", "invalid size"),
        ("GiB", "invalid size"),
        ("0.3B", "not a whole number"),
        ("1" * 5000, "invalid size"),
        ("99999999PiB", "more than"),
        ("٣GiB", "invalid size"),
    ],
)
def test_what_is_no_size(text, said):
    with pytest.raises(ValueError, match=said):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("30min", 1800),
        ("24h", 86400),
        ("7d", 7 * 86400),
        ("2w", 14 * 86400),
        ("1.5h", 5400),
        ("5 m", 300),
    ],
)
def test_lengths_of_time(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "24", "24 hours", "h", "-1h", "24H", "1h30m", "999999999d", "1" * 5000 + "s"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ValueError, match=r"invalid duration|hundred years"):
        parse_duration(text)


@given(st.timedeltas(timedelta(0), timedelta(days=30000)))
def test_a_length_of_time_reads_back(value):
    assert abs(parse_duration(format_duration(value)) - value) <= timedelta(microseconds=1)


@pytest.mark.parametrize(("text", "ranks"), [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0-1, 7", {0, 1, 7}), ("3,3-3", {3})])
def test_ranks(text, ranks):
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "3-1", "0--1", "1,,2", "0-9999999", "12345678"])
def test_what_are_no_ranks(text):
    with pytest.raises(ValueError, match=r"."):
        parse_ranks(text)


@given(st.frozensets(st.integers(0, 300), min_size=1))
def test_ranks_read_back(ranks):
    assert parse_ranks(format_ranks(ranks)) == ranks
