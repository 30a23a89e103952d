"""The benchmarks still run. What they measure is in docs/benchmarks.md; nothing here depends on the machine's speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


def run(script, tmp_path, *arguments, exits=(0,)):
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, f"dev/benchmarks/{script}", "--json", str(figures), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode in exits, done.stderr
    return done.stdout, json.loads(figures.read_text())


def test_the_online_path(tmp_path):
    scenario, verdict = "classic get 16 x 512 KiB", ", hot"
    reported, figures = run("online.py", tmp_path, "--runs", "1", "--delay-ms", "0", "--only", scenario)

    assert figures[scenario].keys() == {"built-in", "ours"}
    assert f"{scenario}{verdict}" in reported


def test_an_outage(tmp_path):
    bounds_missed = 1
    arguments = ("--hang-secs", "4", "--only", "paths-info hangs")
    reported, figures = run("outage.py", tmp_path, *arguments, exits=(0, bounds_missed))

    assert figures["paths-info hangs"].keys() == {"built-in", "ours"}
    assert all(len(row["took"]) == 5 for row in figures["paths-info hangs"].values())
    assert "ratio of five" in reported


def test_the_key_index(tmp_path):
    reported, figures = run("index.py", tmp_path, "--only", "table", "--keys", "20000")

    assert figures["table"]["keys"] == 20_000
    assert "look-up of 16 keys" in reported


def test_the_key_index_of_a_fleet(tmp_path):
    reported, figures = run("index.py", tmp_path, "--only", "fleet", "--nodes", "20")

    assert figures["fleet"]["100%"].keys() == {"built-in", "ours", "indexed"}
    assert "within free" in reported
