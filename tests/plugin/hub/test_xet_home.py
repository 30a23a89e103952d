"""Where hf_xet writes in processes of our own, and that stdout stays theirs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfbucket_plugin.hub import xet_home

# hf_xet's own root and log, as the environment has them; `sys.stdout` and descriptor 1.
COMMAND = """
import os, sys
from hfbucket_plugin.hub import xet_home
xet_home.begin()
import hf_xet
os.write(1, b"native\\n")
print("ours")
print(os.environ.get("HF_XET_CACHE"), os.environ.get("HF_XET_LOG_DEST"), file=sys.stderr)
xet_home.expect_usable()
"""


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HF_XET_CACHE": "/x", "HF_HOME": "/h"}, ("/x", "HF_XET_CACHE")),
        ({"HF_HOME": "/h", "HOME": "/u"}, ("/h/xet", "HF_HOME")),
        ({"XDG_CACHE_HOME": "/c", "HOME": "/u"}, ("/c/huggingface/xet", "XDG_CACHE_HOME")),
        ({"HOME": "/u"}, ("/u/.cache/huggingface/xet", "HOME")),
    ],
)
def test_the_root_is_the_one_that_hf_xet_takes(environ, expected, tmp_path):
    root, variable = xet_home.cache_root(environ)
    assert (str(root), variable) == expected

    there = {name: f"{tmp_path}{value}" for name, value in environ.items()}
    logs = Path(f"{tmp_path}{expected[0]}/logs")
    subprocess.run([sys.executable, "-c", "import hf_xet"], env={"PATH": os.environ["PATH"], **there}, check=True)
    assert list(logs.iterdir())


def run(tmp_path, **environ):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env=env | {"TMPDIR": str(tmp_path)} | environ, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_command_without_a_writable_home_takes_a_directory_of_its_own(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(tmp_path, HF_HOME=str(tmp_path / "file"))

    own = tmp_path / f"lmcache-hfbucket-{os.geteuid()}"
    assert done.stdout == "ours\n"
    assert done.stderr == f"native\n{own}/xet {own}/xet-logs/\n"
    assert list((own / "xet-logs").iterdir())
    assert own.stat().st_mode & 0o077 == 0


def test_what_the_user_set_stays(tmp_path):
    done = run(tmp_path, HF_HOME=str(tmp_path / "home"), HF_XET_LOG_DEST=str(tmp_path / "log"))

    assert done.stderr == f"native\nNone {tmp_path / 'log'}\n"


def test_logs_on_the_console_are_no_part_of_stdout(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(
        tmp_path, HF_HOME=str(tmp_path / "home"), HF_XET_LOG_DEST=str(tmp_path / "file" / "log"), RUST_LOG="info"
    )

    assert done.stdout == "ours\n"
    reported = [json.loads(line)["fields"]["message"] for line in done.stderr.splitlines() if line.startswith("{")]
    assert any("falling back to console" in message for message in reported)


def test_an_empty_variable_is_none(tmp_path):
    done = run(tmp_path, HF_HOME="", HF_XET_CACHE="", HF_XET_LOG_DEST="", HOME=str(tmp_path))

    assert done.stderr == f"native\nNone {tmp_path}/lmcache-hfbucket-{os.geteuid()}/xet-logs/\n"
    assert (tmp_path / ".cache" / "huggingface" / "xet").is_dir()


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_stream_that_is_closed_is_no_error(tmp_path, closed):
    code = "from hfbucket_plugin.hub import xet_home; xet_home.begin(); import hf_xet"
    env = os.environ | {"TMPDIR": str(tmp_path)}

    assert (
        subprocess.run(
            ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], env=env, check=False
        ).returncode
        == 0
    )


def test_somebody_elses_directory_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(xet_home, "default_root", lambda: tmp_path / "own")
    monkeypatch.setattr(xet_home, "_ours", [os.getpid()])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("HF_XET_CACHE", raising=False)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "own").mkdir(mode=0o777)
    (tmp_path / "own").chmod(0o777)

    with pytest.raises(xet_home.ConfigError, match="HF_HOME"):
        xet_home.expect_usable()
    assert "HF_XET_CACHE" not in os.environ


def test_a_command_takes_download_tmp_dir_where_nothing_else_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(xet_home, "default_root", lambda: tmp_path / "file" / "own-7")
    monkeypatch.setattr(xet_home, "_ours", [os.getpid()])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "file"))

    xet_home.expect_usable(tmp_path / "volume")
    assert os.environ["HF_XET_CACHE"] == str(tmp_path / "volume" / "own-7" / "xet")
    assert (tmp_path / "volume" / "own-7").stat().st_mode & 0o077 == 0
