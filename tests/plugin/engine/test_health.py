"""LMCache's own health monitor over a whole engine: whatever the Hub does, the engine's cache is never switched off.

The monitor disables the engine, its local memory included, on one failed ping or ten gets that failed. LMCache's built-in
backend is the control: there it does.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from lmcache.v1.health_monitor.base import HealthMonitor
from lmcache.v1.health_monitor.checks.remote_backend_check import RemoteBackendHealthCheck
from lmcache.v1.storage_backend.connector.hfbucket_connector import HFBucketClient

from localhub.faults import Fault
from tests.support.lmcache_classic import OURS
from tests.support.lmcache_engine import CpuEngine, prompt
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine

CHUNK = 256
LMCACHES_PATIENCE = 10
"""Gets that may fail within an interval, by LMCache's default."""

_numbers = itertools.count(1)


class Watched:
    """An engine with a health monitor, a prompt in its own memory, and others that only the bucket holds."""

    def __init__(self, engine):
        self.engine = engine
        self.local = prompt(1, 2 * CHUNK)
        self.remote = [prompt(10 + number, CHUNK) for number in range(3)]
        for tokens in self.remote:
            self.store(tokens)
        engine.forget_local()
        self.store(self.local)
        self.backend = engine.remotes[0]
        self.monitor = HealthMonitor(SimpleNamespace(lmcache_engine=engine.engine), ping_interval=3600.0)
        engine.engine.set_health_monitor(self.monitor)
        assert [type(check) for check in self.monitor.get_health_checks()] == [RemoteBackendHealthCheck]

    def kv(self, tokens):
        return self.engine.random_kv(len(tokens), tokens[0])

    def store(self, tokens):
        self.engine.store(tokens, self.kv(tokens))
        self.engine.wait_written(tokens)

    def served(self, tokens):
        """How many tokens a request gets from the cache, and that they are right."""
        hit, found = self.engine.retrieve(tokens)
        assert torch.equal(found[:, :, :hit], self.kv(tokens)[:, :, :hit])
        return hit

    def get(self, tokens):
        """A get that a scheduler admitted before anything was known to fail: whatever lookups say meanwhile."""
        found = self.backend.batched_get_blocking(self.engine.keys(tokens))
        for memory_obj in found:
            if memory_obj is not None:
                memory_obj.ref_count_down()
        return [memory_obj is not None for memory_obj in found]

    def check(self):
        """One cycle of the monitor."""
        return self.monitor._execute().success

    @property
    def failed_gets(self):
        return self.backend.get_blocking_failed_count

    def close(self):
        self.monitor.stop()
        self.engine.close()


@pytest.fixture
def watched(hub, bucket, tmp_path, monkeypatch):
    """Makes watched engines: over ours, or over the built-in backend."""
    # The built-in knows no other Hub than the one of HF_ENDPOINT, which is read when a process starts.
    monkeypatch.setattr(
        HFBucketClient, "__init__", lambda self, token: setattr(self, "_api", HfApi(endpoint=hub.endpoint, token=False))
    )
    made = []

    def make(*, theirs=False, endpoint=hub.endpoint, extra=None, **settings):
        name = f"{tmp_path.name}-{next(_numbers)}"
        values = {
            "bucket_handle": f"hf://buckets/{bucket}/{name}",
            "download_tmp_dir": str(tmp_path / "tmp"),
            "metadata_cache_ttl_secs": 600,
        } | settings
        if not theirs:
            values = OURS | {"endpoint": endpoint, "lookup_timeout_secs": 20} | values
        document = {
            "chunk_size": CHUNK,
            "local_cpu": True,
            "max_local_cpu_size": 0.05,
            "save_unfull_chunk": False,
            "blocking_timeout_secs": 30,
            "remote_storage_plugins": ["hfbucket"],
            "extra_config": {f"remote_storage_plugin.hfbucket.{key}": value for key, value in values.items()}
            | (extra or {}),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        made.append(Watched(CpuEngine(name, path, layers=2, hidden=16, model=f"org/{name}")))
        return made[-1]

    yield make
    hub.control.clear_faults()
    for one in made:
        one.close()


OUTAGES = {
    "401": {"route": "*", "status": 401},
    "500": {"route": "*", "status": 500},
    "connections reset": {"route": "*", "reset": True},
    "data that hangs": {"route": "xorb-data", "hang": True},
    "everything missing at the read": {"route": "reconstruction", "status": 404},
    "flipped bytes": {"route": "xorb-data", "flip_every": 100},
}


def test_an_engine_that_is_well(watched):
    one = watched()

    assert one.check()
    assert one.served(one.local) == len(one.local)
    assert one.served(one.remote[0]) == CHUNK
    assert one.check()
    assert one.failed_gets == 0


@pytest.mark.parametrize("outage", OUTAGES)
def test_no_outage_disables_the_engine_and_its_own_memory_serves_on(hub, watched, outage):
    settings = {"flipped bytes": {"verify": "hash"}, "data that hangs": {"get_timeout_secs": 0.4}}.get(outage, {})
    one = watched(breaker_probe_secs=0.05, breaker_max_probe_secs=0.1, **settings)
    assert one.check()
    hub.control.add_fault(Fault(**OUTAGES[outage]))

    for number in range(LMCACHES_PATIENCE + 4):
        assert one.get(one.remote[number % 3]) == [False]
    assert one.failed_gets > LMCACHES_PATIENCE

    for _ in range(2):
        assert one.check()
        assert one.engine.engine.is_healthy()
        assert one.served(one.local) == len(one.local)
        assert one.served(one.remote[0]) == 0

    hub.control.clear_faults()
    assert one.check()
    assert one.served(one.local) == len(one.local)
    if outage in ("401", "500", "connections reset", "data that hangs"):
        assert eventually(lambda: one.get(one.remote[0]) == [True]), "and the bucket serves again"


def test_a_hub_that_is_gone_does_not_disable_the_engine(hub_factory, bucket, watched):
    hub = hub_factory()
    HfApi(endpoint=hub.endpoint, token=False).create_bucket(bucket)
    one = watched(endpoint=hub.endpoint)
    assert one.served(one.remote[0]) == CHUNK
    one.engine.forget_local()
    one.store(one.local)
    hub.stop()

    for _ in range(LMCACHES_PATIENCE + 2):
        assert one.get(one.remote[0]) == [False]

    assert one.failed_gets > LMCACHES_PATIENCE
    assert one.check()
    assert one.served(one.local) == len(one.local)
    assert one.served(one.remote[1]) == 0


def test_where_an_operator_set_the_threshold_requests_stay_below_it_by_themselves(hub, watched):
    extra = {"get_blocking_failed_threshold": LMCACHES_PATIENCE, "ping_interval": 3600}
    one = watched(extra=extra, breaker_failures=1000)
    assert one.check()
    hub.control.add_fault(Fault(route="xorb-data", truncate_at=10))

    for _ in range(3 * LMCACHES_PATIENCE):
        for tokens in one.remote:
            assert one.served(tokens) == 0  # looked up, then got, as a request is
            assert one.served(one.local) == len(one.local)

    assert 0 < one.failed_gets < LMCACHES_PATIENCE
    assert one.check()
    assert one.engine.engine.is_healthy()


def test_a_running_monitor_never_finds_the_engine_ill(hub, watched):
    one = watched()
    one.monitor.stop()
    seen = []

    class Noting(HealthMonitor):
        def _set_healthy(self, healthy):
            seen.append(healthy)
            super()._set_healthy(healthy)

    one.monitor = Noting(SimpleNamespace(lmcache_engine=one.engine.engine), ping_interval=0.02)
    one.engine.engine.set_health_monitor(one.monitor)
    one.monitor.start()
    hub.control.add_fault(Fault(route="*", status=503))

    for number in range(2 * LMCACHES_PATIENCE):
        one.get(one.remote[number % 3])
        assert one.served(one.local) == len(one.local)
    eventually(lambda: len(seen) >= 5)

    assert all(seen)
    assert one.failed_gets == 2 * LMCACHES_PATIENCE


# --- the control ----------------------------------------------------------------------------------------------------------


def test_the_built_in_disables_the_engine_when_the_hub_does_not_answer(hub, watched):
    one = watched(theirs=True)
    assert one.check()
    assert one.served(one.local) == len(one.local)
    hub.control.add_fault(Fault(route="*", status=401))

    assert not one.check()

    assert not one.engine.engine.is_healthy()
    assert one.served(one.local) == 0, "what lies in the engine's own memory is not served either"


def test_the_built_in_disables_the_engine_when_ten_gets_have_failed(hub, watched):
    one = watched(theirs=True)
    assert one.check()
    hub.control.add_fault(Fault(route="reconstruction", status=404))
    for number in range(LMCACHES_PATIENCE):
        assert one.get(one.remote[number % 3]) == [False]

    assert not one.check()

    assert one.served(one.local) == 0
    hub.control.clear_faults()
    assert not one.check(), "and not again for five minutes"
