"""Exports on a real local Hub: what is copied, how, and what is left as it is."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfbucket_plugin.core.keys import encode_name
from hfbucket_plugin.errors import ThrottledError
from hfbucket_plugin.hub.bucket import Bucket
from hfbucket_plugin.hub.client import HubClient
from jobs.export.bucket import InstanceEnd
from localhub.faults import Fault
from tests.support.buckets import DAY, EU, HOUR, SECRET, US, ExportRig, key, l2_key, names, noise, upload

KEYS = [key(number) for number in range(6)] + [l2_key(number) for number in range(3)]


@pytest.fixture
def rig(hub, new_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put({one: noise(2000 + number, number) for number, one in enumerate(KEYS)})
    hub.control.reset_counters()
    return rig


def test_five_hundred_objects_are_copied_by_the_hub_and_no_byte_comes_here(hub, new_bucket, tmp_path):
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put({key(number): noise(1000, number) for number in range(500)})
    rig.us.put_paths({f"{rig.us.prefix}/README.md": b"no chunk"})
    hub.control.reset_counters()

    ran = rig.export()

    assert ran.code == 0, ran.stderr
    assert ran.counts("chosen", "copied", "streamed", "failed", "unfinished") == [500, 500, 0, 0, 0]
    assert (ran.summary["how"], "from bucket to bucket" in ran.summary["why"]) == ("copy", True)
    assert rig.data_requests() == {}
    there = rig.listing(rig.us)
    del there["README.md"]
    assert rig.listing(rig.eu) == there
    hub.control.reset_counters()

    again = rig.export()

    assert (again.code, again.counts("there_already", "copied", "streamed")) == (0, [500, 0, 0])
    assert (rig.data_requests(), hub.control.counters().route("batch").requests) == ({}, 0)


def rig_with_tokens(hub_factory, tmp_path, monkeypatch, eu_reads):
    from huggingface_hub import HfApi

    tokens = tmp_path / "tokens.yaml"
    rights = {"org/eu": "write"} | ({"org/us": "read"} if eu_reads else {})
    tokens.write_text(
        json.dumps(
            {
                "tokens": [
                    {"token": "hf_admin", "buckets": {"org/*": "write"}},
                    {"token": "hf_us_only", "buckets": {"org/us": "read"}},
                    {"token": SECRET, "buckets": rights},
                ]
            }
        )
    )
    hub = hub_factory(tokens=tokens, faults=True)
    api = HfApi(endpoint=hub.endpoint, token="hf_admin")
    for name in ("org/us", "org/eu"):
        api.create_bucket(name, private=True)
    rig = ExportRig.on(hub, tmp_path, "org/us", "org/eu")
    rig.tokens = {"admin": "hf_admin"}
    api.batch_bucket_files("org/us", add=[(noise(2000, n), rig.us.path(one)) for n, one in enumerate(KEYS)])
    monkeypatch.setenv("JOBS_TEST_US", "hf_us_only")
    monkeypatch.setenv("JOBS_TEST_EU", SECRET)
    hub.control.reset_counters()
    return rig


@pytest.mark.parametrize("eu_reads", [True, False])
def test_whether_the_destinations_token_may_read_the_source_is_said_by_the_hub(
    hub_factory, tmp_path, monkeypatch, eu_reads
):
    rig = rig_with_tokens(hub_factory, tmp_path, monkeypatch, eu_reads)

    ran = rig.export("--report", str(tmp_path / "report.jsonl"))

    assert ran.code == 0, ran.stderr
    assert ran.summary["how"] == ("copy" if eu_reads else "stream")
    assert ran.counts("copied", "streamed") == ([9, 0] if eu_reads else [0, 9])
    assert ("refused to copy" in ran.summary["why"]) is not eu_reads
    assert rig.listing(rig.eu) == rig.listing(rig.us)
    assert bool(rig.data_requests()) is not eu_reads
    written = (tmp_path / "report.jsonl").read_text()
    assert json.loads(written.splitlines()[-1])["why"] == ran.summary["why"]
    assert not [token for token in (SECRET, "hf_us_only", "hf_admin") if token in written + ran.stdout + ran.stderr]


def test_another_region_is_streamed_and_only_copying_is_refused(hub, new_bucket, tmp_path):
    rig = ExportRig.on(hub, tmp_path, new_bucket(region="us"), new_bucket(region="eu"))
    rig.us.put({one: noise(3000, n) for n, one in enumerate(KEYS)})

    refused = rig.export("--mode", "copy")
    assert (refused.code, rig.listing(rig.eu)) == (4, {})
    assert "stored in region us" in refused.stderr
    assert "--mode auto" in refused.stderr

    ran = rig.export("--window", "8KB", "--parallel", "2")
    assert ran.code == 0, ran.stderr
    assert (ran.summary["how"], ran.counts("streamed")) == ("stream", [9])
    assert "stored in region us" in ran.summary["why"]
    assert rig.listing(rig.eu) == rig.listing(rig.us)


def test_a_mode_that_is_ordered_is_taken(rig):
    assert rig.export("--mode", "copy").counts("copied", "streamed") == [9, 0]
    rig.eu.prefix = "kv/other"
    ran = rig.export("--mode", "stream")
    assert ran.counts("copied", "streamed") == [0, 9]
    assert rig.listing(rig.eu) == rig.listing(rig.us)


@pytest.mark.parametrize(("how", "replaced"), [("skip", []), ("newer", [1]), ("overwrite", [0, 1])])
def test_conflicts(rig, how, replaced, tmp_path):
    rig.eu.put({KEYS[0]: b"newer at the destination"}, age=1 * DAY)
    rig.eu.put({KEYS[1]: b"older at the destination"}, age=20 * DAY)
    rig.eu.put({KEYS[2]: noise(2002, 2)}, age=20 * DAY)
    before = rig.listing(rig.eu)

    planned = rig.export("--on-conflict", how)
    if replaced:
        assert (planned.code, planned.summary["result"]) == (0, "planned")
        assert rig.listing(rig.eu) == before, "nothing is replaced unasked"
        assert planned.summary["planned"]["replaced"]["objects"] == len(replaced)
        ran = rig.export("--on-conflict", how, "--yes", "--report", str(tmp_path / "report"))
    else:
        ran = planned
    assert ran.code == 0, ran.stderr
    assert ran.counts("conflicts", "there_already") == [2 - len(replaced), 1]
    there, here = rig.listing(rig.eu), rig.listing(rig.us)
    kept = names(KEYS[number] for number in (0, 1) if number not in replaced)
    assert {name for name in there if there[name] != here[name]} == kept
    assert all(there[name] == before[name] for name in kept)
    assert names(one["to"] for one in ran.summary["conflicting"]) == kept
    assert all(one in ran.stderr for one in KEYS if names([one]) <= kept)


def test_what_changed_at_the_destination_since_the_plan_stays(rig, tmp_path):
    rig.eu.put({KEYS[0]: b"to be replaced", KEYS[1]: b"the same"})
    plan = rig.export("--on-conflict", "overwrite", "--plan-dir", str(tmp_path)).summary["plan"]
    rig.eu.put({KEYS[0]: b"written since", KEYS[3]: b"written since, too"}, age=0)
    before = rig.listing(rig.eu)

    ran = rig.apply(plan, "--yes")

    assert ran.code == 0, ran.stderr
    assert ran.counts("changed", "copied", "failed") == [2, 7, 0]
    there, here = rig.listing(rig.eu), rig.listing(rig.us)
    assert {name for name in there if there[name] != here[name]} == names([KEYS[0], KEYS[3]])
    assert all(there[name] == before[name] for name in names([KEYS[0], KEYS[3]]))
    again = rig.apply(plan, "--yes")
    assert (again.code, again.counts("same", "changed", "copied")) == (0, [7, 2, 0])


def test_what_the_source_lost_since_the_plan_is_told(rig, tmp_path):
    from huggingface_hub import HfApi

    plan = rig.export("--dry-run", "--plan-dir", str(tmp_path)).summary["plan"]
    assert rig.listing(rig.eu) == {}
    api = HfApi(endpoint=rig.hub.endpoint, token=False)
    api.batch_bucket_files(rig.us.bucket_id, delete=[rig.us.path(KEYS[0])])
    rig.us.put({KEYS[1]: b"rewritten"})

    ran = rig.apply(plan)

    assert ran.code == 0, ran.stderr
    assert ran.counts("gone", "copied", "failed") == [2, 7, 0]
    assert rig.listing(rig.eu).keys() == names(KEYS[2:])


def test_the_selection_of_the_warmer(rig, tmp_path):
    rig.us.put({key(50, "org/other"): b"x" * 9}, age=HOUR)
    keys = tmp_path / "keys"
    keys.write_text("\n".join([KEYS[0], key(77)]))
    for arguments, wanted in (
        (["--model", "org/other"], [key(50, "org/other")]),
        (["--newest", "1"], [key(50, "org/other")]),
        (["--keys-from", str(keys)], [KEYS[0]]),
        (["--prefix", "org/model@2@", "--exclude", "*@1001@*"], [one for one in KEYS[:6] if one != KEYS[1]]),
        (["--max-bytes", "9"], [key(50, "org/other")]),
        (["--since", "2h"], [key(50, "org/other")]),
        (["--world-size", "2", "--workers", "1"], []),
    ):
        rig.eu.prefix = f"kv/{arguments[0].strip('-')}"
        ran = rig.export(*arguments)
        assert ran.code == (0 if wanted else 4), (arguments, ran.stderr)
        assert rig.listing(rig.eu).keys() == names(wanted), arguments


def test_since_counts_back_from_the_clock_of_the_hub(rig, monkeypatch):
    """This machine's clock is three days ahead."""
    monkeypatch.setattr("jobs.cli.export.now", lambda: datetime.now(UTC) + timedelta(days=3))
    rig.us.put({key(50, "org/other"): b"the newest"}, age=1 * HOUR)
    rig.eu.prefix = "kv/since"
    ran = rig.export("--since", "2h")
    assert ran.code == 0, ran.stderr
    assert rig.listing(rig.eu).keys() == names([key(50, "org/other")])


def test_rename(rig):
    ran = rig.export("--rename", "org/model@=org/alias@")
    assert ran.code == 0, ran.stderr
    renamed = names(one.replace("org/model@", "org/alias@") for one in KEYS)
    assert rig.listing(rig.eu).keys() == renamed
    assert sorted(rig.listing(rig.eu).values()) == sorted(rig.listing(rig.us).values())

    again = rig.export("--rename", "org/model@=org/alias@")
    assert again.counts("there_already") == [9]


@pytest.mark.parametrize(
    ("rules", "reported"),
    [
        (["org/model@2@=org/model@"], "too few fields|not a valid LMCache key|names another chunk"),
        (["org/model@2@0@1000@=x@2@0@1001@"], "names another chunk"),
        (["org/model@2@0@=org/model@2@1@"], "would both be"),
    ],
)
def test_a_rename_that_makes_no_key_or_one_twice_copies_nothing(rig, rules, reported):
    import re

    rig.us.put({key(0, worker=1): b"in the way"})
    ran = rig.export(*[text for rule in rules for text in ("--rename", rule)])

    assert (ran.code, rig.listing(rig.eu)) == (4, {})
    assert re.search(reported, ran.stderr), ran.stderr


def test_within_one_instance_under_other_names(rig):
    ran = rig.export("--rename", "org/model@=org/alias@", "--prefix", "org/model@2@", to=US)

    assert ran.code == 0, ran.stderr
    assert len(rig.listing(rig.us)) == 15
    assert rig.data_requests() == {}


def test_single_objects_that_the_hub_does_not_copy_are_streamed(rig):
    rig.hub.control.add_fault(Fault(route="batch", items="%401003%40", items_error="not this one", times=3))
    # The first object tells that the Hub copies; the batch of the others meets the fault, and its last one once more.
    ran = rig.export()

    assert ran.code == 0, ran.stderr
    assert ran.counts("copied", "streamed", "failed") == [8, 1, 0]
    assert rig.listing(rig.eu) == rig.listing(rig.us)


@pytest.mark.parametrize("status", [400, 403])
def test_a_hub_that_refuses_copies_as_a_whole_is_believed(rig, status):
    rig.hub.control.add_fault(Fault(route="batch", status=status, body='{"error": "no copyFile here"}', times=1))

    ran = rig.export()

    assert (ran.code, ran.summary["how"], ran.counts("streamed")) == (0, "stream", [9]), ran.stderr
    assert "no copyFile here" in ran.summary["why"]
    assert rig.listing(rig.eu) == rig.listing(rig.us)


def test_a_hub_that_does_not_say_whether_it_copies_is_not_guessed_at(rig):
    rig.hub.control.add_fault(Fault(route="batch", status=500))

    ran = rig.export()

    assert (ran.code, rig.listing(rig.eu)) == (3, {})
    assert "give --mode stream" in ran.stderr


def test_what_fails_is_named_and_a_plan_goes_on(rig, tmp_path):
    rig.hub.control.add_fault(Fault(route="batch", items="%401003%40", items_error="quota of Mars"))

    ran = rig.export("--plan-dir", str(tmp_path))

    assert ran.code == 3
    assert ran.counts("copied", "failed", "unfinished") == [8, 1, 0]
    (failure,) = ran.summary["failures"]
    assert "quota of Mars" in failure["message"]
    assert f"python -m jobs apply {ran.summary['plan']}" in ran.stderr
    rig.hub.control.clear_faults()
    again = rig.apply(ran.summary["plan"])
    assert (again.code, again.counts("same", "copied")) == (0, [8, 1])
    assert rig.listing(rig.eu) == rig.listing(rig.us)


FAULTS = (
    {"route": "paths-info", "status": 503, "times": 2},
    {"route": "batch", "truncate_at": 3, "times": 2},
    {"route": "batch", "status": 502, "times": 2},
    {"route": "batch", "status": 429, "headers": {"Retry-After": "1"}, "times": 1},
    {"route": "reconstruction", "status": 500, "times": 4},
    {"route": "xorb-data", "truncate_at": 100, "times": 2},
    {"route": "shard-upload", "status": 500, "times": 1},
)


@pytest.mark.parametrize(
    ("mode", "fault"),
    [("auto", fault) for fault in FAULTS[:4]] + [("stream", fault) for fault in FAULTS],
    ids=lambda one: one if isinstance(one, str) else f"{one['route']}-{one.get('status', 'cut')}",
)
def test_faults_that_pass_are_waited_out(rig, mode, fault):
    number = rig.hub.control.add_fault(Fault(**fault))

    ran = rig.export("--mode", mode, "--parallel", "1")

    if ran.code == 3 and not ran.summary.get("failures"):  # a plan, or what the Hub permits, could not be asked for
        ran = rig.export("--mode", mode, "--parallel", "1")
    assert ran.code == 0, ran.stderr
    assert rig.listing(rig.eu) == rig.listing(rig.us)
    assert rig.hub.control.hits(number) or fault["route"] == "shard-upload"


@pytest.mark.parametrize("fault", [{"truncate_at": 50}, {"flip_at": (1000,)}], ids=["short", "flipped"])
def test_bytes_that_are_not_the_object_get_no_name(rig, fault):
    rig.hub.control.add_fault(Fault(route="xorb-data", **fault))

    ran = rig.export("--mode", "stream")

    assert ran.code == 3
    streamed, failed = ran.counts("streamed", "failed")
    assert (failed >= 1, streamed + failed) == (True, 9)
    there, here = rig.listing(rig.eu), rig.listing(rig.us)
    assert len(there) == streamed
    assert all(there[name] == here[name] for name in there)


def test_a_plan_that_was_edited_copies_less_and_never_elsewhere(rig, tmp_path):
    plan = rig.export("--dry-run", "--plan-dir", str(tmp_path)).summary["plan"]
    lines = Path(plan).read_text(encoding="utf-8").splitlines()
    cut = tmp_path / "cut.jsonl"
    cut.write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    assert rig.apply(str(cut)).counts("copied") == [7]

    for number, change in enumerate(
        (
            {"key": "../../etc/passwd"},
            {"path": "kv/elsewhere/x"},
            {"xet_hash": "../x"},
            {"there": {"key": KEYS[3], "size": 1, "xet_hash": "0" * 64, "uploaded_at": None}},
        )
    ):
        edited = tmp_path / f"edited-{number}.jsonl"
        edited.write_text("\n".join([lines[0], json.dumps(json.loads(lines[1]) | change), *lines[2:]]) + "\n")
        ran = rig.apply(str(edited))
        assert (ran.code, "line 2" in ran.stderr) == (2, True), ran.stderr
    rig.eu.prefix = "kv/moved"
    assert rig.config.exists()  # rewritten: the plan names it
    moved = rig.apply(plan)
    assert (moved.code, "is for hf://buckets" in moved.stderr) == (2, True)


def test_a_destination_that_is_to_be_created(rig):
    rig.eu.bucket_id += "-new"
    assert rig.export().code == 2
    rig.eu.settings = {"create_bucket_if_missing": True}
    assert rig.export("--dry-run").counts("chosen") == [9]
    ran = rig.export()
    assert ran.code == 0, ran.stderr
    assert rig.listing(rig.eu) == rig.listing(rig.us)


def test_adapters_of_mp_mode(rig):
    def adapter(name, depot):
        params = {"bucket_handle": f"hf://buckets/{depot.bucket_id}/{depot.prefix}", "endpoint": rig.hub.endpoint}
        return json.dumps({"type": "hfbucket", "name": name} | params)

    both = [text for one in (adapter("a", rig.us), adapter("b", rig.eu)) for text in ("--l2-adapter", one)]
    ran = rig.command(["export", *both, "--from", "a", "--to", "b"])

    assert ran.code == 0, ran.stderr
    assert rig.listing(rig.eu) == rig.listing(rig.us)


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--to", US], "same place"),
        (["--to", "mars"], "'mars'"),
        (["--to", "hf://buckets/org/kv"], "name the instance"),
        (["--mode", "teleport"], "--mode"),
        (["--on-conflict", "fight"], "--on-conflict"),
        (["--rename", "a@"], "OLD=NEW"),
        (["--rename", "a@=b@", "--rename", "a@1=c@"], "takes all of its keys"),
        (["--window", "much"], "--window"),
        (["--since", "24"], "--since"),
        (["--all", "--prefix", "x"], "contradict"),
        (["--mirror", "--newest", "3"], "--newest"),
        (["--mirror", "--rename", "a@=b@"], "--rename"),
        (["--mirror", "--to", "./somewhere"], "two instances"),
        (["--without-manifest"], "--without-manifest"),
        (["--from", "./nowhere"], "is no directory"),
        (["--mode", "copy", "--to", "./somewhere"], "buckets only"),
        (["--metrics-textfile", "/nowhere/x"], "--metrics-textfile"),
    ],
)
def test_commands_that_cannot_be_meant(rig, arguments, reported, monkeypatch):
    monkeypatch.chdir(rig.directory)
    ran = rig.export(*arguments)

    assert ran.code in (2, 4), ran.stderr
    assert reported in ran.stderr


def test_a_destination_that_stores_nothing_is_refused(rig):
    rig.eu.settings = {"role": "read-only"}
    ran = rig.export()
    assert (ran.code, "role is read-only" in ran.stderr) == (4, True)


def test_a_token_in_the_configuration_never_travels(rig, monkeypatch):
    rig.us.settings = {"token": SECRET}

    ran = rig.export("--mode", "stream", "--address", "127.0.0.1:9")

    assert (ran.code, rig.listing(rig.eu)) == (2, {})
    assert "token is written into the configuration" in ran.stderr
    assert "--local" in ran.stderr
    assert rig.export("--mode", "stream", "--address", "127.0.0.1:9", "--local").code == 0


def test_a_cluster_that_does_not_answer_is_told_and_copying_needs_none(rig):
    refused = rig.export("--mode", "stream", "--address", "127.0.0.1:9")
    assert refused.code == 2
    assert "127.0.0.1:9" in refused.stderr
    assert rig.export("--address", "127.0.0.1:9").counts("copied") == [9]


def test_metrics(rig, tmp_path):
    path = tmp_path / "jobs.prom"
    assert rig.export("--metrics-textfile", str(path)).code == 0
    reported = path.read_text()
    assert f'hfbucket_jobs_copied_objects{{instance="{EU}",job_name="export"}} 9.0' in reported
    assert f'hfbucket_jobs_exit_code{{instance="{EU}",job_name="export"}} 0.0' in reported


def test_our_own_records_and_the_probe_are_never_copied(rig):
    files = {".hfbucket/reports/cleanup.json": b"{}", "test%401%400%400%40bfloat16": b"probe", "nested/x": b"x"}
    upload(rig.hub.endpoint, rig.us.bucket_id, {f"{rig.us.prefix}/{name}": data for name, data in files.items()})

    ran = rig.export()

    assert (ran.code, ran.summary["skipped"]) == (0, {"probe": 1})
    assert rig.listing(rig.eu).keys() == names(KEYS)


def engine_writes(rig, monkeypatch, mode):
    """An engine stores another content under the first key when the name is about to be given, while the Hub pauses."""
    own, written = InstanceEnd.publish if mode == "stream" else InstanceEnd.copy, []

    def meanwhile(self, *arguments):
        if not written:
            written.append(b"what an engine wrote")
            rig.eu.put({KEYS[0]: written[0]}, age=0)
            raise ThrottledError("the Hub pauses", 0.01)
        return own(self, *arguments)

    monkeypatch.setattr(InstanceEnd, "publish" if mode == "stream" else "copy", meanwhile)
    return written


@pytest.mark.parametrize("mode", ["stream", "copy", "auto"])
def test_what_an_engine_stores_during_a_pause_of_the_hub_is_never_replaced(rig, monkeypatch, mode):
    written = engine_writes(rig, monkeypatch, mode)

    ran = rig.export("--mode", mode)

    assert (ran.code, ran.counts("changed", "failed", "unfinished")) == (0, [1, 0, 0]), ran.stderr
    assert sum(ran.counts("copied", "streamed")) == len(KEYS) - 1
    assert rig.listing(rig.eu)[encode_name(KEYS[0])][1] == len(written[0])


def test_copies_that_are_all_overtaken_by_engines_are_no_refusal_of_the_hub(rig, monkeypatch):
    engine_writes(rig, monkeypatch, "copy")

    ran = rig.export("--mode", "copy", "--prefix", KEYS[0])

    assert (ran.code, ran.counts("changed", "copied")) == (0, [1, 0]), ran.stderr


@pytest.mark.parametrize("mode", ["stream", "copy"])
def test_a_name_is_given_once_by_a_look_that_is_fresh_and_never_for_long(rig, monkeypatch, mode):
    looks, named = [], []
    own_look, own_request = Bucket.stat, HubClient.request
    clock = SimpleNamespace(monotonic=lambda: sum(looks), sleep=None)
    monkeypatch.setattr("jobs.export.copy.time", clock)

    def slow_at_first(self, paths, deadline, *, patient=True):
        found = own_look(self, paths, deadline, patient=patient)
        looks.append(0.0 if patient or len(looks) > 6 else 3.5)
        return found

    def noted(self, method, url, **more):
        if more["route"] == "batch" and b"File" in more["content"] and b".hfbucket" not in more["content"]:
            named.append((sum(looks), more["attempts"], more["patient"], more["deadline"].remaining()))
        return own_request(self, method, url, **more)

    monkeypatch.setattr(Bucket, "stat", slow_at_first)
    monkeypatch.setattr(HubClient, "request", noted)

    ran = rig.export("--mode", mode, "--parallel", "1")

    assert ran.code == 0, ran.stderr
    assert named
    assert all(attempts == 1 and not patient and seconds <= 10 for _, attempts, patient, seconds in named)
    assert sum(looks) > 3.5, "old looks were done again"
    assert all(at == sum(looks) for at, *_ in named)
