"""What LMCache's own adapter wrote, ours reads in a real server, and the reverse; and what ours tells there."""

import json

import pytest
from huggingface_hub import HfApi

from hfbucket_plugin.config.settings import load
from hfbucket_plugin.core.deadline import Deadline
from hfbucket_plugin.core.telemetry import MemorySink
from hfbucket_plugin.hub.connect import open_bucket
from hfbucket_plugin.index.build import from_listing, publish
from hfbucket_plugin.index.store import IndexStore
from localhub.faults import Fault
from tests.plugin.engine.test_adapters import CHUNK, CHUNKS, HIT_L2, MODEL, TOKENS, objects, retrieved
from tests.support.lmcache_engine import prompt
from tests.support.lmcache_mp import Place, built_in, indexed, ours
from tests.support.lmcache_server import MPClient, MPServer
from tests.support.waiting import eventually

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def place_of(session_hub, tmp_path_factory):
    """The place that a kind of adapter has filled, and that has a key index; each is filled once."""
    places = {}

    def place(writer):
        if writer not in places:
            made = Place(session_hub.endpoint, f"tests/mp-cross-{len(places)}")
            HfApi(endpoint=made.endpoint, token=False).create_bucket(made.bucket_id)
            filled_by(writer, made)
            publish_index(made, tmp_path_factory.mktemp("index"))
            places[writer] = made
        return places[writer]

    return place


def serving(adapter, place):
    return MPServer([adapter(place)], chunk_size=CHUNK, env={"HF_ENDPOINT": place.endpoint})


def filled_by(adapter, place):
    api = HfApi(endpoint=place.endpoint, token=False)
    with serving(adapter, place) as server:
        with MPClient(server.address, model=MODEL) as client:
            client.store(prompt(1, TOKENS), client.random_kv(TOKENS, 1))
        eventually(lambda: len(objects(api, place)) == CHUNKS, 120, "every chunk in the bucket")


def publish_index(place, directory):
    values = {"bucket_handle": place.handle, "endpoint": place.endpoint}
    settings = load({f"remote_storage_plugin.hfbucket.{name}": value for name, value in values.items()}, "hfbucket")
    bucket = open_bucket(settings, "hfbucket", MemorySink(), 30.0)
    built = from_listing(bucket, directory, 30.0)
    publish(IndexStore(bucket, "builder"), built, Deadline.after(30.0))
    bucket.close()


@pytest.mark.parametrize(("writer", "reader"), [(built_in, ours), (ours, built_in), (built_in, indexed)])
def test_one_reads_what_the_other_wrote_beside_a_key_index(hub, place_of, writer, reader):
    place = place_of(writer)

    with serving(reader, place) as server:
        if reader is indexed:
            eventually(lambda: server.count("hfbucket_index_state", state="usable") == 1, 60, "an index in use")
        assert retrieved(server, MODEL) == (CHUNKS * CHUNK, True)
        eventually(lambda: server.count(HIT_L2, model_name=MODEL) == CHUNKS * CHUNK, 60, "hits of the adapter")
        if reader is indexed:
            assert server.count("hfbucket_index_answers_total", outcome="hit") >= CHUNKS
            assert server.count("hfbucket_hub_requests_total", route="paths-info") == 0


def test_an_outage_costs_a_server_one_deadline_a_request_and_its_state_is_told(hub, place_of):
    place = place_of(ours)

    with serving(ours, place) as server:
        hub.control.add_fault(Fault(route="paths-info", hang=True))
        with MPClient(server.address, model=MODEL) as client:
            assert [client.lookup(prompt(1, TOKENS)) for _ in range(5)] == [0] * 5

        eventually(lambda: server.count("hfbucket_breaker_open", part="lookup") == 1, 60, "an open breaker")
        assert server.count("hfbucket_chunks_total", operation="lookup", outcome="deadline") == 3 * CHUNKS
        assert server.count("hfbucket_chunks_total", operation="lookup", outcome="breaker") >= CHUNKS
        reported = json.dumps(server.status())
        assert "lookup is disabled for now" in reported
        assert '"breakers_open": ["lookup"]' in reported

        hub.control.clear_faults()
        eventually(lambda: retrieved(server, MODEL) == (CHUNKS * CHUNK, True), 60, "full service by itself")
        eventually(lambda: not server.count("hfbucket_breaker_open"), 60, "closed breakers")
        assert server.count("hfbucket_bytes_total", direction="read") > 0
