"""How much is read at one time: inside an engine, and in a process of its own."""

import pickle

import pytest

from hfbucket_plugin.config.settings import InstanceSettings
from hfbucket_plugin.hub.connect import ReadProfile

MIB = 1024 * 1024


def settings(**named):
    return InstanceSettings(bucket_handle="hf://buckets/org/kv/prod", **named)


def test_an_engine_reads_as_its_settings_say():
    assert ReadProfile.online(settings()) == ReadProfile(32, 6 * MIB, 2 * MIB, 48 * MIB)
    named = settings(max_parallel_reads=8, max_inflight_bytes=4 * MIB)
    assert ReadProfile.online(named) == ReadProfile(8, 4 * MIB, 2 * MIB, 3 * MIB)


def test_a_process_of_its_own_reads_more_at_a_time():
    assert ReadProfile.bulk(settings()) == ReadProfile(64, 32 * MIB, 16 * MIB, 128 * MIB)


@pytest.mark.parametrize("travelled", [False, True])
def test_what_an_instance_names_holds_there_too(travelled):
    named = settings(max_parallel_reads=8, max_inflight_bytes=64 * MIB)  # the second is the engine's default, said
    if travelled:  # as settings go to the nodes
        named = pickle.loads(pickle.dumps(named.model_copy(update={"token": None})))  # noqa: S301 - our own bytes
    assert ReadProfile.bulk(named) == ReadProfile(8, 8 * MIB, 4 * MIB, 48 * MIB)
    small = settings(max_inflight_bytes=3 * MIB)
    assert ReadProfile.bulk(small) == ReadProfile(64, 3 * MIB, 3 * MIB, 3 * MIB * 3 // 4)
