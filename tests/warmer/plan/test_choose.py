"""A choice as a filter, and what of it is asked of the server."""

import fnmatch
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from hfbucket_plugin.core.keys import ClassicKey, ContentId, MPKey, parse_key
from hfbucket_plugin.hub.listing import ChunkEntry
from hfbucket_plugin.tools.selection import Selection

NOW = datetime(2026, 1, 10, tzinfo=UTC)

models = st.sampled_from(["m", "org/m", "org/model", "org/model2", "ü x"])
hashes = st.text("0123456789abcdef", min_size=2, max_size=8).filter(lambda text: len(text) % 2 == 0)
# Sizes and ranks on both sides of each digit that a rank of MP mode has for them.
sizes = st.sampled_from([1, 2, 8, 15, 16, 17, 255, 256, 300, 4096])
ranks = st.integers(0, 20) | st.sampled_from([15, 16, 255, 256, 299])


@st.composite
def keys(draw):
    world_size = draw(sizes)
    worker = draw(ranks.filter(lambda rank: rank < world_size))
    if draw(st.booleans()):
        return ClassicKey(draw(models), world_size, worker, draw(hashes), draw(st.sampled_from(["half", "bfloat16"])))
    rank = world_size << 24 | (worker & 0xFF) << 16 | draw(st.integers(0, 0xFFFF))
    return MPKey(draw(models), rank, draw(st.integers(0, 17)), draw(hashes), draw(st.sampled_from(["", "salt"])))


times = st.none() | st.datetimes(datetime(2025, 12, 1), datetime(2026, 1, 10), timezones=st.just(UTC))  # noqa: DTZ001
entries = st.builds(
    lambda key, size, at: ChunkEntry(str(key), key, ContentId("ab" * 32, size), at), keys(), st.integers(0, 100), times
)


@st.composite
def choices(draw):
    text = str(draw(keys()))
    prefix = tuple(text[: draw(st.integers(1, len(text)))] for _ in range(draw(st.integers(0, 2))))
    world_size = draw(st.none() | sizes)
    workers = draw(st.none() | st.frozensets(ranks, min_size=1, max_size=5))
    assume(world_size is None or workers is None or max(workers) < world_size)
    return Selection(
        all=not prefix and draw(st.booleans()),
        prefix=prefix,
        model=draw(st.lists(models, max_size=2)),
        world_size=world_size,
        workers=workers,
        include=draw(st.sampled_from([(), ("*half",), ("org/*", "*@salt")])),
        exclude=draw(st.sampled_from([(), ("*@1@*",), ("*model2*", "ü*")])),
        since=draw(st.sampled_from([None, "36h", "20d"])),
    )


def matches(selection, entry):
    """What a choice means, said once more and plainly."""
    key, text = entry.key, entry.text
    return (
        (not selection.prefix or any(text.startswith(prefix) for prefix in selection.prefix))
        and (not selection.model or key.model in selection.model)
        and (selection.world_size is None or key.world_size == selection.world_size)
        and (selection.workers is None or key.worker_id in selection.workers)
        and (not selection.include or any(fnmatch.fnmatchcase(text, glob) for glob in selection.include))
        and not any(fnmatch.fnmatchcase(text, glob) for glob in selection.exclude)
        and (selection.since is None or (entry.uploaded_at is not None and NOW - entry.uploaded_at <= selection.since))
    )


@given(choices(), entries)
def test_a_filter_passes_what_the_selection_means(selection, entry):
    assert parse_key(entry.text) == entry.key
    assert selection.filter(NOW)(entry) == matches(selection, entry)


@given(choices(), entries, st.booleans())
def test_what_is_asked_of_the_server_leaves_out_no_chunk_of_the_selection(selection, entry, only):
    prefixes = selection.listing_prefixes(type(entry.key) if only else None)
    if matches(selection, entry):
        assert any(entry.text.startswith(prefix) for prefix in prefixes)


@given(choices())
def test_a_selection_reads_back_as_what_it_was(selection):
    assert Selection.model_validate(selection.model_dump(mode="json")) == selection


@pytest.mark.parametrize(
    ("given", "classic", "mp"),
    [
        ({"all": True}, [""], [""]),
        ({"prefix": "org/m"}, ["org/m"], ["org/m"]),
        ({"model": "m"}, ["m@"], ["m@"]),
        ({"model": ["m", "n"], "world_size": 8}, ["m@8@", "n@8@"], ["m@08", "n@08"]),
        ({"model": "m", "world_size": 8, "workers": "0-1,7"}, ["m@8@0@", "m@8@1@", "m@8@7@"], ["m@0800", "m@0801", "m@0807"]),
        ({"model": "m", "world_size": 16, "workers": 15}, ["m@16@15@"], ["m@100f"]),
        ({"model": "m", "workers": "0"}, ["m@"], ["m@"]),
        ({"prefix": ["m@8@1@ff", "n@"], "model": "m"}, ["m@8@1@ff"], ["m@8@1@ff"]),
        ({"prefix": "other", "model": "m"}, [], []),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_server(given, classic, mp):
    selection = Selection(**given)
    assert selection.listing_prefixes(ClassicKey) == classic
    assert selection.listing_prefixes(MPKey) == mp
    assert selection.listing_prefixes() == sorted({*classic, *mp})


def test_many_workers_are_one_listing():
    assert Selection(model="m", world_size=2000, workers="0-1999").listing_prefixes(ClassicKey) == ["m@"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"all": True, "prefix": "m"}, "contradict"),
        ({"prefix": ""}, "at least 1 character"),
        ({"model": ["m", ""]}, "at least 1 character"),
        ({"world_size": 4, "workers": "0-7"}, "no worker 7"),
        ({"world_size": 0}, "greater than 0"),
        ({"workers": "7-0"}, "ends before"),
        ({"workers": True}, "read 0-3,7"),
        ({"since": "24"}, "24h"),
        ({"since": 24}, "24h"),
        ({"since": "0h"}, "greater than"),
        ({"newest": 0}, "greater than 0"),
        ({"newest": 3, "prompts": "p"}, "contradict"),
        ({"max_bytes": "50G"}, "did you mean GiB"),
        ({"max_bytes": 0}, "greater than 0"),
        ({"modle": "m"}, "Extra inputs"),
    ],
)
def test_what_is_no_selection(given, said):
    with pytest.raises(ValidationError, match=said):
        Selection(**given)


def test_what_says_which_chunks():
    assert not Selection().given
    assert not Selection(world_size=8, workers="0", since="1h", newest=3, include="*").given
    for one in ({"all": True}, {"prefix": "m"}, {"model": "m"}, {"keys_from": "f"}, {"prompts": "p"}):
        assert Selection(**one).given


def test_units_in_a_selection():
    selection = Selection(max_bytes="50GiB", since="24h", workers="0-3,7")
    assert (selection.max_bytes, selection.since) == (50 * 2**30, timedelta(days=1))
    assert selection.workers == {0, 1, 2, 3, 7}
