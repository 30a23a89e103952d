"""From an engine's gets to what a cleanup keeps and a warm-up copies first, with real connectors on a real local Hub."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from typer.testing import CliRunner

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import MissingError, ThrottledError, TransportError
from hfbucket_plugin.index import build as index_build
from hfbucket_plugin.index.access.recorder import NO_KEY, Hits
from hfbucket_plugin.index.access.stats import has_access_columns
from hfbucket_plugin.index.access.table import open_access_table
from hfbucket_plugin.index.format import snapshot_of
from hfbucket_plugin.index.store import JOURNALS, POINTER
from hfbucket_plugin.index.table import digests_of
from jobs.deletion.planning import Planning
from jobs.retention.policy import read as read_policy
from tests.jobs.index.test_index import stocked  # noqa: F401 - a fixture
from tests.support.buckets import DAY, HOUR, INSTANCE, key, upload
from tests.support.indexes import Writer, bucket_client, build_job, forge, in_use, of_index, pointer, seen
from tests.support.lmcache_classic import Classic, running_loop
from tests.support.lmcache_mp import MP
from tests.support.surface import Limits
from warmer.cli.app import app as warmer_app

PATIENT = Limits(lookup=20, get=20, put=30)
MONTH = 30 * DAY
SECS = 30.0


@pytest.fixture(params=["classic", "mp"])
def engines(request, depot, tmp_path):
    """Makes engines of one kind on the depot's instance."""
    made = []
    with running_loop() as loop:

        def make(**values):
            handle = f"hf://buckets/{depot.bucket_id}/{depot.prefix}"
            common = {"handle": handle, "endpoint": depot.hub.endpoint, "limits": PATIENT, "metadata_cache_ttl_secs": 0}
            directory = tmp_path / f"engine{len(made)}"
            directory.mkdir()
            name = f"hfbucket.{request.param}{len(made)}"
            if request.param == "classic":
                made.append(Classic(name, loop, directory, **common | values))
            else:
                made.append(MP(name, directory, **common | values))
            return made[-1]

        yield make
        for one in made:
            one.close()


BY_HAND = {"index": "snapshot", "index_refresh_secs": 3600.0, "index_journal_secs": 3600.0, "heat_secs": 0.001}


@pytest.fixture
def counting(monkeypatch):
    """Has builds count what was told up to so many seconds ago: what was told a moment ago is else counted by a later one."""
    return lambda ago: monkeypatch.setattr("hfbucket_plugin.index.build.ACCESS_LATE_SECS", ago)


def since(depot, **changes):
    """Let the pointer say something else, as it would after a month, or of a builder that runs no more."""
    with bucket_client(depot) as (_, store):
        before = pointer(depot)
        store.publish(replace(before, **changes), Deadline.after(SECS))


def looked_up(depot, keys):
    with bucket_client(depot) as (bucket, _), open_access_table(bucket, datetime.now(UTC), SECS) as table:
        return None if table is None else dict(zip(keys, table.look_up([encode_name(k) for k in keys]), strict=True))


def plan_of(ran):
    lines = [json.loads(line) for line in open(ran.summary["plan"], encoding="utf-8")]  # noqa: PTH123, SIM115 - a test's
    return lines[0], lines[1:-1], lines[-1]


def test_what_engines_read_outlives_budgets_and_idleness_and_is_warmed_first(depot, engines, counting, tmp_path):
    writer = engines()
    writer.put(range(6))
    names = [writer.name(number) for number in range(6)]
    depot.make_older([depot.path(name) for name in names[:3]], 50 * DAY)  # the hot ones are the oldest
    depot.make_older([depot.path(name) for name in names[3:]], 40 * DAY)
    build_job(depot)
    reader = engines(**BY_HAND)
    index = in_use(reader)
    for number, times in ((0, 9), (1, 4), (2, 1)):
        for _ in range(times):
            assert reader.retrieve([number])[1][0] is not None
    assert index.flush()
    counting(-60)
    reported = build_job(depot).summary
    assert reported["heat_since"] is not None
    since(depot, heat_since=time.time() - 45 * DAY)
    loose = ("--max-delete", "60%")

    planned = depot.cleanup("--max-idle", "30d", *loose)
    header, items, end = plan_of(planned)
    assert header["heat"]["known"]
    assert {(one["key"], one["reason"]) for one in items} == {(name, "idle") for name in names[3:]}
    assert all(one["last_used"] == one["uploaded_at"] for one in items)
    assert end["latest"]["idle"]["put"] == end["latest"]["idle"]["used"]
    assert f"{INSTANCE}: by last use: hits are known since" in planned.stderr
    assert f"{INSTANCE}: idle: the last of these was put 40 d ago, and used 40 d ago" in planned.stderr

    _, items, _ = plan_of(depot.cleanup("--max-objects", "3", *loose))
    assert {one["key"] for one in items} == set(names[3:])
    _, items, _ = plan_of(depot.cleanup("--max-objects", "3", "--without-heat", *loose))
    assert {one["key"] for one in items} == set(names[:3])

    # One of those that were to go is read before the plan is carried out.
    assert reader.retrieve([4])[1][0] is not None
    time.sleep(0.01)
    assert index.flush()
    done = depot.run("apply", planned.summary["plan"], "--yes")
    assert (done.code, done.counts("deleted", "used", "unfinished")) == (0, [2, 1, 0])
    assert depot.left() == depot.paths_of([*names[:3], names[4]])

    # The snapshot does not know of that read yet, the journals do.
    done = depot.cleanup("--max-objects", "3", "--yes", *loose)
    assert (done.code, done.counts("planned", "deleted", "used")) == (0, [1, 0, 1])

    tier = "remote_storage_plugin.fs.warm.base_path"
    config = tmp_path / "warm.yaml"
    document = json.loads(depot.config.read_text())
    document["remote_storage_plugins"].append("fs.warm")
    document["extra_config"] |= {tier: str(tmp_path / "tier"), "save_chunk_meta": False}
    config.write_text(json.dumps(document))
    if "classic" in reader.instance:  # the tier below is one of that engine
        out = tmp_path / "plan.jsonl"
        ran = CliRunner().invoke(
            warmer_app,
            [
                "plan",
                "--lmcache-config",
                str(config),
                "--instance",
                INSTANCE,
                "--all",
                "--hottest",
                "2",
                "--tier",
                "fs.warm",
                "--out",
                str(out),
            ],
        )
        assert ran.exit_code == 0, ran.stderr
        header, *chunks = [json.loads(line) for line in out.read_text().splitlines()]
        assert header["order"] == {"by": "heat", "why": ""}
        assert [one["key"] for one in chunks] == names[:2]
        assert chunks[0]["heat"] > chunks[1]["heat"]


# --- the builder ----------------------------------------------------------------------------------------------------


def reads(writer, reported, **numbers):
    """Let a writer tell of hits: `k3=7` are seven of key 3."""
    hits = [
        Hits(digests_of([encode_name(key(int(name[1:])))]).tobytes(), number, time.monotonic())
        for name, number in numbers.items()
    ]
    writer.hits.tell(hits, reported)
    return writer.tell(writer.hits)


def heat_by_key(depot, *numbers):
    found = looked_up(depot, [key(number) for number in numbers])
    return [found[key(number)].bucket for number in numbers]


def test_heat_is_added_up_kept_by_listings_and_lost_with_the_key(stocked, counting):  # noqa: F811 - the fixture
    build_job(stocked)
    assert looked_up(stocked, [key(0)]) is None
    one, other = Writer(stocked), Writer(stocked)
    reported = time.time() - 250
    reads(one, reported, k0=8, k1=5)
    reads(other, reported, k0=9, k2=2)
    counting(150)
    build_job(stocked)
    assert heat_by_key(stocked, 0, 1, 2, 3) == [5, 3, 2, 0]  # 17, 5, 2 and none, a little less each
    assert [use.last is None for use in looked_up(stocked, [key(0), key(3)]).values()] == [False, True]

    # What longer journals tell again adds nothing; a put keeps heat, a delete ends it.
    one.put(key(1), data=b"again")
    one.delete(key(0))
    one.tell()
    other.put(key(30))
    other.tell()
    counting(50)
    build_job(stocked)
    assert heat_by_key(stocked, 0, 1, 2, 30) == [0, 3, 2, 0]
    assert looked_up(stocked, [key(0)])[key(0)].last is None
    before = pointer(stocked)

    counting(40)
    assert build_job(stocked, "--full").summary["made_of"] == "listing"
    assert heat_by_key(stocked, 0, 1, 2, 30) == [0, 3, 2, 0]
    assert pointer(stocked).heat_since == before.heat_since
    assert len(seen(stocked, [key(n) for n in range(8)])) == 7  # readers see what they saw
    assert build_job(stocked, "--verify").summary["differences"]["examples"] == {}


def test_every_tell_counts_once_however_often_a_journal_repeats_it(stocked, counting):  # noqa: F811 - the fixture
    build_job(stocked)
    writer, reported = Writer(stocked), time.time() - 290
    for times in range(4):
        reads(writer, reported + 60 * times, **({"k0": 5} if times == 0 else {"k1": 3}))
        counting(230 - 60 * times)
        build_job(stocked)
        assert heat_by_key(stocked, 0)[0] == 3
    assert heat_by_key(stocked, 1) == [4]


def test_what_is_told_too_late_is_no_heat_but_a_use(stocked, counting):  # noqa: F811 - the fixture
    build_job(stocked)
    writer = Writer(stocked)
    reads(writer, time.time() - 250, k0=5)
    counting(150)
    build_job(stocked)
    reads(writer, time.time() - 240, k1=5)
    counting(50)
    build_job(stocked)
    assert heat_by_key(stocked, 0, 1) == [3, 0]
    assert looked_up(stocked, [key(1)])[key(1)].last is not None


def test_a_lost_snapshot_lets_heat_start_over(stocked):  # noqa: F811 - the fixture
    build_job(stocked)
    writer = Writer(stocked)
    reads(writer, time.time(), k0=8)
    build_job(stocked)
    since(stocked, heat_since=time.time() - MONTH)
    upload(stocked.hub.endpoint, stocked.bucket_id, {f"{stocked.prefix}/{POINTER}": b"garbage"})

    build_job(stocked, "--full")

    assert pointer(stocked).heat_since > time.time() - HOUR or not pointer(stocked).heat.known


def test_a_listing_for_too_many_journals_keeps_the_heat_of_before(stocked, counting, monkeypatch):  # noqa: F811 - as above
    build_job(stocked)
    reads(Writer(stocked), time.time() - 250, k0=8)
    counting(150)
    build_job(stocked)
    for _ in range(3):
        reads(Writer(stocked), time.time(), k1=1)
    for module in ("hfbucket_plugin.index.store", "jobs.index.inventory", "jobs.index.build"):
        monkeypatch.setattr(f"{module}.MAX_JOURNALS", 2)
    monkeypatch.setattr("hfbucket_plugin.index.store.IndexStore.list", _too_many)

    assert build_job(stocked).summary["made_of"] == "listing"
    assert heat_by_key(stocked, 0, 1) == [4, 0]


def _too_many(*_):
    """As of a listing of several pages."""
    raise TransportError("more journals than are read")


@pytest.mark.parametrize(
    ("error", "times", "code"), [(TransportError, 1, 0), (MissingError, 9, 0), (ThrottledError, 9, 3)]
)
def test_a_listing_forgets_no_heat_because_a_read_failed_and_makes_nothing_idle(hot, monkeypatch, error, times, code):
    kept = error is not MissingError
    before = pointer(hot)
    with bucket_client(hot) as (bucket, _):
        assert bucket.delete(of_index(hot, JOURNALS), Deadline.after(SECS)) == {}
    fetch, failed = index_build.fetch_snapshot, []

    def failing(bucket, store, which, path, deadline):
        if path.name == "before.npy" and len(failed) < times:
            failed.append(which)
            raise error("the store did not answer")
        fetch(bucket, store, which, path, deadline)

    monkeypatch.setattr(index_build, "fetch_snapshot", failing)

    build_job(hot, "--full", code=code)
    assert failed
    after = pointer(hot)
    assert after.heat.known
    assert (after.heat_since == before.heat_since) is kept
    planned = hot.cleanup("--max-idle", "5d", "--max-delete", "100%").counts("planned")
    assert planned == [8 if kept else 0]


def test_without_hits_snapshots_have_no_more_columns(stocked):  # noqa: F811 - the fixture
    from tests.support.buckets import download

    build_job(stocked)
    path = f"{stocked.prefix}/.hfbucket/index/snapshots/{pointer(stocked).snapshot}"
    data = download(stocked.hub.endpoint, stocked.bucket_id, path)
    assert not has_access_columns(snapshot_of(data, path).rows.dtype)
    assert of_index(stocked, JOURNALS) == []


# --- absence is told apart from failure -----------------------------------------------------------------------------


@pytest.fixture
def hot(stocked):  # noqa: F811 - the fixture
    """An instance with heat, as after a month."""
    build_job(stocked)
    reads(Writer(stocked), time.time(), k0=8)
    build_job(stocked)
    since(stocked, heat_since=time.time() - MONTH)
    return stocked


@pytest.mark.parametrize("indexed", [False, True])
def test_an_instance_without_heat_goes_by_when_objects_were_put_and_says_so(stocked, indexed):  # noqa: F811 - as above
    if indexed:
        build_job(stocked)
    ran = stocked.cleanup("--max-idle", "5d", "--max-delete", "100%")

    header, items, _ = plan_of(ran)
    assert (ran.code, len(items)) == (0, 9)
    assert header["heat"]["known"] is False
    assert "no hits are recorded" in ran.summary["heat"]["why"]
    assert "by when objects were put, not by when they were read: no hits are recorded" in ran.stderr
    assert {one["last_used"] for one in items} == {None}


@pytest.mark.parametrize("broken", ["garbage", "stale", "untold"])
def test_an_index_that_cannot_be_gone_by_refuses_what_needs_heat(hot, broken):
    if broken == "garbage":
        upload(hot.hub.endpoint, hot.bucket_id, {f"{hot.prefix}/{POINTER}": b"garbage"})
    else:
        since(hot, **{{"stale": "covers", "untold": "heat_told"}[broken]: time.time() - 2 * DAY})
    loose = ("--max-delete", "100%")

    for flags in (("--max-idle", "5d"), ("--max-bytes", "1KiB")):
        ran = hot.cleanup(*flags, *loose, "--yes")
        assert ran.code == 4, ran.stderr
        assert "--without-heat" in ran.stderr
    assert hot.cleanup("--max-age", "30d").code == 0
    ran = hot.cleanup("--max-idle", "5d", *loose, "--without-heat")
    assert (ran.code, ran.summary["heat"]["why"]) == (0, "--without-heat was given")
    reported = json.loads(hot.run("status", "--json", "--max-idle", "5d").stdout)
    assert "--without-heat" in reported["next_cleanup"]["refused"]
    assert reported["reads"] == []


def test_a_plan_by_reads_is_not_carried_out_when_these_are_known_no_more(hot):
    ran = hot.cleanup("--max-idle", "5d", "--max-delete", "100%")
    upload(hot.hub.endpoint, hot.bucket_id, {f"{hot.prefix}/{POINTER}": b"garbage"})

    done = hot.run("apply", ran.summary["plan"], "--yes")
    assert (done.code, "--without-heat" in done.stderr) == (4, True)
    done = hot.run("apply", ran.summary["plan"], "--yes", "--without-heat")
    assert (done.code, done.counts("deleted")) == (0, [8])


def test_what_was_read_while_it_was_planned_stays_though_its_journal_was_pruned(hot, monkeypatch, tmp_path):
    """A listing takes long, and meanwhile a builder makes a snapshot and prunes what it has of journals.

    It is as fast as it can be: in one second of the Hub's clock with the builder before.
    """
    finish = Planning.finish

    def late(planning):
        finish(planning)
        planned_by = pointer(hot)
        path = reads(Writer(hot), time.time(), k1=1)
        with bucket_client(hot) as (bucket, store):
            index_build.publish(store, index_build.from_journals(bucket, store, tmp_path, SECS), Deadline.after(SECS))
            assert bucket.delete([path], Deadline.after(SECS)) == {}
        since(hot, covers=planned_by.covers)

    monkeypatch.setattr(Planning, "finish", late)

    ran = hot.cleanup("--max-idle", "5d", "--max-delete", "100%", "--yes")
    assert (ran.code, ran.counts("deleted", "used")) == (0, [7, 1])


def test_status_tells_the_hot_and_the_idle_share(hot, tmp_path):
    reported = json.loads(hot.run("status", "--json").stdout)
    assert [(one["read_within"], one["objects"]) for one in reported["reads"]] == [("1d", 1), ("never", 8)]
    assert reported["heat"]["known"]
    lines = hot.run("status", "--html", str(tmp_path / "it.html")).stdout
    assert f"{INSTANCE}: read within 1d: 1, " in lines
    assert f"{INSTANCE}: never read: 8, " in lines
    assert "By last read" in (tmp_path / "it.html").read_text()
    quick = json.loads(hot.run("status", "--json", "--without-heat").stdout)
    assert quick["reads"] == []


def test_plans_of_before_are_read(hot, tmp_path):
    ran = hot.cleanup("--max-age", "5d", "--max-delete", "100%", "--plan-dir", str(tmp_path))
    lines = [json.loads(line) for line in open(ran.summary["plan"], encoding="utf-8")]  # noqa: PTH123, SIM115 - a test's
    for line in lines:
        for name in ("heat", "last_used", "latest"):
            line.pop(name, None)
    old = tmp_path / "old.jsonl"
    old.write_text("".join(json.dumps(line) + "\n" for line in lines))

    done = hot.run("apply", str(old), "--yes")
    assert (done.code, done.counts("deleted")) == (0, [9])


def test_a_policy_file_has_it_too(tmp_path):
    path = tmp_path / "retention.yaml"
    path.write_text("default:\n  max_idle: 30d\n  rules:\n    - model: m\n      max_idle: 3d\n")
    policy = read_policy(path, "any")
    assert policy.max_idle.days == 30
    assert policy.rules[0].max_idle.days == 3


# --- what recorders dropped -----------------------------------------------------------------------------------------


def loses(writer, number, ago=0.0):
    """Have a writer tell that it dropped hits, and told of it so long ago."""
    now = time.monotonic()
    writer.hits.tell([Hits(NO_KEY, 0, now), Hits(NO_KEY, number, now, lost=True)], time.time() - ago)
    return writer.tell(writer.hits)


LOOSE = ("--max-delete", "100%")


def test_since_hits_were_dropped_nothing_is_idle_and_plan_and_summary_say_how_many(hot, counting):
    counting(-60)
    loses(Writer(hot), 777)
    summary = build_job(hot).summary
    assert (summary["heat_lost"], summary["heat_lost_at"]) == (777, summary["heat_since"])

    ran = hot.cleanup("--max-idle", "5d", *LOOSE)
    assert (ran.code, ran.counts("planned")) == (0, [0])
    assert ran.summary["heat"]["dropped"] == 777
    assert plan_of(ran)[0]["heat"]["dropped_at"] == ran.summary["heat"]["since"]
    assert "engines dropped 777 hits" in ran.stderr
    reported = json.loads(hot.run("status", "--json", "--max-objects", "3").stdout)
    assert "engines dropped 777 hits" in reported["next_cleanup"]["refused"]
    assert reported["heat"]["dropped"] == 777


def test_a_budget_is_refused_for_a_day_after_hits_were_dropped_unless_it_holds(hot, counting):
    counting(-60)
    loses(Writer(hot), 777)
    build_job(hot)

    ran = hot.cleanup("--max-objects", "3", *LOOSE, "--yes")
    assert (ran.code, "engines dropped 777 hits" in ran.stderr) == (4, True)
    assert hot.cleanup("--max-objects", "100", *LOOSE).code == 0
    assert hot.cleanup("--max-objects", "3", *LOOSE, "--without-heat").code == 0
    since(hot, heat_lost_at=time.time() - 2 * DAY)
    assert hot.cleanup("--max-objects", "3", *LOOSE).code == 0


@pytest.mark.parametrize("built", [False, True])
def test_a_plan_is_not_carried_out_when_hits_were_dropped_since(hot, counting, built):
    ran, there = hot.cleanup("--max-idle", "5d", *LOOSE), hot.left()
    counting(-60)
    loses(Writer(hot), 777)
    if built:
        build_job(hot)

    done = hot.run("apply", ran.summary["plan"], "--yes")
    assert (done.code, "engines dropped 777 hits" in done.stderr) == (4, True)
    assert hot.left() == there


def test_what_the_plan_knows_was_dropped_does_not_hold_it_up(hot, counting):
    counting(-60)
    loses(Writer(hot), 777)
    build_job(hot)
    since(hot, heat_since=time.time() - MONTH, heat_lost_at=time.time() - 10 * DAY)
    ran = hot.cleanup("--max-idle", "5d", *LOOSE)
    with bucket_client(hot) as (bucket, _):
        bucket.delete(of_index(hot, JOURNALS), Deadline.after(SECS))

    assert hot.run("apply", ran.summary["plan"], "--yes").code == 0


def test_a_journal_of_hits_that_cannot_be_read_counts_as_dropped(hot):
    path = reads(Writer(hot), time.time(), k5=1)
    upload(hot.hub.endpoint, hot.bucket_id, {path: b"garbage"})
    build_job(hot)

    assert pointer(hot).heat_lost >= 1
    ran = hot.cleanup("--max-idle", "5d", *LOOSE, "--yes")
    assert (ran.code, ran.counts("planned")) == (0, [0])


def test_a_later_loss_does_not_forget_an_earlier_one(hot, counting):
    since(hot, heat_until=time.time() - 270)
    loses(Writer(hot), 700, ago=250)
    counting(150)
    build_job(hot)
    loses(Writer(hot), 77, ago=100)
    counting(50)
    build_job(hot)
    assert pointer(hot).heat_lost == 777


# --- times that others may write ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["covers", "heat_since", "heat_until", "heat_told", "heat_lost_at"])
def test_times_ahead_of_the_hubs_clock_are_refused_and_healed_by_the_next_listing(hot, name):
    since(hot, **{name: time.time() + 30 * DAY})

    for flags in (("--max-idle", "5d"), ("--max-objects", "3")):
        ran = hot.cleanup(*flags, *LOOSE, "--yes")
        assert ran.code == 4
        assert f"its {name} (" in ran.stderr
        assert "ahead of the Hub's clock" in ran.stderr
    assert f"its {name} (" in hot.run("status").stdout
    assert f"its {name} (" in json.loads(hot.run("status", "--json").stdout)["index"]["trouble"]
    build_job(hot)
    assert hot.cleanup("--max-idle", "5d", *LOOSE, "--yes").counts("planned") == [0]


def test_a_hit_of_the_future_is_refused_and_healed(hot):
    def later(rows):
        rows["last_hit"] = int(time.time() + 30 * DAY)
        return rows

    forge(hot.hub.endpoint, hot.bucket_id, later, hot.prefix)

    ran = hot.cleanup("--max-idle", "5d", *LOOSE, "--yes")
    assert (ran.code, "last_hit" in ran.stderr, "ahead of the Hub's clock" in ran.stderr) == (4, True, True)
    build_job(hot)
    assert hot.cleanup("--max-idle", "5d", *LOOSE, "--yes").counts("planned") == [0]  # all were read just now, then
