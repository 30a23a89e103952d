"""Instances as a set: what each may do, in whole engines."""

import pytest

from hfbucket_plugin.core import telemetry
from tests.plugin.engine.test_engine import BUCKET, CHUNK, at_the_local_hub, configured, engines  # noqa: F401 - fixtures
from tests.support.buckets import paths
from tests.support.lmcache_classic import SEED_SEVERAL
from tests.support.lmcache_engine import prompt
from tests.support.waiting import eventually


def two_regions(**changes):
    return configured(SEED_SEVERAL, "hfbucket.us", "hfbucket.eu", local_cpu=False, save_unfull_chunk=False, **changes)


def holds(hub, engine):
    """How many chunks of the engine's model each instance holds."""
    own = [path for path in paths(hub.endpoint, BUCKET) if engine.metadata.model_name.replace("/", "%2F") in path]
    return {region: sum(path.startswith(f"{region}/") for path in own) for region in ("us", "eu")}


def test_a_fleet_that_may_read_us_writes_only_eu(engines, hub):  # noqa: F811
    tokens, more = prompt(21, 2 * CHUNK), prompt(22, 2 * CHUNK)
    american = engines(two_regions(**{"remote_storage_plugin.hfbucket.eu.role": "read-only"}))
    kv = american.random_kv(len(tokens), 21)
    american.store(tokens, kv)
    eventually(lambda: holds(hub, american) == {"us": 2, "eu": 0})

    european = engines(two_regions(**{"remote_storage_plugin.hfbucket.us.role": "read-only"}))
    hit, found = european.retrieve(tokens)
    assert hit == len(tokens)
    assert found.equal(kv)

    european.store(more, european.random_kv(len(more), 22))
    eventually(lambda: holds(hub, european) == {"us": 2, "eu": 2})
    us = european.remotes[0]
    assert not us.remove(european.keys(tokens)[0]), "a read-only instance deletes nothing"
    assert holds(hub, european) == {"us": 2, "eu": 2}


def test_an_instance_that_is_only_written_is_never_asked(engines, hub):  # noqa: F811
    tokens = prompt(23, CHUNK)
    engine = engines(
        two_regions(
            **{
                "remote_storage_plugin.hfbucket.us.role": "write-only",
                "remote_storage_plugin.hfbucket.eu.role": "read-only",
            }
        )
    )
    engine.store(tokens, engine.random_kv(CHUNK, 23))
    eventually(lambda: holds(hub, engine) == {"us": 1, "eu": 0})

    assert engine.lookup(tokens) == 0
    engine.forget_local()
    assert engine.retrieve(tokens)[0] == 0


@pytest.mark.parametrize(("location", "expected"), [("us", {"us": 1, "eu": 0}), ("eu", {"us": 0, "eu": 1})])
def test_lmcaches_own_store_location_is_respected(engines, hub, location, expected):  # noqa: F811
    tokens = prompt(24, CHUNK)
    engine = engines(two_regions(store_location=f"RemoteBackend-hfbucket.{location}"))

    engine.store(tokens, engine.random_kv(CHUNK, 24))

    eventually(lambda: holds(hub, engine) == expected)
    eventually(lambda: engine.lookup(tokens) == CHUNK)  # on a machine that is busy the first may end at its deadline


def test_what_a_role_keeps_from_being_done_is_counted(engines, hub):  # noqa: F811
    engine = engines(two_regions(**{"remote_storage_plugin.hfbucket.us.role": "write-only"}))
    sink = telemetry.default_sink()
    before = (
        sink._counters[telemetry.CHUNKS].labels(instance="hfbucket.us", operation="lookup", outcome="role")._value.get()
    )

    engine.lookup(prompt(25, CHUNK))

    after = (
        sink._counters[telemetry.CHUNKS].labels(instance="hfbucket.us", operation="lookup", outcome="role")._value.get()
    )
    assert after == before + 1
