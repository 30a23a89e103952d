"""Temporary directories, and files that appear whole."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hfbucket_plugin.core import run_lock
from hfbucket_plugin.core.files import OutputFile, TempDir, default_root, expect_apart, expect_writable, write_whole
from hfbucket_plugin.errors import ConfigError
from tests.support.waiting import in_threads

HOLDER = """
import sys, time
from pathlib import Path
from hfbucket_plugin.core.files import TempDir
temp_dir = TempDir(Path(sys.argv[1]))
with temp_dir.file() as path:
    path.write_bytes(b"left over")
    print(path.resolve(), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has a file open below the same root; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        process.path = type(tmp_path)(process.stdout.readline().strip())
        yield process
        process.kill()


def entries(root):
    return sorted(entry.name for entry in root.iterdir())


def test_a_file_lives_as_long_as_its_block(tmp_path):
    temp_dir = TempDir(tmp_path)

    with temp_dir.file() as path:
        assert path.read_bytes() == b""
        assert path.resolve().is_relative_to(tmp_path)
        path.write_bytes(b"x")
    assert not path.exists()
    with pytest.raises(KeyError), temp_dir.file() as path:
        raise KeyError
    assert not path.exists()


def test_a_file_that_was_taken_away_is_no_error(tmp_path):
    with TempDir(tmp_path).file() as path:
        path.unlink()


def test_nothing_is_made_before_it_is_needed_and_nothing_stays_behind(tmp_path):
    root = tmp_path / "a" / "b"
    temp_dir = TempDir(root)
    temp_dir.sweep()
    assert not root.exists()

    with temp_dir.file(), temp_dir.file():
        assert len(entries(root)) == 1
    temp_dir.close()
    temp_dir.close()

    assert entries(root) == []


def test_it_can_be_used_again_after_close(tmp_path):
    temp_dir = TempDir(tmp_path)
    with temp_dir.file():
        pass
    temp_dir.close()

    with temp_dir.file() as path:
        assert path.exists()
    temp_dir.close()
    assert entries(tmp_path) == []


def test_threads_share_one_directory(tmp_path):
    temp_dir = TempDir(tmp_path)

    def use(_number):
        with temp_dir.file() as path:
            return path

    paths = in_threads(16, use)

    assert len(set(paths)) == 16
    assert len({path.parent for path in paths}) == 1
    assert len(entries(tmp_path)) == 1
    temp_dir.close()


def test_only_its_owner_may_look_into_the_directory(tmp_path):
    with TempDir(tmp_path).file() as path:
        assert path.stat().st_mode & 0o077 == 0
        assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("root", ["file", "file/below"])
def test_a_root_that_cannot_be_used_names_the_setting(tmp_path, root):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ConfigError, match="download_tmp_dir"), TempDir(tmp_path / root).file():
        pass


def test_sweeping_a_root_that_cannot_be_used_is_quiet(tmp_path):
    (tmp_path / "file").write_text("in the way")

    TempDir(tmp_path / "file").sweep_quietly()
    TempDir(tmp_path / "file" / "below").sweep_quietly()
    TempDir(tmp_path / "nowhere").sweep_quietly()


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert holder.path.read_bytes() == b"left over"

    with caplog.at_level(logging.INFO, logger="hfbucket_plugin.core.files"):
        removed = TempDir(tmp_path).sweep()

    assert removed == [holder.path.parent]
    assert entries(tmp_path) == []
    assert "1 dead process" in caplog.text


def test_the_first_file_sweeps_too(tmp_path, holder):
    holder.kill()
    holder.wait()

    with TempDir(tmp_path).file():
        assert not holder.path.exists()


def test_what_a_living_process_holds_stays(tmp_path, holder):
    temp_dir = TempDir(tmp_path)

    assert temp_dir.sweep() == []
    with temp_dir.file():
        pass
    temp_dir.close()

    assert holder.path.read_bytes() == b"left over"


def test_two_of_one_process_leave_each_other_alone(tmp_path):
    first, second = TempDir(tmp_path), TempDir(tmp_path)
    with first.file() as one, second.file() as two:
        assert first.sweep() == second.sweep() == []
        second.close()
        assert one.exists()
        assert not two.exists()
    first.close()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "hfbucket-hfbucket-abc123").mkdir()  # of LMCache's built-in backend
    (tmp_path / "lmcache-hfbucket-photos").mkdir()  # without a lock, so somebody else's
    (tmp_path / "lmcache-hfbucket-photos" / "a.jpg").write_text("dear")
    (tmp_path / "lmcache-hfbucket-file").write_text("dear")
    (tmp_path / "other").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".lock").write_text("")
    (elsewhere / "dear").write_text("dear")
    (tmp_path / "lmcache-hfbucket-link").symlink_to(elsewhere)
    before = entries(tmp_path)

    removed = TempDir(tmp_path).sweep()

    assert removed == []
    assert entries(tmp_path) == before
    assert (elsewhere / "dear").read_text() == "dear"
    assert (tmp_path / "lmcache-hfbucket-photos" / "a.jpg").read_text() == "dear"


def test_a_forked_child_takes_a_directory_of_its_own_and_leaves_its_parents_alone(tmp_path):
    temp_dir = TempDir(tmp_path)
    with temp_dir.file() as path:
        path.write_bytes(b"parent")
        parents = path.resolve()  # `path` leads through a descriptor, whose number the child uses again
        child = os.fork()
        if child == 0:
            status = 1
            try:
                temp_dir.close()
                with temp_dir.file() as own:
                    status = 0 if own.resolve().parent != parents.parent and parents.exists() else 2
                temp_dir.close()
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert path.read_bytes() == b"parent"
        assert TempDir(tmp_path).sweep() == [], "the parent's directory is still locked"
    temp_dir.close()
    assert entries(tmp_path) == []


def test_where_no_thread_is_left_nothing_is_left_behind_either(tmp_path, monkeypatch):
    def no_thread(_descriptor):
        raise RuntimeError("can't start new thread")

    temp_dir = TempDir(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr("hfbucket_plugin.core.run_lock.Heartbeat", no_thread)
        for _ in range(2):
            with pytest.raises(ConfigError, match="can't start new thread"):
                temp_dir.directory()

    assert entries(tmp_path) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert temp_dir.directory().exists()
    temp_dir.close()


# --- other users of the machine --------------------------------------------------------------------------------------


def test_a_directory_that_is_swapped_under_us_leads_nowhere(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("dear")
    root = tmp_path / "root"
    temp_dir = TempDir(root)
    with temp_dir.file() as path:
        real = path.resolve()
        real.parent.rename(tmp_path / "moved")
        real.parent.mkdir()
        real.symlink_to(victim)
        path.write_bytes(b"a chunk")
        with temp_dir.file() as second:
            second.write_bytes(b"another")

        assert victim.read_text() == "dear"
        assert (tmp_path / "moved" / path.name).read_bytes() == b"a chunk"
        assert entries(real.parent) == [path.name]
    temp_dir.close()
    assert victim.read_text() == "dear"


@pytest.fixture
def default(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return default_root()


def test_the_default_is_this_users_own(default, tmp_path):
    assert default == tmp_path / f"lmcache-hfbucket-{os.geteuid()}"

    with TempDir(default).file():
        assert default.stat().st_mode & 0o077 == 0


def test_a_default_that_another_user_made_first_is_refused(default, monkeypatch):
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    root = default_root()
    root.mkdir()

    with (
        pytest.raises(ConfigError, match=f"download_tmp_dir '{root}' .* belongs to user {user} .* as user 4711"),
        TempDir(root).file(),
    ):
        pass
    assert entries(root) == []


@pytest.mark.parametrize("made", ["open", "link"])
def test_a_default_that_others_may_write_to_or_that_is_a_link_is_refused(default, tmp_path, made):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if made == "link":
        default.symlink_to(elsewhere)
    else:
        default.mkdir()
        default.chmod(0o777)

    with pytest.raises(ConfigError, match="download_tmp_dir"), TempDir(default).file():
        pass
    assert entries(elsewhere) == []


def test_a_directory_of_another_user_is_refused_and_one_of_roots_is_not(tmp_path, monkeypatch):
    real = os.fstat

    def owned_by(uid):
        def fstat(fd):
            found = real(fd)
            of_root = found.st_ino == tmp_path.stat().st_ino
            return os.stat_result((*found[:4], uid if of_root else found.st_uid, *found[5:]))

        monkeypatch.setattr(os, "fstat", fstat)

    owned_by(4711)
    with pytest.raises(ConfigError, match="belongs to user 4711"), TempDir(tmp_path).file():
        pass
    owned_by(0)
    temp_dir = TempDir(tmp_path)
    with temp_dir.file() as path:
        assert path.exists()
    temp_dir.close()


def test_what_another_users_process_left_is_left_alone(tmp_path, holder, monkeypatch):
    holder.kill()
    holder.wait()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)

    assert TempDir(tmp_path).sweep() == []


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path):
    lock = tmp_path / "lock"
    lock.write_text("")
    forged = tmp_path / "lmcache-hfbucket-1-forged"
    forged.mkdir()
    (forged / ".lock").symlink_to(lock)

    assert TempDir(tmp_path).sweep() == []
    assert forged.exists()


def test_no_temporary_directory_at_all_is_told_when_one_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("none")))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    root = default_root()

    assert root.parent == tmp_path / "file"
    with pytest.raises(ConfigError, match="or set TMPDIR"), TempDir(root).file():
        pass


NO_LOCKS = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
"""


def test_on_a_file_system_without_locks_the_dead_are_told_by_their_processes(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    held = TempDir(tmp_path)
    with (
        held.file() as path,
        subprocess.Popen(
            [sys.executable, "-c", NO_LOCKS + HOLDER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        theirs = type(tmp_path)(process.stdout.readline().strip())
        assert TempDir(tmp_path).sweep() == []
        process.kill()
        process.wait()
        assert TempDir(tmp_path).sweep() == [theirs.parent]
        assert path.exists()
    held.close()
    assert entries(tmp_path) == []


def test_what_a_process_of_another_node_holds_stays_until_it_is_silent(tmp_path, monkeypatch):
    other = tmp_path / "lmcache-hfbucket-1-abcd"
    other.mkdir(mode=0o700)
    (other / ".lock").write_text('{"lease": "flock", "boot": "another", "pid": 1}')
    assert TempDir(tmp_path).sweep() == []
    monkeypatch.setattr(run_lock, "STALE_SECS", -1.0)
    assert TempDir(tmp_path).sweep() == [other]


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_last_report_stays_until_the_next_one_is_whole(tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text("last")
    path.chmod(0o640)
    out = OutputFile(path, "--report")
    out.write("next")
    out.flush()
    assert path.read_text() == "last"
    out.commit()
    assert path.read_text() == "next"
    assert path.stat().st_mode & 0o777 == 0o640
    assert files(tmp_path) == ["report.jsonl"]
    out.discard()
    assert path.read_text() == "next"


def test_what_is_given_up_leaves_the_last_report_and_nothing_beside_it(tmp_path):
    path = tmp_path / "report.jsonl"
    path.write_text("last")
    out = OutputFile(path, "--report")
    out.write("next")
    out.discard()
    assert path.read_text() == "last"
    assert files(tmp_path) == ["report.jsonl"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_report_has_the_mode_of_any_file(tmp_path, umask, mode):
    path = tmp_path / "report.jsonl"
    before = os.umask(umask)
    try:
        out = OutputFile(path, "--report")
        assert not path.exists()
        out.commit()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_report_is_written_where_its_link_leads(tmp_path):
    (tmp_path / "logs").mkdir()
    path, target = tmp_path / "report.jsonl", tmp_path / "logs" / "report.jsonl"
    path.symlink_to(target)
    out = OutputFile(path, "--report")
    out.write("x")
    out.commit()
    assert path.is_symlink()
    assert target.read_text() == "x"


def test_a_report_in_a_directory_that_takes_no_new_file(tmp_path, monkeypatch):
    path = tmp_path / "report.jsonl"
    path.write_text("a longer one than what follows")

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hfbucket_plugin.core.files.tempfile.mkstemp", refused)
    out = OutputFile(path, "--report")
    out.write("next")
    assert path.read_text().startswith("a longer one")
    out.commit()
    assert path.read_text() == "next"
    with pytest.raises(ConfigError, match=r"--report '.*none' cannot be written: Permission denied"):
        OutputFile(tmp_path / "none", "--report")


def test_a_pipe_is_written_as_it_comes_and_one_that_nobody_reads_is_an_error(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        OutputFile(path, "--report")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    out = OutputFile(path, "--report")
    out.write("x")
    out.flush()
    assert os.read(reader, 10) == b"x"
    out.commit()
    os.close(reader)
    OutputFile(Path("/dev/null"), "--report").commit()


@pytest.mark.parametrize("name", ["none/report", ".", "nul\0l"])
def test_what_cannot_be_written_is_an_error_before_the_work(tmp_path, name):
    with pytest.raises(ConfigError, match=r"--report .* cannot be written"):
        OutputFile(tmp_path / name, "--report")


@pytest.mark.parametrize("how", ["the same", "a link", "a hard link", "another spelling"])
def test_an_output_that_is_an_input_is_refused(tmp_path, how):
    given, report = tmp_path / "keys", tmp_path / "report"
    given.write_text("x")
    if how == "the same":
        report = given
    elif how == "a link":
        report.symlink_to(given)
    elif how == "a hard link":
        report.hardlink_to(given)
    else:
        report = tmp_path / ".." / tmp_path.name / "keys"
    with pytest.raises(ConfigError, match=r"--report .* is the file of --keys-from .*, and would be overwritten"):
        expect_apart([("--report", report)], [("--config", None), ("--keys-from", given)])


def test_two_outputs_in_one_file_are_refused_though_there_is_none_yet(tmp_path):
    with pytest.raises(ConfigError, match="--report-html"):
        expect_apart([("--report", tmp_path / "one"), ("--report-html", tmp_path / "one")], [])
    expect_apart([("--report", Path("/dev/null")), ("--report-html", Path("/dev/null"))], [("--keys-from", tmp_path)])
    expect_apart([("--report", None), ("--report-html", tmp_path / "x")], [("--keys-from", tmp_path / "y")])


def test_a_null_byte_in_a_name_is_left_to_the_code_that_opens_it(tmp_path):
    expect_apart([("--report", tmp_path / "nul\0l")], [("--keys-from", tmp_path / "nul\0l")])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="this machine has no such directory")  # noqa: S108 - as above
def test_a_report_below_dev_is_a_file_as_any_other():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory, "report.jsonl")
        write_whole(path, "a longer one than what follows", "--report")
        write_whole(path, "next", "--report")
        assert path.read_text() == "next"


def test_a_whole_file_takes_the_place_of_no_link_and_no_pipe(tmp_path):
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    link.symlink_to(target)
    os.mkfifo(fifo)
    expect_writable(link, "--html")
    assert not target.exists()
    write_whole(link, "x", "--html")
    assert (link.is_symlink(), target.read_text()) == (True, "x")
    for check in (expect_writable, lambda path, option: write_whole(path, "x", option)):
        with pytest.raises(ConfigError, match=r"--html '.*fifo' cannot be written"):
            check(fifo, "--html")
    assert fifo.is_fifo()
    assert files(tmp_path) == ["fifo", "link", "target"]


def test_a_disk_that_is_full_leaves_what_bore_the_name(tmp_path, monkeypatch):
    path = tmp_path / "jobs.prom"
    path.write_text("last")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OutputFile, "flush", full)
    with pytest.raises(ConfigError, match=r"--metrics-textfile '.*' cannot be written: No space left"):
        write_whole(path, "next", "--metrics-textfile")
    assert path.read_text() == "last"
    assert files(tmp_path) == ["jobs.prom"]
