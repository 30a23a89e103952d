"""Manifests, renames and batches for any content: what was written is read, and nothing else is believed."""

import random
import string
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfbucket_plugin.core.keys import DTYPES, ContentId, parse_key
from hfbucket_plugin.errors import ConfigError
from jobs.batch.apply import _batches
from jobs.export import manifest
from jobs.export.plan import NewNames, RenameError, Renames
from tests.support.models import field_text, untimed

models = field_text.filter(lambda text: text != "test")
hashes = st.text("0123456789abcdef", min_size=2, max_size=16)
small = st.integers(0, 99)
classic = st.builds(
    lambda model, world, worker, value, dtype: f"{model}@{world}@{worker}@{value}@{dtype}",
    *(models, small, small, hashes, st.sampled_from(sorted(DTYPES))),
)
mp = st.builds(
    lambda model, rank, group, value: f"{model}@{rank:08x}@{group:x}@{value * 2}",
    *(models, st.integers(0, 2**32 - 1), small, hashes),
)
keys = classic | mp
moments = st.none() | st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
lines = st.builds(
    lambda key, digits, size, at: manifest.ManifestLine(key, ContentId(digits, size), at),
    *(keys, st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(0, 2**50), moments),
)
some_lines = st.lists(lines, max_size=6, unique_by=lambda line: line.key).map(
    lambda found: sorted(found, key=lambda line: line.key)
)


@given(keys)
def test_the_keys_of_these_tests_are_keys(key):
    assert str(parse_key(key)) == key


@untimed
@given(some_lines)
def test_what_was_written_is_read(tmp_path_factory, found):
    directory = tmp_path_factory.mktemp("m")
    assert manifest.write(directory, found) == len(found)
    assert list(manifest.read(directory)) == found
    assert [one.name for one in directory.iterdir()] == [manifest.NAME]


@untimed
@given(some_lines, st.data())
def test_no_change_of_any_byte_is_believed(tmp_path_factory, found, data):
    directory = tmp_path_factory.mktemp("m")
    manifest.write(directory, found)
    path = directory / manifest.NAME
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(1, 255))
    damaged = data.draw(
        st.sampled_from([whole[:at] + bytes([whole[at] ^ other]) + whole[at + 1 :], whole[:at], whole[at:] or b"x"])
    )
    path.write_bytes(damaged)
    if damaged != whole:
        try:
            read = list(manifest.read(directory))
        except manifest.ManifestError:
            return
        # Bytes of the end that say the same: another way to write the JSON.
        assert read == found


@given(st.text())
@example("..")
@example("/etc/passwd")
@example("a/../../b@1@0@ff@half")
def test_a_files_name_is_one_step(text):
    try:
        name = manifest.file_name(text)
    except UnicodeEncodeError:
        return
    assert "/" not in name
    assert "\x00" not in name
    assert all(manifest.file_name(key) not in {"", ".", ".."} for key in [f"{text}@1@0@ff@half"])


def rules_of(*pairs):
    return Renames.parse([f"{old}={new}" for old, new in pairs])


plain = st.text(string.ascii_lowercase + "/-.", min_size=1, max_size=6)


@given(st.lists(st.tuples(plain, plain), max_size=3), keys)
def test_a_rename_gives_a_key_of_the_same_chunk_or_is_refused(pairs, key):
    try:
        renames = rules_of(*pairs)
    except ConfigError:
        return
    try:
        renamed = renames(key)
    except RenameError:
        return
    before, after = parse_key(key), parse_key(renamed)
    assert (type(before), before.chunk_hash) == (type(after), after.chunk_hash)
    assert Renames.parse(renames.texts()) == renames
    if not any(key.startswith(old) for old, _ in pairs):
        assert renamed == key


@given(st.sets(keys, max_size=8), plain, plain)
def test_no_two_chunks_get_one_name(found, old, new):
    if old == new:
        return
    renames = Renames.parse([f"{old}={new}"])
    given_to = {}
    with NewNames() as names:
        for key in sorted(found):
            try:
                to = renames(key)
                names.give(to, key)
            except RenameError:
                continue
            assert to not in given_to
            given_to[to] = key
            names.give(to, key)  # the same once more is no collision


def test_names_are_found_again_among_many():
    with NewNames() as names:
        for number in range(20_000):
            names.give(f"b{number}", f"a{number}")
        with pytest.raises(RenameError, match="'a77' and of 'c'"):
            names.give("b77", "c")


@given(st.lists(st.integers(0, 30)), st.integers(1, 5), st.integers(1, 60))
def test_batches_hold_no_more_than_they_may(sizes, most, most_bytes):
    items = [SimpleNamespace(size=size, number=number) for number, size in enumerate(sizes)]
    found = [batch.items for batch in _batches(iter(items), most, most_bytes)]
    assert [item for batch in found for item in batch] == items
    for batch in found:
        assert 1 <= len(batch) <= most
        assert len(batch) == 1 or sum(item.size for item in batch) <= most_bytes


def test_times_of_files_lose_nothing(tmp_path):
    from jobs.export.directory import DirectoryDestination, moment_of
    from jobs.export.endpoint import Chunk

    at = datetime(2030, 5, 17, 3, 1, 7, 654321, tzinfo=UTC)
    for moment in (at, at - timedelta(days=20_000)):
        data = bytearray(random.Random(1).randbytes(10))
        part = DirectoryDestination(tmp_path)._write(Chunk(data, ContentId("0" * 64, 10), moment))
        assert moment_of(part.stat()) == moment


def test_progress_is_told_now_and_then(capsys):
    from hfbucket_plugin.core.units import Extent
    from jobs.report import ProgressLog
    from tests.support.waiting import Clock

    clock = Clock()
    progress = ProgressLog(Extent(4, 4096), "hfbucket.eu", clock)
    progress.add(1024)
    assert capsys.readouterr().err == ""
    clock.now += 60
    progress.add(1024)
    progress.add(1024)
    assert capsys.readouterr().err == "jobs: hfbucket.eu: 2 objects, 2.0 KiB of 4 objects, 4.0 KiB\n"
