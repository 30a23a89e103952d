"""The main job, as `make demo` runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.demo.__main__ import Step, exit_code, show, summary_in

REPOSITORY = Path(__file__).resolve().parents[2]
WHOLE = {"tokens": 4096, "found": 4096, "hit": 4096, "identical": True, "seconds": 0.1}


@pytest.mark.slow
def test_store_warm_and_hit_everything_without_the_hub(tmp_path):
    before = set(Path("/tmp").glob("hfd-*"))  # noqa: S108 - where the demo works
    done = subprocess.run(
        [sys.executable, "-m", "dev.demo"],
        cwd=REPOSITORY,
        env=os.environ | {"TMPDIR": "/tmp", "HOME": str(tmp_path)},  # noqa: S108 - sockets need a short path
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )

    assert done.returncode == 0, done.stderr
    assert "hit tokens 4096/4096" in done.stdout
    assert "identical: yes" in done.stdout
    assert "-secret-of-the-demo" not in done.stdout + done.stderr
    assert set(Path("/tmp").glob("hfd-*")) <= before  # noqa: S108 - the same


@pytest.mark.parametrize("wrong", [{"hit": 3840}, {"found": 0, "hit": 0}, {"identical": False}])
def test_anything_missing_or_different_fails(wrong, capsys):
    consumed = WHOLE | wrong

    show([Step("a step", 1, 2**20, 0.5)], consumed)

    assert exit_code(WHOLE) == 0
    assert exit_code(consumed) == 1
    assert f"hit tokens {consumed['hit']}/4096" in capsys.readouterr().out


def test_the_summary_is_found_among_a_jobs_lines():
    assert summary_in('INFO x\n{"event": "progress"}\n{"event": "summary", "copied": 3}\nSUCC y')["copied"] == 3
    with pytest.raises(RuntimeError, match="no summary"):
        summary_in("INFO x")
