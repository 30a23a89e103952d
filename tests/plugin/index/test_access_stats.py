"""Heat: what is added up is never more than what was told, in whatever order and however often; what recording costs."""

import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfbucket_plugin.config.l2 import from_params
from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.config.settings import load
from hfbucket_plugin.core import telemetry
from hfbucket_plugin.core.keys import ContentId, encode_name
from hfbucket_plugin.errors import ConfigError
from hfbucket_plugin.index.access.recorder import HITS_ENTRIES, NO_KEY, AccessRecorder, Hits, recorder_of, why_not
from hfbucket_plugin.index.access.stats import (
    GAP_SECS,
    HALF_LIFE_SECS,
    HIT,
    LANDMARK,
    WARM_ROW,
    HitLog,
    Span,
    buckets,
    counts,
    deduplicated,
    warmed,
    with_access_columns,
    with_earlier_access,
)
from hfbucket_plugin.index.format import ACCESS_JOURNAL, JOURNAL, Pointer, changes_of, hits_of
from hfbucket_plugin.index.journal import JournalWriter
from hfbucket_plugin.index.store import JOURNALS, MAX_JOURNAL_BYTES
from hfbucket_plugin.index.table import LOST, ROW, digests_of, in_order
from tests.support.buckets import download, paths
from tests.support.indexes import build, counted_by_outcome, in_use
from tests.support.surface import PREFIX

START = LANDMARK + 100 * HALF_LIFE_SECS
KEYS = 4
DIGESTS = digests_of(str(number) for number in range(KEYS + 1))
HANDLE = "hf://buckets/o/b"
ROOT = "remote_storage_plugin.hfbucket.us."


def table(dtype=WARM_ROW, keys=KEYS):
    rows = np.zeros(keys, dtype)
    rows["digest_hi"], rows["digest_lo"] = DIGESTS[:keys, 0], DIGESTS[:keys, 1]
    return in_order(rows)


def hits(*reported):
    """Rows of tells: (key, hits, at, told, writer)."""
    rows = np.zeros(len(reported), HIT)
    for index, (key, number, at, when, writer) in enumerate(reported):
        rows[index] = (*DIGESTS[key], number, at, when, writer)
    return rows


def of(rows, key):
    (found,) = rows[rows["digest_lo"] == DIGESTS[key, 1]]
    return found


# A tell: key (the last one is not in the table), hits, writer, and seconds after the start at which it was made.
tells = st.lists(
    st.tuples(st.integers(0, KEYS), st.integers(1, 1000), st.integers(0, 2), st.integers(0, 9999)),
    max_size=30,
    unique_by=lambda one: (one[0], one[2], one[3]),
)


@settings(deadline=None, max_examples=200)
@given(tells, st.lists(st.integers(0, 9999), max_size=5), st.randoms(use_true_random=False), st.booleans())
def test_nothing_is_counted_twice_and_nothing_that_was_not_told(made, builds, random_, lossy):
    rows, until, last_seen = table(), 0.0, {}
    for covers in [*sorted(builds), 10_000]:
        end = max(until, START + covers)
        seen = []
        for key, number, writer, when in made:
            if when > covers or (lossy and random_.random() < 0.3):
                continue
            # Journals that grew tell it again, as if it were later by what their uploads took; all of them from the start on.
            for late in random_.choices([0.0, 0.5, 3.0], k=random_.randint(1, 3)):
                at = START + when - 5 + late
                seen.append((key, number, at, START + when, writer))
                last_seen[key] = max(last_seen.get(key, 0), int(at))
        random_.shuffle(seen)
        rows = warmed(rows, deduplicated(hits(*seen)), until, end)
        until = end

    now = START + 10_000
    for key in range(KEYS):
        row = of(rows, key)
        reported = sum(
            number * 2 ** -((now - (START + when - 2)) / HALF_LIFE_SECS) for k, number, _, when in made if k == key
        )
        counted = counts(np.array([row["heat"]]), now)[0]
        assert counted <= reported * 1.000001
        assert row["last_hit"] == last_seen.get(key, 0)
        if not lossy and made and all(when < 9_990 for _, _, _, when in made):
            assert counted == pytest.approx(reported, rel=1e-3)


def test_heat_halves_in_a_week_without_a_new_value():
    rows = warmed(table(), hits((0, 64, START, START, 1)), 0, START + 1)

    heat = np.array([of(rows, 0)["heat"]])
    weekly = [int(buckets(heat, START + weeks * HALF_LIFE_SECS + 60)[0]) for weeks in range(8)]
    assert weekly == list(range(7, -1, -1))
    assert warmed(rows.copy(), hits(), START, START + 10).tobytes() == rows.tobytes()
    assert buckets(np.zeros(1, np.float32), START).tolist() == [0]


def test_a_key_that_is_read_at_a_steady_rate_settles():
    rows, now = table(), START
    for _ in range(24 * 60):
        rows = warmed(rows, hits((0, 1, now, now, 1)), now, now + 3600)
        now += 3600
    settled = HALF_LIFE_SECS / 3600 / math.log(2)  # the sum of a hit an hour, each worth less by its age
    assert counts(np.array([of(rows, 0)["heat"]]), now)[0] == pytest.approx(settled, rel=0.02)


def test_nonsense_swamps_nothing():
    rows = warmed(
        table(), hits((0, 2**63, START, START, 1), (1, 5, -1e12, START, 1), (2, 3, 1e12, START, 2)), 0, START + 1
    )
    assert np.isfinite(rows["heat"]).all()


def test_heat_is_carried_to_the_keys_that_are_there_still():
    before = warmed(table(), hits((0, 9, START, START, 1), (3, 9, START, START, 1)), 0, START + 1)
    rows = with_earlier_access(with_access_columns(table(ROW, keys=2)), before)

    assert of(rows, 0)["heat"] == of(before, 0)["heat"]
    assert of(rows, 1)["heat"] == 0
    assert len(rows) == 2


def reported_at(*moments):
    found = HitLog()
    found.add(np.array(moments, np.uint32), START + 10 * GAP_SECS)
    return found


def test_recording_that_paused_for_a_day_start_over():
    before, now = Span(START, START, START + 100), START + 9 * GAP_SECS

    daily = [START + day * 0.9 * GAP_SECS for day in range(1, 10)]
    assert reported_at(*daily).span(before, now, now).since == START
    assert reported_at(*daily[:3], *daily[5:]).span(before, now, now).since == now
    assert reported_at().span(before, now, now) == Span(START, now, START + 100)
    assert reported_at(START + 200).span(Span(), now, now) == Span(now, now, START + 200)
    assert reported_at(START + 20 * GAP_SECS).span(before, now, now).reported == START + 100  # of a clock that is ahead


# --- recording ------------------------------------------------------------------------------------------------------


def key(number):
    return f"org/model@1@0@{number + 0x1000:x}@bfloat16"


def digest(number):
    return digests_of([encode_name(key(number))]).tobytes()


def test_the_hottest_are_told_first_and_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.index.access.recorder._SURGE", 1)
    recorder = AccessRecorder(4, 60, -60.0)
    recorder.read([key(number) for number in range(6)] + [key(5)] * 9 + [key(4)] * 8 + ["test@1@0@0@bfloat16"])

    first = recorder.due(0.0)
    assert [(one.digest, one.number) for one in first[:2]] == [(digest(5), 10), (digest(4), 9)]
    assert [one.digest for one in first[2:]] == [digest(0), digest(1)]
    recorder.read([key(5)] * 3)
    assert recorder.due(30.0) == []
    assert {(one.digest, one.number) for one in recorder.due(60.0)} == {(digest(5), 3), (digest(2), 1), (digest(3), 1)}


def test_memory_and_what_is_told_are_bounded():
    recorder = AccessRecorder(100, 60, -60.0)
    reported, now = [], 0.0
    for _ in range(20):
        recorder.read(key(random.randrange(10**6)) for _ in range(20_000))
        reported.append(recorder.due(now))
        now += 60
    assert max(map(len, reported)) == 4000
    assert len(recorder._waiting) <= 32_768
    assert recorder.take_dropped() > 0
    assert recorder.take_dropped() == 0


def test_what_is_told_grows_with_what_is_read():
    recorder = AccessRecorder(200, 300, -300.0)
    recorder.read(key(number) for number in range(150))
    assert len(recorder.due(0.0)) == 150
    recorder.read(key(number) for number in range(6000))
    assert len(recorder.due(300.0)) == 6000
    assert recorder.take_lost() is None


@pytest.mark.parametrize("batches", [1, 100])
def test_every_hit_is_told_of_or_counted_as_lost(batches):
    recorder = AccessRecorder(200, 300, -300.0)
    for batch in range(batches):
        recorder.read(key(batch * 1000 + number) for number in range(100_000 // batches))
    recorder.look(1.0)
    recorder.read([key(1)])
    reported = sum(one.number for number in range(100) for one in recorder.due(300.0 * number))
    lost = recorder.take_lost()
    assert reported + recorder.take_dropped() == 100_001
    assert lost == Hits(NO_KEY, 100_001 - reported, 1.0, lost=True)
    assert recorder.take_lost() is None


def test_what_was_lost_is_told_of_even_where_nothing_else_is():
    recorder = AccessRecorder(200, 300, 0.0)
    recorder._lose(5, 1.0)
    assert recorder.due(300.0) == [Hits(NO_KEY, 0, 300.0)]
    assert recorder.take_lost() == Hits(NO_KEY, 5, 1.0, lost=True)


def test_journals_tell_what_was_lost_and_older_readers_pass_over_it():
    journal = JournalWriter(100, 100, hits=True)
    journal.tell([Hits(digest(1), 5, 8.0), Hits(NO_KEY, 7, 9.0, lost=True)], 5000.0)
    data = journal.draft(12.0).data

    (lost,) = hits_of(data, 100.0, 77, "it", LOST)
    assert (lost["hits"], lost["at"], lost["told"], lost["digest_hi"], lost["digest_lo"]) == (7, 97.0, 5000, 0, 0)
    assert hits_of(data, 100.0, 77, "it")["hits"].tolist() == [5]
    assert len(changes_of(data, 100.0, "it")) == 0


def test_heat_is_complete_since_hits_were_last_lost():
    def lost(*rows):
        found = hits(*((0, *row) for row in rows))
        found["digest_hi"] = found["digest_lo"] = 0
        return found

    one, other = (7, START + 50, int(START) + 60, 1), (3, START + 70, int(START) + 80, 1)
    reported = HitLog()
    reported.add(np.array([START + 60], np.uint32), START + 100)
    reported.lose(lost(one), START + 100)
    reported.lose(lost(one, other), START + 100)  # the journal grew
    first = reported.span(Span(START, START, START), START + 100, START + 90)
    assert (first.since, first.lost, first.lost_at) == (START + 70, 10, START + 70)

    reported = HitLog()
    reported.add(np.array([START + 160], np.uint32), START + 200)
    reported.lose(lost(one, other), START + 200)  # told again
    again = reported.span(first, START + 200, START + 190)
    assert (again.since, again.lost, again.lost_at) == (START + 70, 10, START + 70)

    reported = HitLog()
    reported.unread(4, START + 150)
    assert reported.span(first, START + 200, START + 190) == replace(
        first, since=START + 150, lost=14, lost_at=START + 150, until=START + 190
    )


def test_who_has_nothing_to_tell_says_so_every_hour():
    recorder = AccessRecorder(100, 60, 0.0)
    assert [recorder.due(now) for now in (0.0, 60.0, 3000.0)] == [[], [], []]
    assert recorder.due(3600.0) == [Hits(NO_KEY, 0, 3600.0)]
    assert recorder.due(7000.0) == []
    recorder.read([key(1)])
    assert [one.digest for one in recorder.due(7100.0)] == [digest(1)]
    assert recorder.due(10_600.0) == []
    assert recorder.due(10_700.0) == [Hits(NO_KEY, 0, 10_700.0)]


def test_journals_tell_of_hits_beside_what_else_happened():
    journal = JournalWriter(100, 100)
    journal.note(digest(1), ContentId("ab" * 32, 7), 10.0)
    assert journal.draft(11.0).data.find(ACCESS_JOURNAL.names[-1].encode()) < 0
    journal.tell([Hits(digest(2), 5, 8.0), Hits(digest(3), 1, 9.0)], 5000.9)
    draft = journal.draft(12.0)
    journal.written(draft)
    journal.tell([Hits(digest(2), 6, 11.0)], 5000.9)  # the same second: its moment is another one
    grown = journal.draft(20.0)

    (change,) = changes_of(grown.data, 100.0, "it")
    assert (change["kind"], change["size"], change["at"]) == (1, 7, 90.0)
    found = hits_of(grown.data, 100.0, 77, "it")
    assert [(one["hits"], one["at"], one["told"], one["writer"]) for one in found.tolist() and found] == [
        (5, 88.0, 5000, 77), (1, 89.0, 5000, 77), (6, 91.0, 5001, 77),
    ]  # fmt: skip
    assert len(draft.data) == 1024 + 3 * ACCESS_JOURNAL.itemsize
    assert (ACCESS_JOURNAL.itemsize, JOURNAL.itemsize) == (65, 61)


def test_hits_that_are_counted_are_told_no_more():
    journal = JournalWriter(100, 100)
    journal.tell([Hits(digest(1), 5, 10.0)], 1000)
    journal.written(journal.draft(11.0))
    journal.tell([Hits(digest(2), 5, 12.0)], 2000)

    assert journal.forget_before(5000.0, heat_until=1500) == 0
    found = hits_of(journal.draft(20.0).data, 100.0, 1, "it")
    assert found["told"].tolist() == [2000]


def test_bytes_are_bounded_whatever_is_read():
    recorder, journal = AccessRecorder(10_000, 300, -300.0), JournalWriter(HITS_ENTRIES, HITS_ENTRIES, hits=True)
    sizes, now = [], 0.0
    for _ in range(6):
        recorder.read(key(random.randrange(10**6)) for _ in range(30_000))
        journal.tell(recorder.due(now), now)
        while (draft := journal.draft(now)) is not None:
            journal.written(draft)
            sizes.append(len(draft.data))
        now += 300
    assert len(sizes) == 6
    assert max(sizes) <= 1024 + HITS_ENTRIES * ACCESS_JOURNAL.itemsize < MAX_JOURNAL_BYTES


# --- settings -------------------------------------------------------------------------------------------------------


def settings_of(**values):
    return load({f"{ROOT}{name}": value for name, value in ({"bucket_handle": HANDLE} | values).items()}, "hfbucket.us")


@pytest.mark.parametrize(("value", "meant"), [("off", "off"), (False, "off"), (True, "on"), ("on", "on")])
def test_yaml_makes_booleans_of_on_and_off(value, meant, tmp_path):
    assert settings_of(heat=value).heat == meant
    assert from_params({"bucket_handle": HANDLE, "heat": value}).heat == meant
    path = tmp_path / "it.yaml"
    text = {False: "off", True: "on"}.get(value, f'"{value}"')
    path.write_text(
        f"remote_storage_plugins: [hfbucket.us]\nextra_config:\n  {ROOT}bucket_handle: {HANDLE}\n  {ROOT}heat: {text}\n"
    )
    assert EngineConfig.read(path).instance("hfbucket.us").heat == meant


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="heat"):
        settings_of(heat="sometimes")


@pytest.mark.parametrize(
    ("values", "records", "said"),
    [
        ({}, False, ""),
        ({"heat": "on"}, False, "needs index: snapshot, and index is off"),
        ({"heat": "on", "index": "listing"}, False, "and index is listing"),
        ({"index": "snapshot"}, True, ""),
        ({"index": "snapshot", "heat": "off"}, False, ""),
        ({"index": "snapshot", "role": "read-only"}, False, "role is read-only"),
        ({"index": "snapshot", "role": "write-only"}, False, ""),
    ],
)
def test_where_nothing_can_be_recorded_that_is_said(values, records, said):
    found = settings_of(**values)
    assert (recorder_of(found, 0.0) is not None) is records
    assert said in why_not(found)
    assert bool(said) is bool(why_not(found))


# --- engines --------------------------------------------------------------------------------------------------------

BY_HAND = {"index": "snapshot", "index_refresh_secs": 3600.0, "index_journal_secs": 3600.0, "heat_secs": 0.001}


def journals(hub, bucket):
    return [path for path in paths(hub.endpoint, bucket) if f"/{JOURNALS}/" in path]


def test_gets_are_hits_and_lookups_are_none(hub, bucket, surfaces):
    surfaces().put(range(4))
    build(hub.endpoint, bucket)
    reader = surfaces(**BY_HAND)
    index = in_use(reader)

    reader.lookup(range(4))
    reader.retrieve([0, 1])
    reader.get([0])
    assert index.flush()
    (path,) = journals(hub, bucket)
    assert path.endswith("-hits.npy")
    found = hits_of(download(hub.endpoint, bucket, path), time.time(), 1, path)

    names = [encode_name(reader.name(number)) for number in range(4)]
    reported = {tuple(row.tolist()): number for number, row in enumerate(digests_of(names))}
    assert {reported[one["digest_hi"], one["digest_lo"]]: int(one["hits"]) for one in found} == {0: 2, 1: 1}
    assert counted_by_outcome(reader, telemetry.ACCESS_HITS) == {"told": 3}
    assert path.startswith(PREFIX)
    assert index.status()["heat"] == "on"


def test_an_engine_that_reads_more_than_it_may_tell_says_so(hub, bucket, surfaces, monkeypatch, caplog):
    monkeypatch.setattr("hfbucket_plugin.index.access.recorder._WAITING_KEYS", 2)
    surfaces().put(range(5))
    build(hub.endpoint, bucket)
    reader = surfaces(**BY_HAND)
    index = in_use(reader)

    reader.retrieve(range(5))
    assert index.flush()

    (path,) = journals(hub, bucket)
    data = download(hub.endpoint, bucket, path)
    assert hits_of(data, time.time(), 1, path)["hits"].sum() == 2
    assert hits_of(data, time.time(), 1, path, LOST)["hits"].tolist() == [3]
    assert counted_by_outcome(reader, telemetry.ACCESS_HITS) == {"told": 2, "dropped": 3}
    assert "3 hits were dropped" in caplog.text


@pytest.mark.parametrize("values", [{"heat": "off"}, {"role": "read-only"}], ids=["off", "read-only"])
def test_who_records_nothing_writes_nothing(hub, bucket, surfaces, values):
    surfaces().put([0])
    build(hub.endpoint, bucket)
    reader = surfaces(**(BY_HAND | values))
    index = in_use(reader)

    reader.retrieve([0])
    index.flush()

    assert journals(hub, bucket) == []


def test_a_pointer_of_before_knows_nothing_of_heat():
    old = Pointer("a.npy", "ab" * 32, 1, 1, 1.0, 1.0, 1.0).to_bytes()
    import json

    record = {name: value for name, value in json.loads(old).items() if not name.startswith("heat")}
    assert not Pointer.parse(json.dumps(record).encode(), "it").heat.known
