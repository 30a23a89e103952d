"""`docs/export.md` says what is so."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from hfbucket_plugin.tools import exit_codes
from hfbucket_plugin.tools.options import flags_of
from hfbucket_plugin.tools.selection import Selection
from jobs.cli.app import app
from jobs.export.copy import CopyOutcome
from jobs.export.plan import OnConflict

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(app).commands["export"]
SHOWN = re.findall(r"python -m jobs (export --[^`|\n]*)", TEXT)


@pytest.mark.parametrize("line", SHOWN)
def test_commands_are_taken(line):
    with COMMAND.make_context("export", shlex.split(line)[1:]) as context:
        assert context.params


def test_there_are_commands():
    assert len(SHOWN) >= 5


def test_flags_that_are_named_exist_and_all_are_named():
    flags = {name for parameter in COMMAND.params for name in parameter.opts}
    named = set(re.findall(r"`?(--[a-z][a-z0-9-]+)", TEXT)) - {"--working-dir"}
    assert named <= flags | {"--instance"}
    shared = {"--lock-lifetime", "--help", "--all", "--chunk-size", "--hash-algorithm"}
    assert flags - named <= shared
    assert {flag.name for flag in flags_of(Selection)} - {"--hottest"} - shared <= named


@pytest.mark.parametrize("name", [*map(str, CopyOutcome), *map(str, OnConflict), "auto", "copy", "stream"])
def test_every_name_is_described(name):
    assert f"`{name}`" in TEXT


def test_every_exit_code_is_described():
    rows = re.findall(r"^\| (\d) \|", TEXT, re.MULTILINE)
    assert [int(code) for code in rows] == sorted(exit_codes.RESULTS)


def test_every_field_of_a_summary_is_described(tmp_path):
    from jobs.export.plan import EndpointRef
    from jobs.export.report import ExportSummary

    summary = ExportSummary(EndpointRef("a", "b"), EndpointRef(None, "c"), 0, applied=True, in_manifest=1)
    for name in summary.record():
        assert f"`{name}`" in TEXT, name
