import contextlib
import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from huggingface_hub import HfApi

from localhub.formats.hashing import to_hex
from localhub.process import HubStartError
from localhub.state.spool import remove_stale
from tests.support.rawhub import Raw

EMPTY = to_hex(bytes(32))
MIB = 1024 * 1024


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_what_is_stored_outlives_the_process(hub_factory, tmp_path, end):
    running = hub_factory()
    api = HfApi(endpoint=running.endpoint, token=False)
    api.create_bucket("kept/one", private=True)
    content = os.urandom(MIB)
    api.batch_bucket_files("kept/one", add=[(content, "content"), (b"", "empty")])
    before = list(api.list_bucket_tree("kept/one"))
    token = Raw(running.endpoint).storage_token("kept/one", "read")
    getattr(running, end)()
    running.restart()
    assert list(api.list_bucket_tree("kept/one")) == before
    assert api.bucket_info("kept/one").private
    api.download_bucket_files("kept/one", [("content", tmp_path / "content")])
    assert (tmp_path / "content").read_bytes() == content
    digest = next(file.xet_hash for file in before if file.size)
    assert Raw(running.endpoint).call("GET", f"/v1/reconstructions/{digest}", headers=token).status == 200


def test_two_processes_serve_one_root(hub_factory, tmp_path):
    # Started at once, on a root that is not there yet.
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: hub_factory(tmp_path / "root"), range(2))
    one, two = (HfApi(endpoint=running.endpoint, token=False) for running in (first, second))
    one.create_bucket("shared/one")
    content = os.urandom(MIB)
    one.batch_bucket_files("shared/one", add=[(content, "content")])
    two.download_bucket_files("shared/one", [("content", tmp_path / "content")])
    assert (tmp_path / "content").read_bytes() == content
    # A token of the one opens the other.
    digest = next(iter(two.list_bucket_tree("shared/one"))).xet_hash
    token = Raw(first.endpoint).storage_token("shared/one", "read")
    assert Raw(second.endpoint).call("GET", f"/v1/reconstructions/{digest}", headers=token).status == 200

    def write(at: int) -> int:
        operations = [{"type": "addFile", "path": f"{at}/{n}", "xetHash": EMPTY, "mtime": 0} for n in range(200)]
        return Raw((first, second)[at % 2].endpoint).batch("shared/one", *operations).status

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(write, range(16))) == {200}
    assert one.bucket_info("shared/one").total_files == two.bucket_info("shared/one").total_files == 3201


def test_memory_does_not_grow_with_what_passes(hub_factory, tmp_path):
    running = hub_factory()
    api = HfApi(endpoint=running.endpoint, token=False)
    api.create_bucket("big/one")
    api.batch_bucket_files("big/one", add=[(os.urandom(MIB), "warm up")])
    process = psutil.Process(running.pid)
    before = process.memory_info().rss
    big = tmp_path / "big"
    with big.open("wb") as file:
        for _ in range(32):
            file.write(os.urandom(8 * MIB))
    api.batch_bucket_files("big/one", add=[(big, "big")])
    api.download_bucket_files("big/one", [("big", tmp_path / "back")])
    assert (tmp_path / "back").stat().st_size == 256 * MIB
    peak = int(
        next(
            line.split()[1]
            for line in open(f"/proc/{running.pid}/status", encoding="ascii")  # noqa: SIM115, PTH123
            if line.startswith("VmHWM")
        )
    )
    assert peak * 1024 - before < 100 * MIB


def test_uploads_that_were_left_behind_are_removed(tmp_path):
    old, young, others, outside = (
        tmp_path / "uploads" / name for name in ("localhub-upload-old", "localhub-upload-new", "thesis.pdf", "kept")
    )
    linked, nested = tmp_path / "uploads" / "localhub-upload-link", tmp_path / "uploads" / "localhub-upload-dir"
    nested.mkdir(parents=True)
    for path in (old, young, others, outside):
        path.touch()
    linked.symlink_to(outside)
    for path in (old, others, outside, nested):
        os.utime(path, (0, 0))
    os.utime(linked, (0, 0), follow_symlinks=False)

    remove_stale(tmp_path / "uploads")

    assert {path.name for path in (tmp_path / "uploads").iterdir()} == {
        young.name,
        others.name,
        outside.name,
        linked.name,
        nested.name,
    }


def test_no_upload_leaves_a_file_behind(hub, bucket):
    raw = Raw(hub.endpoint)
    token = raw.storage_token(bucket)
    assert raw.call("POST", f"/v1/xorbs/default/{EMPTY}", os.urandom(3 * MIB), token).status == 400
    assert list((hub.root / "uploads").iterdir()) == []


def test_a_root_of_another_version_is_refused(hub_factory, tmp_path):
    root = tmp_path / "root"
    hub_factory(root).stop()
    with sqlite3.connect(root / "hub.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(HubStartError, match="schema version is 99, this package supports 1"):
        hub_factory(root)


def told(root):
    """What the command says when it refuses a root, and what is in the root afterwards."""
    process = subprocess.run(
        [sys.executable, "-m", "localhub", "serve", "--root", str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.parametrize("as_link", [False, True])
def test_a_directory_of_somebody_elses_is_refused_and_left_alone(tmp_path, as_link):
    root, uploads = tmp_path / "site", tmp_path / "site" / "uploads"
    if as_link:
        root.mkdir()
        (tmp_path / "elsewhere").mkdir()
        uploads.symlink_to(tmp_path / "elsewhere")
    else:
        uploads.mkdir(parents=True)
    picture = uploads / "picture.png"
    picture.touch()
    os.utime(picture, (0, 0))

    assert "holds 'uploads' and no hub.sqlite, so it is not the root of a Hub" in told(root)
    assert [path.name for path in root.rglob("*")] + [picture.exists()] == (
        ["uploads", True] if as_link else ["uploads", "picture.png", True]
    )


def test_a_link_in_a_root_is_refused(tmp_path, hub_factory):
    root = tmp_path / "root"
    hub_factory(root).stop()
    (root / "uploads").rmdir()
    (root / "uploads").symlink_to(tmp_path)

    assert "uploads is a symbolic link" in told(root)


def garbage(path):
    path.write_bytes(b"garbage" * 100)


def cut(path):
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000)


def of_another_program(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE meta (x)")


def of_another_program_with_our_version(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("PRAGMA user_version = 1")


def link(path):
    path.symlink_to("/etc/hostname")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (garbage, "hub.sqlite is not an SQLite database"),
        (cut, "hub.sqlite cannot be used"),
        (of_another_program, "hub.sqlite cannot be used: it is the database of another program"),
        (of_another_program_with_our_version, "hub.sqlite cannot be used: it is the database of another program"),
        (Path.mkdir, "hub.sqlite is not a regular file"),
        (os.mkfifo, "hub.sqlite is not a regular file"),
        (link, "hub.sqlite is not a regular file"),
    ],
)
def test_what_is_no_database_of_a_hub_is_refused_in_one_line(tmp_path, make, words):
    root = tmp_path / "root"
    root.mkdir()
    make(root / "hub.sqlite")

    assert words in told(root)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()

    assert "file is not a directory" in told(tmp_path / "file")
