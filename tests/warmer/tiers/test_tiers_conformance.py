"""What every directory tier does, whatever LMCache calls its files and puts into them."""

import itertools
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfbucket_plugin.config.lmcache_yaml import EngineConfig
from hfbucket_plugin.core.keys import ClassicKey, MPKey
from hfbucket_plugin.errors import ConfigError, KeyFormatError
from hfbucket_plugin.tools.selection import ChunkRef
from tests.support.buckets import classic_key, content, mp_key
from warmer.node.reuse import EarlierTier
from warmer.report.outcomes import TierError, TierFullError
from warmer.tiers import NodeInfo, TierOptions, declared_tier, directory_keys, open_tier
from warmer.tiers import directory as directories
from warmer.tiers import disk_budget as rooms

TOKEN = 2 * 2 * 4 * 2
"""Bytes of a token where the header needs a shape: chunks here are multiples of it."""

SIZE = 40 * TOKEN
OTHER_SIZE = 39 * TOKEN


def classic(*paths, **extra):
    where = "remote_storage_plugin.fs.warm."
    settings = {"save_chunk_meta": False, f"{where}base_path": ",".join(map(str, paths))}
    settings |= {(name if name == "save_chunk_meta" else where + name): value for name, value in extra.items()}
    config = EngineConfig("lmcache.yaml", ("fs.warm",), settings)
    return lambda options: declared_tier(config, "fs.warm", options)


def mp(path, **spec):
    return lambda options: declared_tier(None, json.dumps({"base_path": str(path)} | spec), options)


KINDS = {
    "classic": classic,
    "classic with two paths": lambda directory: classic(directory / "a", directory / "b"),
    "classic with headers": lambda directory: classic(directory, save_chunk_meta=True, kv_shape="2,2,64,2,2"),
    "mp fs": lambda directory: mp(directory, type="fs"),
    "mp fs_native": lambda directory: mp(directory, type="fs_native"),
    "mp fs_native direct": lambda directory: mp(directory, type="fs_native", use_odirect=True),
}


class EngineHandle:
    """A tier under test, and the directory below which it lies."""

    def __init__(self, kind, directory):
        self.kind = kind
        self.directory = directory
        self._declare = KINDS[kind](directory)
        self._opened = []
        self._numbers = itertools.count(100)

    @property
    def headers(self):
        return self.declaration().layout.header is not None

    @property
    def takes(self):
        return self.declaration().takes

    def declaration(self, **options):
        return self._declare(TierOptions(**options)).at(NodeInfo())

    def open(self, **options):
        self._opened.append(open_tier(self.declaration(**options)))
        return self._opened[-1]

    def close(self):
        for one in self._opened:
            one.close()

    def key(self, number=None, **fields):
        number = next(self._numbers) if number is None else number
        return (mp_key if self.takes is MPKey else classic_key)(number, **fields)

    def file(self, key):
        return self.declaration().file(key)

    def stored(self, size=SIZE):
        """Bytes of the file of a chunk."""
        return self.declaration().layout.stored(size)

    def put(self, tier, key, size=SIZE):
        data = content(size, size)
        draft = tier.draft(key, size)
        draft.lease.write(0, data)
        assert draft.path.read_bytes() == data
        draft.publish()
        return data

    def read(self, key, size=SIZE):
        """The chunk in its file, as an engine reads it."""
        head = self.stored(0) if self.headers else 0
        return self.file(key).read_bytes()[head : head + size]

    def names(self):
        return sorted(path.name for path in self.directory.rglob("*") if path.is_file())

    def visible(self):
        return [name for name in self.names() if name.endswith(".data")]


@pytest.fixture(params=KINDS)
def subject(request, tmp_path):
    one = EngineHandle(request.param, tmp_path / "tier")
    yield one
    one.close()


def test_a_chunk_appears_whole_and_at_once(subject):
    tier, key = subject.open(), subject.key()
    data = content(1, SIZE)
    draft = tier.draft(key, SIZE)
    draft.lease.write(10, data[10:])
    assert (subject.visible(), tier.holds(key, SIZE), [*tier.inventory()]) == ([], False, [])
    draft.lease.write(0, data[:10])
    draft.publish()
    draft.discard()
    assert subject.read(key) == data
    assert subject.file(key).stat().st_size == subject.stored()
    assert tier.holds(key, SIZE)
    assert not tier.holds(key, SIZE + 2 * 4096)
    assert [held.key for held in tier.inventory()] == [key]
    assert not draft.lease.write(0, b"late")
    assert subject.read(key) == data


@pytest.fixture
def other(subject, tmp_path):
    """A tier of the simplest kind that takes the same keys."""
    one = EngineHandle("mp fs" if subject.takes is MPKey else "classic", tmp_path / "other")
    yield one
    one.close()


def test_what_it_holds_is_taken_over_by_a_tier_that_is_filled_after_it(subject, other):
    key = subject.key()
    data = subject.put(subject.open(), key)
    draft = other.open().draft(key, SIZE)
    assert EarlierTier(subject.declaration()).copy(ChunkRef(key, "path", "hash", SIZE), draft)
    draft.publish()
    assert other.read(key) == data
    assert subject.read(key) == data


def test_of_what_it_does_not_hold_as_it_must_be_nothing_is_taken_over(subject, other):
    tier, earlier = other.open(), EarlierTier(subject.declaration())

    def taken_over(key, size=SIZE):
        draft = tier.draft(key, size)
        try:
            return earlier.copy(ChunkRef(key, "path", "hash", size), draft)
        finally:
            draft.discard()

    key = subject.key()
    assert not taken_over(key)  # no directory
    subject.put(subject.open(), key)
    assert not taken_over(subject.key())
    assert not taken_over(key, SIZE + 5000 * TOKEN)
    assert taken_over(key)
    draft = tier.draft(key, SIZE)
    assert not earlier.copy(ChunkRef(key, "path", "hash", SIZE), draft, lambda: True)
    draft.discard()
    if subject.headers:
        whole = subject.file(key).read_bytes()
        subject.file(key).write_bytes(b"\xff" + whole[1:])
        assert not taken_over(key)
    subject.file(key).unlink()
    os.mkfifo(subject.file(key))
    assert not taken_over(key)


def test_a_discarded_chunk_leaves_nothing(subject):
    tier = subject.open(max_bytes=subject.stored())
    before = subject.names()
    for _ in range(3):  # the room for it is free again
        draft = tier.draft(subject.key(), SIZE)
        draft.discard()
        draft.discard()
    assert subject.names() == before


def test_a_file_of_another_size_is_overwritten(subject):
    subject.open()
    key = subject.key()
    subject.file(key).write_bytes(b"half")
    tier = subject.open(max_bytes=subject.stored())
    assert not tier.holds(key, SIZE)
    for size in (OTHER_SIZE, SIZE, SIZE):  # what it replaces gives room
        subject.put(tier, key, size)
    assert subject.read(key) == content(SIZE, SIZE)
    assert len(subject.visible()) == 1


def test_an_unpublishable_chunk_leaves_what_was_there(subject):
    tier, key = subject.open(), subject.key()
    subject.file(key).mkdir()
    draft = tier.draft(key, SIZE)
    with pytest.raises(TierError, match=r"\.data"):
        draft.publish()
    draft.discard()
    assert subject.file(key).is_dir()
    assert [name for name in subject.names() if name.endswith(".part")] == []
    assert (tier.holds(key, SIZE), [*tier.inventory()]) == (False, [])


def test_what_does_not_fit_the_budget_is_not_started(subject):
    first = subject.open()
    for _ in range(2):
        subject.put(first, subject.key())
    tier = subject.open(max_bytes=3 * subject.stored() + 1)
    names = subject.names()
    draft = tier.draft(subject.key(), SIZE)
    with pytest.raises(TierFullError, match="max_bytes") as caught:
        tier.draft(subject.key(), SIZE)
    assert caught.value.kind == "no_room"
    draft.discard()
    assert subject.names() == names
    subject.put(tier, subject.key())
    with pytest.raises(TierFullError):
        tier.draft(subject.key(), SIZE)
    next(path for path in subject.directory.rglob("*.data")).unlink()  # as an engine's own eviction does
    subject.put(tier, subject.key())
    assert len(subject.visible()) == 3


def test_a_chunk_larger_than_the_budget_evicts_nothing(subject):
    subject.put(subject.open(), subject.key())
    tier = subject.open(max_bytes=subject.stored() - 1, evict=True)
    with pytest.raises(TierFullError):
        tier.draft(subject.key(), SIZE)
    assert len(subject.visible()) == 1


def test_a_floor_of_free_space_is_kept(subject, monkeypatch):
    free = 10 * subject.stored()
    monkeypatch.setattr(rooms, "free_bytes", lambda _: free)
    tier = subject.open(min_free_bytes=free - subject.stored() - SIZE)
    subject.put(tier, subject.key())
    tier = subject.open(min_free_bytes=free - subject.stored() + 1)
    with pytest.raises(TierFullError, match="min_free_bytes"):
        tier.draft(subject.key(), SIZE)
    assert len(subject.visible()) == 1


def full_disk(monkeypatch, subject, chunks):
    """From now on the disk has room for as many chunks."""
    real, most = os.posix_fallocate, chunks * subject.stored()

    def free():
        return most - sum(path.stat().st_size for path in subject.directory.rglob("*@*@*.data"))

    def allocate(descriptor, at, size):
        if size > free():
            raise OSError(28, "No space left on device")
        real(descriptor, at, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(rooms, "free_bytes", lambda _: free())


def test_a_full_disk_is_no_room_and_leaves_nothing(subject, monkeypatch):
    tier = subject.open()
    subject.put(tier, subject.key())
    full_disk(monkeypatch, subject, 1)
    names = subject.names()
    with pytest.raises(TierFullError, match="No space left"):
        tier.draft(subject.key(), SIZE)
    assert subject.names() == names


def test_a_chunk_whose_file_another_makes_appears_whole_or_not_at_all(subject):
    tier, key = subject.open(max_bytes=subject.stored(), fsync=True), subject.key()
    data = content(SIZE, SIZE)
    for wrong in (data[:-1], data + b"x"):
        draft = tier.draft(key, SIZE)
        assert draft.roomy
        draft.path.write_bytes(wrong)
        with pytest.raises(TierError, match=f"{len(wrong)} bytes are there of the {SIZE}"):
            draft.publish()
        draft.discard()
    draft = tier.draft(key, SIZE)
    with pytest.raises(TierError, match="No such file"):
        draft.publish()
    draft.discard()
    assert [name for name in subject.names() if not name.endswith(".lock")] == []

    draft = tier.draft(key, SIZE)
    draft.path.write_bytes(data)
    assert subject.visible() == []
    draft.publish()
    assert subject.read(key) == data
    assert subject.file(key).stat().st_size == subject.stored()
    assert [one.key for one in tier.inventory()] == [key]


def test_a_file_that_another_makes_becomes_what_those_of_the_tier_are(subject):
    modes = set()
    for tier in (subject.open(chmod=0o640), subject.open()):
        made, filled = subject.key(), subject.key()
        draft = tier.draft(made, SIZE)
        draft.path.touch(0o600)
        draft.path.write_bytes(bytes(SIZE))
        draft.publish()
        subject.put(tier, filled)
        modes.add(mode := subject.file(made).stat().st_mode & 0o777)
        assert mode == subject.file(filled).stat().st_mode & 0o777
    assert 0o640 in modes
    assert len(modes) == 2


def test_blocks_are_reserved_first_where_there_is_little_room(subject, monkeypatch):
    floor, free = 1000, 0
    monkeypatch.setattr(rooms, "free_bytes", lambda _: free)
    tier = subject.open(min_free_bytes=floor)
    needed = 2 * subject.stored()
    free = floor + 2 * needed - 1  # twice what two drafts take, less a byte
    first, second = (tier.draft(subject.key(), SIZE) for _ in range(2))
    assert (first.roomy, second.roomy) == (True, False)
    assert second.path.stat().st_size == SIZE
    second.discard()
    first.discard()


def test_what_comes_later_takes_no_room_from_what_is_under_way(subject, monkeypatch):
    needed = subject.stored() + (SIZE if subject.headers else 0)
    free = 2 * subject.stored()
    monkeypatch.setattr(rooms, "free_bytes", lambda _: free)
    tier = subject.open()
    first = tier.draft(subject.key(), SIZE)
    assert first.roomy
    free = needed + SIZE
    second = tier.draft(subject.key(), SIZE)
    free = needed + SIZE - 1
    with pytest.raises(TierFullError, match=f"what is in progress is to take {SIZE}"):
        tier.draft(subject.key(), SIZE)
    second.discard()
    first.discard()
    tier.draft(subject.key(), SIZE).discard()


def test_a_floor_counts_what_files_are_still_to_take_that_others_make(subject, monkeypatch):
    free, floor = 100 * subject.stored(), 1000
    monkeypatch.setattr(rooms, "free_bytes", lambda _: free)
    tier = subject.open(min_free_bytes=floor)
    needed = subject.stored() + (SIZE if subject.headers else 0)
    first, other = tier.draft(subject.key(), SIZE), subject.key()  # of two paths on one disk, each in its own
    assert first.roomy
    free = floor + needed + SIZE - 1
    with pytest.raises(TierFullError, match="min_free_bytes"):
        tier.draft(other, SIZE)
    first.path.write_bytes(bytes(SIZE))  # then it is in what is free, or not
    tier.draft(other, SIZE).discard()
    first.path.unlink()
    first.discard()
    tier.draft(other, SIZE).discard()


def test_a_file_system_that_can_do_little_is_used_all_the_same(subject, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(os, "copy_file_range", unsupported)
    monkeypatch.setattr(directories, "_PIECE", 100)
    tier, key = subject.open(fsync=True), subject.key()
    data = subject.put(tier, key)
    assert subject.read(key) == data
    assert subject.file(key).stat().st_size == subject.stored()


def aged(subject, *keys):
    """Files that were written long ago, the first first."""
    for age, key in enumerate(keys):
        os.utime(subject.file(key), (1_000_000 + age, 1_000_000 + age))


@pytest.mark.parametrize("limit", ["budget", "floor", "disk"])
def test_the_oldest_make_room_where_that_is_allowed(subject, limit, monkeypatch):
    old = [subject.key() for _ in range(4)]
    for key in old:
        subject.put(subject.open(), key)
    aged(subject, *old)
    foreign = [subject.file(old[0]).parent / name for name in ("notes.data", "a@b.data", "x.tmp", ".hidden")]
    for path in foreign:
        path.write_bytes(b"x" * 100_000)
        os.utime(path, (1, 1))
    if limit == "budget":
        tier = subject.open(evict=True, max_bytes=4 * subject.stored())
    elif limit == "disk":
        tier = subject.open(evict=True)
        full_disk(monkeypatch, subject, 4)
    else:
        most = 4 * subject.stored() + 100_000
        monkeypatch.setattr(
            rooms, "free_bytes", lambda _: most - sum(p.stat().st_size for p in subject.directory.rglob("*@*@*.data"))
        )
        tier = subject.open(evict=True, min_free_bytes=99_999 - (SIZE if subject.headers else 0))
    # Of two paths, only the disk on which the chunk is to lie is looked at.
    new = next(key for number in range(500, 600) if same_path(subject, key := subject.key(number), old[0]))
    assert tier.holds(old[1], SIZE)  # found right, so it stays, though it is older than others

    subject.put(tier, new)

    gone = [old[0], old[2]] if limit == "disk" and subject.headers else [old[0]]  # those need their room twice
    assert [key for key in [*old, new] if not subject.file(key).exists()] == gone
    assert all(path.exists() for path in foreign)


def same_path(subject, one, other):
    return subject.file(one).parent == subject.file(other).parent


def test_nothing_that_this_run_wrote_or_found_makes_room(subject):
    keys = [subject.key() for _ in range(3)]
    subject.put(subject.open(), keys[0])
    aged(subject, keys[0])
    tier = subject.open(evict=True, max_bytes=2 * subject.stored())
    assert tier.holds(keys[0], SIZE)
    subject.put(tier, keys[1])
    with pytest.raises(TierFullError):
        tier.draft(keys[2], SIZE)
    # Nor what another run wrote that still goes on.
    with pytest.raises(TierFullError):
        subject.open(evict=True, max_bytes=2 * subject.stored()).draft(keys[2], SIZE)
    assert all(tier.holds(key, SIZE) for key in keys[:2])


def test_more_files_than_are_picked_at_once_make_room(subject, monkeypatch):
    monkeypatch.setattr(rooms, "_CANDIDATES", 2)
    old = [subject.key() for _ in range(5)]
    for key in old:
        subject.put(subject.open(), key)
    aged(subject, *old)
    tier = subject.open(evict=True, max_bytes=5 * subject.stored())
    new = [subject.key() for _ in range(5)]
    for key in new:
        subject.put(tier, key)
    assert {held.key for held in tier.inventory()} == set(new)


def test_many_drafts_at_once_stay_within_the_budget(subject):
    tier = subject.open(max_bytes=20 * subject.stored())
    full, errors = [], []

    def fill():
        for _ in range(10):
            try:
                subject.put(tier, subject.key())
            except TierFullError:
                full.append(1)
            except Exception as error:  # noqa: BLE001 - a thread tells nobody
                errors.append(error)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (len(subject.visible()), len(full)) == (20, 20)


def test_two_drafts_of_one_chunk_end_as_one_file(subject):
    tier, key = subject.open(max_bytes=2 * subject.stored()), subject.key()
    one, other = tier.draft(key, SIZE), tier.draft(key, SIZE)
    for draft, data in ((one, b"a" * SIZE), (other, b"b" * SIZE)):
        draft.lease.write(0, data)
    one.publish()
    other.publish()
    assert subject.read(key) == b"b" * SIZE
    subject.put(tier, subject.key())


LEAVE_BEHIND = """
import os, pickle, sys
from warmer.tiers import open_tier
declaration, key, size = pickle.loads(bytes.fromhex(sys.argv[1]))
open_tier(declaration).draft(key, size).lease.write(0, b"half")
os._exit(9)
"""


def test_what_a_dead_run_left_is_swept_by_the_next(subject):
    import pickle

    given = pickle.dumps((subject.declaration(), subject.key(), SIZE)).hex()
    subprocess.run([sys.executable, "-c", LEAVE_BEHIND, given], check=False)
    assert any(name.endswith(".part") for name in subject.names())
    assert subject.visible() == []
    tier = subject.open()
    assert {name.rpartition(".")[2] for name in subject.names()} == {"lock"}
    tier.draft(subject.key(), SIZE)
    tier.close()
    assert subject.names() == []


@pytest.mark.parametrize(
    "model",
    ["a b", "ümläut/模型", "-dash", ".dot", "a\\b", "new\nline", "org/x-SEP", "SEP-/y", "%2F", "a?*[x]", "'\"$HOME"],
)
def test_keys_of_odd_characters_have_files_of_their_own(subject, model):
    tier, key = subject.open(), subject.key(model=model)
    data = subject.put(tier, key)
    assert subject.read(key) == data
    assert [held.key for held in tier.inventory()] == [key]


@pytest.mark.parametrize("model", ["a-SEP-b", "org/a-SEP-b", "a-SEP/b", "a/SEP-b"])
def test_a_key_whose_file_another_key_has_too_is_refused(subject, model):
    if model == "a/SEP-b":  # this is the one that is read back
        assert subject.put(subject.open(), subject.key(model=model))
        return
    for ask in (subject.open().holds, subject.open().draft):
        with pytest.raises(KeyFormatError, match="-SEP-"):
            ask(subject.key(model=model), SIZE)
    assert subject.visible() == []


def test_keys_of_the_other_kind_are_refused(subject):
    other = classic_key(1) if subject.takes is MPKey else mp_key(1)
    for ask in (subject.open().holds, subject.open().draft):
        with pytest.raises(KeyFormatError, match="this tier holds keys of"):
            ask(other, SIZE)


@pytest.mark.parametrize(("model", "words"), [("m" * 300, "name too long"), ("a\x00b", "null byte")])
def test_a_key_that_no_file_can_bear_is_the_failure_of_that_chunk(subject, model, words):
    tier, key = subject.open(max_bytes=subject.stored()), subject.key(model=model)
    for _ in range(2):
        with pytest.raises(TierError, match=words):
            tier.draft(key, SIZE)
    with pytest.raises(TierError, match=words):
        tier.holds(key, SIZE)
    subject.put(tier, subject.key())


def owner(path):
    found = path.stat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


def test_files_get_the_mode_of_the_engines_own_or_the_one_asked_for(subject):
    previous = os.umask(0o027)
    try:
        keys = [subject.key(), subject.key()]
        subject.put(subject.open(), keys[0])
        subject.put(subject.open(chmod=0o664), keys[1])
    finally:
        os.umask(previous)
    assert [owner(subject.file(key))[2] for key in keys] == [0o640, 0o664]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_and_new_directories_belong_to_whom_they_are_to(subject):
    subject.directory.mkdir()
    os.chown(subject.directory, 4321, 4322)
    keys = [subject.key() for _ in range(4)]
    for key, chown in zip(keys, (None, "5001", "5001:5002", ":5002"), strict=True):
        subject.put(subject.open(chown=chown), key)
    owners = [owner(subject.file(key))[:2] for key in keys]
    # In a directory made here, which got the owner of the one that it lies in.
    assert owners == [(4321, 4322), (5001, 0), (5001, 5002), (0, 5002)]
    assert owner(subject.file(keys[0]).parent)[:2] == (4321, 4322)


def test_an_owner_that_cannot_be_is_an_error_before_the_first_chunk(subject, monkeypatch):
    with pytest.raises(TierError, match="no user 'nobody-of-that-name'"):
        subject.open(chown="nobody-of-that-name")
    with pytest.raises(TierError, match="no group 'no-such-group'"):
        subject.open(chown=":no-such-group")

    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    subject.directory.mkdir(exist_ok=True)
    with pytest.raises(TierError, match="cannot be given to '5001'"):
        subject.open(chown="5001")
    assert subject.names() == []
    subject.put(subject.open(), subject.key())  # by default as far as it goes


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a directory of somebody else's")
def test_files_that_the_directorys_owner_could_not_read_are_an_error(subject, monkeypatch):
    for path in subject.declaration().base_paths:
        path.mkdir(parents=True)
        os.chown(path, 4321, 4322)
    monkeypatch.setattr(os, "chown", lambda *_: None)
    previous = os.umask(0o077)
    try:
        with pytest.raises(TierError, match="user 4321, could not read"):
            subject.open()
        subject.open(chmod=0o644)
    finally:
        os.umask(previous)


def test_a_directory_that_cannot_be_made_is_an_error(subject):
    subject.directory.write_bytes(b"")
    with pytest.raises(TierError, match="tier"):
        subject.open()


def test_placeholders_are_replaced_on_the_node(tmp_path):
    place = NodeInfo("node-1", "ab12", {"pool": "serving", "up": "..", "deep": "a/b"})
    path = tmp_path / "{node_name}" / "{node_id}-{label:pool}" / "{{x}}"
    for declare in (classic(path), mp(path, type="fs")):
        declared = declare(TierOptions())
        (expanded,) = declared.at(place).base_paths
        assert expanded == tmp_path / "node-1" / "ab12-serving" / "{x}"
        open_tier(declared, place).close()
        assert expanded.is_dir()
        with pytest.raises(ConfigError, match=r"no value for \{node_name\}"):
            open_tier(declared)
    for unknown in ("{nodename}", "{label:}", "{}", "{", "}", "{a{node_id}}"):
        with pytest.raises(ConfigError, match="no placeholder"):
            mp(tmp_path / unknown, type="fs")(TierOptions())
    for label in ("up", "deep", "none"):
        with pytest.raises(ConfigError, match=f"label:{label}"):
            mp(tmp_path / f"{{label:{label}}}", type="fs")(TierOptions()).at(place)


@pytest.mark.parametrize(
    "options",
    [{"max_bytes": 0}, {"min_free_bytes": -1}, {"chmod": 0o1000}, {"chmod": -1}, {"chown": ""}, {"chown": "a:b:c"}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        TierOptions(**options)


MODELS = st.text(st.characters(codec="utf-8", exclude_characters="@\x00"), min_size=1, max_size=20) | st.lists(
    st.sampled_from(["a", "/", "-SEP-", "SEP", "-", "."]), min_size=1, max_size=6
).map("".join)
HASHES = st.integers(0, 2**64)
CLASSIC_KEYS = st.builds(
    ClassicKey,
    MODELS,
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(-(2**64), 2**64).map("{:x}".format),
    st.sampled_from(["half", "bfloat16"]),
    st.none() | st.integers(0, 99),
    st.lists(st.tuples(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text("a/-SEP ", max_size=8)), max_size=2).map(
        tuple
    ),
)
MP_KEYS = st.builds(
    MPKey,
    MODELS,
    st.integers(0, 2**33),
    st.integers(0, 300),
    HASHES.map("{:018x}".format),
    st.text(st.characters(codec="utf-8", exclude_characters="@/\\\x00"), max_size=10) | st.just("a-SEP-b"),
)


@pytest.fixture(scope="module")
def emptied(tmp_path_factory):
    """A tier of each kind, which is emptied before each example."""
    subjects = {kind: EngineHandle(kind, tmp_path_factory.mktemp("tier")) for kind in KINDS}
    tiers = {kind: subject.open() for kind, subject in subjects.items()}

    def one(kind):
        for path in subjects[kind].directory.rglob("*.data"):
            path.unlink()
        return tiers[kind]

    yield one
    for subject in subjects.values():
        subject.close()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_whatever_was_put_into_a_tier_is_read_back_as_it_was_or_was_refused(emptied, kind, data):
    keys = data.draw(st.lists(MP_KEYS if kind.startswith("mp") else CLASSIC_KEYS, max_size=5), "keys")
    tier = emptied(kind)
    held = {}
    for key in keys:
        text, size = str(key), data.draw(st.integers(1, 64), "tokens") * TOKEN
        try:
            draft = tier.draft(text, size)
        except KeyFormatError:
            assert "-SEP" in text
            continue
        draft.lease.write(0, bytes(size))
        draft.publish()
        held[text] = size
    layout = tier.declaration.layout
    assert {one.key for one in tier.inventory()} == set(held)
    if layout.alignment == 1:
        assert dict(tier.inventory()) == held
    assert all(tier.holds(text, size) for text, size in held.items())
    assert {key for path in tier.declaration.base_paths for key in directory_keys(path)} == set(held)


def test_foreign_files_are_in_no_inventory(subject):
    tier, key = subject.open(), subject.key()
    subject.put(tier, key)
    directory = subject.file(key).parent
    wrong = subject.declaration().base_paths[0 if directory != subject.declaration().base_paths[0] else -1]
    other = classic_key(1) if subject.takes is MPKey else mp_key(1)
    names = [subject.file(key).name.upper(), "x.data", f"{other}.data", "a@0x1@0@ff.data", "key@1@0@1@half.tmp"]
    for name in names:
        (directory / name.replace("/", "-SEP-")).write_bytes(b"foreign")
    if wrong != directory:  # where no engine looks for it
        (wrong / subject.file(key).name).write_bytes(b"foreign")
    (Path(os.fsdecode(os.fsencode(directory) + b"/\xff@1@0@1@half.data"))).write_bytes(b"no UTF-8")
    (directory / subject.file(subject.key()).name).symlink_to(subject.file(key))
    assert [held.key for held in tier.inventory()] == [key]


def test_a_directory_that_cannot_be_read_has_no_keys(tmp_path):
    with pytest.raises(ConfigError, match="no-such"):
        next(directory_keys(tmp_path / "no-such"))
