"""How much an instance holds: the account against a plain model, and the listings that feed it."""

import itertools
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hfbucket_plugin.core.keys import BucketHandle, ContentId, encode_name
from hfbucket_plugin.engine.mp_tasks import key_string
from hfbucket_plugin.engine.mp_usage import SizeTable, Usage, UsageListing, digest_of
from hfbucket_plugin.errors import BucketMissingError, ThrottledError, TransportError
from hfbucket_plugin.hub.bucket import ObjectInfo
from tests.support.lmcache_mp import mp_key
from tests.support.models import untimed
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
