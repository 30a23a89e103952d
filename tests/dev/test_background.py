"""The sum of the calls that no request asked for: how it is made, and that the one that the docs show is within the quota."""

import re
from pathlib import Path

import pytest

from dev.benchmarks.background import MODES, MOST_CALLS, added_up, kind_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operate.md"


def table():
    """The rows of the table: mode to numbers by kind."""
    text = PAGE.read_text(encoding="utf-8").partition("## Calls that no request asked for")[2].partition("\n## ")[0]
    first = next(block for block in text.split("\n\n") if block.startswith("| `index:`"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines()]
    head, _, *rows = lines
    return {
        re.sub("[`:]|index", "", row[0]).strip(): dict(zip(head[1:], map(_number, row[1:]), strict=True))
        for row in rows
    }


def _number(cell):
    return int(cell.strip("*").replace(",", ""))


@pytest.mark.parametrize("mode", MODES)
def test_the_sum_in_the_docs_is_right_and_within_the_quota(mode):
    row = table()[mode]
    total = row.pop("sum")
    assert sum(row.values()) == total <= MOST_CALLS


def test_calls_are_told_apart_by_who_makes_them():
    reported = {
        ("hfbucket-index-refresh-us", "tree"): "refreshes",
        ("hfbucket-index-journal-us", "batch"): "journals",
        ("hfbucket-fingerprint-us-0", "paths-info"): "fingerprints",
        ("hfbucket-usage", "tree"): "listings",
        ("hfbucket-read-us-3", "xet-read-token"): "tokens",
        ("hfbucket-lookup-us-0", "paths-info"): "",
        ("hfbucket-name-0", "batch"): "",
    }
    assert {who: kind_of(*who) for who in reported} == reported


def test_what_some_processes_did_is_added_up_for_a_fleet():
    rows = [
        {"calls": {"refreshes": 3, "journals": 2}, "start": {"tokens": 2}},
        {"calls": {"refreshes": 6}, "start": {"tokens": 1}},
    ]
    found = added_up(rows, 1000, 3)
    assert found == {
        "calls": {"journals": 334, "refreshes": 1500},
        "total": 1834,
        "start": {"tokens": 1.5},
    }
