"""What the MP adapter accounts for, lists, and evicts."""

import base64
import contextlib
import functools
import itertools
import json
import threading
from argparse import Namespace
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from huggingface_hub import HfApi
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lmcache.v1.distributed.config import EvictionConfig, L1ManagerConfig, L1MemoryManagerConfig, StorageManagerConfig
from lmcache.v1.distributed.eviction import L2EvictionPolicy
from lmcache.v1.distributed.eviction_policy.isolated_lru import IsolatedLRUEvictionPolicy
from lmcache.v1.distributed.eviction_policy.lru import LRUEvictionPolicy
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
from lmcache.v1.distributed.quota_manager import QuotaManager
from lmcache.v1.distributed.storage_controllers.eviction_controller import L2AdapterEvictionState, L2EvictionController
from lmcache.v1.distributed.storage_manager import StorageManager

from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.engine.mp import HFBucketL2Adapter
from hfbucket_plugin.engine.mp_tasks import key_string
from hfbucket_plugin.engine.mp_usage import SizeTable, Usage, UsageListing, digest_of, list_page
from hfbucket_plugin.errors import BucketMissingError, HFBucketError, ThrottledError, TransportError
from hfbucket_plugin.hub.bucket import ObjectInfo
from hfbucket_plugin.hub.connect import open_bucket
from localhub.faults import Fault
from tests.support.buckets import instance_settings, noise, paths, upload
from tests.support.hubs import Recorder
from tests.support.lmcache_mp import (
    GIB,
    MP,
    SIZE,
    Listener,
    await_result,
    chunk_key,
    load,
    lookup,
    mp_key,
    mp_memory,
    path_of,
    put,
    there,
    used,
)
from tests.support.models import any_text, untimed
from tests.support.surface import CHUNK_BYTES, content
from tests.support.waiting import eventually

PATHS = st.sampled_from([f"p/{name}" for name in "abcdefgh"])
SIZES = st.integers(1, 5)


def salt_of(path):
    return "" if path < "p/c" else "ada" if path < "p/f" else "bob"


class UsageMachine(RuleBasedStateMachine):
    """One process's account of a bucket in which others delete, replace and write at any moment.

    Lookups and pages of listings are asked for at one moment and answered at a later one. For each object the model knows
    when others changed it last, and when the account learnt of it: from then on it has to be right.
    """

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.usage = Usage(clock=lambda: self.now)
        self.bucket = {}
        self.own = set()
        self.changed = {}  # by others: path -> when
        self.known = {}  # path -> since when the account is right, unless others changed it later
        self.questions = []
        self.page = None
        self.place = None
        self.began = 0.0

    def tick(self):
        self.now += 1
        return self.now

    def knows(self, path, since):
        self.known[path] = max(self.known.get(path, 0.0), since)

    @rule(path=PATHS, size=SIZES, sees_old=st.booleans())
    def write(self, path, size, sees_old):
        self.tick()
        old = self.bucket.get(path)
        self.bucket[path] = size
        self.usage.wrote([(path, salt_of(path), size)], {path: old} if old and sees_old else {})
        self.own.add(path)
        self.knows(path, self.now)

    @rule(path=PATHS)
    def delete(self, path):
        self.tick()
        old = self.bucket.pop(path, None)
        if old is None:
            self.usage.gone([path])
        else:
            self.usage.deleted({path: old})
        self.own.discard(path)
        self.knows(path, self.now)

    @rule(path=PATHS, size=st.none() | SIZES)
    def others_change(self, path, size):
        self.bucket.pop(path, None)
        if size is not None:
            self.bucket[path] = size
        self.changed[path] = self.tick()

    @rule(paths=st.sets(PATHS))
    def ask(self, paths):
        self.tick()
        self.questions.append(({path: self.bucket.get(path) for path in paths}, self.now))

    @precondition(lambda self: self.questions)
    @rule(number=st.integers(0, 9))
    def answer(self, number):
        sizes, asked = self.questions.pop(number % len(self.questions))
        self.tick()
        self.usage.learned(sizes, asked)
        for path in sizes:
            self.knows(path, asked)

    @rule()
    def begin(self):
        self.began, self.place, self.page = self.tick(), "", None
        self.usage.begin()

    @precondition(lambda self: self.place is not None and self.page is None)
    @rule()
    def ask_for_page(self):
        self.tick()
        names = sorted(path for path in self.bucket if path > self.place)
        self.page = [(name, self.bucket[name]) for name in names[:3]], len(names) <= 3, self.now

    @precondition(lambda self: self.page is not None)
    @rule()
    def take_page(self):
        page, last, asked = self.page
        self.page = None
        self.tick()
        self.usage.listed(page, asked)
        for path, _ in page:
            self.knows(path, asked)
            self.place = path
        if last:
            self.usage.end(complete=True)
            self.place = None
            assert self.usage.complete
            for path in salts():
                self.knows(path, self.began)

    @rule()
    def give_up(self):
        self.usage.give_up()
        self.place = self.page = None

    @invariant()
    def what_the_account_learnt_is_right(self):
        sizes = {path: self.usage._sizes.get(digest_of(path)) for path in salts()}
        for path, (size, _owner) in sizes.items():
            if self.changed.get(path, 0.0) < self.known.get(path, 0.0):
                assert size == self.bucket.get(path, 0), path
        assert self.usage.total == sum(size for size, _ in sizes.values())
        assert self.usage.objects == sum(size > 0 for size, _ in sizes.values())
        by_salt = Counter()
        for path, (size, owner) in sizes.items():
            assert not owner or path in self.own or self.changed.get(path), "nobody here wrote it"
            by_salt[salt_of(path)] += size if owner else 0
        assert self.usage.by_salt() == {salt: size for salt, size in by_salt.items() if size}


def salts():
    return [f"p/{name}" for name in "abcdefgh"]


TestUsage = UsageMachine.TestCase
TestUsage.settings = settings(untimed, stateful_step_count=40)


def test_a_listing_that_did_not_see_all_takes_nothing_off():
    usage = Usage()
    usage.wrote([("p/a", "", 5)], {})
    usage.begin()
    usage.listed([("p/b", 3)], usage.now)
    usage.end(complete=False)

    assert usage.total == 8
    assert not usage.complete
    usage.begin()
    usage.listed([("p/b", 3)], usage.now)
    assert usage.end(complete=True)
    assert usage.total == 3
    assert usage.complete


def test_an_answer_after_a_page_was_asked_for_takes_nothing_off():
    usage = Usage(clock=itertools.count().__next__)
    usage.wrote([("p/a", "", 5)], {})
    usage.begin()
    page_asked = usage.now
    usage.learned({"p/a": 5}, usage.now)
    usage.listed([("p/a", 5)], page_asked)

    assert not usage.end(complete=True)
    assert usage.total == 5


def test_the_end_of_a_listing_that_was_given_up_changes_nothing():
    usage = Usage()
    usage.wrote([("p/a", "ada", 5)], {})
    usage.begin()
    usage.give_up()
    usage.listed([("p/c", 3)], usage.now)
    usage.end(complete=True)

    assert usage.by_salt() == {"ada": 5}
    assert usage.total == 5
    assert not usage.complete


def test_own_objects_alone_are_counted_and_corrected_where_nothing_bounds_the_whole():
    usage = Usage(everybody=False)
    usage.wrote([("p/a", "ada", 5), ("p/b", "ada", 5), ("p/c", "ada", 5)], {})

    assert usage.learned({"p/a": None, "p/x": 7}, usage.now) == ["p/a"]
    usage.begin()
    usage.listed([("p/b", 6), ("p/y", 7)], usage.now)
    usage.end(complete=True)

    assert usage.total == 6
    assert usage.by_salt() == {"ada": 6}
    assert not usage.complete, "others' objects are not in it"


def test_objects_beyond_those_kept_one_by_one_are_a_sum():
    usage = Usage(most_objects=2)
    usage.wrote([(f"p/{n}", "", 5) for n in range(4)], {})
    assert (usage.total, usage.objects, usage.exact) == (20, 4, False)

    usage.deleted({"p/3": 5})
    usage.deleted({"p/0": 5})
    assert (usage.total, usage.objects) == (10, 2)

    usage.begin()
    usage.listed([("p/1", 5), ("p/2", 5), ("p/8", 7), ("p/9", 8)], usage.now)
    usage.end(complete=True)
    assert (usage.total, usage.objects, usage.exact) == (25, 4, False)
    usage.begin()
    usage.listed([("p/1", 5)], usage.now)
    usage.end(complete=True)
    assert (usage.total, usage.objects, usage.exact) == (5, 1, True)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(0, 2)), max_size=300))
def test_the_table_of_sizes_is_a_dict(changes):
    table, model = SizeTable(), {}
    for number, size, owner in changes:
        digest = digest_of(f"p/{number}") >> 54 << 54 | number << 1 | 1  # few first slots: long probes
        table.set(digest, size, owner)
        model[digest] = (size, owner) if size else (0, 0)
        assert table.objects == sum(size > 0 for size, _ in model.values())

    for digest, value in model.items():
        assert (table.get(digest) if value[0] else table.get(digest)[:1]) == (value if value[0] else (0,))


def test_a_sweep_takes_what_is_unmarked_and_nothing_else():
    table = SizeTable()
    for number in range(5000):
        table.set(digest_of(str(number)), number + 1, number % 3)
    table.unmark_all()
    for number in range(0, 5000, 2):
        table.set(digest_of(str(number)), number + 1, number % 3)

    lost = Counter()
    for owner, size in table.drop_unmarked():
        lost[owner] += size

    assert lost == {owner: sum(n + 1 for n in range(1, 5000, 2) if n % 3 == owner) for owner in range(3)}
    assert table.objects == 2500
    assert table.get(digest_of("2")) == (3, 2)
    assert table.get(digest_of("3"))[0] == 0
    assert table.nbytes < 5000 * 40


# --- listings ---------------------------------------------------------------------------------------------------------------


class ListedBucket:
    """A bucket that is listed page by page, as a test allows it."""

    def __init__(self, page_size=2):
        self.handle = BucketHandle.parse("hf://buckets/o/b/v1")
        self.page_size = page_size
        self.objects = {}
        self.errors = []
        self.pages = 0
        self.waits = []
        self.pauses = []
        self.cursors = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()

    def write(self, key, size, minutes=0):
        path = self.handle.join(encode_name(key if isinstance(key, str) else key_string(key)))
        self.objects[path] = ObjectInfo(path, ContentId("0" * 64, size), datetime.now(UTC) + timedelta(minutes=minutes))

    @property
    def background_wait_secs(self):
        return self.waits.pop(0) if self.waits else 0.0

    @property
    def paused_secs(self):
        return self.pauses.pop(0) if self.pauses else 0.0

    def info(self, deadline):
        return {"totalFiles": len(self.objects)}

    def list_page(self, prefix, cursor, deadline):
        assert prefix == "v1/"
        assert deadline.remaining() > 0
        self.inside.set()
        assert self.gate.wait(30)
        self.pages += 1
        self.cursors.append(cursor)
        if self.errors:
            raise self.errors.pop(0)
        names = sorted(path for path in self.objects if cursor is None or path > cursor)
        page = names[: self.page_size]
        return [self.objects[path] for path in page], page[-1] if len(names) > len(page) else None


NOW = datetime.now(UTC)


@pytest.fixture
def listings(monkeypatch):
    """Starts listings of a bucket, and ends them."""
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._SETTLE_SECS", 0.0)
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._RETRY_SECS", 0.01)
    started = []

    def start(bucket, refresh_secs=600, max_pages=None, tell=None, **options):
        reported = []
        usage = Usage()
        tell = tell or (lambda keys, sizes: reported.append((keys, sizes)))
        started.append(UsageListing(bucket, usage, refresh_secs, max_pages, tell, **options))
        return started[-1], usage, reported

    yield start
    for one in started:
        one.close()


def listers():
    return {one for one in threading.enumerate() if one.name == "hfbucket-usage"}


def numbers_of(reported):
    return [[int.from_bytes(key.chunk_hash, "big") for key in keys] for keys, _ in reported]


def test_a_listing_tells_of_mp_objects_the_newest_first_and_counts_them_and_no_others(listings):
    bucket = ListedBucket()
    for number, minutes in ((1, 5), (2, 1), (3, 9), (4, 3)):
        bucket.write(mp_key(number, "ada"), number, minutes)
    bucket.write("org/model@1@0@ab@bfloat16", 100)  # the classic engine's
    bucket.objects["v1/foreign"] = ObjectInfo("v1/foreign", ContentId("0" * 64, 1000), NOW)
    bucket.objects["v1/deep/x"] = ObjectInfo("v1/deep/x", ContentId("0" * 64, 1000), NOW)

    _, usage, reported = listings(bucket)

    eventually(lambda: reported)
    assert numbers_of(reported) == [[3, 1, 4, 2]]
    assert reported[0][1] == [3, 1, 4, 2]
    assert usage.total == 10
    assert usage.by_salt() == {}, "others wrote them"
    assert usage.objects == 4


def test_a_second_listing_tells_only_of_what_came_since(listings):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 1, minutes=-60)
    listing, _, reported = listings(bucket)
    eventually(lambda: len(reported) == 1)

    bucket.write(mp_key(2), 1, minutes=1)
    listing._wanted.set()  # the hour is over
    eventually(lambda: len(reported) == 2)

    assert numbers_of(reported) == [[1], [2]]


def test_who_begins_to_listen_is_told_of_everything(listings):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 1, minutes=-60)
    listing, _, reported = listings(bucket)
    eventually(lambda: len(reported) == 1)

    listing.again()
    eventually(lambda: len(reported) == 2)

    assert numbers_of(reported) == [[1], [1]]


def test_who_begins_to_listen_while_a_later_listing_runs_is_told_of_everything_too(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 1, minutes=-60)
    listing, _, reported = listings(bucket)
    eventually(lambda: len(reported) == 1)
    real, second, go_on = bucket.list_page, threading.Event(), threading.Event()

    def list_page(prefix, cursor, deadline):
        if bucket.pages == 4:  # one of the second listing was read
            second.set()
            assert go_on.wait(30)
        return real(prefix, cursor, deadline)

    bucket.list_page = list_page
    listing._wanted.set()
    assert second.wait(30)

    listing.again()
    go_on.set()

    eventually(lambda: bucket.pages >= 9)
    eventually(lambda: any(sorted(one) == [0, 1, 2] for one in numbers_of(reported[1:])))


@given(
    objects=st.lists(st.integers(1, 9), max_size=9),
    max_pages=st.none() | st.integers(1, 4),
    page_size=st.integers(1, 4),
)
@untimed
def test_at_most_so_many_pages_are_read(objects, max_pages, page_size):
    bucket, usage = ListedBucket(page_size), Usage()
    for number, size in enumerate(objects):
        bucket.write(mp_key(number), size)
    listing = UsageListing(bucket, usage, 0, max_pages, lambda _keys, _sizes: None)

    listing._list()

    pages = max(1, -(-len(objects) // page_size))
    read = pages if max_pages is None else min(pages, max_pages)
    assert bucket.pages == read
    assert usage.total == sum(objects[: read * page_size])
    assert usage.complete == (read == pages)


def test_a_listing_waits_before_each_page_until_others_leave_it_a_share_of_the_calls(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 1)
    bucket.waits = [0.01, 0.0, 0.0, 0.0, 0.0, 600.0]  # none before the third page; the second is awaited twice

    listing, usage, reported = listings(bucket)
    eventually(lambda: not bucket.waits)
    listing.close()
    eventually(lambda: not listers())

    assert bucket.pages == 2
    assert not usage.complete
    assert reported == []


def test_a_listing_that_fails_keeps_the_figure_and_comes_again_soon(listings, caplog):
    bucket = ListedBucket(page_size=1)
    bucket.write(mp_key(1), 5)
    listing, usage, reported = listings(bucket)
    eventually(lambda: reported)

    bucket.write(mp_key(2), 5)
    bucket.errors = [TransportError("no page"), BucketMissingError("gone for a while")]
    listing._wanted.set()

    eventually(lambda: not bucket.errors and usage.total == 10)
    assert caplog.text.count("usage: the listing did not go on") == 1
    assert "gone for a while" not in caplog.text, "reads and writes report a missing bucket"


def test_a_listing_goes_on_where_it_failed_and_takes_nothing_off_before_its_end(listings, monkeypatch):
    bucket = ListedBucket(page_size=1)
    for number in range(4):
        bucket.write(mp_key(number), 5)
    listing, usage, reported = listings(bucket)
    eventually(lambda: reported)
    bucket.objects.popitem()
    bucket.cursors.clear()
    bucket.gate.clear()
    listing._wanted.set()
    bucket.inside.clear()
    assert bucket.inside.wait(30)
    errors = [TransportError("no page"), ThrottledError("wait", 0.01), ThrottledError("wait", 0.01)]
    real = bucket.list_page

    def list_page(prefix, cursor, deadline):
        if errors:
            bucket.cursors.append(cursor)
            raise errors.pop(0)
        assert usage.total == 20, "what was not seen yet stays counted"
        return real(prefix, cursor, deadline)

    bucket.list_page = list_page
    bucket.gate.set()
    eventually(lambda: usage.total == 15)

    assert usage.complete
    places = [bucket.cursors[0], *(b for a, b in itertools.pairwise(bucket.cursors) if a != b)]
    assert places == [None, *sorted(bucket.objects)[:2]], "no page was asked for again once it had come"
    assert len(bucket.cursors) == 6


def test_a_cursor_that_the_hub_takes_no_more_is_given_up(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 5)
    real = bucket.list_page
    refused = list(range(5))

    def list_page(prefix, cursor, deadline):
        if cursor is not None and refused:
            refused.pop()
            raise TransportError("invalid cursor")
        return real(prefix, cursor, deadline)

    bucket.list_page = list_page
    _, usage, reported = listings(bucket)
    eventually(lambda: reported)

    assert usage.total == 15
    assert [cursor is None for cursor in bucket.cursors] == [True, True, False, False]


def test_pages_that_lead_nowhere_do_not_go_on_for_ever(listings, monkeypatch, caplog):
    bucket = ListedBucket(page_size=1)
    bucket.write(mp_key(1), 5)
    bucket.list_page = lambda prefix, cursor, deadline: ([], "the same")
    _listing, usage, _ = listings(bucket)

    eventually(lambda: "the one that was just listed" in caplog.text)
    assert not usage.complete


def test_a_listing_asks_nothing_in_a_pause_and_leaves_more_room_after_it(listings, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._RETRY_SECS", 0.6)
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 1)
    bucket.pauses = [0.01, 0.01, 0.0, 600.0]
    listing, _usage, reported = listings(bucket)

    eventually(lambda: not bucket.pauses)
    listing.close()
    eventually(lambda: not listers())

    assert bucket.pages <= 1
    assert listing._gap_secs >= 0.02
    assert reported == []


def test_a_listing_that_nobody_asked_for_is_not_made(listings):
    bucket, before = ListedBucket(), listers()
    bucket.write(mp_key(1), 5)
    listing, _usage, _ = listings(bucket, by_itself=False)
    listing.again()

    assert not listers() - before
    assert listing.settled
    bucket.gate.clear()
    assert listing.found_stale()
    assert not listing.settled
    bucket.gate.set()
    eventually(lambda: listing.settled)
    assert bucket.pages == 1


def test_what_is_found_wrong_during_a_listing_is_listed_again(listings):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 5)
    listing, _usage, _reported = listings(bucket)
    eventually(lambda: listing.settled)
    bucket.gate.clear()
    bucket.inside.clear()
    listing._wanted.set()
    assert bucket.inside.wait(30)

    listing.found_stale()
    bucket.gate.set()

    eventually(lambda: listing.settled)
    assert bucket.pages == 3


def test_the_oldest_are_told_and_the_next_oldest_when_half_of_them_are_gone(listings, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._MOST_TOLD", 4)
    bucket = ListedBucket(page_size=3)
    ages = [5, 9, 1, 8, 3, 7, 2, 6, 4, 0]
    for number, minutes in enumerate(ages):
        bucket.write(mp_key(number), 1, minutes - 600)
    listing, _usage, reported = listings(bucket)
    eventually(lambda: reported)
    assert [[ages[number] for number in numbers] for numbers in numbers_of(reported)] == [[3, 2, 1, 0]]
    newest = bucket.objects[bucket.handle.join(encode_name(key_string(mp_key(1))))]
    oldest = bucket.objects[bucket.handle.join(encode_name(key_string(mp_key(9))))]
    assert listing.too_new(newest.uploaded_at)
    assert not listing.too_new(oldest.uploaded_at)
    for number in (9, 2):
        del bucket.objects[bucket.handle.join(encode_name(key_string(mp_key(number))))]

    listing.evicted(1)
    assert len(reported) == 1
    listing.evicted(1)
    eventually(lambda: len(reported) == 2)
    assert [[ages[number] for number in numbers] for numbers in numbers_of(reported)][1] == [5, 4]

    for number, minutes in enumerate(ages):
        if minutes < 6:
            bucket.objects.pop(bucket.handle.join(encode_name(key_string(mp_key(number)))), None)
    listing.evicted(4)
    eventually(lambda: len(reported) == 3)
    assert [[ages[number] for number in numbers] for numbers in numbers_of(reported)][2] == [9, 8, 7, 6]
    assert not listing.too_new(newest.uploaded_at), "all were told"


def test_objects_of_one_moment_for_which_there_was_no_room_are_told_later(listings, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._MOST_TOLD", 2)
    bucket = ListedBucket()
    moment = NOW - timedelta(hours=5)
    for number in range(4):
        bucket.write(mp_key(number), 1)
    bucket.objects = {p: ObjectInfo(p, info.content, moment) for p, info in bucket.objects.items()}
    listing, _usage, reported = listings(bucket)
    eventually(lambda: reported)
    for number in numbers_of(reported)[0]:
        del bucket.objects[bucket.handle.join(encode_name(key_string(mp_key(number))))]

    listing.evicted(2)
    eventually(lambda: len(reported) == 2)

    assert sorted(itertools.chain(*numbers_of(reported))) == [0, 1, 2, 3]


def test_what_tells_of_a_listing_may_fail(listings, caplog):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 5)
    reported = []

    def tell(keys, sizes):
        reported.append(keys)
        if len(reported) < 3:
            raise RuntimeError("a listener's")

    _, usage, _ = listings(bucket, tell=tell)

    eventually(lambda: len(reported) == 3 and usage.complete)
    assert caplog.text.count("usage: the listing failed") == 2
    assert reported[2] == [mp_key(1)], "it is told again"


def test_a_closed_listing_asks_for_no_further_page_and_tells_nothing(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(4):
        bucket.write(mp_key(number), 5)
    bucket.gate.clear()
    before = listers()
    listing, _, reported = listings(bucket)
    assert bucket.inside.wait(30)
    [thread] = listers() - before

    listing.close()
    bucket.gate.set()

    thread.join(30)
    assert not thread.is_alive()
    assert bucket.pages == 1
    assert reported == []


def test_without_refresh_there_is_no_thread(listings):
    bucket, before = ListedBucket(), listers()
    listings(bucket, refresh_secs=0)

    assert bucket.pages == 0
    assert not listers() - before


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._SETTLE_SECS", 0.02)


def by_others(hub, bucket, keys, size=SIZE):
    for key in keys:  # one after the other, so that each has a time of its own
        upload(hub.endpoint, bucket, {path_of(key): noise(size, int.from_bytes(key.chunk_hash, "big"))})


def complete(mp):
    eventually(lambda: mp.adapter.report_status()["usage_is_complete"])


# --- listeners --------------------------------------------------------------------------------------------------------


def test_listeners_are_told_of_what_really_changed(hub, bucket, l2_adapters):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    by_others(hub, bucket, keys[:1])

    put(mp, keys)
    assert listener.stored == [(key, SIZE) for key in keys[1:]], "one was there already"
    put(mp, keys)
    assert len(listener.stored) == 2

    lookup(mp, [*keys[:2], mp_key(9)])
    assert listener.accessed == keys[:2]

    mp.adapter.submit_unlock(keys[:2])
    mp.adapter.delete([*keys[:2], mp_key(9)])
    assert set(listener.deleted) == {*keys[:2], mp_key(9)}


class RaisingListener(L2AdapterListener):
    def on_l2_keys_stored(self, keys, sizes):
        raise RuntimeError("told of a store")

    def on_l2_keys_accessed(self, keys):
        raise RuntimeError("told of an access")

    def on_l2_keys_deleted(self, keys):
        raise RuntimeError("told of a delete")


def test_a_listener_that_raises_changes_no_result(hub, bucket, l2_adapters, caplog):
    mp, key = l2_adapters(), mp_key(1)
    mp.adapter.register_listener(RaisingListener())

    assert put(mp, [key]).is_successful()
    assert lookup(mp, [key]) == [True], "what is locked is told as found, or it would be locked for ever"
    assert mp.adapter.report_status()["locked_key_count"] == 1
    mp.adapter.submit_unlock([key])
    mp.adapter.delete([key])
    assert there(hub, bucket, [key]) == []
    assert used(mp) == 0
    assert "a listener failed" in caplog.text


# --- usage ------------------------------------------------------------------------------------------------------------


def test_own_writes_and_deletes_count_at_once_and_by_salt(l2_adapters):
    mp = l2_adapters(max_capacity_gb=10 * SIZE / GIB)
    keys = [mp_key(1), mp_key(2, "ada"), mp_key(3, "ada"), mp_key(4, "bob")]
    put(mp, keys)
    usage = mp.adapter.get_usage()

    assert usage.bytes_by_cache_salt == {"": SIZE, "ada": 2 * SIZE, "bob": SIZE}
    assert usage.usage_fraction == 0.4
    assert usage.total_capacity_bytes == 10 * SIZE
    put(mp, keys)
    assert used(mp) == 4 * SIZE, "what was there already is not counted twice"
    mp.adapter.delete([mp_key(2, "ada"), mp_key(4, "bob"), mp_key(99)])
    assert used(mp) == 2 * SIZE
    assert {salt: size for salt, size in mp.adapter.get_usage().bytes_by_cache_salt.items() if size} == {
        "": SIZE,
        "ada": SIZE,
    }
    assert mp.adapter.report_status()["object_count"] == 2
    assert usage.bytes_by_cache_salt["bob"] == SIZE, "what was given is a snapshot"


def test_others_objects_count_after_a_listing_and_what_is_no_chunk_does_not(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(n) for n in range(3)])
    by_others(hub, bucket, [mp_key(5, "ada")], 3 * SIZE)
    longer = "v10/" + path_of(mp_key(1)).removeprefix("v1/")
    upload(hub.endpoint, bucket, {"v1/foreign": b"x", "v1/.hfbucket/lock": b"x", longer: b"x"})

    mp = l2_adapters(usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)

    assert used(mp) == 6 * SIZE
    assert mp.adapter.report_status()["object_count"] == 4
    put(mp, [mp_key(6)])
    assert used(mp) == 7 * SIZE


def test_without_refresh_nothing_is_listed(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(1)])
    hub.control.reset_counters()
    mp = l2_adapters(usage_refresh_secs=0)
    mp.adapter.register_listener(Listener())

    put(mp, [mp_key(2)])

    assert used(mp) == SIZE
    assert not mp.adapter.report_status()["usage_is_complete"]
    assert hub.control.counters().route("tree").requests == 0


def test_an_object_that_is_written_over_at_another_size_counts_once(hub, bucket, l2_adapters):
    key = mp_key(1, "ada")
    by_others(hub, bucket, [key], 3 * SIZE)
    mp = l2_adapters(usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)
    assert used(mp) == 3 * SIZE

    assert put(mp, [key]).is_successful()

    assert used(mp) == SIZE
    assert mp.adapter.report_status()["object_count"] == 1
    mp.adapter.delete([key])
    assert used(mp) == 0
    assert mp.adapter.report_status()["object_count"] == 0


def test_an_object_that_cannot_be_served_and_is_rewritten_counts_once(hub, bucket, l2_adapters):
    key = mp_key(1)
    by_others(hub, bucket, [key])
    mp = l2_adapters(verify="hash", usage_refresh_secs=60, max_capacity_gb=1)
    complete(mp)
    hub.control.add_fault(Fault(route="xorb-data", flip_every=100))
    assert load(mp, [key]) == [None]
    hub.control.clear_faults()

    task = mp.adapter.submit_store_task([key], [mp_memory(noise(SIZE, 4711))])
    result = await_result(mp.adapter.get_store_event_fd(), lambda: mp._stored(task))

    assert result.is_successful()
    assert result == SIZE, "it was written"
    assert used(mp) == SIZE
    assert mp.adapter.report_status()["object_count"] == 1


def test_a_store_that_partly_failed_counts_in_part(hub, l2_adapters):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n) for n in range(3)]
    hub.control.add_fault(Fault(route="batch", items=encode_name(key_string(keys[1]))))

    result = put(mp, keys)

    assert not result.is_successful()
    assert used(mp) == 2 * SIZE
    assert [key for key, _ in listener.stored] == [keys[0], keys[2]]


def test_a_delete_that_fails_leaves_the_account_as_it_is(hub, bucket, l2_adapters, caplog):
    mp, listener = l2_adapters(), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(1), mp_key(2)]
    put(mp, keys)

    for fault in ({"status": 403}, {"items": encode_name(key_string(keys[0]))}):
        hub.control.add_fault(Fault(route="batch", **fault))
        mp.adapter.delete(keys)
        hub.control.clear_faults()

    assert there(hub, bucket, keys) == [keys[0]]
    assert used(mp) == SIZE
    assert listener.deleted == [keys[1]]
    assert "were not deleted" in caplog.text
    mp.adapter.delete(keys)
    assert used(mp) == 0


def test_without_a_capacity_nothing_is_listed(hub, bucket, l2_adapters, monkeypatch):
    by_others(hub, bucket, [mp_key(n) for n in range(3)])
    hub.control.reset_counters()
    mp = l2_adapters(usage_refresh_secs=60)
    mp.adapter.register_listener(Listener())
    put(mp, [mp_key(5)])

    assert mp.adapter._usage_listing._thread is None
    assert used(mp) == SIZE
    assert not mp.adapter.report_status()["usage_is_complete"]
    routes = hub.control.counters().routes
    assert "tree" not in routes
    assert "info" not in routes


def test_what_is_written_over_counts_once_by_salt(l2_adapters):
    mp, key = l2_adapters(), mp_key(1, "ada")
    for size in (3 * SIZE, 2 * SIZE, SIZE):
        assert put(mp, [key], size).is_successful()

    assert mp.adapter.get_usage().bytes_by_cache_salt == {"ada": SIZE}
    mp.adapter.delete([key])
    assert mp.adapter.get_usage().bytes_by_cache_salt == {}


def delete_by_others(hub, bucket, keys):
    HfApi(endpoint=hub.endpoint, token=False).batch_bucket_files(bucket, delete=[path_of(key) for key in keys])


def test_a_lookup_corrects_the_account_of_what_others_deleted_and_replaced(hub, bucket, l2_adapters):
    mp, listener = l2_adapters(object_sizes="any"), Listener()
    mp.adapter.register_listener(listener)
    keys = [mp_key(n, "ada") for n in range(3)]
    put(mp, keys)
    delete_by_others(hub, bucket, keys[:1])
    by_others(hub, bucket, keys[1:2], 3 * SIZE)

    assert lookup(mp, [*keys, mp_key(9, "ada")]) == [False, True, True, False]

    eventually(lambda: mp.adapter.get_usage().bytes_by_cache_salt == {"ada": 4 * SIZE})
    eventually(lambda: listener.deleted == keys[:1])


def test_a_lookup_of_others_objects_counts_them_only_where_a_capacity_bounds_the_whole(hub, bucket, l2_adapters):
    by_others(hub, bucket, [mp_key(1, "ada")])
    own, whole = l2_adapters(), l2_adapters(max_capacity_gb=1)
    for mp in (own, whole):
        assert lookup(mp, [mp_key(1, "ada")]) == [True]

    eventually(lambda: used(whole) == SIZE)
    assert used(own) == 0
    assert whole.adapter.get_usage().bytes_by_cache_salt == {}, "it is not this process's"


# --- eviction ---------------------------------------------------------------------------------------------------------


def states(mp, policy, **options):
    return L2AdapterEvictionState(0, mp.adapter, EvictionConfig(policy, **options))


def test_own_objects_are_evicted_before_those_used_since(hub, bucket, l2_adapters):
    mp = l2_adapters(max_capacity_gb=10 * SIZE / GIB)
    state = states(mp, "LRU", trigger_watermark=0.5, eviction_ratio=0.5)
    keys = [mp_key(n) for n in range(6)]
    for key in keys:
        put(mp, [key])
    lookup(mp, [keys[0]])
    mp.adapter.submit_unlock([keys[0]])

    L2EvictionController([state])._check_and_evict(state)

    assert there(hub, bucket, keys) == [keys[0], *keys[4:]]


def test_what_is_locked_outlives_an_eviction(hub, bucket, l2_adapters):
    mp = l2_adapters(max_capacity_gb=4 * SIZE / GIB)
    state = states(mp, "LRU", trigger_watermark=0.1, eviction_ratio=1.0)
    keys = [mp_key(n) for n in range(4)]
    put(mp, keys)
    lookup(mp, [keys[2]])

    controller = L2EvictionController([state])
    for _ in range(2):
        controller._check_and_evict(state)
    assert there(hub, bucket, keys) == [keys[2]]

    mp.adapter.submit_unlock([keys[2]])
    controller._check_and_evict(state)
    assert there(hub, bucket, keys) == []


def test_quotas_evict_own_objects_by_salt_and_leave_others_alone(hub, bucket, l2_adapters):
    others = [mp_key(n, salt) for n, salt in enumerate(["over", "under", "unknown"])]
    by_others(hub, bucket, others)
    mp = l2_adapters(usage_refresh_secs=60)
    quotas = QuotaManager()
    quotas.set_quota("over", 4 * SIZE)
    quotas.set_quota("under", 100 * SIZE)
    state = states(mp, "IsolatedLRU", trigger_watermark=1.0, eviction_ratio=0.4)
    controller = L2EvictionController([state], quota_manager=quotas)
    own = {salt: [mp_key(10 + n, salt) for n in range(5)] for salt in ("over", "under", "unknown")}
    for n in range(5):
        put(mp, [keys[n] for keys in own.values()])

    for _ in range(3):
        controller._check_and_evict(state)

    assert there(hub, bucket, others) == others
    assert there(hub, bucket, own["over"]) == own["over"][2:]
    assert there(hub, bucket, own["under"]) == own["under"]
    assert there(hub, bucket, own["unknown"]) == [], "LMCache's rule: who has no quota may hold nothing"


def watched(mp, **options):
    state = states(mp, "LRU", trigger_watermark=0.8, eviction_ratio=0.2, **options)
    return state, L2EvictionController([state])


def rested(mp):
    """Wait until the account was listed again."""
    eventually(lambda: mp.adapter._usage_listing.settled)


def test_five_servers_with_one_bucket_evict_down_to_the_watermark_and_no_further(hub, bucket, l2_adapters):
    keys = [mp_key(n) for n in range(100)]
    put(l2_adapters(), keys)
    capacity = 100 * SIZE / 0.85 / GIB
    servers = []
    for n in range(5):
        mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=capacity)
        servers.append((mp, *watched(mp)))
        complete(mp)
        mp.adapter.submit_unlock(keys[n * 5 : n * 5 + 20] if any(lookup(mp, keys[n * 5 : n * 5 + 20])) else [])

    for _ in range(4):
        for _mp, state, controller in servers:
            controller._check_and_evict(state)
        for mp, _state, _controller in servers:
            rested(mp)

    assert len(there(hub, bucket, keys)) == 80
    assert {used(mp) for mp, *_ in servers} == {80 * SIZE}


def test_a_quota_is_not_used_up_by_what_others_deleted(hub, bucket, l2_adapters):
    mp = l2_adapters(usage_refresh_secs=3600)
    quotas = QuotaManager()
    quotas.set_quota("ada", 10 * SIZE)
    state = states(mp, "IsolatedLRU", trigger_watermark=0.8, eviction_ratio=0.2)
    controller = L2EvictionController([state], quota_manager=quotas)
    live, dead = [mp_key(n, "ada") for n in range(4)], [mp_key(10 + n, "ada") for n in range(6)]
    for key in [dead[0], *live, *dead[1:]]:  # most of what is gone was used after what is there
        put(mp, [key])
    delete_by_others(hub, bucket, dead)

    for _ in range(5):
        controller._check_and_evict(state)
        rested(mp)

    assert mp.adapter.get_usage().bytes_by_cache_salt == {"ada": len(there(hub, bucket, live)) * SIZE}
    assert len(there(hub, bucket, live)) >= 3, "the first pass may take what it cannot know to be too much"
    assert state.eviction_policy.get_num_tracked_keys("ada") == len(there(hub, bucket, live))


def test_more_objects_than_eviction_is_told_of_are_evicted_oldest_first(hub, bucket, l2_adapters, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._MOST_TOLD", 5)
    monkeypatch.setattr("hfbucket_plugin.engine.mp_usage._SLACK", timedelta(0))
    keys = [mp_key((n * 7) % 20) for n in range(20)]  # their age is not the order of their paths
    by_others(hub, bucket, keys)
    mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=10 * SIZE / GIB)
    state, controller = watched(mp)
    complete(mp)

    def pass_once():
        controller._check_and_evict(state)
        eventually(
            lambda: mp.adapter._usage_listing._progress is None and not mp.adapter._usage_listing._wanted.is_set()
        )
        return used(mp) < 8 * SIZE

    eventually(pass_once)

    assert there(hub, bucket, keys) == keys[13:]
    fresh = [mp_key(100)]
    put(mp, fresh)
    pass_once()
    assert there(hub, bucket, fresh) == fresh


def test_an_eviction_waits_for_a_listing_where_the_files_are_fewer(hub, bucket, l2_adapters, monkeypatch):
    keys = [mp_key(n) for n in range(10)]
    by_others(hub, bucket, keys)
    mp = l2_adapters(usage_refresh_secs=3600, max_capacity_gb=10 * SIZE / GIB)
    state, controller = watched(mp)
    complete(mp)
    rested(mp)
    delete_by_others(hub, bucket, keys[7:])  # the newest: eviction would not find them gone
    hub.control.reset_counters()

    controller._check_and_evict(state)
    assert hub.control.counters().route("batch").requests == 0
    rested(mp)
    controller._check_and_evict(state)

    assert there(hub, bucket, keys) == keys[:7]
    assert used(mp) == 7 * SIZE


def test_a_storage_manager_of_lmcaches_made_from_json_evicts_what_others_wrote(hub, bucket, tmp_path):
    keys = [mp_key(n) for n in range(5)]
    by_others(hub, bucket, keys)
    spec = {
        "type": "plugin",
        "module_path": "hfbucket_plugin.l2_adapter",
        "class_name": "HFBucketL2Adapter",
        "adapter_params": {
            "bucket_handle": f"hf://buckets/{bucket}/v1",
            "endpoint": hub.endpoint,
            "download_tmp_dir": str(tmp_path / "tmp"),
            "max_capacity_gb": 5 * SIZE / GIB,
        },
        "eviction": {"eviction_policy": "LRU", "trigger_watermark": 0.8, "eviction_ratio": 0.4},
    }
    config = StorageManagerConfig(
        L1ManagerConfig(L1MemoryManagerConfig(1 << 20, use_lazy=False, shm_name="")),
        EvictionConfig("noop"),
        parse_args_to_l2_adapters_config(Namespace(l2_adapter=[json.dumps(spec)])),
    )

    manager = StorageManager(config)
    try:
        assert isinstance(manager.l2_adapters()[0][1], HFBucketL2Adapter)
        eventually(lambda: there(hub, bucket, keys) == keys[2:])
        eventually(lambda: manager.get_l2_usages()[0][0] == 3 * SIZE)
    finally:
        manager.close()


OTHERS = [
    "foreign",
    ".hfbucket/lock",
    "deep/" + encode_name("m@01000000@0@ab"),
    encode_name("m@1@0@ab@half"),
    "%zz",
    "A",
]
"""Objects that are no keys of MP mode, to be skipped."""


class Hub:
    """A bucket that is listed in the order of its paths, so many a page, from behind the last one told."""

    def __init__(self, page_size, names=()):
        self.handle = BucketHandle.parse("hf://buckets/o/b/v1")
        self.page_size = page_size
        self.paths = {self.handle.join(name) for name in names}

    def add(self, key):
        self.paths.add(self.handle.join(encode_name(key_string(key))))

    def remove(self, key):
        self.paths.discard(self.handle.join(encode_name(key_string(key))))

    def list_page(self, prefix, cursor, _deadline):
        left = sorted(path for path in self.paths if path.startswith(prefix) and (cursor is None or path > cursor))
        page = left[: self.page_size]
        infos = [ObjectInfo(path, ContentId("0" * 64, len(path)), NOW) for path in page]
        return infos, page[-1] if len(left) > len(page) else None


def pages(hub, page_size, between=lambda _number: None, model=None):
    """All keys that are told, page by page, with something going on in between."""
    reported, cursor, number = [], None, 0
    while True:
        page = list_page(hub, model, page_size, cursor)
        assert len(page.entries) <= page_size
        reported += [entry.key.to_object_key() for entry in page.entries]
        cursor = page.next_page_token
        if cursor is None:
            return reported
        assert len(page.entries) == page_size, "a page with another one behind it is full"
        assert isinstance(cursor, str)
        between(number)
        number += 1


def in_order(keys):
    return sorted(keys, key=lambda key: encode_name(key_string(key)))


numbers = st.sets(st.integers(0, 40), max_size=20)
sizes = st.integers(1, 25)


@untimed
@given(held=numbers, page_size=sizes, hub_page=sizes, others=st.sets(st.sampled_from(OTHERS)))
def test_pages_of_any_size_tell_every_key_once_in_the_order_of_the_paths(held, page_size, hub_page, others):
    hub = Hub(hub_page, others)
    keys = [mp_key(number) for number in held]
    for key in keys:
        hub.add(key)

    assert pages(hub, page_size) == in_order(keys)


@untimed
@given(held=numbers, page_size=sizes)
def test_a_full_last_page_promises_no_further_one(held, page_size):
    hub = Hub(3)
    for number in held:
        hub.add(mp_key(number))
    calls = []
    pages(hub, page_size, calls.append)

    assert len(calls) == max(0, -(-len(held) // page_size) - 1)


@untimed
@given(
    held=numbers,
    page_size=sizes,
    hub_page=sizes,
    changes=st.lists(st.lists(st.integers(-41, 40), max_size=5), max_size=20),
)
@example(held={1, 2, 3, 4, 5, 6}, page_size=2, hub_page=3, changes=[[-3]])
@example(held={1, 2, 3, 4, 5, 6}, page_size=2, hub_page=3, changes=[[-2 - 1, -1 - 1]])
@example(held={10, 11, 12, 13}, page_size=3, hub_page=3, changes=[[0, 1, 2]])
@example(held={10, 11, 12, 13}, page_size=2, hub_page=3, changes=[[0, 1], [2, 3]])
def test_what_comes_and_goes_between_pages_neither_hides_nor_repeats_a_key_that_stays(
    held, page_size, hub_page, changes
):
    hub = Hub(hub_page)
    for number in held:
        hub.add(mp_key(number))
    gone, came = set(), set()

    def change(number):
        for one in changes[number] if number < len(changes) else []:
            if one < 0:  # -1 deletes 0
                hub.remove(mp_key(-one - 1))
                gone.add(-one - 1)
            else:
                hub.add(mp_key(one))
                came.add(one)

    reported = [int.from_bytes(key.chunk_hash, "big") for key in pages(hub, page_size, change)]

    assert len(reported) == len(set(reported)), "no key is told twice"
    assert held - gone <= set(reported) <= held | came


MODELS = [
    "org/model",
    "org/model-2",
    "org/model2",
    "org/mode",
    "org/model@",
    "ORG/MODEL",
    "org/model/x",
    "o",
    "ü 模",
    "%",
    "%2F",
]


@pytest.mark.parametrize("hub_page", [1, 3, 100])
def test_only_the_model_asked_for_however_much_others_names_look_like_it(hub_page):
    models = [model for model in MODELS if "@" not in model]
    hub = Hub(hub_page, OTHERS)
    for model in models:
        for number in range(3):
            hub.add(mp_key(number, model=model))
            hub.add(mp_key(number, "salt", model=model))

    for model in MODELS:
        reported = pages(hub, 2, model=model)
        wanted = [mp_key(n, salt, model=model) for n in range(3) for salt in ("", "salt")] if model in models else []
        assert reported == in_order(wanted)
    assert len(pages(hub, 7)) == 6 * len(models)
    assert pages(hub, 7, model="") == []


@pytest.mark.parametrize("page_size", [0, -1, 10_001, True, False])
def test_a_page_of_no_possible_size_is_refused(page_size):
    with pytest.raises(ValueError, match="page_size must be 1 to 10000"):
        list_page(Hub(3), None, page_size, None)


def encoded(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "ü",
        "AAAA",
        "\x00",
        encoded(None),
        encoded(3),
        encoded("ab"),
        encoded({"a": 1, "b": 2}),
        encoded([]),
        encoded([None]),
        encoded(["a", None]),
        encoded([1, "b"]),
        encoded([None, "b", "c"]),
        encoded(["a", "b"]) + "!",
        "A" * 100_000,
        encoded(["a" * 20_000, "b"]),
        base64.urlsafe_b64encode(b"[" * 12_000).decode(),
        base64.urlsafe_b64encode(b"\xff\xfe").decode(),
    ],
    ids=lambda cursor: repr(cursor[:20]),
)
def test_a_malformed_cursor_is_refused(cursor):
    with pytest.raises(ValueError, match="the cursor is not one that this adapter gave"):
        list_page(Hub(3), None, 10, cursor)


@untimed
@given(st.one_of(any_text, st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode())))
def test_whatever_is_given_as_a_cursor_is_refused_or_taken_and_never_crashes(cursor):
    with contextlib.suppress(ValueError):
        list_page(Hub(3), None, 10, cursor)


# --- cursors over the network ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder():
    with Recorder() as one, pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "hfbucket_plugin.hub.client._wait", lambda _state: 0.0
        )  # what cannot be sent is tried five times
        yield one


def bucket_client(endpoint):
    return open_bucket(instance_settings(endpoint, "o/b", "v1", token="hf_loopback"), "hfbucket", MemorySink(), 9.0)


places = st.one_of(
    any_text,
    st.sampled_from(
        [
            "http://127.0.0.1:9/evil",
            "//127.0.0.1:9/evil",
            "/api/whoami-v2",
            "../../../whoami-v2",
            "?x=1",
            "#fragment",
            "&recursive=false",
            "cursor=x#/../..",
            "a b",
            "a\r\nHost: evil\r\n\r\nGET /evil HTTP/1.1",
            "%2e%2e%2f",
            "@127.0.0.1:9",
            "\\\\127.0.0.1:9\\evil",
            "\ud800",
        ]
    ),
)


@untimed
@given(place=places, after=any_text)
def test_a_crafted_cursor_leads_nowhere_but_to_the_listing_of_this_bucket(recorder, place, after):
    bucket = bucket_client(recorder.endpoint)
    recorder.targets.clear()
    try:
        with contextlib.suppress(ValueError, HFBucketError):
            page = list_page(bucket, "org/model", 10, encoded([place, after]))
            assert page.entries == ()
    finally:
        bucket.close()

    assert len(recorder.targets) <= 5
    for target in recorder.targets:
        method, path = target.split(" ", 1)
        assert method == "GET"
        assert path.split("?")[0].split("#")[0] == "/api/buckets/o/b/tree/v1%2Forg%252Fmodel%2540"


def test_the_cursors_of_a_real_listing_are_taken_by_any_adapter_of_the_bucket(hub_factory):
    hub = hub_factory(page_size=2)
    from huggingface_hub import HfApi

    HfApi(endpoint=hub.endpoint, token=False).create_bucket("o/b")
    keys = in_order([mp_key(number, model="ü x/模 %") for number in range(7)])
    upload(hub.endpoint, "o/b", {f"v1/{encode_name(key_string(key))}": b"x" for key in keys})

    for page_size in (1, 2, 3, 7, 100):
        reported, cursor = [], None
        while True:
            bucket = bucket_client(hub.endpoint)
            try:
                page = list_page(bucket, "ü x/模 %", page_size, cursor)
            finally:
                bucket.close()
            reported += [entry.key.to_object_key() for entry in page.entries]
            assert {entry.size_bytes for entry in page.entries} == {1}
            if (cursor := page.next_page_token) is None:
                break
            assert hub.endpoint not in base64.urlsafe_b64decode(cursor).decode()
        assert reported == keys


@pytest.fixture
def adapters(l2_adapters):
    return functools.partial(l2_adapters, usage_refresh_secs=3600)


def numbered_by_others(hub, bucket, numbers):
    for number in numbers:  # one after the other, so that each has a time of its own
        upload(hub.endpoint, bucket, {f"v1/{encode_name(MP.name(number))}": content(number)})


def victims(policy, ratio, **options):
    return [key for action in policy.get_eviction_actions(ratio, **options) for key in action.keys]


def test_the_oldest_objects_of_all_writers_go_first(hub, bucket, adapters):
    numbered_by_others(hub, bucket, range(4))
    mp = adapters(max_capacity_gb=4 * CHUNK_BYTES / GIB)
    policy = LRUEvictionPolicy()
    mp.adapter.register_listener(L2EvictionPolicy(policy))
    complete(mp)
    eventually(lambda: victims(policy, 1.0))

    assert mp.adapter.get_usage().usage_fraction == pytest.approx(1.0)
    assert victims(policy, 0.25) == [chunk_key(0)]
    assert victims(policy, 0.5) == [chunk_key(0), chunk_key(1)]


def test_a_policy_of_quotas_is_never_told_of_what_others_wrote(hub, bucket, adapters):
    numbered_by_others(hub, bucket, range(3))
    mp = adapters(max_capacity_gb=1)
    policy = IsolatedLRUEvictionPolicy()
    mp.adapter.register_listener(L2EvictionPolicy(policy))
    complete(mp)

    assert mp.adapter.get_usage().total_bytes_used == 3 * CHUNK_BYTES
    assert dict(mp.adapter.get_usage().bytes_by_cache_salt) == {}, "a salt without a quota would be wiped"
    mp.put([9])
    assert dict(mp.adapter.get_usage().bytes_by_cache_salt) == {"": CHUNK_BYTES}
    assert victims(policy, 1.0, cache_salt="") == [chunk_key(9)]


def test_chunks_of_the_classic_engine_do_not_drive_others_out(hub, bucket, adapters):
    classic = encode_name("org/model@1@0@ab@bfloat16")
    upload(hub.endpoint, bucket, {f"v1/{classic}": bytes(5 * CHUNK_BYTES)})
    numbered_by_others(hub, bucket, [0])
    mp = adapters(max_capacity_gb=1)
    complete(mp)

    assert mp.adapter.get_usage().total_bytes_used == CHUNK_BYTES


@pytest.mark.parametrize("part", ["_tasks.free", "_store.look", "_usage.deleted"])
def test_an_error_of_any_kind_does_not_end_the_thread_that_evicts(adapters, monkeypatch, caplog, part):
    def broken(*_args):
        raise ValueError("not foreseen")

    mp = adapters(max_capacity_gb=1)
    mp.put([0, 1])
    complete(mp)
    with monkeypatch.context() as patched:
        owner, name = part.split(".")
        patched.setattr(getattr(mp.adapter, owner), name, broken)
        mp.adapter.delete([chunk_key(0)])
    assert "not foreseen" in caplog.text

    mp.adapter.delete([chunk_key(1)])

    assert mp.lookup([1]) == [False]


def test_what_was_deleted_before_time_ran_out_is_counted(hub, bucket, adapters, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.engine.mp.MAX_BATCH", 2)
    numbered_by_others(hub, bucket, range(4))
    mp = adapters(max_capacity_gb=1)
    complete(mp)
    real, calls = mp.adapter._store.look, itertools.count()

    def late(keys, deadline):
        if next(calls):
            deadline = deadline.within(0)
        return real(keys, deadline)

    monkeypatch.setattr(mp.adapter._store, "look", late)
    mp.adapter.delete([chunk_key(number) for number in range(4)])

    assert len(paths(hub.endpoint, bucket)) == 2
    assert mp.adapter.get_usage().total_bytes_used == 2 * CHUNK_BYTES
    assert mp._deletions.keys == [chunk_key(0), chunk_key(1)]
