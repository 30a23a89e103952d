"""`python -m jobs index` on a real local Hub: what it builds is what a reader should see, and it touches nothing else."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.index.store import JOURNALS, SNAPSHOTS
from jobs.cli.app import app
from localhub.faults import Fault
from tests.support.buckets import EU, HOUR, PREFIX, ExportRig, download, key, l2_key, upload
from tests.support.indexes import Writer, bucket_client, build_job, listed, of_index, pointer, seen, strangers

KEYS = [key(number) for number in range(8)] + [l2_key(1)]
INDEX = f"{PREFIX}/.hfbucket/index"


@pytest.fixture
def stocked(depot):
    depot.put(KEYS)
    depot.put_paths({"elsewhere/of-somebody-else": b"x", f"{PREFIX}2/near": b"y", f"{PREFIX}/nested/object": b"z"})
    return depot


def test_what_is_built_is_what_the_listing_has(stocked):
    before = strangers(stocked)

    reported = build_job(stocked).summary

    assert (reported["job"], reported["result"], reported["made_of"], reported["why"]) == (
        "index", "complete", "listing", "there is no snapshot yet",
    )  # fmt: skip
    assert reported["left"] == {"objects": len(KEYS), "bytes": sum(len(one.encode()) for one in KEYS)}
    assert seen(stocked, [*KEYS, key(99)]) == listed(stocked, KEYS)
    assert pointer(stocked).keys == len(KEYS)
    assert strangers(stocked) == before
    report = json.loads(download(stocked.hub.endpoint, stocked.bucket_id, f"{PREFIX}/.hfbucket/reports/index.json"))
    assert (report["left"]["objects"], report["snapshot"]) == (len(KEYS), pointer(stocked).snapshot)


def test_of_journals_comes_what_a_listing_would_give(stocked):
    build_job(stocked)
    one, other = Writer(stocked), Writer(stocked)
    one.put(key(20), key(21))
    one.delete(key(0))
    one.tell()
    other.put(key(1), data=b"again")
    other.delete(key(20))
    other.tell()

    reported = build_job(stocked).summary

    assert (reported["made_of"], reported["journals"], reported["left"]["objects"]) == ("journals", 2, len(KEYS))
    by_journals = seen(stocked, [*KEYS, key(20), key(21)])
    assert by_journals == listed(stocked, [*KEYS, key(20), key(21)])
    before = pointer(stocked)
    reported = build_job(stocked, "--full").summary
    assert (reported["made_of"], reported["why"]) == ("listing", "--full asked for it")
    assert seen(stocked, [*KEYS, key(20), key(21)]) == by_journals
    assert pointer(stocked).keys == before.keys
    assert pointer(stocked).listed >= before.listed  # of one second, when all of this takes less


def test_journals_alone_do_not_list_the_instance(stocked):
    build_job(stocked)
    stocked.hub.control.add_fault(Fault(route="tree", path_regex=r"/tree/kv%2Fus%2F$|/tree/kv/us/$", status=500))

    assert build_job(stocked).summary["made_of"] == "journals"


def test_what_no_journal_told_comes_with_the_next_listing_which_is_due_in_time(stocked):
    build_job(stocked)
    stocked.put([key(50)])

    build_job(stocked)
    assert seen(stocked, [key(50)]) == {}
    reported = build_job(stocked, "--full-every", "1s").summary

    assert reported["why"] == "the last listing is older than --full-every"
    assert key(50) in seen(stocked, [key(50)])


def test_where_nothing_changed_the_snapshot_serves_on(stocked):
    build_job(stocked)
    first = pointer(stocked)

    reported = build_job(stocked).summary

    assert reported["unchanged"]
    assert (pointer(stocked).snapshot, pointer(stocked).listed) == (first.snapshot, first.listed)
    assert pointer(stocked).covers >= first.covers
    assert len(of_index(stocked, SNAPSHOTS)) == 1


def test_a_dry_run_writes_nothing(stocked):
    before = stocked.all_paths()
    stocked.hub.control.reset_counters()

    reported = build_job(stocked, "--dry-run").summary

    assert (reported["result"], reported["published"], reported["left"]["objects"]) == ("planned", False, len(KEYS))
    assert stocked.all_paths() == before
    assert stocked.hub.control.counters().route("batch").requests == 0


def test_an_adapters_json_and_all_instances_name_them_too(stocked):
    params = {"bucket_handle": f"hf://buckets/{stocked.bucket_id}/{PREFIX}", "endpoint": stocked.hub.endpoint}
    adapter = json.dumps({"type": "hfbucket", "name": "mp.us"} | params)
    assert CliRunner().invoke(app, ["index", "--l2-adapter", adapter]).exit_code == 0
    assert pointer(stocked).keys == len(KEYS)

    stocked.others = {"hfbucket.none": "kv/none"}
    ran = build_job(stocked, "--all-instances", code=4)  # of the one that holds nothing
    assert [(one["instance"], one["exit_code"]) for one in ran.lines] == [("hfbucket.us", 0), ("hfbucket.none", 4)]
    assert CliRunner().invoke(app, ["index", "--lmcache-config", str(stocked.config)]).exit_code == 2


def test_a_report_names_every_object_that_goes(stocked):
    build_job(stocked)
    (old,) = of_index(stocked, SNAPSHOTS)
    stocked.make_older([old], 2 * HOUR)
    stocked.put([key(30)], age=0)
    path = stocked.directory / "report.jsonl"

    build_job(stocked, "--full", "--keep", "1", "--report", str(path))

    header, gone, summary = map(json.loads, path.read_text().splitlines())
    assert (header["job"], gone["path"], gone["outcome"], gone["reason"]) == ("index", old, "deleted", "old-snapshot")
    assert summary["deleted"]["objects"] == 1


def test_a_role_that_writes_nothing_publishes_nothing(stocked):
    stocked.settings["role"] = "read-only"

    assert "no index is published" in build_job(stocked, code=4).stderr
    assert build_job(stocked, "--dry-run").summary["left"]["objects"] == len(KEYS)


# --- what refuses -----------------------------------------------------------------------------------------------------------


def test_an_empty_listing_is_believed_once_it_was_accepted(depot):
    assert "the listing is empty: nothing is published" in build_job(depot, code=4).stderr
    assert depot.all_paths() == set()

    build_job(depot, "--accept-shrunk")

    assert pointer(depot).keys == 0
    assert build_job(depot, "--full").summary["left"]["objects"] == 0


def test_a_listing_that_shrank_is_refused_and_the_index_stays(stocked):
    build_job(stocked)
    first = pointer(stocked)
    Writer(stocked).delete(*KEYS[:5])

    ran = build_job(stocked, "--full", code=4)

    assert "less than half of the 9 that the last run left: nothing is published" in ran.stderr
    assert pointer(stocked) == first
    assert build_job(stocked, "--full", "--accept-shrunk").summary["left"]["objects"] == 4


def test_a_cleanup_is_no_shrinking_and_a_build_none_to_a_cleanup(stocked):
    build_job(stocked)
    stocked.put([key(n) for n in range(100, 103)], age=0)
    assert stocked.cleanup("--max-age", "1d", "--max-delete", "90%", "--yes").code == 0

    assert build_job(stocked, "--full").summary["left"]["objects"] == 3
    last = json.loads(stocked.run("status", "--json").stdout)["last_run"]
    assert last["job"] == "cleanup"


def test_a_truncated_listing_of_a_whole_bucket_is_refused(depot, monkeypatch):
    depot.prefix = ""
    depot.put(KEYS)
    monkeypatch.setattr("jobs.index.build.files_in", lambda _bucket: 100)

    ran = depot.run("index")

    assert ran.code == 4
    assert "it is truncated, and nothing is published" in ran.stderr


def test_a_pointer_that_is_none_is_replaced_only_when_that_is_asked_for(stocked):
    upload(stocked.hub.endpoint, stocked.bucket_id, {f"{INDEX}/current.json": b'{"version": 2}'})

    ran = build_job(stocked, code=4)

    assert "upgrade" in ran.stderr
    assert "nothing is published" in ran.stderr
    assert build_job(stocked, "--full").summary["published"]


# --- faults -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(route="tree", path_regex="kv", status=500),
        Fault(route="tree", path_regex=r"/tree/kv(%2F|/)us(%2F|/)$", truncate_at=40),
        Fault(route="batch", status=500),
        Fault(route="paths-info", status=500),
        Fault(route="shard-upload", status=500),
        Fault(route="reconstruction", status=500),
    ],
    ids=lambda fault: fault.route + (" truncated" if fault.truncate_at else ""),
)
def test_a_hub_that_fails_leaves_the_index_as_it_was(stocked, fault, monkeypatch):
    monkeypatch.setattr("jobs.index.job.REQUEST_SECS", 5.0)
    monkeypatch.setattr("jobs.index.build.REQUEST_SECS", 5.0)
    build_job(stocked)
    first, keys = pointer(stocked), seen(stocked, KEYS)
    stocked.put([key(60)], age=0)
    stocked.hub.control.add_fault(fault)

    ran = stocked.run("index", "--full", "--max-duration", "10s", "--lock-lifetime", "20s")
    stocked.hub.control.clear_faults()

    assert ran.code == 3, ran.stderr
    assert pointer(stocked) == first
    assert seen(stocked, KEYS) == keys


def test_a_pause_that_the_hub_asks_for_is_waited_out(stocked):
    stocked.hub.control.add_fault(Fault(route="tree", status=429, headers={"Retry-After": "1"}, times=2))
    stocked.hub.control.add_fault(Fault(route="batch", status=429, headers={"Retry-After": "1"}, times=1))

    assert build_job(stocked).summary["published"]


# --- other jobs tell it ------------------------------------------------------------------------------------------------------


def test_a_cleanup_tells_readers_what_it_deleted(stocked):
    stocked.put([key(n) for n in range(300, 310)], age=0)
    build_job(stocked)

    assert stocked.cleanup("--max-age", "1d", "--max-delete", "90%", "--yes", "--batch-size", "3").code == 0

    assert len(of_index(stocked, JOURNALS)) == 1
    keys = [*KEYS, *(key(n) for n in range(300, 310))]
    assert seen(stocked, keys) == listed(stocked, keys)
    assert len(seen(stocked, keys)) == 10


def test_a_job_on_an_instance_without_an_index_writes_no_journal(stocked):
    stocked.put([key(n) for n in range(300, 310)], age=0)

    assert stocked.cleanup("--max-age", "1d", "--max-delete", "90%", "--yes").code == 0

    assert not any("/index/" in path for path in stocked.all_paths())


def test_a_cleanup_that_could_tell_nobody_says_so_and_is_done(stocked, caplog):
    stocked.put([key(n) for n in range(300, 310)], age=0)
    build_job(stocked)
    stocked.hub.control.add_fault(Fault(route="batch", items="/journal/"))

    assert stocked.cleanup("--max-age", "1d", "--max-delete", "90%", "--yes").code == 0

    assert f"{len(KEYS)} changes were not recorded in the key index" in caplog.text
    assert "jobs index --full" in caplog.text


def test_an_export_tells_readers_of_the_destination(hub, new_bucket, tmp_path):
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put(KEYS)
    rig.eu.put([KEYS[0]])
    assert rig.command(["index", "--lmcache-config", str(rig.config), "--instance", EU]).code == 0
    build_before = pointer(rig.eu)

    assert rig.export().code == 0

    assert pointer(rig.eu) == build_before
    assert seen(rig.eu, KEYS) == listed(rig.eu, KEYS)
    assert len(seen(rig.eu, KEYS)) == len(KEYS)


def test_what_a_growing_journal_tells_again_does_not_come_back(stocked):
    """A writer put a chunk long ago, somebody deleted it, a build knew of both; then the writer's journal grows."""
    build_job(stocked)
    with bucket_client(stocked) as (_, store):
        earlier = pointer(stocked)
        long_ago = replace(
            earlier, covers=earlier.covers - 3 * HOUR, listed=earlier.listed - 3 * HOUR, full=earlier.full
        )
        store.publish(long_ago, Deadline.after(30))
    writer, other = Writer(stocked), Writer(stocked)
    writer.put(key(400), age=2 * HOUR)
    journals = [writer.tell()]
    other.delete(key(400))
    journals.append(other.tell())
    stocked.make_older(journals, 600)
    assert build_job(stocked).summary["made_of"] == "journals"
    assert seen(stocked, [key(400)]) == {}

    writer.put(key(401))
    writer.tell()

    assert list(seen(stocked, [key(400), key(401)])) == [key(401)]
    build_job(stocked)
    assert list(seen(stocked, [key(400), key(401)])) == [key(401)]
    assert pointer(stocked).full == earlier.full
