"""`ls` on mixed keys."""

import json
import os
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.cli import ls
from hfbucket_plugin.core import units
from hfbucket_plugin.core.keys import ContentId, encode_name
from hfbucket_plugin.hub.bucket import Bucket, ObjectInfo
from hfbucket_plugin.tools.inventory import ObjectKind
from localhub.faults import Fault
from tests.support.buckets import HEAD, INSTANCE, PREFIX, SECRET, TOKEN_ENV, Desk, key, l2_key, run, well_kept
from tests.support.models import untimed
from tests.support.waiting import unused_port

ROOT = Path(__file__).parents[3]
KEYS = [
    key(1),
    key(2, worker=1),
    key(1, model="org/model-large"),
    "org/model@2@0@ab@half@3",
    l2_key(1),
    l2_key(2, model="b", world=4, worker=3),
    "a/modül 模型@1@0@-ab@half",
    "test@1@0@0@bfloat16",
]


@pytest.fixture(autouse=True)
def _well_kept(monkeypatch):
    well_kept(monkeypatch)


@pytest.fixture
def desk(hub, new_bucket, tmp_path):
    desk = Desk(hub.endpoint, new_bucket(), tmp_path)
    desk.put({key: bytes(number + 1) for number, key in enumerate(KEYS)})
    desk.put({key(9): b"another prefix"}, prefix=f"{PREFIX}0")
    desk.put_objects({"README.md": b"x", ".hfbucket/bad/r": b"x", "sub/object": b"x"})
    return desk


def keys(ran):
    return sorted(line["key"] for line in ran.lines)


def test_all_keys_and_what_is_none(desk):
    ran = desk.run("ls", "--json")

    assert ran.code == 0
    assert keys(ran) == sorted(KEYS)
    assert ran.stderr == f"hfbucket: instance {INSTANCE!r}: objects that are no keys: 2 foreign, 1 below .hfbucket/\n"


def test_a_key_for_programs(desk):
    lines = {line["key"]: line for line in desk.run("ls", "--json").lines}
    one, layer, group = lines[key(2, worker=1)], lines["org/model@2@0@ab@half@3"], lines[l2_key(2, "b", 4, 3)]

    uploaded = datetime.fromisoformat(one["uploaded_at"])
    assert abs(datetime.now(UTC) - uploaded) < timedelta(hours=1)
    assert len(one["xet_hash"]) == 64
    assert one == {
        "instance": INSTANCE,
        "key": key(2, worker=1),
        "kind": "classic",
        "model": "org/model",
        "world_size": 2,
        "worker": 1,
        "layer": None,
        "group": None,
        "size": 2,
        "xet_hash": one["xet_hash"],
        "uploaded_at": one["uploaded_at"],
        "age_seconds": one["age_seconds"],
    }
    assert (layer["layer"], layer["group"]) == (3, None)
    assert [group[name] for name in ("kind", "model", "world_size", "worker", "layer", "group")] == [
        "mp", "b", 4, 3, None, 1,
    ]  # fmt: skip
    assert lines["test@1@0@0@bfloat16"]["kind"] == "probe"


def test_keys_for_people(desk):
    ran = desk.run("ls")

    rows = {line.split()[-1]: line for line in ran.stdout.splitlines()}
    assert len(rows) == len(KEYS)
    assert rows[l2_key(1)].split()[:9] == [INSTANCE, "mp", "org/model", "2", "0", "group", "1", "5", "B"]
    assert " layer 3 " in rows["org/model@2@0@ab@half@3"]
    assert "INSTANCE" not in ran.stdout


def test_a_header_for_people_with_a_terminal(desk, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")

    assert desk.run("ls").stdout.splitlines()[0].split() == list(ls.HEADER)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model", "org/model"], [KEYS[0], KEYS[1], KEYS[3], KEYS[4]]),
        (["--model", "a/modül 模型"], [KEYS[6]]),
        (["--prefix", "org/model@2@0@"], [KEYS[0], KEYS[3]]),
        (["--prefix", "org/model"], KEYS[:5]),
        (["--model", "org/model", "--prefix", "org/model@2@1"], [KEYS[1]]),
        (["--model", "org/model", "--prefix", "org/"], [KEYS[0], KEYS[1], KEYS[3], KEYS[4]]),
        (["--prefix", ""], KEYS),
    ],
)
def test_some_keys(desk, options, expected):
    ran = desk.run("ls", "--json", *options)

    assert ran.code == 0
    assert keys(ran) == sorted(expected)


def test_the_hub_selects_a_model_and_not_we(desk, monkeypatch):
    asked = []
    list_objects = Bucket.list_objects

    def noted(self, prefix, page_secs, *_):
        asked.append(prefix)
        return list_objects(self, prefix, page_secs)

    monkeypatch.setattr(Bucket, "list_objects", noted)
    desk.run("ls", "--model", "org/model")

    assert asked == [f"{PREFIX}/{encode_name('org/model@')}"]


@pytest.mark.parametrize("command", ["ls", "stat"])
@pytest.mark.parametrize("options", [["--model", "org/other"], ["--prefix", "zzz"]])
def test_nothing_matched(desk, command, options):
    ran = desk.run(command, *options)

    assert ran.code == 1
    assert ran.stderr.startswith("hfbucket: nothing matched: no key starts with ")
    assert options[1] in ran.stderr


@pytest.mark.parametrize("command", ["ls", "stat"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", ""], "is not empty"),
        (["--model", "a", "--prefix", "b@"], "no key starts both with"),
    ],
)
def test_filters_that_cannot_be(desk, command, options, words):
    ran = desk.run(command, *options)

    assert (ran.code, ran.stdout) == (2, "")
    assert words in ran.stderr


def test_an_empty_instance_is_no_failure(hub, bucket, tmp_path):
    ran = Desk(hub.endpoint, bucket, tmp_path).run("ls")

    assert (ran.code, ran.stdout, ran.stderr) == (0, "", "")


def test_a_limit_ends_the_listing_too(hub_factory, tmp_path):
    from huggingface_hub import HfApi

    hub = hub_factory(page_size=2)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket("org/bucket")
    desk = Desk(hub.endpoint, "org/bucket", tmp_path)
    desk.put({key(number): b"x" for number in range(9)})
    hub.control.reset_counters()

    assert keys(desk.run("ls", "--json", "--limit", "3")) == [key(number) for number in range(3)]
    assert hub.control.counters().routes["tree"].requests == 2
    assert keys(desk.run("ls", "--json")) == [key(number) for number in range(9)]


def test_a_budget_that_is_used_up(hub_factory, tmp_path):
    from huggingface_hub import HfApi

    hub = hub_factory(page_size=2)
    HfApi(endpoint=hub.endpoint, token=False).create_bucket("org/bucket", private=True)
    desk = Desk(hub.endpoint, "org/bucket", tmp_path, {"max_hub_calls_per_minute": 1})
    desk.put({key(number): b"x" for number in range(3)})
    ran = desk.run("ls", "--timeout", "2")

    assert ran.code == 3
    assert len(ran.stdout.splitlines()) == 2
    assert "max_hub_calls_per_minute" in ran.stderr
    assert "give --timeout as many seconds" in ran.stderr
    assert desk.doctor().code == 0  # a handful of calls are no matter of the budget


def test_a_limit_is_for_all_instances_together(desk):
    ran = desk.run("ls", "--json", "--l2-adapter", desk.adapter, "--limit", str(len(KEYS) + 1))

    assert len(ran.lines) == len(KEYS) + 1
    assert len(desk.run("ls", "--json", "--l2-adapter", desk.adapter, "--limit", "1").lines) == 1


def test_memory_does_not_grow_with_the_listing(desk, monkeypatch):
    content = ContentId("0" * 64, 7)

    def endless(count):
        def objects(*_):
            return (ObjectInfo(f"{PREFIX}/{encode_name(key(n))}", content, None) for n in range(count))

        return objects

    def peak(count):
        monkeypatch.setattr(Bucket, "list_objects", endless(count))
        with desk.case() as case:
            found = ls.Keys(case.bucket, "", 1.0)
            tracemalloc.start()
            try:
                assert sum(1 for _ in found) == count
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak(100)  # what is made once
    assert peak(20_000) < peak(1000) + 100_000


# --- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ls", "stat"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(route="tree", status=403, body=f"not with {SECRET}"), f"{TOKEN_ENV} (token_env)"),
        (Fault(route="tree", status=200, body="<html>"), "is not JSON"),
        (Fault(route="tree", hang=True), "no answer within 2 s"),
    ],
)
def test_a_listing_that_fails(desk, hub, command, fault, words):
    hub.control.add_fault(fault)
    ran = desk.run(command, "--timeout", "2")

    assert (ran.code, ran.stdout) == (3, "")
    (line,) = ran.stderr.splitlines()
    assert INSTANCE in line
    assert words in line


def test_a_listing_that_ends_early_is_not_complete(desk, monkeypatch):
    from hfbucket_plugin.errors import TransportError

    list_objects = Bucket.list_objects

    def broken(self, prefix, page_secs, *_):
        yield next(iter(list_objects(self, prefix, page_secs)))
        raise TransportError("page 2: lost")

    monkeypatch.setattr(Bucket, "list_objects", broken)
    ran = desk.run("ls")

    assert ran.code == 3
    assert f"the listing is not complete: instance {INSTANCE!r}: page 2: lost; " in ran.stderr
    assert f"{HEAD}endpoint" in ran.stderr


@pytest.mark.parametrize("command", ["ls", "stat"])
def test_one_instance_that_fails_does_not_hide_the_others(desk, tmp_path, command):
    other = Desk(f"http://127.0.0.1:{unused_port()}", "org/other", tmp_path)
    ran = desk.run(command, "--json", "--l2-adapter", other.adapter)

    assert ran.code == 3
    assert "cannot be reached" in ran.stderr
    assert ran.stdout.count("org/model-large")


def test_a_reader_that_has_seen_enough(desk):
    read, write = os.pipe()
    os.close(read)  # nobody reads: the first write fails
    command = [sys.executable, "-m", "hfbucket_plugin", "ls", "--lmcache-config", str(desk.config)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), TOKEN_ENV: SECRET}
    try:
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=60, check=False
        )
    finally:
        os.close(write)

    assert done.returncode == 0
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


# --- rows --------------------------------------------------------------------------------------------------------------


def test_names_that_would_play_with_the_terminal(hub, bucket, tmp_path):
    desk = Desk(hub.endpoint, bucket, tmp_path)
    desk.put({"evil\x1b[2J\n@1@0@ab@half": b"x"})
    ran = desk.run("ls")

    assert len(ran.stdout.splitlines()) == 1
    assert "evil\\x1b[2J\\n@1@0@ab@half" in ran.stdout
    assert desk.run("ls", "--json").lines[0]["key"] == "evil\x1b[2J\n@1@0@ab@half"


@untimed
@given(st.text())
def test_printable_text_is_left_alone_and_other_text_made_so(text):
    shown = units.printable(text)

    assert shown.isprintable()
    assert text.isprintable() is (shown == text)


@untimed
@given(st.integers(0, 2**60), st.integers(0, 2**60))
def test_sizes_are_short_and_keep_their_order(one, other):
    def value(text):
        number, unit = text.split()
        return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)

    small, large = sorted((one, other))
    assert len(units.size(large)) <= 12
    assert value(units.size(small)) <= value(units.size(large))
    assert abs(value(units.size(one)) - one) <= one * 0.06


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86_400 * 400, "400 d")],
)
def test_ages(seconds, text):
    now = datetime(2025, 6, 1, tzinfo=UTC)

    assert units.age(now - timedelta(seconds=seconds), now) == text
    assert units.age(None, now) == "-"


def test_where_the_hub_does_not_say_when(desk):
    with desk.case() as case:
        chunk = next(iter(ls.Keys(case.bucket, key(1), 9.0)))[1]
    chunk = type(chunk)(chunk.text, chunk.key, chunk.content, None)
    now = datetime.now(UTC)

    assert ls.record("i", ObjectKind.CLASSIC, chunk, now)["uploaded_at"] is None
    assert ls.record("i", ObjectKind.CLASSIC, chunk, now)["age_seconds"] is None
    assert ls.row("i", ObjectKind.CLASSIC, chunk, now)[-3:-1] == ("-", "-")


def test_a_wrong_configuration(desk, tmp_path):
    desk.settings["bucket_handel"] = SECRET
    for command in ("ls", "stat", "doctor"):
        ran = desk.run(command)
        assert (ran.code, ran.stdout) == (2, "")
        assert f"unknown setting {HEAD}bucket_handel (did you mean 'bucket_handle'?)" in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_json_lines_are_ascii(desk):
    assert desk.run("ls", "--json", "--prefix", "a/").stdout.isascii()
    assert (
        json.loads(run("ls", "--json", "--l2-adapter", desk.adapter, "--prefix", "a/").stdout)["model"]
        == "a/modül 模型"
    )
