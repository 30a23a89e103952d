"""`doctor` on a real Hub: healthy instances, and what lies in their buckets."""

import json
from io import StringIO

import pytest
from rich.console import Console

from hfbucket_plugin.cli.doctor import findings_table
from hfbucket_plugin.cli.findings import Severity, error, ok, warning
from hfbucket_plugin.index.store import IndexStore
from localhub.faults import Fault
from tests.support.buckets import (
    CHECKS,
    HEAD,
    INSTANCE,
    PREFIX,
    TOKEN_ENV,
    Desk,
    key,
    l2_key,
    noise,
    paths,
    run,
    well_kept,
)
from tests.support.indexes import build, forge, unsorted
from tests.support.waiting import unused_port


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture
def desk(hub, new_bucket, tmp_path):
    """An instance with nothing to fix: a private bucket with chunks in it."""
    desk = Desk(hub.endpoint, new_bucket(private=True, region="eu"), tmp_path)
    desk.put({key(number): noise(50_000, number) for number in range(3)})
    return desk


# --- healthy ---------------------------------------------------------------------------------------------------------


def test_a_healthy_instance(desk):
    ran = desk.doctor()

    assert ran.code == 0
    assert ran.stderr == ""
    assert ran.severities() == dict.fromkeys(CHECKS, "ok") | {"clock": "note"}  # a local Hub sends no Date
    assert list(ran.findings) == CHECKS
    assert not ran.skipped
    assert f"hf://buckets/{desk.bucket_id}/{PREFIX}" in ran.reported("config")
    assert TOKEN_ENV in ran.reported("token")
    assert desk.endpoint in ran.reported("endpoint")
    assert ran.findings["bucket"]["found"] == f"{desk.bucket_id} exists, private, region eu, 146.5 KiB in 3 objects"
    assert ran.findings["listing"]["found"] == "3 objects: 3 with classic keys"
    assert "48.8 KiB in" in ran.reported("throughput")
    assert "hash right: org/model@2@0@10" in ran.reported("throughput")


def test_the_document(desk):
    ran = desk.doctor()

    assert set(ran.summary) == {"exit_code", "instances"}
    assert ran.summary["exit_code"] == 0
    (instance,) = ran.summary["instances"]
    assert {name: instance[name] for name in ("instance", "mode", "bucket_handle", "endpoint")} == {
        "instance": INSTANCE,
        "mode": "classic",
        "bucket_handle": f"hf://buckets/{desk.bucket_id}/{PREFIX}",
        "endpoint": desk.endpoint,
    }
    assert {frozenset(finding) for finding in instance["findings"]} == {
        frozenset({"check", "severity", "found", "mend"})
    }


def test_lines_where_stdout_is_no_terminal(desk, monkeypatch):
    monkeypatch.delenv(TOKEN_ENV)
    ran = desk.run("doctor")

    assert ran.code == 1
    assert [line.split(": ")[:3] for line in ran.stdout.splitlines()][:4] == [
        [INSTANCE, "ok", "config"],
        [INSTANCE, "ok", "engine"],
        [INSTANCE, "ok", "hash seed"],
        [INSTANCE, "warning", "token"],
    ]
    assert len(ran.stdout.splitlines()) == len(CHECKS)
    assert ran.stdout.splitlines()[3].endswith(f"; set {TOKEN_ENV}, or name another variable with {HEAD}token_env")


def test_a_table_where_stdout_is_a_terminal(desk, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = desk.run("doctor")

    assert ran.code == 0
    assert f"hf://buckets/{desk.bucket_id}" in ran.stdout
    assert "what was found" in ran.stdout
    assert all(check in ran.stdout for check in CHECKS)


def test_texts_of_others_are_no_markup():
    out = StringIO()
    Console(file=out, width=100, markup=False).print(
        findings_table("[red]title[/]", [error("listing", "an object [bold]x[/bold]", "fix [it]"), ok("b", "[/]")])
    )

    assert all(text in out.getvalue() for text in ("[red]title[/]", "[bold]x[/bold]", "→ fix [it]", "[/]"))


def test_an_adapter_of_mp_mode(hub, bucket, tmp_path):
    desk = Desk(hub.endpoint, bucket, tmp_path)
    desk.put({l2_key(1): noise(1000)})

    ran = run("doctor", "--json", "--l2-adapter", desk.adapter)

    assert ran.code == 0
    assert list(ran.findings) == [name for name in CHECKS if name not in {"engine", "hash seed"}]
    assert ran.summary["instances"][0]["mode"] == "mp"
    assert ran.findings["listing"]["found"] == "1 object: 1 with MP keys"
    assert "public" in ran.reported("bucket")
    assert ran.findings["bucket"]["severity"] == "note"


def test_the_builtin_adapters_json_will_do(hub, new_bucket):
    handle = f"hf://buckets/{new_bucket()}/{PREFIX}"
    adapter = {"type": "hfbucket", "bucket_handle": handle, "endpoint": hub.endpoint, "token_env": TOKEN_ENV}

    assert run("doctor", "--json", "--l2-adapter", json.dumps(adapter)).findings["bucket"]["severity"] == "note"


def test_several_instances_each_with_its_own_findings(desk, tmp_path):
    other = Desk(f"http://127.0.0.1:{unused_port()}", "org/other", tmp_path)

    ran = desk.doctor("--l2-adapter", other.adapter)

    assert ran.code == 3
    assert [one["mode"] for one in ran.summary["instances"]] == ["classic", "mp"]
    assert all(finding["severity"] in {"ok", "note"} for finding in ran.summary["instances"][0]["findings"])


# --- what lies in the bucket -----------------------------------------------------------------------------------------


def test_an_empty_bucket(hub, bucket, tmp_path):
    ran = Desk(hub.endpoint, bucket, tmp_path).doctor()

    assert ran.code == 0
    assert ran.reported("listing") == "ok: no objects yet; "
    assert ran.findings["throughput"]["found"] == "skipped: no chunk is known to read"


def test_foreign_objects(desk):
    desk.put_objects({"README.md": b"x", "sub/dir": b"y"})
    ran = desk.doctor()

    assert ran.code == 0
    assert ran.reported("listing") == (
        f"note: 5 objects: 3 with classic keys, 2 foreign; the first foreign one is '{PREFIX}/README.md'; "
        "engines pass them by"
    )


def test_keys_of_the_other_mode(desk):
    ran = run("doctor", "--json", "--l2-adapter", desk.adapter)

    assert ran.code == 1
    assert "keys of the classic engine, and this configuration is one of MP mode" in ran.reported("listing")
    assert "adapter_params.bucket_handle" in ran.reported("listing")


def test_names_that_would_play_with_the_terminal(desk):
    desk.put_objects({"bad\x1b[2Jname": b"x"})
    ran = desk.run("doctor")

    assert "\x1b" not in ran.stdout
    assert "x1b" in ran.stdout


@pytest.mark.parametrize(("verify", "advice"), [("size", f"set {HEAD}verify to hash"), ("hash", "is never served")])
def test_bytes_that_are_not_what_was_stored(hub, desk, tmp_path, verify, advice):
    desk.settings |= {"verify": verify, "download_tmp_dir": str(tmp_path / "scratch")}
    hub.control.add_fault(Fault(route="xorb-data", flip_every=20_000))
    ran = desk.doctor()

    assert ran.code == 3
    reported = ran.reported("throughput")
    assert reported.startswith("error: the bytes of a chunk are not what was stored: org/model@2@0@")
    assert advice in reported


def test_records_of_bad_objects(desk):
    desk.put_objects({".hfbucket/bad/one.json": b"{}", ".hfbucket/bad/two.json": b"{}"})
    ran = desk.doctor()

    assert ran.code == 1
    assert f"2 records of bad objects below {PREFIX}/.hfbucket/bad/" in ran.reported("records")


def test_what_a_killed_probe_left(desk):
    desk.put_objects({".hfbucket/probe/0123": b"x"})
    ran = desk.doctor()

    assert ran.code == 0
    assert f"{PREFIX}/.hfbucket/probe/0123" in ran.reported("records")
    assert ran.findings["records"]["severity"] == "note"


def test_an_index_that_engines_go_by(desk, monkeypatch):
    assert "index" not in desk.doctor().findings
    desk.settings["index"] = "snapshot"

    ran = desk.doctor()
    assert ran.code == 1
    assert f"there is no snapshot below {PREFIX}/.hfbucket/index" in ran.reported("index")
    assert "python -m jobs index" in ran.reported("index")

    pointer = build(desk.endpoint, desk.bucket_id, PREFIX)
    ran = desk.doctor()
    assert ran.code == 0
    assert f"ok: {pointer.keys} keys, brought up to date " in ran.reported("index")

    listed = IndexStore.list
    for field, said in (("strangers", "a call more"), ("crowded", "not all journals are read")):

        def crowded(store, deadline, field=field):
            listing = listed(store, deadline)
            setattr(listing, field, "it holds strangers: delete them")
            return listing

        with monkeypatch.context() as patched:
            patched.setattr(IndexStore, "list", crowded)
            reported = desk.doctor().reported("index")
        assert "it holds strangers: delete them" in reported
        assert said in reported

    forge(desk.endpoint, desk.bucket_id, unsorted, PREFIX)
    assert "not in the order of their digests" in desk.doctor().reported("index")
    build(desk.endpoint, desk.bucket_id, PREFIX)

    desk.settings |= {"index_max_age_secs": 1}
    assert "too old" in desk.doctor().reported("index")
    desk.settings |= {"index_max_age_secs": 3600, "index_max_bytes": 10}
    assert "too large" in desk.doctor().reported("index")
    desk.put_objects({".hfbucket/index/current.json": b"{}"})
    assert "no pointer to a key index" in desk.doctor().reported("index")


def test_a_role_that_reads_nothing(desk):
    desk.settings["role"] = "write-only"
    ran = desk.doctor()

    assert ran.code == 0
    assert ran.skipped == {"throughput"}


# --- where temporary files go ----------------------------------------------------------------------------------------


def test_a_temp_dir_that_can_be_written(desk, tmp_path):
    desk.settings |= {"verify": "hash", "download_tmp_dir": str(tmp_path / "scratch")}
    ran = desk.doctor()

    assert ran.code == 0
    assert f"{tmp_path / 'scratch'} can be written" in ran.reported("temp dir")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_temp_dir_that_cannot_be_written(desk, tmp_path):
    (tmp_path / "file").write_text("in the way")
    desk.settings |= {"verify": "hash", "download_tmp_dir": str(tmp_path / "file" / "scratch")}
    ran = desk.doctor()

    assert ran.code == 3
    assert f"{HEAD}download_tmp_dir" in ran.reported("temp dir")


# --- nothing is changed ----------------------------------------------------------------------------------------------


def test_without_the_probe_nothing_is_written(hub, desk):
    before = paths(desk.endpoint, desk.bucket_id)
    hub.control.reset_counters()
    desk.doctor()

    read = {"bucket-info", "xet-read-token", "xet-write-token", "tree", "reconstruction", "xorb-data", "unknown"}
    assert {name for name, counted in hub.control.counters().routes.items() if counted.requests} <= read
    assert paths(desk.endpoint, desk.bucket_id) == before


def test_severities_order_and_spell_themselves():
    assert [str(one) for one in sorted(Severity)] == ["ok", "note", "warning", "error"]
    assert str(warning("a", "b", "c")) == "warning: a: b; c"
