"""Order and budgets, against sorting in memory."""

from datetime import UTC, datetime
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.tools.selection import ChunkRef, in_order, newest_first, within
from tests.support.warming import classic_key

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
