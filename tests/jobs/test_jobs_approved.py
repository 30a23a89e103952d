"""What is deleted is what was checked and approved, whatever becomes of the plan's file meanwhile."""

import json
import os

import pytest
from depot import DAY, key
from huggingface_hub import HfApi

OLD = [key(number) for number in range(4)]
NEW = [key(number) for number in range(100, 120)]


@pytest.fixture
def stocked(depot):
    depot.put(OLD, age=20 * DAY)
    depot.put(NEW, age=1 * DAY)
    return depot


def all_of_it(depot, lines):
    """The lines of a plan, with everything in the bucket between its first and its last."""
    api = HfApi(endpoint=depot.hub.endpoint, token=False)
    found = [item for item in api.list_bucket_tree(depot.bucket_id, recursive=True) if item.type == "file"]
    objects = [
        {"path": one.path, "key": "x", "xet_hash": one.xet_hash, "size": one.size, "reason": "expired"}
        | {"uploaded_at": one.uploaded_at.isoformat()}
        for one in found
    ]
    return "\n".join([lines[0], *map(json.dumps, objects), lines[-1]]) + "\n"


def rewrite(path, text):
    path.write_text(text)


def replace(path, text):
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


@pytest.mark.parametrize(("change", "code", "left"), [(rewrite, 4, 25), (replace, 0, 21)])
def test_a_plan_that_is_changed_while_it_is_approved(stocked, monkeypatch, change, code, left):
    stocked.put_paths({"kv/eu/of-another-instance": b"x"}, age=20 * DAY)

    def asked(plan):
        change(plan.path, all_of_it(stocked, plan.path.read_text().splitlines()))
        return True

    monkeypatch.setattr("jobs.show.at_terminal", lambda: True)
    monkeypatch.setattr("jobs.show.ask", asked)
    ran = stocked.cleanup("--max-age", "14d")

    assert ran.code == code, ran.stderr
    assert len(stocked.left()) == left
    assert {"kv/eu/of-another-instance"} | stocked.paths_of(NEW) <= stocked.left()
    assert (code == 0) == ("was changed after it was checked" not in ran.stderr)


def test_a_plan_that_is_no_file(stocked, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        ran = stocked.run("apply", str(path), "--yes")
        assert (ran.code, "no file" in ran.stderr or "directory" in ran.stderr) == (2, True), ran.stderr
