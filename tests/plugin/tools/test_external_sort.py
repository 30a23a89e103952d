"""Order and budgets, against sorting in memory."""

import sqlite3
from datetime import UTC, datetime
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.errors import TempDirError
from hfbucket_plugin.tools import external_sort
from hfbucket_plugin.tools.external_sort import KeySet
from hfbucket_plugin.tools.selection import ChunkRef, in_order, newest_first, within
from tests.support.buckets import classic_key

times = st.none() | st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 2), timezones=st.just(UTC))  # noqa: DTZ001
listings = st.lists(st.tuples(st.integers(0, 50), times), max_size=60).map(
    lambda rows: [
        ChunkRef(classic_key(number), f"p{number}", "ab" * 32, size, at) for number, (size, at) in enumerate(rows)
    ]
)
budgets = st.tuples(st.none() | st.integers(0, 70), st.none() | st.integers(0, 2000))


def by_age(chunk):
    return (chunk.uploaded_at is None, -chunk.uploaded_at.timestamp() if chunk.uploaded_at else 0, chunk.key)


def is_prefix(part, whole):
    return part == whole[: len(part)]


@given(listings, budgets, st.integers(1, 20))
def test_a_budget_takes_the_newest_that_fit_and_no_more(tmp_path_factory, chunks, budget, run_chunks):
    most, max_bytes = budget
    path = tmp_path_factory.getbasetemp() / "sorted"
    taken = list(
        in_order(chunks, newest_first, path, partial(within, most=most, max_bytes=max_bytes), page_rows=run_chunks)
    )
    newest = sorted(chunks, key=by_age)
    assert is_prefix(taken, newest)
    assert most is None or len(taken) <= most
    assert max_bytes is None or sum(chunk.size for chunk in taken) <= max_bytes
    if len(taken) < len(chunks):
        full = most is not None and len(taken) == most
        assert full or sum(chunk.size for chunk in newest[: len(taken) + 1]) > max_bytes


@given(listings, st.integers(1, 20))
def test_every_chunk_comes_once(tmp_path_factory, chunks, run_chunks):
    path = tmp_path_factory.getbasetemp() / "sorted"
    places = {chunk.key: number * 7 % 11 for number, chunk in enumerate(chunks)}
    ordered = in_order(chunks, lambda chunk: (places[chunk.key], chunk.key), path, page_rows=run_chunks)
    assert list(ordered) == sorted(chunks, key=lambda chunk: (places[chunk.key], chunk.key))


@given(listings, budgets)
def test_a_budget_keeps_the_order(chunks, budget):
    assert is_prefix(list(within(chunks, *budget)), chunks)


def test_a_chunk_that_does_not_fit_ends_the_budget_in_whichever_run_it_is(tmp_path):
    chunks = [ChunkRef(f"k{n}", f"p{n}", "ab" * 32, size) for n, size in enumerate((50, 10, 10, 10))]
    chosen = in_order(
        chunks,
        lambda chunk: (int(chunk.key[1:]),),
        tmp_path / "f",
        partial(within, most=None, max_bytes=40),
        page_rows=2,
    )
    assert list(chosen) == []


keys = st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=3), max_size=40)


@given(keys, keys, keys, st.integers(1, 7))
def test_it_holds_each_key_once_and_tells_which_were_found(first, second, found, page):
    before, external_sort._PAGE = external_sort._PAGE, page
    try:
        with KeySet(first) as held:
            assert list(held.first_seen(second)) == [key for key in dict.fromkeys(second) if key not in first]
            every = set(first) | set(second)
            assert len(held) == len(every)
            assert [held.find(key) for key in found] == [key in every for key in found]
            assert all((key in held) == (key in every) for key in [*found, *first])
            absent = sorted(every - set(found), key=str.encode)
            assert held.count_absent() == len(absent)
            assert held.absent(3) == absent[:3]
    finally:
        external_sort._PAGE = before


def test_what_comes_first_is_told_before_the_rest_is_read():
    def read():
        for number in range(external_sort._PAGE):
            yield f"key-{number}"
        raise AssertionError("read ahead")

    with KeySet() as held:
        assert next(held.first_seen(read())) == "key-0"


def test_no_room_is_an_error_that_says_where(monkeypatch):
    with KeySet() as held:
        held._base.execute("PRAGMA max_page_count = 3")
        with pytest.raises(TempDirError, match="TMPDIR"):
            list(held.first_seen(f"{number:04000}" for number in range(1000)))


def test_memory_does_not_grow_with_the_number_of_keys():
    with KeySet() as held:
        pages = held._base.execute("PRAGMA cache_size").fetchone()
        assert pages == (-external_sort._CACHE_KIB,)
        assert held._base.execute("PRAGMA temp_store").fetchone() == (1,)  # files
        assert sum(1 for _ in held.first_seen(f"key-{number % 5000}" for number in range(25_000))) == 5000
    assert sqlite3.sqlite_version_info > (3, 8)
