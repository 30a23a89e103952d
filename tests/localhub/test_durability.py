import contextlib
import os
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from huggingface_hub import HfApi

from localhub.__main__ import main
from localhub.process import HubStartError
from localhub.state.spool import remove_stale
from tests.support.hubs import Raw, add_file

MIB = 1024 * 1024


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_stored_data_outlives_the_process(hub_factory, tmp_path, end):
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
    assert Raw(running.endpoint).reconstruct(digest, token).status == 200


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
    # Each accepts the tokens of the other.
    (file,) = two.list_bucket_tree("shared/one")
    token = Raw(first.endpoint).storage_token("shared/one", "read")
    assert Raw(second.endpoint).reconstruct(file.xet_hash, token).status == 200

    def write(at: int) -> int:
        operations = [add_file(f"{at}/{number}") for number in range(200)]
        return Raw((first, second)[at % 2].endpoint).batch("shared/one", *operations).status

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(write, range(16))) == {200}
    assert one.bucket_info("shared/one").total_files == two.bucket_info("shared/one").total_files == 3201


def test_memory_does_not_grow_with_the_size_of_files(hub_factory, tmp_path):
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
    (peak,) = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{running.pid}/status").read_text())
    assert int(peak) * 1024 - before < 100 * MIB


def test_uploads_that_were_left_behind_are_removed(tmp_path):
    kept = {"localhub-upload-link", "localhub-upload-dir", "thesis.pdf", "target"}
    (tmp_path / "localhub-upload-dir").mkdir()
    (tmp_path / "localhub-upload-link").symlink_to("target")
    for name in ("localhub-upload-old", "thesis.pdf", "target"):
        (tmp_path / name).touch()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    (tmp_path / "localhub-upload-new").touch()

    remove_stale(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == kept | {"localhub-upload-new"}


def test_no_upload_leaves_a_file_behind(hub, raw, bucket):
    assert raw.post_xorb(bytes(32), os.urandom(3 * MIB), raw.storage_token(bucket)).status == 400
    assert list((hub.root / "uploads").iterdir()) == []


def test_a_root_of_another_version_is_refused(hub_factory, tmp_path):
    root = tmp_path / "root"
    hub_factory(root).stop()
    with contextlib.closing(sqlite3.connect(root / "hub.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(HubStartError, match="schema version is 99, this package supports 1"):
        hub_factory(root)


@pytest.fixture
def refusal(capsys):
    """Starts a Hub on a root that it refuses and returns the error."""

    def refuse(root: Path) -> str:
        assert main(["serve", "--root", str(root)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return refuse


@pytest.mark.parametrize("as_link", [False, True])
def test_the_directory_of_another_program_is_refused_and_left_alone(tmp_path, refusal, as_link):
    uploads, target = tmp_path / "site" / "uploads", tmp_path / "elsewhere"
    (target if as_link else uploads).mkdir(parents=True)
    if as_link:
        uploads.parent.mkdir()
        uploads.symlink_to(target)
    (uploads / "picture.png").touch()
    os.utime(uploads / "picture.png", (0, 0))

    assert "holds 'uploads' and no hub.sqlite, so it is not the root of a Hub" in refusal(uploads.parent)
    assert [path.name for path in uploads.parent.iterdir()] == ["uploads"]
    assert [path.name for path in uploads.iterdir()] == ["picture.png"]


def test_a_link_in_a_root_is_refused(tmp_path, hub_factory, refusal):
    root = tmp_path / "root"
    hub_factory(root).stop()
    (root / "uploads").rmdir()
    (root / "uploads").symlink_to(tmp_path)

    assert "uploads is a symbolic link" in refusal(root)


def database(script: str):
    def make(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.executescript(script)

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"garbage" * 100), "hub.sqlite is not an SQLite database"),
        (lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 5000), "hub.sqlite cannot be used"),
        (database("CREATE TABLE meta (x)"), "hub.sqlite cannot be used: it is the database of another program"),
        (
            database("CREATE TABLE theirs (x); PRAGMA user_version = 1"),
            "hub.sqlite cannot be used: it is the database of another program",
        ),
        (Path.mkdir, "hub.sqlite is not a regular file"),
        (os.mkfifo, "hub.sqlite is not a regular file"),
        (lambda path: path.symlink_to("/etc/hostname"), "hub.sqlite is not a regular file"),
    ],
)
def test_anything_but_the_database_of_a_hub_is_refused_in_one_line(tmp_path, refusal, make, words):
    make(tmp_path / "hub.sqlite")

    assert words in refusal(tmp_path)


def test_a_root_that_is_a_file_is_refused(tmp_path, refusal):
    (tmp_path / "file").touch()

    assert "file is not a directory" in refusal(tmp_path / "file")
