"""How much an instance holds: the account against a plain model, and the listings that feed it."""

import itertools
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from l2_support import mp_key
from plugin_support import eventually, untimed

from hfbucket_plugin.bucket import ObjectInfo
from hfbucket_plugin.content import Content
from hfbucket_plugin.errors import BucketMissingError, TransportError
from hfbucket_plugin.handle import BucketHandle
from hfbucket_plugin.keys import encode_name
from hfbucket_plugin.l2_keys import key_string
from hfbucket_plugin.l2_usage import Usage
from hfbucket_plugin.l2_usage_listing import UsageListing

PATHS = st.sampled_from([f"p/{name}" for name in "abcdefgh"])
SIZES = st.integers(1, 5)


def salt_of(path):
    return "" if path < "p/c" else "ada" if path < "p/f" else "bob"


class UsageMachine(RuleBasedStateMachine):
    """Own writes and deletes at any moment of a listing that runs in the order of the paths.

    Others change the bucket between listings only: what they do behind the place of a listing is seen by the next one.
    """

    def __init__(self):
        super().__init__()
        self.usage = Usage()
        self.bucket = {}
        self.place = None
        self.exact = True

    def _own(self, path, size):
        """As the adapter counts: what was there before goes, and what is written comes."""
        if (old := self.bucket.pop(path, None)) is not None:
            self.usage.changed([(path, salt_of(path), old)], -1)
        if size is not None:
            self.bucket[path] = size
            self.usage.changed([(path, salt_of(path), size)], 1)

    @rule(path=PATHS, size=SIZES)
    def write(self, path, size):
        self._own(path, size)

    @rule(path=PATHS)
    def delete(self, path):
        self._own(path, None)

    @rule(path=PATHS, size=st.none() | SIZES)
    def others_change(self, path, size):
        if self.place is None:
            self.bucket.pop(path, None)
            if size is not None:
                self.bucket[path] = size
            self.exact = False

    @rule()
    def list_on(self):
        if self.place is None:
            self.usage.begin()
            self.place = ""
        elif left := sorted(path for path in self.bucket if path > self.place):
            self.place = left[0]
            self.usage.seen(self.place, salt_of(self.place), self.bucket[self.place])

    @rule(completes=st.booleans())
    def end(self, completes):
        if self.place is None:
            return
        if completes:
            while any(path > self.place for path in self.bucket):
                self.list_on()
            self.usage.end(complete=True)
            self.exact = True
            assert self.usage.complete
        else:
            self.usage.give_up()
        self.place = None

    @invariant()
    def the_account_is_the_bucket(self):
        assert self.usage.total >= 0
        assert min(self.usage.by_salt().values(), default=1) > 0
        if self.exact:
            held = Counter()
            for path, size in self.bucket.items():
                held[salt_of(path)] += size
            assert self.usage.by_salt() == held
            assert self.usage.total == held.total()
            assert self.usage.objects == len(self.bucket)


TestUsage = UsageMachine.TestCase
TestUsage.settings = untimed


def test_a_change_at_the_very_place_of_a_listing_counts():
    usage = Usage()
    usage.changed([("p/a", "", 5), ("p/b", "", 5)], 1)
    usage.begin()
    usage.seen("p/a", "", 5)
    usage.changed([("p/a", "", 5)], -1)
    usage.changed([("p/b", "", 5)], -1)
    usage.end(complete=True)

    assert usage.total == usage.objects == 0


@pytest.mark.parametrize(("believed", "seen", "kept"), [(5, 3, 5), (3, 5, 5)])
def test_a_listing_that_did_not_see_all_replaces_only_a_smaller_belief(believed, seen, kept):
    usage = Usage()
    usage.changed([("p/a", "", believed)], 1)
    usage.begin()
    usage.seen("p/b", "", seen)
    usage.end(complete=False)

    assert usage.total == kept
    assert not usage.complete
    usage.begin()
    usage.seen("p/b", "", seen)
    usage.end(complete=True)
    assert usage.total == seen
    assert usage.complete


def test_the_end_of_a_listing_that_was_given_up_changes_nothing():
    usage = Usage()
    usage.changed([("p/a", "ada", 5)], 1)
    usage.begin()
    usage.seen("p/b", "", 3)
    usage.give_up()
    usage.seen("p/c", "", 3)
    usage.end(complete=True)

    assert usage.by_salt() == {"ada": 5}
    assert not usage.complete


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
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()

    def write(self, key, size, minutes=0):
        path = self.handle.join(encode_name(key if isinstance(key, str) else key_string(key)))
        self.objects[path] = ObjectInfo(path, Content("0" * 64, size), datetime.now(UTC) + timedelta(minutes=minutes))

    @property
    def background_wait_secs(self):
        return self.waits.pop(0) if self.waits else 0.0

    def list_page(self, prefix, cursor, deadline):
        assert prefix == "v1/"
        assert deadline.remaining() > 0
        self.inside.set()
        assert self.gate.wait(30)
        self.pages += 1
        if self.errors:
            raise self.errors.pop(0)
        names = sorted(path for path in self.objects if cursor is None or path > cursor)
        page = names[: self.page_size]
        return [self.objects[path] for path in page], page[-1] if len(names) > len(page) else None


NOW = datetime.now(UTC)


@pytest.fixture
def listings(monkeypatch):
    """Starts listings of a bucket, and ends them."""
    monkeypatch.setattr("hfbucket_plugin.l2_usage_listing._SETTLE_SECS", 0.0)
    monkeypatch.setattr("hfbucket_plugin.l2_usage_listing._RETRY_SECS", 0.01)
    started = []

    def start(bucket, refresh_secs=600, max_pages=None, tell=None):
        told = []
        usage = Usage()
        started.append(
            UsageListing(
                bucket, usage, refresh_secs, max_pages, tell or (lambda keys, sizes: told.append((keys, sizes)))
            )
        )
        return started[-1], usage, told

    yield start
    for one in started:
        one.close()


def listers():
    return {one for one in threading.enumerate() if one.name == "hfbucket-usage"}


def numbers(told):
    return [[int.from_bytes(key.chunk_hash, "big") for key in keys] for keys, _ in told]


def test_a_listing_tells_of_mp_objects_the_newest_first_and_counts_them_and_no_others(listings):
    bucket = ListedBucket()
    for number, minutes in ((1, 5), (2, 1), (3, 9), (4, 3)):
        bucket.write(mp_key(number, "ada"), number, minutes)
    bucket.write("org/model@1@0@ab@bfloat16", 100)  # the classic engine's
    bucket.objects["v1/foreign"] = ObjectInfo("v1/foreign", Content("0" * 64, 1000), NOW)
    bucket.objects["v1/deep/x"] = ObjectInfo("v1/deep/x", Content("0" * 64, 1000), NOW)

    _, usage, told = listings(bucket)

    eventually(lambda: told)
    assert numbers(told) == [[3, 1, 4, 2]]
    assert told[0][1] == [3, 1, 4, 2]
    assert usage.by_salt() == {"ada": 10}
    assert usage.objects == 4


def test_a_second_listing_tells_only_of_what_came_since(listings):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 1, minutes=-60)
    listing, _, told = listings(bucket)
    eventually(lambda: len(told) == 1)

    bucket.write(mp_key(2), 1, minutes=1)
    listing._wanted.set()  # the hour is over
    eventually(lambda: len(told) == 2)

    assert numbers(told) == [[1], [2]]


def test_who_begins_to_listen_is_told_of_everything(listings):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 1, minutes=-60)
    listing, _, told = listings(bucket)
    eventually(lambda: len(told) == 1)

    listing.again()
    eventually(lambda: len(told) == 2)

    assert numbers(told) == [[1], [1]]


def test_who_begins_to_listen_while_a_later_listing_runs_is_told_of_everything_too(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 1, minutes=-60)
    listing, _, told = listings(bucket)
    eventually(lambda: len(told) == 1)
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
    eventually(lambda: any(sorted(one) == [0, 1, 2] for one in numbers(told[1:])))


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
    bucket.waits = [0.01, 0.0, 0.0, 600.0]  # none before the third page

    listing, usage, told = listings(bucket)
    eventually(lambda: not bucket.waits)
    listing.close()
    eventually(lambda: not listers())

    assert bucket.pages == 2
    assert not usage.complete
    assert told == []


def test_a_listing_that_fails_keeps_the_figure_and_comes_again_soon(listings, caplog):
    bucket = ListedBucket(page_size=1)
    bucket.write(mp_key(1), 5)
    listing, usage, told = listings(bucket)
    eventually(lambda: told)

    bucket.write(mp_key(2), 5)
    bucket.errors = [TransportError("no page"), BucketMissingError("gone for a while")]
    listing._wanted.set()

    eventually(lambda: not bucket.errors and usage.total == 10)
    assert caplog.text.count("usage: the listing did not complete") == 1
    assert "gone for a while" not in caplog.text, "whoever reads or writes tells of a missing bucket"


def test_a_failure_in_the_midst_of_a_listing_keeps_the_figure_of_before(listings, monkeypatch):
    monkeypatch.setattr("hfbucket_plugin.l2_usage_listing._RETRY_SECS", 600)
    bucket = ListedBucket(page_size=1)
    for number in range(3):
        bucket.write(mp_key(number), 5)
    listing, usage, told = listings(bucket)
    eventually(lambda: told)
    bucket.objects.popitem()
    real, pages = bucket.list_page, itertools.count()

    def list_page(prefix, cursor, deadline):
        if next(pages) == 1:
            raise TransportError("no page")
        return real(prefix, cursor, deadline)

    bucket.list_page = list_page
    listing._wanted.set()
    eventually(lambda: next(pages) > 2)

    assert usage.total == 15
    assert usage.complete
    assert usage._listed is None


def test_what_tells_of_a_listing_may_fail(listings, caplog):
    bucket = ListedBucket()
    bucket.write(mp_key(1), 5)
    calls = []

    def tell(keys, sizes):
        calls.append(keys)
        raise RuntimeError("a listener's")

    listing, usage, _ = listings(bucket, tell=tell)
    eventually(lambda: calls)
    bucket.write(mp_key(2), 5, minutes=1)
    listing._wanted.set()

    eventually(lambda: len(calls) == 2)
    assert usage.total == 10


def test_a_closed_listing_asks_for_no_further_page_and_tells_nothing(listings):
    bucket = ListedBucket(page_size=1)
    for number in range(4):
        bucket.write(mp_key(number), 5)
    bucket.gate.clear()
    before = listers()
    listing, _, told = listings(bucket)
    assert bucket.inside.wait(30)
    [thread] = listers() - before

    listing.close()
    bucket.gate.set()

    thread.join(30)
    assert not thread.is_alive()
    assert bucket.pages == 1
    assert told == []


def test_without_refresh_there_is_no_thread(listings):
    bucket, before = ListedBucket(), listers()
    listings(bucket, refresh_secs=0)

    assert bucket.pages == 0
    assert not listers() - before
