"""Reports are written beside their name and take it at the end."""

import os
import tempfile
from pathlib import Path

import pytest

from hfbucket_plugin.core.files import OutputFile, expect_apart, expect_writable, write_whole
from hfbucket_plugin.errors import ConfigError


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
