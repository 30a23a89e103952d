"""`python -m jobs status` on a real local Hub."""

import json
from html.parser import HTMLParser

import pytest

from localhub.faults import Fault
from tests.support.buckets import DAY, HOUR, INSTANCE, MODEL, PREFIX, key, l2_key


@pytest.fixture
def stocked(depot):
    depot.put({key(n): b"x" * 100 for n in range(6)}, age=20 * DAY)
    depot.put({key(n, worker=1): b"x" * 100 for n in range(20)}, age=2 * DAY)
    depot.put({l2_key(1, "org/other"): b"y" * 7}, age=0)
    depot.put_paths({f"{PREFIX}/README.md": b"z"})
    return depot


def test_what_is_there_and_what_the_next_cleanup_does(stocked):
    ran = stocked.run("status", "--json", "--max-age", "14d")

    assert ran.code == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["chunks"] == {"objects": 27, "bytes": 2607}
    assert [(one["model"], one["objects"]) for one in found["by_model"]] == [(MODEL, 26), ("org/other", 1)]
    assert [(one["world_size"], one["worker"], one["objects"]) for one in found["by_worker"]] == [
        (2, 0, 6), (2, 1, 20), (2, 0, 1),
    ]  # fmt: skip
    assert [(one["younger_than"], one["objects"]) for one in found["ages"]] == [("1h", 1), ("7d", 20), ("30d", 6)]
    assert found["passed_by"] == {"foreign": {"objects": 1, "bytes": 1}}
    assert (found["last_run"], found["growth"]) == (None, None)
    assert found["next_cleanup"]["planned"] == {"objects": 6, "bytes": 600}
    assert found["next_cleanup"]["kept"]["too-young"]["objects"] == 1
    assert found["next_cleanup"]["refused"] == ""


def test_growth_since_the_last_run(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0
    stocked.make_older([f"{PREFIX}/.hfbucket/reports/cleanup.json"], 12 * HOUR)
    stocked.put({key(n, worker=2): b"w" * 50 for n in range(10)}, age=0)

    growth = json.loads(stocked.run("status", "--json").stdout)["growth"]

    assert (growth["objects"], growth["bytes"]) == (10, 500)
    assert growth["bytes_per_day"] == pytest.approx(1000, rel=0.05)


def test_lines_for_people(stocked):
    assert stocked.cleanup("--max-age", "14d", "--yes").code == 0

    ran = stocked.run("status", "--max-age", "1d")

    assert f"{INSTANCE}: all chunks: 21, 2.0 KiB" in ran.stdout
    assert f"{INSTANCE}: model org/model, worker 1 of 2: 20, 2.0 KiB" in ran.stdout
    assert f"{INSTANCE}: age below 7d: 20, 2.0 KiB" in ran.stdout
    assert f"{INSTANCE}: next cleanup deletes: 20, 2.0 KiB" in ran.stdout
    assert f"{INSTANCE}: since cleanup, " in ran.stdout
    assert f"{INSTANCE}: the next cleanup would be refused: the plan deletes 20 objects" in ran.stdout


def test_it_changes_nothing(stocked):
    before = stocked.all_paths()
    stocked.hub.control.reset_counters()

    stocked.run("status", "--max-bytes", "1KiB")

    assert stocked.all_paths() == before
    assert stocked.hub.control.counters().route("batch").requests == 0


def test_the_state_of_the_key_index(stocked, tmp_path):
    assert json.loads(stocked.run("status", "--json").stdout)["index"] is None
    assert stocked.run("index").code == 0

    found = json.loads(stocked.run("status", "--json").stdout)["index"]

    assert (found["keys"], found["snapshots"], found["journals"], found["trouble"]) == (28, 1, 0, "")
    assert 0 < found["age_seconds"] <= found["listed_seconds_ago"] < HOUR
    page = tmp_path / "status.html"
    ran = stocked.run("status", "--html", str(page))
    assert f"{INSTANCE}: key index: 28 keys, brought up to date " in ran.stdout
    assert "Key index: 28 keys" in page.read_text()


def test_a_listing_that_fails_is_no_status(stocked):
    stocked.hub.control.add_fault(Fault(route="tree", path_regex=r"/tree/kv/us/$", status=503))

    ran = stocked.run("status", "--json")

    assert (ran.code, ran.stdout) == (3, "")
    assert "no status without a complete listing" in ran.stderr


class Page(HTMLParser):
    """What a page shows, and whether its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.shown, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.shown.append(data.strip())


def test_a_page_for_people_loads_nothing_and_runs_nothing(stocked, tmp_path):
    stocked.put({key(1, "org/<script>alert('x')</script>"): b"y" * 9}, age=5 * DAY)
    path = tmp_path / "status.html"

    ran = stocked.run("status", "--max-age", "1d", "--html", str(path))

    assert ran.code == 0, ran.stderr
    text = path.read_text()
    page = Page(text)
    assert (page.links, "script" in page.tags, "url(" in text, "@import" in text) == ([], False, False, False)
    assert "org/<script>alert('x')</script>" in page.shown
    for reported in ("28 chunks, 2.6 KiB", "By model", "By age", "below 7d", "The next cleanup deletes", INSTANCE):
        assert reported in page.shown, reported
    assert "The next cleanup would be refused" in text
    assert page.tags.count("svg") == page.tags.count("rect") > 8
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".status")] == []


def test_a_page_says_of_what_nothing_is_known(stocked, tmp_path):
    stocked.hub.control.add_fault(Fault(route="tree", status=403))
    path = tmp_path / "status.html"
    assert stocked.run("status", "--html", str(path)).code == 2
    assert "no status without a complete listing" in path.read_text()
    assert stocked.run("status", "--html", "/nowhere/status.html").code == 2
