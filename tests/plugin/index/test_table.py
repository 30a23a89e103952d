"""The table of a key index, and what it looks like as bytes."""

import io
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, strategies

from hfbucket_plugin.core.keys import ContentId
from hfbucket_plugin.errors import IntegrityError
from hfbucket_plugin.index.format import JOURNAL, Pointer, changes_of, header_of, read_header, snapshot_of, to_bytes
from hfbucket_plugin.index.table import (
    CHANGE,
    DELETED,
    PUT,
    ROW,
    Table,
    applied,
    content_of,
    digests_of,
    in_order,
    last_of_each,
    newest,
    rows_of,
)

HASHES = [f"{number:064x}" for number in (0, 1, 2**255)]
NAMES = [f"org%2Fmodel%401%400%40{number:x}%40half" for number in range(6)]

names = strategies.sampled_from(NAMES)
contents = strategies.builds(ContentId, strategies.sampled_from(HASHES), strategies.integers(0, 2**40))
listings = strategies.dictionaries(names, strategies.tuples(contents, strategies.integers(0, 2**31)))
happenings = strategies.lists(
    strategies.tuples(names, strategies.one_of(strategies.none(), contents), strategies.integers(0, 20)), max_size=12
)


def table_of(listing):
    return Table(in_order(rows_of([(name, content, at) for name, (content, at) in listing.items()])))


def change_rows(happened):
    rows = np.zeros(len(happened), CHANGE)
    for index, (name, content, at) in enumerate(happened):
        digest = digests_of([name])[0]
        rows[index]["digest_hi"], rows[index]["digest_lo"] = digest
        rows[index]["at"], rows[index]["kind"] = at, DELETED if content is None else PUT
        if content is not None:
            rows[index]["size"] = content.size
            rows["xet_hash"][index] = np.frombuffer(bytes.fromhex(content.xet_hash), np.uint8)
    return rows


def reported(rows):
    """Name to content, of a table of names that are known here."""
    found = Table(rows).find(digests_of(NAMES))
    return {name: content_of(rows[at]) for name, at in zip(NAMES, found, strict=True) if at >= 0}


@given(listings)
def test_a_table_tells_what_was_listed_and_nothing_else(listing):
    table = table_of(listing)

    again = snapshot_of(to_bytes(table.rows), "it")

    assert reported(again.rows) == {name: content for name, (content, _) in listing.items()}
    assert len(again) == len(listing)
    assert list(again.find(digests_of(["of nobody"]))) == [-1]


def test_every_field_of_a_key_counts():
    base = ["org%2Fmodel", "8", "0", "ab12", "half"]
    others = [["org%2Fmode", "8", "0", "ab12", "half"], ["org%2Fmodel", "4", "0", "ab12", "half"]]
    others += [["org%2Fmodel", "8", "1", "ab12", "half"], ["org%2Fmodel", "8", "0", "ab13", "half"]]
    others += [["org%2Fmodel", "8", "0", "ab12", "bfloat16"], [*base, "tag%25a"]]

    digests = digests_of("%40".join(fields) for fields in [base, *others])

    assert len(np.unique(digests, axis=0)) == len(others) + 1


def test_digests_are_what_the_docstring_says_on_every_machine():
    assert digests_of(["a%40b"]).tobytes().hex() == "4ef3e13d77b133b8ab61e7f285916ee1"


def test_two_digests_with_a_word_in_common_are_told_apart():
    rows = np.zeros(5, ROW)
    rows["digest_hi"] = [1, 7, 7, 7, 9]
    rows["digest_lo"] = [0, 1, 2, 9, 0]
    rows["size"] = range(5)
    table = Table(rows)

    found = table.find(np.array([[7, 9], [7, 1], [7, 3], [7, 2], [9, 0], [9, 1], [0, 0]], "<u8"))

    assert list(found) == [3, 1, -1, 2, 4, -1, -1]


@pytest.mark.parametrize("keys", [[(2, 0), (1, 0)], [(1, 1), (1, 1)], [(1, 2), (1, 1)]])
def test_rows_out_of_order_are_no_table(keys):
    rows = np.zeros(len(keys), ROW)
    rows["digest_hi"], rows["digest_lo"] = zip(*keys, strict=True)

    with pytest.raises(ValueError, match="order"):
        Table(rows)
    with pytest.raises(IntegrityError, match="order"):
        snapshot_of(to_bytes(rows), "it")


@given(happenings, strategies.randoms(use_true_random=False), strategies.integers(0, 12))
def test_neither_order_nor_repetition_of_journals_makes_a_difference(happened, random, cut):
    shuffled = happened * 2
    random.shuffle(shuffled)
    whole = newest(change_rows(happened))

    parts = newest(newest(change_rows(shuffled[:cut])), change_rows(shuffled[cut:]))

    assert whole.tobytes() == parts.tobytes()


@given(listings, happenings)
def test_what_was_put_and_deleted_is_as_a_dictionary_would_have_it(listing, happened):
    happened = [(name, content, at * 100 + number) for number, (name, content, at) in enumerate(happened)]
    expected = {name: content for name, (content, _) in listing.items()}
    for name, content, _ in sorted(happened, key=lambda one: one[2]):
        expected |= {name: content}

    rows = applied(table_of(listing).rows, newest(change_rows(happened)))

    assert reported(rows) == {name: content for name, content in expected.items() if content is not None}


def test_columns_of_later_versions_are_left_alone():
    dtype = np.dtype([("heat", "u1"), *ROW.descr, ("last_hit", "<u4")])
    old = table_of({NAMES[0]: (ContentId(HASHES[1], 5), 7), NAMES[1]: (ContentId(HASHES[1], 6), 8)})
    rows = np.zeros(2, dtype)
    for name in ROW.names:
        rows[name] = old.rows[name]
    rows["heat"], rows["last_hit"] = [3, 4], [5, 6]

    table = snapshot_of(to_bytes(rows), "it")
    changed = applied(table.rows, change_rows([(NAMES[0], ContentId(HASHES[2], 9), 50), (NAMES[2], None, 1)]))

    assert reported(table.rows) == reported(old.rows)
    assert reported(changed)[NAMES[0]] == ContentId(HASHES[2], 9)
    assert sorted(changed["heat"]) == [3, 4]


def test_others_read_it_with_numpy_alone(tmp_path):
    path = tmp_path / "snapshot.npy"
    path.write_bytes(to_bytes(table_of({NAMES[0]: (ContentId(HASHES[2], 5), 7)}).rows))

    rows = np.load(path, mmap_mode="r")

    assert rows.dtype.names == ("digest_hi", "digest_lo", "size", "xet_hash", "uploaded_at")
    assert (rows["size"][0], rows["uploaded_at"][0], bytes(rows["xet_hash"][0]).hex()) == (5, 7, HASHES[2])


WHOLE = to_bytes(table_of({name: (ContentId(HASHES[0], 5), 7) for name in NAMES}).rows)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage" * 100,
        WHOLE[:-1],
        WHOLE[: len(WHOLE) // 2],
        WHOLE + b"\0",
        WHOLE[:20],
        to_bytes(np.zeros(3, "<u8")),
        to_bytes(np.zeros(3, [("digest_hi", "<u8")])),
        to_bytes(np.zeros(3, JOURNAL)),
        header_of(ROW, 10**12),
    ],
)
def test_what_is_no_snapshot_is_refused(data):
    with pytest.raises(IntegrityError, match="the object"):
        snapshot_of(data, "the object")


@given(strategies.binary(max_size=300), strategies.integers(0, len(WHOLE) - 1))
def test_garbage_never_raises_anything_else(noise, at):
    for data in (noise, WHOLE[:at] + noise + WHOLE[at + len(noise) :]):
        for read in (lambda: snapshot_of(data, "it"), lambda: changes_of(data, 1.0, "it")):  # noqa: B023 - called at once
            try:
                read()
            except IntegrityError:
                continue


def test_ages_of_a_journal_count_from_when_the_hub_took_it_and_other_kinds_are_for_others():
    rows = np.zeros(3, JOURNAL)
    rows["age_ms"], rows["kind"], rows["digest_hi"] = [1500, 0, 9], [PUT, DELETED, 77], [1, 2, 3]

    changes = changes_of(to_bytes(rows), 1000.0, "it")

    assert list(changes["at"]) == [998.5, 1000.0]
    assert list(changes["kind"]) == [PUT, DELETED]


def test_a_header_tells_how_long_the_file_is():
    data = to_bytes(np.zeros(7, ROW))

    header = read_header(io.BytesIO(data), "it")

    assert (header.rows, header.file_bytes) == (7, len(data))


POINTER = Pointer("20260101T000000Z-ab.npy", HASHES[1], 100, 3, 20.5, 10.0, 5.0)


def test_a_pointer_is_read_as_it_was_written():
    assert Pointer.parse(POINTER.to_bytes(), "it") == POINTER
    assert Pointer.parse(json.dumps(asdict(POINTER) | {"heat": True}).encode(), "it") == POINTER


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"snapshot": "../../x"},
        {"snapshot": ""},
        {"xet_hash": "zz"},
        {"size": -1},
        {"size": "5"},
        {"keys": None},
        {"covers": float("nan")},
        {"listed": "today"},
        {"full": None},
    ],
)
def test_what_is_no_pointer_is_refused(change):
    with pytest.raises(IntegrityError, match="the object"):
        Pointer.parse(json.dumps(asdict(POINTER) | change).encode(), "the object")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, POINTER.to_bytes()[:-3]])
def test_garbage_is_no_pointer(data):
    with pytest.raises(IntegrityError):
        Pointer.parse(data, "it")


def test_an_empty_table_finds_nothing():
    empty = Table(np.zeros(0, ROW))

    assert list(empty.find(digests_of(NAMES))) == [-1] * len(NAMES)
    assert len(last_of_each(empty.rows)) == 0
    assert len(newest()) == 0
