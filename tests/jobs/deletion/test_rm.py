"""`python -m jobs rm` on a real local Hub."""

import pytest

from tests.support.buckets import DAY, PREFIX, key, l2_key

KEYS = [key(number) for number in range(20)]


@pytest.fixture
def stocked(depot):
    depot.put(KEYS, age=2 * DAY)
    return depot


def test_keys_prefixes_and_files(stocked, tmp_path):
    stocked.put([l2_key(1), key(1, worker=1)], age=2 * DAY)
    names = tmp_path / "keys.txt"
    names.write_text(f"{KEYS[1]}\n\n{l2_key(1)}\n{key(77)}\n")

    ran = stocked.run("rm", KEYS[0], "--key-file", str(names), "--prefix", "org/model@2@1@", "--yes")

    assert ran.code == 0, ran.stderr
    assert stocked.left() == stocked.paths_of(KEYS[2:])
    assert ran.counts("deleted") == [4]
    assert ran.summary["absent"] == [key(77)]
    assert {group["reason"] for group in ran.summary["by_reason"]} == {"asked"}


def test_the_same_guards_hold(stocked):
    assert stocked.run("rm", "--prefix", "org/", "--yes").code == 4, "30%"
    assert stocked.run("rm", KEYS[0]).summary["result"] == "planned"
    stocked.make_older(stocked.paths_of(KEYS[:1]), 0)
    young = stocked.run("rm", KEYS[0], "--yes")
    assert (young.code, young.counts("planned")) == (0, [0])
    assert stocked.left() == stocked.paths_of(KEYS)
    assert stocked.run("rm", KEYS[0], "--yes", "--min-age", "0s").counts("deleted") == [1]


def test_what_is_no_chunk_goes_by_its_name_when_it_may(stocked):
    stocked.put_paths({f"{PREFIX}/notes/a.txt": b"a", f"{PREFIX}/.hfbucket/bad/a.json": b"b"}, age=2 * DAY)

    assert stocked.run("rm", "notes/a.txt", "--yes").counts("planned") == [0]
    ran = stocked.run("rm", "notes/a.txt", ".hfbucket/bad/a.json", "--foreign", "delete", "--yes")

    assert ran.counts("deleted") == [1]
    assert f"{PREFIX}/.hfbucket/bad/a.json" in stocked.all_paths()
    assert f"{PREFIX}/notes/a.txt" not in stocked.all_paths()


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [([], "name what to delete"), (["--prefix", ""], "everything"), (["--key-file", "nowhere"], "cannot be read")],
)
def test_commands_that_cannot_be_meant(depot, arguments, reported):
    ran = depot.run("rm", *arguments, "--yes")

    assert ran.code == 2
    assert reported in ran.stderr


def test_a_line_of_a_key_file_ends_at_its_newline_and_nowhere_else(stocked, tmp_path):
    names = tmp_path / "keys.txt"
    names.write_bytes(f"junk\u2028{KEYS[0]}\n".encode())

    ran = stocked.run("rm", "--key-file", str(names), "--yes")

    assert (ran.code, ran.stdout) == (2, "")
    assert "line 1: character 5 is U+2028" in ran.stderr
    assert stocked.left() == stocked.paths_of(KEYS)


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_key(stocked, tmp_path):
    names = tmp_path / "keys.txt"
    names.write_bytes(f"\ufeff{KEYS[0]}\r\n{KEYS[1]}\r\n".encode())

    ran = stocked.run("rm", "--key-file", str(names), "--yes")

    assert (ran.code, ran.summary["absent"], ran.counts("deleted")) == (0, [], [2])


def test_an_argument_that_is_no_text_is_refused(stocked):
    ran = stocked.run("rm", "org/\udcff", "--yes")

    assert (ran.code, ran.stdout) == (2, "")
    assert "U+DCFF" in ran.stderr


def test_keys_that_are_not_there_are_counted_and_the_first_ones_named(stocked, monkeypatch):
    monkeypatch.setattr("jobs.deletion.select.NAMED_ABSENT", 2)
    absent = [key(number) for number in range(500, 505)]
    (stocked.directory / "keys").write_text("\n".join([KEYS[0], *reversed(absent)]))
    ran = stocked.run("rm", "--key-file", str(stocked.directory / "keys"), absent[4], "--yes")
    assert (ran.code, ran.counts("deleted")) == (0, [1])
    assert (ran.summary["absent"], ran.summary["absent_count"]) == (absent[:2], 5)
    assert "5 keys that were asked for are not there" in ran.stderr
