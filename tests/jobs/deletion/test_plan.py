"""Plans as files: what was written is read, and what was not is not believed."""

import itertools
import json
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.core.units import Extent
from hfbucket_plugin.errors import (
    AccessDeniedError,
    ConfigError,
    ItemFailure,
    RefusedError,
    ThrottledError,
    TransportError,
)
from hfbucket_plugin.hub.bucket import ObjectInfo
from jobs.batch.apply import Applier
from jobs.batch.model import ItemBatch, Outcome
from jobs.deletion.attempt import attempt, in_process
from jobs.deletion.guards import MaxDelete
from jobs.deletion.plan import DeletionHeader, DeletionPlanFile, DeletionPlanWriter, Item
from jobs.lock.lock import LockLostError

AT = datetime(2030, 1, 1, tzinfo=UTC)
HANDLE = BucketHandle.parse("hf://buckets/org/kv/kv/us")


def header(**values):
    own = {"job": "cleanup", "instance": "hfbucket.us", "bucket": HANDLE, "endpoint": "https://hub", "made_at": AT}
    own["clock"] = "hub"
    return DeletionHeader(**(own | {"min_age": timedelta(hours=1), "max_delete": MaxDelete(percent=30.0)} | values))


def item(number, **values):
    key = f"m@1@0@{number:x}@half"
    own = {"path": HANDLE.join(encode_name(key)), "key": key, "xet_hash": f"{number:064x}", "size": number}
    return Item(**(own | {"uploaded_at": AT - timedelta(days=number), "reason": "expired"} | values))


ITEMS = [item(number) for number in range(1, 6)]


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.jsonl"
    with DeletionPlanWriter(path, header()) as writer:
        for one in ITEMS:
            writer.add(one, "m")
        writer.finish(Extent(20, 100), {"kept": Extent(15, 85)}, {"own": Extent(1, 1)})
    return path


def lines_of(plan):
    return plan.read_text().splitlines()


def test_what_was_written_is_read(plan):
    read = DeletionPlanFile.open(plan)

    assert read.header == header()
    assert list(read.items()) == ITEMS
    assert read.left == read.totals.planned == Extent(5, 15)
    assert read.totals.listed == Extent(20, 100)
    assert read.totals.by_reason == {("m", "expired"): Extent(5, 15)}


def test_lines_may_be_taken_out(plan):
    lines = lines_of(plan)
    plan.write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")

    assert list(DeletionPlanFile.open(plan).items()) == [ITEMS[0], *ITEMS[2:]]


def test_a_plan_that_was_not_finished_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), DeletionPlanWriter(tmp_path / "plan.jsonl", header()) as writer:  # noqa: PT012 - one story
        writer.add(ITEMS[0], "m")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "reported"),
    [
        (lambda lines: lines[:-1], ConfigError, "has no end"),
        (lambda lines: lines[:0], ConfigError, "has no end"),
        (lambda lines: [*lines, lines[1]], ConfigError, "line 8: there is more after its end"),
        (lambda lines: [*lines[:2], lines[2][:-9], *lines[3:]], ConfigError, "line 3"),
        (lambda lines: ['{"record": "plan", "version": 99}', *lines[1:]], ConfigError, "no plan of version 1"),
        (lambda lines: [*lines[:2], *lines[1:]], RefusedError, "more objects than were planned"),
        (lambda lines: [lines[0].replace('{"percent": 30.0}', "{}"), *lines[1:]], ConfigError, "max_delete"),
        (lambda lines: [lines[0].replace('"percent": 30.0', '"percent": 101'), *lines[1:]], ConfigError, "than 100"),
        (lambda lines: [lines[0].replace('"percent": 30.0', '"bytes": Infinity'), *lines[1:]], ConfigError, "numbers"),
        (lambda lines: [lines[0].replace('"percent": 30.0', '"objects": true'), *lines[1:]], ConfigError, "numbers"),
        (lambda lines: [lines[0].replace(": 3600.0", ": -3600.0"), *lines[1:]], ConfigError, "number of seconds"),
        (lambda lines: [lines[0].replace(": 3600.0", ": NaN"), *lines[1:]], ConfigError, "number of seconds"),
        (lambda lines: [lines[0].replace(": 3600.0", ": Infinity"), *lines[1:]], ConfigError, "number of seconds"),
        (lambda lines: [lines[0].replace(": 3600.0", ": 1e300"), *lines[1:]], ConfigError, "number of seconds"),
        (lambda lines: [lines[0].replace('"https://hub"', "null"), *lines[1:]], ConfigError, "endpoint"),
        (lambda lines: ["[" * 100_000, *lines[1:]], ConfigError, "line 1: .*recursion"),
        (lambda lines: [lines[0], '{"path":' * 100_000, *lines[2:]], ConfigError, "line 2: .*recursion"),
    ],
)
def test_a_plan_that_is_broken_is_refused(plan, change, error, reported):
    lines = change(lines_of(plan))
    plan.write_text("\n".join(lines) + "\n" if lines else "")
    with pytest.raises(error, match=reported):
        DeletionPlanFile.open(plan)


@pytest.mark.parametrize(
    "path",
    [
        "kv/us/.hfbucket/locks/x",
        "kv/us/deeper/.hfbucket/x",
        "kv/us-east/m%401%400%401%40half",
        "m%401%400%401%40half",
        "kv/us/README.md",
        "kv/us/test%401%400%400%40bfloat16",
        "kv/us/m%401%400%402%40half",
    ],
)
def test_what_is_never_deleted_in_a_plan_is_refused(plan, path):
    lines = lines_of(plan)
    record = json.loads(lines[1]) | {"path": path}
    if path.endswith("bfloat16"):
        record["key"] = "test@1@0@0@bfloat16"
    plan.write_text("\n".join([lines[0], json.dumps(record), *lines[2:]]) + "\n")

    with pytest.raises(RefusedError, match=r"line 2: .*nothing is"):
        DeletionPlanFile.open(plan)


class FakeBucket:
    """A bucket that says what a test wants."""

    def __init__(self, items, *troubles):
        self.objects = {
            one.path: ObjectInfo(one.path, ContentId(one.xet_hash, one.size), one.uploaded_at) for one in items
        }
        self.troubles = list(troubles)  # what becomes of the deletes, in turn
        self.deletes = []

    def stat(self, paths, deadline, *, patient):
        return {path: self.objects[path] for path in paths if path in self.objects}

    def delete(self, paths, deadline, *, once):
        assert once
        self.deletes.append(list(paths))
        trouble = self.troubles.pop(0) if self.troubles else None
        if isinstance(trouble, TransportError):  # carried out, and the answer lost
            self.take(paths)
        if isinstance(trouble, Exception):
            raise trouble
        failed = {path: ItemFailure(path, "hub", "busy") for path in trouble or ()}
        self.take([path for path in paths if path not in failed])
        return failed

    def take(self, paths):
        for path in paths:
            self.objects.pop(path, None)


def outcomes(result):
    return {ended.item.path: ended.outcome for ended in result.ended}


def test_a_lost_answer_is_no_second_delete():
    fake = FakeBucket(ITEMS, TransportError("cut"))
    first = attempt(fake, ItemBatch(tuple(ITEMS)), AT, Deadline.after(9))
    assert (first.ended, first.left.tries) == ((), 1)
    fake.objects[ITEMS[0].path] = ObjectInfo(ITEMS[0].path, ContentId("f" * 64, 1), AT)  # rewritten meanwhile

    second = attempt(fake, first.left, AT, Deadline.after(9))

    assert len(fake.deletes) == 1
    assert list(outcomes(second).values()) == [Outcome.CHANGED, *[Outcome.DELETED] * 4]


def test_only_what_failed_is_tried_again():
    fake = FakeBucket(ITEMS, [ITEMS[1].path], [ITEMS[1].path])
    first = attempt(fake, ItemBatch(tuple(ITEMS)), AT, Deadline.after(9))
    second = attempt(fake, first.left, AT, Deadline.after(9))
    third = attempt(fake, second.left, AT, Deadline.after(9))

    assert [len(paths) for paths in fake.deletes] == [5, 1, 1]
    assert (len(first.ended), second.ended, outcomes(third)) == (4, (), {ITEMS[1].path: Outcome.DELETED})


def test_what_is_too_young_is_left_even_if_a_plan_names_it():
    fake = FakeBucket(ITEMS)

    result = attempt(fake, ItemBatch(tuple(ITEMS)), AT - timedelta(days=2, hours=1), Deadline.after(9))

    assert list(outcomes(result).values()) == [*[Outcome.TOO_YOUNG] * 2, *[Outcome.DELETED] * 3]


def test_an_object_that_was_planned_twice_ends_twice():
    result = attempt(FakeBucket(ITEMS), ItemBatch((ITEMS[0], ITEMS[0])), AT, Deadline.after(9))

    assert sorted(ended.outcome for ended in result.ended) == [Outcome.DELETED, Outcome.GONE]


def carried_out(fake, items, *, confirm=lambda: 9.0, stop=None, until=None, size=2):
    reported = []
    executor = in_process(fake, 1)
    try:
        end = Applier(
            executor,
            confirm=confirm,
            not_after=AT,
            on_end=reported.append,
            stop=stop or SimpleNamespace(requested=False),
            until=until or Deadline.after(60),
            batch_size=size,
        ).run(iter(items))
    finally:
        executor.close()
    return end, reported


def test_throttling_is_no_try():
    fake = FakeBucket(ITEMS, *[ThrottledError("slow down", 0.01)] * 9)

    end, reported = carried_out(fake, ITEMS)

    assert (end.why, {ended.outcome for ended in reported}, len(reported)) == (None, {Outcome.DELETED}, 5)


def test_a_lost_lock_ends_it():
    confirms = iter([9.0, LockLostError("it went")])

    def confirm():
        if isinstance(found := next(confirms), Exception):
            raise found
        return found

    end, reported = carried_out(FakeBucket(ITEMS), ITEMS, confirm=confirm)

    assert isinstance(end.why, LockLostError)
    assert len(reported) == 2


def test_a_lock_that_nobody_can_tell_of_is_asked_again():
    answers = itertools.chain([TransportError("cut"), ThrottledError("slow", 0.01)], itertools.repeat(9.0))

    def confirm():
        if isinstance(found := next(answers), Exception):
            raise found
        return found

    end, reported = carried_out(FakeBucket(ITEMS), ITEMS, confirm=confirm)

    assert (end.why, len(reported)) == (None, 5)


def test_a_right_that_was_taken_away_ends_it():
    end, reported = carried_out(FakeBucket(ITEMS, AccessDeniedError("no", 403)), ITEMS)

    assert isinstance(end.why, AccessDeniedError)
    assert reported == []


@pytest.mark.parametrize("options", [{"stop": SimpleNamespace(requested=True)}, {"until": Deadline.after(0)}])
def test_nothing_is_begun_after_the_end(options):
    fake = FakeBucket(ITEMS)

    _, reported = carried_out(fake, ITEMS, **options)

    assert (reported, fake.deletes) == ([], [])
