"""Servers that share a bucket and evict from it by LMCache's own controller, while others write, replace and delete."""

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lmcache.v1.distributed.config import EvictionConfig
from lmcache.v1.distributed.storage_controllers.eviction_controller import L2AdapterEvictionState, L2EvictionController

from hfbucket_plugin.core.keys import BucketHandle, ContentId
from hfbucket_plugin.engine.mp_usage import UsageListing
from hfbucket_plugin.hub.bucket import ObjectInfo
from tests.support.lmcache_mp import GIB, MP, lookup, mp_key, path_of, put
from tests.support.models import examples, untimed
from tests.support.surface import Limits

UNIT = 64
CAPACITY = 16 * UNIT
WATERMARK, RATIO = 0.8, 0.2
KEYS = [mp_key(number, "ada" if number % 2 else "") for number in range(20)]
NUMBERS = st.integers(0, len(KEYS) - 1)
CHANGES = st.lists(st.tuples(NUMBERS, st.integers(0, 2)), max_size=3)


class Transfer:
    """The store: it keeps no bytes."""

    ready = True

    def upload(self, leases, deadline, upload, taken):
        contents = []
        for lease in leases:
            data = lease.read(0, lease.size)
            contents.append(ContentId(hashlib.sha256(data).hexdigest(), len(data)))
            taken(lease)
        return contents

    def close(self):
        """Nothing is open."""


class SharedBucket:
    """A bucket in memory, as each server has its own client of it."""

    handle = BucketHandle.parse("hf://buckets/o/b/v1")
    transfer = Transfer()
    paused_secs = background_wait_secs = 0.0

    def __init__(self):
        self.objects = {}
        self.now = datetime.now(UTC)
        self.meanwhile = []  # changes by others, one before each page of a listing
        self.deleting = lambda: None

    @property
    def held(self):
        return sum(info.content.size for info in self.objects.values())

    def change(self, path, content):
        self.now += timedelta(seconds=1)
        self.objects.pop(path, None)
        if content is not None:
            self.objects[path] = ObjectInfo(path, content, self.now)

    def refuse_in_pause(self, what):
        """There are no pauses."""

    def stat(self, paths, deadline, *, patient=True, sent=None):
        if sent is not None:
            sent.set()
        return {path: self.objects[path] for path in paths if path in self.objects}

    def info(self, deadline):
        return {"totalFiles": len(self.objects)}

    def list_page(self, prefix, cursor, deadline):
        if self.meanwhile:
            self.meanwhile.pop()()
        names = sorted(path for path in self.objects if path > (cursor or ""))
        return [self.objects[path] for path in names[:4]], names[3] if len(names) > 4 else None

    def add(self, files, deadline):
        for path, content in files.items():
            self.change(path, content)
        return {}

    def delete(self, paths, deadline, *, once=False):
        self.deleting()
        for path in paths:
            self.change(path, None)
        return {}

    def close(self):
        """Nothing is open."""


class Server:
    """One server, whose listings run when the test says so."""

    def __init__(self, number, directory):
        self.mp = MP(
            f"hfbucket.f{number}",
            directory,
            handle="hf://buckets/o/b/v1",
            endpoint="http://127.0.0.1:9",
            limits=Limits(lookup=20, get=20, put=30),
            max_capacity_gb=CAPACITY / GIB,
            usage_refresh_secs=3600,
            metadata_cache_ttl_secs=0,
            object_sizes="any",
        )
        config = EvictionConfig("LRU", trigger_watermark=WATERMARK, eviction_ratio=RATIO)
        self.state = L2AdapterEvictionState(0, self.mp.adapter, config)
        self.controller = L2EvictionController([self.state])
        self.others_wrote = True
        """Since the listing of its account began: what others add or shrink, one cannot know."""

    @property
    def account(self):
        return self.mp.adapter._usage

    @property
    def listing(self):
        return self.mp.adapter._usage_listing

    def list(self):
        self.others_wrote = False
        self.listing._list()

    def evict(self):
        self.controller._check_and_evict(self.state)


class FleetMachine(RuleBasedStateMachine):
    """Whatever happens, nothing is evicted while the bucket holds less than the watermark, as far as that can be known."""

    directory = None
    shared = None

    @initialize(servers=st.integers(2, 5), sizes=st.lists(st.integers(0, 2), min_size=len(KEYS), max_size=len(KEYS)))
    def start(self, servers, sizes):
        self.bucket = self.shared()
        for key, size in zip(KEYS, sizes, strict=True):
            self.others(path_of(key), size)
        self.servers = [Server(number, self.directory) for number in range(servers)]
        for server in self.servers:
            server.list()

    def others(self, path, size, but=None):
        for server in getattr(self, "servers", []):
            server.others_wrote |= bool(size) and server is not but
        self.bucket.change(path, ContentId("f" * 64, size * UNIT) if size else None)

    def one(self, number):
        return self.servers[number % len(self.servers)]

    @rule(server=NUMBERS, keys=st.lists(NUMBERS, min_size=1, max_size=4, unique=True), size=st.integers(1, 2))
    def store(self, server, keys, size):
        before = dict(self.bucket.objects)
        assert put(self.one(server).mp, [KEYS[number] for number in keys], size * UNIT).is_successful()
        for other in self.servers:
            other.others_wrote |= other is not self.one(server) and before != self.bucket.objects

    @rule(server=NUMBERS, keys=st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
    def look(self, server, keys):
        wanted = [KEYS[number] for number in keys]
        mp = self.one(server).mp
        hits = lookup(mp, wanted)
        mp.adapter.submit_unlock([key for key, hit in zip(wanted, hits, strict=True) if hit])
        assert hits == [path_of(key) in self.bucket.objects for key in wanted]

    @rule(change=CHANGES)
    def others_change(self, change):
        for number, size in change:
            self.others(path_of(KEYS[number]), size)

    @rule(server=NUMBERS, changes=CHANGES)
    def list(self, server, changes):
        self.bucket.meanwhile = [
            (lambda number=number, size=size: self.others(path_of(KEYS[number]), size)) for number, size in changes
        ]
        self.one(server).list()
        self.bucket.meanwhile = []

    @rule(server=NUMBERS)
    def evict(self, server):
        one = self.one(server)

        def deleting():
            assert one.others_wrote or self.bucket.held >= WATERMARK * CAPACITY, "evicted below the watermark"

        self.bucket.deleting = deleting
        one.evict()
        self.bucket.deleting = lambda: None

    @rule()
    def all_evict(self):
        for number in range(len(self.servers)):
            self.evict(number)

    @invariant()
    def no_account_is_below_nothing(self):
        for server in getattr(self, "servers", []):
            assert server.account.total >= 0
            assert server.account.objects >= 0

    def teardown(self):
        if not hasattr(self, "servers"):
            return
        try:
            self.settle()
        finally:
            for server in self.servers:
                server.mp.close()

    def settle(self):
        """With nobody else there, all accounts become right, and the servers together end just below the watermark."""
        for server in self.servers:
            server.list()
            assert server.account.total == self.bucket.held
            assert server.account.objects == len(self.bucket.objects)
            salts = {"": 0, "ada": 0}
            for key in KEYS:
                info = self.bucket.objects.get(path_of(key))
                salts[key.cache_salt] += info.content.size if info is not None else 0
            assert all(size <= salts[salt] for salt, size in server.account.by_salt().items())
        held = self.bucket.held
        for _ in range(20):
            for number, server in enumerate(self.servers):
                self.evict(number)
                if not server.listing.settled:
                    server.list()
        assert self.bucket.held < WATERMARK * CAPACITY
        if held < WATERMARK * CAPACITY:
            assert self.bucket.held == held


@pytest.fixture(scope="module", autouse=True)
def _in_memory(tmp_path_factory):
    current = []

    def shared():
        current[:] = [SharedBucket()]
        return current[0]

    FleetMachine.shared = staticmethod(shared)
    FleetMachine.directory = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfbucket_plugin.store.chunk_store.open_bucket", lambda *_args, **_options: current[0])
        patch.setattr(UsageListing, "_want", lambda _self: None)
        patch.setattr("hfbucket_plugin.engine.mp_usage._RETRY_SECS", 0.0)  # no wait between first pages
        yield


TestFleet = FleetMachine.TestCase
TestFleet.settings = settings(untimed, max_examples=examples(20), stateful_step_count=25)
