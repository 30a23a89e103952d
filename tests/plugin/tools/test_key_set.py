"""A set of keys on disk, against a set in memory."""

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.errors import TempDirError
from hfbucket_plugin.tools import external_sort, key_set
from hfbucket_plugin.tools.key_set import KeySet

keys = st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=3), max_size=40)


@given(keys, keys, keys, st.integers(1, 7))
def test_it_holds_each_key_once_and_tells_which_were_found(first, second, found, page):
    before, key_set._PAGE = key_set._PAGE, page
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
        key_set._PAGE = before


def test_what_comes_first_is_told_before_the_rest_is_read():
    def read():
        for number in range(key_set._PAGE):
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
