"""What is deleted is what was checked and approved, whatever becomes of the plan's file meanwhile."""

import json
import os
import stat
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.support.buckets import DAY, NEW, OLD


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

    monkeypatch.setattr("hfbucket_plugin.tools.console.at_terminal", lambda: True)
    monkeypatch.setattr("jobs.cli.app.ask_to_delete", asked)
    ran = stocked.cleanup("--max-age", "14d")

    assert ran.code == code, ran.stderr
    assert len(stocked.left()) == left
    assert {"kv/eu/of-another-instance"} | stocked.paths_of(NEW) <= stocked.left()
    assert (code == 0) == ("was changed after it was checked" not in ran.stderr)


def test_a_plan_that_is_no_file(stocked, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        ran = stocked.run("apply", str(path), "--yes")
        assert (ran.code, "regular file" in ran.stderr or "directory" in ran.stderr) == (2, True), ran.stderr


def test_the_directory_of_plans_is_ours_alone(stocked, tmp_path):
    plans = tmp_path / "plans"
    planned = stocked.cleanup("--max-age", "14d")
    assert stat.S_IMODE(plans.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path(planned.summary["plan"]).stat().st_mode) == 0o600

    plans.chmod(0o770)
    refused = stocked.cleanup("--max-age", "14d", "--yes")
    assert (refused.code, "--plan-dir" in refused.stderr) == (4, True)
    plans.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    plans.symlink_to(tmp_path / "elsewhere")
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 4
    assert len(stocked.left()) == 24


def test_a_plan_that_others_could_have_written_is_not_carried_out(stocked, tmp_path, monkeypatch):
    planned = stocked.cleanup("--max-age", "14d", "--plan-dir", str(tmp_path / "kept"))
    plan = Path(planned.summary["plan"])
    plan.chmod(0o620)
    writable = stocked.run("apply", str(plan), "--yes")
    plan.chmod(0o600)
    with monkeypatch.context() as other:
        other.setattr("os.geteuid", lambda: os.getuid() + 1)
        of_another = stocked.run("apply", str(plan), "--yes")

    for ran in (writable, of_another):
        assert (ran.code, "install -m 600" in ran.stderr) == (4, True)
    assert len(stocked.left()) == 24
    assert stocked.run("apply", str(plan), "--yes").counts("deleted") == [4]


def test_apply_may_be_stricter_than_its_plan_and_never_laxer(stocked, tmp_path):
    plans = ("--plan-dir", str(tmp_path / "kept"))
    plan = stocked.cleanup("--max-age", "14d", *plans).summary["plan"]

    assert stocked.run("apply", plan, "--yes", "--max-delete", "3").code == 4
    young = stocked.run("apply", plan, "--yes", "--min-age", "30d")
    assert (young.code, young.counts("deleted", "too-young")) == (0, [0, 4])
    assert stocked.run("apply", plan, "--yes", "--max-delete", "100%", "--min-age", "0s").counts("deleted") == [4]

    text = Path(plan).read_text()
    Path(plan).write_text(text.replace('"percent": 30.0', '"percent": 1.0'))
    assert stocked.run("apply", plan, "--yes", "--max-delete", "100%").code == 4
    assert stocked.run("rm", OLD[0], "--min-age", "5").code == 2


def test_a_plan_goes_to_the_hub_that_it_was_made_for(stocked, tmp_path):
    plan = stocked.cleanup("--max-age", "14d", "--plan-dir", str(tmp_path / "kept")).summary["plan"]
    stocked.settings = {"endpoint": stocked.hub.endpoint.replace("127.0.0.1", "localhost")}

    ran = stocked.run("apply", plan, "--yes")

    assert (ran.code, f"of {stocked.hub.endpoint}, and" in ran.stderr) == (2, True), ran.stderr
    assert len(stocked.left()) == 24
