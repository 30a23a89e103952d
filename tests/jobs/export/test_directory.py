"""Exports to a directory, and imports from one: what a manifest says is checked, and no name leads elsewhere."""

import errno
import fcntl
import json
import os
from dataclasses import replace

import pytest

from hfbucket_plugin.core import run_lock
from hfbucket_plugin.core.keys import ContentId, encode_name
from hfbucket_plugin.errors import ConfigError, RefusedError
from jobs.export import manifest
from jobs.export.bucket import InstanceEnd
from localhub.faults import Fault
from tests.support.buckets import DAY, ExportRig, ended, key, l2_key, names, noise
from tests.support.waiting import eventually

KEYS = [key(number) for number in range(4)] + [l2_key(number) for number in range(2)]


@pytest.fixture
def rig(hub, new_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.batch.apply._BACKOFF_SECS", 0.01)
    rig = ExportRig.on(hub, tmp_path, new_bucket(), new_bucket())
    rig.us.put({one: noise(2000 + number, number) for number, one in enumerate(KEYS)})
    return rig


@pytest.fixture
def backup(rig):
    directory = rig.directory / "backup"
    ran = rig.export(to=f"{directory}/")
    assert ran.code == 0, ran.stderr
    assert ran.counts("streamed") == [6]
    return directory


def restored(rig, directory, *more):
    return rig.export(*more, source=f"{directory}/")


def lines_of(directory):
    return list(manifest.read(directory))


def test_to_a_directory_and_back_is_the_same(rig, backup):
    assert {one.name for one in backup.iterdir()} == names(KEYS) | {manifest.NAME}
    here = rig.listing(rig.us)
    assert {encode_name(one.key): (one.content.xet_hash, one.content.size) for one in lines_of(backup)} == here
    before = (backup / manifest.NAME).read_bytes()

    again = rig.export(to=str(backup))
    assert (again.code, again.counts("there_already", "streamed")) == (0, [6, 0])
    assert (backup / manifest.NAME).read_bytes() == before

    ran = restored(rig, backup)
    assert ran.code == 0, ran.stderr
    assert ran.counts("streamed", "failed") == [6, 0]
    assert rig.listing(rig.eu) == here
    assert restored(rig, backup).counts("there_already", "streamed") == [6, 0]


def test_a_directory_grows_and_its_manifest_says_all_that_lies_there(rig, backup):
    rig.us.put({key(50): b"new"}, age=1 * DAY)
    (backup / "README").write_text("mine")

    ran = rig.export("--prefix", key(50), to=str(backup))

    assert (ran.counts("streamed"), ran.summary["in_manifest"]) == ([1], 7)
    assert {one.key for one in lines_of(backup)} == {*KEYS, key(50)}
    (backup / encode_name(KEYS[0])).unlink()
    assert rig.export("--prefix", key(50), to=str(backup)).summary["in_manifest"] == 6


def test_a_conflict_in_a_directory(rig, backup):
    rig.us.put({KEYS[0]: b"rewritten"}, age=1 * DAY)
    kept = rig.export(to=str(backup))
    assert kept.counts("conflicts", "streamed") == [1, 0]
    assert (backup / encode_name(KEYS[0])).stat().st_size == 2000

    assert rig.export("--on-conflict", "newer", to=str(backup)).summary["result"] == "planned"
    newer = rig.export("--on-conflict", "newer", "--yes", to=str(backup))
    assert newer.counts("conflicts", "streamed") == [0, 1]
    assert (backup / encode_name(KEYS[0])).read_bytes() == b"rewritten"
    assert restored(rig, backup).counts("streamed") == [6]
    assert rig.listing(rig.eu) == rig.listing(rig.us)


def test_every_file_is_compared_with_the_manifest(rig, backup):
    first, second, third, fourth = (backup / encode_name(one) for one in KEYS[:4])
    first.write_bytes(noise(2000, 99))
    second.write_bytes(b"shorter")
    third.unlink()
    other = rig.directory / "elsewhere"
    fourth.rename(other)
    fourth.symlink_to(other)

    ran = restored(rig, backup)

    assert ran.code == 3
    assert ran.counts("streamed", "failed") == [2, 4]
    assert rig.listing(rig.eu).keys() == names(KEYS[4:])
    reported = {one["path"]: one["message"] for one in ran.summary["failures"]}
    assert "has the hash" in reported[first.name] or "have the hash" in reported[first.name]
    assert "no file of 2001 bytes" in reported[second.name]
    assert "is not there" in reported[third.name]
    assert "links are not followed" in reported[fourth.name]


def test_no_manifest_no_import_unless_told(rig, backup):
    (backup / manifest.NAME).unlink()
    (backup / "README").write_text("mine")
    refused = restored(rig, backup)
    assert (refused.code, rig.listing(rig.eu)) == (4, {})
    assert "has no MANIFEST.jsonl" in refused.stderr

    ran = restored(rig, backup, "--without-manifest")
    assert (ran.code, ran.counts("streamed"), ran.summary["skipped"]) == (0, [6], {"no_chunk": 1})
    assert rig.listing(rig.eu) == rig.listing(rig.us)


def rewritten(directory, change):
    """The manifest with other lines, and a checksum that fits them."""
    lines = [json.loads(line) for line in (directory / manifest.NAME).read_text().splitlines()]
    import hashlib

    body = "".join(json.dumps(line) + "\n" for line in change(lines[:-1]))
    end = {"record": "end", "chunks": body.count("\n") - 1, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    (directory / manifest.NAME).write_text(body + json.dumps(end) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:1], lines[1] | {"key": "../../etc/passwd"}, *lines[2:]],
        lambda lines: [*lines[:1], lines[1] | {"path": "/etc/passwd"}, *lines[2:]],
        lambda lines: [*lines[:1], lines[1] | {"key": "org/model@2@0@1000@\x00"}, *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:1], lines[2], lines[1], *lines[3:]],
        lambda lines: [lines[0] | {"version": 2}, *lines[1:]],
        lambda lines: [*lines[:1], lines[1] | {"size": -1}, *lines[2:]],
        lambda lines: [*lines[:1], lines[1] | {"xet_hash": "0" * 63}, *lines[2:]],
    ],
)
def test_a_manifest_with_tricks_is_refused_though_its_checksum_fits(rig, backup, change):
    rewritten(backup, change)

    ran = restored(rig, backup)

    assert (ran.code, rig.listing(rig.eu)) == (4, {})
    assert "MANIFEST.jsonl" in ran.stderr
    assert "nothing of the directory is used" in ran.stderr


def test_a_manifest_that_was_changed_or_cut_is_refused(rig, backup):
    path = backup / manifest.NAME
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[: whole.rindex(b"{")], whole.replace(b"2000", b"2009", 1), b"", whole + b"{}\n"):
        path.write_bytes(damaged)
        assert restored(rig, backup).code == 4
    path.unlink()
    elsewhere = rig.directory / "other.jsonl"
    elsewhere.write_bytes(whole)
    path.symlink_to(elsewhere)
    assert restored(rig, backup).code == 4
    assert rig.listing(rig.eu) == {}


def test_something_else_under_a_chunks_name_stops_it(rig, backup):
    (backup / encode_name(KEYS[0])).unlink()
    (backup / encode_name(KEYS[0])).mkdir()
    ran = rig.export(to=str(backup))
    assert (ran.code, "is no file" in ran.stderr) == (2, True)


def test_two_exports_to_one_directory(rig, tmp_path):
    from jobs.export.directory import DirectoryDestination

    other = DirectoryDestination(tmp_path / "backup")
    other.begin()
    try:
        ran = rig.export(to=str(tmp_path / "backup"))
    finally:
        other.close()
    assert (ran.code, "another export" in ran.stderr) == (4, True)
    assert list((tmp_path / "backup").iterdir()) == []
    assert rig.export(to=str(tmp_path / "backup")).code == 0


def test_the_dashboards_address_is_no_matter_for_what_joins_no_cluster(rig, tmp_path, monkeypatch):
    from jobs.batch.apply import in_process

    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert not in_process(None, local=False)
    for given, at_once in ((None, True), ("http://127.0.0.1:8265", False)):
        with pytest.raises(ConfigError, match="is the dashboard's, for `ray job submit`"):
            in_process(given, local=False, at_once=at_once)
    assert rig.export(to=str(tmp_path / "backup")).code == 0


def test_one_export_at_a_time_on_a_file_system_without_locks(rig, tmp_path, monkeypatch):
    from jobs.export.directory import DirectoryDestination

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    one, other = DirectoryDestination(tmp_path / "backup"), DirectoryDestination(tmp_path / "backup")
    one.begin()
    with pytest.raises(RefusedError, match="another export"):
        other.begin()
    other.close()
    one.close()
    assert rig.export(to=str(tmp_path / "backup")).code == 0
    assert {path.name for path in (tmp_path / "backup").iterdir()} == names(KEYS) | {manifest.NAME}


def test_an_export_of_another_node_keeps_others_out_until_it_is_silent(tmp_path, monkeypatch):
    from jobs.export.directory import DirectoryDestination

    (tmp_path / ".hfbucket-export.lock").write_text('{"lease": "flock", "boot": "another", "pid": 1}')
    (tmp_path / ".part-0123").write_bytes(b"being written there")
    one = DirectoryDestination(tmp_path)
    with pytest.raises(RefusedError, match="another export"):
        one.begin()
    one.close()
    assert len([*tmp_path.iterdir()]) == 2
    monkeypatch.setattr(run_lock, "STALE_SECS", -1.0)
    one.begin()
    one.close()
    assert [*tmp_path.iterdir()] == []


def test_bytes_that_are_not_the_object_never_become_a_file(rig, tmp_path):
    rig.hub.control.add_fault(Fault(route="xorb-data", truncate_at=50))
    ran = rig.export(to=str(tmp_path / "backup"))
    assert ran.code == 3
    assert {one.name for one in (tmp_path / "backup").iterdir()} == {manifest.NAME}
    assert lines_of(tmp_path / "backup") == []


def test_a_disk_that_is_full_is_told(rig, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jobs.export.directory.DirectoryDestination._write", full)
    ran = rig.export(to=str(tmp_path / "backup"))
    assert (ran.code, "No space left" in ran.stderr) == (3, True)
    assert list((tmp_path / "backup").iterdir()) == []


def test_a_key_that_no_file_can_be_called_is_named(rig, tmp_path):
    long = key(9, model="org/" + "m" * 250)
    rig.us.put({long: b"x"})
    ran = rig.export(to=str(tmp_path / "backup"))
    assert ran.code == 3
    assert ran.counts("streamed", "failed") == [6, 1]
    assert "File name too long" in ran.summary["failures"][0]["message"]


def test_a_killed_export_goes_on_and_leaves_no_rest(rig, tmp_path):
    """SIGKILL between two files: there is no manifest yet, and the plan moves only what is missing."""
    directory, control = tmp_path / "backup", rig.hub.control
    whole = control.add_fault(Fault(route="xorb-data", delay_s=0.3))
    process = rig.started(
        "--window", "2KB", "--parallel", "1", "--plan-dir", str(tmp_path / "plans"), to=str(directory)
    )
    eventually(lambda: directory.exists() and names(KEYS) & {one.name for one in directory.iterdir()})
    process.kill()
    process.communicate()
    control.clear_fault(whole)
    there = names(KEYS) & {one.name for one in directory.iterdir()}
    assert not (directory / manifest.NAME).exists()
    (directory / ".part-0123").write_bytes(b"left by the killed one")
    (plan,) = (tmp_path / "plans").iterdir()

    ran = rig.apply(str(plan))

    assert ran.code == 0, ran.stderr
    same, streamed = ran.counts("same", "streamed")
    assert (same, same + streamed) == (len(there), 6)
    assert {one.name for one in directory.iterdir()} == names(KEYS) | {manifest.NAME}
    assert len(lines_of(directory)) == 6


def test_a_stopped_import_goes_on(rig, backup, tmp_path):
    control = rig.hub.control
    hanging = control.add_fault(Fault(route="batch", hang=True))
    process = rig.started(
        "--window", "4KB", "--parallel", "1", "--plan-dir", str(tmp_path / "plans"), source=f"{backup}/"
    )
    eventually(lambda: control.hits(hanging))
    process.terminate()
    control.clear_faults()
    ran = ended(process)

    assert ran.code == 5, ran.stderr
    assert ran.summary["unfinished"]["objects"] >= 1
    again = rig.apply(ran.summary["plan"])
    assert again.code == 0, again.stderr
    assert rig.listing(rig.eu) == rig.listing(rig.us)
    assert sum(again.counts("same", "streamed")) == 6


def test_a_directory_whose_files_cannot_be_written(rig, tmp_path):
    (tmp_path / "file").write_text("x")
    ran = rig.export(to=str(tmp_path / "file"))
    assert ran.code == 2
    assert os.fspath(tmp_path / "file") in ran.stderr


def test_a_damaged_file_keeps_its_line_and_is_named(rig, backup):
    """The next export must not make what was damaged a chunk that the manifest vouches for."""
    damaged = backup / encode_name(KEYS[0])
    damaged.write_bytes(noise(2000, 77))
    rig.us.put({key(50): b"new"}, age=1 * DAY)

    ran = rig.export("--prefix", key(50), to=str(backup))

    assert (ran.code, ran.counts("streamed"), ran.summary["in_manifest"]) == (3, [1], 7)
    assert [one["path"] for one in ran.summary["failures"]] == [damaged.name]
    assert damaged.name in ran.stderr
    imported = restored(rig, backup)
    assert (imported.code, imported.counts("streamed", "failed")) == (3, [6, 1])
    assert damaged.name not in rig.listing(rig.eu)

    fixed = rig.export("--on-conflict", "overwrite", "--yes", to=str(backup))
    assert (fixed.code, fixed.counts("streamed")) == (0, [1]), fixed.stderr
    assert restored(rig, backup).code == 0


def test_a_file_that_was_only_touched_is_as_good_as_before(rig, backup):
    os.utime(backup / encode_name(KEYS[0]))
    rig.us.put({key(50): b"new"}, age=1 * DAY)
    assert rig.export("--prefix", key(50), to=str(backup)).code == 0
    assert restored(rig, backup).counts("streamed", "failed") == [7, 0]


def test_an_export_does_not_replace_a_damaged_manifest(rig, backup):
    path = backup / manifest.NAME
    damaged = path.read_bytes().replace(b"2000", b"2009", 1)
    path.write_bytes(damaged)
    rig.us.put({key(50): b"new"}, age=1 * DAY)

    ran = rig.export(to=str(backup))

    assert (ran.code, "MANIFEST.jsonl" in ran.stderr) == (4, True)
    assert path.read_bytes() == damaged
    assert {one.name for one in backup.iterdir()} == names(KEYS) | {manifest.NAME}


def test_a_manifest_that_is_no_file(rig, backup):
    (backup / manifest.NAME).unlink()
    os.mkfifo(backup / manifest.NAME)
    assert restored(rig, backup).code == 4
    (backup / manifest.NAME).unlink()
    (backup / manifest.NAME).mkdir()
    assert restored(rig, backup).code == 4


def test_a_chunk_that_is_larger_than_memory_fails_by_itself(rig, backup):
    """Whatever a manifest says: the file is sparse, and as long as it says."""
    huge, (first, *others) = 1 << 38, lines_of(backup)
    os.truncate(backup / encode_name(first.key), huge)
    manifest.write(backup, [replace(first, content=ContentId(first.content.xet_hash, huge)), *others])

    ran = restored(rig, backup, "--window", "16MiB")

    assert (ran.code, ran.counts("streamed", "failed")) == (3, [5, 1]), ran.stderr
    assert "more than --window permits" in ran.summary["failures"][0]["message"]


def test_memory_that_is_not_there_fails_what_needs_it(rig, monkeypatch):
    own = InstanceEnd.fetch

    def hungry(self, wanted, deadline):
        if KEYS[0] in wanted:
            raise MemoryError
        return own(self, wanted, deadline)

    monkeypatch.setattr(InstanceEnd, "fetch", hungry)

    ran = rig.export("--mode", "stream", "--window", "1KB", "--parallel", "1")

    assert (ran.code, ran.counts("streamed", "failed")) == (3, [len(KEYS) - 1, 1]), ran.stderr
    assert "not enough memory" in ran.summary["failures"][0]["message"]
