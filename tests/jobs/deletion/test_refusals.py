"""What `python -m jobs cleanup` refuses or leaves alone, on a real local Hub."""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.hub.client import HubClient
from localhub.faults import Fault
from tests.support.buckets import DAY, NEW, OLD, PREFIX, SECRET, download, key


def test_more_than_max_delete_refuses_the_whole(stocked):
    before = stocked.left()
    for limit in ("3", "16%", "100B"):
        ran = stocked.cleanup("--max-age", "14d", "--yes", "--max-delete", limit)
        assert ran.code == 4
        assert "more than --max-delete allows" in ran.stderr
        assert "To carry it out" not in ran.stderr
    assert stocked.cleanup("--max-age", "1h", "--yes").code == 4, "30% is the default"
    assert stocked.left() == before
    assert stocked.cleanup("--max-age", "14d", "--yes", "--max-delete", "17%", "--max-delete", "4").code == 0


def test_an_empty_listing_refuses(depot):
    ran = depot.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 4
    assert "the listing is empty" in ran.stderr
    assert depot.all_paths() == set()


@pytest.mark.parametrize("fault", [{"status": 503}, {"truncate_at": 100}])
def test_a_listing_that_fails_refuses(stocked, fault):
    stocked.hub.control.add_fault(Fault(route="tree", path_regex=r"/tree/kv/us/$", **fault))

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 4, ran.stderr
    assert "the listing is not complete, so nothing is deleted" in ran.stderr
    stocked.hub.control.clear_faults()
    assert len(stocked.left()) == 24


def test_a_listing_that_lacks_what_the_bucket_has_refuses(depot):
    depot.prefix = ""
    depot.put(OLD + NEW, age=20 * DAY)
    first = [{"type": "file", "path": depot.path(OLD[0]), "size": 1, "xetHash": "0" * 64, "uploadedAt": "2020-01-01"}]
    depot.hub.control.add_fault(
        Fault(route="tree", path_regex=r"/tree$", status=200, body=json.dumps(first), headers={})
    )

    ran = depot.cleanup("--max-age", "14d", "--yes", "--max-delete", "100%")

    assert ran.code == 4, ran.stderr
    assert "truncated" in ran.stderr


def test_one_that_shrank_by_more_than_half_refuses_until_that_is_accepted(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    from huggingface_hub import HfApi

    api = HfApi(endpoint=stocked.hub.endpoint, token=False)
    api.batch_bucket_files(stocked.bucket_id, delete=[stocked.path(one) for one in NEW[:11]])

    ran = stocked.cleanup("--max-age", "14d", "--yes")
    assert ran.code == 4
    assert "less than half of the 20" in ran.stderr
    assert stocked.cleanup("--max-age", "14d", "--yes", "--accept-shrunk").code == 0
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0


def test_a_report_that_cannot_be_read_refuses(stocked):
    stocked.put_paths({f"{PREFIX}/.hfbucket/reports/cleanup.json": b"{}"})

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 4
    assert "no report of ours" in ran.stderr


OURS = [f"{PREFIX}/.hfbucket/bad/x.json", f"{PREFIX}/nested/.hfbucket/locks/y"]
THEIRS = [f"{PREFIX}/README.md", f"{PREFIX}/org/model@2@0@1@half", f"{PREFIX}/test%401%400%400%40bfloat16"]


def test_what_is_not_ours_is_counted_and_kept(stocked):
    stocked.put_paths(dict.fromkeys([*OURS, *THEIRS, f"{PREFIX}-east/x"], b"?"), age=90 * DAY)

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 0, ran.stderr
    assert {f"{PREFIX}-east/x", *OURS, *THEIRS} < stocked.all_paths()
    passed = {kind: extent["objects"] for kind, extent in ran.summary["passed_by"].items()}
    assert passed == {"foreign": 2, "probe": 1, "own": 3}  # the lock is ours too


def test_what_is_foreign_goes_only_when_it_is_named_and_ours_never(stocked):
    stocked.others = {"hfbucket.eu": f"{PREFIX}/eu"}
    neighbour = f"{PREFIX}/eu/{stocked.path(key(1))}"
    stocked.put_paths(dict.fromkeys([*OURS, *THEIRS, neighbour], b"?"), age=90 * DAY)
    stocked.put_paths({f"{PREFIX}/young": b"?"}, age=0)

    ran = stocked.cleanup("--max-age", "14d", "--yes", "--foreign", "delete", "--max-delete", "50%")

    assert ran.code == 0, ran.stderr
    assert {*OURS, neighbour, f"{PREFIX}/young"} < stocked.all_paths()
    assert not set(THEIRS) & stocked.all_paths()
    assert ran.counts("deleted") == [7]


def test_no_right_to_write_ends_it(hub_factory, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from tests.support.buckets import Depot

    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(
        f"tokens:\n  - {{token: hf_writer, buckets: {{'org/*': write}}}}\n  - {{token: {SECRET}, buckets: {{'org/*': read}}}}\n"
    )
    hub = hub_factory(tokens=tokens)
    api = HfApi(endpoint=hub.endpoint, token="hf_writer")
    api.create_bucket("org/kv")
    depot = Depot(hub, "org/kv", tmp_path)
    api.batch_bucket_files("org/kv", add=[(one.encode(), depot.path(one)) for one in OLD])
    depot.make_older(depot.paths_of(OLD), 20 * DAY)
    monkeypatch.setenv("JOBS_TEST_TOKEN", SECRET)

    assert depot.cleanup("--max-age", "14d", "--max-delete", "100%").counts("planned") == [4]
    ran = depot.cleanup("--max-age", "14d", "--max-delete", "100%", "--yes")
    assert ran.code == 2
    assert "403" in ran.stderr


def test_an_instance_that_only_reads_deletes_nothing(stocked):
    stocked.settings = {"role": "read-only"}

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert ran.code == 4
    assert "role is read-only" in ran.stderr


def test_a_plan_by_a_clock_that_is_ahead_of_the_hubs_is_refused(stocked, tmp_path):
    planned = stocked.cleanup("--max-age", "14d", "--plan-dir", str(tmp_path))
    plan = tmp_path / planned.summary["plan"].rpartition("/")[2]
    made_at = json.loads(plan.read_text().splitlines()[0])["made_at"]
    plan.write_text(plan.read_text().replace(made_at, made_at.replace("20", "21", 1), 1))

    ran = stocked.run("apply", str(plan), "--yes")

    assert ran.code == 4
    assert "ahead of the Hub's" in ran.stderr
    assert len(stocked.left()) == 24


def test_the_hubs_date_sets_the_clock_of_a_plan(stocked):
    header = {"Date": "Fri, 13 Aug 2010 00:00:00 GMT", "Content-Type": "application/json"}
    stocked.hub.control.add_fault(Fault(route="bucket-info", status=200, headers=header, body="{}"))

    ran = stocked.cleanup("--max-age", "14d")

    first = json.loads(open(ran.summary["plan"]).readline())  # noqa: PTH123, SIM115 - a line of a small file
    assert (first["clock"], first["made_at"][:10]) == ("hub", "2010-08-13")
    assert ran.counts("planned") == [0]
    assert "too-young: 24 objects" in ran.stderr


def test_what_is_no_chunk_lends_chunks_no_room(depot):
    """4 chunks of 4 are all of them, however much lies beside them that is none."""
    depot.put(OLD, age=20 * DAY)
    depot.put_paths({f"{PREFIX}/young-{number}.txt": b"x" for number in range(12)}, age=60)

    ran = depot.cleanup("--max-age", "14d", "--yes", "--foreign", "delete")

    assert (ran.code, ran.counts("listed", "foreign", "planned")) == (4, [4, 12, 4])
    assert "30% of 4 chunks" in ran.stderr
    assert depot.paths_of(OLD) <= depot.left()


def test_a_bucket_that_looks_as_if_nothing_were_ours_refuses(depot):
    depot.put(NEW[:10], age=1 * DAY)
    depot.put_paths({f"{PREFIX}/{number}.txt": b"x" for number in range(30)}, age=2 * DAY)
    assert depot.cleanup("--max-age", "14d", "--yes", "--foreign", "delete").code == 4
    assert len(depot.left()) == 40


def test_what_was_left_is_of_chunks(depot):
    """A run with --foreign delete does not make the next one, without it, refuse its listing."""
    depot.put(NEW[:10], age=1 * DAY)
    depot.put_paths({f"{PREFIX}/{number}.txt": b"x" for number in range(30)}, age=60)

    ran = depot.cleanup("--max-age", "14d", "--yes", "--foreign", "delete")
    assert (ran.code, ran.counts("listed", "foreign", "left")) == (0, [10, 30, 10])
    depot.make_older({f"{PREFIX}/1.txt"}, 2 * DAY)
    ran = depot.cleanup("--max-age", "14d", "--yes", "--foreign", "delete")
    assert (ran.code, ran.counts("deleted", "left")) == (0, [1, 10])
    assert depot.cleanup("--max-age", "14d", "--yes").code == 0


def with_neighbour(stocked, bucket_id, prefix):
    """The stocked depot's YAML, with another instance whose bucket is spelled in some way."""
    stocked.others = {"hfbucket.eu": prefix}
    document = json.loads(stocked.config.read_text())
    name = "remote_storage_plugin.hfbucket.eu.bucket_handle"
    document["extra_config"][name] = f"hf://buckets/{bucket_id}/{prefix}"
    path = stocked.directory / "two.yaml"
    path.write_text(json.dumps(document))
    return ["--lmcache-config", str(path), "--foreign", "delete", "--max-delete", "100%", "--yes"]


def test_a_neighbour_is_known_however_its_bucket_is_spelled(stocked):
    neighbour = f"{PREFIX}/eu/notes.txt"
    stocked.put_paths({neighbour: b"?", f"{PREFIX}/x/notes.txt": b"?"}, age=90 * DAY)

    ran = stocked.cleanup("--max-age", "14d", *with_neighbour(stocked, stocked.bucket_id.upper(), f"{PREFIX}/eu"))

    assert (ran.code, ran.counts("deleted")) == (0, [5]), ran.stderr
    assert neighbour in stocked.all_paths()


def test_a_neighbour_is_known_by_an_old_name_of_its_bucket(stocked, monkeypatch):
    """A bucket that was renamed answers to its old name: the Hub's record says the name that it has now."""
    neighbour, asked = f"{PREFIX}/eu/notes.txt", []
    stocked.put_paths({neighbour: b"?"}, age=90 * DAY)
    own = HubClient.request

    def redirected(self, method, url, **more):
        asked.append(url)
        return own(self, method, url.replace("tests/old-name", stocked.bucket_id), **more)

    monkeypatch.setattr(HubClient, "request", redirected)

    ran = stocked.cleanup("--max-age", "14d", *with_neighbour(stocked, "tests/old-name", f"{PREFIX}/eu"))

    assert (ran.code, ran.counts("deleted")) == (0, [4]), ran.stderr
    assert neighbour in stocked.all_paths()
    assert "/api/buckets/tests/old-name" in asked
    assert stocked.cleanup("--max-age", "14d", *with_neighbour(stocked, "tests/none", f"{PREFIX}/eu")).code == 0
    assert neighbour not in stocked.all_paths()


def test_what_some_engine_could_read_is_never_foreign(stocked):
    """Of an instance that this configuration does not name, of a model whose name holds `@`, of another version."""
    nested = f"{PREFIX}/eu/{encode_name(OLD[0])}"
    newer = stocked.path("org/model@2@0@1000@float4")
    ours = [key(number, model="/models/llama@v2") for number in range(3)]
    stocked.put_paths(dict.fromkeys([nested, newer], b"?"), age=20 * DAY)
    stocked.put(ours, age=20 * DAY)

    ran = stocked.cleanup(
        "--max-age", "14d", "--keep-prefix", "/models/llama@v2@", "--foreign", "delete", "--max-delete", "100%", "--yes"
    )

    assert (ran.code, ran.counts("listed", "deleted")) == (0, [27, 4]), ran.stderr
    assert {nested, newer} < stocked.all_paths()
    passed = {kind: extent["objects"] for kind, extent in ran.summary["passed_by"].items()}
    assert (passed["neighbour"], passed["unknown"]) == (1, 1)
    assert stocked.cleanup("--keep-model", "org/model", "--max-delete", "100%", "--yes").counts("deleted") == [3]


def test_a_plan_deletes_nothing_of_an_instance_that_was_declared_since(stocked, tmp_path):
    theirs = "kv/us/eu/notes.txt"
    stocked.put_paths({theirs: b"x"}, age=20 * DAY)
    plans = ("--plan-dir", str(tmp_path / "kept"))
    plan = stocked.cleanup("--max-age", "14d", "--foreign", "delete", *plans).summary["plan"]
    stocked.others = {"hfbucket.eu": "kv/us/eu"}
    assert stocked.config

    ran = stocked.run("apply", plan, "--yes")

    assert (ran.code, "belongs to another instance" in ran.stderr) == (4, True)
    assert len(stocked.left()) == 25


def test_an_old_plan_does_not_make_the_next_run_believe_a_shrunk_listing(stocked, tmp_path):
    """What is kept of a run that carries out an old plan is no less than what the last run left."""
    plans = ("--plan-dir", str(tmp_path / "kept"))
    plan = stocked.cleanup("--max-age", "14d", *plans).summary["plan"]
    many = [key(number) for number in range(1000, 1200)]
    stocked.put(many, age=1 * DAY)
    assert stocked.cleanup("--max-age", "90d", "--yes").counts("left") == [224]
    assert stocked.run("apply", plan, "--yes").counts("deleted") == [4]
    bulk = stocked.paths_of(many)
    HfApi(endpoint=stocked.hub.endpoint, token=False).batch_bucket_files(stocked.bucket_id, delete=sorted(bulk))

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert (ran.code, "less than half of the 220" in ran.stderr) == (4, True), ran.stderr


@pytest.mark.parametrize(("distinct", "reported"), [(True, "--max-duration was over"), (False, "lead back")])
def test_pages_without_end_refuse(stocked, monkeypatch, distinct, reported):
    """Empty pages, each of which names another one, end with the time; pages that name each other end at once."""
    own, pages = Bucket.list_page_dated, []

    def endless(self, prefix, cursor, deadline):
        if ".hfbucket" in prefix:
            return own(self, prefix, cursor, deadline)
        pages.append(cursor)
        assert len(pages) < 50, "it goes on for ever"
        return [], f"again={len(pages) if distinct else 0}", None

    monkeypatch.setattr(Bucket, "list_page_dated", endless)
    if distinct:
        monkeypatch.setattr("jobs.deletion.job.Deadline.passed", property(lambda _: len(pages) > 5))

    ran = stocked.run("rm", OLD[0])

    assert (ran.code, reported in ran.stderr) == (4, True), ran.stderr


def overlapping(monkeypatch, times):
    """The Hub's pages show each object several times."""
    own = Bucket.list_objects

    def repeated(self, prefix, *more):
        for info in own(self, prefix, *more):
            yield from [info] * (1 if ".hfbucket" in prefix else times)

    monkeypatch.setattr(Bucket, "list_objects", repeated)


def test_an_object_that_is_shown_again_lends_no_room_to_the_cap(depot, monkeypatch):
    depot.put([key(number) for number in range(6)], age=20 * DAY)
    overlapping(monkeypatch, 4)

    ran = depot.cleanup("--max-objects", "1", "--yes")
    assert (ran.code, "24 objects (18 of them again)" in ran.stderr) == (4, False), "in a bucket of 7 files"
    assert "again) where the bucket says that it has 7" in ran.stderr

    ran = depot.cleanup("--max-objects", "1", "--yes", "--accept-shrunk")
    assert (ran.code, ran.counts("listed", "planned")) == (4, [6, 5])
    assert "--max-delete" in ran.stderr
    assert len(depot.left()) == 6


def edited(plan, path):
    """A plan into which somebody wrote that what is no chunk may be deleted, and what."""
    header, *items, end = Path(plan).read_text().splitlines()
    record = json.loads(items[0]) | {"path": path, "key": path.rpartition("/")[2]}
    lines = [json.dumps(json.loads(header) | {"foreign": True}), json.dumps(record), *items[1:], end]
    Path(plan).write_text("\n".join(lines) + "\n")


def test_what_a_plan_was_not_made_for_is_not_deleted_unless_it_is_asked_for_again(stocked, tmp_path):
    theirs = f"{PREFIX}/README.md"
    stocked.put_paths({theirs: b"?"}, age=20 * DAY)
    plan = stocked.cleanup("--max-age", "14d", "--plan-dir", str(tmp_path / "kept")).summary["plan"]
    edited(plan, theirs)

    ran = stocked.run("apply", plan, "--yes")

    assert (ran.code, ran.stdout) == (4, "")
    assert "was not made with --foreign delete" in ran.stderr
    assert theirs in stocked.all_paths()
    assert stocked.run("apply", plan, "--yes", "--foreign", "delete").code == 0


def test_a_plan_that_was_made_for_it_needs_no_flag(stocked, tmp_path):
    theirs = f"{PREFIX}/README.md"
    stocked.put_paths({theirs: b"?"}, age=20 * DAY)
    plans = ("--plan-dir", str(tmp_path / "kept"))
    plan = stocked.cleanup("--max-age", "14d", "--foreign", "delete", *plans).summary["plan"]

    assert stocked.run("apply", plan, "--yes").counts("deleted") == [5]


def claim_of(seconds):
    return f"{PREFIX}/.hfbucket/locks/{'a' * 16}@{seconds}@somebody@claim"


def test_a_claim_holds_for_ten_minutes_whatever_its_name_says(stocked):
    stocked.put_paths({claim_of(999999): b"x"}, age=60)
    ran = stocked.cleanup("--max-age", "14d", "--yes")
    assert (ran.code, "locked by somebody" in ran.stderr) == (4, True)

    stocked.make_older([claim_of(999999)], 700)
    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert (ran.code, ran.counts("deleted")) == (0, [4]), ran.stderr
    assert claim_of(999999) not in stocked.all_paths()


def report(stocked, name, **changed):
    path = f"{PREFIX}/.hfbucket/reports/{name}.json"
    record = json.loads(download(stocked.hub.endpoint, stocked.bucket_id, f"{PREFIX}/.hfbucket/reports/cleanup.json"))
    stocked.put_paths({path: json.dumps(record | changed).encode()}, age=0)


def test_a_report_that_contradicts_itself_is_not_believed(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    report(stocked, "cleanup", left={"objects": 0, "bytes": 0})

    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert (ran.code, "it leaves 0 of 24 objects, and 4 were deleted" in ran.stderr) == (4, True), ran.stderr


def test_what_is_no_report_of_a_job_that_deletes_says_nothing_of_what_was_left(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    report(stocked, "zzz", left={"objects": 10**9, "bytes": 0})

    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    report(stocked, "rm", left={"objects": 10**9, "bytes": 0})
    ran = stocked.cleanup("--max-age", "14d", "--yes")

    assert (ran.code, "it says that it is of job 'cleanup'" in ran.stderr) == (4, True), ran.stderr
